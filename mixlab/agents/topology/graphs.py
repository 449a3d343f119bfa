"""Graphs that do not change with time."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mixlab.agents.topology.core import TOLERANCE, Topology, edges_of
from mixlab.agents.topology.weights import rule_of, two_hubs, uniform


def check_count(n: int) -> int:
    """The number of agents; refuses what is no whole number, and a topology of nobody."""
    if not hasattr(n, "__index__"):
        raise TypeError(f"the number of agents is a whole number such as 8, got n={n!r}")
    count = operator.index(n)
    if count < 1:
        raise ValueError(f"a topology needs at least one agent, got n={n}")
    return count


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability in [0, 1], got {p}")


def check_connected(topology: Topology) -> Topology:
    """Gives the topology back, or refuses one that is in parts."""
    if not topology.connected:
        raise ValueError(
            f"{topology.name} is not connected: agents cannot reach consensus; add edges, or "
            f"allow it with connected=False"
        )
    return topology


def circulant(n: int, offsets: Iterable[int]) -> np.ndarray:
    """Uniform weights where agent i receives from i + offset, modulo n."""
    check_count(n)
    adjacency = np.zeros((n, n), bool)
    for offset in offsets:
        adjacency[np.arange(n), (np.arange(n) + offset) % n] = True
    np.fill_diagonal(adjacency, False)
    return uniform(adjacency)


def from_edges(
    n: int,
    edges: Sequence[tuple[int, int]] | np.ndarray,
    *,
    weights: str = "metropolis",
    connected: bool = True,
    name: str = "from_edges",
) -> Topology:
    """An undirected graph.

    Args:
        n: number of agents.
        edges: pairs [E, 2] of different agents in [0, n); an edge may be named more than once.
        weights: one of `WEIGHTS`.
        connected: whether a graph that is not connected is an error.
        name: for tables and figures.

    Raises:
        ValueError: the edges are not pairs of whole numbers, one names no agent or joins one to
            itself, the graph is not connected, or the weights are unknown or do not fit it.
    """
    check_count(n)
    pairs = np.asarray(edges)
    if pairs.size == 0:
        pairs = np.zeros((0, 2), int)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(
            f"{name}: edges must be pairs [E, 2] of agents' numbers, got {pairs.dtype} "
            f"{list(pairs.shape)}; weighted edges go to from_matrix"
        )
    wrong = pairs[((pairs < 0) | (pairs >= n)).any(axis=1) | (pairs[:, 0] == pairs[:, 1])]
    if wrong.size:
        i, j = wrong[0]
        raise ValueError(f"{name}: edge ({i}, {j}) must join two different agents in [0, {n})")
    adjacency = np.zeros((n, n), bool)
    adjacency[pairs[:, 0], pairs[:, 1]] = True
    topology = Topology(name, rule_of(weights)(adjacency | adjacency.T))
    return check_connected(topology) if connected else topology


def from_matrix(
    weights: Sequence[Sequence[float]] | np.ndarray,
    *,
    connected: bool = True,
    name: str = "from_matrix",
) -> Topology:
    """Given weights.

    Args:
        weights: [A, A], or [T, A, A] for rounds that take turns; non-negative, rows sum to one;
            row i weighs what agent i receives.
        connected: whether a graph that is not connected is an error.
        name: for tables and figures.

    Raises:
        ValueError: the weights are not such a matrix; the message names the row.
    """
    topology = Topology(name, np.asarray(weights, np.float64))
    return check_connected(topology) if connected else topology


def from_networkx(graph: Any, *, weights: str | None = None, connected: bool = True) -> Topology:
    """A graph of networkx; its nodes, in its order, are the agents 0, 1, ...

    An edge (u, v) of a directed graph is a message from u to v. Edges with the attribute `weight`
    give the weights themselves: v gives that of (u, v) to what u sends, and what a row lacks to
    one stays with oneself.

    Args:
        graph: a `networkx.Graph` or `DiGraph`; any object with `nodes`, `edges(data=True)` and
            `is_directed()`.
        weights: one of `WEIGHTS`, whatever the edges say. By default the edges' own, or, where
            they have none, `"metropolis"` for an undirected and `"uniform"` for a directed graph.
        connected: whether a graph that is not connected is an error.

    Raises:
        ValueError: only some edges have a `weight`, the weights that come in at a node are
            negative or more than one, or the graph is not connected.
    """
    name = f"from_networkx({graph.name})" if getattr(graph, "name", "") else "from_networkx"
    number = {node: i for i, node in enumerate(graph.nodes)}
    check_count(len(number))
    edges = [(number[u], number[v], data.get("weight")) for u, v, data in graph.edges(data=True)]
    if not graph.is_directed():
        edges += [(v, u, weight) for u, v, weight in edges if u != v]
    weighted = [weight is not None for *_, weight in edges]
    if weights is None and any(weighted) and not all(weighted):
        u, v, _ = edges[weighted.index(False)]
        raise ValueError(
            f"{name}: some edges have a weight, the one between agents {u} and {v} has none; give "
            f"it one, or choose weights='metropolis' or 'uniform'"
        )
    w = np.zeros((len(number), len(number)))
    own = weights is None and any(weighted)
    for u, v, weight in edges:
        w[v, u] += weight if own else 1
    if own:
        rest = 1 - w.sum(axis=1)
        if rest.min() < -TOLERANCE:
            raise ValueError(
                f"{name}: the weights of the edges into agent {rest.argmin()} sum to "
                f"{1 - rest.min():.6g}, more than one; scale them, or choose "
                f"weights='metropolis' or 'uniform'"
            )
        w += np.diag(np.where(np.diag(w) > 0, 0, np.maximum(rest, 0)))
    else:
        w = rule_of(weights or ("uniform" if graph.is_directed() else "metropolis"))(edges_of(w))
    topology = Topology(name, w)
    return check_connected(topology) if connected else topology


def disconnected(n: int) -> Topology:
    """Nobody mixes: the identity."""
    check_count(n)
    return Topology("disconnected", np.eye(n))


def complete(n: int) -> Topology:
    """Everyone with everyone: all weights 1/n."""
    return Topology("complete", circulant(n, range(check_count(n))))


def ring(n: int, *, directed: bool = False) -> Topology:
    """A circle: 1/3 each for oneself and the two neighbours, 1/2 each where n = 2.

    Args:
        n: number of agents.
        directed: receive from agent i - 1 only, with weight 1/2.
    """
    if directed:
        return Topology("ring(directed)", circulant(n, (-1,)))
    return Topology("ring", circulant(n, (-1, 1)))


def exponential(n: int, *, base: int = 2, symmetric: bool = False) -> Topology:
    """The static exponential graph: agent i receives from i + base**k, modulo n.

    Uniform weights 1 / (1 + degree). Its gap shrinks only as 1 / log(n) at degree log(n) (Ying et
    al. 2021, "Exponential graph is provably efficient for decentralized deep training", eq. 2).

    Args:
        n: number of agents.
        base: at least 2; the offsets are 1, base, base**2, ... below n.
        symmetric: take the offsets up to n/2, and both ways, which makes the graph undirected.

    Raises:
        ValueError: no agents, or a base below 2.
    """
    n = check_count(n)
    if base < 2:
        raise ValueError(f"an exponential graph needs base >= 2, got {base}")
    limit = n // 2 if symmetric else n - 1
    offsets = [base**k for k in range(n.bit_length()) if base**k <= limit]
    parts = ([f"base={base}"] if base != 2 else []) + (["symmetric"] if symmetric else [])
    name = f"exponential({', '.join(parts)})" if parts else "exponential"
    return Topology(name, circulant(n, offsets + [-o for o in offsets] * symmetric))


def star(n: int, *, weights: str = "metropolis") -> Topology:
    """Agent 0 with everyone; the others with agent 0 only.

    Args:
        n: number of agents.
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: no agents, or weights that are unknown or do not fit the graph.
    """
    return from_edges(n, [(0, i) for i in range(1, check_count(n))], weights=weights, name="star")


def bipartite(n: int, *, weights: str = "metropolis") -> Topology:
    """Two hubs, the last two agents, each with all others; nobody else is joined.

    The bipartite graph of DIMAT (Saadati et al. 2024).

    Args:
        n: number of agents, at least 3.
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: too few agents, or too many for `"dimat"`.
    """
    if check_count(n) < 3:
        raise ValueError(f"two hubs and someone else are at least 3 agents, got n={n}")
    name = "bipartite(dimat)" if weights == "dimat" else "bipartite"
    return from_edges(n, np.argwhere(two_hubs(n)), weights=weights, name=name)


def hypercube(n: int) -> Topology:
    """The corners of a cube of log2(n) dimensions: agents whose numbers differ in one bit.

    Equal weights 1 / (1 + log2(n)); its gap is 2 / (1 + log2(n)).

    Args:
        n: number of agents, a power of two.

    Raises:
        ValueError: it is no power of two.
    """
    n = check_count(n)
    if n & (n - 1):
        raise ValueError(f"a hypercube has a power of two of agents, got n={n}")
    edges = [(i, i ^ 1 << bit) for i in range(n) for bit in range(n.bit_length() - 1)]
    return from_edges(n, edges, name="hypercube")


def _sides(n: int, rows: int | None) -> tuple[int, int]:
    check_count(n)
    if rows is None:
        rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    if rows < 1 or n % rows:
        raise ValueError(f"{n} agents do not fill {rows} rows evenly; choose a divisor of {n}")
    return rows, n // rows


def grid(n: int, rows: int | None = None, *, weights: str = "metropolis") -> Topology:
    """A rectangle, numbered row by row: each agent with those beside, above and below.

    Args:
        n: number of agents.
        rows: a divisor of n; by default the one that makes the rectangle most square.
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: rows that do not divide n, or weights that are unknown or do not fit the graph.
    """
    height, width = _sides(n, rows)
    edges = [(i, i + 1) for i in range(n) if (i + 1) % width]
    edges += [(i, i + width) for i in range(n - width)]
    return from_edges(n, edges, weights=weights, name=f"grid({height}x{width})")


def torus(n: int, rows: int | None = None) -> Topology:
    """A rectangle whose opposite sides are joined: up to four neighbours, equal weights.

    Args:
        n: number of agents.
        rows: a divisor of n; by default the one that makes the rectangle most square (a prime
            number of agents makes a ring).

    Raises:
        ValueError: rows that do not divide n.
    """
    height, width = _sides(n, rows)
    down = [(i, (i + width) % n) for i in range(n)]
    right = [(i, i // width * width + (i + 1) % width) for i in range(n)]
    edges = [(i, j) for i, j in down + right if i != j]
    return from_edges(n, edges, name=f"torus({height}x{width})")


def until_connected(name: str, draw: Callable[[], np.ndarray], hint: str) -> Topology:
    """The first of a thousand draws of weights, [A, A] or [T, A, A], that connects the agents."""
    for count in range(1, 1001):
        topology = Topology(f"{name[:-1]}, draw {count})" if count > 1 else name, draw())
        if topology.connected:
            return topology
    raise ValueError(f"{name}: none of 1000 draws is connected; {hint}")


def erdos_renyi(n: int, p: float, seed: int = 0, *, weights: str = "metropolis") -> Topology:
    """A random graph: each pair is joined with probability p, drawn anew until connected.

    The name says which draw was taken, if not the first. (Erdős and Rényi 1959; Gilbert 1959.)

    Args:
        n: number of agents.
        p: in [0, 1].
        seed: non-negative.
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: p is out of range, or a thousand draws gave no connected graph.
    """
    check_count(n)
    _check_probability(p)
    random = np.random.default_rng(seed)
    of = rule_of(weights)

    def draw() -> np.ndarray:
        upper = np.triu(random.random((n, n)) < p, 1)
        return of(upper | upper.T)

    return until_connected(
        f"erdos_renyi(p={p:g}, seed={seed})",
        draw,
        f"graphs of {n} agents are mostly connected above p = ln(n)/n = {math.log(n) / n:.2f}",
    )


def small_world(
    n: int, k: int = 4, p: float = 0.1, seed: int = 0, *, weights: str = "metropolis"
) -> Topology:
    """A ring of near neighbours with some edges led elsewhere, drawn anew until connected.

    Each agent is joined with the k nearest on a circle, then the far end of each edge is moved to
    a random agent with probability p (Watts and Strogatz 1998, "Collective dynamics of
    'small-world' networks").

    Args:
        n: number of agents.
        k: neighbours before the rewiring, even, in [2, n).
        p: in [0, 1].
        seed: non-negative.
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: k or p is out of range, or a thousand draws gave no connected graph.
    """
    check_count(n)
    _check_probability(p)
    if k % 2 or not 2 <= k < n:
        raise ValueError(f"small_world: k must be even and in [2, n={n}), got {k}")
    random = np.random.default_rng(seed)
    of = rule_of(weights)
    start = edges_of(circulant(n, [o for hop in range(1, k // 2 + 1) for o in (hop, -hop)]))

    def draw() -> np.ndarray:
        adjacency = start.copy()
        for hop in range(1, k // 2 + 1):
            for i in np.flatnonzero(random.random(n) < p):
                free = np.flatnonzero(~adjacency[i] & (np.arange(n) != i))
                if free.size:
                    j, other = (i + hop) % n, random.choice(free)
                    adjacency[[i, j], [j, i]] = False
                    adjacency[[i, other], [other, i]] = True
        return of(adjacency)

    return until_connected(
        f"small_world(k={k}, p={p:g}, seed={seed})", draw, "choose a larger k or a smaller p"
    )


def regular(n: int, degree: int, random: np.random.Generator) -> np.ndarray:
    """A random graph in which all have so many neighbours, bool [A, A].

    Open ends are paired at random, over again for those whose pair is no new edge (Steger and
    Wormald 1999, "Generating random regular graphs quickly"); where many edges are wanted, those
    that are left out are drawn.
    """
    if 2 * degree > n - 1:
        return ~regular(n, n - 1 - degree, random) & ~np.eye(n, dtype=bool)
    while True:
        adjacency = np.zeros((n, n), bool)
        ends = np.repeat(np.arange(n), degree)
        while ends.size:
            left = np.unique(ends)
            if (adjacency | np.eye(n, dtype=bool))[np.ix_(left, left)].all():
                break  # No two open ends can be joined: begin again.
            i, j = np.sort(random.permutation(ends).reshape(-1, 2), axis=1).T
            fits = np.zeros(len(i), bool)
            fits[np.unique(i * n + j, return_index=True)[1]] = True
            fits &= (i != j) & ~adjacency[i, j]
            adjacency[i[fits], j[fits]] = adjacency[j[fits], i[fits]] = True
            ends = np.concatenate([i[~fits], j[~fits]])
        else:
            return adjacency


def check_degree(n: int, degree: int) -> None:
    """Refuses a degree that n agents cannot all have."""
    check_count(n)
    if not 0 <= degree < n or n * degree % 2:
        raise ValueError(
            f"no graph gives {n} agents {degree} neighbours each: the degree must be in [0, {n}), "
            f"and even where the number of agents is odd"
        )


def random_regular(n: int, degree: int, seed: int = 0) -> Topology:
    """A random graph in which all have so many neighbours, drawn anew until connected.

    Equal weights 1 / (1 + degree). From degree 3 on its gap stays away from zero however many
    agents there are (Friedman 2008, "A proof of Alon's second eigenvalue conjecture").

    Args:
        n: number of agents.
        degree: in [0, n); even where n is odd.
        seed: non-negative.

    Raises:
        ValueError: there is no such graph, or a thousand draws gave no connected one.
    """
    check_degree(n, degree)
    random = np.random.default_rng(seed)
    return until_connected(
        f"random_regular(degree={degree}, seed={seed})",
        lambda: uniform(regular(n, degree, random)),
        "choose a degree of at least 3",
    )
