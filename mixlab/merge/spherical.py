"""Interpolation along great circles, and means on the sphere.

Each leaf is a vector with a norm and a direction; the methods differ in what they do with the
directions. All of them give a combination of the models, so that a plan holds one coefficient a
model and leaf.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixlab.merge import core, geometry
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_SMALL_NORM = 1e-8
"""Vectors up to this norm have no direction; they are not normalised."""


def slerp(t: ArrayLike = 0.5, *, threshold: float = 0.9995) -> core.MergeMethod:
    """Spherical linear interpolation of two models, leaf by leaf.

    With `omega` the angle between the two leaves as vectors, a leaf becomes
    `sin((1 - t) omega) / sin(omega) * theta_0 + sin(t omega) / sin(omega) * theta_1`. The leaves
    enter with the norms they have. Where they are nearly parallel or opposite
    (`|cos omega| > threshold`) the straight line is taken; where one of them is zero, `omega` is
    a right angle. These are mergekit's rules.

    The plan holds each leaf's cosine and the two coefficients. To interpolate task vectors,
    give those as the models.

    Args:
        t: position on the arc: 0 the first model, 1 the second; may be traced.
        threshold: in (0, 1); how parallel is nearly parallel.

    Raises:
        ValueError: `t` is not finite, the threshold is out of range, or there are not two models.
        TypeError: a leaf is complex.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    core.check_number(t, "t")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        core.check_pair(leaves.num_models, "slerp")

        def decide(name: str, pair: Array) -> Plan:
            core.check_real(name, pair.dtype, "slerp")
            cosine = _cosine(pair[0], pair[1])
            place = jnp.asarray(t, pair.dtype)
            is_arc = jnp.abs(cosine) <= threshold
            return {
                "cosine": cosine,
                "coefficients": jnp.where(
                    is_arc, _arc(place, cosine, is_arc), jnp.stack([1 - place, place])
                ),
            }

        return {"leaves": leaves.each(decide)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, pair: Array) -> Array:
            return _blend(plan["leaves"][name]["coefficients"], pair)

        opened = core.open_models(models, base)
        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def nuslerp(
    t: ArrayLike = 0.5, *, weights: ArrayLike | None = None, axis: int | None = None
) -> core.MergeMethod:
    """Spherical interpolation without a threshold, of whole leaves or of their rows or columns.

    The formula of `slerp`, with three differences: the straight line is taken only where the
    vectors are parallel to within rounding; with a `base=` the task vectors are interpolated and
    added to it; and a leaf can be many vectors. Opposite vectors have no arc between them and
    cancel to zero unless `t` is 0 or 1. These are mergekit's rules; what it gives for opposite
    vectors depends on rounding.

    The plan holds each leaf's cosines and coefficients `[2]`, or `[2, ...]` with the axis kept at
    length one.

    Args:
        t: position on the arc: 0 the first model, 1 the second; may be traced.
        weights: `[2]`, in place of `t`: `t = w_1 / (w_0 + w_1)`, and 0.5 where the sum is zero.
        axis: along which the vectors lie: -1 takes rows of a dense kernel `[in, out]` (mergekit's
            `nuslerp_flatten: false`), 0 takes columns (with `nuslerp_row_wise: true`). Leaves
            without such an axis, and all leaves by default, are one vector each.

    Raises:
        ValueError: `t` or a weight is not finite, or there are not two weights or models.
        TypeError: a leaf is complex.

    Source: mergekit, method `nuslerp`; Shoemake 1985 for the arc.
    """
    core.check_number(t, "t")
    core.check_weights(weights, signed=True)

    def place_of(num_models: int) -> Array:
        if weights is None:
            return jnp.asarray(t, float)
        first, second = core.per_model(weights, num_models)
        total = first + second
        is_share = jnp.abs(total) >= 1e-6
        return jnp.where(is_share, second / jnp.where(is_share, total, 1), 0.5)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        opened = core.open_models(models, base)
        core.check_pair(opened.leaves.num_models, "nuslerp")

        def decide(name: str, pair: Array) -> Plan:
            core.check_real(name, pair.dtype, "nuslerp")
            has_axis = axis is not None and -pair[0].ndim <= axis < pair[0].ndim
            cosine = _cosine(pair[0], pair[1], axis if has_axis else None)
            place = place_of(2).astype(pair.dtype)
            ends = jnp.stack([place == 0, place == 1]).astype(pair.dtype)
            line = jnp.stack([1 - place, place])
            line, ends = (x.reshape(2, *[1] * cosine.ndim) for x in (line, ends))
            limit = 1 - 4 * float(jnp.finfo(pair.dtype).eps)
            is_arc = jnp.abs(cosine) < limit
            straight = jnp.where(cosine > 0, line, ends)
            return {
                "cosine": cosine,
                "coefficients": jnp.where(is_arc, _arc(place, cosine, is_arc), straight),
            }

        return {"leaves": geometry.task_vectors(opened).each(decide)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, pair: Array) -> Array:
            return _blend(plan["leaves"][name]["coefficients"], pair)

        return _write_moved(core.open_models(models, base), merge)

    return core.MergeMethod(measure, combine)


def multislerp(weights: ArrayLike | None = None, *, normalize: bool = True) -> core.MergeMethod:
    """The mean direction of any number of models, with their mean norm, leaf by leaf.

    `(sum_m w_m |theta_m|) * u / |u|`, where `u = sum_m w_m theta_m / |theta_m|`; of task vectors,
    added to the base, where there is a `base=`. The method is described as a step in the tangent
    space at `u / |u|`; but the weighted sum of the tangent vectors there is always zero, so that
    this is all that remains of it, and equals mergekit's. Leaves whose directions cancel
    (`|u| < 1e-6`) become the straight weighted sum; mergekit does so for two models and stops
    for more.

    The plan holds each leaf's coefficients `[M]`.

    Args:
        weights: `[M]`, not negative, not all zero; may be traced. Default: equal.
        normalize: divide the weights by their sum (mergekit's `normalize_weights`).

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or there are not M.
        TypeError: a leaf is complex.

    Source: Goddard, mergekit's method `multislerp`.
    """
    core.check_weights(weights, signed=False)

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        opened = core.open_models(models, base)
        shares = core.per_model(weights, opened.leaves.num_models)
        if normalize:
            shares = shares / jnp.sum(shares)

        def decide(name: str, stacked: Array) -> Array:
            core.check_real(name, stacked.dtype, "multislerp")
            flat, w = stacked.reshape(stacked.shape[0], -1), shares.astype(stacked.dtype)
            norms = _norm(flat, 1)
            unit = w / _divisor(norms, _SMALL_NORM)
            length = _norm(core.weighted_sum(unit, flat))
            has_direction = length > 1e-6
            scale = jnp.sum(w * norms) / jnp.where(has_direction, length, 1)
            return jnp.where(has_direction, scale * unit, w)

        return {"coefficients": geometry.task_vectors(opened).each(decide)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, stacked: Array) -> Array:
            return core.weighted_sum(plan["coefficients"][name], stacked)

        return _write_moved(core.open_models(models, base), merge)

    return core.MergeMethod(measure, combine)


def karcher(
    weights: ArrayLike | None = None, *, max_iter: int = 10, tol: float = 1e-5
) -> core.MergeMethod:
    """The Karcher mean of the models' directions, with their mean norm, leaf by leaf.

    The mean direction minimises the weighted sum of squared angles. From the normalised mean,
    each step averages the directions in the tangent space and moves along the sphere, until the
    step is shorter than `tol` or `max_iter` steps are taken. This is mergekit's iteration, but
    that leaves count however small they are (mergekit leaves out those of norm up to `tol`).

    All that it needs is the models' inner products: the iteration runs on M numbers a leaf. Leaves
    that are zero have no direction and count in the mean norm only. Opposite directions have no
    tangent between them; where all cancel, the first model's direction is taken, so that there
    the order of models matters.

    The plan holds each leaf's coefficients `[M]`.

    Args:
        weights: `[M]`, not negative, not all zero; divided by their sum; may be traced. Default:
            equal, which is all that mergekit has.
        max_iter: at least 1.
        tol: in radians, above 0.

    Raises:
        ValueError: an argument is out of range, or there are not M weights.
        TypeError: a leaf is complex.

    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; Buss and Fillmore
    2001, "Spherical averages and applications to spherical splines and interpolation", algorithm
    A1.
    """
    core.check_weights(weights, signed=False)
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if not tol > 0:
        raise ValueError(f"tol must be above 0, got {tol}")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        shares = core.per_model(weights, leaves.num_models)
        shares = shares / jnp.sum(shares)

        def relate(name: str, stacked: Array) -> tuple[Array, Array]:
            core.check_real(name, stacked.dtype, "karcher")
            flat = stacked.reshape(stacked.shape[0], -1)
            norms = _norm(flat, 1)
            safe = _divisor(norms, 0)
            products = jnp.matmul(flat, flat.T, precision="highest") / (safe * safe[:, None])
            return products.astype(float), norms.astype(float)

        related = leaves.each(relate)
        if not related:
            return {"coefficients": {}}
        # One loop for all leaves, which compiles once.
        products, norms = (jnp.stack(many) for many in zip(*related.values(), strict=True))

        def decide(products: Array, norms: Array) -> Array:
            w = jnp.where(norms > 0, shares, 0)
            direction = _karcher_direction(products, w, max_iter, tol)
            return jnp.sum(shares * norms) * direction / _divisor(norms, 0)

        coefficients = jax.vmap(decide)(products, norms)
        return {"coefficients": dict(zip(related, coefficients, strict=True))}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, stacked: Array) -> Array:
            return core.weighted_sum(plan["coefficients"][name], stacked)

        opened = core.open_models(models, base)
        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def _karcher_direction(products: Array, weights: Array, max_iter: int, tol: float) -> Array:
    """The Karcher mean of unit vectors as a combination of them, `[M]`.

    Args:
        products: `[M, M]`, the inner products of the unit vectors.
        weights: `[M]`; zero for those to leave out.
        max_iter: most steps.
        tol: shortest step.
    """

    def square(x: Array) -> Array:
        return jnp.matmul(x, jnp.matmul(products, x, precision="highest"), precision="highest")

    # Squares come of inner products, so what cancels leaves their rounding errors.
    noise = 32 * float(jnp.finfo(products.dtype).eps)

    def normalize(x: Array, fallback: Array) -> Array:
        length = square(x)
        is_long = length > noise
        return jnp.where(is_long, x / jnp.sqrt(jnp.where(is_long, length, 1)), fallback)

    weights = weights / _divisor(jnp.sum(weights), 0)
    first = jax.nn.one_hot(jnp.argmax(weights > 0), len(weights), dtype=weights.dtype)

    def step(_: int, mean: Array) -> Array:
        cosines = jnp.matmul(products, mean, precision="highest")
        pull = weights * _angle_over_sine(cosines)
        tangent = pull - jnp.sum(pull * cosines) * mean
        length = square(tangent)
        moves = length >= tol**2
        length = jnp.sqrt(jnp.where(moves, length, 1))
        moved = jnp.cos(length) * mean + jnp.sin(length) / length * tangent
        return jnp.where(moves, normalize(moved, moved), mean)

    start = normalize(weights, first)
    # A loop of a fixed number of steps has a gradient; one that has arrived stays where it is.
    return jax.lax.fori_loop(0, max_iter, step, start)


def _angle_over_sine(cosine: Array) -> Array:
    """`omega / sin(omega)`; 0 for opposite vectors, which have no tangent between them."""
    near = cosine > 0.99
    far = cosine < -1 + 1e-6
    omega = jnp.arccos(jnp.where(near | far, 0, cosine))
    # The series in 1 - cos(omega), because arccos has no gradient at 1.
    x = 1 - cosine
    series = 1 + x * (1 / 3 + x * (2 / 15 + x * (2 / 35)))
    return jnp.where(near, series, jnp.where(far, 0, omega / jnp.sin(omega)))


def _arc(place: Array, cosine: Array, is_arc: Array) -> Array:
    """The two coefficients of the arc, `[2, ...]`."""
    # A right angle stands in where the line is taken, for finite values and gradients.
    omega = jnp.arccos(jnp.where(is_arc, cosine, 0))
    return jnp.stack([jnp.sin((1 - place) * omega), jnp.sin(place * omega)]) / jnp.sin(omega)


def _blend(coefficients: Array, pair: Array) -> Array:
    # Written out, so that under jit the sum reads the two models where they lie: a contraction
    # would first copy them into one array.
    return coefficients[0] * pair[0] + coefficients[1] * pair[1]


def _cosine(a: Array, b: Array, axis: int | None = None) -> Array:
    """The cosine of whole leaves, or of the vectors along an axis, which stays at length one."""
    kept = axis is not None
    of_a, of_b = (_divisor(_norm(x, axis, kept), _SMALL_NORM) for x in (a, b))
    return jnp.sum(a * b, axis, keepdims=kept) / (of_a * of_b)


def _norm(x: Array, axis: int | None = None, keepdims: bool = False) -> Array:
    square = jnp.sum(jnp.square(x), axis, keepdims=keepdims)
    # The root of zero has an infinite gradient.
    is_long = square > 0
    return jnp.where(is_long, jnp.sqrt(jnp.where(is_long, square, 1)), 0)


def _divisor(norm: Array, small: float) -> Array:
    return jnp.where(norm > small, norm, 1)


def _write_moved(opened: core.Models, merge: Callable[[str, Array], Array]) -> PyTree:
    merged, bases = geometry.task_vectors(opened).map(merge), opened.base
    if bases is None:
        return opened.write(merged.read)
    return opened.write(lambda name: bases.read(name) + merged.read(name))
