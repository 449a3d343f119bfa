"""Matrices in place of permutations, and what the two methods that learn by gradient share."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.align.inference.layout import Atom, Layout, Prod, Sum, atoms, label
from mixlab.align.symmetry import Symmetry
from mixlab.types import Array, PyTree


def apply(leaf: Array, layout: Layout, matrices: Mapping[str, Array]) -> Array:
    """Multiplies every occurrence of a group in a leaf by the group's matrix.

    With the permutation matrices `M[..., j, p[..., j]] = 1` this is the permutation of the leaf:
    what a group varies over is multiplied first, and counts in the new order. Computed in float32
    or wider; the leaf's dtype is kept.

    Args:
        leaf: a floating array.
        layout: one term an axis.
        matrices: [n, n] by group, or [*over, n, n].
    """
    return _apply(leaf.astype(trees.wide(leaf.dtype)), layout, matrices).astype(leaf.dtype)


def _apply(value: Array, layout: Layout, matrices: Mapping[str, Array]) -> Array:
    for axis, term in enumerate(layout):
        before, after = layout[:axis], layout[axis + 1 :]
        if isinstance(term, Prod):
            apart = (*before, *term.parts, *after)
            sizes = [factor.size for factor in apart]
            return _apply(value.reshape(sizes), apart, matrices).reshape(value.shape)
        if isinstance(term, Sum) and any(True for _ in atoms(term)):
            ends = np.cumsum([part.size for part in term.parts[:-1]]).tolist()
            pieces = zip(jnp.split(value, ends, axis), term.parts, strict=True)
            return jnp.concatenate(
                [_apply(piece, (*before, part, *after), matrices) for piece, part in pieces], axis
            )
    at = {label(term): axis for axis, term in enumerate(layout)}
    axes = list(range(value.ndim))
    found = [(axis, term) for axis, term in enumerate(layout) if isinstance(term, Atom)]
    for axis, atom in sorted(found, key=lambda pair: len(pair[1].over)):
        matrix = matrices[str(atom.name)].astype(value.dtype)
        new = [*axes[:axis], value.ndim, *axes[axis + 1 :]]
        over = [at[name] for name in atom.over]
        value = jnp.einsum(matrix, [*over, value.ndim, axis], value, axes, new)
    return value


def apply_to_tree(
    layouts: Mapping[str, Layout], matrices: Mapping[str, Array], tree: PyTree
) -> PyTree:
    """`apply` to every floating leaf of the variables; other leaves stay as they are."""
    return trees.map_named(
        lambda name, leaf: (
            apply(leaf, layouts[name], matrices)
            if trees.is_inexact(leaf) and name in layouts
            else leaf
        ),
        tree,
    )


def point_between(weight: Any, reference: PyTree, other: PyTree) -> PyTree:
    """`(1 - weight) * reference + weight * other`, leaf by leaf; computed in float32 or wider.

    Each leaf keeps the reference's dtype; leaves that are not floating are the reference's.
    """

    def mix(_: str, ours: Any, theirs: Any) -> Any:
        if not trees.is_inexact(ours):
            return ours
        a, b = (jnp.asarray(x).astype(trees.wide(ours.dtype)) for x in (ours, theirs))
        return (a + jnp.asarray(weight, a.dtype) * (b - a)).astype(ours.dtype)

    return trees.map_named(mix, reference, other)


def parameter_names(symmetry: Symmetry, reference: PyTree, other: PyTree) -> tuple[str, ...]:
    """The names of the leaves to optimise: those under "params" if any, else all floating ones.

    Raises:
        ValueError: the models differ in structure, or a leaf has not the shape that the symmetry
            has for it, or there is no floating leaf.
    """
    trees.check_same_structure(reference, other, what="the two models")
    for whose, variables in (("reference", reference), ("other", other)):
        named = dict(trees.named_leaves(variables))
        for name, layout in symmetry.layouts.items():
            shape = tuple(term.size for term in layout)
            found = np.shape(named[name]) if name in named else "none"
            if found != shape:
                raise ValueError(
                    f"the symmetry has leaf {name!r} of shape {shape}, the {whose} model {found}: "
                    "give variables of the network that the symmetry was inferred from"
                )
    floating = [name for name, leaf in trees.named_leaves(reference) if trees.is_inexact(leaf)]
    floating = [name for name in floating if name in symmetry.layouts]
    parameters = [name for name in floating if name.startswith("params/")] or floating
    if not parameters:
        raise ValueError("the models have no floating leaf to match by")
    return tuple(parameters)


def arguments(batch: Any) -> tuple[Any, ...]:
    """What the loss takes after the variables: a tuple or list is spread, all else is one batch."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
