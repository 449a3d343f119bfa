"""What is done with leaves that cannot be merged as they are: mismatched ones and tied ones.

Methods merge models of one structure. `reconcile` makes such models of any others, before a
method sees them, and puts the leaves that it took away back into the merged model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.types import PyTree

ON_MISMATCH = ("error", "base", "fill", "overlap")


class Reconciled(NamedTuple):
    """Models of one structure.

    Attributes:
        models: as they were given, but for the leaves that are not merged, which are None.
        base: likewise.
        restore: `(merged, num_models) -> merged` with these leaves back in their places;
            `num_models` is None, or the length of the merged model's leading axis.
        notes: by name, what was done with a leaf.
    """

    models: PyTree
    base: PyTree | None
    restore: Callable[[PyTree, int | None], PyTree]
    notes: dict[str, str]


def reconcile(models: PyTree, base: PyTree | None, on_mismatch: str) -> Reconciled:
    """Makes models agree in structure and shapes, and counts tied leaves once.

    The base, or the first model where there is none, is the pattern: it says which leaves there
    are, and what a leaf is that cannot be merged. What only others have is left out.

    Leaves are tied when they are one array in every model and in the base; the merged model then
    holds one array there too, and thresholds over the whole model count it once. Under `jit`
    arrays have no identity, so ties are seen outside of it only.

    Args:
        models: as `MergeMethod` takes them.
        base: likewise.
        on_mismatch: for leaves that a model lacks, or that differ in shape or kind. `"error"`:
            they pass, and the method raises an error that names them. `"base"`: the pattern's leaf
            is copied. `"fill"`: a model that lacks the leaf, or has another shape there, counts as
            if it had the pattern's, so that its task vector is zero. `"overlap"`: leaves of
            different lengths are merged in the part that all have, counted from the first
            entries (rows of an embedding, say), and the rest is the pattern's; other leaves as
            with `"base"`. Floats of different widths are merged in the widest, save with
            `"error"`, and get the pattern's dtype.

    Raises:
        ValueError: `on_mismatch` is unknown, or there is no model.
    """
    if on_mismatch not in ON_MISMATCH:
        raise ValueError(
            f"on_mismatch must be one of {', '.join(map(repr, ON_MISMATCH))}, got {on_mismatch!r}"
        )
    untied = _untied(models, base)
    if on_mismatch == "error":
        return untied
    matched = _matched(untied.models, untied.base, on_mismatch)

    def restore(merged: PyTree, num_models: int | None) -> PyTree:
        return untied.restore(matched.restore(merged, num_models), num_models)

    return matched._replace(restore=restore, notes=matched.notes | untied.notes)


def _untied(models: PyTree, base: PyTree | None) -> Reconciled:
    listed = list(models) if type(models) in (list, tuple) else [models]
    again = _ties([*listed, *([] if base is None else [base])])
    if not again:
        return Reconciled(models, base, lambda merged, num_models: merged, {})

    def once(tree: PyTree) -> PyTree:
        return trees.map_named(lambda name, leaf: None if name in again else leaf, tree)

    def restore(merged: PyTree, num_models: int | None) -> PyTree:
        named = dict(trees.named_leaves(merged))
        return trees.map_named(lambda name, leaf: named[again.get(name) or name], merged)

    return Reconciled(
        [once(m) for m in listed] if type(models) in (list, tuple) else once(models),
        None if base is None else once(base),
        restore,
        {name: f"tied to {first}" for name, first in again.items()},
    )


def _ties(models: list[PyTree]) -> dict[str, str]:
    """By name, the first leaf that is the same array in all of the models."""
    if not models:
        return {}
    columns = [dict(trees.named_leaves(model)) for model in models]
    first: dict[tuple[int, ...], str] = {}
    again: dict[str, str] = {}
    for name, leaf in columns[0].items():
        if not isinstance(leaf, jax.Array | np.ndarray) or any(name not in c for c in columns):
            continue
        identity = tuple(id(column[name]) for column in columns)
        if first.setdefault(identity, name) != name:
            again[name] = first[identity]
    return again


def _matched(models: PyTree, base: PyTree | None, on_mismatch: str) -> Reconciled:
    listed = list(models) if type(models) in (list, tuple) else trees.unstack(models)
    if not listed:
        raise ValueError("models is an empty list; give at least one model")
    pattern = listed[0] if base is None else base
    own = dict(trees.named_leaves(pattern))
    columns = [dict(trees.named_leaves(model)) for model in listed]
    notes: dict[str, str] = {}
    merged_part: dict[str, tuple[slice, ...]] = {}
    copied: set[str] = set()
    for name in sorted(set().union(*columns) - own.keys()):
        notes[name] = "left out: not in the base" if base is not None else "left out: not in all"

    def of(leaves: dict[str, Any], name: str) -> Any:
        """What a model has under a name, made to match."""
        if name in copied:
            return None
        leaf = leaves.get(name)
        if leaf is None or not (trees.is_inexact(leaf) and trees.is_inexact(own[name])):
            return own[name]
        if name in merged_part:
            return leaf[merged_part[name]]
        return leaf if np.shape(leaf) == np.shape(own[name]) else own[name]

    for name, leaf in own.items():
        column: list[Any] = [leaves.get(name) for leaves in columns]
        if leaf is None or not trees.is_inexact(leaf):
            continue  # copied in any case
        lacking = [i for i, x in enumerate(column) if x is None or not trees.is_inexact(x)]
        shapes = [np.shape(leaf), *(np.shape(x) for x in column if x is not None)]
        if not lacking and len(set(shapes)) == 1:
            continue
        unlike = [i for i, x in enumerate(column) if i in lacking or np.shape(x) != np.shape(leaf)]
        if on_mismatch == "fill":
            notes[name] = f"models {unlike} lack it or differ in shape, and count as unchanged"
        elif on_mismatch == "overlap" and not lacking and len({len(s) for s in shapes}) == 1:
            common = tuple(min(lengths) for lengths in zip(*shapes, strict=True))
            merged_part[name] = tuple(slice(n) for n in common)
            notes[name] = f"merged in its first {list(common)} entries"
        else:
            copied.add(name)
            notes[name] = f"copied: models {unlike or 'all'} lack it or differ in shape"

    def alike(leaves: dict[str, Any]) -> PyTree:
        def one(name: str, leaf: Any) -> Any:
            found = of(leaves, name)
            if found is None or not trees.is_inexact(leaf):
                return found
            dtypes = {jnp.result_type(of(other, name)) for other in (*columns, own)}
            if len(dtypes) == 1:
                return found
            with jax.numpy_dtype_promotion("standard"):
                return jnp.asarray(found, jnp.result_type(*dtypes))

        return trees.map_named(one, pattern)

    def restore(merged: PyTree, num_models: int | None) -> PyTree:
        def one(name: str, found: Any, leaf: Any) -> Any:
            if leaf is None or (found is not None and name not in merged_part):
                same = found is None or jnp.result_type(found) == jnp.result_type(leaf)
                return found if same else found.astype(jnp.result_type(leaf))
            whole = jnp.asarray(leaf)
            if num_models is not None:
                whole = jnp.broadcast_to(whole, (num_models, *whole.shape))
            if found is None:
                return whole if num_models is not None else leaf
            return whole.at[(..., *merged_part[name])].set(found.astype(whole.dtype))

        return trees.map_named(one, merged, pattern)

    return Reconciled(
        [alike(leaves) for leaves in columns],
        None if base is None else alike(own),
        restore,
        notes,
    )
