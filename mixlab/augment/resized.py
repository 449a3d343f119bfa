"""Boxes resized to one size: what crops of random size are made of, and the op `resize`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment import targets
from mixlab.augment.core import (
    Augmentation,
    check_image,
    image_of,
    working_dtype,
)
from mixlab.augment.photometric import image_op
from mixlab.spec import nearest
from mixlab.types import Array, Batch, Key, Plan, PyTree

_ATTEMPTS = 10
_TILE = 32
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def pair_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width from one number for both or a pair.

    Raises:
        ValueError: it is neither, or not positive.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(n, int) and n >= 1 for n in sides):
        raise ValueError(f"size is one positive whole number or a pair, got {size!r}")
    return sides


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


def for_each(f: Callable[[Any], Array], xs: PyTree) -> Array:
    """Maps `f` over the leading axis.

    One after the other, an image stays in the cache of a CPU; an accelerator takes all at once.
    """
    return jax.lax.map(f, xs) if jax.default_backend() == "cpu" else jax.vmap(f)(xs)


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
        tile = min(n, _TILE) if jax.default_backend() == "cpu" else n
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

            return frame(example[0]) if image.ndim == 4 else for_each(frame, example[0])

        return for_each(one, example[1])

    return for_each(boxes, (image, box))


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
        image: uint8 or floating, [H, W, C] or [B, H, W, C].
        size: height and width, or one number for both.
        interpolation: `"nearest"` takes the pixel at the centre (torchvision's `nearest-exact`);
            `"bilinear"` and `"bicubic"` weigh by a triangle or by Keys' cubic with slope -0.5.
        antialias: widen those two where the result has fewer pixels than the image. Without it
            they are PyTorch's, whose cubic has slope -0.75.

    Returns:
        [*size, C] or [B, *size, C], in the dtype of `image`.

    Raises:
        ValueError: the size is not positive, or the interpolation unknown.
    """
    image = jnp.asarray(image)
    check_image(image, (3, 4), "image")
    wanted = pair_of(size)
    check_interpolation(interpolation)
    batch = image[None] if image.ndim == 3 else image
    box = jnp.asarray((0, 0, *batch.shape[1:3]), jnp.int32)
    box = jnp.broadcast_to(box, (batch.shape[0], 1, 4))
    out = resized_boxes(batch, box, wanted, interpolation, antialias)[:, 0]
    return out[0] if image.ndim == 3 else out


@image_op
def center_crop(image: Array, size: int | tuple[int, int]) -> Array:
    """Crops the middle; equals torchvision's `center_crop` where the crop fits into the image.

    Args:
        image: uint8 or floating, [H, W, C] or [B, H, W, C].
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


def check_area(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raises a `ValueError` unless both are ranges that boxes can be drawn from."""
    if len(scale) != 2 or not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise ValueError(f"scale is a pair 0 < min <= max <= 1 of shares of the area, got {scale}")
    if len(ratio) != 2 or not 0.0 < ratio[0] <= ratio[1] < np.inf:
        raise ValueError(f"ratio is a pair 0 < min <= max of width over height, got {ratio}")


def random_boxes(
    key: Key,
    shape: tuple[int, ...],
    extent: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Array:
    """The boxes of torchvision's `RandomResizedCrop`, int32 [*shape, 4].

    Args:
        key: typed PRNG key.
        shape: of the draws.
        extent: height and width of the image.
        scale: range of the share of the image's area.
        ratio: range of width over height.
    """
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    draws = (*shape, _ATTEMPTS)
    height, width = extent
    area = jax.random.uniform(area_key, draws, minval=scale[0], maxval=scale[1]) * (height * width)
    low, high = np.log(ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_key, draws, minval=low, maxval=high))
    side = jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)], axis=-1)
    side = jnp.round(side).astype(jnp.int32)
    length = jnp.asarray(extent, jnp.int32)
    fits = jnp.all((side > 0) & (side <= length), axis=-1)
    first = jnp.argmax(fits, axis=-1)[..., None, None]
    side = jnp.take_along_axis(side, first, axis=-2)[..., 0, :]
    corner = jax.random.randint(corner_key, side.shape, 0, length - side + 1, jnp.int32)

    # Where none of the draws fits: the largest box in the middle that has an allowed ratio.
    if width / height < ratio[0]:
        largest = (round(width / ratio[0]), width)
    elif width / height > ratio[1]:
        largest = (height, round(height * ratio[1]))
    else:
        largest = extent
    middle = jnp.asarray([(n - m) // 2 for n, m in zip(extent, largest, strict=True)], jnp.int32)
    found = jnp.any(fits, axis=-1)[..., None]
    side = jnp.where(found, side, jnp.asarray(largest, jnp.int32))
    corner = jnp.where(found, corner, middle)
    return jnp.concatenate([corner, corner + side], axis=-1)


def follow_box(batch: Batch, image: Array, box: Array, size: tuple[int, int]) -> Batch:
    """The batch with the resized box [B, 4] as its image, and its targets moved likewise."""

    def move(mask: Array) -> Array:
        return resized_boxes(mask, box[:, None], size, "nearest", False)[:, 0]

    corner = box.astype(jnp.float32)
    scale = [(corner[:, i + 2] - corner[:, i]) / size[i] for i in (0, 1)]
    moved = targets.upright_matrix(
        scale=(scale[0], scale[1]), offset=(corner[:, 0], corner[:, 1]), size=len(box)
    )
    return targets.follow(batch, image, move, [moved])


def random_resized_crop(
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Augmentation:
    """Crops a box of random area and aspect and resizes it to one size.

    The area is uniform, the logarithm of width over height too, sides are rounded, the corner is
    uniform. A box that does not fit is drawn again, ten times at most; then it is the largest one
    in the middle whose aspect is in range. Equals torchvision `RandomResizedCrop` in everything
    but the random numbers; mirroring is apart: `random_resized_crop(224) | random_flip()`.

    Args:
        size: height and width of the result, one number for both.
        scale: range of the share of the image's area.
        ratio: range of width over height.
        interpolation: `"nearest"`, `"bilinear"` or `"bicubic"`, see `ops.resize`.
        antialias: widen the filter where the crop is larger than the result, see `ops.resize`.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `box` int32 [B, 4],
        half-open (top, left, bottom, right).

    Raises:
        ValueError: an argument is out of its range.

    Source: Szegedy et al., "Going Deeper with Convolutions", 2015, section 6; torchvision
    `RandomResizedCrop`.
    """
    wanted = pair_of(size)
    check_area(scale, ratio)
    check_interpolation(interpolation)

    def sample(key: Key, batch: Batch) -> Plan:
        shape = image_of(batch, ranks=(4, 5)).shape
        return {"box": random_boxes(key, shape[:1], (shape[-3], shape[-2]), scale, ratio)}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(4, 5))
        box = jnp.broadcast_to(jnp.asarray(plan["box"], jnp.int32), (image.shape[0], 4))
        crop = resized_boxes(image, box[:, None], wanted, interpolation, antialias)[:, 0]
        return follow_box(batch, crop, box, wanted)

    return Augmentation(sample, apply)
