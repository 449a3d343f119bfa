"""Robust aggregation, restated in float64 NumPy: rows `[n, d]` to `[d]`."""

import itertools

import numpy as np


def squared_distances(rows):
    n = len(rows)
    return np.array([[np.sum((rows[i] - rows[j]) ** 2) for j in range(n)] for i in range(n)])


def krum_scores(distances, neighbours):
    scores = []
    for i, row in enumerate(distances):
        others = sorted(d for j, d in enumerate(row) if j != i)
        scores.append(sum(others[:neighbours]))
    return np.array(scores)


def krum_order(rows, f):
    """Indices by score: squared distances, n - f - 2 neighbours."""
    return np.argsort(krum_scores(squared_distances(rows), len(rows) - f - 2), kind="stable")


def multi_krum(rows, f, m):
    return rows[krum_order(rows, f)[:m]].mean(axis=0)


def mean_around(centre, rows, count):
    """Column by column the mean of the `count` values closest to the centre."""
    out = np.zeros(rows.shape[1])
    for k, column in enumerate(rows.T):
        out[k] = np.mean(sorted(column, key=lambda x: abs(x - centre[k]))[:count])
    return out


def trimmed_mean(rows, f):
    return np.sort(rows, axis=0)[f : len(rows) - f].mean(axis=0)


def bulyan(rows, f):
    left, picks = list(range(len(rows))), []
    for _ in range(len(rows) - 2 * f):
        distances = squared_distances(rows[left])
        scores = krum_scores(distances, max(len(left) - f - 2, 1))
        picks.append(left.pop(int(np.argmin(scores))))
    chosen = rows[picks]
    return mean_around(np.median(chosen, axis=0), chosen, len(picks) - 2 * f)


def mda(rows, f):
    distances = squared_distances(rows)

    def diameter(subset):
        return max((distances[i, j] for i, j in itertools.combinations(subset, 2)), default=0.0)

    subsets = list(itertools.combinations(range(len(rows)), len(rows) - f))
    return rows[list(min(subsets, key=diameter))].mean(axis=0)


def geometric_median(rows, weights, nu, iterations, start):
    z = start
    for _ in range(iterations):
        b = weights / np.maximum(np.linalg.norm(rows - z, axis=1), nu)
        z = b @ rows / b.sum()
    return z


def centered_clipping(rows, centre, radius, iterations):
    v = centre
    for _ in range(iterations):
        difference = rows - v
        norms = np.linalg.norm(difference, axis=1)
        factors = np.minimum(1, radius / norms)
        v = v + np.mean(difference * factors[:, None], axis=0)
    return v


def flag(rows, rank, lam, start, iterations):
    """The subspace `[d, rank]` by reweighted singular value decompositions of the directions.

    `start` [d, rank]; None begins with equal weights.
    """
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    n = len(rows)
    y = np.zeros((rows.shape[1], rank)) if start is None else start

    def sine_squared(x):
        return 1 - np.sum((y.T @ x) ** 2)

    best = np.inf
    for _ in range(iterations):
        columns = [g * (abs(sine_squared(g)) + 1e-7) ** -0.25 for g in directions]
        for i, j in itertools.permutations(range(n), 2):
            d = directions[i] - directions[j]
            weight = lam / (n * (n - 1)) * (abs(sine_squared(d)) + 1e-7) ** -0.25
            columns.append(weight * d)
        before, y = y, np.linalg.svd(np.array(columns).T, full_matrices=False)[0][:, :rank]
        error = sum(np.sqrt(max(sine_squared(g), 0)) for g in directions)
        if error >= best:
            return before
        best = error
    return y


def krum(rows, f):
    return rows[krum_order(rows, f)[0]]


def smea(rows, f):
    def variance(subset):
        return np.linalg.eigvalsh(np.cov(rows[list(subset)].T))[-1]

    subsets = itertools.combinations(range(len(rows)), len(rows) - f)
    return rows[list(min(subsets, key=variance))].mean(axis=0)


def caf(rows, f):
    c, best, least = np.ones(len(rows)), None, np.inf
    while c.sum() > len(rows) - 2 * f:
        mean = np.average(rows, axis=0, weights=c)
        values, vectors = np.linalg.eigh(np.cov(rows.T, aweights=c, ddof=0))
        if values[-1] < least:
            best, least = mean, values[-1]
        tau = np.square((rows - mean) @ vectors[:, -1])
        c = c * (1 - tau / tau[c > 0].max()).clip(0)
    return best


def nnm(rows, f):
    order = np.argsort(squared_distances(rows), axis=1)[:, : len(rows) - f]
    return rows[order].mean(axis=1)


def clipped(rows, radius):
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1, radius / norms)


def arc(rows, f):
    norms = np.sort(np.linalg.norm(rows, axis=1))
    return clipped(rows, norms[len(rows) - int(2 * f / len(rows) * (len(rows) - f)) - 1])
