"""Resizing: boxes to one size, which crops of random size are made of, and the op `resize`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import check_image, pair_of, working_dtype
from mixlab.augment.ops.dispatch import each, on_cpu, per_image
from mixlab.augment.ops.photometric import image_op
from mixlab.spec import nearest
from mixlab.types import Array

_TILE = 32
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def check_interpolation(interpolation: str) -> None:
    """Raises a `ValueError` unless the interpolation is known."""
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}; "
            f"{nearest(str(interpolation), _INTERPOLATIONS)}"
        )


def _triangle(x: Array) -> Array:
    return jnp.maximum(1.0 - jnp.abs(x), 0.0)


def _cubic(x: Array, slope: float) -> Array:
    """Keys' cubic."""
    x = jnp.abs(x)
    near = ((slope + 2.0) * x - (slope + 3.0)) * x * x + 1.0
    far = slope * (((x - 5.0) * x + 8.0) * x - 4.0)
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


def _weights(
    low: Array, high: Array, length: int, size: int, tile: int, bicubic: bool, antialias: bool
) -> tuple[Array, Array]:
    """What each of `size` pixels takes from which of `length`, in tiles of pixels that lie close.

    Args:
        low: int scalar, first of the pixels that are resized.
        high: int scalar, the one after the last.
        length: pixels of the axis.
        size: pixels of the result.
        tile: pixels of the result that share a window of the source.
        bicubic: rather than bilinear.
        antialias: widen the filter where the result has fewer pixels.

    Returns:
        `start` int32 [T] of the windows and `weight` [T, tile, window]; the last pixel is repeated
        where the tiles reach beyond `size`.
    """
    reach = 2 if bicubic else 1
    slope = -0.5 if antialias else -0.75  # what Pillow, and what PyTorch without antialiasing has
    kernel = functools.partial(_cubic, slope=slope) if bicubic else _triangle
    scale = (high - low).astype(jnp.result_type(float)) / size
    stretch = jnp.maximum(scale, 1.0) if antialias else jnp.ones_like(scale)
    widest = max(length / size, 1.0)
    span = (tile - 1) * widest + 2 * reach * (widest if antialias else 1.0)
    window = min(length, math.ceil(span) + 1)

    pixel = np.minimum(np.arange(-(-size // tile) * tile), size - 1).reshape(-1, tile)
    center = (jnp.asarray(pixel, scale.dtype) + 0.5) * scale + low.astype(scale.dtype) - 0.5
    start = jnp.ceil(center[:, 0] - reach * stretch).astype(jnp.int32)
    start = jnp.clip(start, 0, length - window)
    source = start[:, None, None] + jnp.arange(window, dtype=jnp.int32)
    center = center[..., None]
    if antialias:
        weight = kernel((source.astype(center.dtype) - center) / stretch)
        weight = jnp.where((source >= low) & (source < high), weight, 0.0)
        return start, weight / jnp.sum(weight, axis=-1, keepdims=True)
    base, weight = jnp.floor(center), jnp.zeros((*pixel.shape, window), center.dtype)
    for tap in range(1 - reach, reach + 1):
        # Beyond the border lies the pixel at the border again.
        taken = jnp.clip(base.astype(jnp.int32) + tap, low, high - 1) == source
        weight = weight + jnp.where(taken, kernel(base + tap - center), 0.0)
    return start, weight


def _weighted(x: Array, start: Array, weight: Array, axis: int, size: int) -> Array:
    """Sums the windows of `axis` of [H, W, C] by their weights to `size` pixels."""
    equation = ("oh,hwc->owc", "ow,hwc->hoc")[axis]
    whole = x.dtype == jnp.uint8
    if whole:
        # Sums of such products are exact in float32, so that halves round the same everywhere.
        weight = jnp.round(weight * 2.0**15) / 2.0**15

    def tile(step: tuple[Array, Array]) -> Array:
        window = jax.lax.dynamic_slice_in_dim(x, step[0], step[1].shape[-1], axis)
        wide = window.astype(step[1].dtype)
        summed = jnp.einsum(equation, step[1], wide, precision=jax.lax.Precision.HIGHEST)
        # Halves up, as the references.
        return jnp.clip(jnp.floor(summed + 0.5), 0, 255).astype(x.dtype) if whole else summed

    tiles = jnp.moveaxis(jax.lax.map(tile, (start, weight)), 0, axis)
    shape = (*tiles.shape[:axis], -1, *tiles.shape[axis + 2 :])
    return jax.lax.slice_in_dim(tiles.reshape(shape), 0, size, axis=axis)


def resized_box(
    image: Array, box: Array, size: tuple[int, int], interpolation: str, antialias: bool
) -> Array:
    """Crops a box and resizes it: columns first, then rows, with whole levels between on uint8.

    Equals torchvision's `resized_crop` of tensors within one level, bicubic within two; and
    Pillow's crop and `resize`, save that Pillow takes the rows first in boxes many times higher
    than wide.

    Args:
        image: [H, W, C], uint8 or floating.
        box: int [4], half-open (top, left, bottom, right), in the image and not empty.
        size: height and width of the result.
        interpolation: see `resize`.
        antialias: see `resize`.

    Returns:
        [*size, C] in the dtype of `image`.
    """
    low, high = box[:2], box[2:]
    out = image
    for axis in (1, 0):
        length, n = image.shape[axis], size[axis]
        if interpolation == "nearest":
            # Whole numbers: the centre of the pixel, (i + 1/2) * (high - low) / n, rounded down.
            double = 2 * jnp.arange(n, dtype=jnp.int32) + 1
            source = low[axis] + double * (high[axis] - low[axis]) // (2 * n)
            out = jnp.take(out, source, axis=axis, mode="clip")
            continue
        # A matrix has few entries off its diagonal, which a CPU is better off without.
        tile = min(n, _TILE) if on_cpu() else n
        bicubic = interpolation == "bicubic"
        start, weight = _weights(low[axis], high[axis], length, n, tile, bicubic, antialias)
        out = _weighted(out, start, weight.astype(working_dtype(image.dtype)), axis, n)
    if image.dtype != jnp.uint8 and interpolation == "bicubic":
        out = jnp.clip(out, 0.0, 1.0)
    return out.astype(image.dtype)


def resized_boxes(
    image: Array, box: Array, size: tuple[int, int], interpolation: str, antialias: bool
) -> Array:
    """Resizes `n` boxes of every image, see `resized_box`.

    Args:
        image: [B, H, W, C] or [B, T, H, W, C], whose frames share the boxes.
        box: int [B, n, 4].
        size: height and width of the result.
        interpolation: see `resize`.
        antialias: see `resize`.

    Returns:
        [B, n, (T,) *size, C].
    """

    def boxes(example: tuple[Array, Array]) -> Array:
        def one(box: Array) -> Array:
            def frame(x: Array) -> Array:
                return resized_box(x, box, size, interpolation, antialias)

            return per_image(frame, example[0])

        return each(one, example[1])

    return each(boxes, (image, box))


def resize(
    image: Array,
    size: int | tuple[int, int],
    *,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Array:
    """Resizes to a given height and width.

    Equals Pillow's `resize`, and torchvision's with the same `antialias`, within one level, bicubic
    within two. Bicubic results of floats are clipped to [0, 1], which torchvision leaves out.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        size: height and width, or one number for both.
        interpolation: `"nearest"` takes the pixel at the centre (torchvision's `nearest-exact`);
            `"bilinear"` and `"bicubic"` weigh by a triangle or by Keys' cubic with slope -0.5.
        antialias: widen those two where the result has fewer pixels than the image. Without it
            they are PyTorch's, whose cubic has slope -0.75.

    Returns:
        [..., *size, C], in the dtype of `image`.

    Raises:
        ValueError: the size is not positive, or the interpolation unknown.
    """
    image = jnp.asarray(image)
    check_image(image, (3, 4, 5), "image", batched=False)
    wanted = pair_of(size)
    check_interpolation(interpolation)
    batch = image[None] if image.ndim == 3 else image
    box = jnp.asarray((0, 0, *image.shape[-3:-1]), jnp.int32)
    box = jnp.broadcast_to(box, (batch.shape[0], 1, 4))
    out = resized_boxes(batch, box, wanted, interpolation, antialias)[:, 0]
    return out[0] if image.ndim == 3 else out


@image_op
def center_crop(image: Array, size: int | tuple[int, int]) -> Array:
    """Crops the middle; equals torchvision's `center_crop` where the crop fits into the image.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        size: height and width, or one number for both.

    Raises:
        ValueError: the size is not positive, or larger than the image.
    """
    wanted = pair_of(size)
    room = [have - want for have, want in zip(image.shape, wanted, strict=False)]
    if min(room) < 0:
        raise ValueError(
            f"a crop of {wanted[0]} x {wanted[1]} does not fit into an image of "
            f"{image.shape[0]} x {image.shape[1]}; resize the image or lower the size"
        )
    top, left = (round(n / 2) for n in room)  # half a pixel to the even one
    return image[top : top + wanted[0], left : left + wanted[1]]
