"""The two ends between which decentralized training lies: alone, and as one."""

from mixlab import merge
from mixlab.agents.network import Network
from mixlab.agents.parallel import Axis
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy
from mixlab.agents.topology import Topology


def none(topology: Topology) -> Strategy:
    """Isolated agents: nobody communicates."""
    return Strategy("none", "never", core.nothing_before, core.local_step, core.stay)


def data_parallel(topology: Topology, *, merge: str | merge.MergeMethod | None = None) -> Strategy:
    """One model, trained on the mean of all agents' gradients; the topology is not used.

    All agents start from agent 0's variables and optimizer state and stay equal. BatchNorm
    statistics are averaged likewise.

    Args:
        topology: gives the number of agents.
        merge: a rule in the place of the mean of gradients, as a parameter server would use
            against Byzantine workers: `"krum(f=2)"`, `"median"`, `"flag_aggregator(...)"`. The
            statistics are averaged then by the median.
    """
    method = core.method_of(merge)
    robust = core.method_of("median") if method is not None else None

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        first = axis.pick((state.variables, state.opt_state), 0)
        variables, opt_state = axis.each(lambda agent: first)(axis.ids)
        return state._replace(variables=variables, opt_state=opt_state)

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        grads = network.mean(gradients.grads, "gradients", method=method)
        stats = gradients.batch_stats
        if stats is not None:
            stats = network.mean(stats, "statistics", method=robust)
        gradients = gradients._replace(grads=grads, batch_stats=stats)
        return core.local_step(network, problem, state, gradients)

    return Strategy("data_parallel", "always", init, local_step, core.stay)
