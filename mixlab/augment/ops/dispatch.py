"""Runs ops image by image: where the formulation depends on the machine, and the time goes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from mixlab.types import Array, PyTree


def on_cpu() -> bool:
    """Whether ops are to be formulated for a CPU, rather than for an accelerator."""
    return jax.default_backend() == "cpu"


def each(fn: Callable[[Any], Any], examples: PyTree) -> PyTree:
    """Applies `fn` along the leading axis: in turn on a CPU, at once on an accelerator.

    A CPU keeps one image in its caches, and runs of a switch only the branch that is taken, where
    under vmap it would run all of them.
    """
    return jax.lax.map(fn, examples) if on_cpu() else jax.vmap(fn)(examples)


def per_image(fn: Callable[[Array], Array], images: Array) -> Array:
    """Applies a function of an image [H, W, C] to each of [..., H, W, C]."""
    return fn(images) if images.ndim == 3 else each(lambda part: per_image(fn, part), images)


def run_each(
    branches: Sequence[Callable[[Array, PyTree], Array]],
    image: Array,
    branch: Array,
    argument: PyTree,
) -> Array:
    """Runs `branches[branch[i, j]]` with `argument[i, j]`, j = 0, 1, ..., on all of example i.

    Args:
        branches: `(image [H, W, C], argument) -> image` of the same shape and dtype.
        image: [B, H, W, C] or [B, T, H, W, C].
        branch: int32 [B, n], which branch each example goes through, n in a row.
        argument: what the branch is given: leaves [B, n, ...].

    Returns:
        Shape and dtype of `image`.
    """

    def one(decision: tuple[Array, Array, PyTree]) -> Array:
        def layer(image: Array, step: tuple[Array, PyTree]) -> tuple[Array, None]:
            return jax.lax.switch(step[0], branches, image, step[1]), None

        return per_image(lambda image: jax.lax.scan(layer, image, decision[1:])[0], decision[0])

    return each(one, (image, branch, argument))
