"""The linear assignment problem: which unit goes with which, so that the scores add up highest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from mixlab.types import Array, ArrayLike, PyTree

BACKENDS = ("scipy", "optax", "jax")

_Four = tuple[Array, Array, Array, Array]
_Path = tuple[Array, Array, Array, Array, Array, Array]


def assignment(scores: ArrayLike, *, backend: str | None = None, maximize: bool = True) -> Array:
    """The permutation `p` for which the sum over j of `scores[j, p[j]]` is largest.

    All backends are exact; where several permutations are best they may return different ones.
    "scipy" runs on the host (modified Jonker-Volgenant, Crouse 2016), directly or, under a
    transformation, through a callback; "jax" (the same method, a row at a time) and "optax" (the
    Hungarian algorithm, an entry at a time) run on the device. All leading axes are batch axes.
    Works under `jit` and `vmap`.

    Args:
        scores: real array [..., n, n].
        backend: "scipy", "jax", "optax", or None for scipy on CPU and jax elsewhere.
        maximize: False for the smallest sum.

    Returns:
        int32 [..., n].

    Raises:
        ValueError: the scores are not square matrices, or contain NaN or infinity. Traced scores
            cannot be looked at: the scipy backend then raises when the program runs, the others
            take scores that are not finite as the worst and still give a permutation.
    """
    scores = jnp.asarray(scores)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores must be square matrices [..., n, n], got shape {scores.shape}")
    if jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise ValueError(f"scores must be real, got {scores.dtype}")
    if backend is None:
        backend = "scipy" if jax.default_backend() == "cpu" else "jax"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if scores.dtype != jnp.float64:
        scores = scores.astype(jnp.float32)
    if not scores.size:
        return jnp.zeros(scores.shape[:-1], jnp.int32)
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
    solve = _hungarian if backend == "optax" else _shortest_paths
    for _ in scores.shape[:-2]:
        solve = jax.vmap(solve)
    return solve(costs)


def is_concrete(tree: PyTree) -> bool:
    """Whether all leaves have values that can be looked at, which traced ones do not."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _hungarian(costs: Array) -> Array:
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    return jnp.zeros(costs.shape[0], jnp.int32).at[rows].set(columns.astype(jnp.int32))


def _shortest_paths(costs: Array) -> Array:
    """The assignment of least cost of one finite matrix, by shortest augmenting paths.

    Every step looks at a whole row at once, and most units of models that resemble each other are
    placed before the first path is sought: unlike `optax.assignment.hungarian_algorithm`, which
    walks through the columns one by one and begins with no assignment.

    Args:
        costs: float [n, n].

    Returns:
        int32 [n], the column of each row.

    Source: Jonker & Volgenant 1987, "A shortest augmenting path algorithm for dense and sparse
    linear assignment problems", column and row reduction and augmentation.
    """
    n = costs.shape[0]
    rows = jnp.arange(n, dtype=jnp.int32)
    free = jnp.int32(-1)
    price = jnp.min(costs, axis=0)
    profit = jnp.min(costs - price, axis=1)
    # Of the rows whose cheapest column is the same, the first takes it.
    taker = jnp.full(n, n, jnp.int32).at[jnp.argmin(costs - price, axis=1)].min(rows)
    row_of = jnp.where(taker < n, taker, free)
    column_of = jnp.full(n, free).at[taker].set(rows, mode="drop")

    def augment(state: _Four) -> _Four:
        profit, price, row_of, column_of = state
        # Under vmap this runs for finished matrices too, and must then end at once.
        unfinished = jnp.any(column_of == free)
        start = jnp.argmax(column_of == free).astype(jnp.int32)

        def reach(path: _Path) -> _Path:
            _, row, least, distance, before, done = path
            through = least + (costs[row] - profit[row] - price)
            nearer = (through < distance) & ~done
            distance = jnp.where(nearer, through, distance)
            before = jnp.where(nearer, row, before)
            open_distance = jnp.where(done, jnp.inf, distance)
            least = jnp.min(open_distance)
            # Among equally near columns a free one ends the search.
            nearest = open_distance == least
            rank = 1 + nearest.astype(jnp.int32) + (nearest & (row_of == free)).astype(jnp.int32)
            rank = jnp.where(done, 0, rank)
            column = jnp.argmax(rank).astype(jnp.int32)
            owner = row_of[column]
            sink = jnp.where(owner == free, column, free)
            return sink, owner, least, distance, before, done.at[column].set(True)

        sink, _, least, distance, before, done = jax.lax.while_loop(
            lambda path: path[0] == free,
            reach,
            (
                jnp.where(unfinished, free, jnp.int32(0)),
                start,
                jnp.zeros((), costs.dtype),
                jnp.full(n, jnp.inf, costs.dtype),
                jnp.full(n, start),
                jnp.zeros(n, bool),
            ),
        )
        gain = jnp.where(done, least - distance, 0)
        price -= gain
        # A column that no row owns has no gain: nothing is added to the row that -1 stands for.
        profit = profit.at[row_of].add(gain).at[start].add(least)

        def flip(trail: _Four) -> _Four:
            column, row_of, column_of, _ = trail
            row = before[column]
            onward = column_of[row]
            return (
                onward,
                row_of.at[column].set(row),
                column_of.at[row].set(column),
                row != start,
            )

        _, row_of, column_of, _ = jax.lax.while_loop(
            lambda trail: trail[-1], flip, (sink, row_of, column_of, unfinished)
        )
        return profit, price, row_of, column_of

    *_, column_of = jax.lax.while_loop(
        lambda state: jnp.any(state[-1] == free), augment, (profit, price, row_of, column_of)
    )
    return column_of


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
