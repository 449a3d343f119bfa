"""Mixing by drawn shapes: SmoothMix through a soft disc, GridMix through a grid of holes."""

import jax.numpy as jnp
import numpy as np

from mixlab import random
from mixlab.augment.core import Augmentation, entry, in_layout, size_of
from mixlab.augment.mixing.frame import (
    Mixed,
    beta,
    blend_by_mask,
    check_alpha,
    mixed_sample,
    num_uniforms,
)
from mixlab.types import Array, ArrayLike, Key, Plan

Range = float | tuple[float, float]
"""One number, or the smallest and largest of a uniform law."""


def _blend(plan: Plan, image: Array, partner: Array) -> Mixed:
    """Blends by a mask [B, H, W] that all frames of a video share."""
    mask = entry(plan, "mask", (len(image), *size_of(image.shape)))
    return blend_by_mask({**plan, "mask": in_layout(mask, image)}, image, partner)


def smoothmix_mask(center: ArrayLike, sigma: ArrayLike, size: tuple[int, int]) -> Array:
    """The weight of the own pixels in SmoothMix: 1 - exp(-d^2 / (2 sigma^2)).

    d is the distance of the middle of a pixel to the centre. Equals one minus the kernel of
    OpenMixup on square images of even side, whose draws `randint(side)` are our centre.

    Args:
        center: [..., 2], row and column of a corner between pixels, 0 the outer edge.
        sigma: [...], standard deviation in pixels.
        size: height and width.

    Returns:
        float32 (or wider) [..., H, W].
    """
    sigma = jnp.asarray(sigma, jnp.result_type(float))[..., None, None]
    center = jnp.asarray(center).astype(sigma.dtype)[..., None, None]
    rows = jnp.arange(size[0], dtype=sigma.dtype)[:, None] + 0.5 - center[..., 0, :, :]
    columns = jnp.arange(size[1], dtype=sigma.dtype) + 0.5 - center[..., 1, :, :]
    return -jnp.expm1(-(jnp.square(rows) + jnp.square(columns)) / (2.0 * jnp.square(sigma)))


def smoothmix(
    spread: tuple[float, float] = (0.25, 0.5),
    *,
    swapped_label: bool = False,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """SmoothMix: shows the partner through a soft disc, and mixes the labels by its weight.

    `out = mask * x + (1 - mask) * x[partner]`, see `smoothmix_mask`. The centre is uniform over the
    image. The weight of the own label is the mean of the mask; OpenMixup gives it the partner's.
    Of 1-D signals a soft segment is shown.

    Args:
        spread: range of the disc's standard deviation, as a share of the side of a square image of
            the same area, or of the length of a signal.
        swapped_label: give each label the other's weight, to reproduce OpenMixup's results.
        per_batch: one disc for the whole batch (as OpenMixup) instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C], [B, T, H, W, C] (one disc for all T) or [B, L, C]
        (as images of height 1) with the plan `partner` int32 [B]; `mask` float32 [B, H, W], the
        weight of the own pixel; `lam` float32 [B], its mean (one minus that, if `swapped_label`);
        `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.
        TypeError: (when applied) a `mask` of classes, which cannot be mixed; one-hot floats can.

    Source: Lee et al., "SmoothMix: a Simple Yet Effective Data Augmentation to Train Robust
    Classifiers", CVPR Workshops 2020, section 3.
    """
    low, high = _range("spread", spread, 0.0, np.inf)
    if low == 0.0:
        raise ValueError(f"spread must be positive, got {spread!r}")

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del key
        height, width = size = size_of(shape)
        side, center = float(np.sqrt(height * width)), random.whole_number(u[:2].T, size)
        if len(shape) == 3:
            # In the middle of the one row: distances are those along the signal.
            side, center = float(width), center.astype(jnp.float32).at[:, 0].set(0.5)
        sigma = low + (high - low) * u[2]
        mask = smoothmix_mask(center, sigma * side, size)
        share = jnp.mean(mask, axis=(1, 2))
        return {"mask": mask, "lam": 1.0 - share if swapped_label else share}

    return mixed_sample(
        decide,
        _blend,
        uniforms=3,
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(3, 4, 5),
    )


def gridmix_mask(
    lam: ArrayLike,
    corner: ArrayLike,
    size: tuple[int, int],
    *,
    holes: ArrayLike,
    hole_aspect: ArrayLike = 1.0,
    cut_area: ArrayLike = 1.0,
    cut_aspect: ArrayLike = 1.0,
) -> Array:
    """The own pixels in GridMix: all but the holes of a grid that lies in a crop of the image.

    Equals OpenMixup on square images, whose mask marks the partner's pixels; on others OpenMixup
    confuses rows and columns, and this does not. A crop whose aspect makes it larger than the image
    is cut to it, where OpenMixup's indices wrap around, and `holes` to half of its width, where
    OpenMixup stops.

    Args:
        lam: [...] in [0, 1]; a hole takes sqrt(1 - lam) of its cell's sides, at least one pixel
            and at most all but one; no holes at lam = 1.
        corner: [..., 2], share of the free room above and to the left of the crop.
        size: height and width of the image.
        holes: int [...], cells across the crop.
        hole_aspect: [...], height over width of a cell.
        cut_area: [...], the crop's share of the area of the image.
        cut_aspect: [...], height over width of the crop.

    Returns:
        bool [..., H, W], True where the example itself is kept.
    """
    dtype = jnp.result_type(float)
    lam, hole_aspect, cut_area, cut_aspect = (
        jnp.asarray(x, dtype) for x in (lam, hole_aspect, cut_area, cut_aspect)
    )
    corner = jnp.asarray(corner, dtype)
    height, width = size
    area = _floor(height * width * cut_area)
    cut_width = jnp.clip(_floor(jnp.sqrt(area.astype(dtype) / cut_aspect)), 1, width)
    cut_height = jnp.clip(_floor(cut_width.astype(dtype) * cut_aspect), 1, height)
    top = _floor((height - cut_height).astype(dtype) * corner[..., 0])
    left = _floor((width - cut_width).astype(dtype) * corner[..., 1])

    cells = jnp.clip(jnp.asarray(holes, jnp.int32), 1, jnp.maximum(cut_width // 2, 1))
    cell_width = (cut_width + cells - 1) // cells
    cell_height = jnp.maximum(_floor(cell_width.astype(dtype) * hole_aspect), 1)

    def inside(length: int, start: Array, span: Array, cell: Array) -> Array:
        """Which rows (columns) belong to holes, [..., length]."""
        hole = _floor(cell.astype(dtype) * jnp.sqrt(1.0 - lam))
        hole = jnp.minimum(jnp.maximum(hole, 1), cell - 1)
        position = jnp.arange(length, dtype=jnp.int32) - start[..., None]
        within = (position >= 0) & (position < span[..., None])
        return within & (position % cell[..., None] < hole[..., None])

    rows = inside(height, top, cut_height, cell_height)
    columns = inside(width, left, cut_width, cell_width)
    hole = rows[..., :, None] & columns[..., None, :]
    return ~hole | (lam >= 1.0)[..., None, None]


def _floor(x: Array) -> Array:
    """The whole part, where float32 rounding has not carried a whole number just below itself."""
    return jnp.floor(x + 1e-4).astype(jnp.int32)


def gridmix(
    alpha: float = 1.0,
    holes: int | tuple[int, int] = (2, 6),
    hole_aspect: Range = 1.0,
    cut_area: Range = (0.5, 1.0),
    cut_aspect: Range = (0.5, 2.0),
    *,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """GridMix: shows the partner through a grid of holes, and mixes the labels by their area.

    lam ~ Beta(alpha, alpha) sets the size of the holes. The defaults are those of OpenMixup's
    classifiers, and the masks equal its own, see `gridmix_mask`.

    Args:
        alpha: parameter of the Beta law; 0 leaves the batch unchanged.
        holes: holes across the grid, one number or the smallest and the largest.
        hole_aspect: height over width of a cell, one number or a range.
        cut_area: share of the area that the grid covers, one number or a range in (0, 1].
        cut_aspect: height over width of the grid, one number or a range.
        per_batch: one grid for the whole batch (as OpenMixup) instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] (one grid for all T) with the plan
        `partner` int32 [B]; `mask` float32 [B, H, W], 1 = own pixel; `lam` float32 [B], its mean;
        `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.

    Source: Baek et al., "GridMix: Strong regularization through local context mapping", Pattern
    Recognition 2021, section 3; OpenMixup.
    """
    check_alpha(alpha)
    fewest, most = _range("holes", holes, 1, np.inf)
    if fewest != int(fewest) or most != int(most):
        raise ValueError(f"holes must be whole numbers, got {holes!r}")
    bounds = {
        "hole_aspect": _range("hole_aspect", hole_aspect, 1e-3, 1e3),
        "cut_area": _range("cut_area", cut_area, 1e-3, 1.0),
        "cut_aspect": _range("cut_aspect", cut_aspect, 1e-3, 1e3),
    }

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del key
        drawn = {
            name: low + (high - low) * share
            for share, (name, (low, high)) in zip(u[3:6], bounds.items(), strict=True)
        }
        mask = gridmix_mask(
            beta(u[6:], alpha),
            u[:2].T,
            size_of(shape),
            holes=random.whole_number(u[2], int(most) + 1 - int(fewest)) + int(fewest),
            **drawn,
        ).astype(jnp.float32)
        return {"mask": mask, "lam": jnp.mean(mask, axis=(1, 2))}

    return mixed_sample(
        decide,
        _blend,
        uniforms=6 + num_uniforms(alpha),
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(4, 5),
        whole=True,
    )


def _range(name: str, value: Range, smallest: float, largest: float) -> tuple[float, float]:
    """The bounds of `value`, which must lie in [smallest, largest]."""
    low, high = value if isinstance(value, tuple | list) else (value, value)
    if not smallest <= low <= high <= largest:
        raise ValueError(
            f"{name} is one number or a pair (low, high) in [{smallest:g}, {largest:g}], "
            f"got {value!r}"
        )
    return low, high
