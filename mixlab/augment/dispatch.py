"""Runs another op on every image of a batch: what policies do, and where their time goes."""

from collections.abc import Callable, Sequence

import jax

from mixlab.types import Array, PyTree


def run_each(
    branches: Sequence[Callable[[Array, PyTree], Array]],
    image: Array,
    branch: Array,
    argument: PyTree,
) -> Array:
    """Runs `branches[branch[i, j]]` with `argument[i, j]`, j = 0, 1, ..., on every image i.

    Args:
        branches: `(image [H, W, C], argument) -> image` of the same shape and dtype.
        image: [B, H, W, C].
        branch: int32 [B, n], which branch each image goes through, n in a row.
        argument: what the branch is given: leaves [B, n, ...].

    Returns:
        [B, H, W, C], in the dtype of `image`.
    """

    def one(decision: tuple[Array, Array, PyTree]) -> Array:
        def layer(image: Array, step: tuple[Array, PyTree]) -> tuple[Array, None]:
            return jax.lax.switch(step[0], branches, image, step[1]), None

        return jax.lax.scan(layer, decision[0], decision[1:])[0]

    # A switch over one image runs one branch; under vmap it runs all of them, which on a CPU is
    # some eighty times the work, but what an accelerator does well.
    loop = jax.lax.map if jax.default_backend() == "cpu" else lambda f, xs: jax.vmap(f)(xs)
    return loop(one, (image, branch, argument))
