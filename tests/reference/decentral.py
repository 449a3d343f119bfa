"""Decentralised training and alignment, restated in float64 NumPy.

`W[i, j]` is the weight that agent i gives to agent j. A permutation `p` means that unit j of the
aligned model is unit `p[j]` of the given one.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def ring(n):
    """Adjacency of a ring, without self-loops."""
    adjacency = np.zeros((n, n), int)
    for i in range(n):
        for j in ((i + 1) % n, (i - 1) % n):
            adjacency[i, j] = i != j
    return adjacency


def complete(n):
    return 1 - np.eye(n, dtype=int)


def star(n):
    """Agent 0 is the hub."""
    adjacency = np.zeros((n, n), int)
    adjacency[0, 1:] = adjacency[1:, 0] = 1
    return adjacency


def torus(rows, cols):
    """Agent `r cols + c` sees its four neighbours on the wrapped grid."""
    adjacency = np.zeros((rows * cols, rows * cols), int)
    for r in range(rows):
        for c in range(cols):
            for r2, c2 in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                i, j = r * cols + c, r2 % rows * cols + c2 % cols
                adjacency[i, j] = i != j
    return adjacency


def exponential(n):
    """Directed: agent i is tied to i + 1, i + 2, i + 4, ... below i + n."""
    adjacency = np.zeros((n, n), int)
    for i in range(n):
        hop = 1
        while hop < n:
            adjacency[i, (i + hop) % n] = 1
            hop *= 2
    return adjacency


def metropolis_hastings(adjacency):
    """`1 / (1 + max(d_i, d_j))` on edges, the rest of each row on the diagonal."""
    degree = adjacency.sum(axis=1)
    n = len(adjacency)
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if adjacency[i, j]:
                matrix[i, j] = 1 / (1 + max(degree[i], degree[j]))
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


def uniform_weights(adjacency):
    """The same weight for oneself and each neighbour."""
    matrix = adjacency + np.eye(len(adjacency))
    return matrix / matrix.sum(axis=1, keepdims=True)


def spectral_gap(matrix):
    """1 less the second largest modulus of an eigenvalue."""
    return 1 - np.sort(np.abs(np.linalg.eigvals(matrix)))[-2]


def mix(matrix, states):
    """`x_i <- sum_j W[i, j] x_j` for states [A, ...]; the whole of the WA method."""
    out = np.zeros(states.shape)
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            out[i] += matrix[i, j] * states[j]
    return out


def cdsgd_step(matrix, states, gradients, lr):
    """Combine then adapt: `W x - lr g(x)`."""
    return mix(matrix, states) - lr * gradients


def atc_step(matrix, states, gradients, lr):
    """Adapt then combine: `W (x - lr g(x))`, as D-PSGD's successors and DIMAT's "SGP" do."""
    return mix(matrix, states - lr * gradients)


def covariance(features):
    """Biased covariance of rows [C, S], accumulated as `E[x y] - E[x] E[y]`."""
    features = np.asarray(features, np.float64)
    mean = features.mean(axis=1)
    return features @ features.T / features.shape[1] - np.outer(mean, mean)


def correlation(cov):
    """`cov / max(sigma sigma, 1e-7)`."""
    sigma = np.sqrt(np.diag(cov))
    return cov / np.maximum(np.outer(sigma, sigma), 1e-7)


def assign(scores):
    """The permutation p that makes `sum_j scores[j, p[j]]` largest."""
    return linear_sum_assignment(scores, maximize=True)[1]


def match_correlation(reference, other):
    """Unit `p[j]` of `other` [C, S] goes with unit j of `reference` [C, S]."""
    units = len(reference)
    scores = correlation(covariance(np.concatenate([reference, other])))
    return assign(np.nan_to_num(scores[:units, units:]))


def match_second_moment(reference, other):
    """As `match_correlation` with the scores `E[x y]`."""
    return assign(np.asarray(reference, np.float64) @ np.asarray(other, np.float64).T)


def permute(params, axes, perms):
    """Each axis that a permutation is named for, taken in its order.

    `axes` is {leaf: (name or None per axis)}, `perms` {name: permutation}.
    """
    out = {}
    for leaf, value in params.items():
        for axis, name in enumerate(axes.get(leaf, ())):
            if name is not None:
                value = np.take(value, perms[name], axis=axis)
        out[leaf] = value
    return out


def weight_matching(axes, a, b, order):
    """Coordinate descent on `sum <A, permuted B>`, one permutation at a time.

    Args:
        axes: {leaf: (name or None per axis)}; no name twice on one leaf.
        a: the reference's leaves.
        b: the leaves to permute.
        order: names of the permutations in the order of the visits, sweep after sweep.

    Returns:
        The permutations and the gain of each visit.
    """
    sizes = {n: a[leaf].shape[i] for leaf, ns in axes.items() for i, n in enumerate(ns) if n}
    perms = {name: np.arange(size) for name, size in sizes.items()}
    gains = []
    for name in order:
        scores = np.zeros((sizes[name], sizes[name]))
        others = {other: p for other, p in perms.items() if other != name}
        others[name] = np.arange(sizes[name])
        permuted = permute(b, axes, others)
        for leaf, names in axes.items():
            for axis, other in enumerate(names):
                if other == name:
                    rows_a = np.moveaxis(a[leaf], axis, 0).reshape(sizes[name], -1)
                    rows_b = np.moveaxis(permuted[leaf], axis, 0).reshape(sizes[name], -1)
                    scores += rows_a.astype(np.float64) @ rows_b.astype(np.float64).T
        found = assign(scores)
        rows = np.arange(sizes[name])
        gains.append(scores[rows, found].sum() - scores[rows, perms[name]].sum())
        perms[name] = found
    return perms, gains


def objective(axes, a, b, perms):
    """`sum <A, permuted B>` over the leaves of `axes`."""
    permuted = permute(b, axes, perms)
    return sum(float((a[leaf].astype(np.float64) * permuted[leaf]).sum()) for leaf in axes)


def aligned_average(axes, models, perms, weights):
    """`sum_i w_i P_i theta_i` with the permutations of each model."""
    aligned = [permute(model, axes, p) for model, p in zip(models, perms, strict=True)]
    return {
        leaf: sum(
            w * model[leaf].astype(np.float64) for w, model in zip(weights, aligned, strict=True)
        )
        for leaf in models[0]
    }


def reset_statistics(batches, *, unbiased):
    """BatchNorm's running mean and variance [C] of one layer's input, from scratch.

    The mean over batches of each batch's statistics, whatever its size: momentum "None". `batches`
    are [B, ..., C]; torch keeps the unbiased variance, Flax the biased one.
    """
    flat = [np.asarray(batch, np.float64).reshape(-1, batch.shape[-1]) for batch in batches]
    mean = np.mean([rows.mean(axis=0) for rows in flat], axis=0)
    variance = np.mean([rows.var(axis=0, ddof=int(unbiased)) for rows in flat], axis=0)
    return mean, variance
