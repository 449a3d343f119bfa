"""The affine op: rotation, translation, scaling and shear in one, as torchvision composes them."""

import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import unfused
from mixlab.augment.ops.geometric import Fill, Matrix, warp
from mixlab.augment.ops.photometric import image_op
from mixlab.types import Array, ArrayLike


def affine_matrix(
    size: tuple[int, int],
    degrees: ArrayLike = 0.0,
    translate: tuple[ArrayLike, ArrayLike] = (0.0, 0.0),
    scale: ArrayLike = 1.0,
    shear: tuple[ArrayLike, ArrayLike] = (0.0, 0.0),
) -> Matrix:
    """The map from the points of the result to those of the source, see `affine`.

    A point (x, y) of the source, seen from the centre, is sheared along the columns and before
    that along the rows, scaled, turned, and moved: this is the inverse.

    Args:
        size: height and width of the image; its centre stays where it is.
        degrees: clockwise.
        translate: pixels to the right and down.
        scale: factor of both sides.
        shear: degrees along the rows and along the columns.

    Returns:
        Rows (a, b, c), so that the source's (x, y) is (a, b) . (x, y) + c, row by row.
    """
    dtype = jnp.result_type(float)
    turn, slant_x, slant_y = (
        jnp.asarray(v, dtype) * (np.pi / 180.0) for v in (degrees, shear[0], shear[1])
    )
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    tan_x, tan_y = jnp.tan(slant_x), jnp.tan(slant_y)
    # Rotation times [1, 0; -tan_y, 1] times [1, -tan_x; 0, 1], whose determinant is one.
    a, c = cos + sin * tan_y, sin - cos * tan_y
    b, d = -a * tan_x - sin, -c * tan_x + cos
    factor = jnp.asarray(scale, dtype)
    a, b, c, d = d / factor, -b / factor, -c / factor, a / factor
    y, x = (n / 2.0 for n in size)
    right, down = (jnp.asarray(v, dtype) for v in translate)
    right, down = right + x, down + y
    across = x - unfused(a * right) - unfused(b * down)
    below = y - unfused(c * right) - unfused(d * down)
    return (a, b, across), (c, d, below)


@image_op
def affine(
    image: Array,
    degrees: ArrayLike = 0.0,
    translate: tuple[ArrayLike, ArrayLike] = (0.0, 0.0),
    scale: ArrayLike = 1.0,
    shear: tuple[ArrayLike, ArrayLike] = (0.0, 0.0),
    *,
    interpolation: str = "nearest",
    fill: Fill = 0,
    dialect: str = "pil",
) -> Array:
    """Shears, scales and turns about the centre, then moves.

    Equals torchvision's `affine`: of PIL images in the dialect `"pil"`, of tensors in the dialect
    `"torchvision"`.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        degrees: angle, scalar, clockwise (`rotate` turns counter-clockwise).
        translate: pixels to the right and down; neither dialect rounds them.
        scale: factor, positive.
        shear: angles in degrees; the first moves the upper rows to the right, the second the left
            columns down.
        interpolation: `"nearest"`, `"bilinear"`, or, in the dialect `"pil"`, `"bicubic"`.
        fill: colour outside the image, one number or one a channel, on the scale 0..255.
        dialect: `"pil"` or `"torchvision"`.

    Raises:
        ValueError: unknown interpolation or dialect, or a fill that does not fit the channels.
    """
    size = (image.shape[0], image.shape[1])
    matrix = affine_matrix(size, degrees, translate, scale, shear)
    return warp(image, matrix, interpolation, fill, dialect)
