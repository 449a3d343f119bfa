"""PCB and RAM+ from their descriptions, in float64 NumPy, on task vectors `[M, d]`."""

import numpy as np


def pcb(taus, ratio, weights=None, variant="paper"):
    """The merged task vector: Du et al. 2024, as in `pcb-merging.py` or `pcb_ES.py`."""
    taus = np.asarray(taus, np.float64)
    num_tasks, d = taus.shape
    weights = np.ones(num_tasks) if weights is None else np.asarray(weights)
    tail = {"paper": 1e-4, "vision": 1e-2}[variant]

    def normalise(row):
        span = row.max() - row.min()
        return (row - row.min()) / span if span > 0 else np.zeros_like(row)

    clamped, shares = [], []
    for tau in taus:
        order = np.sort(np.abs(tau))
        magnitude = np.clip(np.abs(tau), order[int(d * tail)], order[int(d * (1 - tail) - 1)])
        clamped.append(np.sign(tau) * magnitude)
        shares.append(normalise(magnitude))
    signed = [np.sign(tau) * share for tau, share in zip(taus, shares, strict=True)]

    top, bottom = np.zeros(d), np.zeros(d)
    for t in range(num_tasks):
        if variant == "paper":
            between = np.tanh(taus[t] * taus.sum(axis=0))
        else:
            between = sum(np.tanh(signed[t] * other) for other in signed)
        score = np.exp(num_tasks * shares[t] ** 2) * between
        score = normalise(np.maximum(score, np.sort(score)[int(d * (1 - ratio))]))
        top += weights[t] * clamped[t] * score
        bottom += score
    return top / np.maximum(bottom, 1e-12)


def ram_plus(taus, r, alpha, epsilon):
    """The merged task vector: Yuan et al. 2026, with the counts over the whole model."""
    taus = np.asarray(taus, np.float64)
    changed = np.abs(taus) > epsilon
    owners = changed.sum(axis=0)
    merged = np.zeros(taus.shape[1])
    for tau, own in zip(taus, changed, strict=True):
        shared, unique = np.sum(own & (owners > 1)), np.sum(own & (owners == 1))
        factor = 1 + r * min(alpha, shared / unique if unique else alpha)
        merged[own & (owners == 1)] += factor * tau[own & (owners == 1)]
        merged[own & (owners > 1)] += (tau / np.maximum(owners, 1))[own & (owners > 1)]
    return merged
