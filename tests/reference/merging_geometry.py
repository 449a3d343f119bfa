"""Geometric merging and low-rank adapters, restated in float64 NumPy where no vectors are recorded.

Leaves are arrays, models lists of them.
"""

import numpy as np


def karcher(leaves, weights, steps=200):
    """The minimiser of `sum_m w_m angle(u, leaf_m)^2` on the sphere, times the mean norm."""
    flat = [np.ravel(leaf) for leaf in leaves]
    weights = np.asarray(weights) / np.sum(weights)
    norms = [np.linalg.norm(x) for x in flat]
    pairs = [(w, x / n) for w, x, n in zip(weights, flat, norms, strict=True) if n > 0]
    pairs = [(w / sum(w for w, _ in pairs), x) for w, x in pairs]
    mean = sum(w * x for w, x in pairs)
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        step = np.zeros_like(mean)
        for w, x in pairs:
            angle = np.arccos(np.clip(mean @ x, -1, 1))
            across = x - (mean @ x) * mean
            length = np.linalg.norm(across)
            if length > 0:
                step = step + w * angle * across / length
        length = np.linalg.norm(step)
        if length > 0:
            mean = np.cos(length) * mean + np.sin(length) * step / length
    return (np.dot(weights, norms) * mean).reshape(leaves[0].shape)


def multislerp(leaves, weights):
    """As it is described: a step in the tangent space at the mean direction, and back."""
    weights = np.asarray(weights) / np.sum(weights)
    norms = np.array([np.linalg.norm(leaf) for leaf in leaves])
    units = [np.ravel(leaf) / n for leaf, n in zip(leaves, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(tangent) + 1e-300
    moved = np.cos(length) * mean + np.sin(length) / length * tangent
    return (weights @ norms * moved).reshape(leaves[0].shape)


def model_stock_of_filters(leaves, base):
    """Of kernels `[..., in, out]`, a ratio for each output, from the mean cosine of the pairs."""
    out = np.empty_like(base)
    num = len(leaves)
    for j in range(base.shape[-1]):
        taus = [np.ravel(leaf[..., j] - base[..., j]) for leaf in leaves]
        pairs = [(a, b) for i, a in enumerate(taus) for b in taus[:i]]
        cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
        ratio = num * cosine / (1 + (num - 1) * cosine)
        out[..., j] = base[..., j] + ratio * np.mean(
            [leaf[..., j] - base[..., j] for leaf in leaves], 0
        )
    return out


def truncate(matrix, rank):
    """The nearest matrix of a rank, and how far away it is."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], np.linalg.norm(s[rank:])


def tsv(taus, kept):
    """Task singular vectors, orthogonalised by the eigendecomposition of their products."""

    def orthogonal(x):
        values, vectors = np.linalg.eigh(x.T @ x)
        return x @ vectors @ np.diag(values**-0.5) @ vectors.T

    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    left = orthogonal(np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1))
    right = orthogonal(np.concatenate([vt[:kept].T for _, _, vt in parts], axis=1))
    return left @ np.diag(np.concatenate([s[:kept] for _, s, _ in parts])) @ right.T


def iso_c(taus):
    """The sum with all singular values equal to their mean."""
    u, s, vt = np.linalg.svd(np.sum(taus, axis=0), full_matrices=False)
    return s.mean() * u @ vt
