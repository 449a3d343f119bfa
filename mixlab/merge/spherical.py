"""Interpolation along great circles."""

import jax.numpy as jnp

from mixlab.merge import core
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
    core.check_finite(t, "t")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        leaves = core.open_models(models, base).leaves
        core.check_pair(leaves.num_models, "slerp")

        def decide(name: str, pair: Array) -> Plan:
            core.check_real(name, pair.dtype, "slerp")
            a, b = (_unit(x) for x in pair.reshape(2, -1))
            cosine = jnp.sum(a * b)
            place = jnp.asarray(t, pair.dtype)
            is_arc = jnp.abs(cosine) <= threshold
            # A right angle stands in where the line is taken, for finite values and gradients.
            omega = jnp.arccos(jnp.where(is_arc, cosine, 0))
            arc = jnp.stack([jnp.sin((1 - place) * omega), jnp.sin(place * omega)])
            line = jnp.stack([1 - place, place])
            return {
                "cosine": cosine,
                "coefficients": jnp.where(is_arc, arc / jnp.sin(omega), line),
            }

        return {"leaves": leaves.each(decide)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, pair: Array) -> Array:
            return core.weighted_sum(plan["leaves"][name]["coefficients"], pair)

        opened = core.open_models(models, base)
        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def _unit(vector: Array) -> Array:
    square = jnp.sum(jnp.square(vector))
    # The root of zero has an infinite gradient, so tiny vectors are kept away from it.
    is_long = square > _SMALL_NORM**2
    return vector / jnp.where(is_long, jnp.sqrt(jnp.where(is_long, square, 1)), 1)
