"""Photometric image ops, exact on uint8 like PIL, and their continuation to floats.

All take one image [H, W, C], or a batch [B, H, W, C] or [B, T, H, W, C], which is treated image by
image, and return the same shape and dtype. Numbers on the scale of pixels (thresholds, additions)
mean 0..255 for floating images too, whose pixels lie in [0, 1].
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import check_image, to_dtype, unfused, working_dtype
from mixlab.augment.ops.dispatch import each, per_image
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike

P = ParamSpec("P")


def image_op(fn: Callable[Concatenate[Array, P], Array]) -> Callable[Concatenate[Any, P], Array]:
    """Makes a function of an image [H, W, C] one of an image, images or videos, with checks."""

    @functools.wraps(fn)
    def op(image: Any, *args: P.args, **kwargs: P.kwargs) -> Array:
        image = jnp.asarray(image)
        check_image(image, (3, 4, 5), "image", batched=False)
        return per_image(lambda one: fn(one, *args, **kwargs), image)

    return op


def _levels(image: Array) -> Array:
    """The image on the scale 0..255, in the working dtype."""
    x = image.astype(working_dtype(image.dtype))
    return x if image.dtype == jnp.uint8 else x * 255.0


def _blend(degenerate: Array, image: Array, factor: ArrayLike) -> Array:
    """`degenerate + factor * (image - degenerate)`, clipped; on uint8 truncated, as PIL does.

    Args:
        degenerate: the image that factor 0 gives, in the working dtype of `image`.
        image: the image that factor 1 gives.
        factor: scalar.
    """
    x = image.astype(degenerate.dtype)
    mixed = degenerate + unfused(jnp.asarray(factor, x.dtype) * (x - degenerate))
    if image.dtype == jnp.uint8:
        return jnp.clip(mixed, 0.0, 255.0).astype(jnp.uint8)
    return jnp.clip(mixed, 0.0, 1.0).astype(image.dtype)


def _grey(image: Array) -> Array:
    """Luma [H, W, 1] of three channels, else the mean of the channels; uint8 gives whole levels."""
    channels = image.shape[-1]
    weights = [19595, 38470, 7471] if channels == 3 else [1] * channels
    total = sum(weights)
    if image.dtype == jnp.uint8:
        weighted = image.astype(jnp.int32) * jnp.asarray(weights, jnp.int32)
        grey = jnp.sum(weighted, axis=-1, keepdims=True, dtype=jnp.int32)
        grey = (grey + total // 2) // total
        return grey.astype(jnp.float32)
    x = image.astype(working_dtype(image.dtype))
    return jnp.sum(x * jnp.asarray([w / total for w in weights], x.dtype), axis=-1, keepdims=True)


@image_op
def invert(image: Array) -> Array:
    """Inverts all levels: `255 - x`, or `1 - x` for floats.

    Equals PIL `ImageOps.invert`.
    """
    return (255 - image) if image.dtype == jnp.uint8 else 1.0 - image


@image_op
def posterize(image: Array, bits: ArrayLike) -> Array:
    """Keeps the `bits` highest bits of every level; 0 bits give black.

    Equals PIL `ImageOps.posterize` (which refuses 0 bits) on uint8; floats become
    `floor(x * 2^bits) / 2^bits`, at most the last step, as in torchvision v2.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        bits: whole number in 0..8.

    Raises:
        ValueError: `bits` is out of its range; of an array on a device this is not checked.
    """
    if not isinstance(bits, jax.Array) and bits not in range(9):
        raise ValueError(f"posterize keeps 0 to 8 bits, got {bits}")
    if image.dtype == jnp.uint8:
        shift = 8 - jnp.asarray(bits).astype(jnp.int32)
        x = image.astype(jnp.int32)
        return ((x >> shift) << shift).astype(jnp.uint8)
    x = image.astype(working_dtype(image.dtype))
    steps = jnp.exp2(jnp.asarray(bits, x.dtype))
    return (jnp.clip(jnp.floor(x * steps), 0.0, steps - 1.0) / steps).astype(image.dtype)


@image_op
def solarize(image: Array, threshold: ArrayLike) -> Array:
    """Inverts the levels at and above a threshold.

    Equals PIL `ImageOps.solarize`.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        threshold: on the scale 0..255 whatever the dtype; 256 leaves the image as it is.
    """
    levels = _levels(image)
    inverted = (255 - image) if image.dtype == jnp.uint8 else 1.0 - image
    return jnp.where(levels < jnp.asarray(threshold, levels.dtype), image, inverted)


@image_op
def solarize_add(image: Array, addition: ArrayLike, threshold: ArrayLike = 128) -> Array:
    """Adds to the levels below a threshold, at most up to white.

    Equals timm's op of this name, and Google's.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        addition: on the scale 0..255 whatever the dtype; a fraction of a level is dropped on uint8.
        threshold: on the scale 0..255 whatever the dtype.
    """
    levels = _levels(image)
    raised = jnp.clip(levels + jnp.asarray(addition, levels.dtype), 0.0, 255.0)
    raised = raised if image.dtype == jnp.uint8 else raised / 255.0
    below = levels < jnp.asarray(threshold, levels.dtype)
    return jnp.where(below, raised.astype(image.dtype), image)


@image_op
def color(image: Array, factor: ArrayLike) -> Array:
    """Blends with the grey version: 0 is grey, 1 the image itself, more than 1 more colourful.

    Equals PIL `ImageEnhance.Color`, and torchvision within one level. Images with other than three
    channels use the mean of the channels as grey.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        factor: scalar.
    """
    return _blend(jnp.broadcast_to(_grey(image), image.shape), image, factor)


@image_op
def contrast(image: Array, factor: ArrayLike, *, dialect: str = "pil") -> Array:
    """Blends with a uniform grey: 0 is that grey, 1 the image itself, more than 1 more contrast.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        factor: scalar.
        dialect: `"pil"`: the grey is the image's mean luma, rounded to a level on uint8, as PIL
            `ImageEnhance.Contrast` and, within one level, torchvision; `"google"`: it is
            H * W / 256 levels, whatever the image, as Google's TensorFlow code computes it.

    Raises:
        ValueError: the dialect is unknown.
    """
    known = ("pil", "google")
    if dialect not in known:
        raise ValueError(f"unknown dialect {dialect!r}; {nearest(str(dialect), known)}")
    grey = _grey(image)
    pixels = grey.size
    if dialect == "google":
        level = float(min(pixels // 256, 255))
        mean = jnp.asarray(level if image.dtype == jnp.uint8 else level / 255.0, grey.dtype)
    elif image.dtype == jnp.uint8:
        total = jnp.sum(grey, dtype=jnp.uint32)
        whole, rest = total // pixels, total % pixels
        mean = (whole + (2 * rest >= pixels).astype(jnp.uint32)).astype(grey.dtype)
    else:
        mean = jnp.mean(grey)
    return _blend(jnp.broadcast_to(mean, image.shape), image, factor)


@image_op
def brightness(image: Array, factor: ArrayLike) -> Array:
    """Multiplies by `factor`, clipped: 0 is black, 1 the image itself.

    Equals PIL `ImageEnhance.Brightness` and torchvision.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        factor: scalar.
    """
    return _blend(jnp.zeros(image.shape, working_dtype(image.dtype)), image, factor)


@image_op
def sharpness(image: Array, factor: ArrayLike) -> Array:
    """Blends with a smoothed version: 0 is smooth, 1 the image itself, more than 1 sharper.

    The smoothing is the 3 x 3 kernel of ones with 5 in the middle, over 13; pixels at the border
    stay. Equals PIL `ImageEnhance.Sharpness` and torchvision.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        factor: scalar.
    """
    height, width, channels = image.shape
    if height < 3 or width < 3:
        return image
    whole = image.dtype == jnp.uint8
    # Rows in one piece, so that long vectors are added; 16 bits hold all of the whole numbers.
    image = image.reshape(height, width * channels)
    x = image.astype(jnp.uint16 if whole else working_dtype(image.dtype))
    rows = x[:-2] + x[1:-1] + x[2:]
    inner = slice(1, -1), slice(channels, -channels)
    total = rows[:, : -2 * channels] + rows[:, channels:-channels] + rows[:, 2 * channels :]
    total = total + 4 * x[inner]
    smooth = (2 * total + 13) // 26 if whole else total / 13.0
    sharp = _blend(smooth.astype(working_dtype(image.dtype)), image[inner], factor)
    return image.at[inner].set(sharp).reshape(height, width, channels)


@functools.cache
def _double_errors() -> tuple[np.ndarray, np.ndarray]:
    """What double precision loses in `i * (255 / d)`, and how much of it rounding forgives.

    PIL stretches the range lo..hi with `int(i * scale - lo * scale)` in double precision, d = hi -
    lo. Where the exact quotient (i - lo) * 255 / d is a whole number q, the error decides whether
    the result is q or q - 1; everywhere else it is the floor.

    Returns:
        The error of the product for every d and i, float32 [256, 256], and the largest error below
        q that still rounds to q, float32 [256].
    """
    i = np.arange(256.0)
    d = np.maximum(i, 1.0)[:, None]
    product = i * (255.0 / d)
    high = product.astype(np.float32).astype(np.float64)
    # Both parts have few enough bits for the products with d to be exact.
    error = ((high * d - i * 255.0) + (product - high) * d) / d
    forgiven = np.exp2(np.ceil(np.log2(np.maximum(i, 1.0))) - 54) * (1.0 + 1e-6)
    return error.astype(np.float32), forgiven.astype(np.float32)


def autocontrast_table(low: ArrayLike, high: ArrayLike) -> Array:
    """Where PIL's autocontrast sends every level when the range low..high is stretched.

    Args:
        low: int scalar, the darkest level of a channel.
        high: int scalar, its brightest; if it is not above `low`, the table is the identity.

    Returns:
        uint8 [256].
    """
    errors, forgiven = (jnp.asarray(table) for table in _double_errors())
    low, high = jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)
    span = jnp.maximum(high - low, 1)
    i = jnp.arange(256, dtype=jnp.int32)
    numerator = jnp.clip(i - low, 0, span) * 255
    quotient = divide(numerator, span)
    missed = errors[span] - errors[span, low] < -forgiven[quotient]
    stretched = quotient - ((quotient * span == numerator) & missed).astype(jnp.int32)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), i).astype(jnp.uint8)


@image_op
def autocontrast(image: Array) -> Array:
    """Stretches every channel to the full range; a constant channel stays as it is.

    Equals PIL `ImageOps.autocontrast` exactly, and torchvision and TensorFlow within one level.
    """
    low, high = _extreme(jnp.minimum, image), _extreme(jnp.maximum, image)
    if image.dtype == jnp.uint8:
        # In a loop, after which they are there; else every pixel would make its own entry.
        tables = each(lambda ends: autocontrast_table(*ends), (low, high))
        return _look_up(tables, image)
    x = image.astype(working_dtype(image.dtype))
    low, high = low.astype(x.dtype), high.astype(x.dtype)
    span = jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, jnp.clip((x - low) / span, 0.0, 1.0), x).astype(image.dtype)


def _extreme(lesser: Callable[[Array, Array], Array], image: Array) -> Array:
    """The least value [C] of every channel, by halves: long vectors, where a reduction goes singly.

    Args:
        lesser: of two; `jnp.maximum` for the greatest.
        image: [H, W, C].
    """
    height, width, channels = image.shape
    x = image.reshape(height, width * channels)
    for shape in (x.shape, (width, channels)):
        x = x.reshape(shape)
        while len(x) > 1:
            # The halves of an odd number overlap.
            half = (len(x) + 1) // 2
            x = lesser(x[:half], x[-half:])
    return x[0]


@image_op
def equalize(image: Array) -> Array:
    """Spreads the levels of every channel so that their histogram becomes flat.

    Equals PIL `ImageOps.equalize`, torchvision and TensorFlow. Floats are rounded to 256 levels
    first.
    """
    levels = image if image.dtype == jnp.uint8 else to_dtype(_levels(image), jnp.uint8)
    result = _look_up(_equalizing_tables(levels), levels)
    if image.dtype == jnp.uint8:
        return result
    return (result.astype(working_dtype(image.dtype)) / 255.0).astype(image.dtype)


def _equalizing_tables(image: Array) -> Array:
    """Makes the tables, uint8 [C, 256], from a uint8 image [H, W, C]."""
    height, width, channels = image.shape
    count = jnp.zeros(channels * 256, jnp.int32).at[_places(image)].add(1, mode="promise_in_bounds")
    count = count.reshape(channels, 256)
    upto = jnp.cumsum(count, axis=1, dtype=jnp.int32)
    level = jnp.arange(256, dtype=jnp.int32)

    def table(counts: tuple[Array, Array]) -> Array:
        count, upto = counts
        brightest = jnp.max(jnp.where(count > 0, level, 0))
        step = (height * width - count[brightest]) // 255
        table = jnp.minimum(divide(step // 2 + upto - count, jnp.maximum(step, 1)), 255)
        return jnp.where(step > 0, table, level).astype(jnp.uint8)

    return each(table, (count, upto))


def divide(n: Array, d: Array) -> Array:
    """`n // d` of int32, exact up to 2^20, by floats: CPUs have no divisions of integer vectors."""
    q = (n.astype(jnp.float32) / d.astype(jnp.float32)).astype(jnp.int32)
    rest = n - q * d
    return q + (rest >= d).astype(jnp.int32) - (rest < 0).astype(jnp.int32)


def _places(image: Array) -> Array:
    """Where each value of a uint8 image [H, W, C] is in tables [C, 256]: int32 [H * W * C]."""
    start = jnp.arange(image.shape[-1], dtype=jnp.int32) * 256
    return (image.astype(jnp.int32) + start).reshape(-1)


def _look_up(tables: Array, image: Array) -> Array:
    """Sends every level through the table [C, 256] of its channel."""
    found = tables.reshape(-1).at[_places(image)].get(mode="promise_in_bounds")
    return found.reshape(image.shape)
