"""Which unit of one model does the work of which unit of another: from activations or weights.

Direction: a permutation `p` for the pair (reference, other) says that unit j of the reference
goes with unit `p[j]` of the other model, so `symmetry.permute(permutations, other)` brings the
other model into the reference's order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mixlab import trees
from mixlab.align.assignment import assignment, is_concrete
from mixlab.align.layout import atoms, rows, views
from mixlab.align.symmetry import Permutations, Symmetry, activations, take
from mixlab.spec import nearest
from mixlab.types import Array, Key, PyTree


class Moments(NamedTuple):
    """First and second moments of two models' activations over the same rows.

    Attributes:
        total: the number of rows, a float [].
        mean_reference: [n].
        mean_other: [m].
        squares_reference: the sums of squared deviations from the mean, [n].
        squares_other: likewise, [m].
        products: the sums of products of the deviations, [n, m].
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
        reference: [S, n], one column a unit.
        other: [S, m], the same rows seen by the other model.

    Returns:
        The moments, in float32 or wider. Sums are taken of deviations from the mean, which keeps
        the digits that a difference of raw moments would lose.
    """
    x, y = (values.astype(trees.wide(values.dtype)) for values in (reference, other))
    mean_x, mean_y = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
    x, y = x - mean_x, y - mean_y
    return Moments(
        total=jnp.asarray(reference.shape[0], x.dtype),
        mean_reference=mean_x,
        mean_other=mean_y,
        squares_reference=jnp.sum(jnp.square(x), axis=0),
        squares_other=jnp.sum(jnp.square(y), axis=0),
        products=jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST),
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
        products=first.products + second.products + weight * jnp.outer(step_x, step_y),
    )


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
        jnp.outer(
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
    return unbiased + jnp.outer(statistics.mean_reference, statistics.mean_other)


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
    statistics: Mapping[str, Moments], *, statistic: str = "correlation", backend: str | None = None
) -> Permutations:
    """The best permutation of every group, from moments collected over any number of batches.

    Args:
        statistics: `Moments` by group.
        statistic: "correlation" or "second_moment": the score of a pair of units.
        backend: see `assignment`.

    Returns:
        int32 [n] by group.

    Raises:
        ValueError: an unknown statistic, or moments of a group that are not finite.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; {nearest(statistic, STATISTICS)}")
    result: Permutations = {}
    for name, group in statistics.items():
        scores = STATISTICS[statistic](group)
        if is_concrete(scores) and not bool(jnp.all(jnp.isfinite(scores))):
            raise ValueError(
                f"the activations of group {name!r} contain NaN or infinity: check the inputs and "
                "parameters of both models"
            )
        result[name] = assignment(scores, backend=backend)
    return result


def match_activations(
    reference: Mapping[str, Array],
    other: Mapping[str, Array],
    *,
    statistic: str = "correlation",
    backend: str | None = None,
) -> Permutations:
    """The permutations that bring the other model's units into the reference's order.

    Works under `jit` and `vmap`.

    Args:
        reference: activations [S, n] by group, as `Symmetry.activations` gives them.
        other: the other model's, for the same inputs.
        statistic: "correlation" (DIMAT) or "second_moment" (Git Re-Basin).
        backend: see `assignment`.

    Returns:
        int32 [n] by group: unit j of the reference goes with unit `p[j]` of the other.

    Raises:
        ValueError: the groups or shapes differ, an unknown statistic, or activations that are not
            finite (under a transformation see `assignment`).
    """
    if set(reference) != set(other):
        raise ValueError(
            f"both models need activations of the same groups, got {sorted(reference)} and "
            f"{sorted(other)}"
        )
    for name, values in reference.items():
        if values.ndim != 2 or values.shape != other[name].shape:
            raise ValueError(
                f"the activations of group {name!r} must have one shape [S, n], got "
                f"{values.shape} and {other[name].shape}"
            )
    statistics = {name: moments(values, other[name]) for name, values in reference.items()}
    return match_moments(statistics, statistic=statistic, backend=backend)


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

    For statistics over many batches, or among many models, call `Symmetry.activations` once a
    model, `moments` and `merge_moments` once a pair, and `match_moments` at the end.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        reference: variables of the model that keeps its order.
        other: variables of the model to permute.
        *inputs: one batch.
        statistic: "correlation" or "second_moment".
        backend: see `assignment`.

    Returns:
        int32 [n] for every group; groups without activations keep their order.

    Raises:
        ValueError: trees that do not match, activations that are not finite, or a function that
            does not have the symmetry.
    """
    trees.check_same_structure(reference, other, what="the two models")
    run = symmetry.jitted_activations if fn is symmetry.fn else _compiled(symmetry, fn)
    matched = match_activations(
        run(reference, *inputs), run(other, *inputs), statistic=statistic, backend=backend
    )
    return {**symmetry.identity(), **matched}


def _compiled(symmetry: Symmetry, fn: Callable[..., Any]) -> Callable[..., dict[str, Array]]:
    return jax.jit(lambda variables, *inputs: activations(symmetry, fn, variables, *inputs))


def weight_matching(
    symmetry: Symmetry,
    reference: PyTree,
    other: PyTree,
    *,
    key: Key | None = None,
    order: Sequence[Sequence[str]] | None = None,
    max_iterations: int = 100,
    leaves: Sequence[str] | None = None,
) -> Permutations:
    """Matches the units of two models by their weights: coordinate descent over the groups.

    One group at a time, all others held, the permutation is chosen that maximises the inner
    product of the two models' parameters; sweeps repeat until one brings no gain. Runs on the
    host in NumPy, whose small matrix products need no compilation.

    Args:
        symmetry: the groups.
        reference: variables of the model that keeps its order.
        other: variables of the model to permute.
        key: draws the order in which each sweep visits the groups; without it every sweep takes
            the order of `symmetry.groups`.
        order: the groups' names in visiting order, one row a sweep, to replay a run; there are
            then at most so many sweeps.
        max_iterations: the largest number of sweeps.
        leaves: names of the leaves that count in the inner product; by default those under
            `"params"` if there are any, else all floating leaves.

    Returns:
        int32 [n] by group: unit j of the reference goes with unit `p[j]` of the other.

    Raises:
        ValueError: trees that do not match the symmetry or each other, values that are not
            finite, or both `key` and `order`.
        KeyError: `leaves` or `order` names something unknown.

    Source: Ainsworth et al. 2023 ("Git Re-Basin"), section 3.2 and algorithm 1, generalised to
    groups that occur as factors or segments of an axis, or on several axes of one leaf.
    """
    if key is not None and order is not None:
        raise ValueError("give either key, to draw the visiting order, or order, to replay one")
    trees.check_same_structure(reference, other, what="the two models")
    ours, theirs = _weights(symmetry, reference, leaves), _weights(symmetry, other, leaves)
    current = dict(theirs)
    permutations = {name: np.arange(size) for name, size in symmetry.groups.items()}
    touched = {
        group: [leaf for leaf in symmetry.leaves_of(group) if leaf in ours]
        for group in symmetry.groups
    }

    def permuted(leaf: str, chosen: Mapping[str, Any]) -> Any:
        return take(theirs[leaf], symmetry.layouts[leaf], chosen, np)

    def improve(group: str) -> bool:
        before = permutations[group]
        scores = np.zeros((before.size, before.size))
        for leaf in touched[group]:
            # The other model's columns are in their present order: undone at the end.
            scores[:, before] += _overlap(ours[leaf], current[leaf], symmetry.layouts[leaf], group)
        after = scipy.optimize.linear_sum_assignment(scores, maximize=True)[1]
        units = np.arange(before.size)
        if scores[units, after].sum() - scores[units, before].sum() <= 1e-12:
            return False
        chosen = {**permutations, group: after}
        moved = {leaf: permuted(leaf, chosen) for leaf in touched[group]}
        # A group on two axes of one leaf is not linear in its permutation: look before leaping.
        if any(_times(symmetry, leaf, group) > 1 for leaf in moved):
            gain = sum(np.vdot(ours[k], v) - np.vdot(ours[k], current[k]) for k, v in moved.items())
            if gain <= 1e-12:
                return False
        permutations[group] = after
        current.update(moved)
        return True

    for sweep in _sweeps(list(symmetry.groups), key, order, max_iterations):
        if not any([improve(group) for group in sweep]):
            break
    return {name: jnp.asarray(p, jnp.int32) for name, p in permutations.items()}


def _overlap(ours: Any, theirs: Any, layout: Any, group: str) -> np.ndarray:
    """Inner products of the slices that belong to the units of a group, [n, n]."""
    pairs = (
        (rows(a, at), rows(b, at))
        for axis, term in enumerate(layout)
        for (a, at), (b, _) in zip(
            views(ours, axis, term, group), views(theirs, axis, term, group), strict=True
        )
    )
    return np.sum([a.T @ b for a, b in pairs], axis=0)


def _times(symmetry: Symmetry, leaf: str, group: str) -> int:
    return sum(atom.name == group for term in symmetry.layouts[leaf] for atom in atoms(term))


def _weights(
    symmetry: Symmetry, variables: PyTree, leaves: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """The leaves that count, on the host, in float32 or wider."""
    named = dict(trees.named_leaves(variables))
    for name, layout in symmetry.layouts.items():
        shape = tuple(term.size for term in layout)
        if name not in named or np.shape(named[name]) != shape:
            found = np.shape(named[name]) if name in named else "none"
            raise ValueError(f"the symmetry has leaf {name!r} of shape {shape}, the model {found}")
    if leaves is None:
        params = [name for name in symmetry.layouts if name.startswith("params/")]
        leaves = params or list(symmetry.layouts)
    result = {}
    for name in leaves:
        if name not in symmetry.layouts:
            raise KeyError(f"no leaf {name!r}; {nearest(name, symmetry.layouts)}")
        if trees.is_inexact(named[name]):
            value = np.asarray(named[name])
            value = value if value.dtype == np.float64 else value.astype(np.float32)
            if not np.all(np.isfinite(value)):
                raise ValueError(f"leaf {name!r} contains NaN or infinity")
            result[name] = value
    return result


def _sweeps(
    groups: list[str], key: Key | None, order: Sequence[Sequence[str]] | None, max_iterations: int
) -> Any:
    for iteration in range(max_iterations if order is None else min(max_iterations, len(order))):
        if order is not None:
            unknown = set(order[iteration]) - set(groups)
            if unknown:
                raise KeyError(f"order names {sorted(unknown)}; the groups are {groups}")
            yield list(order[iteration])
        elif key is not None:
            drawn = jax.random.permutation(jax.random.fold_in(key, iteration), len(groups))
            yield [groups[i] for i in np.asarray(drawn)]
        else:
            yield groups
