"""Mixing by boxes: CutMix pastes a part of the partner, ResizeMix the whole of it, made small."""

import jax.numpy as jnp

from mixlab import random
from mixlab.augment.core import (
    Augmentation,
    as_images,
    entry,
    in_layout,
    pair_of,
    size_of,
    to_dtype,
    unfused,
    working_dtype,
)
from mixlab.augment.mixing.frame import (
    Mixed,
    beta,
    check_alpha,
    lam_of,
    mixed_sample,
    num_uniforms,
)
from mixlab.augment.ops.dispatch import each
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, Key, Plan


def cutmix_box(lam: ArrayLike, center: ArrayLike, size: tuple[int, int]) -> Array:
    """The box of CutMix: a share 1 - lam of the image around a centre, clipped to the image.

    The side on an axis of length L is int(L * sqrt(1 - lam)), and the box reaches side // 2 to
    either side of the centre. Equals the official code, OpenMixup, timm (margin 0) and
    torchvision v2.

    Args:
        lam: weight of the example itself, [...] in [0, 1].
        center: int [..., 2], row and column.
        size: height and width of the image.

    Returns:
        int32 [..., 4], half-open (top, left, bottom, right).
    """
    lam = jnp.asarray(lam, jnp.result_type(float))
    length = jnp.asarray(size, jnp.int32)
    side = jnp.sqrt(1.0 - lam)[..., None] * length.astype(lam.dtype)
    return _clipped_box(side.astype(jnp.int32), center, length)


def _clipped_box(side: Array, center: ArrayLike, length: Array) -> Array:
    half, center = side // 2, jnp.asarray(center, jnp.int32)
    corners = [jnp.clip(c, 0, length) for c in (center - half, center + half)]
    return jnp.concatenate(corners, axis=-1)


def spans(box: ArrayLike, size: tuple[int, int]) -> tuple[Array, Array]:
    """Which rows and which columns a box covers.

    Args:
        box: int [..., 4], half-open (top, left, bottom, right).
        size: height and width.

    Returns:
        bool [..., H] and bool [..., W].
    """
    top, left, bottom, right = (jnp.asarray(box, jnp.int32)[..., i, None] for i in range(4))
    row, column = (jnp.arange(length, dtype=jnp.int32) for length in size)
    return (row >= top) & (row < bottom), (column >= left) & (column < right)


def inside(box: ArrayLike, size: tuple[int, int]) -> Array:
    """Whether each pixel lies in the box.

    Args:
        box: int [..., 4], half-open (top, left, bottom, right).
        size: height and width.

    Returns:
        bool [..., H, W].
    """
    rows, columns = spans(box, size)
    return rows[..., :, None] & columns[..., None, :]


def share_outside(box: ArrayLike, size: tuple[int, int]) -> Array:
    """The share of the image that the box leaves: 1 - area / (H * W), float32 [...]."""
    box = jnp.asarray(box, jnp.int32)
    height, width = (jnp.maximum(box[..., i + 2] - box[..., i], 0) for i in (0, 1))
    kept = size[0] * size[1] - height * width
    return kept.astype(jnp.float32) / float(size[0] * size[1])


def cutmix(
    alpha: float = 1.0,
    *,
    correct_lam: bool = True,
    minmax: tuple[float, float] | None = None,
    in_bounds: bool = False,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """CutMix: pastes a box of the partner, and mixes the labels by area.

    lam ~ Beta(alpha, alpha) sets the size of the box, a uniform pixel its centre (`cutmix_box`).
    The box is clipped to the image, so the pasted area is smaller than 1 - lam on average (mean
    0.299 for alpha = 1 at 32 x 32). Given the same plan it equals the official code, OpenMixup,
    timm (`pairing="flip"`) and torchvision v2 (`pairing="roll"`). Of 1-D signals a segment is
    pasted.

    Args:
        alpha: parameter of the Beta law; 0 leaves the batch unchanged. Not used with `minmax`,
            where it must keep its default.
        correct_lam: label by the area really pasted; otherwise by lam as drawn.
        minmax: timm's `cutmix_minmax`: height and width of the box are uniform integers from
            int(L * min) up to, but not including, int(L * max), and the box lies inside the image.
        in_bounds: place the box at a uniform position inside the image, so that nothing is
            clipped and the pasted area is 1 - lam but for rounding, as in Keras (whose boxes have
            fractional edges, and whose labels do not count the pixels).
        per_batch: one box for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] (one box for all T) or [B, L, C] (as
        images of height 1) with the plan `partner` int32 [B]; `box` int32 [B, 4], half-open (top,
        left, bottom, right); `lam` float32 [B], the weight of the example's own label; `use` bool
        [B]. With `correct_lam`, `apply` takes the weight from `box` whatever `lam` says, so that
        pixels and labels agree also in a plan that holds the lam as drawn.

    Raises:
        ValueError: an argument is out of its range, or excluded by `minmax`.

    Source: Yun et al., "CutMix", ICCV 2019, section 3.1 and its released code.
    """
    check_alpha(alpha)
    if minmax is not None:
        if len(minmax) != 2 or not 0.0 <= minmax[0] <= minmax[1] <= 1.0:
            raise ValueError(f"minmax is a pair 0 <= min <= max <= 1, got {minmax!r}")
        if not correct_lam or alpha != 1.0 or in_bounds:
            raise ValueError(
                "minmax draws the box itself and labels by its area: leave alpha, correct_lam and "
                f"in_bounds at their defaults, got alpha={alpha}, correct_lam={correct_lam}, "
                f"in_bounds={in_bounds}"
            )

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del key
        size, place = size_of(shape), u[:2].T
        if minmax is not None:
            box = _minmax_box(place, u[2:].T, size, minmax)
            return {"box": box, "lam": share_outside(box, size)}
        lam = beta(u[2:], alpha)
        if in_bounds:
            box = _inner_box(place, _sides(lam, size, len(shape) == 3), size)
        elif len(shape) == 3:
            box = _segment(lam, random.whole_number(place, size), size)
        else:
            box = cutmix_box(lam, random.whole_number(place, size), size)
        return {"box": box, "lam": share_outside(box, size) if correct_lam else lam}

    def blend(plan: Plan, image: Array, partner: Array) -> Mixed:
        mixed = _paste(plan, image, partner)
        return mixed if correct_lam else mixed._replace(lam=lam_of(plan, image))

    return mixed_sample(
        decide,
        blend,
        uniforms=4 if minmax is not None else 2 + num_uniforms(alpha),
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(3, 4, 5),
        whole=True,
    )


def _paste(plan: Plan, image: Array, partner: Array) -> Mixed:
    """Pastes the box of the partner, and weighs the labels by what it leaves."""
    size, channels = size_of(image.shape), image.shape[-1]
    box = entry(plan, "box", (image.shape[0], 4), jnp.int32)
    keep = ~inside(box, size)

    # Rows with their channels in one piece are long vectors; a choice a pixel is half as fast.
    def flat(x: Array) -> Array:
        return x.reshape(len(x), -1, size[0], size[1] * channels)

    wide = box * jnp.asarray((1, channels, 1, channels), jnp.int32)
    pasted = inside(wide, (size[0], size[1] * channels))
    mixed = jnp.where(pasted[:, None], flat(partner), flat(image)).reshape(image.shape)
    return Mixed(mixed, share_outside(box, size), in_layout(keep, image))


def patchmix(
    size: int | tuple[int, int] = 16,
    *,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """PatchMix: pastes a patch of one size at a uniform place inside, and mixes labels by area.

    kornia `PatchMix` pastes the same pixels and leaves the labels as they are.

    Args:
        size: side of the patch in pixels, or height and width; cut to the image if that is smaller.
        per_batch: one place for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] or [B, L, C] with the plan of
        `cutmix`.

    Raises:
        ValueError: an argument is out of its range.

    Source: kornia `PatchMix`, after Yun et al., "CutMix", ICCV 2019.
    """
    sides = pair_of(size)

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del key
        extent = size_of(shape)
        side = jnp.minimum(jnp.asarray(sides, jnp.int32), jnp.asarray(extent, jnp.int32))
        box = _inner_box(u.T, jnp.broadcast_to(side, u.T.shape), extent)
        return {"box": box, "lam": share_outside(box, extent)}

    return mixed_sample(
        decide,
        _paste,
        uniforms=2,
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(3, 4, 5),
        whole=True,
    )


def _sides(lam: Array, size: tuple[int, int], signal: bool) -> Array:
    """Sides of the boxes, int32 [n, 2]; a signal is cut along its length alone."""
    share = 1.0 - lam if signal else jnp.sqrt(1.0 - lam)
    length = jnp.asarray(size, lam.dtype)
    sides = (share[:, None] * length).astype(jnp.int32)
    return sides.at[:, 0].set((sides[:, 1] > 0).astype(jnp.int32)) if signal else sides


def _inner_box(place: Array, side: Array, size: tuple[int, int]) -> Array:
    """Places boxes uniformly where they fit."""
    corner = random.whole_number(place, jnp.asarray(size, jnp.int32) - side + 1)
    return jnp.concatenate([corner, corner + side], axis=-1)


def _segment(lam: Array, center: Array, size: tuple[int, int]) -> Array:
    """The clipped segment of a signal, as a box of height 1."""
    box = _clipped_box(_sides(lam, size, True), center, jnp.asarray(size, jnp.int32))
    return box.at[:, 0].set(0).at[:, 2].set(1)


def _minmax_box(
    place: Array, share: Array, size: tuple[int, int], minmax: tuple[float, float]
) -> Array:
    low = [int(length * minmax[0]) for length in size]
    high = [max(int(length * minmax[1]), lo + 1) for length, lo in zip(size, low, strict=True)]
    lowest = jnp.asarray(low, jnp.int32)
    side = lowest + random.whole_number(share, jnp.asarray(high, jnp.int32) - lowest)
    # timm's corner never reaches the far edge.
    corner = random.whole_number(place, jnp.maximum(jnp.asarray(size, jnp.int32) - side, 1))
    return jnp.concatenate([corner, corner + side], axis=-1)


def resizemix(
    scope: tuple[float, float] = (0.1, 0.8),
    alpha: float | None = None,
    *,
    interpolation: str = "nearest",
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """ResizeMix: pastes the whole partner, made small, and mixes the labels by area.

    The sides of the box are int(L * tau), at least one pixel, around a uniform centre and clipped
    to the image; the partner is resized into the clipped box. Equals OpenMixup on square images;
    on others OpenMixup confuses rows and columns, and this does not. Of 1-D signals the partner is
    resampled into a segment.

    Args:
        scope: smallest and largest tau.
        alpha: draw tau from Beta(alpha, alpha), and uniformly in `scope` if it falls outside
            (OpenMixup's configs use 1); None draws it uniformly in `scope`, and 0 leaves the batch
            unchanged.
        interpolation: `"nearest"`, or `"bilinear"` with half-pixel centres and no antialiasing.
        per_batch: one box for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] (one box for all T) or [B, L, C] (as
        images of height 1) with the plan `partner` int32 [B]; `box` int32 [B, 4], half-open (top,
        left, bottom, right); `lam` float32 [B], 1 - area / (H * W); `use` bool [B]. `apply` takes
        the weight of the label from `box`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Qin et al., "ResizeMix: Mixing Data with Preserved Object Information and True Labels",
    2020, section 3.3.
    """
    if len(scope) != 2 or not 0.0 <= scope[0] <= scope[1] <= 1.0:
        raise ValueError(f"scope is a pair 0 <= min <= max <= 1, got {scope!r}")
    if alpha is not None:
        check_alpha(alpha)
    known = ("nearest", "bilinear")
    if interpolation not in known:
        raise ValueError(
            f"unknown interpolation {interpolation!r}; {nearest(str(interpolation), known)}"
        )

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del key
        if alpha == 0.0:
            count = u.shape[1]
            return {"box": jnp.zeros((count, 4), jnp.int32), "lam": jnp.ones(count, jnp.float32)}
        size = size_of(shape)
        tau = scope[0] + (scope[1] - scope[0]) * u[2]
        if alpha is not None:
            drawn = beta(u[3:], alpha)
            tau = jnp.where((drawn >= scope[0]) & (drawn <= scope[1]), drawn, tau)
        box = resizemix_box(tau, random.whole_number(u[:2].T, size), size)
        return {"box": box, "lam": share_outside(box, size)}

    def blend(plan: Plan, image: Array, partner: Array) -> Mixed:
        size = size_of(image.shape)
        box = entry(plan, "box", (image.shape[0], 4), jnp.int32)

        def resized(x: Array, bilinear: bool = False) -> Array:
            def into_box(x: Array) -> Array:
                for axis in (1, 0):
                    x = _resize_into(x, box[:, axis], box[:, axis + 2], axis + 1, bilinear)
                return x

            return as_images(into_box, x)

        def placed(points: Array) -> Array:
            low, high = (box[:, None, i : i + 2].astype(points.dtype) for i in (0, 2))
            return low + points * ((high - low) / jnp.asarray(size, points.dtype))

        keep = in_layout(~inside(box, size), image)
        if interpolation == "bilinear":
            small = to_dtype(resized(partner, bilinear=True), image.dtype)
            out = jnp.where(keep[..., None], image, small)
        else:
            partners = entry(plan, "partner", keep.shape[:1], jnp.int32)
            partners = jnp.clip(partners, 0, len(keep) - 1)
            out = as_images(lambda x: _shrunk(x, partners, box), image)
        return Mixed(out, share_outside(box, size), keep, (resized, placed))

    return mixed_sample(
        decide,
        blend,
        uniforms=3 if alpha is None else 3 + num_uniforms(alpha),
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(3, 4, 5),
        whole=True,
    )


def _shrunk(image: Array, partner: Array, box: Array) -> Array:
    """Takes every pixel in one gather: the own one, or the nearest of the shrunken partner.

    Args:
        image: [B, H, W, C].
        partner: int32 [B].
        box: int32 [B, 4].
    """
    size, height, width, channels = image.shape

    def sources(box: Array) -> tuple[Array, Array, Array, Array]:
        low, high = box[:2], box[2:]
        found = [
            jnp.clip((jnp.arange(n, dtype=jnp.int32) - low[i]) * n // (high[i] - low[i]), 0, n - 1)
            for i, n in enumerate((height, width))
        ]
        return *spans(box, (height, width)), found[0], found[1]

    # In a loop of their own, or every pixel would divide for its row and its column again.
    rows, columns, source_row, source_column = each(sources, box)
    place = (partner[:, None] * height + source_row)[:, :, None] * width + source_column[:, None]
    own = jnp.arange(size * height * width, dtype=jnp.int32).reshape(size, height, width)
    place = jnp.where(rows[:, :, None] & columns[:, None], place, own)
    return image.reshape(-1, channels).at[place].get(mode="promise_in_bounds")


def resizemix_box(tau: ArrayLike, center: ArrayLike, size: tuple[int, int]) -> Array:
    """The box of ResizeMix: sides int(L * tau) around a centre, clipped, at least one pixel.

    Args:
        tau: ratio of the sides, [...] in [0, 1].
        center: int [..., 2], row and column.
        size: height and width of the image.

    Returns:
        int32 [..., 4], half-open (top, left, bottom, right).
    """
    tau = jnp.asarray(tau, jnp.result_type(float))
    length = jnp.asarray(size, jnp.int32)
    side = (tau[..., None] * length.astype(tau.dtype)).astype(jnp.int32)
    box = _clipped_box(side, center, length)
    top_left = jnp.minimum(box[..., :2], length - 1)
    return jnp.concatenate([top_left, jnp.maximum(box[..., 2:], top_left + 1)], axis=-1)


def _resize_into(x: Array, start: Array, stop: Array, axis: int, bilinear: bool) -> Array:
    """Resizes `axis` of [B, ...] to the span [start, stop), at its place; outside is undefined."""
    length = x.shape[axis]
    span = jnp.maximum(stop - start, 1)[:, None]
    position = jnp.arange(length, dtype=jnp.int32) - start[:, None]

    def at(index: Array) -> Array:
        shape = [1] * x.ndim
        shape[0], shape[axis] = index.shape
        index = jnp.clip(index, 0, length - 1).reshape(shape)
        return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")

    if not bilinear:
        return at(position * length // span)
    # The centre of the pixel, in pixel centres of the source; in this order as PyTorch rounds.
    dtype = working_dtype(x.dtype)
    scale = jnp.asarray(length, dtype) / span.astype(dtype)
    source = jnp.maximum(unfused(scale * (position.astype(dtype) + 0.5)) - 0.5, 0.0)
    low = jnp.floor(source)
    t = (source - low).reshape([n if i in (0, axis) else 1 for i, n in enumerate(x.shape)])
    low = low.astype(jnp.int32)
    return (1.0 - t) * at(low).astype(dtype) + t * at(low + 1).astype(dtype)
