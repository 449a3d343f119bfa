"""The stages that task-vector methods share; `chains.py` says what a stage is.

A traced fraction may keep an entry more or less than the same number given as it is: where values
are traced, JAX counts in float32 unless it has 64 bits. 0.29 of 100 entries are `int(28.999...)`,
which is 28, in Python, and 29 in float32.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random, trees
from mixlab.merge import core, patterns, selection
from mixlab.merge.chains import Stage, TaskVectors
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


def trim(density: ArrayLike, *, scope: str = "model", exact: bool = False) -> Stage:
    """Keeps the entries of largest magnitude of every task vector, and sets the others to zero.

    With `d` entries in scope, the threshold is the `(d - int(d * density))`-th smallest
    magnitude, and all that reach it stay: `int(d * density) + 1` entries, and every further one
    that equals the threshold. `density=1` keeps everything, `density=0` the largest entry.

    Args:
        density: fraction to keep, in [0, 1]; may be traced.
        scope: `"model"` ranks the entries of all leaves together (the official code), `"leaf"`
            those of each leaf on its own (mergekit).
        exact: keep exactly `max(1, int(d * density))` entries of each leaf instead, the earlier
            ones first among equals (mergekit, PEFT); with `scope="leaf"` only.

    Raises:
        ValueError: the density is out of range, the scope is unknown, or `exact` is asked for
            over the whole model.

    Source: Yadav et al. 2023, "TIES-Merging", section 4, step 1; the threshold rule is that of
    the authors' code.
    """
    core.check_number(density, "density", 0.0, 1.0)
    core.check_choice(scope, "scope", ("model", "leaf"))
    if exact and scope != "leaf":
        raise ValueError('exact=True counts leaf by leaf: give scope="leaf" with it')

    def threshold(magnitudes: core.Leaves) -> Array:
        kept = _count(density, magnitudes.size)
        return _largest(magnitudes, jnp.maximum(kept, 1) if exact else kept + 1)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        magnitudes = leaves.map(_magnitude)
        if scope == "model":
            return {"threshold": threshold(magnitudes)}
        return {"threshold": {name: threshold(magnitudes.only(name)) for name in leaves.specs}}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        limit = plan["threshold"] if scope == "model" else plan["threshold"][name]
        if not exact:
            kept = core.each_model(
                lambda x, low: jnp.where(jnp.abs(x).astype(low.dtype) >= low, x, 0),
                taus.values,
                limit,
            )
            return taus._replace(values=kept)
        magnitude = jnp.abs(taus.values)
        count = jnp.maximum(_count(density, magnitude[0].size), 1)
        keep = _reaches(magnitude, limit, count)
        return taus._replace(values=jnp.where(keep, taus.values, 0))

    return Stage("trim", measure, apply, entrywise=scope == "model")


def band(density: ArrayLike, gamma: ArrayLike = 0.01) -> Stage:
    """Keeps a band of magnitudes in each leaf: sets outliers and small entries to zero.

    Of the `d` entries of a leaf, from the largest magnitude down (the earlier ones first among
    equals), the first `int(d * gamma)` go, the next `int(d * density)` stay, and the rest goes.
    Where that asks for more than `d` entries, fewer outliers go (mergekit).

    Args:
        density: fraction to keep, in [0, 1]; may be traced.
        gamma: fraction of outliers to remove, in [0, 1]; may be traced.

    Raises:
        ValueError: an argument is out of range.

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs", section 3. Equals mergekit's
    `magnitude_outliers`, but for leaves in which no outlier is removed: mergekit resets those
    to the base.
    """
    core.check_number(density, "density", 0.0, 1.0)
    core.check_number(gamma, "gamma", 0.0, 1.0)

    def counts(size: int) -> tuple[ArrayLike, ArrayLike]:
        kept = _count(density, size)
        outliers = jnp.minimum(_count(gamma, size), size - kept)
        return outliers, outliers + kept

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        magnitudes = leaves.map(_magnitude)
        limits = {}
        for name in leaves.specs:
            leaf = magnitudes.only(name)
            outliers, upto = counts(leaf.size)
            limits[name] = {"upper": _largest(leaf, outliers), "lower": _largest(leaf, upto)}
        return limits

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        magnitude = jnp.abs(taus.values)
        outliers, upto = counts(magnitude[0].size)
        outlier = _reaches(magnitude, plan[name]["upper"], outliers)
        keep = _reaches(magnitude, plan[name]["lower"], upto) & ~outlier
        return taus._replace(values=jnp.where(keep, taus.values, 0))

    return Stage("band", measure, apply)


def drop(
    density: ArrayLike,
    *,
    epsilon: ArrayLike = 0.0,
    axis: int | None = None,
    rescale: str | None = "expectation",
) -> Stage:
    """Drops entries at random, and makes up for them.

    Every entry is kept with probability `density` (DARE) or, with an `epsilon`, with a
    probability that rises evenly with its rank by magnitude, from `density - epsilon` for the
    smallest to `density + epsilon` for the largest (DELLA). The plan has, by leaf, `probability`
    and what was `kept`, bools `[M, ...]`; other masks may be put in their place.

    Args:
        density: fraction to keep, in [0, 1]; may be traced.
        epsilon: half the spread of the probabilities, in [0, 0.5]; may be traced, and then
            shrinks where `density - epsilon` or `density + epsilon` would leave [0, 1].
        axis: which entries are ranked against each other. None: all that share an index of the
            last axis, which are the weights of one unit. A number: those along that axis of the
            leaf (1 in mergekit). Leaves of one axis are ranked as a whole.
        rescale: `"expectation"` divides what is kept by its probability, which keeps every
            entry's expectation; `"l1"` restores the sum of magnitudes of each model's leaf
            (mergekit); None does not rescale.

    Raises:
        ValueError: an argument is out of range, or `density - epsilon` or `density + epsilon`
            of a density between 0 and 1 is; at the merge: there is no key.

    Source: Yu et al. 2024, "Language models are super Mario", section 3.2 (DARE); Deep et al.
    2024, "DELLA-Merging", section 2.2. The spread is that of mergekit.
    """
    core.check_number(density, "density", 0.0, 1.0)
    core.check_number(epsilon, "epsilon", 0.0, 0.5)
    if rescale is not None:
        core.check_choice(rescale, "rescale", ("expectation", "l1"))
    ranked = isinstance(epsilon, jax.core.Tracer) or epsilon != 0
    known = not any(isinstance(x, jax.core.Tracer) for x in (density, epsilon))
    # At 0 and 1 there is nothing to decide, whatever the ranks.
    if ranked and known and density not in (0, 1) and not epsilon <= density <= 1 - epsilon:
        raise ValueError(
            "density - epsilon and density + epsilon must lie between 0 and 1, got "
            f"density={density} and epsilon={epsilon}"
        )

    def probability(leaves: core.Leaves, name: str) -> Array:
        p = jnp.asarray(density, float)
        if not ranked:
            return p
        spread = jnp.minimum(jnp.asarray(epsilon, float), jnp.minimum(p, 1 - p))
        return p + spread * _relative_rank(jnp.abs(leaves.read(name).values), axis)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        if key is None:
            raise ValueError("drop is random: give the merge a key=, such as jax.random.key(0)")
        plan = {}
        for name, spec in leaves.specs.items():
            p = probability(leaves, name)
            leaf_key = trees.name_key(key, name)
            kept = random.bernoulli(leaf_key, p, (leaves.num_models, *spec.shape))
            plan[name] = {"probability": p, "kept": kept}
        return plan

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        p, kept = plan[name]["probability"], plan[name]["kept"]
        values = jnp.where(kept, taus.values, 0)
        if rescale == "expectation":
            values = values / jnp.where(p > 0, p, 1).astype(values.dtype)
        elif rescale == "l1":
            before, after = (jnp.sum(jnp.abs(_flat(x)), axis=1) for x in (taus.values, values))
            factor = jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
            values = values * trees.along(factor, values)
        return taus._replace(values=values)

    return Stage("drop", measure, apply)


def mask(masks: PyTree) -> Stage:
    """Multiplies the task vectors by masks.

    Args:
        masks: a pytree with a mask for every floating leaf of a model, bools or numbers, or None
            where a leaf is to stay as it is. A mask has the shape of the leaf, or one more
            leading axis M for a mask a model; or a list of M such pytrees. After a `reduce`, M
            is 1.

    Raises:
        ValueError: at the merge: a leaf has no mask or one of another shape, or a mask is for a
            leaf that the models do not have.
    """
    given = dict(trees.named_leaves(trees.stack(masks) if type(masks) in (list, tuple) else masks))

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        if missing := sorted(leaves.specs.keys() - given.keys()):
            known = sorted(given)
            raise ValueError(f"no masks for the leaves {missing}, only for {known}; None keeps all")
        plan = {}
        for name, spec in leaves.specs.items():
            shapes = (spec.shape, (leaves.num_models, *spec.shape))
            if given[name] is not None and jnp.shape(given[name]) not in shapes:
                raise ValueError(
                    f"the mask of leaf {name!r} must be of shape {shapes[0]} or {shapes[1]}, "
                    f"got {jnp.shape(given[name])}"
                )
            plan[name] = given[name]
        return plan

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        if plan[name] is None:
            return taus
        return taus._replace(values=taus.values * jnp.asarray(plan[name], taus.values.dtype))

    return Stage("mask", measure, apply, propagates=True)


def select(topk: ArrayLike) -> Stage:
    """Keeps the entries in which the models differ most, and sets the others to zero for all.

    Of the `d` entries of a leaf whose variance over the models is not zero, the
    `int(d * topk)` of largest variance stay, the earlier ones first among equals.

    Args:
        topk: fraction to keep, in [0, 1]; may be traced. 1 keeps everything.

    Raises:
        ValueError: it is out of range.

    Source: Wan et al. 2024, "FuseChat", section 3.3 (the S of SCE); the count is mergekit's.
    """
    core.check_number(topk, "topk", 0.0, 1.0)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        def keep(name: str, taus: TaskVectors) -> Array:
            # About the first model, so that entries in which all agree have a variance of 0.
            variance = jnp.var(taus.values - taus.values[0], axis=0, keepdims=True)
            leaf = core.Leaves({name: leaves.specs[name]}, 1, lambda name: variance)
            count = _count(topk, jnp.sum(variance > 0))
            kept = _reaches(variance, _largest(leaf, count), count)[0]
            return kept | (jnp.asarray(topk) == 1)

        return {"kept": leaves.each(keep)}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        return taus._replace(values=jnp.where(plan["kept"][name], taus.values, 0))

    return Stage("select", measure, apply)


def weigh(weights: patterns.PerLeaf | None, *, normalize: bool = False) -> Stage:
    """Multiplies each task vector by its weight, which then also counts in `reduce("mean")`.

    Args:
        weights: `[M]`; negative ones subtract what the model learned. None: ones. Or such weights
            for each pattern of leaf names, as in `average`.
        normalize: divide the weights by their sum.

    Raises:
        ValueError: a weight is not finite, or the weights to be normalised sum to zero; at the
            merge: there are not M, a leaf is without a pattern or a pattern without a leaf.
    """
    for given in patterns.values(weights):
        core.check_weights(given, signed=True)
        known = given is not None and not core.is_traced(given)
        if normalize and known and np.sum(np.asarray(given, np.float64)) == 0:
            raise ValueError(f"weights that sum to zero cannot be normalised, got {given}")

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        def shares(given: ArrayLike | None) -> Array:
            w = core.per_model(given, leaves.num_models)
            return w / jnp.sum(w) if normalize else w

        return {"weights": patterns.spread(weights, leaves.specs, shares)}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        w = patterns.at(plan["weights"], name)
        weighted = core.each_model(lambda x, w: x * w.astype(x.dtype), taus.values, w)
        return taus._replace(values=weighted, weights=taus.weights * w)

    by_name = isinstance(weights, Mapping)
    return Stage("weigh", measure, apply, entrywise=not by_name, propagates=True)


def elect_sign(by: str = "mass", *, zero: str = "majority") -> Stage:
    """Elects a sign for every entry, and sets the values of the other sign to zero.

    Args:
        by: how models vote. `"mass"`: the sign of the sum of the task vectors. `"normfrac"`: the
            sign of the model with the largest `tau^2 / |tau|^2`. `"normmass"`: the sign of
            `sum_m sign(tau_m) tau_m^2 / |tau_m|^2`. Norms are over the whole model.
        zero: what an undecided entry gets. `"majority"`: the sign that most entries of the whole
            model elected; if that is undecided too, the elected sign is 0 and the negative values
            stay (the authors' code). `"positive"`: a plus (mergekit).

    Raises:
        ValueError: an unknown choice.
        TypeError: a leaf is complex.

    Source: Yadav et al. 2023, "TIES-Merging", section 4, step 2; the votes by norm and the rule
    for undecided entries are those of the authors' code.
    """
    core.check_choice(by, "by", ("mass", "normfrac", "normmass"))
    core.check_choice(zero, "zero", ("majority", "positive"))

    def vote(norms: Array | None, name: str, values: Array) -> Array:
        core.check_real(name, values.dtype, "elect_sign")
        if norms is None:
            return jnp.sign(core.sum_models(values))
        # A task vector of zeros has no say; dividing it by 1 instead of 0 keeps it so.
        scale = core.along_models(jnp.where(norms > 0, norms, 1), values)
        shares = jnp.square(values / scale)
        if by == "normmass":
            return jnp.sign(core.sum_models(jnp.sign(values) * shares))
        winner = jnp.argmax(shares, axis=0)[None]
        return jnp.sign(jnp.take_along_axis(values, winner, axis=0)[0])

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        norms = None
        if by != "mass":

            def squares(name: str, taus: TaskVectors) -> Array:
                return jnp.sum(jnp.square(_flat(taus.values)), axis=1).astype(float)

            norms = jnp.sqrt(leaves.total(squares, jnp.zeros(leaves.num_models, float)))
        if zero == "positive":
            return {"norms": norms, "undecided": jnp.ones((), jnp.int32)}

        def count(name: str, taus: TaskVectors) -> Array:
            # Wraps around only where one sign leads by 2^31 entries.
            return jnp.sum(vote(norms, name, taus.values).astype(jnp.int8), dtype=jnp.int32)

        majority = jnp.sign(leaves.total(count, jnp.zeros((), jnp.int32)))
        return {"norms": norms, "undecided": majority}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        sign = vote(plan["norms"], name, taus.values)
        sign = jnp.where(sign == 0, plan["undecided"].astype(sign.dtype), sign)
        agreed = core.each_model(
            lambda x: jnp.where(jnp.where(sign > 0, x > 0, x < 0), x, 0), taus.values
        )
        return taus._replace(values=agreed, sign=sign)

    return Stage("elect_sign", measure, apply, entrywise=True)


REDUCTIONS = ("sum", "mean", "max")


def reduce(how: str = "sum") -> Stage:
    """Turns the M task vectors into one.

    Args:
        how: `"sum"`; `"mean"`: the sum divided by the magnitudes of the weights of those models
            whose value is not zero, so that models without a say in an entry do not dilute it
            (mergekit divides by the weights, which is the same unless one is negative); `"max"`:
            the value of largest magnitude (of equal ones the later model's, as in FusionBench's
            MagMax), under the elected sign where there was an election.

    Raises:
        ValueError: an unknown choice.
        TypeError: `"max"` on a complex leaf.

    Source: Yadav et al. 2023, "TIES-Merging", section 4, step 3 (disjoint merge), and the
    authors' code for sum and max.
    """
    core.check_choice(how, "how", REDUCTIONS)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        return {}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        values = taus.values
        if how == "max":
            core.check_real(name, values.dtype, 'reduce("max")')
            merged = functools.reduce(_larger, values)[None]
            if taus.sign is not None:
                merged = jnp.abs(merged) * taus.sign
        else:
            merged = core.sum_models(values)[None]
        if how == "mean":
            # The magnitude of a weight is a model's say; its sign is in the value already.
            says = core.each_model(
                lambda x, w: jnp.where(x != 0, jnp.abs(w).astype(x.dtype), 0), values, taus.weights
            )
            count = core.sum_models(says)
            merged = merged / jnp.where(count > 0, count, 1)
        return TaskVectors(merged, core.per_model(None, 1))

    return Stage("reduce", measure, apply, reduces=True, entrywise=True, propagates=True)


def fuse() -> Stage:
    """Averages the values that agree with the sign of their sum, weighted by energy.

    The weight of a model in a leaf is the mean square of its values there, before those of the
    other sign are left out; entries that sum to zero count as positive.

    Raises:
        TypeError: at the merge: a leaf is complex.

    Source: Wan et al. 2024, "FuseChat", section 3.3 (the C and E of SCE).
    """
    elect, mean = elect_sign(zero="positive"), reduce("mean")

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        energies = jnp.sum(jnp.square(_flat(taus.values)), axis=1)
        total = jnp.sum(energies)
        shares = energies / jnp.where(total > 0, total, 1)
        agreed = elect.apply(plan, name, taus)
        weighted = agreed.values * trees.along(shares, agreed.values)
        return mean.apply({}, name, TaskVectors(weighted, shares))

    return Stage("fuse", elect.measure, apply, reduces=True)


def rescale(factor: ArrayLike) -> Stage:
    """Multiplies the task vectors by a number, e.g. the lambda of task arithmetic.

    Args:
        factor: a number; may be traced.

    Raises:
        ValueError: the factor is not finite.
    """
    core.check_number(factor, "factor")

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        return {"factor": jnp.asarray(factor, float)}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        return taus._replace(values=taus.values * plan["factor"].astype(taus.values.dtype))

    return Stage("rescale", measure, apply, entrywise=True, propagates=True)


def _magnitude(name: str, taus: TaskVectors) -> Array:
    return core.each_model(jnp.abs, taus.values)


def _larger(a: Array, b: Array) -> Array:
    """The value of larger magnitude, `b` of equal ones; what is not a number stays so."""
    return jnp.where((jnp.abs(b) >= jnp.abs(a)) | jnp.isnan(b), b, a)


def _count(fraction: ArrayLike, size: ArrayLike) -> Any:
    """`int(size * fraction)`, also of traced numbers.

    The one place where a fraction becomes a count, but for `balance`, which counts from the other
    end. Traced it is a product in float32, or float64 where JAX has 64 bits, and near an integer
    that may be one more or less than Python's.
    """
    if isinstance(fraction, jax.core.Tracer) or isinstance(size, jax.Array):
        product = jnp.asarray(fraction, float) * jnp.asarray(size, float)
        return jnp.floor(product).astype(jnp.int32)
    return int(size * float(fraction))


def _largest(magnitudes: core.Leaves, count: ArrayLike) -> Array:
    """`[M]`: the least of each model's `count` largest magnitudes; the largest for a count of 0."""
    return selection.kth_smallest(magnitudes, magnitudes.size + 1 - count)


@jax.jit
def _reaches(magnitude: Array, limit: Array, count: ArrayLike) -> Array:
    """The `count` largest of `magnitude [M, ...]`, down to `limit [M]`, earlier ones first."""
    flat, limit = _flat(magnitude).astype(limit.dtype), limit[:, None]
    above, at = flat > limit, flat == limit
    num_above = jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    nth = num_above + jnp.cumsum(at, axis=1, dtype=jnp.int32)
    return (above | (at & (nth <= count))).reshape(magnitude.shape)


@functools.partial(jax.jit, static_argnums=1)
def _relative_rank(magnitude: Array, axis: int | None) -> Array:
    """Ranks of `magnitude [M, ...]`, from -1 for the smallest to 1 for the largest."""
    shape = magnitude.shape
    grouped, along = magnitude, 1 if axis is None else axis + 1
    if len(shape) <= 2:
        grouped, along = magnitude.reshape(shape[0], math.prod(shape[1:])), 1
    elif axis is None:
        grouped = magnitude.reshape(shape[0], math.prod(shape[1:-1]), shape[-1])
    ranks = jnp.argsort(jnp.argsort(grouped, axis=along), axis=along)
    last = grouped.shape[along] - 1
    relative = (2 * ranks - last).astype(float) / max(last, 1)
    return relative.reshape(shape)


def _flat(values: Array) -> Any:
    return values.reshape(values.shape[0], -1)
