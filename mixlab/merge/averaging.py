"""Averages of the models' weights."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.merge import core, geometry, patterns
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


def average(weights: patterns.PerLeaf | None = None, *, normalize: bool = True) -> core.MergeMethod:
    """The mean of the models, `sum_m w_m theta_m / sum_m w_m`.

    Every entry is averaged on its own; NaN comes out as NaN even of a model of weight 0. The plan
    holds the normalised weights `[M]`, by leaf where they were given by pattern. The weights may
    be traced, so that a row of a mixing matrix can be given under `jit` and `vmap`.

    Args:
        weights: `[M]`, not negative, not all zero; they are divided by their sum. Default: equal.
            Or such weights for each pattern of leaf names, `{"encoder/*": [1, 0], "*": [1, 1]}`:
            a leaf takes the first pattern that it matches (`patterns.spread`).
        normalize: False leaves out the division: the plain sum `sum_m w_m theta_m`, with weights
            of any sign.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or there are not M; a leaf
            without a pattern, a pattern without a leaf.

    Source: Wortsman et al. 2022, "Model soups" (uniform soup); McMahan et al. 2017, "Communication-
    Efficient Learning", algorithm 1 (weighted by the size of each client).
    """
    for given in patterns.values(weights):
        core.check_weights(given, signed=not normalize)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves

        def shares(given: ArrayLike | None) -> Array:
            w = core.per_model(given, leaves.num_models)
            return w / jnp.sum(w) if normalize else w

        return {"weights": patterns.spread(weights, leaves.specs, shares)}

    return core.MergeMethod(measure, _combine)


def interpolate(t: patterns.PerLeaf) -> core.MergeMethod:
    """The straight line through two models, `(1 - t) theta_0 + t theta_1`.

    Args:
        t: position on the line: 0 the first model, 1 the second; outside of [0, 1] it
            extrapolates (`t = 1 + alpha` is ExPO with the first model as the weaker one). Or a
            position for each pattern of leaf names, as in `average`.

    Raises:
        ValueError: `t` is not finite, or there are not two models; a leaf without a pattern, a
            pattern without a leaf.

    Source: Zheng et al. 2024, "Weak-to-Strong Extrapolation Expedites Alignment" (ExPO).
    """
    for given in patterns.values(t):
        core.check_number(given, "t")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        core.check_pair(leaves.num_models, "interpolate")

        def line(given: ArrayLike) -> Array:
            place = jnp.asarray(given, float)
            return jnp.stack([1.0 - place, place])

        return {"weights": patterns.spread(t, leaves.specs, line)}

    return core.MergeMethod(measure, _combine)


def ema(decay: ArrayLike, *, debias: bool = False) -> core.MergeMethod:
    """The exponential moving average of checkpoints, given in the order of time.

    From the first on, `m <- decay m + (1 - decay) theta`. In a training loop, where checkpoints
    come one by one, `running_average(decay)` gives the same.

    Args:
        decay: in [0, 1); may be traced.
        debias: start from zero instead and divide by `1 - decay^M`, so that the first checkpoint
            counts no more than its age gives it (Adam's bias correction).

    Raises:
        ValueError: the decay is out of range.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging", for
    averages of iterates; Kingma and Ba 2015, "Adam", section 3, for the correction.
    """
    _check_decay(decay)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        num_models = core.open_models(models, base).leaves.num_models
        powers = jnp.asarray(decay, float) ** jnp.arange(num_models - 1, -1, -1, dtype=float)
        if debias:
            return {"weights": powers / jnp.sum(powers)}
        shares = (1 - jnp.asarray(decay, float)) * powers
        return {"weights": shares.at[0].set(powers[0])}

    return core.MergeMethod(measure, _combine)


def swa(start: int = 0, every: int = 1) -> core.MergeMethod:
    """Stochastic weight averaging: the mean of every c-th checkpoint from some time on.

    In a training loop `running_average()` gives the same. The statistics of BatchNorm must be
    taken anew for the merged model.

    Args:
        start: index of the first checkpoint that counts, at least 0.
        every: the cycle length c, in checkpoints, at least 1.

    Raises:
        ValueError: an argument is out of range; at the merge: there are too few checkpoints.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima", algorithm 1.
    """
    if start < 0 or every < 1:
        raise ValueError(f"start must be at least 0 and every at least 1, got {start} and {every}")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        num_models = core.open_models(models, base).leaves.num_models
        if start >= num_models:
            raise ValueError(f"start={start} leaves none of the {num_models} checkpoints")
        weights = np.zeros(num_models)
        weights[start::every] = 1
        return {"weights": jnp.asarray(weights / weights.sum(), float)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened = core.open_models(models, base)
        merged = opened.leaves.map(lambda name, x: geometry.mixture(plan["weights"], x))
        return opened.write(merged.read)

    return core.MergeMethod(measure, combine)


class Averaged(NamedTuple):
    """The state of a running average.

    Attributes:
        num_models: int32, how many are in it.
        params: their average, in float32 or wider; before the first, the model it began with.
    """

    num_models: Array
    params: PyTree


class RunningAverage(NamedTuple):
    """A running average as pure functions, for a training step under `jit`.

    Attributes:
        init: `init(params) -> state`; `params` gives the structure and does not count.
        update: `update(state, params) -> state`.
        read: `read(state, like) -> params`: the average in the dtypes of the model `like`.
    """

    init: Callable[[PyTree], Averaged]
    update: Callable[[Averaged, PyTree], Averaged]
    read: Callable[[Averaged, PyTree], PyTree]


def running_average(
    decay: ArrayLike | None = None, *, debias: bool = False, warmup: bool = False
) -> RunningAverage:
    """An average that models are added to one by one.

    Integer, bool and None leaves are those of the newest model.

    Args:
        decay: in [0, 1), of an exponential moving average; may be traced. None: all models count
            alike (SWA).
        debias: as in `ema`.
        warmup: the n-th model, from 0, meets the decay `min(decay, (1 + n) / (10 + n))`, so that
            an average over a long time soon forgets the first models (TensorFlow's `num_updates`).

    Raises:
        ValueError: the decay is out of range; `debias` or `warmup` without a decay, or both.

    Source: as `ema` and `swa`.
    """
    if decay is not None:
        _check_decay(decay)
    if debias + warmup > (decay is not None):
        raise ValueError("debias and warmup are two ways to begin with a decay: give one, with it")

    def share(num_models: Array) -> Array:
        """What the next model counts for."""
        n = num_models.astype(float)
        if decay is None:
            return 1 / (n + 1)
        d = jnp.asarray(decay, float)
        if debias:
            return (1 - d) / (1 - d ** (n + 1))
        if warmup:
            d = jnp.minimum(d, (1 + n) / (10 + n))
        return jnp.where(num_models == 0, 1, 1 - d)

    def widened(leaf: Array) -> Array:
        return jnp.asarray(leaf, trees.wide(leaf.dtype)) if trees.is_inexact(leaf) else leaf

    def init(params: PyTree) -> Averaged:
        return Averaged(
            jnp.zeros((), jnp.int32), trees.map_named(lambda _, leaf: widened(leaf), params)
        )

    def update(state: Averaged, params: PyTree) -> Averaged:
        new = share(state.num_models)

        def leaf_of(name: str, mean: Array, leaf: Array) -> Array:
            if not trees.is_inexact(leaf):
                return leaf
            if jnp.shape(leaf) != jnp.shape(mean):
                raise ValueError(
                    f"leaf {name!r} of the model is {jnp.shape(leaf)}, that of the average is "
                    f"{jnp.shape(mean)}"
                )
            w = new.astype(mean.dtype)
            return (1 - w) * mean + w * leaf.astype(mean.dtype)

        return Averaged(state.num_models + 1, trees.map_named(leaf_of, state.params, params))

    def read(state: Averaged, like: PyTree) -> PyTree:
        return trees.map_named(
            lambda _, mean, leaf: mean.astype(leaf.dtype) if trees.is_inexact(leaf) else mean,
            state.params,
            like,
        )

    return RunningAverage(init, update, read)


def _check_decay(decay: ArrayLike) -> None:
    core.check_number(decay, "decay", 0.0, 1.0)
    if not isinstance(decay, jax.core.Tracer) and decay == 1:
        raise ValueError("decay must be below 1, got 1: the average would stay what it was")


def _combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
    def merge(name: str, stacked: Array) -> Array:
        return core.weighted_sum(patterns.at(plan["weights"], name), stacked)

    opened = core.open_models(models, base)
    return opened.write(opened.leaves.map(merge).read)
