"""The linear assignment problem: which unit goes with which, so that the scores add up highest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from mixlab.types import Array, ArrayLike, PyTree

BACKENDS = ("scipy", "optax")


def assignment(scores: ArrayLike, *, backend: str | None = None, maximize: bool = True) -> Array:
    """The permutation `p` for which the sum over j of `scores[j, p[j]]` is largest.

    Both backends are exact; where several permutations are best they may return different ones.
    "scipy" runs on the host (modified Jonker-Volgenant, Crouse 2016), directly or, under a
    transformation, through a callback; "optax" is the Hungarian algorithm on the device. All
    leading axes are batch axes. Works under `jit` and `vmap`.

    Args:
        scores: real array [..., n, n].
        backend: "scipy", "optax", or None for scipy on CPU and optax elsewhere.
        maximize: False for the smallest sum.

    Returns:
        int32 [..., n].

    Raises:
        ValueError: the scores are not square matrices, or contain NaN or infinity. Traced scores
            cannot be looked at: the scipy backend then raises when the program runs, the optax
            backend takes scores that are not finite as the worst and still gives a permutation.
    """
    scores = jnp.asarray(scores)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must be square matrices [..., n, n], got shape {scores.shape}")
    if jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(f"scores must be real, got {scores.dtype}")
    if backend is None:
        backend = "scipy" if jax.default_backend() == "cpu" else "optax"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if scores.dtype != jnp.float64:
        scores = scores.astype(jnp.float32)
    concrete = is_concrete(scores)
    if backend == "scipy":
        if concrete:
            return jnp.asarray(_solve(np.asarray(scores), maximize))
        shape = jax.ShapeDtypeStruct(scores.shape[:-1], jnp.int32)
        return jax.pure_callback(
            lambda host: _solve(np.asarray(host), maximize),
            shape,
            scores,
            vmap_method="broadcast_all",
        )
    if concrete and not bool(jnp.all(jnp.isfinite(scores))):
        _solve(np.asarray(scores), maximize)
    costs = -scores if maximize else scores
    worst = jnp.max(jnp.where(jnp.isfinite(costs), costs, -jnp.inf), axis=(-2, -1), keepdims=True)
    costs = jnp.where(jnp.isfinite(costs), costs, jnp.where(jnp.isfinite(worst), worst, 0) + 1)
    solve = _hungarian
    for _ in scores.shape[:-2]:
        solve = jax.vmap(solve)
    return solve(costs)


def is_concrete(tree: PyTree) -> bool:
    """Whether all leaves have values that can be looked at, which traced ones do not."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _hungarian(costs: Array) -> Array:
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    return jnp.zeros(costs.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))


def _solve(scores: Any, maximize: bool) -> np.ndarray:
    if not np.all(np.isfinite(scores)):
        where = np.argwhere(~np.isfinite(scores))[0].tolist()
        raise ValueError(
            f"scores must be finite, got {scores[tuple(where)]} at {where}: look for NaN in the "
            "parameters or activations that they were computed from"
        )
    flat = scores.reshape(-1, *scores.shape[-2:])
    solved = [scipy.optimize.linear_sum_assignment(one, maximize)[1] for one in flat]
    return np.asarray(solved, np.int32).reshape(scores.shape[:-1])
