"""Zips models: units are merged within a model as well as across models (ZipIt).

A zip of N models with n units a layer maps all N n units to n shared ones. Its *merge* matrix
[n, N n] averages the units that a shared unit stands for; its *unmerge* matrix [N n, n] copies a
shared unit back to them. Weights that bring units forth (with biases, norm scales and
statistics) take the merge matrix, weights that read them the unmerge matrix.

Source: Stoica et al. 2024, "ZipIt! Merging Models from Different Tasks without Training".
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse

from mixlab import trees
from mixlab.align.activations import Moments, activation_statistics, correlation
from mixlab.align.inference.layout import Atom, Prod, Sum, Term, atoms
from mixlab.align.roles import Reads, reads
from mixlab.align.symmetry import Symmetry
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, PyTree

Zip = tuple[np.ndarray, np.ndarray]
"""The merge matrix [k, N n] and the unmerge matrix [N n, k]."""


# ---------------------------------------------------------------- one layer


def zip_units(
    similarity: ArrayLike,
    num_models: int,
    *,
    ratio: float | None = None,
    alpha: float = 0.3,
    beta: float = 0.125,
    exhausted: str = "drop",
) -> Zip:
    """Merges the most similar units, within and across models, until few enough are left.

    The similarity of a merged unit to another is the smaller one of its parts', times `alpha`.
    A merged unit counts as one of its first part's model. Runs on the host.

    Args:
        similarity: [N n, N n], symmetric; the units of one model after those of another. As a
            rule `correlation` of all models' activations, set side by side.
        num_models: N.
        ratio: the share of the N n units that goes, in [0, 1); by default 1 - 1 / N, which leaves
            as many as one model has.
        alpha: at most 1; the lower, the less is merged again what is merged already. At 0 or
            below, a merged unit is kept from units at the places of the models that it came
            from, counted among the units that are left.
        beta: in [0, 1], the share of each model's part in the units that go which may go by
            merges within the model; the first such merge is always allowed.
        exhausted: what happens when every pair left is forbidden, as happens with three models
            or more: "drop" lets the first units go unmerged, as the published code does (their
            rows of the unmerge matrix are zero); "merge" goes on without `alpha` and `beta`.

    Returns:
        `(merge, unmerge)`, [k, N n] and [N n, k], in float32 or wider; k = N n (1 - ratio).

    Raises:
        ValueError: a similarity that is not square, not finite or does not hold N models; a
            number out of range.

    Source: ZipIt, section 4; published code `match_tensors_zipit`, with its defaults. For ResNets
    on CIFAR the authors take alpha 1e-4 and beta 0.075. That code divides by the size of a merged
    unit plus 1e-5, here by the size.
    """
    scores = _checked(similarity, num_models)
    ratio = 1 - 1 / num_models if ratio is None else ratio
    for name, value, allowed in (
        ("ratio", ratio, 0 <= ratio < 1),
        ("alpha", alpha, alpha <= 1),
        ("beta", beta, 0 <= beta <= 1),
    ):
        if not allowed:
            interval = {"ratio": "[0, 1)", "alpha": "(-inf, 1]", "beta": "[0, 1]"}[name]
            raise ValueError(f"{name} must lie in {interval}, got {value}")
    if exhausted not in ("drop", "merge"):
        raise ValueError(f"exhausted must be 'drop' or 'merge', got {exhausted!r}")
    # The small number is for a product such as 30 * (1 - 2 / 3) that falls short of its integer.
    kept = int(len(scores) * (1 - ratio) + 1e-4)
    labels = _merge_greedily(scores, num_models, kept, alpha, beta)
    left = np.unique(labels)
    if exhausted == "merge" and len(left) > kept:
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], left)
        rest = np.minimum.reduceat(scores[np.ix_(order, order)], starts, axis=0)
        rest = np.minimum.reduceat(rest, starts, axis=1)
        rest = _merge_greedily(rest, 1, kept, 1.0, 1.0)
        labels = left[rest[np.searchsorted(left, labels)]]
        left = np.unique(labels)
    return _matrices(labels, left[len(left) - kept :], scores.dtype)


def optimal_zip_units(similarity: ArrayLike) -> Zip:
    """The pairs of units, within and across two models, whose similarities add up highest.

    Exact, as an integer program on the host (SciPy's HiGHS): a fraction of a second up to 64
    units a model, half a minute for 256.

    Args:
        similarity: [2 n, 2 n], as for `zip_units`.

    Returns:
        `(merge, unmerge)`, [n, 2 n] and [2 n, n], in float32 or wider.

    Raises:
        ValueError: a similarity that is not square, not finite or of an odd number of units.

    Source: ZipIt, published code `match_tensors_optimal`: the matching of largest weight.
    """
    scores = _checked(similarity, 2)
    first, second = np.triu_indices(len(scores), 1)
    pairs = np.arange(len(first))
    incidence = scipy.sparse.csr_array(
        (np.ones(2 * len(pairs)), (np.concatenate([first, second]), np.tile(pairs, 2))),
        shape=(len(scores), len(pairs)),
    )
    found = scipy.optimize.milp(
        -scores[first, second].astype(np.float64),
        constraints=scipy.optimize.LinearConstraint(incidence, 1, 1),
        integrality=1,
        bounds=scipy.optimize.Bounds(0, 1),
    )
    labels = np.arange(len(scores))
    labels[second[found.x > 0.5]] = first[found.x > 0.5]
    return _matrices(labels, np.unique(labels), scores.dtype)


def _checked(similarity: ArrayLike, num_models: int) -> np.ndarray:
    scores = np.asarray(similarity)
    scores = scores.astype(trees.wide(scores.dtype), copy=False)
    if num_models < 1 or scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"need a similarity [N n, N n] and N >= 1, got {scores.shape}")
    if len(scores) % num_models:
        raise ValueError(
            f"a similarity of {len(scores)} units does not divide among {num_models} models of "
            "equal width"
        )
    if not np.all(np.isfinite(scores)):
        raise ValueError("the similarity contains NaN or infinity: look at the activations")
    return scores


def _merge_greedily(
    similarity: np.ndarray, num_models: int, kept: int, alpha: float, beta: float
) -> np.ndarray:
    """For each unit the first unit of those it is merged with, until none may be merged."""
    scores = similarity.copy()
    np.fill_diagonal(scores, -np.inf)
    total, width = len(scores), len(scores) // num_models
    model = np.repeat(np.arange(num_models), width)
    budget = np.full(num_models, int((total - kept) // num_models * beta + 1e-4))
    factor = scores.dtype.type(alpha)
    labels = np.arange(total)
    # Searching the best of each row, kept up to date, saves searching the matrix at every step.
    best, partner = scores.max(axis=1), scores.argmax(axis=1)
    for _ in range(total - kept):
        row = int(best.argmax())
        if best[row] == -np.inf:
            break
        first, second = sorted((row, int(partner[row])))
        column = np.minimum(scores[:, first], scores[:, second])
        across = np.minimum(scores[first], scores[second])
        if alpha > 0:
            column, across = column * factor, across * factor
        else:
            place = np.cumsum(labels == np.arange(total)) - 1
            origins = [model[first], model[second]]
            column[np.isin(place // width, origins)] = -np.inf
            # By now the second unit's column is gone, and those behind it have moved up.
            across[np.isin((place - (np.arange(total) > second)) // width, origins)] = -np.inf
        labels[labels == second] = first
        scores[:, first], scores[first] = column, across
        scores[first, first] = -np.inf
        scores[second] = scores[:, second] = -np.inf
        stale = np.isin(partner, (first, second))
        stale[[first, second]] = True
        origin = model[first]
        if origin == model[second]:
            budget[origin] -= 1
            if budget[origin] <= 0:
                siblings = np.flatnonzero((model == origin) & (labels == np.arange(total)))
                scores[np.ix_(siblings, siblings)] = -np.inf
                stale[siblings] = True
        # Of equal scores the first counts; a column can rise where a factor shrinks a loss.
        rises = ~stale & ((column > best) | ((column == best) & (first < partner)))
        best[rises], partner[rises] = column[rises], first
        best[stale], partner[stale] = scores[stale].max(axis=1), scores[stale].argmax(axis=1)
    return labels


def _matrices(labels: np.ndarray, kept: np.ndarray, dtype: Any) -> Zip:
    unmerge = (labels[:, None] == kept).astype(dtype)
    return (unmerge / unmerge.sum(axis=0)).T, unmerge


# ---------------------------------------------------------------- whole networks


@dataclass(frozen=True, eq=False)
class Zipped:
    """Models that share their zipped layers and keep all others.

    Attributes:
        variables: as those of one model, but every leaf that is not shared holds the models' own
            values, [N, ...]: already turned to read the shared units where it reads zipped ones.
        shared: the names of the leaves that all models share.
        num_models: N.
    """

    variables: PyTree
    shared: frozenset[str]
    num_models: int

    def apply(self, fn: Callable[..., PyTree], *inputs: PyTree) -> PyTree:
        """Runs all models on the same inputs; what they share is computed once.

        Args:
            fn: the function `fn(variables, *inputs)` of one model.
            *inputs: of one model.

        Returns:
            The outputs of all models, [N, ...].
        """
        own = {name: leaf for name, leaf in self._own() if leaf is not None}

        def run(own: dict[str, Array]) -> PyTree:
            variables = trees.map_named(lambda name, leaf: own.get(name, leaf), self.variables)
            return fn(variables, *inputs)

        return jax.vmap(run, axis_size=self.num_models)(own)

    def model(self, index: int) -> PyTree:
        """The variables of one model, which computes alone what `apply` gives for it."""
        own = dict(self._own())
        return trees.map_named(
            lambda name, leaf: leaf[index] if own.get(name) is not None else leaf, self.variables
        )

    def _own(self) -> list[tuple[str, Any]]:
        return [pair for pair in trees.named_leaves(self.variables) if pair[0] not in self.shared]


def zip_models(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
) -> PyTree:
    """Zips models of one architecture into one: `zip_units` for every group of the symmetry.

    Leaves that bring no units forth, such as the last layer's bias, are averaged. Units are
    matched by place, and averaged, in a group (a) whose permutation varies over another or that
    others vary over, such as the heads of attention and the units inside them; (b) that shares
    an axis or a leaf's outputs with another group; (c) that one leaf both brings forth and reads
    along one axis, such as a tied embedding; (d) without activations; (e) inside a `while`. Dead
    units, which never vary, count as alike among themselves and as the opposite of all others.
    Re-estimate batch statistics afterwards (`reestimate_batch_stats`). Runs on the host but for
    the models' forward passes, one a model and batch.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        models: N trees of variables of one structure.
        batches: inputs of `fn`, one after the other: an array, or a tuple for several inputs.
        alpha: see `zip_units`.
        beta: see `zip_units`.

    Returns:
        The variables of one model, dtypes kept. Leaves that are no floating ones are the first
        model's.

    Raises:
        ValueError: fewer than two models, models that do not match the symmetry or each other,
            no batches, or activations that are not finite.

    Source: ZipIt, section 4, for any network, with no graph of it written by hand.
    """
    return _zip(symmetry, fn, models, batches, None, alpha, beta).variables


def zip_models_partially(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    groups: Sequence[str],
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
) -> Zipped:
    """Zips some groups, as a rule those of the first layers; all else stays each model's own.

    Models trained on different tasks so share a trunk and keep their heads. A leaf is shared if
    it brings units of a zipped group forth. What cannot be zipped is matched by place, as
    `zip_models` lists; the name of such a group here has its leaves averaged.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        models: N trees of variables of one structure.
        batches: see `zip_models`.
        groups: names of groups; every layer that brings units of theirs forth must itself read
            units of such groups only, or inputs.
        alpha: see `zip_units`.
        beta: see `zip_units`.

    Returns:
        The models, see `Zipped`.

    Raises:
        KeyError: `groups` names an unknown group.
        ValueError: see `zip_models`; or a leaf brings forth or reads units of groups that are not
            zipped together with ones that are.

    Source: ZipIt, section 4 ("partial zipping").
    """
    for name in groups:
        if name not in symmetry.groups:
            raise KeyError(f"no group {name!r}; {nearest(name, symmetry.groups)}")
    return _zip(symmetry, fn, models, batches, set(groups), alpha, beta)


def _check_models(symmetry: Symmetry, models: Sequence[PyTree]) -> None:
    if len(models) < 2:
        raise ValueError(f"need a list of at least two models, got {len(models)}")
    for i, other in enumerate(models):
        trees.check_same_structure(models[0], other, what=f"models 0 and {i}")
        shapes = {name: np.shape(leaf) for name, leaf in trees.named_leaves(other)}
        for name, layout in symmetry.layouts.items():
            expected = tuple(term.size for term in layout)
            if shapes.get(name) != expected:
                raise ValueError(
                    f"the symmetry has leaf {name!r} of shape {expected}, model {i} "
                    f"{shapes.get(name, 'none')}"
                )


def _zip(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any],
    groups: set[str] | None,
    alpha: float,
    beta: float,
) -> Zipped:
    _check_models(symmetry, models)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("no batches: the units' correlation needs at least one")
    number = len(models)
    inputs = first if isinstance(first, tuple) else (first,)
    roles = reads(symmetry, fn, models[0], *inputs)
    if groups is not None:
        _check_cut(symmetry, roles, groups)
    pairs = list(itertools.combinations_with_replacement(range(number), 2))
    batches = itertools.chain([first], batches)
    statistics = activation_statistics(symmetry, fn, models, batches, pairs=pairs)
    chosen = _zippable(symmetry, roles) & set(statistics[0, 0])
    chosen &= chosen if groups is None else groups
    matrices = {
        name: zip_units(
            _similarity(name, {pair: found[name] for pair, found in statistics.items()}),
            number,
            alpha=alpha,
            beta=beta,
            exhausted="merge",
        )
        for name in symmetry.groups
        if name in chosen
    }
    merges = [
        {k: np.split(m, number, axis=1)[i] for k, (m, _) in matrices.items()} for i in range(number)
    ]
    unmerges = [
        {k: np.split(u, number)[i].T for k, (_, u) in matrices.items()} for i in range(number)
    ]
    shared: set[str] = set()

    def zip_leaf(name: str, *values: Any) -> Any:
        layout = symmetry.layouts.get(name, ())
        on_axis = [{str(atom.name) for atom in atoms(term)} for term in layout]
        brought = [axis for axis in range(len(layout)) if not roles.get((name, axis))]
        if groups is None or any(on_axis[axis] & groups for axis in brought):
            shared.add(name)
        zipped = [axis for axis in range(len(layout)) if on_axis[axis] & chosen]
        if not trees.is_inexact(values[0]):
            if zipped:
                raise ValueError(
                    f"leaf {name!r} has units to zip, but its {values[0].dtype} cannot be "
                    "averaged: make it a floating leaf, or zip other groups"
                )
            together = name in shared or values[0] is None
            return values[0] if together else jnp.stack(values)
        dtype = jnp.result_type(values[0])
        turned = [np.asarray(value).astype(trees.wide(dtype)) for value in values]
        for axis in zipped:
            matrices_of, elsewhere = (merges, 1 / number) if axis in brought else (unmerges, 1.0)
            turned = [
                _along(value, axis, layout[axis], matrices_of[i], elsewhere)
                for i, value in enumerate(turned)
            ]
        if name not in shared:
            return jnp.stack([jnp.asarray(value, dtype) for value in turned])
        averaged = any(axis in brought for axis in zipped)
        return jnp.asarray(sum(turned) / (1 if averaged else number), dtype)

    return Zipped(trees.map_named(zip_leaf, *models), frozenset(shared), number)


def _similarity(group: str, statistics: Mapping[tuple[int, int], Moments]) -> np.ndarray:
    """The correlation of all models' units, [N n, N n], from that of every pair of models."""
    blocks = {pair: np.asarray(correlation(moments)) for pair, moments in statistics.items()}
    blocks.update({(j, i): block.T for (i, j), block in blocks.items()})
    number = 1 + max(i for i, _ in blocks)
    found = np.block([[blocks[i, j] for j in range(number)] for i in range(number)])
    if not np.all(np.isfinite(found)):
        raise ValueError(
            f"the activations of group {group!r} contain NaN or infinity: check the inputs and "
            "the parameters of all models"
        )
    # Units that do not vary have no correlation, not even with themselves.
    dead = found.diagonal() < 0.5
    found = np.where(dead[:, None] | dead, -1, found).astype(found.dtype)
    found[np.ix_(dead, dead)] = 1
    return found


def _along(
    value: np.ndarray,
    axis: int,
    term: Term,
    matrices: Mapping[str, np.ndarray],
    elsewhere: float,
) -> np.ndarray:
    """Multiplies the units of each group along one axis by its matrix, others by a number."""
    match term:
        case Atom(name=name) if name in matrices:
            return np.moveaxis(np.tensordot(matrices[str(name)], value, (1, axis)), 0, axis)
        case Prod(parts) if any(atom.name in matrices for atom in atoms(term)):
            shape = value.shape
            value = value.reshape(*shape[:axis], *(p.size for p in parts), *shape[axis + 1 :])
            for offset, part in enumerate(parts):
                if any(True for _ in atoms(part)):
                    value = _along(value, axis + offset, part, matrices, elsewhere)
            return value.reshape(shape)
        case Sum(parts):
            borders = np.cumsum([part.size for part in parts])[:-1]
            pieces = zip(np.split(value, borders, axis=axis), parts, strict=True)
            turned = [_along(piece, axis, part, matrices, elsewhere) for piece, part in pieces]
            return np.concatenate(turned, axis=axis)
    return value * value.dtype.type(elsewhere)


def _check_cut(symmetry: Symmetry, roles: Reads, groups: set[str]) -> None:
    for name, layout in symmetry.layouts.items():
        brought: set[str] = set()
        read: set[str] = set()
        for axis, term in enumerate(layout):
            found = {str(atom.name) for atom in atoms(term)}
            (read if roles.get((name, axis)) else brought).update(found)
        missing = sorted((brought | read) - groups)
        if brought & groups and missing:
            raise ValueError(
                f"leaf {name!r} brings forth units of the zipped {sorted(brought & groups)}, but "
                f"it also serves {missing}: zip those too, or cut before"
            )


def _zippable(symmetry: Symmetry, roles: Reads) -> set[str]:
    """The groups of which every leaf is known to bring their units forth or to read them."""
    barred = {name for name in symmetry.groups if symmetry.over[name]}
    for name, layout in symmetry.layouts.items():
        brought = []
        for axis, term in enumerate(layout):
            found = {str(atom.name) for atom in atoms(term)}
            if found and roles.get((name, axis)) is False:
                brought.append(found)
            if roles.get((name, axis)) is None:
                barred |= found
            for product in _products(term):
                factors = [{str(atom.name) for atom in atoms(part)} for part in product.parts]
                if len([names for names in factors if names]) > 1:
                    barred |= set.union(*factors)
        if len(brought) > 1:
            barred |= set.union(*brought)
    return set(symmetry.groups) - barred


def _products(term: Term) -> Iterator[Prod]:
    if isinstance(term, Prod):
        yield term
    if isinstance(term, Prod | Sum):
        for part in term.parts:
            yield from _products(part)
