"""Stages: the steps that task-vector methods are composed of.

`chain(trim(0.2), elect_sign(), reduce("mean"), rescale(1.0))` is TIES; other methods are other
chains. A stage works on the task vectors `theta_m - theta_base` of one leaf at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixlab.merge import core, selection
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


class TaskVectors(NamedTuple):
    """The task vectors of one leaf, on their way through a chain.

    Attributes:
        values: `[M, ...]`, and `[1, ...]` once they are reduced.
        weights: `[M]`, what each model counts for in a mean; `[1]` once they are reduced.
        sign: `[...]`, the elected sign (-1, 0, 1), or None before an election.
    """

    values: Array
    weights: Array
    sign: Array | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a chain, in the same two halves as a `MergeMethod`.

    Attributes:
        name: under which the plan keeps what the stage decided.
        measure: `(leaves of TaskVectors, key) -> plan`; map and add over leaves.
        apply: `(plan, name, TaskVectors) -> TaskVectors`, for the leaf `name`.
        reduces: whether it leaves one task vector of the M.
    """

    name: str
    measure: Callable[[core.Leaves, Key | None], Plan]
    apply: Callable[[Plan, str, TaskVectors], TaskVectors]
    reduces: bool = False


def chain(*stages: Stage) -> core.MergeMethod:
    """Composes stages: base plus what is left of the task vectors after all of them.

    Each stage measures the task vectors as the stages before it leave them. They are recomputed
    on every sweep rather than kept, so a chain needs the memory of one leaf. The plan has one
    entry a stage, `"0/trim"`, `"1/elect_sign"`, ...

    Args:
        *stages: in their order; one of them must be a `reduce`, and those after it work on the
            one task vector that it leaves.

    Raises:
        TypeError: something else than a stage was given, or a leaf is complex.
        ValueError: there is no `reduce`; at the merge: there is no base.
    """
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(
                f"chain takes stages such as trim, elect_sign and reduce, got {stage!r}; "
                "whole methods cannot be chained"
            )
    names = [f"{i}/{stage.name}" for i, stage in enumerate(stages)]
    if not any(stage.reduces for stage in stages):
        raise ValueError(f"a chain needs a reduce to make one model of M, got {names}")

    def task_vectors(models: PyTree, base: PyTree | None) -> tuple[core.Models, core.Leaves]:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, "a method on task vectors")
        ones = core.per_model(None, opened.leaves.num_models)

        def start(name: str, stacked: Array) -> TaskVectors:
            return TaskVectors(stacked - bases.read(name), ones)

        return opened, opened.leaves.map(start)

    def after(leaves: core.Leaves, stage: Stage, plan: Plan) -> core.Leaves:
        num_models = 1 if stage.reduces else leaves.num_models
        mapped = leaves.map(lambda name, taus: stage.apply(plan, name, taus))
        return dataclasses.replace(mapped, num_models=num_models)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        _, leaves = task_vectors(models, base)
        plan = {}
        for i, (name, stage) in enumerate(zip(names, stages, strict=True)):
            stage_key = None if key is None else jax.random.fold_in(key, i)
            plan[name] = stage.measure(leaves, stage_key)
            leaves = after(leaves, stage, plan[name])
        return plan

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened, leaves = task_vectors(models, base)
        bases = core.with_base(opened, "a method on task vectors")
        for name, stage in zip(names, stages, strict=True):
            leaves = after(leaves, stage, plan[name])
        return opened.write(lambda name: bases.read(name) + leaves.read(name).values[0])

    return core.MergeMethod(measure, combine)


def trim(density: ArrayLike, *, scope: str = "model", exact: bool = False) -> Stage:
    """Keeps the entries of largest magnitude of every task vector, and sets the others to zero.

    With `d` entries in scope, the threshold is the `(d - int(d * density))`-th smallest
    magnitude, and all that reach it stay: `int(d * density) + 1` entries, and every further one
    that equals the threshold. `density=1` keeps everything.

    Args:
        density: fraction to keep, in (0, 1]; may be traced.
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
    _check_density(density)
    core.check_choice(scope, "scope", ("model", "leaf"))
    if exact and scope != "leaf":
        raise ValueError('exact=True counts leaf by leaf: give scope="leaf" with it')

    def num_kept(size: int) -> ArrayLike:
        if isinstance(density, jax.core.Tracer):
            return jnp.floor(density * size).astype(jnp.int32)
        return int(size * float(density))

    def threshold(magnitudes: core.Leaves) -> Array:
        kept = num_kept(magnitudes.size)
        if exact:
            kept = jnp.maximum(kept, 1) - 1
        return selection.kth_smallest(magnitudes, magnitudes.size - kept)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        def magnitude(name: str, taus: TaskVectors) -> Array:
            return jnp.abs(taus.values)

        magnitudes = leaves.map(magnitude)
        if scope == "model":
            return {"threshold": threshold(magnitudes)}
        return {"threshold": {name: threshold(magnitudes.only(name)) for name in leaves.specs}}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        limit = plan["threshold"] if scope == "model" else plan["threshold"][name]
        limit = limit.reshape(-1, *[1] * (taus.values.ndim - 1))
        magnitude = jnp.abs(taus.values).astype(limit.dtype)
        keep = magnitude >= limit
        if exact:
            above, at = _flat(magnitude > limit), _flat(magnitude == limit)
            size = above.shape[1]
            nth = jnp.sum(above, axis=1, keepdims=True) + jnp.cumsum(at, axis=1)
            keep = (above | (at & (nth <= jnp.maximum(num_kept(size), 1)))).reshape(keep.shape)
        return taus._replace(values=jnp.where(keep, taus.values, 0))

    return Stage("trim", measure, apply)


def weigh(weights: ArrayLike | None) -> Stage:
    """Multiplies each task vector by its weight, which then also counts in `reduce("mean")`.

    Args:
        weights: `[M]`; negative ones subtract what the model learned. None leaves all as it is.

    Raises:
        ValueError: a weight is not finite; at the merge: there are not M.
    """
    core.check_weights(weights, signed=True)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        return {"weights": core.per_model(weights, leaves.num_models)}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        w = plan["weights"]
        return taus._replace(
            values=taus.values * core.along_models(w, taus.values), weights=taus.weights * w
        )

    return Stage("weigh", measure, apply)


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
            return jnp.sign(jnp.sum(values, axis=0))
        # A task vector of zeros has no say; dividing it by 1 instead of 0 keeps it so.
        scale = core.along_models(jnp.where(norms > 0, norms, 1), values)
        shares = jnp.square(values / scale)
        if by == "normmass":
            return jnp.sign(jnp.sum(jnp.sign(values) * shares, axis=0))
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
            sign = vote(norms, name, taus.values)
            return jnp.stack([jnp.sum(sign > 0), jnp.sum(sign < 0)]).astype(jnp.uint32)

        plus, minus = leaves.total(count, jnp.zeros(2, jnp.uint32))
        majority = (plus > minus).astype(jnp.int32) - (plus < minus).astype(jnp.int32)
        return {"norms": norms, "undecided": majority}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        sign = vote(plan["norms"], name, taus.values)
        sign = jnp.where(sign == 0, plan["undecided"].astype(sign.dtype), sign)
        agree = jnp.where(sign > 0, taus.values > 0, taus.values < 0)
        return taus._replace(values=jnp.where(agree, taus.values, 0), sign=sign)

    return Stage("elect_sign", measure, apply)


def reduce(how: str = "sum") -> Stage:
    """Turns the M task vectors into one.

    Args:
        how: `"sum"`; `"mean"`: the sum divided by the weights of those models whose value is not
            zero, so that models without a say in an entry do not dilute it; `"max"`: the value
            of largest magnitude (of equal ones the earlier model's), under the elected sign
            where there was an election.

    Raises:
        ValueError: an unknown choice.
        TypeError: `"max"` on a complex leaf.

    Source: Yadav et al. 2023, "TIES-Merging", section 4, step 3 (disjoint merge), and the
    authors' code for sum and max.
    """
    core.check_choice(how, "how", ("sum", "mean", "max"))

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        return {}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        values = taus.values
        if how == "max":
            core.check_real(name, values.dtype, 'reduce("max")')
            merged = jnp.take_along_axis(values, jnp.argmax(jnp.abs(values), axis=0)[None], axis=0)
            if taus.sign is not None:
                merged = jnp.abs(merged) * taus.sign
        else:
            merged = jnp.sum(values, axis=0, keepdims=True)
        if how == "mean":
            # The magnitude of a weight is a model's say; its sign is in the value already.
            says = (values != 0).astype(values.dtype)
            count = core.weighted_sum(jnp.abs(taus.weights), says)
            merged = merged / jnp.where(count > 0, count, 1)
        return TaskVectors(merged, core.per_model(None, 1))

    return Stage("reduce", measure, apply, reduces=True)


def rescale(factor: ArrayLike) -> Stage:
    """Multiplies the task vectors by a number, e.g. the lambda of task arithmetic.

    Args:
        factor: a number; may be traced.

    Raises:
        ValueError: the factor is not finite.
    """
    core.check_finite(factor, "factor")

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        return {"factor": jnp.asarray(factor, float)}

    def apply(plan: Plan, name: str, taus: TaskVectors) -> TaskVectors:
        return taus._replace(values=taus.values * plan["factor"].astype(taus.values.dtype))

    return Stage("rescale", measure, apply)


def _check_density(density: ArrayLike) -> None:
    core.check_finite(density, "density", 0.0, 1.0)
    if not isinstance(density, jax.core.Tracer) and density == 0:
        raise ValueError("density is the fraction to keep and must be above 0, got 0")


def _flat(values: Array) -> Any:
    return values.reshape(values.shape[0], -1)
