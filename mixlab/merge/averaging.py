"""Averages of the models' weights."""

import jax.numpy as jnp

from mixlab.merge import core
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


def average(weights: ArrayLike | None = None) -> core.MergeMethod:
    """The mean of the models, `sum_m w_m theta_m / sum_m w_m`.

    Every entry is averaged on its own; the plan holds the normalised weights `[M]`. The weights
    may be traced, so that a row of a mixing matrix can be given under `jit` and `vmap`.

    Args:
        weights: `[M]`, not negative, not all zero; they are divided by their sum. Default: equal.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or there are not M.

    Source: Wortsman et al. 2022, "Model soups" (uniform soup); McMahan et al. 2017, "Communication-
    Efficient Learning", algorithm 1 (weighted by the size of each client).
    """
    core.check_weights(weights, signed=False)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        shares = core.per_model(weights, core.open_models(models, base).leaves.num_models)
        return {"weights": shares / jnp.sum(shares)}

    return core.MergeMethod(measure, _combine)


def interpolate(t: ArrayLike) -> core.MergeMethod:
    """The straight line through two models, `(1 - t) theta_0 + t theta_1`.

    Args:
        t: position on the line: 0 the first model, 1 the second; outside of [0, 1] it
            extrapolates (`t = 1 + alpha` is ExPO with the first model as the weaker one).

    Raises:
        ValueError: `t` is not finite, or there are not two models.

    Source: Zheng et al. 2024, "Weak-to-Strong Extrapolation Expedites Alignment" (ExPO).
    """
    core.check_finite(t, "t")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        core.check_pair(core.open_models(models, base).leaves.num_models, "interpolate")
        place = jnp.asarray(t, float)
        return {"weights": jnp.stack([1.0 - place, place])}

    return core.MergeMethod(measure, _combine)


def _combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
    def merge(name: str, stacked: Array) -> Array:
        return core.weighted_sum(plan["weights"], stacked)

    opened = core.open_models(models, base)
    return opened.write(opened.leaves.map(merge).read)
