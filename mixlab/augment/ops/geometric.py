"""Geometric image ops: rotation, shear, translation, in the conventions of PIL or torchvision.

All take one image [H, W, C], or a batch [B, H, W, C] or [B, T, H, W, C], image by image, and return
the same shape and dtype. Each pixel of the result looks up a point of the source through an
affine map; pixels are unit squares, (0, 0) the outer corner of the first. `fill` is one number, or
one a channel, on the scale 0..255 for floating images too; what lies outside the image has this
colour.

The two dialects differ in the direction of translation, in the rounding and in the border:
PIL rounds down to the pixel (nearest, in 16-bit fixed point) or to the level (bilinear, bicubic),
and repeats the border while the point lies in the image; torchvision rounds to the nearest, ties to
even, and weighs the fill in at the border.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import to_dtype, unfused
from mixlab.augment.ops.dispatch import each, on_cpu
from mixlab.augment.ops.photometric import image_op
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike

Fill = float | Sequence[float]
Row = tuple[ArrayLike, ArrayLike, ArrayLike] | Array
Matrix = tuple[Row, Row] | Array
"""Rows (a, b, c) so that the source's (x, y) is (a, b) . (x, y) + c, row by row."""

_DIALECTS = ("pil", "torchvision")
_INTERPOLATIONS = {
    "pil": ("nearest", "bilinear", "bicubic"),
    "torchvision": ("nearest", "bilinear"),
}


def check_sampling(interpolation: str, dialect: str) -> None:
    """Raises a `ValueError` unless the dialect is known and has the interpolation."""
    if dialect not in _DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; {nearest(str(dialect), _DIALECTS)}")
    known = _INTERPOLATIONS[dialect]
    if interpolation not in known:
        raise ValueError(
            f"the dialect {dialect!r} has no interpolation {interpolation!r}; "
            f"{nearest(str(interpolation), known)}"
        )


def fill_color(fill: Fill, image: Array) -> Array:
    """The fill as [C] or [1], on the scale of the image.

    Raises:
        ValueError: it is neither one number nor one a channel.
    """
    color = np.atleast_1d(np.asarray(fill, np.float64))
    if color.ndim != 1 or color.size not in (1, image.shape[-1]):
        raise ValueError(
            f"fill is one number or one a channel, got {fill!r} for {image.shape[-1]} channels"
        )
    scale = 1.0 if image.dtype == jnp.uint8 else 255.0
    return jnp.asarray(color / scale, jnp.result_type(float))


def warp(
    image: Array,
    matrix: Matrix,
    interpolation: str,
    fill: Fill,
    dialect: str,
    rows_shift: bool = False,
) -> Array:
    """Moves an image by an affine map.

    Args:
        image: [H, W, C], or a mask of any dtype if the interpolation is `"nearest"`.
        matrix: where each pixel of the result comes from, see `Matrix`.
        interpolation: `"nearest"`, `"bilinear"`, or, in the dialect `"pil"`, `"bicubic"`.
        fill: colour outside the image, on the scale 0..255.
        dialect: `"pil"` or `"torchvision"`, see above.
        rows_shift: whether the map only shifts rows and exchanges them, which is done faster.

    Raises:
        ValueError: unknown interpolation or dialect, or a fill that does not fit the channels.
    """
    check_sampling(interpolation, dialect)
    color = fill_color(fill, image)
    coordinates = [jnp.asarray(v, jnp.result_type(float)) for row in matrix for v in row]
    a, b, c, d, e, f = coordinates
    height, width = image.shape[:2]
    column = jnp.arange(width, dtype=a.dtype) + 0.5
    row = jnp.arange(height, dtype=a.dtype)[:, None] + 0.5
    x = unfused(a * column) + unfused(b * row) + c
    y = unfused(d * column) + unfused(e * row) + f
    if interpolation == "nearest":
        if dialect == "pil":
            x, y = _fixed_point(a, b, c, image), _fixed_point(d, e, f, image)
        else:
            # The subtraction before rounding makes ties go to the even pixel.
            x, y = (jnp.round(v - 0.5).astype(jnp.int32) for v in (x, y))
        if rows_shift:
            return _shift_rows(image, y[:, 0], x[:, 0], color)
        return _pick(image, x, y, color)
    if dialect == "torchvision":
        return to_dtype(_weighted(image, x - 0.5, y - 0.5, color), image.dtype)
    within = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    values = _interpolated(image, x - 0.5, y - 0.5, interpolation)
    if image.dtype == jnp.uint8:
        values = jnp.floor(jnp.clip(values, 0.0, 255.0))
    elif interpolation == "bicubic":
        values = jnp.clip(values, 0.0, 1.0)
    return to_dtype(jnp.where(within[..., None], values, color), image.dtype)


def _fixed_point(p: Array, q: Array, r: Array, image: Array) -> Array:
    """The source pixels on one axis, int32 [H, W], as PIL's 16.16 arithmetic finds them."""

    def fixed(v: Array) -> Array:
        # Whole part and fraction apart: a float32 cannot hold both at sixteen binary places.
        whole = jnp.floor(v)
        fraction = jnp.floor((v - whole) * 65536.0 + 0.5).astype(jnp.int32)
        return (whole.astype(jnp.int32) << 16) + fraction

    height, width = image.shape[:2]
    column = jnp.arange(width, dtype=jnp.int32)
    row = jnp.arange(height, dtype=jnp.int32)[:, None]
    start = fixed(r + p * 0.5 + q * 0.5)
    return (start + fixed(p) * column + fixed(q) * row) >> 16


def _gather(image: Array, x: Array, y: Array) -> Array:
    """The pixels at columns `x` and rows `y` [H, W], moved inside if they lie outside."""
    height, width, channels = image.shape
    index = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
    return image.reshape(-1, channels).at[index].get(mode="promise_in_bounds")


def _pick(image: Array, x: Array, y: Array, color: Array) -> Array:
    """The pixels at columns `x` and rows `y` [H, W], in the colour where they lie outside."""
    height, width, channels = image.shape
    within = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    fill = jnp.broadcast_to(to_dtype(color, image.dtype), (1, channels))
    pixels = jnp.concatenate([image.reshape(-1, channels), fill])
    index = jnp.where(within, y * width + x, height * width)
    # Row by row, so that the places are found before; else every channel would find them again.
    return each(lambda row: pixels.at[row].get(mode="promise_in_bounds"), index)


def _shift_rows(image: Array, row: Array, shift: Array, color: Array) -> Array:
    """Fills row i from the columns shifted by `shift[i]` of row `row[i]`, int32 [H]."""
    height, width, channels = image.shape
    if not on_cpu():
        column = jnp.arange(width, dtype=jnp.int32)
        y = jnp.broadcast_to(row[:, None], (height, width))
        return _pick(image, column + shift[:, None], y, color)
    length = width * channels
    fill = jnp.broadcast_to(to_dtype(color, image.dtype), (width, channels)).reshape(-1)
    pixels = jnp.concatenate([fill, image.reshape(-1), fill])
    shift = jnp.where((row >= 0) & (row < height), jnp.clip(shift, -width, width), width) * channels
    start = (jnp.clip(row, 0, height - 1) + 1) * length + shift
    place = jnp.arange(length, dtype=jnp.int32)

    def moved(step: tuple[Array, Array]) -> Array:
        shift, start = step
        within = (place >= -shift) & (place < length - shift)
        return jnp.where(within, jax.lax.dynamic_slice(pixels, (start,), (length,)), fill)

    return jax.lax.map(moved, (shift, start)).reshape(image.shape)


def _linear(values: list[Array], t: Array) -> Array:
    return values[0] + (values[1] - values[0]) * t


def _cubic(values: list[Array], t: Array) -> Array:
    """PIL's cubic, the one with slope parameter -1."""
    v1, v2, v3, v4 = values
    p2, p3, p4 = v3 - v1, 2.0 * (v1 - v2) + v3 - v4, v2 - v1 - v3 + v4
    return v2 + t * (p2 + t * (p3 + t * p4))


def _split(v: Array) -> tuple[Array, Array]:
    whole = jnp.floor(v)
    return whole.astype(jnp.int32), v - whole


def _interpolated(image: Array, x: Array, y: Array, interpolation: str) -> Array:
    """PIL's bilinear or bicubic values at points in pixel centres, the border repeated."""
    spline, taps = (_linear, (0, 1)) if interpolation == "bilinear" else (_cubic, (-1, 0, 1, 2))
    dtype = x.dtype
    (x, tx), (y, ty) = _split(x), _split(y)
    tx, ty = (t[..., None].astype(dtype) for t in (tx, ty))
    rows = [spline([_gather(image, x + i, y + j).astype(dtype) for i in taps], tx) for j in taps]
    return spline(rows, ty)


def _weighted(image: Array, x: Array, y: Array, color: Array) -> Array:
    """The bilinear values of torchvision: the fill enters by the weight that lies outside.

    The sum over the pixels inside is weighted by their total weight once more before the fill is
    added, as there.
    """
    height, width = image.shape[:2]
    dtype = x.dtype
    (x, tx), (y, ty) = _split(x), _split(y)
    tx, ty = (t[..., None].astype(dtype) for t in (tx, ty))
    values = jnp.zeros(image.shape, dtype)
    cover = jnp.zeros((height, width, 1), dtype)
    for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
        within = (x + i >= 0) & (x + i < width) & (y + j >= 0) & (y + j < height)
        weight = (tx if i else 1.0 - tx) * (ty if j else 1.0 - ty) * within[..., None].astype(dtype)
        values = values + weight * _gather(image, x + i, y + j).astype(dtype)
        cover = cover + weight
    return (values - color) * cover + color


@image_op
def rotate(
    image: Array,
    degrees: ArrayLike,
    *,
    interpolation: str = "nearest",
    fill: Fill = 0,
    dialect: str = "pil",
) -> Array:
    """Rotates counter-clockwise about the centre.

    Equals PIL `Image.rotate`, or torchvision's `rotate` of tensors.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        degrees: angle, scalar.
        interpolation: `"nearest"`, `"bilinear"`, or, in the dialect `"pil"`, `"bicubic"`.
        fill: colour outside the image, one number or one a channel, on the scale 0..255.
        dialect: `"pil"` or `"torchvision"`.

    Raises:
        ValueError: unknown interpolation or dialect, or a fill that does not fit the channels.
    """
    return warp(image, rotation(degrees, image.shape[:2]), interpolation, fill, dialect)


@image_op
def shear_x(
    image: Array,
    level: ArrayLike,
    *,
    interpolation: str = "nearest",
    fill: Fill = 0,
    dialect: str = "pil",
) -> Array:
    """Shears along the rows: the row at y takes its pixels from x + level * y.

    Equals PIL's affine transform by (1, level, 0, 0, 1, 0), as timm has it, and torchvision's
    `ShearX` of RandAugment.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        level: pixels a row, scalar; positive moves the lower rows to the left.
        interpolation: `"nearest"`, `"bilinear"`, or, in the dialect `"pil"`, `"bicubic"`.
        fill: colour outside the image, one number or one a channel, on the scale 0..255.
        dialect: `"pil"` or `"torchvision"`.

    Raises:
        ValueError: unknown interpolation or dialect, or a fill that does not fit the channels.
    """
    matrix = ((1.0, level, 0.0), (0.0, 1.0, 0.0))
    # torchvision's rounding of halves depends on the column.
    return warp(image, matrix, interpolation, fill, dialect, rows_shift=dialect == "pil")


@image_op
def shear_y(
    image: Array,
    level: ArrayLike,
    *,
    interpolation: str = "nearest",
    fill: Fill = 0,
    dialect: str = "pil",
) -> Array:
    """Shears along the columns: the column at x takes its pixels from y + level * x.

    See `shear_x`, with rows and columns exchanged.
    """
    return warp(image, ((1.0, 0.0, 0.0), (level, 1.0, 0.0)), interpolation, fill, dialect)


@image_op
def translate_x(
    image: Array,
    pixels: ArrayLike,
    *,
    interpolation: str = "nearest",
    fill: Fill = 0,
    dialect: str = "pil",
) -> Array:
    """Moves the image along its rows.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        pixels: scalar. In the dialect `"pil"` each pixel of the result is taken from x + pixels,
            so the image moves to the left, as in timm; in `"torchvision"` the image moves to the
            right by the whole part of `pixels`.
        interpolation: `"nearest"`, `"bilinear"`, or, in the dialect `"pil"`, `"bicubic"`.
        fill: colour outside the image, one number or one a channel, on the scale 0..255.
        dialect: `"pil"` or `"torchvision"`.

    Raises:
        ValueError: unknown interpolation or dialect, or a fill that does not fit the channels.
    """
    offset = _offset(pixels, dialect)
    matrix = ((1.0, 0.0, offset), (0.0, 1.0, 0.0))
    return warp(image, matrix, interpolation, fill, dialect, rows_shift=True)


@image_op
def translate_y(
    image: Array,
    pixels: ArrayLike,
    *,
    interpolation: str = "nearest",
    fill: Fill = 0,
    dialect: str = "pil",
) -> Array:
    """Moves the image along its columns: up in the dialect `"pil"`, down in `"torchvision"`.

    See `translate_x`, with rows and columns exchanged.
    """
    offset = _offset(pixels, dialect)
    matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, offset))
    return warp(image, matrix, interpolation, fill, dialect, rows_shift=True)


def rotation(degrees: ArrayLike, size: Sequence[int]) -> tuple[Row, Row]:
    """The map of `rotate` for an image of a height and width, see `Matrix`; angles [...]."""
    radians = jnp.asarray(degrees, jnp.result_type(float)) * (np.pi / 180.0)
    cos, sin = _snapped(jnp.cos(radians)), _snapped(jnp.sin(radians))
    y, x = (n / 2.0 for n in size)
    across = x - unfused(x * cos) + unfused(y * sin)
    down = y - unfused(x * sin) - unfused(y * cos)
    return (cos, -sin, across), (sin, cos, down)


def _snapped(x: Array) -> Array:
    """Snaps to the nearest integer what rounding has moved off it: quarter turns are then exact."""
    return jnp.where(jnp.abs(x - jnp.round(x)) < 2e-7, jnp.round(x), x)


def _offset(pixels: ArrayLike, dialect: str) -> Array:
    pixels = jnp.asarray(pixels, jnp.result_type(float))
    return pixels if dialect == "pil" else -jnp.trunc(pixels)
