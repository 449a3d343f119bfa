"""The geometry of M models, `[M, M]` numbers added up over leaves, and weights that follow from it.

What makes weights of distances or inner products are pure functions of small arrays, which run
under `jit` and `vmap`; any other aggregation can call them.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core
from mixlab.types import Array, ArrayLike, Plan, PyTree


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
    """Sums over the models, `[M]` and `[M, ...]` to `[...]`.

    A model without weight is left out, even where it is not finite.
    """
    weights = weights.astype(stacked.dtype)
    # Term by term, which XLA fuses with the stacking and the choice.
    terms = [jnp.where(w != 0, x, 0) * w for w, x in zip(weights, stacked, strict=True)]
    return functools.reduce(jnp.add, terms)


def krum_scores(distances: Array, neighbours: int) -> Array:
    """Of distances `[M, M]`, each model's sum over its nearest `neighbours` others, `[M]`."""
    return jnp.sum(jnp.sort(distances, axis=1)[:, 1 : neighbours + 1], axis=1)


def mean_of_lowest(scores: Array, m: int) -> Array:
    """The weights `[M]` that average the m models of lowest score, the earlier ones of equals."""
    return jnp.zeros_like(scores).at[jnp.argsort(scores)[:m]].set(1 / m)


def bulyan_picks(distances: Array, num_byzantine: int) -> Array:
    """Of squared distances `[M, M]`, what Krum picks one by one, as one-hot rows `[M - 2f, M]`."""
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


def nearest_weights(distances: Array, count: int) -> Array:
    """The weights `[M, M]` that average, for each model, the `count` nearest, itself among them.

    Models that are not finite come last, and so have no part where there are enough others.
    """
    largest = jnp.finfo(distances.dtype).max
    ranked = jnp.where(_finite(distances), jnp.minimum(distances, largest), jnp.inf)
    rows = jnp.argsort(ranked, axis=1, stable=True)[:, :count]
    every = jnp.arange(len(distances))[:, None]
    return jnp.zeros_like(distances).at[every, rows].set(1 / count)


def mda_weights(distances: Array, num_byzantine: int) -> Array:
    """The weights `[M]` that average the n - f models of the least largest distance."""
    return _best_subset(distances, num_byzantine, jnp.max)


def smea_weights(distances: Array, num_byzantine: int) -> Array:
    """The weights `[M]` that average the n - f models that vary least in the worst direction.

    Args:
        distances: squared, `[M, M]`.
        num_byzantine: f.
    """

    def variance(among: Array) -> Array:
        weights = jnp.full(len(among), 1 / len(among), among.dtype)
        largest = jnp.max(among)
        scale = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
        unit = _centred(jnp.where(jnp.isfinite(among), among / scale, 0), weights)
        return jnp.where(jnp.isfinite(largest), jnp.linalg.eigvalsh(unit)[-1] * scale, jnp.inf)

    return _best_subset(distances, num_byzantine, variance)


def caf_weights(distances: Array, num_byzantine: int) -> Array:
    """The weights `[M]`, of sum one, of the covariance-bound agnostic filter.

    Args:
        distances: squared, `[M, M]`.
        num_byzantine: f.
    """
    num_models = len(distances)
    finite = _finite(distances)
    distances = _without(~finite, distances)

    def step(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        counts, best, variance = state
        weights = counts / jnp.maximum(jnp.sum(counts), 1e-6)
        gram = _centred(distances, weights)
        root = jnp.sqrt(weights)
        # The covariance of the models has the eigenvalues of this matrix, and its eigenvectors are
        # mixtures of the models by these.
        values, vectors = jnp.linalg.eigh(root[:, None] * gram * root)
        running = jnp.sum(counts) > num_models - 2 * num_byzantine
        better = running & (values[-1] < variance)
        along = jnp.square(jnp.matmul(gram, root * vectors[:, -1], precision="highest"))
        along = jnp.where(counts > 0, along, 0)
        farthest = jnp.max(along)
        left = counts * jnp.maximum(1 - along / jnp.where(farthest > 0, farthest, 1), 0)
        return (
            jnp.where(running, left, counts),
            jnp.where(better, weights, best),
            jnp.where(better, values[-1], variance),
        )

    # Every step takes the last weight of a model, so that there are no more than 2f of them.
    counts = finite.astype(distances.dtype)
    start = (counts, counts / jnp.maximum(jnp.sum(counts), 1), jnp.asarray(jnp.inf, counts.dtype))
    return jax.lax.fori_loop(0, 2 * num_byzantine, step, start)[1]


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


def combine_weights(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
    """The sum of the models weighted by `plan["weights"]`."""
    opened = core.open_models(models, base)
    return opened.write(opened.leaves.map(lambda _, x: mixture(plan["weights"], x)).read)


def garfield_picks(distances: Array, num_byzantine: int) -> Array:
    """Of distances `[M, M]`, the rows of weights `[M - 2f - 2, M]` that Garfield's Bulyan picks."""
    num_models = len(distances)
    order = jnp.argsort(krum_scores(distances, num_models - num_byzantine - 2))
    picks = np.zeros((num_models - 2 * num_byzantine - 2, num_models))
    for i, pick in enumerate(picks):
        size = num_models - num_byzantine - 2 - i
        pick[i : i + size] = 1 / size
    return jnp.zeros(picks.shape, distances.dtype).at[:, order].set(picks)


def _best_subset(distances: Array, num_byzantine: int, spread: Callable[[Array], Array]) -> Array:
    """The weights `[M]` that average the n - f models of least `spread` of their distances."""
    num_models = len(distances)
    size = num_models - num_byzantine
    subsets = np.array(list(itertools.combinations(range(num_models), size)), np.int32)

    def of(subset: Array) -> Array:
        return spread(distances[subset][:, subset])

    spreads = jax.lax.map(of, jnp.asarray(subsets), batch_size=min(len(subsets), 1024))
    chosen = jnp.asarray(subsets)[jnp.argmin(spreads)]
    return jnp.zeros(num_models, distances.dtype).at[chosen].set(1 / size)


def _finite(distances: Array) -> Array:
    """Which models are finite, `[M]`: those at a finite distance from the one in the middle."""
    return jnp.isfinite(distances[jnp.argmin(jnp.median(distances, axis=1))])


def _centred(distances: Array, weights: Array) -> Array:
    """The Gram matrix around the weighted mean, of squared distances; `weights` have sum one."""
    to_mean = jnp.matmul(distances, weights, precision="highest")
    of_mean = jnp.vdot(weights, to_mean, precision="highest")
    return (to_mean[:, None] + to_mean - of_mean - distances) / 2


def _squares_around(gram: Array, w: Array) -> Array:
    """The squared distances `[M]` of the points from `sum_m w_m x_m`."""
    along = jnp.matmul(gram, w, precision="highest")
    return jnp.diag(gram) - 2 * along + jnp.vdot(w, along, precision="highest")


def _without(gone: Array, gram: Array) -> Array:
    return jnp.where(gone[:, None] | gone, 0, gram)


@functools.partial(jax.jit, inline=True)
def _between(rows: Array) -> Array:
    return jax.lax.map(lambda row: jnp.sum(jnp.square(rows - row), axis=1), rows)


def _rows(stacked: Array) -> Array:
    """The models as rows of real numbers."""
    rows = stacked.reshape(stacked.shape[0], -1)
    if jnp.iscomplexobj(rows):
        rows = jnp.concatenate([rows.real, rows.imag], axis=1)
    return rows
