"""Sparse merging, restated from the papers and the specification in float64 NumPy.

A task vector is an array; functions work on one leaf. Random numbers are given.
"""

import numpy as np


def keep_probability(tau, density, epsilon):
    """DELLA's, by rank of magnitude among the weights of a unit (an index of the last axis)."""
    rows = tau.reshape(1, -1) if tau.ndim < 2 else tau.reshape(-1, tau.shape[-1]).T
    out = np.empty_like(rows, np.float64)
    for row, p in zip(rows, out, strict=True):
        last = len(row) - 1
        for rank, i in enumerate(np.argsort(np.abs(row), kind="stable")):
            p[i] = density if last == 0 else density - epsilon + 2 * epsilon * rank / last
    return (out if tau.ndim < 2 else out.T).reshape(tau.shape)


def drop(tau, kept, probability, rescale):
    """What is kept, divided by its probability or scaled to the L1 norm of the leaf."""
    masked = tau * kept
    if rescale == "expectation":
        return masked / probability
    total = np.abs(masked).sum()
    return masked * (np.abs(tau).sum() / total if rescale == "l1" and total > 0 else 1)


def band(tau, density, gamma):
    """Breadcrumbs: without the largest `gamma` and all but `density` of the others."""
    size = tau.size
    kept = int(density * size)
    top = min(int(gamma * size), size - kept)
    falling = np.argsort(-np.abs(tau).ravel(), kind="stable")
    mask = np.zeros(size, bool)
    mask[falling[top : top + kept]] = True
    return tau * mask.reshape(tau.shape)


def consensus(taus, weights, elect, normalize):
    """mergekit's: weigh, leave out the minority sign, add, divide by the weights that count."""
    weighted = taus * np.reshape(weights, (-1, *[1] * (taus.ndim - 1)))
    says = np.ones_like(weighted)
    if elect:
        says = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0, 1, -1)
    total = (weighted * says).sum(axis=0)
    if not normalize:
        return total
    count = np.tensordot(weights, says.astype(np.float64), axes=1)
    return total / np.where(count == 0, 1, count)


def magmax(taus):
    """The value of largest magnitude, the later model's of equal ones."""
    best = taus[0]
    for tau in taus[1:]:
        best = np.where(np.abs(tau) >= np.abs(best), tau, best)
    return best


def sce(taus, topk):
    """Select by variance, calculate weights by energy, erase the minority sign."""
    if topk < 1:
        variance = np.square(taus - taus.mean(axis=0)).mean(axis=0)
        variance = np.where(np.all(taus == taus[0], axis=0), 0, variance)
        count = int(topk * np.count_nonzero(variance))
        mask = np.zeros(variance.size, bool)
        mask[np.argsort(-variance.ravel(), kind="stable")[:count]] = True
        taus = taus * mask.reshape(variance.shape)
    energy = np.square(taus).reshape(len(taus), -1).sum(axis=1)
    shares = energy / energy.sum() if energy.sum() > 0 else np.full(len(taus), 1 / len(taus))
    says = np.sign(taus) == np.where(taus.sum(axis=0) >= 0, 1, -1)
    shares = np.reshape(shares, (-1, *[1] * (taus.ndim - 1))) * says
    total = shares.sum(axis=0)
    return (shares * taus).sum(axis=0) / np.where(total == 0, 1, total)
