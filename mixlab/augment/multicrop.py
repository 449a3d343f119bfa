"""Multi-crop: views of an image at two sizes, as self-supervised methods compare them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixlab.augment.core import (
    Augmentation,
    check_augmentations,
    identity,
    image_of,
    pair_of,
    size_of,
)
from mixlab.augment.crops import check_area, random_boxes
from mixlab.augment.ops.resized import check_interpolation, resized_boxes
from mixlab.augment.targets import refuse
from mixlab.types import Array, Batch, Key, Plan


def multi_crop(
    sizes: tuple[int, int] = (224, 96),
    counts: tuple[int, int] = (2, 6),
    scales: tuple[tuple[float, float], tuple[float, float]] = ((0.14, 1.0), (0.05, 0.14)),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    then: Augmentation | Sequence[Augmentation] = (),
    interpolation: str = "bilinear",
    antialias: bool = True,
) -> Augmentation:
    """Multi-crop: a few large and several small random crops of every image, as views of it.

    The defaults are SwAV's. `then` augments every crop on its own:

        multi_crop(then=random_flip() | color_jitter(0.8, 0.8, 0.8, 0.2, prob=0.8)
                        | random_grayscale(0.2) | random_blur(prob=0.5))

    or the crops apart, as in DINO: one for each large crop and one for all small ones:

        multi_crop(counts=(2, 8), scales=((0.4, 1.0), (0.05, 0.4)), interpolation="bicubic", then=(
            jitter | random_blur(prob=1.0),
            jitter | random_blur(prob=0.1) | random_solarize(prob=0.2),
            jitter | random_blur(prob=0.5)))

    with `jitter` the text `random_flip() | color_jitter(0.4, 0.4, 0.2, 0.1, prob=0.8) |
    random_grayscale(0.2)`. Both are texts for `parse`; in code `|` is `chain`.

    Args:
        sizes: side of the large and of the small crops, in pixels.
        counts: how many of each, at least one large one.
        scales: ranges of their share of the image's area.
        ratio: range of width over height.
        then: what the crops go through, each with a draw of its own; it sees a batch of crops
            without labels.
        interpolation: `"nearest"`, `"bilinear"` or `"bicubic"`, see `ops.resize`.
        antialias: widen the filter where the crop is larger than the result, see `ops.resize`.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] after which `image` is
        [B, counts[0], (T,) S, S, C] and, if there are small crops, `local` is
        [B, counts[1], (T,) s, s, C]; other leaves stay as they are. The plan has `box` int32
        [B, sum(counts), 4], half-open (top, left, bottom, right), the large crops first, and
        `"0"`, `"1"`, ..., the plans of `then` for the large crops (a part for each, or one for all,
        [B * counts[0]]) and last for the small ones, [B * counts[1]].

    Raises:
        ValueError: an argument is out of its range, `then` has the wrong number of parts, or (when
            applied) the batch has masks, boxes or keypoints.
        TypeError: a part of `then` is no augmentation.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", 2020, section 3.3; Caron et al., "Emerging Properties in Self-Supervised Vision
    Transformers", 2021, section 3.1.
    """
    for name, value in (("sizes", sizes), ("counts", counts), ("scales", scales)):
        if len(value) != 2:
            raise ValueError(f"{name} has two parts, for large and for small crops, got {value!r}")
    large, small = counts
    if large < 1 or small < 0:
        raise ValueError(f"counts has at least one large and no fewer than 0 small, got {counts}")
    for scale in scales:
        check_area(scale, ratio)
    check_interpolation(interpolation)
    shapes = [pair_of(size) for size in sizes]
    augs = list(then) if isinstance(then, Sequence) else [then]
    augs = augs or [identity()]
    check_augmentations("multi_crop", augs)
    wanted = large + (small > 0)
    if len(augs) not in (1, wanted):
        raise ValueError(
            f"then is one augmentation or {wanted}, one a large crop"
            f"{' and one for the small ones' if small else ''}, got {len(augs)}"
        )
    # Crops that go through one augmentation together, from which to which.
    parts = [(0, large)] if len(augs) == 1 else [(i, i + 1) for i in range(large)]
    if small:
        parts.append((large, large + small))
    augs = augs * len(parts) if len(augs) == 1 else augs

    def boxes(key: Key, batch: Batch) -> Array:
        shape = image_of(batch, ranks=(4, 5)).shape
        drawn = [
            random_boxes(jax.random.fold_in(key, i), (shape[0], n), size_of(shape), scale, ratio)
            for i, (n, scale) in enumerate(zip(counts, scales, strict=True))
        ]
        return jnp.concatenate(drawn, axis=1)

    def crops(box: Any, batch: Batch) -> list[tuple[Augmentation, Batch]]:
        image = image_of(batch, ranks=(4, 5))
        refuse(batch, ("mask", "boxes", "keypoints"), "multi_crop makes views of two sizes")
        box = jnp.broadcast_to(jnp.asarray(box, jnp.int32), (len(image), large + small, 4))
        cut = [
            resized_boxes(image, part, size, interpolation, antialias)
            for part, size in zip((box[:, :large], box[:, large:]), shapes, strict=True)
            if part.shape[1]
        ]
        taken = [cut[0][:, i:j] if j <= large else cut[1] for i, j in parts]
        batches = [{"image": x.reshape(-1, *x.shape[2:])} for x in taken]
        return list(zip(augs, batches, strict=True))

    def joined(batch: Batch, results: Sequence[Batch]) -> Batch:
        size = len(image_of(batch, ranks=(4, 5)))
        cut = [r["image"].reshape(size, -1, *r["image"].shape[1:]) for r in results]
        if not small:
            return {**batch, "image": jnp.concatenate(cut, axis=1)}
        return {**batch, "image": jnp.concatenate(cut[:-1], axis=1), "local": cut[-1]}

    def sample(key: Key, batch: Batch) -> Plan:
        box_key, then_key = jax.random.split(key)
        plan: Plan = {"box": boxes(box_key, batch)}
        for i, (aug, crop) in enumerate(crops(plan["box"], batch)):
            plan[str(i)] = aug.sample(jax.random.fold_in(then_key, i), crop)
        return plan

    def apply(plan: Plan, batch: Batch) -> Batch:
        cut = enumerate(crops(plan["box"], batch))
        return joined(batch, [aug.apply(plan[str(i)], crop) for i, (aug, crop) in cut])

    def direct(key: Key, batch: Batch) -> Batch:
        box_key, then_key = jax.random.split(key)
        cut = enumerate(crops(boxes(box_key, batch), batch))
        return joined(batch, [aug(jax.random.fold_in(then_key, i), crop) for i, (aug, crop) in cut])

    return Augmentation(sample, apply, direct)
