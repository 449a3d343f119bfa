"""Matching by the loss at the midpoint, through the projection onto permutations."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from mixlab import trees
from mixlab.align.soft import arguments, parameter_names, point_between
from mixlab.align.symmetry import Permutations, Symmetry
from mixlab.align.weights import weight_matching
from mixlab.random import check_key
from mixlab.types import Array, Key, PyTree


def straight_through(
    symmetry: Symmetry,
    loss: Callable[..., Array],
    reference: PyTree,
    other: PyTree,
    batches: Iterable[Any],
    *,
    key: Key,
    learning_rate: float = 1e-2,
    momentum: float = 0.9,
    max_iterations: int = 100,
    backend: str | None = None,
) -> Permutations:
    """Matches the units of two models by their loss: Git Re-Basin's straight-through estimator.

    Free parameters start at the reference. Each step projects them onto the permutations of the
    other model (weight matching, from where the last step ended), takes the loss at the midpoint
    of the reference and the permuted model, and hands its gradient to the free parameters as if
    there were no projection. Returned are the permutations whose midpoint lay lowest above the
    mean loss of the two models on the same batch. The first ones tried are weight matching's own.

    A loop over the batches on the host, which reads one number a step; the loss with its gradient
    is one compiled program, and `weight_matching` runs where it does by itself.

    Args:
        symmetry: the groups.
        loss: differentiable `loss(variables, *batch)`, a scalar. Pass the same function again to
            compile only once.
        reference: variables of the model that keeps its order.
        other: variables of the model to permute; batch statistics are permuted along.
        batches: one a step, best of one shape and drawn over several epochs. A tuple or list is
            spread as arguments, anything else is the one argument.
        key: draws the order in which weight matching visits the groups.
        learning_rate: of gradient descent.
        momentum: in [0, 1).
        max_iterations: the largest number of sweeps of each weight matching.
        backend: of weight matching, see `assignment`.

    Returns:
        int32 [n] by group, or `symmetry.shape(group)`: unit j of the reference goes with unit
        `p[j]` of the other.

    Raises:
        ValueError: trees that do not match the symmetry or each other, no batches, or a loss that
            is not finite.
        TypeError: the key is none.

    Source: Ainsworth et al. 2023 ("Git Re-Basin"), section 3.3.
    """
    check_key(key)
    parameters = parameter_names(symmetry, reference, other)
    leaves = {
        name: jnp.asarray(leaf)
        for name, leaf in trees.named_leaves(reference)
        if name in parameters
    }
    free = {name: leaf.astype(trees.wide(leaf.dtype)) for name, leaf in leaves.items()}
    velocity = jax.tree.map(jnp.zeros_like, free)
    current = symmetry.identity()
    best, lowest = None, math.inf
    for step, batch in enumerate(batches):
        current = weight_matching(
            symmetry,
            _replace(reference, free),
            other,
            key=jax.random.fold_in(key, step),
            init=current,
            max_iterations=max_iterations,
            backend=backend,
        )
        moved = symmetry.permute(current, other)
        free, velocity, excess = _step(
            free,
            velocity,
            (reference, other, moved),
            arguments(batch),
            learning_rate,
            momentum,
            loss=loss,
        )
        height = float(excess)
        if not math.isfinite(height):
            raise ValueError(
                f"the loss of batch {step} is not finite: look for NaN in the models and batches, "
                "or lower learning_rate"
            )
        if height < lowest:
            best, lowest = current, height
    if best is None:
        raise ValueError("no batches: the straight-through estimator takes one step a batch")
    return best


def _replace(variables: PyTree, leaves: dict[str, Array]) -> PyTree:
    return trees.map_named(lambda name, leaf: leaves.get(name, leaf), variables)


@functools.partial(jax.jit, static_argnames="loss")
def _step(
    free: dict[str, Array],
    velocity: dict[str, Array],
    models: tuple[PyTree, PyTree, PyTree],
    batch: tuple[Any, ...],
    learning_rate: Array,
    momentum: Array,
    *,
    loss: Callable[..., Array],
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """One step of descent, and how far the midpoint lies above the mean of the two models."""
    reference, other, moved = models

    def at_midpoint(free: dict[str, Array]) -> Array:
        # Zero in value, one in derivative.
        through = jax.tree.map(lambda x: x - jax.lax.stop_gradient(x), free)
        theirs = dict(trees.named_leaves(moved))
        shifted = {name: theirs[name].astype(x.dtype) + x for name, x in through.items()}
        return loss(point_between(0.5, reference, _replace(moved, shifted)), *batch)

    value, gradient = jax.value_and_grad(at_midpoint)(free)
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
    free = jax.tree.map(lambda x, v: x - learning_rate * v, free, velocity)
    return free, velocity, value - (loss(reference, *batch) + loss(other, *batch)) / 2
