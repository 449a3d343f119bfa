"""PCB: task vectors weighed entry by entry, by how they compete.

A ratio that is traced is counted in float32, see `stages.py`.
"""

import functools

import jax
import jax.numpy as jnp

from mixlab.merge import chains, core, patterns, selection, stages
from mixlab.types import Array, ArrayLike, Key, Plan

_CLAMP = {"paper": 1e-4, "vision": 1e-2}


def pcb(
    ratio: ArrayLike = 0.1,
    scale: ArrayLike = 1.0,
    *,
    weights: patterns.PerLeaf | None = None,
    variant: str = "paper",
) -> core.MergeMethod:
    """PCB: the entries that win the competition within and between the tasks, averaged.

    `theta_base + scale * sum_t w_t tau_t s_t / sum_t s_t`, with the scores `s_t` of `balance`,
    the chain `balance(ratio) | weigh(weights) | reduce("sum") | rescale(scale)`. By default the
    rule of the authors' `pcb-merging.py`.

    Args:
        ratio: fraction of each task vector that keeps a score, in (0, 1]; may be traced.
        scale: lambda, a number; may be traced.
        weights: `[M]`, a lambda for each task beside `scale`; the authors search them on
            held-out data between 0.8 and 1.3. Default: ones. By pattern too, as in `average`.
        variant: as in `balance`.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base.
        TypeError: a leaf is complex.

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging".
    """
    core.check_number(scale, "scale")
    return chains.chain(
        balance(ratio, variant=variant),
        stages.weigh(weights),
        stages.reduce("sum"),
        stages.rescale(scale),
    )


def balance(ratio: ArrayLike, *, variant: str = "paper") -> chains.Stage:
    """Weighs every entry by its score in the competition of the tasks, `tau_t s_t / sum_u s_u`.

    Magnitudes are first clamped to the order statistics `int(c d)` and `int((1 - c) d - 1)` of
    their task vector over the whole model (counted from 0, d entries), and from there on
    normalised to `n_t` in [0, 1]. The competition within a task is `exp(M n_t^2)`, that between
    tasks `tanh(tau_t sum_u tau_u)`; the score is their product, cut off below its order statistic
    `int((1 - ratio) d)` and normalised to [0, 1]. A task vector without any differences scores 0.

    Args:
        ratio: fraction of each task vector that keeps a score, in (0, 1]; may be traced.
        variant: `"paper"`: as above with c = 1e-4, the authors' `pcb-merging.py`. `"vision"`:
            c = 1e-2, and `sum_u tanh(sign(tau_t tau_u) n_t n_u)` between tasks, the authors'
            code of the vision experiments (`pcb_ES.py`).

    Raises:
        ValueError: the ratio is out of range, or the variant unknown.
        TypeError: a leaf is complex.

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging", and the
    authors' code.
    """
    core.check_choice(variant, "variant", tuple(_CLAMP))
    core.check_number(ratio, "ratio", 0.0, 1.0)
    if not isinstance(ratio, jax.core.Tracer) and ratio == 0:
        raise ValueError("ratio is the fraction that keeps a score and must be above 0, got 0")

    def score(plan: Plan, name: str, taus: chains.TaskVectors) -> Array:
        values = taus.values
        low, high = (core.along_models(plan[end], values) for end in ("low", "high"))
        shares = _normalised(jnp.abs(values), low, high)
        within = jnp.exp(len(values) * jnp.square(shares))
        if variant == "paper":
            return within * jnp.tanh(values * jnp.sum(values, axis=0))
        signed = jnp.sign(values) * shares
        # One task at a time, for the memory of M leaves instead of M^2.
        between = [jnp.sum(jnp.tanh(own * signed), axis=0) for own in signed]
        return within * jnp.stack(between)

    def rank(d: int) -> Array | int:
        if isinstance(ratio, jax.core.Tracer):
            return jnp.floor(d * (1 - ratio)).astype(jnp.int32)
        return int(d * (1 - float(ratio)))

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        d, clamp = leaves.size, _CLAMP[variant]

        def magnitude(name: str, taus: chains.TaskVectors) -> Array:
            core.check_real(name, taus.values.dtype, "balance")
            return jnp.abs(taus.values)

        magnitudes = leaves.map(magnitude)
        plan = {
            "low": selection.kth_smallest(magnitudes, int(d * clamp) + 1),
            "high": selection.kth_smallest(magnitudes, int(d * (1 - clamp) - 1) + 1),
        }
        scores = leaves.map(functools.partial(score, plan))
        return plan | {"threshold": _kth(scores, rank(d) + 1), "maximum": _maximum(scores)}

    def apply(plan: Plan, name: str, taus: chains.TaskVectors) -> chains.TaskVectors:
        values = taus.values
        low, high, threshold, maximum = (
            core.along_models(plan[end], values) for end in ("low", "high", "threshold", "maximum")
        )
        clamped = jnp.sign(values) * jnp.clip(jnp.abs(values), low, high)
        scores = score(plan, name, taus)
        # Compiled with other code, a score may come out a rounding above itself; alone at its
        # entry it would take all of it.
        rounding = 16 * jnp.finfo(scores.dtype).eps * jnp.abs(threshold)
        kept = scores > threshold + rounding
        scores = jnp.where(kept, _normalised(scores, threshold, maximum), 0)
        total = jnp.maximum(jnp.sum(scores, axis=0), 1e-12)
        return taus._replace(values=clamped * (scores / total))

    return chains.Stage("balance", measure, apply)


def _normalised(x: Array, low: Array, high: Array) -> Array:
    """Clips to `[low, high]` and maps that to [0, 1]; to 0 where the two are equal."""
    width = jnp.where(high > low, high - low, 1)
    return (jnp.clip(x, low, high) - low) / width


def _kth(numbers: core.Leaves, k: ArrayLike) -> Array:
    """The k-th smallest of numbers of either sign.

    What is below zero is a zero among the positive parts, so these give the answer if it is
    positive, and zero otherwise; likewise the negative parts, counted from the other end.
    """
    above = numbers.map(lambda name, x: jnp.where(x > 0, x, 0))
    below = numbers.map(lambda name, x: jnp.where(x < 0, -x, 0))
    from_the_end = numbers.size - k + 1
    return selection.kth_smallest(above, k) - selection.kth_smallest(below, from_the_end)


def _maximum(numbers: core.Leaves) -> Array:
    def largest(name: str, x: Array) -> Array:
        return jnp.max(x.reshape(len(x), -1), axis=1, initial=-jnp.inf).astype(float)

    start = jnp.full(numbers.num_models, -jnp.inf)
    return functools.reduce(jnp.maximum, numbers.each(largest).values(), start)
