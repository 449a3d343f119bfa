"""Gaussian blur as Pillow computes it: three box blurs on each axis, in whole levels."""

import jax
import jax.numpy as jnp

from mixlab.augment.core import working_dtype
from mixlab.augment.ops.photometric import image_op
from mixlab.types import Array, ArrayLike

_PASSES = 3


def _box_radius(sigma: Array) -> tuple[Array, Array]:
    """Whole and fractional part of the radius of a box, three of which have that deviation."""
    variance = sigma * sigma / _PASSES
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    return whole, part / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)))


@image_op
def gaussian_blur(image: Array, sigma: ArrayLike, *, max_sigma: float = 2.0) -> Array:
    """Blurs with a Gaussian, approximated by three boxes with soft ends; the border is repeated.

    Equals PIL `ImageFilter.GaussianBlur` on uint8, its rounding after every box included. Floats
    are not rounded.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        sigma: standard deviation in pixels, scalar, in 0..max_sigma.
        max_sigma: what `sigma` may at most be; the work grows with it.

    Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", 2011.
    """
    sigma = jnp.clip(jnp.asarray(sigma, jnp.float32), 0.0, max_sigma)
    whole, part = _box_radius(sigma)
    reach = int((((4.0 * max_sigma**2 + 1.0) ** 0.5) - 1.0) / 2.0) + 1
    offset = jnp.abs(jnp.arange(-reach, reach + 1, dtype=jnp.float32))
    # Weights in units of 2^-24, which fill 32 bits together with the levels.
    inner = jnp.floor(2.0**24 / (2.0 * (whole + part) + 1.0)).astype(jnp.uint32)
    outer = (jnp.uint32(2**24) - (2 * whole + 1).astype(jnp.uint32) * inner) // 2
    weights = jnp.where(offset <= whole, inner, jnp.where(offset == whole + 1, outer, 0))
    exact = image.dtype == jnp.uint8
    x = image.astype(jnp.uint32 if exact else working_dtype(image.dtype))
    weights = weights if exact else weights.astype(x.dtype) / 2.0**24

    def box(x: Array, axis: int) -> Array:
        ends = [(reach, reach) if i == axis else (0, 0) for i in range(3)]
        padded = jnp.pad(x, ends, mode="edge")
        length = x.shape[axis]
        total = sum(
            jax.lax.slice_in_dim(padded, i, i + length, axis=axis) * weights[i]
            for i in range(2 * reach + 1)
        )
        return (total + jnp.uint32(2**23)) >> 24 if exact else jnp.asarray(total)

    for axis in (1, 0):
        for _ in range(_PASSES):
            x = box(x, axis)
    return x.astype(image.dtype)
