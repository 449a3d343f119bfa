"""Who averages with whom: graphs of agents, fixed or changing with time, and mixing matrices."""

import functools
from collections.abc import Callable

from mixlab import spec
from mixlab.agents.topology.core import Topology
from mixlab.agents.topology.graphs import (
    bipartite,
    complete,
    disconnected,
    erdos_renyi,
    exponential,
    from_edges,
    from_matrix,
    from_networkx,
    grid,
    hypercube,
    random_regular,
    ring,
    small_world,
    star,
    torus,
)
from mixlab.agents.topology.sequences import (
    matchings,
    one_peer_exponential,
    peer_sampling,
    sequence,
)
from mixlab.agents.topology.weights import WEIGHTS, dimat, metropolis, push, uniform

__all__ = [
    "TOPOLOGIES",
    "WEIGHTS",
    "Topology",
    "bipartite",
    "complete",
    "dimat",
    "disconnected",
    "erdos_renyi",
    "exponential",
    "from_edges",
    "from_matrix",
    "from_networkx",
    "grid",
    "hypercube",
    "matchings",
    "metropolis",
    "one_peer_exponential",
    "parse",
    "peer_sampling",
    "push",
    "random_regular",
    "ring",
    "sequence",
    "small_world",
    "star",
    "torus",
    "uniform",
]

TOPOLOGIES: dict[str, Callable[..., Topology]] = {
    fn.__name__: fn
    for fn in (
        bipartite, complete, disconnected, erdos_renyi, exponential, from_edges, grid, hypercube,
        matchings, one_peer_exponential, peer_sampling, random_regular, ring, small_world, star,
        torus,
    )
}  # fmt: skip
"""Every topology of any number of agents, which is its function's first argument, by its name."""


def parse(text: str, num_agents: int) -> Topology:
    """The topology that `text` describes, for so many agents.

    Args:
        text: one of `TOPOLOGIES` without its number of agents: `"ring"`, `"torus(rows=2)"`,
            `"erdos_renyi(p=0.4, seed=1)"`, `"from_matrix([[0.5, 0.5], [0.5, 0.5]])"`,
            `"sequence([ring, torus(rows=2)])"`.
        num_agents: A.

    Raises:
        ValueError: the text names no topology, does not parse, or asks for one that is not
            possible with `num_agents`.
        TypeError: the constructor takes no such argument.
    """
    vocabulary: dict[str, Callable[..., Topology]] = {
        name: functools.partial(fn, num_agents) for name, fn in TOPOLOGIES.items()
    }
    topology = spec.parse(text, {**vocabulary, "from_matrix": from_matrix, "sequence": sequence})
    if not isinstance(topology, Topology):
        raise ValueError(f"{text!r} names several topologies; to alternate, sequence([...])")
    if topology.num_agents != num_agents:
        raise ValueError(f"{text!r} is for {topology.num_agents} agents, there are {num_agents}")
    return topology
