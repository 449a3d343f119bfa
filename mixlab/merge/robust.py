"""Robust aggregation: merges that a few faulty models cannot move far.

Two families. Coordinate rules (`median`, `trimmed_mean`, `phocas`, `meamed`, the second half of
`bulyan`) look at the M values of each entry. The others weigh whole models by the geometry between
them, of which they need no more than the squared distances or a Gram matrix, `[M, M]`, added up
over leaves; what makes weights of these are pure functions that any other aggregation can call.

The faulty models may hold anything. An entry that is NaN counts as a very large one, and a model
that is not finite is infinitely far from all others and gets no weight.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core, geometry
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_MOST_SUBSETS = 100_000
_MOST_IN_NETWORK = 32


def median(*, even: str = "mean") -> core.MergeMethod:
    """The median of the models, entry by entry. The plan is empty.

    Args:
        even: what the median of an even number is: the `"mean"` of the two middle values (NumPy),
            or the `"lower"` one (PyTorch).

    Raises:
        ValueError: an unknown choice.
        TypeError: a leaf is complex.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 1.
    """
    core.check_choice(even, "even", ("mean", "lower"))
    return _coordinate_rule("median", 0, lambda values: _middle(values, even))


def trimmed_mean(num_byzantine: int) -> core.MergeMethod:
    """The mean of each entry without its f largest and f smallest values. The plan is empty.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large.
        TypeError: a leaf is complex.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 2.
    """

    def rule(values: list[Array]) -> Array:
        return _mean(values[num_byzantine : len(values) - num_byzantine])

    return _coordinate_rule("trimmed_mean", num_byzantine, rule)


def phocas(num_byzantine: int) -> core.MergeMethod:
    """The mean of the n - f values of each entry that are closest to its trimmed mean.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large.
        TypeError: a leaf is complex.

    Source: Xie et al. 2018, "Phocas: dimensional Byzantine-resilient stochastic gradient descent".
    """

    def rule(values: list[Array]) -> Array:
        trimmed = _mean(values[num_byzantine : len(values) - num_byzantine])
        return _mean_around(trimmed, values, len(values) - num_byzantine)

    return _coordinate_rule("phocas", num_byzantine, rule)


def meamed(num_byzantine: int, *, even: str = "mean") -> core.MergeMethod:
    """The mean of the n - f values of each entry that are closest to its median.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.
        even: what the median of an even number is, as in `median`.

    Raises:
        ValueError: an unknown choice, f is not an integer of at least 0; at the merge: it is too
            large.
        TypeError: a leaf is complex.

    Source: Xie et al. 2018, "Generalized Byzantine-tolerant SGD", section 4 (mean around median).
    """
    core.check_choice(even, "even", ("mean", "lower"))

    def rule(values: list[Array]) -> Array:
        return _mean_around(_middle(values, even), values, len(values) - num_byzantine)

    return _coordinate_rule("meamed", num_byzantine, rule)


def krum(
    num_byzantine: int, *, squared: bool = True, neighbours: int | None = None
) -> core.MergeMethod:
    """The one model that is closest to its neighbours.

    A model's score is the sum of its squared distances to its `n - f - 2` nearest others; the
    lowest score wins, the first of equal ones. The plan holds the scores `[M]` and the weights.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 3.
        squared: whether distances are squared, as published; Garfield's code takes plain ones.
        neighbours: how many others count, 1 to n - 1. Default: n - f - 2, as published; ByzFL and
            Garfield take n - f - 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large, or there are
            not so many neighbours.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries", section 4.
    """
    return _krum("krum", num_byzantine, 1, squared, neighbours)


def multi_krum(
    num_byzantine: int,
    m: int | None = None,
    *,
    squared: bool = True,
    neighbours: int | None = None,
) -> core.MergeMethod:
    """The mean of the m models of lowest Krum score.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 3.
        m: how many models are averaged, 1 to n. Default: n - f - 2 (Garfield); ByzFL takes n - f.
        squared: as in `krum`.
        neighbours: as in `krum`.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large, or there are
            not so many models or neighbours.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries", section 4 (m-Krum);
    El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", on m.
    """
    return _krum("multi_krum", num_byzantine, m, squared, neighbours)


def bulyan(num_byzantine: int, *, variant: str = "published") -> core.MergeMethod:
    """Picks models by Krum, then takes the mean around the median of the picks, entry by entry.

    As published, `theta = n - 2f` models are picked one after the other, each by Krum among those
    that are left, and an entry is the mean of the `theta - 2f` values closest to the median. When
    so few are left that Krum's `n - f - 2` neighbours would be none, one counts.

    The plan holds the picks as rows of weights, `[theta, M]`.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 4f + 3.
        variant: `"published"`, or `"garfield"`, the rule of Garfield's and FlagAggregator's code:
            plain distances, scores that are not taken anew, `theta = n - 2f - 2` picks, the i-th
            (from 0) being the mean of the `n - f - 2 - i` best models without the i best, and the
            lower median.

    Raises:
        ValueError: an unknown variant, f is not an integer of at least 0; at the merge: it is too
            large.
        TypeError: a leaf is complex.

    Source: El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium",
    section 4.
    """
    core.check_choice(variant, "variant", ("published", "garfield"))
    check_faulty(num_byzantine)
    garfield = variant == "garfield"

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        check_enough(leaves.num_models, num_byzantine, "bulyan", 4, 3)
        distances = geometry.squared_distances(leaves)
        if garfield:
            return {"picks": geometry.garfield_picks(jnp.sqrt(distances), num_byzantine)}
        return {"picks": geometry.bulyan_picks(distances, num_byzantine)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, stacked: Array) -> Array:
            core.check_real(name, stacked.dtype, "bulyan")
            values = _sorted(jax.vmap(geometry.mixture, (0, None))(plan["picks"], stacked))
            centre = _middle(values, "lower" if garfield else "mean")
            return _mean_around(centre, values, len(values) - 2 * num_byzantine)

        opened = core.open_models(models, base)
        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def mda(num_byzantine: int) -> core.MergeMethod:
    """The mean of those n - f models that lie closest together (minimum-diameter averaging).

    All subsets of n - f models are tried, so n and f must be small. Of subsets of one diameter the
    first counts, in lexicographic order. The plan holds the weights `[M]`.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large, or there are
            more than 100,000 subsets.

    Source: El Mhamdi et al. 2020, "Genuinely Distributed Byzantine Machine Learning", section 3.
    """

    def decide(distances: Array) -> Plan:
        _check_subsets(len(distances), num_byzantine, "mda")
        return {"weights": geometry.mda_weights(distances, num_byzantine)}

    return _distance_rule(num_byzantine, decide)


def smea(num_byzantine: int) -> core.MergeMethod:
    """The mean of those n - f models that vary least (smallest maximum eigenvalue averaging).

    Of all subsets of n - f models it is the one whose covariance has the smallest largest
    eigenvalue; of equal ones the first counts, in lexicographic order. n and f must be small. The
    gradient of the merge takes the subset as given. The plan holds the weights `[M]`.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large, or there are
            more than 100,000 subsets.

    Source: Allouah et al. 2023, "On the Privacy-Robustness-Utility Trilemma in Distributed
    Learning", section 4.
    """

    def decide(distances: Array) -> Plan:
        _check_subsets(len(distances), num_byzantine, "smea")
        given = jax.lax.stop_gradient(distances)
        return {"weights": geometry.smea_weights(given, num_byzantine)}

    return _distance_rule(num_byzantine, decide)


def caf(num_byzantine: int) -> core.MergeMethod:
    """A weighted mean of models that vary little (covariance-bound agnostic filter).

    Again and again, models lose weight with the square of their distance from the weighted mean
    along the direction in which they vary most, the farthest one all of it, until the sum of
    weights has fallen from n to n - 2f. Of the means on the way it is the one around which the
    largest variance was smallest. The direction is exact; ByzFL takes one power iteration from a
    random start. The gradient of the merge takes the weights as given. The plan holds the weights
    `[M]`.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large.

    Source: Allouah et al. 2025, "Towards Trustworthy Federated Learning with Untrusted
    Participants", algorithm 2.
    """

    def decide(distances: Array) -> Plan:
        check_enough(len(distances), num_byzantine, "caf", 2, 1)
        given = jax.lax.stop_gradient(distances)
        return {"weights": geometry.caf_weights(given, num_byzantine)}

    return _distance_rule(num_byzantine, decide)


def monna(num_byzantine: int, *, trusted: int = 0) -> core.MergeMethod:
    """The mean of the n - f models nearest to a trusted one, that one among them.

    Between agents the trusted model is one's own. The plan holds the weights `[M]`.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.
        trusted: the place of the trusted model among the others, from 0.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large, or there is
            no such model.

    Source: Farhadkhani et al. 2023, "Robust Collaborative Learning with Linear Gradient Overhead",
    section 3 (nearest neighbour averaging).
    """

    def decide(distances: Array) -> Plan:
        num_models = len(distances)
        check_enough(num_models, num_byzantine, "monna", 2, 1)
        if not 0 <= trusted < num_models:
            raise ValueError(f"trusted must lie between 0 and {num_models - 1}, got {trusted}")
        nearest = geometry.nearest_weights(distances, num_models - num_byzantine)
        return {"weights": nearest[trusted]}

    return _distance_rule(num_byzantine, decide)


def geometric_median(
    iterations: int = 100,
    nu: float = 1e-6,
    *,
    weights: ArrayLike | None = None,
    start: str = "mean",
) -> core.MergeMethod:
    """The point whose distances to the models have the smallest sum, by Weiszfeld's iteration.

    From the point z, `theta = sum_m b_m theta_m / sum_m b_m` with
    `b_m = a_m / max(nu, |theta_m - z|)` is the next one. An iteration works on `[M, M]` numbers and
    costs next to nothing. The plan holds the weights `[M]`.

    Args:
        iterations: at least 1. RFA's are 3.
        nu: the smoothing, above 0: the least that a distance counts as. ByzFL's is 0.1.
        weights: the `a`, `[M]`, not negative, not all zero. Default: equal.
        start: from the weighted `"mean"`, or from the `"origin"`, the zero vector (ByzFL, with 3
            iterations).

    Raises:
        ValueError: an argument is out of range; at the merge: there are not M weights.

    Source: Pillutla et al. 2022, "Robust Aggregation for Federated Learning", algorithm 2 (RFA);
    Weiszfeld 1937.
    """
    _check_iterations(iterations)
    check_positive(nu, "nu")
    core.check_choice(start, "start", ("mean", "origin"))
    core.check_weights(weights, signed=False)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        given = core.per_model(weights, leaves.num_models)
        # Seen from one of the models in the middle, so that neither what all the models share nor
        # a faulty one that is far away costs digits of the distances that matter.
        distances = geometry.squared_distances(leaves)
        centre = jnp.argmin(jnp.median(distances, axis=1))
        gram = geometry.inner_products(leaves.map(lambda name, stacked: stacked - stacked[centre]))
        finite = jnp.isfinite(distances[centre])
        given = jnp.where(finite, given, 0)
        if start == "mean":
            return {"weights": geometry.weiszfeld(gram, given, iterations, nu)}
        square = jnp.where(finite, jnp.diag(geometry.inner_products(leaves)), 1)
        first = given / jnp.sqrt(jnp.maximum(square, nu**2))
        return {"weights": geometry.weiszfeld(gram, given, iterations - 1, nu, first)}

    return core.MergeMethod(measure, geometry.combine_weights)


def centered_clipping(radius: ArrayLike, iterations: int = 1) -> core.MergeMethod:
    """The mean of the models, each clipped to a ball around the base.

    From `v = base`, `v <- v + mean_m (theta_m - v) min(1, radius / |theta_m - v|)`. Without a base
    it starts from the zero vector, which is right for gradients and task vectors (ByzFL). The plan
    holds the weights `[M]` of the task vectors.

    Args:
        radius: tau, above 0; may be traced.
        iterations: at least 1.

    Raises:
        ValueError: an argument is out of range.

    Source: Karimireddy et al. 2021, "Learning from History for Byzantine Robust Optimization",
    section 4; their centre is the aggregate of the round before.
    """
    _check_iterations(iterations)
    check_positive(radius, "radius")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        gram = geometry.inner_products(geometry.task_vectors(core.open_models(models, base)))
        return {"weights": geometry.clipping_weights(gram, radius, iterations)}

    return core.MergeMethod(measure, geometry.combine_task_vectors)


def _krum(
    name: str, num_byzantine: int, m: int | None, squared: bool, neighbours: int | None
) -> core.MergeMethod:
    def decide(distances: Array) -> Plan:
        num_models = len(distances)
        check_enough(num_models, num_byzantine, name, 2, 3)
        default = num_models - num_byzantine - 2
        nearest = default if neighbours is None else neighbours
        best = default if m is None else m
        _check_between(nearest, "neighbours", num_models - 1)
        _check_between(best, "m", num_models)
        scores = geometry.krum_scores(distances if squared else jnp.sqrt(distances), nearest)
        return {"scores": scores, "weights": geometry.mean_of_lowest(scores, best)}

    return _distance_rule(num_byzantine, decide)


def _coordinate_rule(
    name: str, num_byzantine: int, rule: Callable[[list[Array]], Array]
) -> core.MergeMethod:
    """A method that makes one value of the M values of an entry, given in ascending order."""
    check_faulty(num_byzantine)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        num_models = core.open_models(models, base).leaves.num_models
        check_enough(num_models, num_byzantine, name, 2, 1)
        return {}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(leaf: str, stacked: Array) -> Array:
            core.check_real(leaf, stacked.dtype, name)
            return rule(_sorted(stacked))

        opened = core.open_models(models, base)
        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine, entrywise=True)


def _distance_rule(num_byzantine: int, decide: Callable[[Array], Plan]) -> core.MergeMethod:
    """A method whose weights follow from the squared distances between the models."""
    check_faulty(num_byzantine)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        return decide(geometry.squared_distances(core.open_models(models, base).leaves))

    return core.MergeMethod(measure, geometry.combine_weights)


def _sorted(stacked: Array) -> list[Array]:
    """The values of every entry in ascending order; NaN counts as infinite."""
    rows = [jnp.where(jnp.isnan(row), jnp.inf, row) for row in stacked]
    if len(rows) > _MOST_IN_NETWORK:
        return list(jnp.sort(jnp.stack(rows), axis=0))
    # Minima and maxima of whole rows, which XLA fuses with what follows; its sort along an axis
    # takes over a hundred times as long.
    for i, j in _comparators(len(rows)):
        rows[i], rows[j] = jnp.minimum(rows[i], rows[j]), jnp.maximum(rows[i], rows[j])
    return rows


@functools.cache
def _comparators(size: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange for any size: Knuth, volume 3, algorithm 5.2.2 M."""
    pairs = []
    top = 1 << max((size - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1
    return pairs


def _mean(values: list[Array]) -> Array:
    return functools.reduce(jnp.add, values) / len(values)


def _middle(values: list[Array], even: str) -> Array:
    """The median of sorted values."""
    lower = values[(len(values) - 1) // 2]
    return lower if even == "lower" else (lower + values[len(values) // 2]) / 2


def _mean_around(centre: Array, values: list[Array], count: int) -> Array:
    """The mean of the `count` values closest to the centre, of sorted values."""
    # They are neighbours in the order: the lowest one gives way to the next above them for as long
    # as that is closer.
    gone = [high - centre < centre - low for low, high in zip(values, values[count:], strict=False)]
    kept = []
    for i, value in enumerate(values):
        kept.append(value if i < count else jnp.where(gone[i - count], value, 0))
        if i < len(gone):
            kept[i] = jnp.where(gone[i], 0, kept[i])
    return functools.reduce(jnp.add, kept) / count


def check_faulty(num_byzantine: int) -> None:
    """Raises a `ValueError` unless f is an integer of at least 0."""
    if isinstance(num_byzantine, bool) or not isinstance(num_byzantine, int | np.integer):
        raise ValueError(f"num_byzantine must be an integer, got {num_byzantine!r}")
    if num_byzantine < 0:
        raise ValueError(f"num_byzantine must be at least 0, got {num_byzantine}")


def _check_subsets(num_models: int, num_byzantine: int, name: str) -> None:
    check_enough(num_models, num_byzantine, name, 2, 1)
    if (count := math.comb(num_models, num_byzantine)) > _MOST_SUBSETS:
        raise ValueError(
            f"{name} tries every subset of n - f models, here {count} of them, and stops above "
            f"{_MOST_SUBSETS}; use multi_krum, or fewer models"
        )


def check_enough(num_models: int, num_byzantine: int, name: str, times: int, plus: int) -> None:
    """Raises a `ValueError` in the name of `name` unless n is at least `times` f + `plus`."""
    if num_models < times * num_byzantine + plus:
        raise ValueError(
            f"{name} needs n >= {times}f + {plus}: with f = {num_byzantine} faulty models at least "
            f"{times * num_byzantine + plus} models, got n = {num_models}; give more models or a "
            "smaller num_byzantine"
        )


def _check_between(value: int, name: str, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name} must lie between 1 and {most}, got {value}")


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def check_positive(value: ArrayLike, name: str) -> None:
    """Raises a `ValueError` unless a concrete number is finite and above 0."""
    core.check_number(value, name, 0.0)
    if not isinstance(value, jax.core.Tracer) and value == 0:
        raise ValueError(f"{name} must be above 0, got 0")
