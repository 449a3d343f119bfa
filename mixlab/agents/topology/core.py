"""Graphs of agents with their mixing matrices."""

import dataclasses
import functools
import itertools
import math

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from mixlab.agents.topology.weights import push, rule_of

TOLERANCE = 1e-6


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
        wrong = np.argwhere(np.abs(sums - 1) > TOLERANCE)
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
        return np.any(edges_of(self.rounds), axis=0)

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
        return edges_of(self.rounds).sum() / self.period

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
            of = push if rule == "push" else rule_of(rule)
            made = np.stack([of(edges) for edges in edges_of(self.rounds)])
            return made.reshape(self.weights.shape)
        given = Topology(f"weights for {self.name}", rule).weights
        if given.shape != self.weights.shape:
            raise ValueError(
                f"{self.name}: the given weights must have the shape {self.weights.shape}, got "
                f"{given.shape}"
            )
        extra = np.argwhere(edges_of(given) & ~edges_of(self.weights))
        if extra.size:
            raise ValueError(
                f"{self.name}: the given weights use an edge that the graph has not, at "
                f"{extra[0].tolist()}; make a topology of them with from_matrix"
            )
        return given

    @property
    def symmetric(self) -> bool:
        """Whether weights[i, j] = weights[j, i] in each round."""
        return np.allclose(self.weights, self.weights.swapaxes(-1, -2), rtol=0, atol=TOLERANCE)

    @property
    def doubly_stochastic(self) -> bool:
        """Whether columns sum to one too in each round, so that mixing keeps the agents' mean."""
        return np.allclose(self.weights.sum(axis=-2), 1, rtol=0, atol=TOLERANCE)

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
                f"weights='metropolis', a symmetric graph, push-sum (sgp) or dpsgd(biased=True)"
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
        return _flooding_time(edges_of(self.rounds)) if self.connected else math.inf

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


def edges_of(weights: np.ndarray) -> np.ndarray:
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
