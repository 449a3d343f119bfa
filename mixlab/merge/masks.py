"""Masks over one multi-task vector: which entries of it each task uses.

Where a model is NaN, the vector is, and all tasks use it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.merge import chains, core, stages
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_TIES = (stages.trim(0.2), stages.elect_sign(), stages.reduce("sum"))
_MULTI_TASK = {"sum": (stages.reduce("sum"),), "ties": _TIES}


class MaskedVector(NamedTuple):
    """What masks make of the models: `theta_m = theta_base + rescaler_m * mask_m * vector`.

    Attributes:
        vector: the multi-task vector, a tree like one model in float32 or wider.
        masks: a tree of bools, `[M, ...]` a leaf; of `consensus`, which gives one model, `[...]`.
        rescalers: `[M]`, or `[]` for one model.

    Leaves that are copied from the base (integers, bools) are None in both trees.
    """

    vector: PyTree
    masks: PyTree
    rescalers: Array


@dataclasses.dataclass(frozen=True)
class MaskMethod(core.MergeMethod):
    """A `MergeMethod` that masks one multi-task vector.

    Its plan is small; the masks are made anew, leaf by leaf, whenever they are asked for.
    `split(plan, models, base)` gives the `MaskedVector` that `combine` puts together, and runs
    leaf by leaf as `combine` does. `one_model` tells whether one model comes out, not M.
    """

    split: Callable[[Plan, PyTree, PyTree], MaskedVector]
    one_model: bool = False

    def masks(self, models: PyTree, *, base: PyTree) -> PyTree:
        """The masks as a tree of bools, `[M, ...]` a leaf; None where a leaf is copied."""
        return self.split(self.measure(models, base), models, base).masks


def emr() -> MaskMethod:
    """EMR: elect one vector, mask it for each task, rescale it for each task.

    An entry's elected sign is that of the sum of the task vectors (minus where the sum is zero),
    and its value the largest magnitude among the task vectors of that sign. A task's mask holds
    where its own sign agrees. Its rescaler is `sum_l mean|tau_t| / sum_l mean|mask_t vector|`,
    the means being over the entries of a leaf and the sums over the leaves, so that leaves count
    alike whatever their size (FusionBench); it is 1 where the mask is empty.

    The plan holds the rescalers `[M]`. Returns one model a task, stacked.

    Raises:
        ValueError: there is no base.
        TypeError: a leaf is complex.

    Source: Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging";
    the zero rule and the means are FusionBench's.
    """

    def masked(plan: Plan, name: str, stacked: Array, origin: Array) -> tuple[Array, Array]:
        taus = stacked - origin
        is_plus = jnp.sum(taus, axis=0) > 0
        agree = jnp.where(is_plus, taus > 0, taus < 0)
        largest = jnp.max(jnp.where(agree, jnp.abs(taus), 0), axis=0)
        return jnp.where(is_plus, largest, -largest), agree

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves, bases = _opened(models, base, "emr")

        def means(name: str, stacked: Array) -> Array:
            stacked, origin, _ = core.without_nan(stacked, bases.read(name))
            vector, agree = masked({}, name, stacked, origin)
            sizes = jnp.abs(stacked - origin), jnp.where(agree, jnp.abs(vector), 0)
            count = max(vector.size, 1)
            flat = (x.reshape(len(x), -1) for x in sizes)
            return jnp.stack([jnp.sum(x, axis=1) / count for x in flat]).astype(float)

        own, kept = leaves.total(means, jnp.zeros((2, leaves.num_models), float))
        return {"rescalers": jnp.where(kept > 0, own / jnp.where(kept > 0, kept, 1), 1)}

    return _mask_method("emr", measure, masked, lambda plan: plan["rescalers"])


def tall_masks(lam: ArrayLike | Sequence[float] = 0.4, *, multi_task: str = "sum") -> MaskMethod:
    """TALL masks: for each task, the entries of one multi-task vector that serve it.

    With `theta_mt = theta_base + tau_mt`, the mask of a task holds where
    `|theta_base - theta_t| > lam |theta_mt - theta_t|`. Its model is
    `theta_base + mask_t * tau_mt`. FusionBench puts task vectors where this formula has weights,
    which gives other masks; this is the paper's formula and the authors' code.

    The plan holds `lam` `[M]` and what the multi-task vector needs. Returns one model a task,
    stacked.

    Args:
        lam: one number, or one for each task (`[M]`), not negative, in the paper chosen on
            held-out data among 0.2 ... 0.6: the larger, the fewer entries a mask keeps. May be
            traced.
        multi_task: what `tau_mt` is: the `"sum"` of the task vectors, or their TIES merge
            (`"ties"`: density 0.2, disjoint sum).

    Raises:
        ValueError: `lam` is negative or not finite, there are not M, the multi-task vector is
            unknown, or there is no base.
        TypeError: a leaf is complex.

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and
    Compression" (TALL-masks).
    """
    measure, masked = _tall(lam, multi_task, "tall_masks")

    def rescalers(plan: Plan) -> Array:
        return jnp.ones_like(plan["lam"])

    return _mask_method("tall_masks", measure, masked, rescalers)


def consensus(
    k: ArrayLike = 2,
    lam: ArrayLike | Sequence[float] = 0.4,
    scale: ArrayLike = 0.3,
    *,
    multi_task: str = "sum",
) -> MaskMethod:
    """Consensus: keeps the entries of the multi-task vector that at least `k` tasks use.

    One merged model, `theta_base + scale * (sum_t mask_t >= k) * tau_mt`, with the masks and the
    multi-task vector of `tall_masks`.

    Args:
        k: how many masks must hold: 0 keeps everything, 1 drops the entries that no task uses
            ("catastrophic"), 2 also those of a single task ("selfish"); more than M keeps
            nothing. May be traced.
        lam: as in `tall_masks`.
        scale: in the paper chosen on held-out data among 0.1, 0.2, ..., 1.0; may be traced.
        multi_task: as in `tall_masks`.

    Raises:
        ValueError: `k` or `lam` is negative, a number is not finite, there are not M `lam`, the
            multi-task vector is unknown, or there is no base.
        TypeError: a leaf is complex.

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and
    Compression" (consensus merging).
    """
    core.check_number(k, "k", 0.0)
    core.check_number(scale, "scale")
    of_tasks, masked_tasks = _tall(lam, multi_task, "consensus")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        votes = {"k": jnp.asarray(k, float), "scale": jnp.asarray(scale, float)}
        return of_tasks(models, base) | votes

    def masked(plan: Plan, name: str, stacked: Array, origin: Array) -> tuple[Array, Array]:
        vector, masks = masked_tasks(plan, name, stacked, origin)
        return vector, jnp.sum(masks, axis=0, dtype=plan["k"].dtype) >= plan["k"]

    return _mask_method("consensus", measure, masked, lambda plan: plan["scale"], one_model=True)


_Masked = Callable[[Plan, str, Array, Array], tuple[Array, Array]]
"""`(plan, name, models' leaf [M, ...], base's leaf) -> (vector [...], masks [M, ...] or [...])`."""


def _tall(
    lam: ArrayLike | Sequence[float], multi_task: str, what: str
) -> tuple[Callable[..., Plan], _Masked]:
    core.check_finite(np.asarray(lam) if isinstance(lam, Sequence) else lam, "lam", 0.0)
    core.check_choice(multi_task, "multi_task", tuple(_MULTI_TASK))
    steps = {f"{i}/{stage.name}": stage for i, stage in enumerate(_MULTI_TASK[multi_task])}

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves, bases = _opened(models, base, what)
        each = jnp.asarray(lam, float)
        if each.shape not in ((), (leaves.num_models,)):
            raise ValueError(
                f"lam must be one number, or one for each of the {leaves.num_models} models, "
                f"got shape {each.shape}"
            )
        ones = core.per_model(None, leaves.num_models)

        def task_vectors(name: str, stacked: Array) -> chains.TaskVectors:
            stacked, origin, _ = core.without_nan(stacked, bases.read(name))
            return chains.TaskVectors(stacked - origin, ones)

        taus = leaves.map(task_vectors)
        of_stages = {}
        for step, stage in steps.items():
            of_stages[step] = stage.measure(taus, None)
            taus = _after(taus, stage, of_stages[step])
        return {"lam": jnp.broadcast_to(each, leaves.num_models), "multi_task": of_stages}

    def masked(plan: Plan, name: str, stacked: Array, origin: Array) -> tuple[Array, Array]:
        taus = chains.TaskVectors(stacked - origin, core.per_model(None, len(stacked)))
        for step, stage in steps.items():
            taus = stage.apply(plan["multi_task"][step], name, taus)
        vector = taus.values[0]
        # Rounded as the authors' code rounds it: the sum first, then the difference.
        far = jnp.abs((origin + vector) - stacked) * core.along_models(plan["lam"], stacked)
        return vector, jnp.abs(origin - stacked) > far

    return measure, masked


def _after(taus: core.Leaves, stage: chains.Stage, plan: Plan) -> core.Leaves:
    return taus.map(lambda name, x: stage.apply(plan, name, x))


def _opened(models: PyTree, base: PyTree | None, what: str) -> tuple[core.Leaves, core.Leaves]:
    opened = core.open_models(models, base)
    for name, spec in opened.leaves.specs.items():
        core.check_real(name, spec.dtype, what)
    return opened.leaves, core.with_base(opened, what)


def _mask_method(
    what: str,
    measure: Callable[..., Plan],
    masked: _Masked,
    rescalers: Callable[[Plan], Array],
    one_model: bool = False,
) -> MaskMethod:
    def whole(plan: Plan, name: str, stacked: Array, origin: Array) -> tuple[Array, Array]:
        *given, lost = core.without_nan(stacked, origin)
        vector, masks = masked(plan, name, *given)
        return jnp.where(lost, jnp.nan, vector), masks | lost

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, what)
        factors = rescalers(plan)

        def merge(name: str, stacked: Array) -> Array:
            origin = bases.read(name)
            return unmask(origin, *whole(plan, name, stacked, origin), factors)

        num_models = None if one_model else opened.leaves.num_models
        return opened.write(opened.leaves.map(merge).read, num_models)

    def split(plan: Plan, models: PyTree, base: PyTree) -> MaskedVector:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, what)
        found = opened.leaves.each(lambda name, x: whole(plan, name, x, bases.read(name)))
        nothing = (None, None)
        vector, masks = (
            trees.map_named(lambda name, _, i=i: found.get(name, nothing)[i], opened.template)
            for i in range(2)
        )
        return MaskedVector(vector, masks, rescalers(plan))

    return MaskMethod(measure, combine, split, one_model)


def unmask(origin: Array, vector: Array, masks: Array, rescalers: Array) -> Array:
    """A leaf of the models that a masked vector stands for.

    Args:
        origin: the base's leaf, `[...]`.
        vector: `[...]`.
        masks: bool, `[M, ...]`, or `[...]` for one model.
        rescalers: `[M]`, or `[]` for one model.
    """
    factors = rescalers.astype(vector.dtype).reshape(*rescalers.shape, *[1] * vector.ndim)
    return origin + factors * jnp.where(masks, vector, 0)


def check_leaves(table: dict[str, Array], opened: core.Models) -> None:
    """Raises a `ValueError` unless the leaves of `table` are those of an opened base."""
    specs = opened.leaves.specs
    for name in sorted(table.keys() | specs.keys()):
        given = table[name].shape if name in table else None
        expected = specs[name].shape if name in specs else None
        if given != expected:
            raise ValueError(
                f"the compressed models belong to another base: leaf {name!r} has shape {given} "
                f"in them and {expected} in the base that was given"
            )
