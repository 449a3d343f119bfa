"""Erasing parts of images: Cutout's squares, Random Erasing's boxes."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import (
    Augmentation,
    along_batch,
    check_probability,
    entry,
    image_of,
    in_layout,
    pair_of,
    size_of,
    to_dtype,
    working_dtype,
)
from mixlab.augment.mixing.boxes import inside
from mixlab.types import Array, Batch, Key, Plan

_ATTEMPTS = 10


def cutout(
    size: int | tuple[int, int] = 16,
    *,
    count: int = 1,
    fill: float | Sequence[float] = 0,
    prob: float = 1.0,
    per_batch: bool = False,
) -> Augmentation:
    """Cutout: paints a square over every image, around a uniform pixel and clipped to the image.

    Equals the released code: the square reaches `size // 2` to either side of its centre, so an odd
    size loses a pixel. Of 1-D signals a segment is painted over.

    Args:
        size: side of the square in pixels, or height and width.
        count: squares an image.
        fill: colour, one number or one a channel, on the scale 0..255 for floating images too.
        prob: probability that an example (the batch, if `per_batch`) is painted over.
        per_batch: the same square for the whole batch instead of one an example.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] or [B, L, C] (as images of height 1)
        with the plan `box` int32 [B, 4], half-open (top, left, bottom, right), or [B, count, 4] for
        more than one; `use` bool [B]. Labels stay as they are, and so do masks, boxes and
        keypoints.

    Raises:
        ValueError: an argument is out of its range.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout", 2017, section 3.2.
    """
    sides = pair_of(size, least=0)

    def decide(key: Key, draws: tuple[int, int], shape: tuple[int, ...]) -> Array:
        length = jnp.asarray(size_of(shape), jnp.int32)
        center = jax.random.randint(key, (*draws, 2), 0, length, jnp.int32)
        half = jnp.asarray(sides, jnp.int32) // 2
        corners = [jnp.clip(c, 0, length) for c in (center - half, center + half)]
        return jnp.concatenate(corners, axis=-1)

    return _erasing(decide, count, fill, (0.0, 1.0), prob, per_batch)


def random_erasing(
    prob: float = 0.5,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    value: float | Sequence[float] | str = 0,
    *,
    count: int = 1,
    noise: tuple[float, float] = (0.0, 1.0),
    per_batch: bool = False,
) -> Augmentation:
    """Random Erasing: paints over a box of random area and aspect.

    The area is uniform, the logarithm of height over width too; a box that does not fit strictly
    into the image is drawn again, ten times at most, and then left out. Sides are rounded, the
    corner is uniform. The defaults and the law are timm's; `area=(0.02, 0.33), ratio=(0.3, 3.3)` is
    torchvision. Of 1-D signals a segment of that share of the length is painted over.

    Args:
        prob: probability that an example (the batch, if `per_batch`) is painted over.
        area: range of the share of the image, divided by `count`.
        ratio: range of height over width; signals do not use it.
        value: the colour, one number or one a channel, on the scale 0..255 for floating images too;
            `"channel"`: a normal draw a channel (timm's `rand`); `"pixel"`: one a pixel and channel
            (timm's `pixel`, torchvision's `random`).
        count: boxes an image.
        noise: mean and standard deviation of the normal draws, in units of the floating image. The
            default suits normalized images, where both references erase; for images in [0, 1] and
            uint8, (0.5, 0.25) is of their range. uint8 results are clipped.
        per_batch: the same boxes for the whole batch instead of one draw an example.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] or [B, L, C] (as images of height 1)
        with the plan `box` int32 [B, 4], half-open (top, left, bottom, right), or [B, count, 4] for
        more than one, empty if none fitted; `use` bool [B]; if values are drawn, `noise` float32
        [B, 1, 1, C] or [B, H, W, C].

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, algorithm 1; timm
    `RandomErasing`, torchvision `RandomErasing`.
    """
    if len(area) != 2 or not 0.0 <= area[0] <= area[1] <= 1.0:
        raise ValueError(f"area is a pair 0 <= min <= max <= 1, got {area!r}")
    if len(ratio) != 2 or not 0.0 < ratio[0] <= ratio[1] < np.inf:
        raise ValueError(f"ratio is a pair 0 < min <= max, got {ratio!r}")
    if len(noise) != 2 or not (np.isfinite(noise[0]) and 0.0 <= noise[1] < np.inf):
        raise ValueError(f"noise is a finite mean and a standard deviation >= 0, got {noise!r}")

    def decide(key: Key, draws: tuple[int, int], shape: tuple[int, ...]) -> Array:
        area_key, ratio_key, corner_key = jax.random.split(key, 3)
        extent, signal, tries = size_of(shape), len(shape) == 3, (*draws, _ATTEMPTS)
        share = jax.random.uniform(area_key, tries, minval=area[0], maxval=area[1])
        low, high = np.log(ratio)
        aspect = jnp.exp(jax.random.uniform(ratio_key, tries, minval=low, maxval=high))
        pixels = share * float(extent[0] * extent[1] / count)
        sides = [jnp.sqrt(pixels * aspect), jnp.sqrt(pixels / aspect)]
        if signal:
            sides = [jnp.ones_like(pixels), pixels]
        side = jnp.round(jnp.stack(sides, axis=-1)).astype(jnp.int32)
        length = jnp.asarray(extent, jnp.int32)
        # A segment has the height of the signal, so that only its other side can be too long.
        fits = jnp.all((side < length)[..., int(signal) :], axis=-1)
        first = jnp.argmax(fits, axis=-1)[..., None, None]
        side = jnp.take_along_axis(side, first, axis=-2)[..., 0, :]
        side = jnp.where(jnp.any(fits, axis=-1)[..., None], side, 0)
        corner = jax.random.randint(corner_key, side.shape, 0, length - side + 1, jnp.int32)
        return jnp.concatenate([corner, corner + side], axis=-1)

    return _erasing(decide, count, value, noise, prob, per_batch)


def _erasing(
    decide: Callable[[Key, tuple[int, int], tuple[int, ...]], Array],
    count: int,
    value: float | Sequence[float] | str,
    noise: tuple[float, float],
    prob: float,
    per_batch: bool,
) -> Augmentation:
    """The frame of both: `decide(key, (n, count), image shape)` draws the boxes, [n, count, 4]."""
    check_probability("prob", prob)
    if count < 1 or count != int(count):
        raise ValueError(f"count is a whole number of at least 1, got {count!r}")
    if isinstance(value, str) and value not in ("channel", "pixel"):
        raise ValueError(f"value is a colour, 'channel' or 'pixel', got {value!r}")

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=(3, 4, 5))
        size, channels = image.shape[0], image.shape[-1]
        draws = 1 if per_batch else size
        box_key, use_key, noise_key = jax.random.split(key, 3)
        box = decide(box_key, (draws, count), image.shape)
        plan = {
            "box": box[:, 0] if count == 1 else box,
            "use": jax.random.uniform(use_key, (draws,)) < prob,
        }
        if isinstance(value, str):
            extent = (1, 1) if value == "channel" else size_of(image.shape)
            drawn = jax.random.normal(noise_key, (draws, *extent, channels), jnp.float32)
            plan["noise"] = noise[0] + noise[1] * drawn
        return {name: jnp.broadcast_to(x, (size, *x.shape[1:])) for name, x in plan.items()}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(3, 4, 5))
        size, channels = image.shape[0], image.shape[-1]
        each = (size, 4) if count == 1 else (size, count, 4)
        box = entry(plan, "box", each, jnp.int32).reshape(size, count, 4)
        use = entry(plan, "use", (size,), default=True)
        erased = jnp.any(inside(box, size_of(image.shape)), axis=1) & along_batch(use, box)
        dtype = working_dtype(image.dtype)
        scale = 255.0 if image.dtype == jnp.uint8 else 1.0
        if isinstance(value, str):
            paint = jnp.asarray(plan["noise"]).astype(dtype) * scale
        else:
            color = np.atleast_1d(np.asarray(value, np.float64)) * (scale / 255.0)
            if color.ndim != 1 or color.size not in (1, channels):
                raise ValueError(
                    f"the colour is one number or one a channel, got {value!r} for {channels} "
                    "channels"
                )
            paint = jnp.asarray(color, dtype)[None, None, None]
        paint = in_layout(to_dtype(paint, image.dtype), image)
        erased = in_layout(erased[..., None], image)
        return {**batch, "image": jnp.where(erased, paint, image)}

    return Augmentation(sample, apply)
