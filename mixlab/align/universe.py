"""Many models into one order of units: permutations that are consistent around every cycle.

Matching each pair of models by itself is not consistent: from A to B to C and back to A need not
lead to where it began. Here every model gets one permutation into a common order, the universe,
so that the matching of models i and j is that of i to the universe and from there to j. The
universe is the order of the first model.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.align.activations import STATISTICS, activation_statistics, match_moments
from mixlab.align.assignment import assignment
from mixlab.align.symmetry import Permutations, Symmetry
from mixlab.align.weights import weight_matching
from mixlab.random import check_key
from mixlab.spec import nearest
from mixlab.types import Array, Key, PyTree


def match_universe(
    scores: Array, *, backend: str | None = None, max_iterations: int = 100
) -> Array:
    """Permutations of N models' units whose scores over all pairs of models add up highest.

    Maximises the sum over i < j and over u of `scores[i, j, p[i, u], p[j, u]]`: one model at a
    time, all others held, by an exact assignment; sweeps repeat until one brings no gain. Starts
    from the best of the N ways to match all models to one of them, and so never ends below any
    of these; for two models it is the pairwise matching.

    Args:
        scores: [N, N, n, n]: `scores[i, j, a, b]` says how well unit a of model i goes with unit
            b of model j. Only i < j is read.
        backend: see `assignment`.
        max_iterations: the largest number of sweeps.

    Returns:
        int32 [N, n]: unit u of the universe is unit `p[i, u]` of model i. The first row is 0..n-1.

    Raises:
        ValueError: scores of another shape, or NaN or infinity among them.

    Source: coordinate ascent as in Git Re-Basin's MergeMany (Ainsworth et al. 2023, algorithm 3),
    on the objective of Crisostomi et al. 2024 ("C2M3"), who ascend by Frank-Wolfe steps; the
    problem is permutation synchronisation (Pachauri et al. 2013).
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 4 or scores.shape[0] != scores.shape[1] or scores.shape[2] != scores.shape[3]:
        raise ValueError(f"scores must have shape [N, N, n, n], got {scores.shape}")
    models, units = scores.shape[0], scores.shape[2]
    scores = _both_ways(scores)
    pairs = assignment(scores.reshape(-1, units, units), backend=backend)
    found = _best_star(scores, pairs.reshape(models, models, units))
    for _ in range(max_iterations):
        improved = False
        for i in range(models):
            support = _support(scores, found, i)
            found, accepted = _accept(support, found, i, assignment(support, backend=backend))
            improved |= bool(accepted)
        if not improved:
            break
    return _in_order_of_the_first(found)


@jax.jit
def _both_ways(scores: Array) -> Array:
    """The scores of i < j, also as those of j and i; zero of a model with itself."""
    scores = scores.astype(trees.wide(scores.dtype))
    upper = jnp.triu(jnp.ones(scores.shape[:2], bool), 1)[:, :, None, None]
    scores = jnp.where(upper, scores, 0)
    return scores + scores.transpose(1, 0, 3, 2)


@jax.jit
def _best_star(scores: Array, pairs: Array) -> Array:
    """Of the ways to match all models to one of them, [N, N, n], the one that scores highest."""
    i, j = jnp.indices(scores.shape[:2])
    alone = (i == j)[..., None]
    stars = jnp.where(alone, jnp.arange(scores.shape[2]), pairs)
    i, j = i[..., None], j[..., None]
    totals = jax.lax.map(lambda star: jnp.sum(scores[i, j, star[:, None], star[None]]), stars)
    return stars[jnp.argmax(totals)]


@jax.jit
def _support(scores: Array, found: Array, model: int) -> Array:
    """How well each unit of one model goes with each of the universe, [universe, unit]."""
    return jnp.sum(jnp.take_along_axis(scores[model], found[:, None, :], axis=2), axis=0).T


@jax.jit
def _accept(support: Array, found: Array, model: int, better: Array) -> tuple[Array, Array]:
    """Takes a model's new permutation if its gain is more than rounding, and says whether."""
    new, old = (
        jnp.sum(jnp.take_along_axis(support, p[:, None], axis=1)) for p in (better, found[model])
    )
    least = jnp.finfo(support.dtype).eps * len(support) * jnp.max(jnp.abs(support))
    accepted = new - old > least
    return jnp.where(accepted, found.at[model].set(better), found), accepted


@jax.jit
def _in_order_of_the_first(found: Array) -> Array:
    return found[:, jnp.argsort(found[0])]


def activation_universe(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    statistic: str = "correlation",
    backend: str | None = None,
) -> Permutations:
    """Brings many models into one order by their activations: `match_universe` for every group.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        models: N trees of variables of one structure.
        batches: inputs of `fn`, one after the other: an array, or a tuple for several inputs.
        statistic: "correlation" or "second_moment": the score of a pair of units.
        backend: see `assignment`.

    Returns:
        int32 [N, n] by group, [N, *over, n] where the permutation varies over others:
        `jax.vmap(symmetry.permute)` brings the stacked models into the first one's order. Groups
        that vary over others, and those others, are matched to the first model; groups without
        activations keep their order.

    Raises:
        ValueError: an unknown statistic, fewer than two models, no batches, models that do not
            match the symmetry or each other, or activations that are not finite.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; {nearest(statistic, STATISTICS)}")
    number = len(models)
    statistics = activation_statistics(symmetry, fn, models, batches)
    match = functools.partial(
        match_moments, statistic=statistic, backend=backend, symmetry=symmetry
    )
    to_first = [{}, *(match(statistics[0, i]) for i in range(1, number))]
    found = trees.stack([{**symmetry.identity(), **p} for p in to_first])
    plain = [name for name in statistics[0, 1] if not symmetry.over[name]]
    for name in plain:
        scores = {pair: STATISTICS[statistic](m[name]) for pair, m in statistics.items()}
        blank = jnp.zeros_like(scores[0, 1])
        rows = [[scores.get((i, j), blank) for j in range(number)] for i in range(number)]
        found[name] = match_universe(jnp.stack([jnp.stack(row) for row in rows]), backend=backend)
    return found


def weight_universe(
    symmetry: Symmetry,
    models: Sequence[PyTree],
    *,
    key: Key | None = None,
    leaves: Sequence[str] | None = None,
    max_iterations: int = 100,
    backend: str | None = None,
) -> Permutations:
    """Brings many models into one order by their weights.

    Matches all models to the first, then each in turn to the mean of the others, from where it
    stands, until a sweep moves none. The sum over pairs of models of the inner products of their
    weights never falls. For two models this is `weight_matching`.

    Args:
        symmetry: the groups.
        models: N trees of variables of one structure.
        key: draws the order of models and groups; without it they are taken in order.
        leaves: see `weight_matching`.
        max_iterations: the largest number of sweeps over the models.
        backend: see `weight_matching`.

    Returns:
        int32 [N, n] by group, [N, *over, n] where the permutation varies over others:
        `jax.vmap(symmetry.permute)` brings the stacked models into the first one's order.

    Raises:
        ValueError: fewer than two models, models that do not match the symmetry or each other,
            or values that are not finite.
        KeyError: `leaves` names something unknown.
        TypeError: the key is none.

    Source: MergeMany of Git Re-Basin (Ainsworth et al. 2023, algorithm 3), from another start.
    """
    if len(models) < 2:
        raise ValueError(f"need a list of at least two models, got {len(models)}")
    if key is not None:
        check_key(key)
    found = [symmetry.identity() for _ in models]
    aligned = list(models)

    def match(i: int, reference: PyTree, step: int) -> bool:
        drawn = None if key is None else jax.random.fold_in(jax.random.fold_in(key, step), i)
        moved = weight_matching(
            symmetry, reference, models[i], key=drawn, init=found[i], leaves=leaves, backend=backend
        )
        if all(bool(jnp.array_equal(p, found[i][name])) for name, p in moved.items()):
            return False
        found[i], aligned[i] = moved, symmetry.permute(moved, models[i])
        return True

    for i in range(1, len(models)):
        match(i, models[0], 0)
    for step in range(1, max_iterations + 1):
        order = list(range(len(models)))
        if key is not None:
            drawn = jax.random.permutation(jax.random.fold_in(key, step), len(models))
            order = np.asarray(drawn).tolist()
        if not any([match(i, _mean(aligned[:i] + aligned[i + 1 :]), step) for i in order]):
            break
    back = symmetry.inverse(found[0])
    return trees.stack([symmetry.compose(back, p) for p in found])


@jax.jit
def _mean(models: Sequence[PyTree]) -> PyTree:
    """The mean of the floating leaves; others are the first model's."""

    def mean(*values: Any) -> Any:
        if not trees.is_inexact(values[0]):
            return values[0]
        return sum(value.astype(trees.wide(value.dtype)) for value in values) / len(values)

    return jax.tree.map(mean, *models)
