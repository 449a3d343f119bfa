"""Strategies that carry a second quantity along, so that all agents reach the same optimum."""

import jax
import jax.numpy as jnp
import optax

from mixlab.agents.network import Network
from mixlab.agents.parallel import Axis
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree


@core.on_topology
def sgp(topology: Topology) -> Strategy:
    """Stochastic gradient push: push-sum on directed graphs, whatever the degrees.

    Each agent sends shares of what it has, `x_i <- sum_j P_ij (x_j + update_j)` with columns of P
    that sum to one, and of a weight likewise, `w_i <- sum_j P_ij w_j`, from 1 on. The model is
    `z = x / w`, at which gradients are taken: a biased P changes w as it does x. The
    statistics of BatchNorm are shared with the same weight. With a doubly stochastic P all w stay
    one, and what is left is `dpsgd(order="adapt_then_combine")`. A share that is lost
    stays with its sender, and one that is late exchanges nothing, so that the sum of all w does
    not change, nor gathers with who is late.

    Args:
        topology: the graph; the weights are made by the rule "push".

    Source: Assran et al., ICML 2019, algorithm 1.
    """

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        return state._replace(memory=jnp.ones(axis.ids.shape, jnp.float32))

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        changes, opt_state = core.updates(network, problem, state, gradients.grads)
        weight = state.memory
        # x + update = z w + update: in units of the model the update is divided by the weight.
        shares = network.axis.each(
            lambda z, u, w: jax.tree.map(lambda a, b: a * w.astype(a.dtype) + b, z, u)
        )(state.variables["params"], changes, weight)
        sent = {"params": shares, "weight": weight}
        mixed = network.mix(sent)
        params = _divided(network, mixed["params"], mixed["weight"])
        stats = gradients.batch_stats
        if stats is not None:
            stats = network.axis.each(
                lambda s, w: jax.tree.map(lambda a: a * w.astype(a.dtype), s)
            )(stats, weight)
            stats = _divided(network, network.mix(stats, "statistics"), mixed["weight"])
        state = core.with_model(state, params, stats)
        return state._replace(opt_state=opt_state, memory=mixed["weight"])

    return Strategy("sgp", topology, "step", init, local_step, core.stay, rule="push")


def _divided(network: Network, tree: PyTree, weight: Array) -> PyTree:
    return network.axis.each(lambda x, w: jax.tree.map(lambda a: a / w.astype(a.dtype), x))(
        tree, weight
    )


@core.on_topology
def gradient_tracking(topology: Topology) -> Strategy:
    """Gradient tracking: agents mix an estimate of the mean gradient as well as parameters.

    `y_i <- sum_j W_ij y_j + g_i - (g_i of the step before)`, then
    `x_i <- sum_j W_ij x_j + update(y_i)`. The mean of all y is that of all gradients, so the
    fixed point is an optimum of the common loss even where the agents' own optima lie apart,
    as those of `dpsgd` are not. That mean is kept as long as the mixing keeps means: messages
    that are lost one way, and agents that are late, let it drift.

    Args:
        topology: with doubly stochastic weights.

    Raises:
        ValueError: the weights are not doubly stochastic.

    Source: Nedić, Olshevsky and Shi, SIAM J. Optim. 27(4), 2017 (DIGing); Pu and Nedić,
    Math. Programming 187, 2021 (stochastic gradients).
    """
    topology.require_doubly_stochastic("gradient_tracking")

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        zeros = jax.tree.map(jnp.zeros_like, state.variables["params"])
        return state._replace(memory={"tracked": zeros, "last": zeros})

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        grads, last = gradients.grads, state.memory["last"]
        mixed = network.mix(state.memory["tracked"], "gradients")
        tracked = jax.tree.map(lambda y, new, old: y + (new - old), mixed, grads, last)
        changes, opt_state = core.updates(network, problem, state, tracked)
        seen = core.with_model(state, state.variables["params"], gradients.batch_stats)
        variables = core.mix_variables(network, seen.variables)
        variables["params"] = optax.apply_updates(variables["params"], changes)
        memory = {"tracked": tracked, "last": grads}
        return state._replace(variables=variables, opt_state=opt_state, memory=memory)

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        return state._replace(variables=core.mix_variables(network, state.variables))

    return Strategy("gradient_tracking", topology, "step", init, local_step, communicate)
