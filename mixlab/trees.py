"""The few pytree functions that all of mixlab shares.

Leaves are named by their path, `"Dense_0/kernel"`. `None` counts as a leaf everywhere in this
module: it has a name and survives.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.types import Array, Key, PyTree


def _is_none(x: Any) -> bool:
    return x is None


def _part(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Lists `(name, leaf)` in the order of `jax.tree.leaves`, `None` included.

    A name joins the keys of the path with `/`; the name of a bare leaf is the empty string. A last
    field called `value` is left out, so that variables of Flax NNX are named as in their module.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    field = jax.tree_util.GetAttrKey("value")
    return [
        ("/".join(_part(entry) for entry in (path[:-1] if path[-1:] == (field,) else path)), leaf)
        for path, leaf in paths
    ]


def by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves by their names; raises a `ValueError` where two have the same."""
    leaves = named_leaves(tree)
    named = dict(leaves)
    if len(named) < len(leaves):
        names = [name for name, _ in leaves]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves have the same name: {twice}; rename the keys that hold '/'")
    return named


def map_named(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `fn(name, leaf, *leaves_of_rest)` over `tree`, `None` leaves included.

    Args:
        fn: called once a leaf.
        tree: gives the structure and the names.
        *rest: trees of the same structure.

    Raises:
        ValueError: a tree of `rest` differs in structure; the message names the leaves.
    """
    for other in rest:
        check_same_structure(tree, other)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_none)
    columns = [leaves, *(jax.tree.leaves(other, is_leaf=_is_none) for other in rest)]
    names = [name for name, _ in named_leaves(tree)]
    return jax.tree.unflatten(treedef, [fn(*row) for row in zip(names, *columns, strict=True)])


def check_same_structure(a: PyTree, b: PyTree, *, what: str = "trees") -> None:
    """Raises a `ValueError` that names the leaves which only one of two trees has."""
    treedef_a: Any = jax.tree.structure(a, is_leaf=_is_none)
    if treedef_a == jax.tree.structure(b, is_leaf=_is_none):
        return
    in_a, in_b = ({name for name, _ in named_leaves(tree)} for tree in (a, b))
    only_a, only_b = sorted(in_a - in_b), sorted(in_b - in_a)
    if not only_a and not only_b:
        detail = "the leaves have the same names but lie in containers of different types"
    else:
        detail = f"only in the first: {only_a or 'none'}; only in the second: {only_b or 'none'}"
    raise ValueError(f"{what} must have the same structure; {detail}")


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks trees of one structure along a new leading axis; `None` leaves stay `None`.

    Raises:
        ValueError: no trees, or trees that differ in structure.
    """
    if not trees:
        raise ValueError("stack needs at least one tree, got none")
    for other in trees[1:]:
        check_same_structure(trees[0], other)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: PyTree) -> list[PyTree]:
    """Splits the leading axis: the inverse of `stack`."""
    return [jax.tree.map(lambda x: x[i], tree) for i in range(leading_size(tree))]  # noqa: B023


def leading_size(tree: PyTree) -> int:
    """The common length of the leading axis.

    Raises:
        ValueError: the tree has no arrays, a leaf is a scalar, or the lengths differ.
    """
    sizes = {name: np.shape(leaf)[:1] for name, leaf in named_leaves(tree) if leaf is not None}
    if not sizes:
        raise ValueError("a tree without arrays has no leading axis")
    if len(set(sizes.values())) > 1 or () in sizes.values():
        listed = ", ".join(
            f"{name}: {size[0] if size else 'scalar'}" for name, size in sizes.items()
        )
        raise ValueError(f"every leaf must have the same leading axis, got {listed}")
    return next(iter(sizes.values()))[0]


def num_bytes(tree: PyTree) -> int:
    """Bytes that the arrays of `tree` hold together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def name_key(key: Key, name: str) -> Key:
    """A key for the leaf `name`: the same on every machine, whatever the order of the leaves."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is a floating or complex array, the kind of leaf that can be mixed."""
    return leaf is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def wide(dtype: Any) -> Any:
    """The dtype that a floating dtype is computed in: float32, or itself if it is wider."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def norm(tree: PyTree) -> Array:
    """The Euclidean norm over all floating leaves, in float32 or wider."""
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        if is_inexact(leaf):
            wider = jnp.asarray(leaf).astype(wide(jnp.result_type(leaf)))
            total = total + jnp.sum(jnp.square(jnp.abs(wider)))
    return jnp.sqrt(total)


def along(vector: Array, leaf: Array) -> Array:
    """A vector [k], shaped to broadcast against a leaf [k, ...]."""
    return vector.reshape(vector.shape + (1,) * (leaf.ndim - 1))


def where(chosen: Array, then: PyTree, otherwise: PyTree) -> PyTree:
    """Where `chosen`, bool [k], the first tree, elsewhere the other; leaves [k, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(along(chosen, x), x, y), then, otherwise)
