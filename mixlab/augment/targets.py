"""What travels with the pixels: segmentation masks, bounding boxes and keypoints.

Besides `image` and `label` a batch may hold, all with leading axis B:

| leaf | shape | meaning |
|---|---|---|
| `mask` | [B, H, W] or [B, H, W, M] | a class a pixel, or M channels (one-hot, instances) |
| `boxes` | [B, N, 4] | top, left, bottom, right in pixels; where there is no area, no box |
| `box_...` | [B, N, ...] | what belongs to the boxes, as `box_label` |
| `keypoints` | [B, P, 2] or [B, P, 3] | row and column in pixels; visibility, above 0 if seen |
| `keypoint_...` | [B, P, ...] | what belongs to the keypoints |

Boxes and keypoints are floating, (0, 0) is the outer corner of the first pixel and (H, W) that of
the last. Masks also go with videos and signals, [B, T, H, W] and [B, L]. A `mask` of rank one, as
some pipelines mark padded examples, is no segmentation and stays as it is.

Ops that move pixels move all of these. Masks are never interpolated, and are 0 where nothing of the
image is. A box becomes the smallest upright one around its moved corners, cut to the image; boxes
that left it are all zeros. A keypoint out of the image is not seen. `jigsaw` refuses boxes and
keypoints, `multi_crop` all three, and `augmix` leaves them as they are.

Ops that mix images give the union: N of the example and N of each partner, with `box_weight` and
`keypoint_weight` that say how much of each is there to be seen. A mask is mixed as the pixels are:
whole numbers where every pixel comes from one image, one-hot floats anywhere.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mixlab.augment.core import working_dtype
from mixlab.types import Array, Batch

Move = Callable[[Array], Array]
"""Moves pixels without interpolating: [B, H, W, M] to [B, H', W', M], videos likewise."""


def mask_of(batch: Batch, image: Array) -> Array | None:
    """The segmentation of a batch, or None where there is none.

    Raises:
        ValueError: its shape does not fit the image's.
    """
    mask = batch.get("mask")
    if mask is None or jnp.ndim(mask) < 2:
        return None
    mask = jnp.asarray(mask)
    if mask.shape[: image.ndim - 1] != image.shape[:-1] or mask.ndim > image.ndim:
        raise ValueError(
            f"'mask' must have the shape of the image without its channels, {image.shape[:-1]}, or "
            f"channels of its own besides, got {mask.shape}; rename a leaf that is no segmentation"
        )
    return mask


def _points_of(batch: Batch, name: str, widths: tuple[int, ...], image: Array) -> Array | None:
    points = batch.get(name)
    if points is None:
        return None
    points = jnp.asarray(points)
    if image.ndim != 4:
        raise ValueError(f"{name!r} go with images [B, H, W, C], but 'image' is {image.shape}")
    shape = points.shape
    if len(shape) != 3 or shape[0] != image.shape[0] or shape[2] not in widths:
        last = " or ".join(map(str, widths))
        raise ValueError(f"{name!r} must be [{image.shape[0]}, number, {last}], got {shape}")
    if not jnp.issubdtype(points.dtype, jnp.floating):
        raise TypeError(f"{name!r} must be floating pixels, got {points.dtype}")
    return points


def boxes_of(batch: Batch, image: Array) -> Array | None:
    """The bounding boxes [B, N, 4] of a batch, or None.

    Raises:
        ValueError: a shape other than that, or images that are not [B, H, W, C].
        TypeError: they are not floating.
    """
    return _points_of(batch, "boxes", (4,), image)


def keypoints_of(batch: Batch, image: Array) -> Array | None:
    """The keypoints [B, P, 2] or [B, P, 3] of a batch, or None; raises as `boxes_of`."""
    return _points_of(batch, "keypoints", (2, 3), image)


def refuse(batch: Batch, names: Sequence[str], why: str) -> None:
    """Raises a `ValueError` if the batch has one of the targets `names`, and says why."""
    for name in names:
        if batch.get(name) is not None and jnp.ndim(batch[name]) > 1:
            raise ValueError(f"{why}, so it cannot move {name!r}; apply it to a batch without")


# Moving.


def upright_matrix(
    *,
    scale: tuple[Array | float, Array | float] = (1.0, 1.0),
    offset: tuple[Array | float, Array | float] = (0.0, 0.0),
    size: int,
) -> Array:
    """Where pixels come from: the source of (row, column) is scale * (row, column) + offset.

    Args:
        scale: along rows and columns, each a scalar or [B].
        offset: likewise, in pixels of the source.
        size: B.

    Returns:
        float32 [B, 2, 3], as `Space.matrices` has them: rows (a, b, c) for x and then y.
    """
    rows, columns = (
        [jnp.broadcast_to(jnp.asarray(v, jnp.float32), (size,)) for v in (scale[i], offset[i])]
        for i in (0, 1)
    )
    zero = jnp.zeros((size,), jnp.float32)
    entries = [columns[0], zero, columns[1], zero, rows[0], rows[1]]
    return jnp.stack(entries, axis=-1).reshape(size, 2, 3)


def follow(batch: Batch, image: Array, move: Move, matrices: Sequence[Array]) -> Batch:
    """The batch with its image moved, and everything that belongs to it moved likewise.

    Args:
        batch: before.
        image: after.
        move: moves a mask as the image was moved, without interpolating.
        matrices: float32 [B, 2, 3] of each step, as in `upright_matrix`; the first came first.

    Returns:
        The batch after.
    """
    before = jnp.asarray(batch["image"])
    result = {**batch, "image": image}
    mask = mask_of(batch, before)
    if mask is not None:
        flat = mask.ndim < before.ndim
        moved = move(mask[..., None] if flat else mask)
        result["mask"] = moved[..., 0] if flat else moved
    boxes, keypoints = boxes_of(batch, before), keypoints_of(batch, before)
    sizes = ((before.shape[1], before.shape[2]), (image.shape[1], image.shape[2]))
    if boxes is not None:
        result["boxes"] = jax.vmap(lambda b, m: _moved_boxes(b, m, *sizes))(boxes, matrices)
    if keypoints is not None:
        result["keypoints"] = jax.vmap(lambda p, m: _moved_points(p, m, *sizes))(
            keypoints, matrices
        )
    return result


def _forward(matrix: Array, points: Array) -> Array:
    """Where points [..., 2] of the source, (row, column), come to."""
    (a, b, c), (d, e, f) = matrix.astype(points.dtype)
    y, x = points[..., 0] - f, points[..., 1] - c
    determinant = a * e - b * d
    return jnp.stack([a * y - d * x, e * x - b * y], axis=-1) / determinant


def _corners(boxes: Array) -> Array:
    """The four corners of boxes [..., 4], as [..., 4, 2]."""
    top, left, bottom, right = (boxes[..., i] for i in range(4))
    pairs = [(top, left), (top, right), (bottom, left), (bottom, right)]
    return jnp.stack([jnp.stack(pair, axis=-1) for pair in pairs], axis=-2)


def _around(corners: Array) -> Array:
    """The smallest boxes [..., 4] around corners [..., 4, 2]."""
    return jnp.concatenate([jnp.min(corners, axis=-2), jnp.max(corners, axis=-2)], axis=-1)


def _cut(boxes: Array, window: Array) -> Array:
    """Boxes cut to a window; all zeros where nothing is left."""
    low = jnp.maximum(boxes[..., :2], window[..., :2])
    high = jnp.minimum(boxes[..., 2:], window[..., 2:])
    some = jnp.all(high > low, axis=-1, keepdims=True)
    return jnp.where(some, jnp.concatenate([low, high], axis=-1), 0.0)


def _moved_boxes(
    boxes: Array, matrices: Sequence[Array], before: tuple[int, int], after: tuple[int, int]
) -> Array:
    frame = jnp.asarray((0, 0, *before), boxes.dtype)
    corners = _corners(boxes)
    windows: list[Array] = []  # what each step left of the picture
    for matrix in matrices:
        windows = [_forward(matrix, window) for window in [*windows, _corners(frame)]]
        corners = _forward(matrix, corners)
        frame = jnp.asarray((0, 0, *after), boxes.dtype)
    moved = _around(corners)
    for window in [*map(_around, windows), frame]:
        moved = _cut(moved, window)
    return jnp.where(_exists(boxes)[:, None], moved, 0.0)


def _exists(boxes: Array) -> Array:
    return jnp.all(boxes[..., 2:] > boxes[..., :2], axis=-1)


def _within(points: Array, size: tuple[int, ...]) -> Array:
    edge = jnp.asarray(size, points.dtype)
    return jnp.all((points >= 0) & (points < edge), axis=-1)


def _moved_points(
    keypoints: Array, matrices: Sequence[Array], before: tuple[int, int], after: tuple[int, int]
) -> Array:
    points = keypoints[:, :2]
    seen = _within(points, before)
    for matrix in matrices:
        points = _forward(matrix, points)
        seen = seen & _within(points, after)
    return _with_visibility(keypoints, points, seen)


def _with_visibility(keypoints: Array, points: Array, seen: Array) -> Array:
    if keypoints.shape[-1] == 2:
        return points
    return jnp.concatenate([points, jnp.where(seen[..., None], keypoints[..., 2:], 0.0)], axis=-1)


# Mixing.


def pick(mask: Array, other: Array, keep: Array, *, whole: bool) -> Array:
    """The mask of a mixture of two images.

    Args:
        mask: of the example, [B, H, W] or [B, H, W, M].
        other: of its partner.
        keep: the weight of the example's own pixel, [B, H, W] or what broadcasts to it.
        whole: whether every pixel comes from one image alone.

    Returns:
        Floats weighed by `keep`; anything else from the image that the pixel comes from.

    Raises:
        TypeError: the mask holds classes, and pixels are blended.
    """
    keep = keep.reshape(keep.shape + (1,) * (mask.ndim - keep.ndim))
    if jnp.issubdtype(mask.dtype, jnp.floating) and not whole:
        dtype = working_dtype(mask.dtype)
        weight = keep.astype(dtype)
        mixed = weight * mask.astype(dtype) + (1.0 - weight) * other.astype(dtype)
        return mixed.astype(mask.dtype)
    if not whole:
        raise TypeError(
            f"'mask' holds classes ({mask.dtype}), but here pixels are blended; make it one-hot "
            "floats [B, H, W, M]: jax.nn.one_hot(mask, M)"
        )
    return jnp.where(keep if keep.dtype == bool else keep >= 0.5, mask, other)


def union(
    batch: Batch, image: Array, partners: Array, keeps: Array, moves: Sequence[Move] = ()
) -> Batch:
    """The boxes and keypoints of an example and its partners, with what is seen of each.

    Args:
        batch: before.
        image: its image, [B, H, W, C].
        partners: int [B, k].
        keeps: [k + 1, B, H, W], the weight of the example's own pixels, then of each partner's.
        moves: how the points [B, n, 2] of the example and of each partner come into the mixture;
            none: they stay.

    Returns:
        The leaves that change: `boxes` [B, (k + 1) N, 4], each the smallest around what is seen of
        it, and zeros if nothing is; `box_weight` float32, the seen share of its area; `keypoints`
        and `keypoint_weight` likewise, the weight of the pixel it lies in.
    """
    result: Batch = {}
    for name, of, prefix in (("boxes", boxes_of, "box_"), ("keypoints", keypoints_of, "keypoint_")):
        own = of(batch, image)
        if own is None:
            continue
        members = [own, *(own[partners[:, i]] for i in range(partners.shape[1]))]
        if moves:
            members = [_through(move, m) for move, m in zip(moves, members, strict=True)]
        look = _seen_box if name == "boxes" else _seen_point
        seen = [jax.vmap(look)(m, keep) for m, keep in zip(members, keeps, strict=True)]
        result[name] = jnp.concatenate([s[0] for s in seen], axis=1)
        weight = jnp.concatenate([s[1] for s in seen], axis=1).astype(jnp.float32)
        for leaf, value in batch.items():
            if leaf.startswith(prefix) and value is not None:
                value = jnp.asarray(value)
                parts = [value, *(value[partners[:, i]] for i in range(partners.shape[1]))]
                result[leaf] = jnp.concatenate(parts, axis=1)
        weight_name = f"{prefix}weight"
        result[weight_name] = weight * result.get(weight_name, jnp.ones((), jnp.float32))
    return result


def _through(move: Move, x: Array) -> Array:
    """Moves the points that boxes [B, N, 4] or keypoints [B, P, 2 or 3] consist of."""
    pairs = [move(x[..., i : i + 2]) for i in range(0, x.shape[-1] - 1, 2)]
    return jnp.concatenate([*pairs, x[..., 2 * len(pairs) :]], axis=-1)


def _overlap(low: Array, high: Array, length: int) -> Array:
    """How much of each pixel of an axis lies in [low, high): [N] to [N, length]."""
    pixel = jnp.arange(length, dtype=low.dtype)
    inside = jnp.minimum(high[:, None], pixel + 1) - jnp.maximum(low[:, None], pixel)
    return jnp.clip(inside, 0.0, 1.0)


def _seen_box(boxes: Array, keep: Array) -> tuple[Array, Array]:
    """The smallest boxes around what a weight [H, W] leaves of boxes [N, 4], and the share left."""
    dtype = working_dtype(boxes.dtype)
    wide, keep = boxes.astype(dtype), keep.astype(dtype)
    rows = _overlap(wide[:, 0], wide[:, 2], keep.shape[0])
    columns = _overlap(wide[:, 1], wide[:, 3], keep.shape[1])
    precision = jax.lax.Precision.HIGHEST
    in_rows = jnp.einsum("hw,nw->nh", keep, columns, precision=precision) * rows
    in_columns = jnp.einsum("hw,nh->nw", keep, rows, precision=precision) * columns
    area = jnp.prod(wide[:, 2:] - wide[:, :2], axis=-1)
    share = jnp.sum(in_rows, axis=-1) / jnp.where(_exists(wide), area, 1.0)

    def ends(seen: Array) -> tuple[Array, Array]:
        length = seen.shape[-1]
        some = seen > 0.0
        return jnp.argmax(some, axis=-1), length - jnp.argmax(some[:, ::-1], axis=-1)

    (top, bottom), (left, right) = ends(in_rows), ends(in_columns)
    window = jnp.stack([top, left, bottom, right], axis=-1).astype(dtype)
    visible = (share > 0.0) & _exists(wide)
    seen = jnp.where(visible[:, None], _cut(wide, window), 0.0)
    return seen.astype(boxes.dtype), jnp.where(visible, share, 0.0)


def _seen_point(keypoints: Array, keep: Array) -> tuple[Array, Array]:
    """The weight of the pixels that keypoints [P, 2 or 3] lie in; without any they are not seen."""
    points = keypoints[:, :2]
    edge = jnp.asarray(keep.shape, jnp.int32) - 1
    row, column = jnp.clip(jnp.floor(points).astype(jnp.int32), 0, edge).T
    weight = jnp.where(_within(points, keep.shape), keep[row, column], 0.0)
    return _with_visibility(keypoints, points, weight > 0.0), weight
