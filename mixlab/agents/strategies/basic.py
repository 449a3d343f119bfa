"""The two ends between which decentralized training lies: alone, and as one."""

import jax
import jax.numpy as jnp

from mixlab import merge, trees
from mixlab.agents.network import Network, kind_of
from mixlab.agents.parallel import Axis
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree


@core.on_topology
def none(topology: Topology) -> Strategy:
    """Isolated agents: nobody communicates, whatever the topology."""
    return Strategy("none", topology, "never", core.nothing_before, core.local_step, core.stay)


@core.on_topology
def data_parallel(topology: Topology, *, merge: str | merge.MergeMethod | None = None) -> Strategy:
    """One model, trained on the mean of all agents' gradients; the topology is not used.

    All agents start from agent 0's variables and optimizer state and stay equal. BatchNorm
    statistics are averaged likewise. An agent that was absent first takes what the others hold by
    now; its gradient, at what it held before, does not count in that step.

    Args:
        topology: gives the number of agents.
        merge: a rule in the place of the mean of gradients, as a parameter server would use
            against Byzantine workers: `"krum(2)"`, `"median"`, `"flag(rank=3)"`. The statistics
            are averaged then by the median.

    Raises:
        ValueError: an unknown rule.
    """
    method = core.method_of(merge)
    robust = core.method_of("median") if method is not None else None

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        first = axis.pick((state.variables, state.opt_state), 0)
        variables, opt_state = axis.each(lambda agent: first)(axis.ids)
        steps = jnp.zeros(axis.ids.shape, jnp.int32)  # counted where agents may be absent
        return state._replace(variables=variables, opt_state=opt_state, memory=steps)

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        among = None
        if network.awake is not None:
            state, among = _caught_up(network, state)
            state = state._replace(memory=state.memory + 1)
        grads = network.mean(gradients.grads, "gradients", method=method, among=among)
        stats = gradients.batch_stats
        if stats is not None:
            stats = network.mean(stats, "statistics", method=robust, among=among)
        gradients = gradients._replace(grads=grads, batch_stats=stats)
        return core.local_step(network, problem, state, gradients)

    return Strategy("data_parallel", topology, "always", init, local_step, core.stay)


def _caught_up(network: Network, state: AgentState) -> tuple[AgentState, Array]:
    """The state in which agents that return hold what the others do, and who did so before: [A]."""
    axis, awake = network.axis, network.awake
    assert awake is not None
    steps = axis.gather(state.memory)
    current = awake & (steps == jnp.max(jnp.where(awake, steps, -1)))
    behind = awake & ~current
    first = jnp.argmax(current)

    def take(held: PyTree) -> PyTree:
        newest = axis.pick(held, first)
        return trees.where(behind[axis.ids], axis.each(lambda agent: newest)(axis.ids), held)

    held = state.variables, state.opt_state, state.memory
    received = behind.astype(jnp.int32)
    sent = jnp.zeros_like(received).at[first].set(jnp.sum(received))
    for name, value in state.variables.items():
        network.count(value, kind_of(name), sent, received)
    network.count(state.opt_state, "parameters", sent, received)
    variables, opt_state, memory = jax.lax.cond(jnp.any(behind), take, lambda held: held, held)
    return state._replace(variables=variables, opt_state=opt_state, memory=memory), current
