"""Mix agents: decentralized training in which agents train locally and merge with neighbours."""

from mixlab.agents import partition, topology
from mixlab.agents.network import Network, mix
from mixlab.agents.parallel import Axis, Parallel, force_cpu_devices, parallel
from mixlab.agents.strategies import (
    AgentState,
    Consensus,
    Gradients,
    Problem,
    Strategy,
    consensus,
    data_parallel,
    dimat,
    gossip,
    none,
    parse,
    wa,
)
from mixlab.agents.topology import (
    Topology,
    complete,
    disconnected,
    erdos_renyi,
    exponential,
    from_edges,
    from_matrix,
    ring,
    star,
    torus,
)

__all__ = [
    "AgentState",
    "Axis",
    "Consensus",
    "Gradients",
    "Network",
    "Parallel",
    "Problem",
    "Strategy",
    "Topology",
    "complete",
    "consensus",
    "data_parallel",
    "dimat",
    "disconnected",
    "erdos_renyi",
    "exponential",
    "force_cpu_devices",
    "from_edges",
    "from_matrix",
    "gossip",
    "mix",
    "none",
    "parallel",
    "parse",
    "partition",
    "ring",
    "star",
    "topology",
    "torus",
    "wa",
]
