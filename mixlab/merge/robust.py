"""Robust aggregation: merges that a few faulty models cannot move far.

Two families. Coordinate rules (`median`, `trimmed_mean`, `phocas`, `meamed`, the second half of
`bulyan`) look at the M values of each entry. The others weigh whole models by the geometry between
them, of which they need no more than the squared distances or a Gram matrix, `[M, M]`, added up
over leaves; what makes weights of these are pure functions that any other aggregation can call.

The faulty models may hold anything. An entry that is NaN counts as a very large one, and a model
that is not finite is infinitely far from all others and gets no weight.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_MOST_SUBSETS = 100_000


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

    def rule(values: Array) -> Array:
        return jnp.mean(values[num_byzantine : len(values) - num_byzantine], axis=0)

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

    def rule(values: Array) -> Array:
        trimmed = jnp.mean(values[num_byzantine : len(values) - num_byzantine], axis=0)
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

    def rule(values: Array) -> Array:
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
    _check_faulty(num_byzantine)
    garfield = variant == "garfield"

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        _check_enough(leaves.num_models, num_byzantine, "bulyan", 4, 3)
        distances = squared_distances(leaves)
        if garfield:
            return {"picks": _garfield_picks(jnp.sqrt(distances), num_byzantine)}
        return {"picks": bulyan_picks(distances, num_byzantine)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, stacked: Array) -> Array:
            core.check_real(name, stacked.dtype, "bulyan")
            values = _sorted(mixture(plan["picks"], stacked))
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
        num_models = len(distances)
        _check_enough(num_models, num_byzantine, "mda", 2, 1)
        if (count := math.comb(num_models, num_byzantine)) > _MOST_SUBSETS:
            raise ValueError(
                f"mda tries every subset of n - f models, here {count} of them, and stops above "
                f"{_MOST_SUBSETS}; use multi_krum, or fewer models"
            )
        return {"weights": mda_weights(distances, num_byzantine)}

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
    _check_positive(nu, "nu")
    core.check_choice(start, "start", ("mean", "origin"))
    core.check_weights(weights, signed=False)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        given = core.per_model(weights, leaves.num_models)
        # Seen from one of the models in the middle, so that neither what all the models share nor
        # a faulty one that is far away costs digits of the distances that matter.
        distances = squared_distances(leaves)
        centre = jnp.argmin(jnp.median(distances, axis=1))
        gram = inner_products(leaves.map(lambda name, stacked: stacked - stacked[centre]))
        finite = jnp.isfinite(distances[centre])
        given = jnp.where(finite, given, 0)
        first = None
        if start == "origin":
            square = jnp.diag(inner_products(leaves))
            first = given / jnp.sqrt(jnp.maximum(jnp.where(finite, square, 1), nu**2))
        return {"weights": weiszfeld(gram, given, iterations - (first is not None), nu, first)}

    return core.MergeMethod(measure, _combine)


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
    _check_positive(radius, "radius")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        gram = inner_products(task_vectors(core.open_models(models, base)))
        return {"weights": clipping_weights(gram, radius, iterations)}

    return core.MergeMethod(measure, combine_task_vectors)


def task_vectors(opened: core.Models) -> core.Leaves:
    """The models seen from the base, or from zero where there is no base."""
    bases = opened.base
    if bases is None:
        return opened.leaves
    return opened.leaves.map(lambda name, stacked: stacked - bases.read(name))


def combine_task_vectors(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
    """The base, if there is one, plus the task vectors weighted by `plan["weights"]`."""
    opened = core.open_models(models, base)
    taus = task_vectors(opened)

    def merge(name: str) -> Array:
        merged = mixture(plan["weights"], taus.read(name))
        return merged if opened.base is None else opened.base.read(name) + merged

    return opened.write(merge)


def squared_distances(leaves: core.Leaves) -> Array:
    """The squared distances between the models, `[M, M]`; infinite where one is not finite.

    They are sums of squared differences, not differences of squared norms, which would leave
    nothing of the distance between models that are large and alike.
    """
    num_models = leaves.num_models
    zero = jnp.zeros((num_models, num_models), float)
    total = leaves.total(lambda name, stacked: _between(_rows(stacked)).astype(float), zero)
    return jnp.where(jnp.isfinite(total), total, jnp.inf)


def inner_products(leaves: core.Leaves) -> Array:
    """The Gram matrix of the models, `[M, M]`; rows and columns of those not finite are NaN."""

    def products(name: str, stacked: Array) -> Array:
        rows = _rows(stacked)
        return jnp.matmul(rows, rows.T, precision="highest").astype(float)

    return leaves.total(products, jnp.zeros((leaves.num_models, leaves.num_models), float))


def mixture(weights: Array, stacked: Array) -> Array:
    """Sums over the models, `[..., M]` and `[M, ...]` to `[...]`.

    A model whose weights are all zero is left out, even where it is not finite.
    """
    used = jnp.sum(jnp.abs(weights), axis=tuple(range(weights.ndim - 1)))
    kept = jnp.where(core.along_models(used, stacked) != 0, stacked, 0)
    return jnp.tensordot(weights.astype(stacked.dtype), kept, axes=1, precision="highest")


def krum_scores(distances: Array, neighbours: int) -> Array:
    """Of distances `[M, M]`, each model's sum over its nearest `neighbours` others, `[M]`."""
    return jnp.sum(jnp.sort(distances, axis=1)[:, 1 : neighbours + 1], axis=1)


def mean_of_lowest(scores: Array, m: int) -> Array:
    """The weights `[M]` that average the m models of lowest score, the earlier ones of equals."""
    return jnp.zeros_like(scores).at[jnp.argsort(scores)[:m]].set(1 / m)


def bulyan_picks(distances: Array, num_byzantine: int) -> Array:
    """The models that Krum picks one by one of squared distances `[M, M]`, one-hot `[M - 2f, M]`."""
    num_models = len(distances)

    def pick(left: Array, neighbours: Array) -> tuple[Array, Array]:
        among = jnp.sort(jnp.where(left, distances, jnp.inf), axis=1)
        scores = jnp.cumsum(among, axis=1)[:, neighbours]
        # A model that is not finite has a score like that of one that is gone: it comes first.
        scores = jnp.where(left, jnp.minimum(scores, jnp.finfo(scores.dtype).max), jnp.inf)
        chosen = jnp.arange(num_models) == jnp.argmin(scores)
        return left & ~chosen, chosen

    num_left = num_models - np.arange(num_models - 2 * num_byzantine)
    neighbours = np.maximum(num_left - num_byzantine - 2, 1)
    _, picks = jax.lax.scan(pick, jnp.ones(num_models, bool), jnp.asarray(neighbours))
    return picks.astype(distances.dtype)


def mda_weights(distances: Array, num_byzantine: int) -> Array:
    """The weights `[M]` that average the n - f models of the least largest distance."""
    num_models = len(distances)
    size = num_models - num_byzantine
    subsets = np.array(list(itertools.combinations(range(num_models), size)), np.int32)

    def diameter(subset: Array) -> Array:
        return jnp.max(distances[subset][:, subset])

    diameters = jax.lax.map(diameter, jnp.asarray(subsets), batch_size=min(len(subsets), 1024))
    chosen = jnp.asarray(subsets)[jnp.argmin(diameters)]
    return jnp.zeros(num_models, distances.dtype).at[chosen].set(1 / size)


def weiszfeld(
    gram: Array, given: Array, iterations: int, nu: float, first: Array | None = None
) -> Array:
    """The weights `[M]`, of sum one, of the smoothed geometric median.

    Args:
        gram: inner products `[M, M]` of the points; those of points without weight do not count.
        given: `[M]`, what each point counts for.
        iterations: how many.
        nu: the least that a distance counts as.
        first: the weights to begin with, up to a factor; by default `given`.
    """
    gram = _without(given == 0, gram)

    def step(_: int, w: Array) -> Array:
        b = given / jnp.sqrt(jnp.maximum(_squares_around(gram, w), nu**2))
        return b / jnp.sum(b)

    start = given if first is None else first
    return jax.lax.fori_loop(0, iterations, step, start / jnp.sum(start))


def clipping_weights(gram: Array, radius: ArrayLike, iterations: int) -> Array:
    """The weights `[M]`, of sum at most one, of centred clipping around the origin of `gram`."""
    finite = jnp.isfinite(jnp.diag(gram))
    gram = _without(~finite, gram)
    tau = jnp.asarray(radius, gram.dtype)

    def step(_: int, w: Array) -> Array:
        factors = tau / jnp.sqrt(jnp.maximum(_squares_around(gram, w), tau**2))
        shares = jnp.where(finite, factors, 0) / len(w)
        return w * (1 - jnp.sum(shares)) + shares

    return jax.lax.fori_loop(0, iterations, step, jnp.zeros_like(gram[0]))


def _squares_around(gram: Array, w: Array) -> Array:
    """The squared distances `[M]` of the points from `sum_m w_m x_m`."""
    along = jnp.matmul(gram, w, precision="highest")
    return jnp.diag(gram) - 2 * along + jnp.vdot(w, along, precision="highest")


def _without(gone: Array, gram: Array) -> Array:
    return jnp.where(gone[:, None] | gone, 0, gram)


def _krum(
    name: str, num_byzantine: int, m: int | None, squared: bool, neighbours: int | None
) -> core.MergeMethod:
    def decide(distances: Array) -> Plan:
        num_models = len(distances)
        _check_enough(num_models, num_byzantine, name, 2, 3)
        default = num_models - num_byzantine - 2
        nearest = default if neighbours is None else neighbours
        best = default if m is None else m
        _check_between(nearest, "neighbours", num_models - 1)
        _check_between(best, "m", num_models)
        scores = krum_scores(distances if squared else jnp.sqrt(distances), nearest)
        return {"scores": scores, "weights": mean_of_lowest(scores, best)}

    return _distance_rule(num_byzantine, decide)


def _garfield_picks(distances: Array, num_byzantine: int) -> Array:
    num_models = len(distances)
    order = jnp.argsort(krum_scores(distances, num_models - num_byzantine - 2))
    picks = np.zeros((num_models - 2 * num_byzantine - 2, num_models))
    for i, pick in enumerate(picks):
        size = num_models - num_byzantine - 2 - i
        pick[i : i + size] = 1 / size
    return jnp.zeros(picks.shape, distances.dtype).at[:, order].set(picks)


def _coordinate_rule(name: str, num_byzantine: int, rule) -> core.MergeMethod:  # noqa: ANN001
    """A method that makes one value of the M values of an entry, given in ascending order."""
    _check_faulty(num_byzantine)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        num_models = core.open_models(models, base).leaves.num_models
        _check_enough(num_models, num_byzantine, name, 2, 1)
        return {}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(leaf: str, stacked: Array) -> Array:
            core.check_real(leaf, stacked.dtype, name)
            return rule(_sorted(stacked))

        opened = core.open_models(models, base)
        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def _distance_rule(num_byzantine: int, decide) -> core.MergeMethod:  # noqa: ANN001
    """A method whose weights follow from the squared distances between the models."""
    _check_faulty(num_byzantine)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        return decide(squared_distances(core.open_models(models, base).leaves))

    return core.MergeMethod(measure, _combine)


def _combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
    opened = core.open_models(models, base)
    return opened.write(opened.leaves.map(lambda _, x: mixture(plan["weights"], x)).read)


@functools.partial(jax.jit, inline=True)
def _between(rows: Array) -> Array:
    return jax.lax.map(lambda row: jnp.sum(jnp.square(rows - row), axis=1), rows)


def _rows(stacked: Array) -> Array:
    """The models as rows of real numbers."""
    rows = stacked.reshape(stacked.shape[0], -1)
    if jnp.iscomplexobj(rows):
        rows = jnp.concatenate([rows.real, rows.imag], axis=1)
    return rows


def _sorted(stacked: Array) -> Array:
    return jnp.sort(jnp.where(jnp.isnan(stacked), jnp.inf, stacked), axis=0)


def _middle(values: Array, even: str) -> Array:
    """The median of sorted values `[M, ...]`."""
    lower = values[(len(values) - 1) // 2]
    return lower if even == "lower" else (lower + values[len(values) // 2]) / 2


def _mean_around(centre: Array, values: Array, count: int) -> Array:
    """The mean of the `count` values closest to the centre, of sorted values `[M, ...]`."""
    # They are neighbours in the order: the lowest one gives way to the next above them for as long
    # as that is closer.
    drop = values[count:] - centre < centre - values[: len(values) - count]
    none = jnp.zeros_like(values[:count], bool)
    keep = ~jnp.concatenate([drop, none]) & jnp.concatenate([~none, drop])
    return jnp.sum(jnp.where(keep, values, 0), axis=0) / count


def _check_faulty(num_byzantine: int) -> None:
    if isinstance(num_byzantine, bool) or not isinstance(num_byzantine, int | np.integer):
        raise ValueError(f"num_byzantine must be an integer, got {num_byzantine!r}")
    if num_byzantine < 0:
        raise ValueError(f"num_byzantine must be at least 0, got {num_byzantine}")


def _check_enough(num_models: int, num_byzantine: int, name: str, times: int, plus: int) -> None:
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


def _check_positive(value: ArrayLike, name: str) -> None:
    core.check_finite(value, name, 0.0)
    if not isinstance(value, jax.core.Tracer) and value == 0:
        raise ValueError(f"{name} must be above 0, got 0")
