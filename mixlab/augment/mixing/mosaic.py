"""Pictures put together from tiles: mosaics of several images, and jigsaws of one."""

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
    soft_label_of,
    working_dtype,
)
from mixlab.types import Array, Batch, Key, Plan


def mosaic(
    start: tuple[float, float] = (0.3, 0.7), *, prob: float = 1.0, per_batch: bool = False
) -> Augmentation:
    """Mosaic: a window onto four examples that stand two by two, labels mixed by area.

    The example itself stands top left, its partners to the right, below, and diagonally. A window
    of the size of one image is cut from the four; its top left corner lies at a share of height and
    width drawn from `start`, independently. In the manner of kornia `RandomMosaic` with its 2 x 2
    grid, where the first partner stands below and no labels are mixed.

    Args:
        start: range of the two shares, within [0, 1].
        prob: probability that an example (the batch, if `per_batch`) becomes a mosaic.
        per_batch: one window for the whole batch instead of one an example.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] (one window for all T) with the
        plan `partner` int32 [B, 3]; `corner` int32 [B, 2], top and left of the window; `lam`
        float32 [B], the example's own share of the area; `use` bool [B]. `apply` takes the weights
        of the labels from `corner`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Bochkovskiy et al., "YOLOv4", 2020, section 3.3.
    """
    check_probability("prob", prob)
    if len(start) != 2 or not 0.0 <= start[0] <= start[1] <= 1.0:
        raise ValueError(f"start is a pair 0 <= min <= max <= 1, got {start!r}")

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=(4, 5))
        size, (height, width) = len(image), size_of(image.shape)
        draws = 1 if per_batch else size
        partner_key, corner_key, use_key = jax.random.split(key, 3)
        keys = jax.random.split(partner_key, 3)
        partner = jnp.stack([jax.random.permutation(k, size) for k in keys], axis=1)
        share = jax.random.uniform(corner_key, (draws, 2), minval=start[0], maxval=start[1])
        length = jnp.asarray([height, width], jnp.float32)
        corner = jnp.broadcast_to(jnp.floor(share * length).astype(jnp.int32), (size, 2))
        use = jax.random.uniform(use_key, (draws,)) < prob
        return {
            "partner": partner.astype(jnp.int32),
            "corner": corner,
            "lam": _shares(corner, height, width)[:, 0],
            "use": jnp.broadcast_to(use, (size,)),
        }

    def apply(plan: Plan, batch: Batch) -> Batch:
        image, label = image_of(batch, ranks=(4, 5)), soft_label_of(batch)
        size, (height, width) = len(image), size_of(image.shape)
        use = entry(plan, "use", (size,), default=True)
        corner = entry(plan, "corner", (size, 2), jnp.int32)
        corner = jnp.where(use[:, None], corner, 0)
        own = jnp.arange(size, dtype=jnp.int32)[:, None]
        members = jnp.concatenate([own, entry(plan, "partner", (size, 3), jnp.int32)], axis=1)
        row = corner[:, :1] + jnp.arange(height, dtype=jnp.int32)
        column = corner[:, 1:] + jnp.arange(width, dtype=jnp.int32)
        lower, further = (row >= height)[:, :, None], (column >= width)[:, None, :]
        tile = 2 * lower.astype(jnp.int32) + further.astype(jnp.int32)
        source = jnp.take_along_axis(members, tile.reshape(size, -1), axis=1).reshape(tile.shape)
        place = (source, (row % height)[:, :, None], (column % width)[:, None, :])

        def window(x: Array) -> Array:
            return as_images(lambda images: images[place], x)

        def moved(i: int, j: int) -> targets.Move:
            start = jnp.asarray((i * height, j * width), jnp.int32) - corner
            return lambda points: points + start[:, None].astype(points.dtype)

        seen = jnp.stack([(tile == i).astype(jnp.float32) for i in range(4)])
        batch = {
            **batch,
            **targets.union(
                batch, image, members[:, 1:], seen, [moved(i, j) for i in (0, 1) for j in (0, 1)]
            ),
            "image": window(image),
        }
        if (mask := targets.mask_of(batch, image)) is not None:
            batch["mask"] = window(mask.reshape(*image.shape[:-1], -1)).reshape(mask.shape)
        if label is not None:
            weights = _shares(corner, height, width).astype(working_dtype(label.dtype))
            labels = label[members].astype(weights.dtype)
            batch["label"] = jnp.sum(weights[..., None] * labels, axis=1).astype(label.dtype)
        return batch

    return Augmentation(sample, apply)


def _shares(corner: Array, height: int, width: int) -> Array:
    """The areas of the four tiles in the window at `corner` [B, 2], float32 [B, 4]."""
    down = corner[:, 0].astype(jnp.float32) / height
    right = corner[:, 1].astype(jnp.float32) / width
    return jnp.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=1
    )


def jigsaw(grid: int | tuple[int, int] = 4, *, prob: float = 1.0) -> Augmentation:
    """Jigsaw: cuts every image into tiles and puts them back in a random order.

    Its kind is kornia's `RandomJigsaw`; labels stay. 1-D signals are cut into segments.

    Args:
        grid: tiles along height and width, one number for both (for signals: their segments) or a
            pair.
        prob: probability for each example.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] (one order for all T) or [B, L, C]
        with the plan `order` int32 [B, tiles], which tile comes to each place, row by row, and
        `use` bool [B].

    Raises:
        ValueError: an argument is out of its range, or (when applied) the tiles do not divide the
            image, or the batch has boxes or keypoints.

    Source: Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw
    Puzzles", ECCV 2016, section 3.
    """
    check_probability("prob", prob)
    rows, columns = pair_of(grid, "grid")

    def cut(batch: Batch) -> tuple[Array, tuple[int, int], tuple[int, int]]:
        """The image, the tiles along its height and width, and the height and width of a tile."""
        image = image_of(batch, ranks=(3, 4, 5))
        height, width = size_of(image.shape)
        tiles = (1, columns) if image.ndim == 3 and np.ndim(grid) == 0 else (rows, columns)
        if height % tiles[0] or width % tiles[1]:
            raise ValueError(
                f"a jigsaw of {tiles[0]} x {tiles[1]} tiles does not divide an image of "
                f"{height} x {width}; change grid, or resize the image"
            )
        return image, tiles, (height // tiles[0], width // tiles[1])

    def sample(key: Key, batch: Batch) -> Plan:
        image, (down, across), _ = cut(batch)
        size = len(image)
        order_key, use_key = jax.random.split(key)
        tiles = jnp.broadcast_to(jnp.arange(down * across, dtype=jnp.int32), (size, down * across))
        return {
            "order": jax.random.permutation(order_key, tiles, axis=1, independent=True),
            "use": jax.random.uniform(use_key, (size,)) < prob,
        }

    def apply(plan: Plan, batch: Batch) -> Batch:
        image, (down, across), tile = cut(batch)
        size = len(image)
        order = entry(plan, "order", (size, down * across), jnp.int32)[:, :, None]
        use = entry(plan, "use", (size,), default=True)

        def shuffle(x: Array) -> Array:
            tiles = x.reshape(size, down, tile[0], across, tile[1], -1).swapaxes(2, 3)
            tiles = tiles.reshape(size, down * across, -1)
            tiles = jnp.take_along_axis(tiles, order, axis=1, mode="promise_in_bounds")
            tiles = tiles.reshape(size, down, across, *tile, -1).swapaxes(2, 3)
            return jnp.where(along_batch(use, x), tiles.reshape(x.shape), x)

        def move(x: Array) -> Array:
            return as_images(shuffle, x)

        targets.refuse(batch, ("boxes", "keypoints"), "a jigsaw tears apart what they are of")
        return targets.follow(batch, move(image), move, [])

    return Augmentation(sample, apply)
