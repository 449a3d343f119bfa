"""Graphs that change with time."""

from collections.abc import Sequence

import numpy as np

from mixlab.agents.topology.core import Topology
from mixlab.agents.topology.graphs import (
    check_connected,
    check_count,
    check_degree,
    circulant,
    regular,
    until_connected,
)
from mixlab.agents.topology.weights import uniform


def sequence(topologies: Sequence[Topology], *, connected: bool = True) -> Topology:
    """Topologies that take turns, one a round; after the last comes the first again.

    Args:
        topologies: at least one, all of the same number of agents. One that changes with time
            takes a turn of its whole period.
        connected: whether it is an error that the rounds together do not connect the agents.

    Raises:
        TypeError: one is no topology.
        ValueError: none or topologies of different sizes, or they are not connected.
    """
    for t in topologies:
        if not isinstance(t, Topology):
            raise TypeError(
                f"a sequence is of topologies, got {t!r}; names in text stand without quotes: "
                f"sequence([ring, star])"
            )
    sizes = {t.num_agents for t in topologies}
    if len(sizes) != 1:
        raise ValueError(f"a sequence needs topologies of one size, got sizes {sorted(sizes)}")
    name = f"sequence({', '.join(t.name for t in topologies)})"
    topology = Topology(name, np.concatenate([t.rounds for t in topologies]))
    return check_connected(topology) if connected else topology


def one_peer_exponential(n: int) -> Topology:
    """One hop of the exponential graph a round: agent i sends to i + 2**t, modulo n.

    The hops 1, 2, 4, ... below n take turns; sender and receiver weigh 1/2. Where n is a power of
    two a period reaches consensus exactly (Ying et al. 2021, "Exponential graph is provably
    efficient for decentralized deep training", section 4).

    Args:
        n: number of agents.
    """
    n = check_count(n)
    hops = [2**t for t in range((n - 1).bit_length())] or [0]
    return Topology("one_peer_exponential", np.stack([circulant(n, (-hop,)) for hop in hops]))


def matchings(n: int, rounds: int = 20, seed: int = 0) -> Topology:
    """Random pairs that average, new ones each round; of an odd number one agent is left out.

    The rounds are drawn anew until together they connect the agents, and repeat after the last
    (Boyd et al. 2006, "Randomized gossip algorithms"; SwarmSGD, Nadiradze et al. 2021).

    Args:
        n: number of agents.
        rounds: T, at least 1.
        seed: non-negative.

    Raises:
        ValueError: too few rounds to connect the agents.
    """
    check_count(n)
    _check_rounds(rounds)
    random = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        adjacency = np.zeros((rounds, n, n), bool)
        for edges in adjacency:
            i, j = random.permutation(n)[: n // 2 * 2].reshape(-1, 2).T
            edges[i, j] = edges[j, i] = True
        return np.stack([uniform(edges) for edges in adjacency])

    return until_connected(f"matchings(rounds={rounds}, seed={seed})", draw, "allow more rounds")


def peer_sampling(n: int, degree: int, rounds: int = 20, seed: int = 0) -> Topology:
    """A new random regular graph each round, as in epidemic learning.

    The rounds are drawn anew until together they connect the agents, and repeat after the last
    (De Vos et al. 2023, "Epidemic learning: boosting decentralized learning with randomized
    communication", whose oracle draws such graphs).

    Args:
        n: number of agents.
        degree: in [0, n); even where n is odd.
        rounds: T, at least 1.
        seed: non-negative.

    Raises:
        ValueError: there is no such graph, or there are too few rounds to connect the agents.
    """
    check_degree(n, degree)
    _check_rounds(rounds)
    random = np.random.default_rng(seed)
    return until_connected(
        f"peer_sampling(degree={degree}, rounds={rounds}, seed={seed})",
        lambda: np.stack([uniform(regular(n, degree, random)) for _ in range(rounds)]),
        "choose a larger degree, or more rounds",
    )


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"at least one round is needed, got rounds={rounds}")
