"""Local training between rounds in which neighbours average, as they are or aligned."""

import jax
import jax.numpy as jnp

from mixlab import align
from mixlab import merge as merging
from mixlab.agents import alignment
from mixlab.agents.network import Network
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree


def wa(
    topology: Topology,
    *,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "keep",
) -> Strategy:
    """Weighted averaging: every round each agent becomes the mean of its neighbourhood.

    Args:
        topology: who receives from whom, and the weights.
        merge: any method of `mixlab.merge` in the place of the weighted mean, such as
            `"median"`, see `Network.merge`.
        opt_state: what becomes of the optimizer's state at a merge: "keep" one's own, "reset"
            it, or "permute", which averages the moments as the weights are.

    Source: DIMAT (Saadati et al., CVPR 2024), the baseline WA: all entries of the state are
    averaged, BatchNorm statistics included, and nothing is aligned.
    """
    core.check_opt_state(opt_state)
    method = core.method_of(merge)

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        return _mixed(network, problem, state, method, opt_state)

    return Strategy("wa", "round", core.nothing_before, core.local_step, communicate)


def gossip(
    topology: Topology,
    *,
    align: str = "never",
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "keep",
) -> Strategy:
    """Weighted averaging of agents that may first be brought into one basis."""
    return wa(topology, merge=merge, opt_state=opt_state)._replace(name="gossip")


def _mixed(
    network: Network,
    problem: Problem,
    state: AgentState,
    method: merging.MergeMethod | None,
    opt_state: str,
) -> AgentState:
    """The state after each agent became the mixture of its neighbourhood."""
    variables = core.mix_variables(network, state.variables, method)
    if opt_state == "permute":
        moments = network.mix(state.opt_state, "parameters", method=method)
    else:
        moments = core.at_merge(opt_state, network, problem, state, variables["params"])
    return state._replace(variables=variables, opt_state=moments)


def dimat(
    topology: Topology,
    *,
    statistic: str = "correlation",
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
) -> Strategy:
    """Decentralized iterative merging and training: align the neighbours, then average.

    Every round each agent matches its neighbours' hidden units to its own by their activations on
    the shared images, permutes them, and takes the weighted mean; then BatchNorm statistics are
    re-estimated. All agents merge from the same snapshot. One forward pass an agent serves all
    pairs that it takes part in.

    Args:
        topology: who receives from whom, and the weights.
        statistic: "correlation" (DIMAT) or "second_moment" (git re-basin).
        merge: any method of `mixlab.merge` in the place of the weighted mean, see
            `Network.merge`.
        opt_state: what becomes of the optimizer's state at a merge: "reset" (DIMAT), "keep" one's
            own, or "permute": the neighbours' moments are permuted and averaged as their weights.

    Source: Saadati et al., CVPR 2024, algorithm 1; matching after Li et al. 2015 and ZipIt.
    """
    core.check_opt_state(opt_state)
    method = core.method_of(merge)

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        symmetry, images = alignment.needs(problem)
        each = network.axis.each
        own: dict[str, PyTree] = {
            "variables": each(lambda v: problem.batch_stats(v, images))(state.variables)
        }
        everyone = {"variables": core.broadcast_variables(network, own["variables"])}
        if opt_state == "permute":
            own["moments"] = state.opt_state
            everyone["moments"] = network.broadcast(state.opt_state, "parameters")

        def see(variables: PyTree) -> PyTree:
            return symmetry.activations(variables, images)

        ours = each(see)(own["variables"])
        theirs = ours
        if network.late is not None or network.attack is not None:
            theirs = each(see)(jax.tree.map(lambda x: x[network.axis.ids], everyone["variables"]))
        theirs = network.axis.gather(theirs)

        def aligned(partners: Array, own_activations: PyTree, models: PyTree) -> PyTree:
            def one(partner: Array, model: PyTree) -> PyTree:
                permutations = align.match_activations(
                    own_activations,
                    jax.tree.map(lambda x: x[partner], theirs),
                    statistic=statistic,
                    backend=problem.assignment,
                    symmetry=symmetry,
                )
                return symmetry.permute(permutations, model)

            first, rest = (
                jax.tree.map(lambda x, s=s: x[s], models) for s in (slice(1), slice(1, None))
            )
            if partners.shape[0] == 1:
                return first
            others = jax.lax.map(lambda pair: one(*pair), (partners[1:], rest))
            return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, others)

        models = network.neighbourhood(own, everyone)
        models = each(aligned)(network.partners(), ours, models)
        merged = network.merge_neighbourhood(own, models, method)
        variables = each(lambda v: problem.batch_stats(v, images))(merged["variables"])
        moments = merged.get("moments")
        if opt_state != "permute":
            moments = core.at_merge(opt_state, network, problem, state, variables["params"])
        return state._replace(variables=variables, opt_state=moments)

    return Strategy("dimat", "round", core.nothing_before, core.local_step, communicate)
