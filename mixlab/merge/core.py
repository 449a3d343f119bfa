"""What every way to merge shares: the two halves of a method, and the rules for leaves.

A method sees models only as `Leaves`: named arrays that are read one at a time. `measure` maps
over them and adds up what it finds, `combine` works leaf by leaf. So models whose leaves are
memory-mapped files merge in the memory of one leaf, by the same code that merges arrays.

What is NaN in one model is NaN in the merged one, at the same entry: that a model diverged must be
seen, also where a method drops entries or masks them. A method that ranks or compares entries takes
it for unchanged from the base meanwhile, so that it decides about no other entry; where leaves are
factored or models weighed as a whole, more may become NaN. Robust methods (`robust.py`,
`flag`) are there to withstand such models and do not follow this rule, and a model that a method
leaves out, as `swa` does those before its start, has no part in it.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random, trees
from mixlab.merge import rules
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


@dataclasses.dataclass(frozen=True)
class MergeMethod:
    """A way to merge models, in two halves: decide, then apply.

    `measure(models, base, key, **inputs) -> plan` takes all the decisions (thresholds, elected
    signs, coefficients); the plan is a plain pytree that can be printed, saved and replayed.
    `combine(plan, models, base) -> params` applies them leaf by leaf: on a tree that holds some of
    the leaves, under the same names, it gives those leaves of the merged model.

    Both are pure and run under `jit` and `vmap`; `jax.jit(method)` works. They take models that
    agree; the call takes care of those that do not, and of tied leaves, see `reconcile`.

    Methods flatten and join leaves, which a mesh with explicit axes does not allow. There the
    compiler has to find the shardings in between, and is told that of the merged model:
    `jax.sharding.auto_axes(lambda models: method(models), out_sharding=specs)(models)`.

    Attributes:
        measure: the decisions.
        combine: their application. Methods that make several models stack them: every leaf, the
            copied ones included, has a leading axis.
        entrywise: whether each entry of the merged model depends on that entry of the models and
            on nothing else, so that models may be merged piece by piece, each on another device.
    """

    measure: Callable[..., Plan]
    combine: Callable[..., PyTree]
    entrywise: bool = dataclasses.field(default=False, kw_only=True)

    def __call__(
        self,
        models: PyTree,
        *,
        base: PyTree | None = None,
        key: Key | None = None,
        on_mismatch: str = "error",
        report: bool = False,
        **inputs: Any,
    ) -> Any:
        """Merges.

        Args:
            models: a list (or plain tuple, or iterator) of M pytrees of one structure, or one
                pytree, of any other outermost container, whose leaves are stacked along a leading
                axis M.
            base: the model that the others were fine-tuned from, where the method needs one. Its
                integer, bool and None leaves are the ones that the merged model gets; without a
                base they come from the first model.
            key: a PRNG key, where the method draws.
            on_mismatch: what becomes of leaves that a model lacks or that differ in shape:
                `"error"`, or `"base"`, `"fill"` or `"overlap"`, see `reconcile`.
            report: give the report of `merge.report` too, with what `on_mismatch` did; not under
                `jit`.
            **inputs: what else the method measures, e.g. `fishers=`.

        Returns:
            The merged model: structure, shapes and dtypes of one model; with `report` the pair
            `(merged, report)`.

        Raises:
            ValueError: the models or the base do not match; the message names the leaf.
            TypeError: an input that the method does not take, or a key that is none.
        """
        if inputs:
            self._check_inputs(inputs)
        if key is not None:
            random.check_key(key)
        if isinstance(models, Iterator):
            models = list(models)
        given = rules.reconcile(models, base, on_mismatch)
        plan = self.measure(given.models, given.base, key, **inputs)
        merged = self.combine(plan, given.models, given.base)
        whole = given.restore(merged, open_models(given.models, given.base).several(merged))
        if not report:
            return whole
        from mixlab.merge import reports  # it stands on this module

        return whole, reports.report(
            given.models,
            base=given.base,
            merged=merged,
            notes=given.notes,
        )

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        parameters = inspect.signature(self.measure).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return
        taken = [p.name for p in parameters][3:]  # after models, base and key
        for name in inputs.keys() - taken:
            more = " and ".join(f"{other}=" for other in taken) or "nothing else"
            raise TypeError(
                f"the method takes no {name}=; with models, base=, key=, on_mismatch= and report= "
                f"it takes {more}"
            )


class LeafSpec(NamedTuple):
    """Shape and dtype of a leaf."""

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Named leaves, each read anew whenever it is asked for.

    Attributes:
        specs: by name, the shape and dtype of a leaf of one model, in the dtype it is computed in.
        num_models: M.
        read: gives the leaf of a name, most often stacked as `[M, ...]`.
    """

    specs: dict[str, LeafSpec]
    num_models: int
    read: Callable[[str], Any]

    @property
    def size(self) -> int:
        """How many entries one model has in these leaves."""
        return sum(int(np.prod(spec.shape)) for spec in self.specs.values())

    def map(self, fn: Callable[[str, Any], Any]) -> "Leaves":
        """Leaves that read as `fn(name, leaf)`; nothing is computed until they are read."""
        return dataclasses.replace(self, read=lambda name: fn(name, self.read(name)))

    def only(self, name: str) -> "Leaves":
        """The leaf `name` alone."""
        return dataclasses.replace(self, specs={name: self.specs[name]})

    def each(self, fn: Callable[[str, Any], Any]) -> dict[str, Any]:
        """Collects `fn(name, leaf)` by name."""
        return {name: fn(name, self.read(name)) for name in self.specs}

    def total(self, fn: Callable[[str, Any], Array], zero: Array) -> Array:
        """Adds `fn(name, leaf)` up over the leaves, starting from `zero`."""
        for name in self.specs:
            zero = zero + fn(name, self.read(name))
        return zero


class Packing:
    """Small leaves laid side by side, to be worked on as one.

    Most leaves of most models are small, and a program takes as long to compile for them as for
    large ones. Where what happens to an entry does not depend on its leaf, one will do for all.

    Args:
        specs: the leaves, by name.
    """

    _SMALL = 2**16

    def __init__(self, specs: dict[str, LeafSpec]):
        self.specs = specs
        by_dtype: dict[str, list[str]] = {}
        for name, spec in specs.items():
            if np.prod(spec.shape) <= self._SMALL:
                by_dtype.setdefault(str(spec.dtype), []).append(name)
        self.groups = {names[0]: names for names in by_dtype.values() if len(names) > 1}

    def pack(self, leaves: Leaves, stacked: bool = True) -> Leaves:
        """Leaves of which each group is one, `[M, n]` or, not `stacked`, `[n]`, held in memory."""
        start = leaves.num_models if stacked else 1

        def joined(names: list[str]) -> Array:
            flat = [leaves.read(name).reshape(start, -1) for name in names]
            return jnp.concatenate(flat, axis=1)[0 if not stacked else slice(None)]

        held = {name: joined(names) for name, names in self.groups.items()}
        inside = {name for names in self.groups.values() for name in names}
        specs = {
            name: LeafSpec(held[name].shape[stacked:], spec.dtype) if name in held else spec
            for name, spec in self.specs.items()
            if name in held or name not in inside
        }
        return dataclasses.replace(
            leaves, specs=specs, read=lambda name: held[name] if name in held else leaves.read(name)
        )

    def unpack(self, read: Callable[[str], Array]) -> Callable[[str], Array]:
        """Reads leaves of one model by their own names, given how to read the packed ones."""
        parts = {}
        for first, names in self.groups.items():
            sizes = [int(np.prod(self.specs[name].shape)) for name in names]
            pieces = jnp.split(read(first), np.cumsum(sizes)[:-1])
            for name, piece in zip(names, pieces, strict=True):
                parts[name] = piece.reshape(self.specs[name].shape)
        return lambda name: parts[name] if name in parts else read(name)


@dataclasses.dataclass(frozen=True)
class Models:
    """M models and their base, checked against each other and opened for reading.

    Attributes:
        leaves: the floating (and complex) leaves, stacked `[M, ...]`, in float32 or wider.
        base: the same leaves of the base, or None where there is no base.
        specs: by name, what every leaf of one model is; None for None.
        original: gives the leaf of a name in the base, or in the first model without a base.
        column: gives the leaf of a name in every model, unconverted; None where it is None.
        treedef: the structure of one model.
    """

    leaves: Leaves
    base: Leaves | None
    specs: dict[str, LeafSpec | None]
    original: Callable[[str], Any]
    column: Callable[[str], Any]
    treedef: Any

    @property
    def copied(self) -> list[str]:
        """The names of the leaves that are copied, not merged: integers, bools, keys and None."""
        return [name for name in self.specs if name not in self.leaves.specs]

    @property
    def template(self) -> PyTree:
        """The base, or the first model where there is no base."""
        return jax.tree.unflatten(self.treedef, [self.original(name) for name in self.specs])

    def differ(self, name: str) -> bool:
        """Whether the models differ in a leaf that is copied."""
        values = self.column(name)
        if values is None:
            return False
        first, *rest = (_loaded(values[i]) for i in range(self.leaves.num_models))
        return any(bool((x != first).any()) for x in rest)

    def write(self, merged: Callable[[str], Array], several: int | None = None) -> PyTree:
        """A model of the leaves `merged(name)`, in the models' dtypes, and of the copied ones.

        Args:
            merged: gives a leaf `[...]`, or `[several, ...]`.
            several: how many models the merged leaves hold, stacked, where they hold several;
                copied leaves are then repeated.
        """

        def leaf_of(name: str, spec: LeafSpec | None) -> Any:
            if spec is not None and name in self.leaves.specs:
                return merged(name).astype(spec.dtype)
            leaf = self.original(name)
            if several is None or leaf is None:
                return leaf
            return (jnp if isinstance(leaf, jax.Array) else np).stack([leaf] * several)

        return jax.tree.unflatten(
            self.treedef, [leaf_of(name, spec) for name, spec in self.specs.items()]
        )

    def several(self, merged: PyTree) -> int | None:
        """How many models `merged` holds along a leading axis; None if it is one model."""
        for name, leaf in trees.named_leaves(merged):
            spec = self.specs.get(name)
            if spec is not None and np.ndim(leaf) == len(spec.shape) + 1:
                return int(np.shape(leaf)[0])
        return None


def open_models(models: PyTree, base: PyTree | None = None) -> Models:
    """Checks models and base against each other and opens them for reading.

    Args:
        models: a list (or plain tuple) of M pytrees, or one pytree stacked along a leading axis M.
        base: a pytree like one model, or None.

    Raises:
        ValueError: there is no model; the structures, or a leaf's shape or dtype, differ; two
            leaves have one name. The message names the leaf.
        TypeError: a leaf is neither an array, a number nor None.
    """
    if type(models) in (list, tuple):
        if not models:
            raise ValueError("models is an empty list; give at least one model")
        for i, model in enumerate(models[1:], start=1):
            trees.check_same_structure(models[0], model, what=f"models 0 and {i}")
        template, num_models = models[0], len(models)
        columns = [trees.by_name(model) for model in models]
        model_specs = {name: _spec(name, leaf) for name, leaf in columns[0].items()}
        for i, column in enumerate(columns[1:], start=1):
            for name, leaf in column.items():
                _check_equal(name, _spec(name, leaf), model_specs[name], f"model {i}", "model 0")

        def column_of(name: str) -> Any:
            leaves = [column[name] for column in columns]
            return None if leaves[0] is None else leaves

    else:
        template, num_models = models, trees.leading_size(models)
        columns = [trees.by_name(models)]
        model_specs = {name: _drop_axis(_spec(name, leaf)) for name, leaf in columns[0].items()}

        def column_of(name: str) -> Any:
            return columns[0][name]

    def stacked(name: str) -> Array:
        leaves = column_of(name)
        if isinstance(leaves, list):
            return jnp.stack([_array(leaf) for leaf in leaves])
        return _array(leaves)

    based = None if base is None else trees.by_name(base)
    if based is not None:
        trees.check_same_structure(template, base, what="a model and the base")
        for name, leaf in based.items():
            _check_equal(name, _spec(name, leaf), model_specs[name], "the base", "the models")

    def original(name: str) -> Any:
        leaves = column_of(name) if based is None else [based[name]]
        return None if leaves is None else leaves[0]

    specs = {
        name: LeafSpec(spec.shape, trees.wide(spec.dtype))
        for name, spec in model_specs.items()
        if spec is not None and jnp.issubdtype(spec.dtype, jnp.inexact)
    }
    leaves = Leaves(specs, num_models, lambda name: stacked(name).astype(specs[name].dtype))
    return Models(
        leaves=leaves,
        base=None
        if based is None
        else Leaves(specs, num_models, lambda name: _array(based[name]).astype(specs[name].dtype)),
        specs=model_specs,
        original=original,
        column=column_of,
        treedef=jax.tree.structure(template, is_leaf=lambda x: x is None),
    )


def with_base(opened: Models, what: str) -> Leaves:
    """The leaves of the base; raises a `ValueError` in the name of `what` where there is none."""
    if opened.base is None:
        raise ValueError(
            f"{what} merges what the models learned beyond a base; give the model they were "
            "fine-tuned from as base="
        )
    return opened.base


def is_traced(value: Any) -> bool:
    """Whether a number, an array or one of a list of them is traced and has no value yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def check_finite(value: ArrayLike, name: str, low: float = -np.inf, high: float = np.inf) -> None:
    """Raises a `ValueError` unless every number of `value` is finite and in `[low, high]`.

    Traced values pass: they have no value to check.

    Raises:
        TypeError: there is something else than numbers.
    """
    if is_traced(value):
        return
    try:
        kind = np.asarray(value).dtype.kind
    except ValueError:  # rows of different lengths
        kind = "O"
    if kind in "OSU":  # what is no number, and texts
        raise TypeError(f"{name} must be numbers, got {value!r}")
    numbers = np.asarray(value, np.float64)
    if not np.all(np.isfinite(numbers)) or np.any(numbers < low) or np.any(numbers > high):
        bounds = (
            "be finite" if np.isinf(high) and np.isinf(low) else f"lie between {low} and {high}"
        )
        raise ValueError(f"{name} must {bounds}, got {value}")


def check_number(value: ArrayLike, name: str, low: float = -np.inf, high: float = np.inf) -> None:
    """As `check_finite`, of a number alone; a `TypeError` for anything else."""
    if isinstance(value, Sequence | Mapping | None) or np.ndim(value):
        raise TypeError(f"{name} must be one number, got {value!r}")
    check_finite(value, name, low, high)


def check_choice(value: str, name: str, known: tuple[str, ...]) -> None:
    """Raises a `ValueError` unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def per_model(weights: ArrayLike | None, num_models: int) -> Array:
    """Weights as floats `[M]`, as wide as JAX allows; ones where there are none.

    Raises:
        ValueError: there are not M weights.
    """
    if weights is None:
        return jnp.ones(num_models, float)
    array = jnp.asarray(weights, float)
    if array.shape != (num_models,):
        raise ValueError(
            f"weights must be one number for each of the {num_models} models, "
            f"got shape {array.shape}"
        )
    return array


def check_entries(
    given: Leaves, names: Iterable[str], fine: Callable[[Array], Array], what: str, must: str
) -> None:
    """Raises a `ValueError` that names leaf and model unless all concrete entries are `fine`.

    Args:
        given: what there is for each model, `[M, ...]`.
        names: of the leaves that are looked at.
        fine: `[M, ...]` to bools of that shape.
        what: what a model's leaf is called in the message.
        must: what it has to be.
    """
    for name in names:
        entries = given.read(name)
        if is_traced(entries):
            return
        found = fine(entries)
        if not bool(jnp.all(found)):
            model, *place = np.argwhere(~np.asarray(found))[0].tolist()
            raise ValueError(
                f"{what} of leaf {name!r} of model {model} must {must}, got "
                f"{entries[(model, *place)]} at {place}; compute it again, or leave out the model"
            )


def check_weights(weights: Any, *, signed: bool) -> None:
    """Raises a `ValueError` unless concrete weights are finite and, not `signed`, can be shares."""
    if weights is None:
        return
    check_finite(weights, "weights")
    if is_traced(weights) or signed:
        return
    numbers = np.asarray(weights, np.float64)
    if np.any(numbers < 0):
        raise ValueError(
            f"weights must not be negative, got {weights}; to subtract a model use "
            "task_arithmetic or interpolate"
        )
    if np.sum(numbers) == 0:
        raise ValueError(f"weights must not all be zero, got {weights}")


def weighted_sum(weights: Array, stacked: Array) -> Array:
    """Sums over the leading axis, `[M]` and `[M, ...]` to `[...]`, in the dtype of `stacked`."""
    weights = weights.astype(stacked.dtype)
    return sum_models(each_model(operator.mul, stacked, weights))


def each_model(fn: Callable[..., Array], *stacked: Any) -> Array:
    """`fn` of what each model has, stacked: `[M, ...]`; takes `[M, ...]` or lists of M arrays.

    XLA takes a row of a stack for what was stacked. So all that is done row by row becomes one
    loop over the entries, and no stack is ever in memory; operations on whole stacks would be.
    """
    return jnp.stack([fn(*rows) for rows in zip(*map(list, stacked), strict=True)])


def sum_models(stacked: Array) -> Array:
    """The sum over the leading axis, row by row: XLA for CPUs does not vectorise it otherwise."""
    return functools.reduce(operator.add, stacked)


def check_pair(num_models: int, what: str) -> None:
    """Raises a `ValueError` in the name of `what` unless there are two models."""
    if num_models != 2:
        raise ValueError(f"{what} takes two models, got {num_models}")


def without_nan(stacked: Array, origin: Array) -> tuple[Array, Array, Array]:
    """Models and their base without NaN, and where there was one.

    Args:
        stacked: `[M, ...]`.
        origin: the base's leaf, `[...]`.

    Returns:
        `stacked`, where it or the base is NaN as if unchanged; `origin`, there 0; bools `[...]`.
    """
    lost = jnp.isnan(stacked) | jnp.isnan(origin)
    origin = jnp.where(jnp.isnan(origin), 0, origin)
    return jnp.where(lost, origin, stacked), origin, jnp.any(lost, axis=0)


def along_models(weights: Array, stacked: Array) -> Array:
    """Weights `[M]`, shaped and cast to multiply `stacked [M, ...]`."""
    return trees.along(weights.astype(stacked.dtype), stacked)


def check_real(name: str, dtype: Any, what: str) -> None:
    """Raises a `TypeError` for a complex leaf, where a method needs signs or order."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{what} is not defined for complex numbers, but leaf {name!r} is {dtype}; "
            "give its real and imaginary parts as two leaves"
        )


def _spec(name: str, leaf: Any) -> LeafSpec | None:
    if leaf is None:
        return None
    dtype = getattr(leaf, "dtype", type(leaf))
    try:
        # PRNG keys have a dtype of their own kind, which result_type does not take.
        is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
        if not is_key:  # made canonical first, or JAX warns of 64 bits, which files have
            dtype = jnp.result_type(jax.dtypes.canonicalize_dtype(dtype))
        return LeafSpec(tuple(np.shape(leaf)), dtype)
    except TypeError as error:
        raise TypeError(
            f"leaf {name!r} is a {type(leaf).__name__}; models hold arrays, numbers and None"
        ) from error


def _drop_axis(spec: LeafSpec | None) -> LeafSpec | None:
    return spec and LeafSpec(spec.shape[1:], spec.dtype)


def _check_equal(
    name: str, given: LeafSpec | None, expected: LeafSpec | None, who: str, other: str
) -> None:
    if given == expected:
        return

    def words(spec: LeafSpec | None) -> str:
        return "None" if spec is None else f"{spec.dtype}{list(spec.shape)}"

    raise ValueError(
        f"leaf {name!r} is {words(given)} in {who}, but {words(expected)} in {other}; "
        "models must agree in shape and dtype: convert or leave out the leaf"
    )


def _array(leaf: Any) -> Array:
    return jnp.asarray(_loaded(leaf))


def _loaded(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
