"""Strategies that send less than their parameters."""

import jax
import jax.numpy as jnp

from mixlab.agents import compression
from mixlab.agents.network import Network
from mixlab.agents.parallel import Axis
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree


@core.on_topology
def choco(
    topology: Topology,
    compressor: str | compression.Compressor = "top_k(0.1)",
    *,
    gamma: float = 0.4,
) -> Strategy:
    """CHOCO-SGD: agents gossip over public copies of themselves, kept up to date by small messages.

    After the local update each agent adds the compressed difference between its model and its
    public copy to the copy; that message is all it sends. Then
    `x_i <- x_i + gamma sum_j W_ij (copy_j - copy_i)`. What a compressor leaves out stays in the
    difference and is sent later. The copies begin at zero. A message that does not arrive in
    time is taken to arrive before the next, as the method needs; until then the receiver gives
    the sender's weight to itself. Where that is not mutual, of agents that are late or messages
    lost one way, the mean of the agents moves a little. The statistics of BatchNorm, which are
    small, are mixed uncompressed.

    Args:
        topology: with doubly stochastic weights that do not vary with time: a copy of an agent is
            kept up to date only by agents that receive its every message.
        compressor: what is sent of a difference, see `mixlab.agents.compression`.
        gamma: in (0, 1], the step of the gossip; the coarser the compressor, the smaller.

    Raises:
        ValueError: the weights are not doubly stochastic or vary with time, or gamma is out of
            range.

    Source: Koloskova, Stich and Jaggi, ICML 2019, algorithm 2.
    """
    topology.require_doubly_stochastic("choco")
    if topology.period > 1:
        raise ValueError(
            f"choco needs the same neighbours in every step, and those of {topology.name} vary "
            f"over {topology.period} rounds; use a fixed graph, or dpsgd"
        )
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    small = compression.parse(compressor)

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        return state._replace(memory=jax.tree.map(jnp.zeros_like, state.variables["params"]))

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        state = core.local_step(network, problem, state, gradients)
        params, each = state.variables["params"], network.axis.each

        def update(agent: Array, public: PyTree, x: PyTree) -> PyTree:
            missing = jax.tree.map(lambda a, b: a - b, x, public)
            sent = small.compress(jax.random.fold_in(network.key, agent), missing)
            return jax.tree.map(lambda a, b: a + b, public, sent)

        public = each(update)(network.axis.ids, state.memory, params)
        one = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), params)
        mixed = network.mix(public, num_bytes=small.num_bytes(one))
        params = jax.tree.map(lambda x, m, p: x + gamma * (m - p), params, mixed, public)
        stats = state.variables.get("batch_stats")
        if stats is not None:
            stats = network.mix(stats, "statistics")
        return core.with_model(state, params, stats)._replace(memory=public)

    return Strategy("choco", topology, "step", init, local_step, core.stay)
