"""Who averages with whom: graphs of agents, fixed or changing with time, and mixing matrices."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from mixlab import spec

_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
    """A graph of A agents with its mixing matrix, or T of them that take turns, round by round.

    A graph that does not change is the case of one round, T = 1: `rounds`, `period` and `at` serve
    both. Round t = 0, 1, ... mixes with `rounds[t % period]`.

    Attributes:
        name: what was asked for, for tables and figures.
        weights: float64 [A, A], or [T, A, A] where they change with time; read-only. Row i holds
            the weights that agent i gives to what it receives: x_i <- sum_j weights[i, j] x_j.
            Non-negative, rows sum to one.
    """

    name: str
    weights: np.ndarray

    def __post_init__(self) -> None:
        w = np.array(self.weights, np.float64)
        if w.ndim not in (2, 3) or w.shape[-2] != w.shape[-1] or not w.size:
            raise ValueError(
                f"{self.name}: weights must be [A, A], got shape {w.shape}; or [T, A, A] where "
                f"they change with time"
            )
        if not np.isfinite(w).all() or w.min() < 0:
            where = np.argwhere(~np.isfinite(w) | (w < 0))[0]
            raise ValueError(
                f"{self.name}: weights must be >= 0, got {w[tuple(where)]} at {where.tolist()}"
            )
        sums = w.sum(axis=-1)
        wrong = np.argwhere(np.abs(sums - 1) > _TOLERANCE)
        if wrong.size:
            *turn, i = wrong[0]
            of = f" of round {turn[0]}" if turn else ""
            raise ValueError(
                f"{self.name}: each row of the weights must sum to 1, row {i}{of} sums to "
                f"{sums[*turn, i]:.6g}: {w[*turn, i]}; divide each row by its sum"
            )
        w.flags.writeable = False
        object.__setattr__(self, "weights", w)

    @property
    def num_agents(self) -> int:
        """A."""
        return self.weights.shape[-1]

    @property
    def rounds(self) -> np.ndarray:
        """Float64 [T, A, A]: the weights of each round of a period."""
        return self.weights.reshape(-1, self.num_agents, self.num_agents)

    @property
    def period(self) -> int:
        """T, after how many rounds the weights repeat; 1 where they do not change."""
        return len(self.rounds)

    def at(self, t: int) -> "Topology":
        """The topology of round t >= 0 alone: number t modulo T of the period."""
        if self.weights.ndim == 2:
            return self
        t %= self.period
        return Topology(f"{self.name}, round {t}", self.rounds[t])

    @functools.cached_property
    def adjacency(self) -> np.ndarray:
        """Bool [A, A]: whether agent i receives from agent j, in any round; the diagonal False."""
        return np.any(_edges(self.rounds), axis=0)

    @property
    def degree(self) -> np.ndarray:
        """Int [A]: from how many others each agent receives, over a period."""
        return self.adjacency.sum(axis=1)

    def neighbours(self, i: int) -> np.ndarray:
        """Int: the agents, ascending, that agent i receives from over a period, without itself."""
        return np.flatnonzero(self.adjacency[i])

    @property
    def messages(self) -> float:
        """How many times a round one agent's parameters travel to another, the period's mean."""
        return _edges(self.rounds).sum() / self.period

    def mixing_matrix(self, rule: str | np.ndarray | None = None) -> np.ndarray:
        """The weights that a rule gives to this graph.

        Args:
            rule: None, the topology's own; one of `WEIGHTS`; `"push"`, see `push`; or given
                weights of the same shape as the topology's own, zero where there is no edge.

        Returns:
            float64 [A, A], or [T, A, A] where the topology changes with time. Rows sum to one,
            those of `"push"` need not.

        Raises:
            ValueError: the rule is unknown or has no weights for this graph, or the given weights
                are not row-stochastic or use an edge that is not there.
        """
        if rule is None:
            return self.weights
        if isinstance(rule, str):
            of = push if rule == "push" else _rule(rule)
            made = np.stack([of(edges) for edges in _edges(self.rounds)])
            return made.reshape(self.weights.shape)
        given = Topology(f"weights for {self.name}", rule).weights
        if given.shape != self.weights.shape:
            raise ValueError(
                f"{self.name}: the given weights must have the shape {self.weights.shape}, got "
                f"{given.shape}"
            )
        extra = np.argwhere(_edges(given) & ~_edges(self.weights))
        if extra.size:
            raise ValueError(
                f"{self.name}: the given weights use an edge that the graph has not, at "
                f"{extra[0].tolist()}; make a topology of them with from_matrix"
            )
        return given

    @property
    def symmetric(self) -> bool:
        """Whether weights[i, j] = weights[j, i] in each round."""
        return np.allclose(self.weights, self.weights.swapaxes(-1, -2), rtol=0, atol=_TOLERANCE)

    @property
    def doubly_stochastic(self) -> bool:
        """Whether columns sum to one too in each round, so that mixing keeps the agents' mean."""
        return np.allclose(self.weights.sum(axis=-2), 1, rtol=0, atol=_TOLERANCE)

    def require_doubly_stochastic(self, who: str) -> None:
        """Refuses weights under which the mean of the agents would drift.

        Args:
            who: the strategy that needs it, for the message.

        Raises:
            ValueError: the weights are not doubly stochastic.
        """
        if not self.doubly_stochastic:
            sums = self.weights.sum(axis=-2)
            *turn, j = np.unravel_index(np.abs(sums - 1).argmax(), sums.shape)
            of = f" of round {turn[0]}" if turn else ""
            raise ValueError(
                f"{who} needs doubly stochastic weights, or the mean of the agents drifts, but "
                f"column {j}{of} of {self.name} sums to {sums[*turn, j]:.6g}; choose "
                f"weights='metropolis', a symmetric graph, or push-sum (sgp)"
            )

    @property
    def connected(self) -> bool:
        """Whether every agent's parameters reach every other, the rounds taken together."""
        graph = sparse.csr_array(self.adjacency)
        return csgraph.connected_components(graph, connection="strong", return_labels=False) == 1

    @functools.cached_property
    def diameter(self) -> float:
        """Rounds, from round 0 on, until what one agent knows has reached all, at worst.

        The diameter of the graph where it does not change; inf if it is not connected.
        """
        return _flooding_time(_edges(self.rounds)) if self.connected else math.inf

    def spectral_gap(self) -> float:
        """1 - |lambda_2|^(1/T) in [0, 1]: 1 reaches consensus in one period, 0 never.

        lambda_2 is the eigenvalue second largest in magnitude of the product of a period's
        weights, W_T ... W_1; the distance to consensus shrinks by about |lambda_2|^(1/T) a round
        (Boyd et al. 2004, "Fastest mixing Markov chain on a graph", for T = 1). One agent has the
        gap 1.
        """
        # Without the mean a round keeps its eigenvalues but the 1 of consensus (Wielandt's
        # deflation), and a product that is nearly zero keeps its digits.
        product = self.rounds[0] - 1 / self.num_agents
        for w in self.rounds[1:]:
            product = sparse.csr_array(w) @ product - product.mean(axis=0)
        alone = self.period == 1 and self.symmetric
        values = np.linalg.eigvalsh(product) if alone else np.linalg.eigvals(product)
        radius = np.abs(values).max() ** (1 / self.period)
        return float(np.clip(1 - radius, 0, 1))

    def __str__(self) -> str:
        low, high = self.degree.min(), self.degree.max()
        kind = (
            "symmetric"
            if self.symmetric
            else "doubly stochastic"
            if self.doubly_stochastic
            else "row-stochastic (mixing moves the agents' mean)"
        )
        return (
            f"{self.name}: {self.num_agents} agents, "
            + (f"period {self.period}, " if self.period > 1 else "")
            + f"degree {low if low == high else f'{low}-{high}'}, diameter {self.diameter:g}, "
            f"{self.messages:g} messages a round, {kind}, spectral gap {self.spectral_gap():.4f}"
        )


def _edges(weights: np.ndarray) -> np.ndarray:
    """Bool [..., A, A]: where a weight is given to another agent."""
    return (weights > 0) & ~np.eye(weights.shape[-1], dtype=bool)


def _flooding_time(rounds: np.ndarray) -> int:
    """Rounds until each agent has heard of all, for edges bool [T, A, A] that connect them."""
    size = rounds.shape[-1]
    heard = np.packbits(np.eye(size, dtype=bool), axis=1)  # one bit for each agent heard of
    everyone = np.packbits(np.ones(size, bool))
    senders = [sparse.csr_array(edges | np.eye(size, dtype=bool)) for edges in rounds]
    for t in itertools.count():
        if (heard == everyone).all():
            return t
        graph = senders[t % len(senders)]
        heard = np.bitwise_or.reduceat(heard[graph.indices], graph.indptr[:-1], axis=0)
    raise AssertionError


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


def dimat(adjacency: np.ndarray) -> np.ndarray:
    """The weights in the published files of DIMAT (Saadati et al. 2024), float64 [A, A].

    Complete graph, ring and no edges: `uniform`. Two hubs, see `bipartite`: 1 / (A - 1) rounded
    down to hundredths for each edge, the rest stays with oneself.

    Args:
        adjacency: bool [A, A], False on the diagonal.

    Raises:
        ValueError: it is another graph, or two hubs with so many others that the weights are zero.
    """
    n = len(adjacency)
    if n > 2 and np.array_equal(adjacency, _two_hubs(n)):
        share = 100 // (n - 1) / 100
        if share == 0:
            raise ValueError(f"weights of 'dimat' for two hubs are zero from n=102, got n={n}")
        w = np.where(adjacency, share, 0.0)
        return w + np.diag(1 - w.sum(axis=1))
    degree = adjacency.sum(axis=1)
    circle = (degree == 2).all() and (adjacency == adjacency.T).all()
    circle = circle and csgraph.connected_components(adjacency, return_labels=False) == 1
    if circle or (degree == n - 1).all() or not adjacency.any():
        return uniform(adjacency)
    raise ValueError(
        f"DIMAT has weights for the complete graph, the ring, two hubs (bipartite) and no edges, "
        f"not for this graph of {n} agents with degrees {degree.min()}-{degree.max()}; choose "
        f"'metropolis' or 'uniform'"
    )


def push(adjacency: np.ndarray) -> np.ndarray:
    """What push-sum mixes with: each sender splits evenly over its receivers and itself.

    Columns sum to one, for any directed graph; rows need not, which push-sum divides out (Assran
    et al. 2019, "Stochastic gradient push for distributed deep learning", section 3).

    Args:
        adjacency: bool [A, A], row i marks from whom agent i receives, False on the diagonal.

    Returns:
        float64 [A, A].
    """
    return uniform(adjacency.T).T


WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dimat": dimat,
    "metropolis": metropolis,
    "uniform": uniform,
}
"""The rules that make a mixing matrix from a graph."""


def _rule(weights: str) -> Callable[[np.ndarray], np.ndarray]:
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; {spec.nearest(weights, WEIGHTS)}")
    return WEIGHTS[weights]


def _two_hubs(n: int) -> np.ndarray:
    """Bool [A, A]: the last two agents with all others."""
    leaf = np.arange(n) < n - 2
    return leaf[:, None] != leaf


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"a topology needs at least one agent, got n={n}")


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability in [0, 1], got {p}")


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"at least one round is needed, got rounds={rounds}")


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
        ValueError: the edges are not pairs of whole numbers, one names no agent or joins one to
            itself, or the graph is not connected.
    """
    _check_count(n)
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
    topology = Topology(name, _rule(weights)(adjacency | adjacency.T))
    return _check_connected(topology) if connected else topology


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
    return _check_connected(topology) if connected else topology


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
    _check_count(len(number))
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
        if rest.min() < -_TOLERANCE:
            raise ValueError(
                f"{name}: the weights of the edges into agent {rest.argmin()} sum to "
                f"{1 - rest.min():.6g}, more than one; scale them, or choose "
                f"weights='metropolis' or 'uniform'"
            )
        w += np.diag(np.where(np.diag(w) > 0, 0, np.maximum(rest, 0)))
    else:
        w = _rule(weights or ("uniform" if graph.is_directed() else "metropolis"))(_edges(w))
    topology = Topology(name, w)
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
        weights: one of `WEIGHTS`.

    Raises:
        ValueError: too few agents, or too many for `"dimat"`.
    """
    if n < 3:
        raise ValueError(f"two hubs and someone else are at least 3 agents, got n={n}")
    name = "bipartite(dimat)" if weights == "dimat" else "bipartite"
    return from_edges(n, np.argwhere(_two_hubs(n)), weights=weights, name=name)


def hypercube(n: int) -> Topology:
    """The corners of a cube of log2(n) dimensions: agents whose numbers differ in one bit.

    Equal weights 1 / (1 + log2(n)); its gap is 2 / (1 + log2(n)).

    Args:
        n: number of agents, a power of two.
    """
    _check_count(n)
    if n & (n - 1):
        raise ValueError(f"a hypercube has a power of two of agents, got n={n}")
    edges = [(i, i ^ 1 << bit) for i in range(n) for bit in range(n.bit_length() - 1)]
    return from_edges(n, edges, name="hypercube")


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


def _until_connected(name: str, draw: Callable[[], np.ndarray], hint: str) -> Topology:
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
    _check_count(n)
    _check_probability(p)
    random = np.random.default_rng(seed)
    of = _rule(weights)

    def draw() -> np.ndarray:
        upper = np.triu(random.random((n, n)) < p, 1)
        return of(upper | upper.T)

    return _until_connected(
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
    _check_count(n)
    _check_probability(p)
    if k % 2 or not 2 <= k < n:
        raise ValueError(f"small_world: k must be even and in [2, n={n}), got {k}")
    random = np.random.default_rng(seed)
    of = _rule(weights)
    start = _edges(_circulant(n, [o for hop in range(1, k // 2 + 1) for o in (hop, -hop)]))

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

    return _until_connected(
        f"small_world(k={k}, p={p:g}, seed={seed})", draw, "choose a larger k or a smaller p"
    )


def _regular(n: int, degree: int, random: np.random.Generator) -> np.ndarray:
    """A random graph in which all have so many neighbours, bool [A, A].

    Open ends are paired at random, over again for those whose pair is no new edge (Steger and
    Wormald 1999, "Generating random regular graphs quickly"); where many edges are wanted, those
    that are left out are drawn.
    """
    if 2 * degree > n - 1:
        return ~_regular(n, n - 1 - degree, random) & ~np.eye(n, dtype=bool)
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


def _check_degree(n: int, degree: int) -> None:
    _check_count(n)
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
    _check_degree(n, degree)
    random = np.random.default_rng(seed)
    return _until_connected(
        f"random_regular(degree={degree}, seed={seed})",
        lambda: uniform(_regular(n, degree, random)),
        "choose a degree of at least 3",
    )


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
    return _check_connected(topology) if connected else topology


def one_peer_exponential(n: int) -> Topology:
    """One hop of the exponential graph a round: agent i sends to i + 2**t, modulo n.

    The hops 1, 2, 4, ... below n take turns; sender and receiver weigh 1/2. Where n is a power of
    two a period reaches consensus exactly (Ying et al. 2021, "Exponential graph is provably
    efficient for decentralized deep training", section 4).

    Args:
        n: number of agents.
    """
    _check_count(n)
    hops = [2**t for t in range((n - 1).bit_length())] or [0]
    return Topology("one_peer_exponential", np.stack([_circulant(n, (-hop,)) for hop in hops]))


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
    _check_count(n)
    _check_rounds(rounds)
    random = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        adjacency = np.zeros((rounds, n, n), bool)
        for edges in adjacency:
            i, j = random.permutation(n)[: n // 2 * 2].reshape(-1, 2).T
            edges[i, j] = edges[j, i] = True
        return np.stack([uniform(edges) for edges in adjacency])

    return _until_connected(f"matchings(rounds={rounds}, seed={seed})", draw, "allow more rounds")


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
    _check_degree(n, degree)
    _check_rounds(rounds)
    random = np.random.default_rng(seed)
    return _until_connected(
        f"peer_sampling(degree={degree}, rounds={rounds}, seed={seed})",
        lambda: np.stack([uniform(_regular(n, degree, random)) for _ in range(rounds)]),
        "choose a larger degree, or more rounds",
    )


_VOCABULARY: dict[str, Callable[..., Topology]] = {
    fn.__name__: fn
    for fn in (
        bipartite, complete, disconnected, erdos_renyi, exponential, from_edges, grid, hypercube,
        matchings, one_peer_exponential, peer_sampling, random_regular, ring, small_world, star,
        torus,
    )
}  # fmt: skip


def parse(text: str, num_agents: int) -> Topology:
    """The topology that `text` describes, for so many agents.

    Args:
        text: a constructor of this module without its `n`: `"ring"`, `"torus(rows=2)"`,
            `"erdos_renyi(p=0.4, seed=1)"`, `"from_matrix([[0.5, 0.5], [0.5, 0.5]])"`,
            `"sequence([ring, torus(rows=2)])"`.
        num_agents: A.

    Raises:
        ValueError: the text names no topology, does not parse, or asks for one that is not
            possible with `num_agents`.
        TypeError: the constructor takes no such argument.
    """
    vocabulary: dict[str, Callable[..., Topology]] = {
        name: functools.partial(fn, num_agents) for name, fn in _VOCABULARY.items()
    }
    topology = spec.parse(text, {**vocabulary, "from_matrix": from_matrix, "sequence": sequence})
    if not isinstance(topology, Topology):
        raise ValueError(f"{text!r} names several topologies; to alternate, sequence([...])")
    if topology.num_agents != num_agents:
        raise ValueError(f"{text!r} is for {topology.num_agents} agents, there are {num_agents}")
    return topology
