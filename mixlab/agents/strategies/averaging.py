"""Local training, and rounds between in which neighbours average: as they are, or aligned."""

import jax
import jax.numpy as jnp

from mixlab import merge as merging
from mixlab import spec
from mixlab.agents.network import Network, kind_of
from mixlab.agents.parallel import Axis, Fetched
from mixlab.agents.strategies import alignment, core
from mixlab.agents.strategies.core import AgentState, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.align import Permutations
from mixlab.types import Array, PyTree

ALIGN = ("never", "once", "every", "universe")


@core.on_topology
def wa(
    topology: Topology,
    *,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "keep",
) -> Strategy:
    """Weighted averaging: every round each agent becomes the mean of its neighbourhood.

    Args:
        topology: who receives from whom, and the weights.
        merge: any method of `mixlab.merge` that makes one model of models alone, in the place of
            the weighted mean, such as `"median"`, see `Network.merge`.
        opt_state: what becomes of the optimizer's state at a merge: "keep" one's own, "reset"
            it, or "permute", which merges the moments together with the weights.

    Raises:
        ValueError: an unknown `opt_state` or method.

    Source: DIMAT (Saadati et al., CVPR 2024), the baseline WA: all entries of the state are
    averaged, BatchNorm statistics included, and nothing is aligned.
    """
    return gossip(topology, merge=merge, opt_state=opt_state)._replace(name="wa")


@core.on_topology
def gossip(
    topology: Topology,
    *,
    align: str = "never",
    matching: str = "activations",
    statistic: str = "correlation",
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "keep",
) -> Strategy:
    """Weighted averaging of agents that are first brought into one order of their hidden units.

    At the first communication every agent is matched to its parent in a breadth-first tree of
    the graph; permutations, composed down the tree, bring all into the order of agent 0. From
    then on the plain mean makes sense, also that of all agents. Who was absent then is matched to
    its neighbours when it returns. In aligned gossip, BatchNorm statistics are re-estimated
    before matching and after each merge, as in `dimat`.

    Args:
        topology: who receives from whom, and the weights; the tree takes edges both ways, and
            those of all rounds where the graph changes with time.
        align: "never" is `wa`; "once"; "every" aligns in every round; "universe" aligns once, and
            then matches each agent to the mean of all others until none moves, ten times around
            at most, for which everyone needs to see everyone's model.
        matching: by "activations" on the images of the problem, or by "weights".
        statistic: of activations, "correlation" or "second_moment".
        merge: as for `wa`.
        opt_state: as for `wa`; moments follow the weights when an agent is brought into order.

    Raises:
        ValueError: an unknown name.

    A Byzantine agent misleads those below it in the tree; in a universe by correlation it is one
    vote among all.
    """
    core.check_opt_state(opt_state)
    method = core.method_of(merge, topology)
    how = alignment.Matching(matching, statistic)
    if align not in ALIGN:
        raise ValueError(f"align={align!r} is unknown; {spec.nearest(align, ALIGN)}")

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        """Remembers who is in the common order."""
        if align in ("never", "every"):
            return state
        return state._replace(memory=jnp.zeros(axis.ids.shape, bool))

    def plan(network: Network, state: AgentState) -> tuple[alignment.Forest, Array]:
        """The forest of this round, and who is in the common order once it has been climbed."""
        everyone = jnp.ones(network.num_agents, bool)
        awake = everyone if network.awake is None else network.awake
        settled = ~everyone if align == "every" else network.axis.gather(state.memory)
        forest = alignment.spanning_forest(network.adjacency, awake, settled, network.lost)
        return forest, settled | (forest.level >= 0)

    def find(
        network: Network, problem: Problem, variables: PyTree, forest: alignment.Forest
    ) -> Permutations:
        return alignment.to_one_order(
            network, problem, how, variables, forest, universe=align == "universe"
        )

    def in_order(network: Network, problem: Problem, state: AgentState) -> AgentState:
        """The state after everyone awake was brought into the common order."""
        symmetry, each = how.symmetry(problem), network.axis.each
        forest, settled = plan(network, state)

        def bring(own: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            variables, moments = own
            variables = alignment.reestimated(network.axis, problem, variables)
            permutations = find(network, problem, variables, forest)
            return each(symmetry.permute)(permutations, (variables, moments))

        moments = () if opt_state == "reset" else state.opt_state
        own = (state.variables, moments)
        moving = forest.level > 0
        if align == "every":
            variables, moments = bring(own)
        else:
            variables, moments = jax.lax.cond(jnp.any(moving), bring, lambda own: own, own)
            state = state._replace(memory=settled[network.axis.ids])
        _count(network, state.variables, forest, universe=align == "universe")
        if opt_state == "reset":
            moments = state.opt_state
        return state._replace(variables=variables, opt_state=moments)

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        if align == "never":
            return _merged(network, problem, state, method, opt_state)
        state = _merged(network, problem, in_order(network, problem, state), method, opt_state)
        return state._replace(
            variables=alignment.reestimated(network.axis, problem, state.variables)
        )

    def match(network: Network, problem: Problem, state: AgentState) -> Permutations:
        variables = alignment.reestimated(network.axis, problem, state.variables)
        return find(network, problem, variables, plan(network, state)[0])

    return Strategy(
        "gossip",
        topology,
        "round",
        init,
        core.local_step,
        communicate,
        match if align != "never" else None,
        match_once=align != "every",
    )


@core.on_topology
def dimat(
    topology: Topology,
    *,
    matching: str = "activations",
    statistic: str = "correlation",
    batch: int | None = None,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
) -> Strategy:
    """Decentralized iterative merging and training: align the neighbours, then average.

    Every round each agent matches its neighbours' hidden units to its own, permutes them, and
    takes the weighted mean; then BatchNorm statistics are re-estimated. All agents merge from the
    same snapshot. Images that all agents share are seen once by each model, for all pairs that it
    takes part in, and each pair is matched once; where every agent has its own, it runs its
    neighbours' models on them. Which images those are is for the `Problem` to say; in a config it
    is the field `matching_data`, one of `proxy`, `local` and `global`.

    Args:
        topology: who receives from whom, and the weights.
        matching: by "activations" on the images of the problem, or by "weights" (git re-basin).
        statistic: of activations, "correlation" (DIMAT) or "second_moment" (git re-basin).
        batch: the number of images in one forward pass of matching, to spare memory; all at once
            by default.
        merge: any method of `mixlab.merge` that makes one model of models alone, in the place of
            the weighted mean, such as `"trimmed_mean(1)"`; it merges the aligned neighbourhood, see
            `Network.merge`.
        opt_state: what becomes of the optimizer's state at a merge: "reset" (DIMAT), "keep" one's
            own, or "permute": the neighbours' moments are sent, permuted and merged with their
            weights.

    Raises:
        ValueError: an unknown name.

    Source: Saadati et al., CVPR 2024, algorithm 1; matching after Li et al. 2015 and ZipIt.
    """
    core.check_opt_state(opt_state)
    method = core.method_of(merge, topology)
    how = alignment.Matching(matching, statistic, batch)

    def matched(
        network: Network, problem: Problem, state: AgentState
    ) -> tuple[PyTree, Fetched, Permutations]:
        """What an agent holds, what arrives, and the neighbours' permutations."""
        how.symmetry(problem)  # what is lacking is said before anything is computed
        variables = alignment.reestimated(network.axis, problem, state.variables)
        own, arrived = _sent(network, state._replace(variables=variables), opt_state)
        of_variables = Fetched(arrived.pool["variables"], arrived.rows)
        permutations = alignment.match_neighbours(network, problem, how, variables, of_variables)
        return own, arrived, permutations

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        symmetry, each = how.symmetry(problem), network.axis.each
        own, arrived, permutations = matched(network, problem, state)
        unmoved = symmetry.identity()

        def aligned(silent: Array, permutations: Permutations, models: PyTree) -> PyTree:
            def one(silent: Array, permutations: Permutations, model: PyTree) -> PyTree:
                # In the place of one that is silent is the agent itself, which is in order.
                return symmetry.permute(
                    {name: jnp.where(silent, unmoved[name], p) for name, p in permutations.items()},
                    model,
                )

            others = jax.vmap(one)(silent[1:], permutations, jax.tree.map(lambda x: x[1:], models))
            return jax.tree.map(lambda x, rest: jnp.concatenate([x[:1], rest]), models, others)

        models = each(aligned)(network.silent(), permutations, network.neighbourhood(own, arrived))
        merged = network.merge_neighbourhood(own, models, method)
        variables = alignment.reestimated(network.axis, problem, merged["variables"])
        if opt_state == "permute":
            return state._replace(variables=variables, opt_state=merged["moments"])
        moments = core.at_merge(opt_state, network, problem, state, variables["params"])
        return state._replace(variables=variables, opt_state=moments)

    return Strategy(
        "dimat",
        topology,
        "round",
        core.nothing_before,
        core.local_step,
        communicate,
        lambda network, problem, state: matched(network, problem, state)[2],
    )


def _sent(network: Network, state: AgentState, opt_state: str) -> tuple[PyTree, Fetched]:
    """What agents merge, moments included if they are "permute"d: one's own, and as it arrives."""
    own = {"variables": state.variables}
    arrived = {"variables": core.broadcast_variables(network, state.variables)}
    if opt_state == "permute":
        own["moments"] = state.opt_state
        arrived["moments"] = network.broadcast(state.opt_state, "parameters")
    return own, core.together(arrived)


def _merged(
    network: Network,
    problem: Problem,
    state: AgentState,
    method: merging.MergeMethod | None,
    opt_state: str,
) -> AgentState:
    """The state after each agent became the mixture of its neighbourhood, as it is."""
    if method is None:
        merged = {"variables": core.mix_variables(network, state.variables)}
        if opt_state == "permute":
            merged["moments"] = network.mix(state.opt_state)
    else:
        own, arrived = _sent(network, state, opt_state)
        merged = network.merge(own, arrived, method)
    variables = merged["variables"]
    if opt_state == "permute":
        return state._replace(variables=variables, opt_state=merged["moments"])
    moments = core.at_merge(opt_state, network, problem, state, variables["params"])
    return state._replace(variables=variables, opt_state=moments)


def _count(
    network: Network, variables: PyTree, forest: alignment.Forest, *, universe: bool
) -> None:
    """Counts the models that are sent to bring agents into one order."""
    moving, here = forest.level > 0, forest.level >= 0
    ids = jnp.arange(len(moving))
    if universe:
        hears = moving[:, None] & here & ~jnp.eye(len(ids), dtype=bool)
    else:
        hears = moving[:, None] & (forest.parent[:, None] == ids)
    sent, received = hears.sum(0, dtype=jnp.int32), hears.sum(1, dtype=jnp.int32)
    for name, value in variables.items():
        network.count(value, kind_of(name), sent, received)
