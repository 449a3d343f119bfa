"""Twin-Merging: what the models share, and what each has besides, merged by a router's weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.merge import core, patterns
from mixlab.merge.masks import check_leaves
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_COMPRESSIONS = ("svd", "magnitude", "bernoulli")

Table = dict[str, Array]
"""Arrays by the name of their leaf."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedTwin:
    """The shared part of M models, and the compressed exclusive part of each.

    What `twin` leaves of the models. An exclusive leaf lies in one of three forms.

    Attributes:
        shared: by name, `[...]`, in float32 or wider.
        left: by name, `[M, rows, rank]`, and
        right: by name, `[M, rank, columns]`: the factors of a matrix.
        index: by name, `[M, k]`, places in the flattened leaf (past its end for padding), and
        value: by name, `[M, k]`: the entries that are kept.
        whole: by name, `[M, ...]`.
    """

    shared: Table
    left: Table = dataclasses.field(default_factory=dict)
    right: Table = dataclasses.field(default_factory=dict)
    index: Table = dataclasses.field(default_factory=dict)
    value: Table = dataclasses.field(default_factory=dict)
    whole: Table = dataclasses.field(default_factory=dict)
    kind: ClassVar[str] = "twin"

    @property
    def num_models(self) -> int:
        """M; 0 where nothing is merged."""
        return next((len(x) for table in self._parts.values() for x in table.values()), 0)

    def exclusive(self, name: str) -> Array:
        """The exclusive parts of a leaf, `[M, ...]`."""
        stored = {kind: table[name] for kind, table in self._parts.items() if name in table}
        return _dense(stored, (self.num_models, *self.shared[name].shape))

    def merge(self, base: PyTree, router_weights: ArrayLike) -> PyTree:
        """The merged model for weights `[M]`, or models stacked `[B, ...]` for `[B, M]`.

        Raises:
            ValueError: there is not a weight for each model, or the base has other leaves.
        """
        opened = core.open_models([base])
        check_leaves(self.shared, opened)
        weights = _router(router_weights, self.num_models)

        def merge(name: str, origin: Array) -> Array:
            return self.shared[name] + _routed(weights, self.exclusive(name))

        num_samples = None if weights.ndim == 1 else len(weights)
        return opened.write(opened.leaves.map(merge).read, num_samples)

    @property
    def _parts(self) -> dict[str, Table]:
        kinds = ("left", "right", "index", "value", "whole")
        return {kind: getattr(self, kind) for kind in kinds}


@dataclasses.dataclass(frozen=True)
class TwinMethod(core.MergeMethod):
    """A `MergeMethod` whose models can be kept as a shared and M compressed exclusive parts.

    `parts(models, base, key)` gives them; `merge.compress` calls it.
    """

    parts: Callable[[PyTree, PyTree | None, Key | None], CompressedTwin]


def twin(
    density: float = 0.1,
    scale: ArrayLike = 0.3,
    *,
    compression: str = "svd",
    exclude: str | Sequence[str] = (),
) -> TwinMethod:
    """Twin-Merging: a shared model, plus the compressed rest of each model as a router weighs it.

    `theta_base + scale * sum_t tau_t` is the shared part `theta_*`, and `compress(theta_t -
    theta_*)` the exclusive part `v_t` of a task; the result is `theta_* + sum_t w_t v_t`. The
    weights come with the merge, `twin(...)(models, base=base, router_weights=w)`: `w` is `[M]`
    for one merged model, or `[B, M]` for one a sample, which come stacked. They are taken as they
    are: give a router's probabilities, not its logits. To merge again and again without the M
    models, `merge.compress(twin(...), models, base=base)`.

    Leaves of one axis and scalars are not compressed, and with `density=0` there are no exclusive
    parts: the rules of the authors' code. Leaves of more than two axes, on which that fails, are
    factored as the matrix `[all other axes, last axis]`.

    The plan holds the weights, the scale, the key and, by leaf, an orthonormal basis
    `[M, rows, rank]` of what the SVD keeps. Gradients take this basis as given.

    Args:
        density: what an exclusive part keeps, in [0, 1], a Python number: it sets shapes. The
            default is the paper's mask rate of 0.9. A rank or number of entries that rounds down
            to 0 keeps nothing.
        scale: of the task vectors in the shared part; may be traced.
        compression: `"svd"` keeps the `int(density * min(rows, columns))` largest singular
            values; `"magnitude"` the `int(density * n)` largest entries of a leaf, the earlier
            ones first among equals; `"bernoulli"` draws each entry with probability `density`
            and divides it by that, which needs a `key=`.
        exclude: a pattern of leaf names, or several (`patterns.spread`); a leaf that matches one
            has no shared part and is not compressed: it becomes `theta_base + sum_t w_t tau_t`,
            the task's own leaf where the router is sure. The authors exclude
            `("*bias*", "*classifier*")`.

    Raises:
        ValueError: an argument is out of range; at the merge: there is no base, key or router
            weights, or not one for each of the M models.
        TypeError: a leaf is complex.

    Source: Lu et al. 2024, "Twin-Merging: Dynamic Integration of Modular Expertise in Model
    Merging", and the authors' code.
    """
    core.check_number(density, "density", 0.0, 1.0)
    core.check_number(scale, "scale")
    core.check_choice(compression, "compression", _COMPRESSIONS)
    is_excluded = patterns.any_of(exclude)

    def opened(models: PyTree, base: PyTree | None) -> tuple[core.Models, core.Leaves]:
        found = core.open_models(models, base)
        for name, spec in found.leaves.specs.items():
            core.check_real(name, spec.dtype, "twin")
        return found, core.with_base(found, "twin")

    def halves(plan: Plan, name: str, stacked: Array, origin: Array) -> tuple[Array, Array]:
        """The shared part `[...]`, and what the models have besides, `[M, ...]`."""
        if is_excluded(name):
            return origin, stacked - origin
        step = jnp.sum(stacked - origin, axis=0) * plan["scale"].astype(origin.dtype)
        return origin + step, stacked - (origin + step)

    def is_whole(name: str, rest: Array) -> bool:
        return density == 1 or rest.ndim <= 2 or is_excluded(name)

    def decide(models: PyTree, base: PyTree | None, key: Key | None) -> Plan:
        found, bases = opened(models, base)
        if compression == "bernoulli" and key is None:
            raise ValueError('twin(compression="bernoulli") draws: give key=jax.random.key(...)')
        plan: Plan = {"scale": jnp.asarray(scale, float), "key": key, "bases": {}}

        def basis(name: str, stacked: Array) -> Array | None:
            _, rest = halves(plan, name, stacked, bases.read(name))
            if is_whole(name, rest):
                return None
            matrices = _matrices(rest)
            rank = int(density * min(matrices.shape[1:]))
            if rank == 0:
                return jnp.zeros((*matrices.shape[:2], 0), rest.dtype)
            left, _, _ = jnp.linalg.svd(jax.lax.stop_gradient(matrices), full_matrices=False)
            return left[..., :rank]

        if compression == "svd" and density > 0:
            plan["bases"] = found.leaves.each(basis)
        return plan

    def exclusive(plan: Plan, name: str, rest: Array) -> dict[str, Array]:
        if density == 0 and not is_excluded(name):
            none = (len(rest), 0)
            return {"index": jnp.zeros(none, jnp.int32), "value": jnp.zeros(none, rest.dtype)}
        if is_whole(name, rest):
            return {"whole": rest}
        if compression == "svd":
            left, matrices = plan["bases"][name], _matrices(rest)
            return {
                "left": left,
                "right": jnp.matmul(left.swapaxes(1, 2), matrices, precision="highest"),
            }
        flat = rest.reshape(len(rest), -1)
        if compression == "magnitude":
            _, index = jax.lax.top_k(jnp.abs(flat), int(density * flat.shape[1]))
            return {"index": index, "value": jnp.take_along_axis(flat, index, axis=1)}
        draw = trees.name_key(plan["key"], name)
        keep = jnp.stack(
            [
                jax.random.bernoulli(jax.random.fold_in(draw, task), density, row.shape)
                for task, row in enumerate(flat)
            ]
        )
        return {"whole": jnp.where(keep, flat / density, 0).reshape(rest.shape)}

    def measure(
        models: PyTree,
        base: PyTree | None = None,
        key: Key | None = None,
        *,
        router_weights: ArrayLike | Sequence[float] | None = None,
    ) -> Plan:
        num_models = opened(models, base)[0].leaves.num_models
        if router_weights is None:
            raise ValueError(
                "twin merges by a router's weights; give router_weights= [M] or [B, M]"
            )
        weights = _router(router_weights, num_models)
        return decide(models, base, key) | {"router_weights": weights}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        found, bases = opened(models, base)
        weights = plan["router_weights"]

        def merge(name: str, stacked: Array) -> Array:
            shared, rest = halves(plan, name, stacked, bases.read(name))
            return shared + _routed(weights, _dense(exclusive(plan, name, rest), rest.shape))

        num_samples = None if weights.ndim == 1 else len(weights)
        return found.write(found.leaves.map(merge).read, num_samples)

    def parts(models: PyTree, base: PyTree | None, key: Key | None) -> CompressedTwin:
        found, bases = opened(models, base)
        plan = decide(models, base, key)
        shared: Table = {}
        tables: dict[str, Table] = {}
        for name in found.leaves.specs:
            shared[name], rest = halves(plan, name, found.leaves.read(name), bases.read(name))
            stored = exclusive(plan, name, rest)
            if compression == "bernoulli" and "whole" in stored and not is_whole(name, rest):
                stored = _sparse(stored["whole"])
            for kind, array in stored.items():
                tables.setdefault(kind, {})[name] = array
        return CompressedTwin(shared, **tables)

    return TwinMethod(measure, combine, parts)


def _matrices(rest: Array) -> Array:
    return rest.reshape(len(rest), int(np.prod(rest.shape[1:-1])), rest.shape[-1])


def _sparse(rest: Array) -> dict[str, Array]:
    """The entries that are not zero, padded to the longest row by an index past the end."""
    flat = np.asarray(rest).reshape(len(rest), -1)
    rows = [np.flatnonzero(row) for row in flat]
    longest = max(map(len, rows))
    index = np.stack(
        [np.pad(x, (0, longest - len(x)), constant_values=flat.shape[1]) for x in rows]
    )
    padded = np.pad(flat, ((0, 0), (0, 1)))
    return {
        "index": jnp.asarray(index, jnp.int32),
        "value": jnp.asarray(np.take_along_axis(padded, index, axis=1)),
    }


def _dense(stored: Table, shape: tuple[int, ...]) -> Array:
    """The leaf `[M, ...]` of this shape, of which `stored` is one of the three forms."""
    if "whole" in stored:
        return stored["whole"]
    if "left" in stored:
        return jnp.matmul(stored["left"], stored["right"], precision="highest").reshape(shape)
    index, value = stored["index"], stored["value"]
    flat = jnp.zeros((shape[0], int(np.prod(shape[1:]))), value.dtype)
    row = jnp.arange(shape[0], dtype=index.dtype)[:, None]
    return flat.at[row, index].set(value, mode="drop").reshape(shape)


def _router(weights: ArrayLike | Sequence[float], num_models: int) -> Array:
    array = jnp.asarray(weights, float)
    if array.ndim not in (1, 2) or array.shape[-1] != num_models:
        raise ValueError(
            f"router_weights must be [M] or [B, M] for the {num_models} models, "
            f"got shape {array.shape}"
        )
    core.check_finite(array, "router_weights")
    return array


def _routed(weights: Array, stacked: Array) -> Array:
    """Sums `[M, ...]` by weights `[M]` to `[...]`, or by `[B, M]` to `[B, ...]`."""
    # "highest" because accelerators would otherwise round the factors to bfloat16 or TF32.
    return jnp.tensordot(weights.astype(stacked.dtype), stacked, axes=1, precision="highest")
