"""Model merging, restated from the papers and the specification in float64 NumPy.

A model is a flat dict `{leaf name: array}`. `tau` is a task vector, fine-tuned minus base.
"""

import numpy as np


def task_vector(model, base):
    """`model - base`, leaf by leaf."""
    return {name: model[name].astype(np.float64) - base[name] for name in base}


def flatten(model):
    """All leaves in sorted order of their names, as one vector."""
    return np.concatenate([np.asarray(model[name], np.float64).ravel() for name in sorted(model)])


def unflatten(vector, like):
    """The inverse of `flatten`."""
    out, start = {}, 0
    for name in sorted(like):
        size = like[name].size
        out[name] = vector[start : start + size].reshape(like[name].shape)
        start += size
    return out


def weighted_sum(models, weights):
    """`sum_t w_t theta_t`."""
    return {
        name: sum(w * m[name].astype(np.float64) for w, m in zip(weights, models, strict=True))
        for name in models[0]
    }


def average(models, weights=None):
    """The mean with weights divided by their sum, equal ones by default."""
    weights = np.ones(len(models)) if weights is None else np.asarray(weights, np.float64)
    return weighted_sum(models, weights / weights.sum())


def task_arithmetic(models, base, scale, weights=None):
    """`base + scale sum_t w_t tau_t`."""
    weights = np.ones(len(models)) if weights is None else weights
    total = weighted_sum([task_vector(m, base) for m in models], weights)
    return {name: base[name] + scale * total[name] for name in base}


def ties_trim(taus, density):
    """Where each row of [T, d] has one of its largest magnitudes.

    The threshold is the (d - int(d density))-th smallest magnitude and everything that reaches it
    is kept, so int(d density) + 1 entries and all equal ones. Density 1 keeps everything.
    """
    mask = np.ones(taus.shape, bool)
    rank = taus.shape[1] - int(taus.shape[1] * density)
    for t, row in enumerate(np.abs(taus)):
        if rank > 0:
            mask[t] = row >= np.sort(row)[rank - 1]
    return mask


def ties_elect(trimmed):
    """The sign of the sum of each column; zeros take the majority sign of the whole vector."""
    sign = np.sign(trimmed.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    return sign


def ties_reduce(trimmed, sign, reduce):
    """Mean (over the non-zero), sum or largest of the entries that agree with the sign."""
    out = np.zeros(trimmed.shape[1])
    for j, column in enumerate(trimmed.T):
        kept = column[column > 0] if sign[j] > 0 else column[column < 0]
        if len(kept):
            out[j] = {
                "mean": kept.mean(),
                "sum": kept.sum(),
                "max": np.abs(kept).max() * sign[j],
            }[reduce]
    return out


def ties(models, base, density, scale, scope="model", reduce="mean"):
    """TIES; `scope` says whether magnitudes are ranked over the whole model or in each leaf."""
    taus = [task_vector(m, base) for m in models]
    if scope == "model":
        mask = ties_trim(np.stack([flatten(tau) for tau in taus]), density)
    else:
        masks = {
            name: ties_trim(np.stack([tau[name].ravel() for tau in taus]), density) for name in base
        }
        mask = np.concatenate([masks[name] for name in sorted(base)], axis=1)
    trimmed = np.where(mask, np.stack([flatten(tau) for tau in taus]), 0)
    merged = unflatten(ties_reduce(trimmed, ties_elect(trimmed), reduce), base)
    return {name: base[name] + scale * merged[name] for name in base}


def ties_mergekit(models, base, density, scale, weights, normalize=True):
    """mergekit's TIES, leaf by leaf.

    Keeps exactly `int(density size)` entries, weighs before the election, counts an undecided sign
    as plus, and divides by the weights of the models that agree.
    """
    merged = {}
    for name in base:
        size = base[name].size
        taus = np.stack([task_vector(m, base)[name].ravel() for m in models])
        for row in taus:
            row[np.argsort(np.abs(row))[: size - int(density * size)]] = 0
        weighted = taus * np.asarray(weights, np.float64)[:, None]
        total, divisor = np.zeros(size), np.zeros(size)
        for j, column in enumerate(weighted.T):
            sign = 1 if column.sum() >= 0 else -1
            for value, weight in zip(column, weights, strict=True):
                if np.sign(value) == sign:
                    total[j] += value
                    divisor[j] += weight
        if normalize:
            total = total / np.where(np.abs(divisor) < 1e-8, 1, divisor)
        merged[name] = base[name] + scale * total.reshape(base[name].shape)
    return merged


def slerp_vector(t, a, b, parallel=0.9995, eps=1e-8):
    """Along the great circle by the angle between `a` and `b`, which keep their lengths.

    Vectors no longer than `eps` are not normalised; nearly parallel ones are interpolated linearly.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    unit = [v / np.linalg.norm(v) if np.linalg.norm(v) > eps else v for v in (a, b)]
    cosine = float(np.sum(unit[0] * unit[1]))
    if abs(cosine) > parallel:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def slerp(t, a, b):
    """`slerp_vector` of each leaf."""
    return {name: slerp_vector(t, a[name], b[name]) for name in a}


def fisher_merge(models, fishers, weights=None, floor=1e-6, normalize=False, floor_mode="max"):
    """`sum_j c_j F_j theta_j / sum_j c_j F_j`.

    Args:
        models: dicts of arrays.
        fishers: dicts of diagonal Fisher information, all >= 0.
        weights: c, divided by their sum.
        floor: keeps the denominator away from zero.
        normalize: divides c_j by the norm of F_j over all leaves, taken before the floor.
        floor_mode: "max" is max(F, floor) in every model, "first" in the first model only, and
            "add" is F + floor in every model (there the norm is kept from zero by 1e-6).
    """
    c = np.ones(len(models)) if weights is None else np.asarray(weights, np.float64)
    c = c / c.sum()
    if normalize:
        norms = np.array([np.linalg.norm(flatten(f)) for f in fishers])
        c = c / (norms + 1e-6 if floor_mode == "add" else norms)
        c = c / c.sum()
    merged = {}
    for name in models[0]:
        top = bottom = 0.0
        for j, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
            f = fisher[name].astype(np.float64)
            if floor_mode == "add":
                f = f + floor
            elif floor_mode == "max" or j == 0:
                f = np.maximum(f, floor)
            top = top + c[j] * f * model[name]
            bottom = bottom + c[j] * f
        merged[name] = top / bottom
    return merged


def softmax_classifier_fisher(kernel, bias, inputs):
    """The exact diagonal Fisher of `softmax(x kernel + bias)`.

    `mean_x sum_y p(y|x) (d log p(y|x) / d theta)^2`, where d log p(y|x) / d logit_k is
    `[y = k] - p_k`.
    """
    fisher = {"kernel": np.zeros(kernel.shape), "bias": np.zeros(bias.shape)}
    for x in inputs.astype(np.float64):
        logits = x @ kernel + bias
        p = np.exp(logits - logits.max())
        p /= p.sum()
        for y in range(len(p)):
            gradient = (np.arange(len(p)) == y) - p
            fisher["bias"] += p[y] * gradient**2 / len(inputs)
            fisher["kernel"] += p[y] * np.outer(x, gradient) ** 2 / len(inputs)
    return fisher
