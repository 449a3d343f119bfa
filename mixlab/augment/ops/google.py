"""What only Google's TensorFlow policies do: their sampling of affine maps, and cutout as an op."""

import jax.numpy as jnp

from mixlab.augment.core import to_dtype, unfused
from mixlab.augment.ops.geometric import Fill, fill_color
from mixlab.types import Array


def affine(image: Array, matrix: Array, fill: Fill) -> Array:
    """Moves an image [H, W, C] by an affine map, each pixel taken from the nearest one.

    Equals TensorFlow's `ImageProjectiveTransform`, which rounds halves away from zero.

    Args:
        image: uint8 or floating.
        matrix: [2, 3], from the result to the source; (0, 0) is the outer corner.
        fill: colour outside the image, on the scale 0..255.
    """
    height, width, channels = image.shape
    column = jnp.arange(width, dtype=matrix.dtype) + 0.5
    row = jnp.arange(height, dtype=matrix.dtype)[:, None] + 0.5
    x, y = (unfused(a * column) + unfused(b * row) + c - 0.5 for a, b, c in matrix)
    x, y = (jnp.trunc(v + jnp.copysign(jnp.asarray(0.5, v.dtype), v)) for v in (x, y))
    within = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = jnp.clip(x, 0, width - 1), jnp.clip(y, 0, height - 1)
    index = y.astype(jnp.int32) * width + x.astype(jnp.int32)
    taken = image.reshape(-1, channels).at[index].get(mode="promise_in_bounds")
    return jnp.where(within[..., None], taken, to_dtype(fill_color(fill, image), image.dtype))


def cutout(image: Array, center: Array, half: Array, fill: Fill) -> Array:
    """Fills a square of the sides 2 * half, as far as it lies in the image.

    Args:
        image: uint8 or floating, [H, W, C].
        center: int32 [2], row and column.
        half: scalar, a whole number.
        fill: colour of the square, on the scale 0..255.
    """
    height, width = image.shape[:2]
    row = jnp.arange(height, dtype=jnp.int32)[:, None] - center[0]
    column = jnp.arange(width, dtype=jnp.int32) - center[1]
    half = half.astype(jnp.int32)
    inside = (row >= -half) & (row < half) & (column >= -half) & (column < half)
    return jnp.where(inside[..., None], to_dtype(fill_color(fill, image), image.dtype), image)
