"""Chains of stages: what task-vector methods are composed of.

`chain(trim(0.2), elect_sign(), reduce("mean"), rescale(1.0))` is TIES; other methods are other
chains. A stage works on the task vectors `theta_m - theta_base` of one leaf at a time. The stages
are in `stages.py`, and beside the methods that need them.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixlab.merge import core
from mixlab.types import Array, Key, Plan, PyTree


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
        entrywise: whether what it does to an entry depends on the leaf in nothing but its values,
            so that small leaves can be worked on as one.
        propagates: whether NaN comes out of it at its entry and changes no other, so that a chain
            of such stages needs no care for it.
    """

    name: str
    measure: Callable[[core.Leaves, Key | None], Plan]
    apply: Callable[[Plan, str, TaskVectors], TaskVectors]
    reduces: bool = False
    entrywise: bool = False
    propagates: bool = False


def chain(*stages: Stage) -> core.MergeMethod:
    """Composes stages: base plus what is left of the task vectors after all of them.

    Each stage measures the task vectors as the stages before it leave them. They are recomputed
    on every sweep rather than kept, so a chain needs the memory of one leaf. The plan has one
    entry a stage, `"0/trim"`, `"1/elect_sign"`, ... What is not a number is unchanged to the
    stages, and comes out as NaN whatever they drop.

    Args:
        *stages: in their order; one of them must be a `reduce`, and those after it work on the
            one task vector that it leaves.

    Raises:
        TypeError: something else than a stage was given, or a leaf is complex
            and a stage takes signs or order.
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

    entrywise = all(stage.entrywise for stage in stages)
    propagates = all(stage.propagates for stage in stages)

    def opened_leaves(
        models: PyTree, base: PyTree | None
    ) -> tuple[core.Models, core.Leaves, core.Leaves, core.Packing]:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, "a method on task vectors")
        packing = core.Packing(opened.leaves.specs if entrywise else {})
        if not entrywise:
            return opened, opened.leaves, bases, packing
        return opened, packing.pack(opened.leaves), packing.pack(bases, stacked=False), packing

    def worked_on(plan: Plan, name: str, rows: list[Array], origin: Array) -> TaskVectors:
        """The task vectors of one leaf after those stages that the plan has."""
        if propagates:
            known, lost = [x - origin for x in rows], None
        else:
            known, lost = _differences(rows, origin)
        taus = TaskVectors(jnp.stack(known), core.per_model(None, len(rows)))
        for made, stage in zip(names[: len(plan)], stages, strict=False):
            taus = stage.apply(plan[made], name, taus)
        if lost is None or len(plan) < len(stages):
            return taus
        return taus._replace(values=jnp.where(lost, jnp.nan, taus.values))

    compiled = jax.jit(worked_on, static_argnums=1)

    def task_vectors(leaves: core.Leaves, bases: core.Leaves, plan: Plan) -> core.Leaves:
        def work(name: str, stacked: Array) -> TaskVectors:
            rows, origin = list(stacked), bases.read(name)
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((plan, rows, origin))):
                # Otherwise the compiler keeps all task vectors from one sweep to the next.
                rows, _ = jax.lax.optimization_barrier((rows, plan))
            elif entrywise:  # the name does not matter, so one program serves all of a shape
                return compiled(plan, "", rows, origin)
            return worked_on(plan, name, rows, origin)

        reduced = any(stage.reduces for stage in stages[: len(plan)])
        return dataclasses.replace(leaves.map(work), num_models=1 if reduced else leaves.num_models)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        _, leaves, bases, _ = opened_leaves(models, base)
        plan: Plan = {}
        for i, (name, stage) in enumerate(zip(names, stages, strict=True)):
            stage_key = None if key is None else jax.random.fold_in(key, i)
            plan = plan | {name: stage.measure(task_vectors(leaves, bases, plan), stage_key)}
        return plan

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened, leaves, bases, packing = opened_leaves(models, base)
        left = task_vectors(leaves, bases, {name: plan[name] for name in names})

        def merged(name: str) -> Array:
            return bases.read(name) + left.read(name).values[0]

        return opened.write(packing.unpack(merged))

    return core.MergeMethod(measure, combine)


@jax.jit
def _differences(rows: list[Array], origin: Array) -> tuple[list[Array], Array]:
    """The task vectors, 0 where they are no number, and where one of them is none, `[...]`."""
    taus = [x - origin for x in rows]
    lost = [jnp.isnan(x) for x in taus]
    known = [jnp.where(none, 0, x) for none, x in zip(lost, taus, strict=True)]
    return known, functools.reduce(operator.or_, lost)
