"""Merging by the singular values of task vectors.

A leaf of rank 2 is a matrix as it lies, `[in, out]` for a dense kernel of Flax. The methods are
made of two functions of matrices, both of which are the same whatever signs and rotations the
decomposition happens to return: a truncated decomposition, and the polar factor `U V^T`. Where a
matrix lacks rank, its null directions stay zero; codes that take them from a decomposition get
arbitrary vectors there, so only there do results differ.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core, patterns
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


def iso_c(
    scale: ArrayLike = 1.0, *, exclude: str | Sequence[str] = (), fold: bool = False
) -> core.MergeMethod:
    """Isotropic merging in the common subspace: the sum of task vectors with equal singular values.

    With `sum_m tau_m = U S V^T`, a matrix becomes `theta_base + scale * mean(S) * U V^T`. All
    other leaves become `theta_base + scale * mean_m tau_m`, which is a sum for matrices and a
    mean elsewhere, as in FusionBench.

    Args:
        scale: alpha, a number; may be traced.
        exclude: a pattern of leaf names, or several (`patterns.spread`); matrices that match one
            are averaged too.
        fold: treat leaves of higher rank, such as convolution kernels `[H, W, in, out]`, as
            matrices `[H * W * in, out]` too, instead of averaging them.

    Raises:
        ValueError: scale is not finite, or there is no base.
        TypeError: a leaf is complex.

    Source: Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and
    Task-Specific Subspaces", algorithm 1.
    """

    def merge(taus: Array) -> Array:
        total = jnp.sum(taus, axis=0)
        factor = polar(total)
        # The inner product with the polar factor is the sum of the singular values.
        return factor * (jnp.sum(factor * total) / min(total.shape))

    return _method("iso_c", merge, scale, None, exclude, fold)


def iso_cts(
    scale: ArrayLike = 1.0,
    common_space_fraction: float = 0.8,
    *,
    exclude: str | Sequence[str] = (),
    fold: bool = False,
) -> core.MergeMethod:
    """Isotropic merging in common and task-specific subspaces.

    Of the `r = min(in, out)` directions of a matrix, some are the leading singular vectors of
    the sum of task vectors, and each model adds the leading `k` of what these leave of its task
    vector, `tau_m - U_c U_c^T tau_m`. All the left and all the right vectors are orthogonalised,
    and every direction gets the mean of the collected singular values. With `c = int(r fraction)`,
    `k = round((r - c) / M)`, and the common space has what is left. Other leaves become
    `theta_base + scale * mean_m tau_m`. Equals FusionBench.

    Args:
        scale: alpha, a number; may be traced.
        common_space_fraction: in [0, 1].
        exclude: as in `iso_c`.
        fold: as in `iso_c`.

    Raises:
        ValueError: an argument is out of range, or there is no base.
        TypeError: a leaf is complex.

    Source: Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and
    Task-Specific Subspaces", algorithm 2.
    """
    core.check_number(common_space_fraction, "common_space_fraction", 0.0, 1.0)

    def merge(taus: Array) -> Array:
        num_models, rank = len(taus), min(taus.shape[1:])
        common = int(rank * common_space_fraction)
        each = min(round((rank - common) / num_models), rank // num_models)
        common = rank - each * num_models
        u, s, vt = svd(jnp.sum(taus, axis=0), common)
        outside = taus - matmul(u, matmul(u.T, taus))
        # What is left of a task vector within the common space is rounding.
        of_models = svd(outside, each, jnp.sqrt(jnp.sum(jnp.square(taus), axis=(1, 2))))
        lefts, rights = _side_by_side(of_models[0]), of_models[2].reshape(-1, taus.shape[2])
        mean = (jnp.sum(s) + jnp.sum(of_models[1])) / rank
        left = polar(jnp.concatenate([u, lefts], axis=1))
        right = polar(jnp.concatenate([vt, rights]))
        return mean * matmul(left, right)

    return _method("iso_cts", merge, scale, None, exclude, fold)


def tsv(
    scale: ArrayLike = 1.0,
    *,
    density: float | None = None,
    weights: ArrayLike | None = None,
    exclude: str | Sequence[str] = (),
    fold: bool = False,
) -> core.MergeMethod:
    """Task singular vectors merging (TSV-M): compress each task vector, then decorrelate them.

    Of each task vector, a matrix, the `k` largest singular triples are kept. The left singular
    vectors of all models, side by side, are replaced by the nearest orthonormal ones (their polar
    factor), and so are the right ones; with the singular values between them they give the
    merged task vector. Other leaves become the mean of the task vectors. Equals FusionBench,
    which keeps nothing of a matrix with `min(in, out) < M` where here one triple stays.

    Args:
        scale: alpha, a number; may be traced.
        density: fraction of the `min(in, out)` triples to keep, in (0, 1]; at least one is kept.
            Default: `1 / M`, so that the models fill the space; 1 is the authors' lossless form.
        weights: `[M]`; multiply the task vectors beforehand (FusionBench's list of alphas).
            Default: ones.
        exclude: as in `iso_c`; the authors exclude `"*text_projection*"`.
        fold: as in `iso_c`.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base.
        TypeError: a leaf is complex.

    Source: Gargiulo et al. 2025, "Task Singular Vectors: Reducing Task Interference in Model
    Merging", algorithm 1.
    """
    if density is not None:
        core.check_number(density, "density", 0.0, 1.0)
        if density == 0:
            raise ValueError("density is the fraction to keep and must be above 0, got 0")

    def merge(taus: Array) -> Array:
        rank = min(taus.shape[1:])
        kept = max(1, rank // len(taus) if density is None else int(density * rank))
        u, s, vt = svd(taus, kept)
        left, right = polar(_side_by_side(u)), polar(vt.reshape(-1, taus.shape[2]))
        return matmul(left * s.reshape(-1), right)

    return _method("tsv", merge, scale, weights, exclude, fold)


def svd(matrices: Array, rank: int, size: ArrayLike = 0.0) -> tuple[Array, Array, Array]:
    """The largest singular triples of matrices; null directions are zero.

    Args:
        matrices: `[..., m, n]`, not empty.
        rank: how many to keep, up to `min(m, n)`.
        size: `[...]`, the norm of what the matrices were computed from, where that is larger.

    Returns:
        `U [..., m, rank]`, `S [..., rank]`, `V^T [..., rank, n]`. Vectors of singular values that
        are zero to within rounding, of the largest or of `size`, are zeros.

    Gradients are finite: of singular values that coincide, the part that would turn their vectors
    into each other is left out.
    """
    # The size only tells what is zero, so that it has no gradient.
    u, s, vt = _svd(matrices, jax.lax.stop_gradient(jnp.asarray(size, matrices.dtype)))
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


@jax.custom_jvp
def polar(matrix: Array) -> Array:
    """The polar factor `U V^T` of a matrix `[m, n]`, the nearest one with singular values 1.

    Null directions stay zero. The gradient is exact while the rank stays the same, equal singular
    values included, and finite always.
    """
    u, _, vt = svd(matrix, min(matrix.shape))
    return matmul(u, vt)


@polar.defjvp
def _polar_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrix,), (moved,) = primals, tangents
    u, s, vt = svd(matrix, min(matrix.shape))
    factor = matmul(u, vt)
    inner = matmul(u.T, matmul(moved, vt.T))
    turn = (inner - inner.T) * _inverse(s[:, None] + s)
    over = vt.T * _inverse(s)
    out = matmul(moved, over) - matmul(u, matmul(u.T, matmul(moved, over)))
    across = matmul(u * _inverse(s), matmul(u.T, moved))
    beside = across - matmul(matmul(across, vt.T), vt)
    return factor, matmul(matmul(u, turn), vt) + matmul(out, vt) + beside


@jax.custom_jvp
def _svd(matrices: Array, size: Array) -> tuple[Array, Array, Array]:
    u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    eps = float(jnp.finfo(s.dtype).eps) * max(matrices.shape[-2:])
    negligible = s <= eps * jnp.maximum(s[..., :1], size[..., None])  # never what is not a number
    s = jnp.where(negligible, 0, s)
    has_direction = ~negligible
    u = jnp.where(has_direction[..., None, :], u, 0)
    return u, s, jnp.where(has_direction[..., None], vt, 0)


@_svd.defjvp
def _svd_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple, tuple]:
    (matrices, size), (moved, _) = primals, tangents
    u, s, vt = _svd(matrices, size)
    ut, v = jnp.matrix_transpose(u), jnp.matrix_transpose(vt)
    inner = matmul(ut, matmul(moved, v))
    innert = jnp.matrix_transpose(inner)
    row, column = s[..., :, None], s[..., None, :]
    gap = (column - row) * (column + row)
    # Singular values closer than rounding count as equal.
    is_apart = jnp.abs(gap) > 4 * float(jnp.finfo(s.dtype).eps) * jnp.square(s[..., :1, None])
    turn = jnp.where(is_apart, _inverse(jnp.where(is_apart, gap, 0)), 0)
    du = matmul(u, turn * (inner * column + row * innert))
    dv = matmul(v, turn * (row * inner + innert * column))
    over = matmul(moved, v) * _inverse(column)
    across = matmul(jnp.matrix_transpose(moved), u) * _inverse(column)
    du = du + over - matmul(u, matmul(ut, over))
    dv = dv + across - matmul(v, matmul(vt, across))
    ds = jnp.diagonal(inner, axis1=-2, axis2=-1)
    return (u, s, vt), (du, ds, jnp.matrix_transpose(dv))


def is_matrix(
    name: str, shape: tuple[int, ...], is_excluded: Callable[[str], bool], fold: bool
) -> bool:
    """Whether a leaf is decomposed: not empty, of rank 2 (or more, with `fold`), not excluded."""
    if 0 in shape or (len(shape) != 2 and not (fold and len(shape) > 2)):
        return False
    return not is_excluded(name)


def _method(
    what: str,
    merge: Callable[[Array], Array],
    scale: ArrayLike,
    weights: ArrayLike | None,
    exclude: str | Sequence[str],
    fold: bool,
) -> core.MergeMethod:
    """Base plus scaled `merge` of the matrices `[M, m, n]`, and mean of the other task vectors."""
    core.check_number(scale, "scale")
    core.check_weights(weights, signed=True)
    is_excluded = patterns.any_of(exclude)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        opened = core.open_models(models, base)
        core.with_base(opened, what)
        shares = core.per_model(weights, opened.leaves.num_models)
        return {"scale": jnp.asarray(scale, float), "weights": shares}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, what)

        def merge_leaf(name: str, stacked: Array) -> Array:
            core.check_real(name, stacked.dtype, what)
            origin = bases.read(name)
            taus = (stacked - origin) * core.along_models(plan["weights"], stacked)
            if is_matrix(name, origin.shape, is_excluded, fold):
                matrices = taus.reshape(len(taus), int(np.prod(origin.shape[:-1])), -1)
                delta = merge(matrices).reshape(origin.shape)
            else:
                delta = jnp.mean(taus, axis=0)
            return origin + plan["scale"].astype(delta.dtype) * delta

        return opened.write(opened.leaves.map(merge_leaf).read)

    return core.MergeMethod(measure, combine)


def matmul(a: Array, b: Array) -> Array:
    """The matrix product, in the precision of its factors on every device."""
    # "highest" because accelerators would otherwise round the factors to bfloat16 or TF32.
    return jnp.matmul(a, b, precision="highest")


def _inverse(x: Array) -> Array:
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


def _side_by_side(lefts: Array) -> Array:
    """`[M, m, k]` to `[m, M k]`."""
    return jnp.swapaxes(lefts, 0, 1).reshape(lefts.shape[1], -1)
