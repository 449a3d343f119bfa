"""Rules that make a mixing matrix from a graph."""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csgraph

from mixlab import spec


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
    if n > 2 and np.array_equal(adjacency, two_hubs(n)):
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


def rule_of(weights: str) -> Callable[[np.ndarray], np.ndarray]:
    """The rule of that name, or an error that names those there are."""
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; {spec.nearest(weights, WEIGHTS)}")
    return WEIGHTS[weights]


def two_hubs(n: int) -> np.ndarray:
    """Bool [A, A]: the last two agents with all others."""
    leaf = np.arange(n) < n - 2
    return leaf[:, None] != leaf
