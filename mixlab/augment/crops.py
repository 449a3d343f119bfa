"""The plain parts of a pipeline: random crops and flips, scaling and normalization."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment import targets
from mixlab.augment.core import (
    Augmentation,
    along_batch,
    as_images,
    check_probability,
    entry,
    image_of,
    pair_of,
    size_of,
    working_dtype,
)
from mixlab.augment.ops.resized import check_interpolation, resized_boxes
from mixlab.spec import nearest
from mixlab.types import Array, Batch, Key, Plan

_ATTEMPTS = 10


def _no_decision(key: Key, batch: Batch) -> Plan:
    del key, batch
    return {}


def random_crop(
    size: int | tuple[int, int] | None = None, padding: int = 4, mode: str = "constant"
) -> Augmentation:
    """Pads the image on all sides and crops it at a uniform position, drawn for each example.

    Equals torchvision `RandomCrop(size, padding, padding_mode=mode)` given the same offset. 1-D
    signals are padded and cropped along their length, as images of height 1.

    Args:
        size: height and width of the result, one number for both (for signals: their length), or
            None for the image's own.
        padding: pixels added on each of the four sides; at the two ends of a signal.
        mode: `"constant"` pads with 0; `"reflect"` mirrors without repeating the border.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] or [B, L, C] with the plan `offset`
        int32 [B, 2], top and left of the crop in the padded image.

    Raises:
        ValueError: an unknown mode, a negative padding, or (when applied) a crop larger than the
            padded image, or a reflection wider than the image.
    """
    known = ("constant", "reflect")
    if mode not in known:
        raise ValueError(f"unknown padding mode {mode!r}; {nearest(str(mode), known)}")
    if padding < 0 or padding != int(padding):
        raise ValueError(f"padding is a whole number of pixels, at least 0, got {padding}")
    wanted = None if size is None else pair_of(size)

    def axes_of(image: Array) -> list[tuple[int, int, int]]:
        """Pixels, padding and pixels of the crop, of rows and of columns."""
        signal = image.ndim == 3
        height, width = size_of(image.shape)
        rows, columns = wanted or (height, width)
        if signal and size is not None and np.ndim(size) == 0:
            rows = 1
        above = 0 if signal else padding
        if rows > height + 2 * above or columns > width + 2 * padding:
            raise ValueError(
                f"a crop of {rows} x {columns} does not fit into an image of {height} x {width} "
                f"with padding {padding}; raise the padding or lower the size"
            )
        if mode == "reflect" and (above >= height or padding >= width):
            raise ValueError(
                f"reflecting {padding} pixels takes an image of at least {padding + 1} pixels a "
                f"side, got {height} x {width}"
            )
        return [(height, above, rows), (width, padding, columns)]

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=(3, 4, 5))
        room = [full + 2 * border - length + 1 for full, border, length in axes_of(image)]
        offset = jax.random.randint(
            key, (image.shape[0], 2), 0, jnp.asarray(room, jnp.int32), jnp.int32
        )
        return {"offset": offset}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(3, 4, 5))
        offset = entry(plan, "offset", (image.shape[0], 2), jnp.int32)
        _, border, length = zip(*axes_of(image), strict=True)
        start = offset - np.asarray(border, np.int32)

        def crop(x: Array) -> Array:
            for axis in (0, 1):
                x = _crop_axis(x, start[:, axis], length[axis], axis + 1, mode)
            return x

        def move(x: Array) -> Array:
            return as_images(crop, x)

        moved = targets.upright_matrix(offset=(start[:, 0], start[:, 1]), size=len(start))
        return targets.follow(batch, move(image), move, [moved])

    return Augmentation(sample, apply)


def _crop_axis(image: Array, start: Array, length: int, axis: int, mode: str) -> Array:
    """Takes `length` entries of `axis` from `start` [B] on, padded where they lie outside."""
    full = image.shape[axis]
    index = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    shape = tuple(n if i in (0, 1) else 1 for i, n in enumerate((len(start), length, 1, 1)))
    if axis == 2:
        shape = (shape[0], 1, length, 1)
    if mode == "reflect":
        index = jnp.abs(index)
        index = jnp.where(index >= full, 2 * (full - 1) - index, index)
    within = ((index >= 0) & (index < full)).reshape(shape)
    taken = jnp.take_along_axis(
        image, jnp.clip(index, 0, full - 1).reshape(shape), axis=axis, mode="promise_in_bounds"
    )
    return taken if mode == "reflect" else jnp.where(within, taken, jnp.zeros_like(taken))


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
        box = entry(plan, "box", (image.shape[0], 4), jnp.int32)
        crop = resized_boxes(image, box[:, None], wanted, interpolation, antialias)[:, 0]
        return follow_box(batch, crop, box, wanted)

    return Augmentation(sample, apply)


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


def random_flip(p: float = 0.5, *, vertical: bool = False) -> Augmentation:
    """Mirrors examples left to right, or upside down; 1-D signals along their length.

    Equals torchvision `RandomHorizontalFlip` and `RandomVerticalFlip`, with a draw an example.
    Keypoints move, and keep their order: which of them is left and which right is the caller's.

    Args:
        p: probability for each example.
        vertical: exchange top and bottom rather than left and right.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] or, unless `vertical`, [B, L, C]
        with the plan `use` bool [B].

    Raises:
        ValueError: `p` is no probability.
    """
    check_probability("p", p)
    axis = -3 if vertical else -2
    ranks = (4, 5) if vertical else (3, 4, 5)

    def sample(key: Key, batch: Batch) -> Plan:
        size = image_of(batch, ranks=ranks).shape[0]
        return {"use": jax.random.uniform(key, (size,)) < p}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=ranks)
        use = entry(plan, "use", image.shape[:1])

        def flip(x: Array) -> Array:
            return jnp.where(along_batch(use, x), jnp.flip(x, axis=axis), x)

        sign, edge = (jnp.where(use, v, w) for v, w in ((-1.0, 1.0), (image.shape[axis], 0.0)))
        moved = targets.upright_matrix(
            scale=(sign, 1.0) if vertical else (1.0, sign),
            offset=(edge, 0.0) if vertical else (0.0, edge),
            size=image.shape[0],
        )
        return targets.follow(batch, flip(image), flip, [moved])

    return Augmentation(sample, apply)


def to_float() -> Augmentation:
    """Turns uint8 images in 0..255 into float32 in [0, 1]; floating images stay as they are."""

    def apply(plan: Plan, batch: Batch) -> Batch:
        del plan
        image = image_of(batch, ranks=(3, 4, 5))
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 255.0
        return {**batch, "image": image}

    return Augmentation(_no_decision, apply)


def normalize(mean: float | Sequence[float], std: float | Sequence[float]) -> Augmentation:
    """Subtracts the mean and divides by the standard deviation of each channel.

    Equals torchvision `Normalize`, after `to_float`.

    Args:
        mean: one number, or one a channel, for images in [0, 1].
        std: likewise, positive.

    Returns:
        An augmentation with an empty plan. uint8 images become float32 in [0, 1] first; floating
        images keep their dtype.

    Raises:
        ValueError: `std` is not positive, or (when applied) the numbers do not fit the channels.
    """
    center, scale = (np.atleast_1d(np.asarray(v, np.float64)) for v in (mean, std))
    if not (np.all(np.isfinite(center)) and np.all(scale > 0) and np.all(np.isfinite(scale))):
        raise ValueError(f"normalize takes finite means and positive stds, got {mean!r}, {std!r}")

    def apply(plan: Plan, batch: Batch) -> Batch:
        batch = to_float().apply(plan, batch)
        image = batch["image"]
        for name, v in (("mean", center), ("std", scale)):
            if v.ndim != 1 or v.size not in (1, image.shape[-1]):
                raise ValueError(
                    f"normalize: {name} has {v.size} entries for {image.shape[-1]} channels"
                )
        wide = image.astype(working_dtype(image.dtype))
        scaled = (wide - jnp.asarray(center, wide.dtype)) / jnp.asarray(scale, wide.dtype)
        return {**batch, "image": scaled.astype(image.dtype)}

    return Augmentation(_no_decision, apply)
