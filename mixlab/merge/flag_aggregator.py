"""The Flag Aggregator: the part of the models that lies in a subspace most of them agree on."""

import jax
import jax.numpy as jnp

from mixlab.merge import core, geometry
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_EPS = 1e-7
_STOP = 1e-10


def flag(
    rank: int, iterations: int = 1, *, lam: ArrayLike = 0.0, keep_magnitude: bool = True
) -> core.MergeMethod:
    """Projects the task vectors on the subspace that is closest to their directions, and averages.

    With the directions `g_m = tau_m / |tau_m|`, the subspace Y of orthonormal columns minimises
    `sum_m sqrt(1 - |Y^T g_m|^2)`, and with `lam` above 0 also the same of all differences
    `g_i - g_j`, both ways, each weighted by `(lam / (M (M - 1)))^2`: as in the authors' code,
    `lam / (M (M - 1))` is the factor of the columns that are decomposed. It is found by iteratively
    reweighted singular value decompositions; one after the first that does not lower the sum over
    models is not taken, and ends the search. The merged model is `base + mean_m Y Y^T tau_m`.

    Everything happens in the span of the models, so `measure` adds up one Gram matrix `[M, M]`.
    Directions that make out less than a part in 10^6 of the models' squares are lost to rounding:
    give the base of fine-tuned models. Without a base the models themselves are projected, as
    gradients are. The gradient of the merge takes the subspace as given.

    By default the first iteration weighs all models alike; the authors' code starts from a random
    subspace, which in many dimensions comes to the same. One more input, `start=`, chooses it: a
    list of trees like the models, or one stacked tree, that are the orthonormal columns.

    The plan holds the weights `[M]` of the task vectors, and `explained`, the share `[M]` of each
    model's square that lies in the subspace.

    Args:
        rank: the dimension of the subspace, 1 to M.
        iterations: at least 1. The authors' code takes 1.
        lam: of the pairwise terms, see above, at least 0; may be traced.
        keep_magnitude: False gives `sum_m Y Y^T g_m / rank` beyond the base, which forgets how
            long the task vectors are (the authors' code).

    Raises:
        ValueError: an argument is out of range; at the merge: there are fewer models than `rank`,
            or `start` does not match the models.
        TypeError: a leaf is complex.

    Source: Almasi et al. 2024, "Flag Aggregator: Scalable Distributed Training under Failures and
    Augmented Losses using Convex Optimization", sections 2.2 and 2.3; iteration and stopping are
    those of the authors' code.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    core.check_number(lam, "lam", 0.0)

    def measure(
        models: PyTree,
        base: PyTree | None = None,
        key: Key | None = None,
        *,
        start: PyTree | None = None,
    ) -> Plan:
        taus = geometry.task_vectors(core.open_models(models, base))
        if taus.num_models < rank:
            raise ValueError(f"rank must be at most the number of models, {taus.num_models}")
        for name, spec in taus.specs.items():
            core.check_real(name, spec.dtype, "flag")
        gram = geometry.inner_products(taus)
        shadows = jnp.zeros((rank, taus.num_models), gram.dtype)
        if start is not None:
            shadows = _shadows(start, taus, rank)
        gram, shadows = jax.lax.stop_gradient((gram, shadows))
        return flag_weights(gram, shadows, iterations, lam, keep_magnitude)

    return core.MergeMethod(measure, geometry.combine_task_vectors)


def flag_weights(
    gram: Array, shadows: Array, iterations: ArrayLike, lam: ArrayLike, keep_magnitude: bool
) -> Plan:
    """The weights `[M]` of the task vectors, and the explained shares.

    Args:
        gram: inner products of the task vectors, `[M, M]`.
        shadows: their inner products with the columns to start from, `[rank, M]`.
        iterations: how many; may be traced.
        lam: weight of the pairwise terms.
        keep_magnitude: as in `flag`.
    """
    rank, num_models = shadows.shape
    tiny = num_models * jnp.finfo(gram.dtype).eps
    squares = jnp.diag(gram)
    valid = jnp.isfinite(squares) & (squares > 0)
    norms = jnp.sqrt(jnp.where(valid, squares, 1))
    unit = jnp.where(valid[:, None] & valid, gram / norms[:, None] / norms, 0)
    # Coordinates of the directions in an orthonormal basis of their span: column m is g_m.
    values, vectors = jnp.linalg.eigh(unit)
    points = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    per_pair = jnp.asarray(lam, gram.dtype) / max(num_models * (num_models - 1), 1)

    def weight(shadows: Array) -> Array:
        """The squared weight of what casts the shadows `[rank, ...]` on the subspace."""
        return 1 / jnp.sqrt(jnp.abs(1 - jnp.sum(jnp.square(shadows), axis=0)) + _EPS)

    def objective(shadows: Array) -> Array:
        return jnp.sum(jnp.sqrt(jnp.maximum(1 - jnp.sum(jnp.square(shadows), axis=0), 0)))

    def fit(shadows: Array) -> tuple[Array, Array]:
        # The singular vectors of [w_m g_m, ..., w_ij (g_i - g_j), ...], from its square.
        pairs = 2 * jnp.square(per_pair) * weight(shadows[:, :, None] - shadows[:, None])
        laplacian = jnp.diag(jnp.sum(pairs, axis=1)) - pairs
        mixing = (jnp.diag(weight(shadows)) + laplacian) @ points.T
        values, vectors = jnp.linalg.eigh(points @ mixing)
        top, columns = values[-rank:], vectors[:, -rank:]
        # Where the directions span less than the rank, the further columns explain nothing.
        inverse = jnp.where(top > tiny * top[-1], 1 / top, 0)
        columns = jnp.where(inverse > 0, columns, 0)
        return columns.T @ points, mixing @ columns * inverse

    def step(_: int, state: tuple) -> tuple:
        shadows, basis, error, running = state
        new_shadows, new_basis = fit(shadows)
        new_error = objective(new_shadows)
        better = running & (new_error < error)
        running = better & (error - new_error > _STOP) & (new_error > _STOP)
        new = (new_shadows, new_basis, new_error)
        kept = [jnp.where(better, a, b) for a, b in zip(new, (shadows, basis, error), strict=True)]
        return (*kept, running)

    with jax.default_matmul_precision("highest"):
        shadows = jnp.where(valid, shadows / norms, 0)
        nothing = jnp.zeros((num_models, rank), gram.dtype)
        state = (shadows, nothing, jnp.asarray(jnp.inf, gram.dtype), jnp.asarray(True))
        shadows, basis, _, _ = jax.lax.fori_loop(0, iterations, step, state)
        given = jnp.where(valid, norms, 0) / num_models if keep_magnitude else 1 / rank
        weights = basis @ jnp.sum(shadows * given, axis=1) / norms
        # Not even the rounding of a zero may be left to what is not finite.
        weights = jnp.where(valid, weights, 0)
    return {"weights": weights, "explained": jnp.sum(jnp.square(shadows), axis=0)}


def _shadows(start: PyTree, taus: core.Leaves, rank: int) -> Array:
    """The inner products `[rank, M]` of the columns to start from with the task vectors."""
    columns = core.open_models(start).leaves
    if columns.num_models != rank:
        raise ValueError(f"start must be {rank} trees, one a column, got {columns.num_models}")
    if columns.specs.keys() != taus.specs.keys():
        raise ValueError(
            "start must have the floating leaves of the models; one of them has, the other has "
            f"not: {sorted(columns.specs.keys() ^ taus.specs.keys())}"
        )

    def products(name: str, stacked: Array) -> Array:
        if columns.specs[name].shape != taus.specs[name].shape:
            raise ValueError(
                f"leaf {name!r} of start must have the shape {list(taus.specs[name].shape)} of the "
                f"models, got {list(columns.specs[name].shape)}"
            )
        given = columns.read(name).reshape(rank, -1).astype(stacked.dtype)
        rows = stacked.reshape(taus.num_models, -1)
        return jnp.matmul(given, rows.T, precision="highest").astype(float)

    return taus.total(products, jnp.zeros((rank, taus.num_models), float))
