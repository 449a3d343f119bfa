"""Chains of stages: what task-vector methods are composed of.

`chain(trim(0.2), elect_sign(), reduce("mean"), rescale(1.0))` is TIES; other methods are other
chains. A stage works on the task vectors `theta_m - theta_base` of one leaf at a time. The stages
are in `stages.py`, and beside the methods that need them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

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
    """

    name: str
    measure: Callable[[core.Leaves, Key | None], Plan]
    apply: Callable[[Plan, str, TaskVectors], TaskVectors]
    reduces: bool = False
    entrywise: bool = False


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

    entrywise = all(stage.entrywise for stage in stages)

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
        values = core.each_model(lambda x: x - origin, rows)
        taus = TaskVectors(values, core.per_model(None, len(rows)))
        for made, stage in zip(names[: len(plan)], stages, strict=False):
            taus = stage.apply(plan[made], name, taus)
        return taus

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
