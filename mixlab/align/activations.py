"""Activation matching: which unit of one model does the work of which unit of another.

Direction: a permutation `p` for the pair (reference, other) says that unit j of the reference
goes with unit `p[j]` of the other model, so `symmetry.permute(permutations, other)` brings the
other model into the reference's order.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixlab import trees
from mixlab.align.assignment import assignment, is_concrete
from mixlab.align.symmetry import Permutations, Symmetry, activations
from mixlab.align.wreath import match_family
from mixlab.spec import nearest
from mixlab.types import Array, PyTree


class Centred(NamedTuple):
    """Activations of one model: what its moments with any other model are made of.

    Attributes:
        mean: [..., n].
        deviations: [..., S, n], the activations less their mean.
        squares: [..., n], the sums of the squares of the deviations.
    """

    mean: Array
    deviations: Array
    squares: Array


class Moments(NamedTuple):
    """First and second moments of two models' activations over the same rows.

    Attributes:
        total: the number of rows, a float [].
        mean_reference: [..., n].
        mean_other: [..., m].
        squares_reference: the sums of squared deviations from the mean, [..., n].
        squares_other: likewise, [..., m].
        products: the sums of products of the deviations, [..., n, m].
    """

    total: Array
    mean_reference: Array
    mean_other: Array
    squares_reference: Array
    squares_other: Array
    products: Array


@jax.jit
def moments(reference: Array, other: Array) -> Moments:
    """The moments of one batch of activations.

    Args:
        reference: [..., S, n], one column a unit.
        other: [..., S, m], the same rows seen by the other model.

    Returns:
        The moments, in float32 or wider. Sums are taken of deviations from the mean, which keeps
        the digits that a difference of raw moments would lose.
    """
    return _moments(_centred(reference), _centred(other))


def _centred(values: Array) -> Centred:
    values = values.astype(trees.wide(values.dtype))
    mean = jnp.mean(values, axis=-2)
    deviations = values - mean[..., None, :]
    return Centred(mean, deviations, jnp.sum(jnp.square(deviations), axis=-2))


def centre(
    group_activations: Mapping[str, Array], symmetry: Symmetry | None = None
) -> dict[str, Centred]:
    """Centres the activations of a model once, for its moments with any number of others.

    Args:
        group_activations: [S, n] by group, as `Symmetry.activations` gives them.
        symmetry: needed where permutations vary over loops or other groups.
    """
    return {name: _centred(_units(name, x, symmetry)) for name, x in group_activations.items()}


def cross_moments(
    reference: Mapping[str, Centred], other: Mapping[str, Centred]
) -> dict[str, Moments]:
    """The moments of two models by group, as `match_moments` takes them."""
    return {name: _moments(x, other[name]) for name, x in reference.items()}


def _moments(x: Centred, y: Centred) -> Moments:
    (mean_x, deviations_x, squares_x), (mean_y, deviations_y, squares_y) = x, y
    return Moments(
        total=jnp.asarray(deviations_x.shape[-2], deviations_x.dtype),
        mean_reference=mean_x,
        mean_other=mean_y,
        squares_reference=squares_x,
        squares_other=squares_y,
        products=jnp.matmul(
            jnp.swapaxes(deviations_x, -1, -2), deviations_y, precision=jax.lax.Precision.HIGHEST
        ),
    )


@jax.jit
def merge_moments(first: Moments, second: Moments) -> Moments:
    """The moments of the rows of both, for statistics that stream over batches.

    Source: the pairwise update of Chan, Golub & LeVeque (1983).
    """
    total = first.total + second.total
    share = second.total / total
    step_x = second.mean_reference - first.mean_reference
    step_y = second.mean_other - first.mean_other
    weight = first.total * share
    return Moments(
        total=total,
        mean_reference=first.mean_reference + share * step_x,
        mean_other=first.mean_other + share * step_y,
        squares_reference=first.squares_reference
        + second.squares_reference
        + weight * jnp.square(step_x),
        squares_other=first.squares_other + second.squares_other + weight * jnp.square(step_y),
        products=first.products + second.products + weight * _outer(step_x, step_y),
    )


def _outer(x: Array, y: Array) -> Array:
    return x[..., :, None] * y[..., None, :]


@jax.jit
def covariance(statistics: Moments) -> Array:
    """The covariance [n, m] of the two models' units, divided by the number of rows."""
    return statistics.products / statistics.total


@jax.jit
def correlation(statistics: Moments) -> Array:
    """The correlation [n, m] of the two models' units.

    The product of the standard deviations is at least 1e-7, so a dead unit, whose activation
    never varies, has correlation 0 with every other. Source: the matching metric of DIMAT (Saadati
    et al. 2024) and of ZipIt (Stoica et al. 2024, section 4).
    """
    spread = jnp.sqrt(
        _outer(
            statistics.squares_reference / statistics.total,
            statistics.squares_other / statistics.total,
        )
    )
    return covariance(statistics) / jnp.maximum(spread, 1e-7)


@jax.jit
def second_moment(statistics: Moments) -> Array:
    """The mean product [n, m] of the two models' activations, the covariance taken as unbiased.

    Source: activation matching of Git Re-Basin (Ainsworth et al. 2023, section 3.1), whose
    published code divides the covariance by the number of rows less one.
    """
    unbiased = statistics.products / jnp.maximum(statistics.total - 1, 1)
    return unbiased + _outer(statistics.mean_reference, statistics.mean_other)


STATISTICS: dict[str, Callable[[Moments], Array]] = {
    "correlation": correlation,
    "second_moment": second_moment,
}


def dead_units(group_activations: Mapping[str, Array]) -> dict[str, Array]:
    """Which units never vary: bool [n] for each group. No correlation can match these."""
    return {
        name: jnp.max(values, axis=0) == jnp.min(values, axis=0)
        for name, values in group_activations.items()
    }


def match_moments(
    statistics: Mapping[str, Moments],
    *,
    statistic: str = "correlation",
    backend: str | None = None,
    symmetry: Symmetry | None = None,
) -> Permutations:
    """The best permutation of every group, from moments collected over any number of batches.

    Args:
        statistics: `Moments` by group, of [S, n]; where the permutation varies over loops of
            [*loops, S, n], and over groups of all their units beside each other, [S, U].
        statistic: "correlation" or "second_moment": the score of a pair of units.
        backend: see `assignment`.
        symmetry: needed where permutations vary over other groups.

    Returns:
        int32 [n] by group, or `symmetry.shape(group)`.

    Raises:
        ValueError: an unknown statistic, or moments of a group that are not finite.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; {nearest(statistic, STATISTICS)}")
    scores = {name: STATISTICS[statistic](group) for name, group in statistics.items()}
    for name, group in scores.items():
        if is_concrete(group) and not bool(jnp.all(jnp.isfinite(group))):
            raise ValueError(
                f"the activations of group {name!r} contain NaN or infinity: check the inputs and "
                "parameters of both models"
            )
    solve = functools.partial(assignment, backend=backend)
    found: Permutations = {}
    for family in [] if symmetry is None else symmetry.families:
        if len(family) > 1:
            members = {name: scores.pop(name) for name in family if name in scores}
            found.update(match_family(members, family, solve, jnp)[0])
    # Groups of one width are solved together.
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, group in scores.items():
        by_shape.setdefault(group.shape, []).append(name)
    for names in by_shape.values():
        solved = solve(jnp.stack([scores[name] for name in names]))
        found.update({name: solved[i] for i, name in enumerate(names)})
    return found


def match_activations(
    reference: Mapping[str, Array],
    other: Mapping[str, Array],
    *,
    statistic: str = "correlation",
    backend: str | None = None,
    symmetry: Symmetry | None = None,
) -> Permutations:
    """The permutations that bring the other model's units into the reference's order.

    Works under `jit` and `vmap`.

    Args:
        reference: activations [S, n] by group, as `Symmetry.activations` gives them.
        other: the other model's, for the same inputs.
        statistic: "correlation" (DIMAT) or "second_moment" (Git Re-Basin).
        backend: see `assignment`.
        symmetry: needed where permutations vary over loops or other groups.

    Returns:
        int32 [n] by group: unit j of the reference goes with unit `p[j]` of the other; or
        `symmetry.shape(group)`.

    Raises:
        ValueError: the groups or shapes differ, an unknown statistic, or activations that are not
            finite (under a transformation see `assignment`).
    """
    check_activations(reference, other, symmetry)
    statistics = {
        name: moments(_units(name, x, symmetry), _units(name, other[name], symmetry))
        for name, x in reference.items()
    }
    return match_moments(statistics, statistic=statistic, backend=backend, symmetry=symmetry)


def check_activations(
    reference: Mapping[str, Array], other: Mapping[str, Array], symmetry: Symmetry | None
) -> None:
    """Raises a `ValueError` where two models' activations cannot be compared."""
    if set(reference) != set(other):
        raise ValueError(
            f"both models need activations of the same groups, got {sorted(reference)} and "
            f"{sorted(other)}"
        )
    for name, values in reference.items():
        rank = 2 if symmetry is None else 1 + len(symmetry.shape(name))
        if values.ndim != rank or values.shape != other[name].shape:
            varying = "" if rank == 2 else " (with an axis for each loop and group it varies over)"
            raise ValueError(
                f"the activations of group {name!r} must have one shape [S, n]{varying}, got "
                f"{values.shape} and {other[name].shape}"
            )


def _units(name: str, values: Array, symmetry: Symmetry | None) -> Array:
    """[*loops, S, *groups, n] as [*loops, S, U]."""
    outer = 0 if symmetry is None else sum(o in symmetry.groups for o in symmetry.over[name])
    return values.reshape(*values.shape[: values.ndim - outer - 1], -1)


def activation_matching(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    reference: PyTree,
    other: PyTree,
    *inputs: PyTree,
    statistic: str = "correlation",
    backend: str | None = None,
) -> Permutations:
    """Matches the units of two models by their activations on the same inputs.

    Over many batches, or for many models: `match_models`. A unit that never varies (a dead one)
    has no correlation: it takes what the others leave; `matching_report` counts them.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        reference: variables of the model that keeps its order.
        other: variables of the model to permute.
        *inputs: one batch.
        statistic: "correlation" or "second_moment".
        backend: see `assignment`.

    Returns:
        int32 [n] for every group, or `symmetry.shape(group)`; groups without activations keep
        their order.

    Raises:
        ValueError: trees that do not match, activations that are not finite, or a function that
            does not have the symmetry.
    """
    trees.check_same_structure(reference, other, what="the two models")
    run = _jitted(symmetry, fn)
    matched = match_activations(
        run(reference, *inputs),
        run(other, *inputs),
        statistic=statistic,
        backend=backend,
        symmetry=symmetry,
    )
    return {**symmetry.identity(), **matched}


def activation_statistics(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> dict[tuple[int, int], dict[str, Moments]]:
    """Moments between the units of models, streamed over batches; one forward pass a model.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        models: M variables.
        batches: inputs of `fn`, one after the other: an array, or a tuple for several inputs.
        pairs: the numbers of the models to compare; by default every two, the lower one first. A
            pair (i, i) gives the moments within a model.

    Returns:
        By pair `Moments` for each group, as `match_moments` takes them.

    Raises:
        ValueError: no batches, no pairs, trees that do not match, or a function that does not
            have the symmetry.
        TypeError: one array in place of batches.
    """
    models = list(models)
    pairs = tuple(itertools.combinations(range(len(models)), 2) if pairs is None else pairs)
    if not pairs:
        raise ValueError(f"no pairs to compare among {len(models)} models: give at least two")
    for model in models[1:]:
        trees.check_same_structure(models[0], model, what="the models")
    if hasattr(batches, "shape"):
        raise TypeError(f"batches is one array of shape {batches.shape}; give a list: [batch]")
    run = _jitted(symmetry, fn)
    used = sorted({i for pair in pairs for i in pair})
    total: Any = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        seen = {i: run(models[i], *inputs) for i in used}
        units = {i: {k: _units(k, x, symmetry) for k, x in a.items()} for i, a in seen.items()}
        found = _paired_moments(units, pairs)
        total = found if total is None else _merge_all(total, found)
    if total is None:
        raise ValueError("no batches: statistics need at least one")
    return dict(zip(pairs, total, strict=True))


@functools.partial(jax.jit, static_argnums=1)
def _paired_moments(
    units: dict[int, dict[str, Array]], pairs: tuple[tuple[int, int], ...]
) -> list[dict[str, Moments]]:
    # Every model is centred once, whatever the number of its pairs.
    centred = {i: {name: _centred(x) for name, x in a.items()} for i, a in units.items()}
    return [
        {name: _moments(x, centred[j][name]) for name, x in centred[i].items()} for i, j in pairs
    ]


@jax.jit
def _merge_all(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(merge_moments, first, second, is_leaf=lambda x: isinstance(x, Moments))


def match_models(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    reference: int = 0,
    statistic: str = "correlation",
    backend: str | None = None,
) -> Permutations:
    """Matches many models to one of them by activations over many batches.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        models: M variables.
        batches: as for `activation_statistics`.
        reference: the number of the model that keeps its order.
        statistic: "correlation" or "second_moment".
        backend: see `assignment`.

    Returns:
        int32 [M, *shape] by group: `jax.vmap(symmetry.permute)` brings the stacked models into the
        order of the reference.

    Raises:
        ValueError: as `activation_statistics` and `match_moments`.
    """
    pairs = [(reference, i) for i in range(len(models)) if i != reference]
    statistics = activation_statistics(symmetry, fn, models, batches, pairs=pairs)
    match = functools.partial(
        match_moments, statistic=statistic, backend=backend, symmetry=symmetry
    )
    matched = {other: match(found) for (_, other), found in statistics.items()}
    return trees.stack([{**symmetry.identity(), **matched.get(i, {})} for i in range(len(models))])


def matching_report(
    statistics: Mapping[str, Moments],
    permutations: Mapping[str, Array],
    *,
    symmetry: Symmetry | None = None,
) -> dict[str, dict[str, float]]:
    """How well the units of each group found their partners, and which units none could find.

    Args:
        statistics: `Moments` by group.
        permutations: of the same groups, as `match_moments` returns them.
        symmetry: needed where permutations vary over loops or other groups.

    Returns:
        By group: "units"; "dead_reference" and "dead_other", how many never vary, whose place is
        arbitrary since no correlation tells them apart; "correlation", the mean over the
        reference's live units of the correlation with their partner; and "before", the same
        without permuting.
    """
    report: dict[str, dict[str, float]] = {}
    for name, group in statistics.items():
        scores = correlation(group)
        alive = ~_constant(group.squares_reference, group.mean_reference, group.total)
        dead_other = _constant(group.squares_other, group.mean_other, group.total)
        partner = permutations[name] if symmetry is None else symmetry.units(name, permutations)
        matched = jnp.take_along_axis(scores, partner[..., None], axis=-1)[..., 0]
        before = jnp.diagonal(scores, axis1=-2, axis2=-1)
        report[name] = {
            "units": float(group.squares_reference.size),
            "dead_reference": float(jnp.sum(~alive)),
            "dead_other": float(jnp.sum(dead_other)),
            "correlation": float(jnp.mean(matched, where=alive)) if alive.any() else 0.0,
            "before": float(jnp.mean(before, where=alive)) if alive.any() else 0.0,
        }
    return report


def _constant(squares: Array, mean: Array, total: Array) -> Array:
    """Whether a unit's deviations are no more than what rounding the mean leaves."""
    return squares <= total * jnp.square(4 * jnp.finfo(mean.dtype).eps * mean)


def _jitted(symmetry: Symmetry, fn: Callable[..., Any]) -> Callable[..., dict[str, Array]]:
    if fn is symmetry.fn:
        return symmetry.jitted_activations
    return jax.jit(lambda variables, *inputs: activations(symmetry, fn, variables, *inputs))
