"""Who averages with whom: graphs of agents and their mixing matrices."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mixlab import spec

_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
    """A graph of A agents with its mixing matrix.

    Attributes:
        name: what was asked for, for tables and figures.
        weights: float64 [A, A], read-only. Row i holds the weights that agent i gives to what it
            receives: x_i <- sum_j weights[i, j] x_j. Non-negative, rows sum to one.
    """

    name: str
    weights: np.ndarray

    def __post_init__(self) -> None:
        w = np.array(self.weights, np.float64)
        if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.size:
            raise ValueError(f"{self.name}: weights must be [A, A], got shape {w.shape}")
        if not np.isfinite(w).all() or w.min() < 0:
            i, j = np.argwhere(~np.isfinite(w) | (w < 0))[0]
            raise ValueError(f"{self.name}: weights must be >= 0, got {w[i, j]} at [{i}, {j}]")
        sums = w.sum(axis=1)
        wrong = np.flatnonzero(np.abs(sums - 1) > _TOLERANCE)
        if wrong.size:
            i = wrong[0]
            raise ValueError(
                f"{self.name}: each row of the weights must sum to 1, row {i} sums to "
                f"{sums[i]:.6g}: {w[i]}; divide each row by its sum"
            )
        w.flags.writeable = False
        object.__setattr__(self, "weights", w)

    @property
    def num_agents(self) -> int:
        """A."""
        return len(self.weights)

    @functools.cached_property
    def adjacency(self) -> np.ndarray:
        """Bool [A, A]: whether agent i receives from agent j; the diagonal is False."""
        return (self.weights > 0) & ~np.eye(self.num_agents, dtype=bool)

    @property
    def degree(self) -> np.ndarray:
        """Int [A]: from how many others each agent receives."""
        return self.adjacency.sum(axis=1)

    def neighbours(self, i: int) -> np.ndarray:
        """Int: the agents, ascending, that agent i receives from, itself left out."""
        return np.flatnonzero(self.adjacency[i])

    @property
    def messages(self) -> int:
        """How many times a round one agent's parameters travel to another."""
        return int(self.adjacency.sum())

    @property
    def symmetric(self) -> bool:
        """Whether weights[i, j] = weights[j, i]."""
        return bool(np.allclose(self.weights, self.weights.T, rtol=0, atol=_TOLERANCE))

    @property
    def doubly_stochastic(self) -> bool:
        """Whether the columns sum to one too, so that mixing keeps the mean of the agents."""
        return bool(np.allclose(self.weights.sum(axis=0), 1, rtol=0, atol=_TOLERANCE))

    @functools.cached_property
    def diameter(self) -> float:
        """Rounds until what one agent knows has reached all, at worst; inf if it never does."""
        return max(_eccentricity(self.adjacency, i) for i in range(self.num_agents))

    @property
    def connected(self) -> bool:
        """Whether every agent's parameters reach every other (strongly, where directed)."""
        return math.isfinite(self.diameter)

    @functools.cached_property
    def spectral_gap(self) -> float:
        """1 - |lambda_2| in [0, 1]: 1 reaches consensus in one round, 0 never.

        lambda_2 is the eigenvalue of `weights` second largest in magnitude; the distance to
        consensus shrinks by about |lambda_2| a round (Boyd et al. 2004, "Fastest mixing Markov
        chain on a graph"). One agent has the gap 1.
        """
        w = self.weights
        values = np.linalg.eigvalsh(w) if self.symmetric else np.linalg.eigvals(w)
        magnitudes = np.sort(np.abs(values))
        return 1.0 if self.num_agents == 1 else float(np.clip(1 - magnitudes[-2], 0, 1))

    def __str__(self) -> str:
        low, high = self.degree.min(), self.degree.max()
        kind = (
            "symmetric"
            if self.symmetric
            else ("doubly stochastic" if self.doubly_stochastic else "row-stochastic")
        )
        return (
            f"{self.name}: {self.num_agents} agents, "
            f"degree {low if low == high else f'{low}-{high}'}, diameter {self.diameter:g}, "
            f"{kind}, spectral gap {self.spectral_gap:.4f}"
        )


def _eccentricity(adjacency: np.ndarray, start: int) -> float:
    """The longest of the shortest ways from `start` to any agent, along adjacency[start, .]."""
    distance = {start: 0}
    queue = collections.deque([start])
    while queue:
        i = queue.popleft()
        for j in np.flatnonzero(adjacency[i]):
            if int(j) not in distance:
                distance[int(j)] = distance[i] + 1
                queue.append(int(j))
    return max(distance.values()) if len(distance) == len(adjacency) else math.inf


def metropolis(adjacency: np.ndarray) -> np.ndarray:
    """Metropolis-Hastings weights: symmetric and doubly stochastic for any undirected graph.

    w_ij = 1 / (1 + max(degree_i, degree_j)) for neighbours, the rest stays with oneself (Xiao and
    Boyd 2004, "Fast linear iterations for distributed averaging").

    Args:
        adjacency: bool [A, A], symmetric, False on the diagonal.

    Returns:
        float64 [A, A].

    Raises:
        ValueError: `adjacency` is not symmetric.
    """
    if (adjacency != adjacency.T).any():
        i, j = np.argwhere(adjacency != adjacency.T)[0]
        raise ValueError(
            f"Metropolis-Hastings weights need an undirected graph, but the edge between {i} and "
            f"{j} goes one way"
        )
    degree = adjacency.sum(axis=1)
    w = np.where(adjacency, 1 / (1 + np.maximum(degree[:, None], degree)), 0.0)
    return w + np.diag(1 - w.sum(axis=1))


def uniform(adjacency: np.ndarray) -> np.ndarray:
    """Each agent averages itself and its neighbours evenly: 1 / (1 + degree_i), float64 [A, A].

    Rows sum to one. Columns do only where all degrees are equal; elsewhere mixing moves the mean
    of the agents towards those with many neighbours.

    Args:
        adjacency: bool [A, A], False on the diagonal.
    """
    closed = adjacency | np.eye(len(adjacency), dtype=bool)
    return closed / closed.sum(axis=1, keepdims=True)


WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "metropolis": metropolis,
    "uniform": uniform,
}
"""The rules that make a mixing matrix from a graph."""


def _rule(weights: str) -> Callable[[np.ndarray], np.ndarray]:
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; {spec.nearest(weights, WEIGHTS)}")
    return WEIGHTS[weights]


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"a topology needs at least one agent, got n={n}")


def _check_connected(topology: Topology) -> Topology:
    if not topology.connected:
        raise ValueError(
            f"{topology.name} is not connected: agents cannot reach consensus; add edges, or "
            f"allow it with connected=False"
        )
    return topology


def _circulant(n: int, offsets: Iterable[int]) -> np.ndarray:
    """Uniform weights where agent i receives from i + offset, modulo n."""
    _check_count(n)
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
        ValueError: an edge names no agent or joins one to itself, or the graph is not connected.
    """
    _check_count(n)
    adjacency = np.zeros((n, n), bool)
    for i, j in edges:
        if not (0 <= i < n and 0 <= j < n) or i == j:
            raise ValueError(f"{name}: edge ({i}, {j}) must join two different agents in [0, {n})")
        adjacency[i, j] = adjacency[j, i] = True
    topology = Topology(name, _rule(weights)(adjacency))
    return _check_connected(topology) if connected else topology


def from_matrix(
    weights: Sequence[Sequence[float]] | np.ndarray,
    *,
    connected: bool = True,
    name: str = "from_matrix",
) -> Topology:
    """Given weights.

    Args:
        weights: [A, A], non-negative, rows sum to one; row i weighs what agent i receives.
        connected: whether a graph that is not connected is an error.
        name: for tables and figures.

    Raises:
        ValueError: the weights are not such a matrix; the message names the row.
    """
    topology = Topology(name, np.asarray(weights, np.float64))
    return _check_connected(topology) if connected else topology


def disconnected(n: int) -> Topology:
    """Nobody mixes: the identity."""
    _check_count(n)
    return Topology("disconnected", np.eye(n))


def complete(n: int) -> Topology:
    """Everyone with everyone: all weights 1/n."""
    return Topology("complete", _circulant(n, range(n)))


def ring(n: int, *, directed: bool = False) -> Topology:
    """A circle: 1/3 each for oneself and the two neighbours, 1/2 each where n = 2.

    Args:
        n: number of agents.
        directed: receive from agent i - 1 only, with weight 1/2.
    """
    if directed:
        return Topology("ring(directed)", _circulant(n, (-1,)))
    return Topology("ring", _circulant(n, (-1, 1)))


def exponential(n: int, *, base: int = 2, symmetric: bool = False) -> Topology:
    """The static exponential graph: agent i receives from i + base**k, modulo n.

    Uniform weights 1 / (1 + degree). Its gap shrinks only as 1 / log(n) at degree log(n) (Ying et
    al. 2021, "Exponential graph is provably efficient for decentralized deep training", eq. 2).

    Args:
        n: number of agents.
        base: at least 2; the offsets are 1, base, base**2, ... below n.
        symmetric: take the offsets up to n/2, and both ways, which makes the graph undirected.
    """
    if base < 2:
        raise ValueError(f"an exponential graph needs base >= 2, got {base}")
    limit = n // 2 if symmetric else n - 1
    offsets = [base**k for k in range(n.bit_length()) if base**k <= limit]
    parts = ([f"base={base}"] if base != 2 else []) + (["symmetric"] if symmetric else [])
    name = f"exponential({', '.join(parts)})" if parts else "exponential"
    return Topology(name, _circulant(n, offsets + [-o for o in offsets] * symmetric))


def star(n: int, *, weights: str = "metropolis") -> Topology:
    """Agent 0 with everyone; the others with agent 0 only.

    Args:
        n: number of agents.
        weights: one of `WEIGHTS`.
    """
    return from_edges(n, [(0, i) for i in range(1, n)], weights=weights, name="star")


def bipartite(n: int, *, weights: str = "metropolis") -> Topology:
    """Two hubs, the last two agents, each with all others; nobody else is joined.

    The bipartite graph of DIMAT (Saadati et al. 2024).

    Args:
        n: number of agents, at least 3.
        weights: one of `WEIGHTS`, or `"dimat"`: 1 / (n - 1) rounded down to hundredths for each
            edge, as in its published files; from n = 102 that would be zero.

    Raises:
        ValueError: too few agents, or too many for `"dimat"`.
    """
    if n < 3:
        raise ValueError(f"two hubs and someone else are at least 3 agents, got n={n}")
    edges = [(i, hub) for i in range(n - 2) for hub in (n - 2, n - 1)]
    if weights != "dimat":
        return from_edges(n, edges, weights=weights, name="bipartite")
    share = 100 // (n - 1) / 100
    if share == 0:
        raise ValueError(f"bipartite weights of 'dimat' are zero from n=102, got n={n}")
    w = np.zeros((n, n))
    for i, j in edges:
        w[i, j] = w[j, i] = share
    return Topology("bipartite(dimat)", w + np.diag(1 - w.sum(axis=1)))


def _sides(n: int, rows: int | None) -> tuple[int, int]:
    _check_count(n)
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
    """
    height, width = _sides(n, rows)
    down = [(i, (i + width) % n) for i in range(n)]
    right = [(i, i // width * width + (i + 1) % width) for i in range(n)]
    edges = [(i, j) for i, j in down + right if i != j]
    return from_edges(n, edges, name=f"torus({height}x{width})")


def erdos_renyi(n: int, p: float, seed: int = 0, *, weights: str = "metropolis") -> Topology:
    """A random graph: each pair is joined with probability p, drawn anew until connected.

    The name says which draw was taken. (Erdős and Rényi 1959; Gilbert 1959.)

    Args:
        n: number of agents.
        p: in [0, 1].
        seed: non-negative.
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: p is out of range, or a thousand draws gave no connected graph.
    """
    _check_count(n)
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability in [0, 1], got {p}")
    random = np.random.default_rng(seed)
    for draw in range(1, 1001):
        edges = np.argwhere(np.triu(random.random((n, n)) < p, 1))
        name = f"erdos_renyi(p={p:g}, seed={seed}, draw {draw})"
        topology = from_edges(n, edges, weights=weights, connected=False, name=name)
        if topology.connected:
            return topology
    raise ValueError(
        f"erdos_renyi: none of 1000 draws with n={n}, p={p} is connected; graphs are mostly "
        f"connected above p = ln(n)/n = {math.log(n) / n:.2f}"
    )


_VOCABULARY: dict[str, Callable[..., Topology]] = {
    fn.__name__: fn
    for fn in (
        bipartite, complete, disconnected, erdos_renyi, exponential, from_edges, grid, ring,
        star, torus,
    )
}  # fmt: skip


def parse(text: str, num_agents: int) -> Topology:
    """The topology that `text` describes, for so many agents.

    Args:
        text: a constructor of this module without its `n`: `"ring"`, `"torus(rows=2)"`,
            `"erdos_renyi(p=0.4, seed=1)"`, `"from_matrix([[0.5, 0.5], [0.5, 0.5]])"`.
        num_agents: A.

    Raises:
        ValueError: the text names no topology, does not parse, or asks for one that is not
            possible with `num_agents`.
        TypeError: the constructor takes no such argument.
    """
    vocabulary: dict[str, Callable[..., Topology]] = {
        name: functools.partial(fn, num_agents) for name, fn in _VOCABULARY.items()
    }
    topology = spec.parse(text, {**vocabulary, "from_matrix": from_matrix})
    if topology.num_agents != num_agents:
        raise ValueError(f"{text!r} is for {topology.num_agents} agents, there are {num_agents}")
    return topology
