"""Mixing an example with a partner from the batch: the frame of all such methods, and mixup.

`boxes.py`, `fourier.py` and `masks.py` have the methods that mix by region.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random
from mixlab.augment import targets
from mixlab.augment.core import (
    Augmentation,
    along_batch,
    check_probability,
    entry,
    image_of,
    soft_label_of,
    to_dtype,
    working_dtype,
)
from mixlab.spec import nearest
from mixlab.types import Array, Batch, Key, Plan

Decide = Callable[[Array, tuple[int, ...], Key], Plan]


class Mixed(NamedTuple):
    """What a method makes of the images and their partners.

    Attributes:
        image: the mixed images.
        lam: [B], the weight of the example's own label.
        keep: the weight of the own pixel, float or bool: the image's shape without channels, or
            what broadcasts to it.
        moves: how the partner's pixels, of the image's shape but for their M channels and not
            interpolated, and its points [B, n, 2] came to where they are; None if they stay.
    """

    image: Array
    lam: Array
    keep: Array
    moves: tuple[targets.Move, targets.Move] | None = None


Blend = Callable[[Plan, Array, Array], Mixed]


def num_uniforms(alpha: float, *, tilted: bool = False) -> int:
    """How many uniform numbers `beta` makes one of."""
    return tilted + (0 if alpha == 0.0 else 1 if alpha == 1.0 else 2)


def beta(u: Array, alpha: float, *, tilted: bool = False) -> Array:
    """Draws from Beta(alpha, alpha), or Beta(alpha + 1, alpha) if `tilted`, in closed form.

    With U, V uniform, S = U^(-1/alpha) - 1 and c = cos(2 pi V), the variable
    (1 + sign(c) / sqrt(1 + 1 / (S c^2))) / 2 is exactly Beta(alpha, alpha): Ulrich, "Computer
    generation of distributions on the m-sphere", 1984; it is Bailey's polar method for Student's
    t, moved to [0, 1]. It has no rejection loop, so it compiles at once where `jax.random.beta`
    takes seconds. The tilted law has the density 2 x f(x), which keeping x with probability x,
    and 1 - x otherwise, gives.

    Args:
        u: `[num_uniforms(alpha, tilted), ...]`, uniform in [0, 1).
        alpha: shape parameter, positive, or zero for the constant 1.
        tilted: draw from Beta(alpha + 1, alpha).

    Returns:
        float32 [...] in [0, 1].
    """
    if alpha == 0.0:
        return jnp.ones(u.shape[1:], jnp.float32)
    x = u[0]
    if alpha != 1.0:
        s = jnp.expm1(-jnp.log1p(-x) / alpha)
        c = jnp.cos(2.0 * jnp.pi * u[1])
        # The bounds keep 0 / 0 and infinity / infinity out; both lie beyond float32's resolution.
        r = jnp.sqrt(1.0 + 1.0 / jnp.clip(s * jnp.square(c), 1e-30, 1e30))
        tail = (r - 1.0) / (2.0 * r)
        x = jnp.where(c < 0, tail, 1.0 - tail)
    return jnp.where(u[-1] < x, x, 1.0 - x) if tilted else x


def check_alpha(alpha: float) -> None:
    """Raises a `ValueError` unless `alpha` is a finite number that is not negative."""
    if not 0.0 <= alpha < np.inf:
        raise ValueError(
            f"alpha is the parameter of a Beta law, finite and >= 0 (0 mixes nothing), got {alpha}"
        )


def _partners(words: Array, size: int, pairing: str) -> Array:
    match pairing:
        case "permutation":
            return jnp.argsort(words, stable=False).astype(jnp.int32)
        case "flip" | "pair" | "half":
            return jnp.arange(size, dtype=jnp.int32)[::-1]
        case _:
            return jnp.roll(jnp.arange(size, dtype=jnp.int32), 1)


def mixed_sample(
    decide: Decide,
    blend: Blend,
    *,
    uniforms: int,
    per_batch: bool,
    prob: float,
    pairing: str,
    ranks: tuple[int, ...] = (4,),
    whole: bool = False,
) -> Augmentation:
    """An augmentation that mixes every example with a partner from the batch.

    Masks, boxes and keypoints are mixed along, see `targets`.

    Args:
        decide: `(u, image shape, key) -> plan` of n decisions, `lam` among them; `u` is uniform
            in [0, 1), float32 [uniforms, n], and the key for what needs other numbers.
        blend: `(plan, image, partner image) -> Mixed`.
        uniforms: how many uniform numbers a decision takes.
        per_batch: one draw for the batch, which all examples share, instead of one an example.
        prob: probability that an example (or the batch) is mixed at all.
        pairing: `"permutation"`: a random permutation, fixed points allowed; `"flip"`: example i
            with B - 1 - i; `"roll"`: example i with i - 1; `"pair"`: as flip, and the two share
            their draws; `"half"`: as pair, and only the first half of the batch comes out, B / 2
            rows of every leaf, rounded up.
        ranks: the numbers of axes that the image may have.
        whole: whether every pixel comes from one of the two images alone.

    timm's modes are `per_batch=True` with `"flip"` (batch), `"flip"` (elem), `"pair"` and `"half"`;
    its switching between methods is `one_of`, with `per_batch` or `per_pair` likewise.

    Raises:
        ValueError: `prob` is no probability, `pairing` is unknown, or pairs share draws that
            `per_batch` already shares.
    """
    check_probability("prob", prob)
    known = ("permutation", "flip", "roll", "pair", "half")
    if pairing not in known:
        raise ValueError(f"unknown pairing {pairing!r}; {nearest(str(pairing), known)}")
    if per_batch and pairing == "pair":
        raise ValueError("pairing='pair' shares draws between two, per_batch between all: use one")

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=ranks)
        size = image.shape[0]
        paired = pairing in ("pair", "half") and not per_batch
        draws = 1 if per_batch else half_of(size) if paired else size
        # One call for all: on a CPU a call costs as much as many numbers. Where all are mixed there
        # is no coin. The folded number is none of the counters that the call goes through.
        ordered, tossed = size * (pairing == "permutation"), prob < 1.0
        words = random.bits(key, (ordered + draws * (uniforms + tossed),))
        u = random.unit(words[ordered:]).reshape(-1, draws)
        plan = decide(u[tossed:], image.shape, jax.random.fold_in(key, 2**32 - 1))
        plan["use"] = u[0] < prob if tossed else jnp.ones(draws, bool)
        if paired:
            plan = {name: mirrored(x, size) for name, x in plan.items()}
        plan = {name: jnp.broadcast_to(x, (size, *x.shape[1:])) for name, x in plan.items()}
        return {"partner": _partners(words[:ordered], size, pairing), **plan}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image, label = image_of(batch, ranks=ranks), soft_label_of(batch)
        size = image.shape[0]
        partner = entry(plan, "partner", (size,), limits=(0, size - 1))
        use = entry(plan, "use", (size,), default=True)
        # In one piece an example, which is copied whole.
        other = jnp.take(image.reshape(size, -1), partner, axis=0, mode="clip")
        mixed = blend(plan, image, other.reshape(image.shape))
        batch = {
            **batch,
            **_mixed_targets(batch, image, partner, use, mixed, whole),
            "image": jnp.where(along_batch(use, image), mixed.image, image),
        }
        if label is not None:
            lam = along_batch(jnp.where(use, mixed.lam, 1.0), label)
            batch["label"] = lerp(lam, label, jnp.take(label, partner, axis=0, mode="clip"))
        if pairing == "half":
            batch = jax.tree_util.tree_map_with_path(functools.partial(_first_half, size), batch)
        return batch

    return Augmentation(sample, apply)


def _mixed_targets(
    batch: Batch, image: Array, partner: Array, use: Array, mixed: Mixed, whole: bool
) -> Batch:
    """The leaves of `targets` that mixing changes."""
    keep = jnp.where(along_batch(use, mixed.keep), mixed.keep, jnp.ones_like(mixed.keep))
    result: Batch = {}
    mask = targets.mask_of(batch, image)
    if mask is not None:
        other = jnp.take(mask, partner, axis=0, mode="clip")
        if mixed.moves is not None:
            pixels = other.reshape(*image.shape[:-1], -1)
            other = mixed.moves[0](pixels).reshape(mask.shape)
        result["mask"] = targets.pick(mask, other, keep, whole=whole)
    if batch.get("boxes") is not None or batch.get("keypoints") is not None:
        weight = jnp.broadcast_to(keep.astype(jnp.float32), image.shape[:-1])
        moved = () if mixed.moves is None else (lambda points: points, mixed.moves[1])
        keeps = jnp.stack([weight, 1.0 - weight])
        result |= targets.union(batch, image, partner[:, None], keeps, moved)
    return result


def _first_half(size: int, path: Any, leaf: Any) -> Any:
    if not jnp.shape(leaf) or isinstance(leaf, str) or len(leaf) != size:
        raise ValueError(
            f"pairing='half' keeps half of the {size} examples, but batch"
            f"{jax.tree_util.keystr(path)} has no axis of that length: leave it out of the batch, "
            "or make it an array with one entry an example"
        )
    return leaf[: half_of(size)]


def half_of(size: int) -> int:
    """The number of pairs in a batch of `size`; the middle of an odd one pairs with itself."""
    return (size + 1) // 2


def mirrored(x: Array, size: int) -> Array:
    """Gives example B - 1 - i what example i has: [ceil(B / 2), ...] to [B, ...]."""
    return jnp.concatenate([x, x[: size // 2][::-1]])


def lerp(weight: Array, a: Array, b: Array) -> Array:
    """`weight * a + (1 - weight) * b` in float32 or wider, in the dtype of `a`.

    What is not finite stays so at weight 0: to leave it out would cost FMix a tenth of its time.
    """
    dtype = working_dtype(a.dtype)
    weight = weight.astype(dtype)
    return to_dtype(weight * a.astype(dtype) + (1.0 - weight) * b.astype(dtype), a.dtype)


def lam_of(plan: Plan, image: Array) -> Array:
    """`plan["lam"]` as float32 (or wider) [B]."""
    lam = entry(plan, "lam", image.shape[:1], limits=(0, 1))
    return lam.astype(working_dtype(lam.dtype))


def blend_by_mask(plan: Plan, image: Array, partner: Array) -> Mixed:
    """Weighs the own pixels by `plan["mask"]`, and the own label by `plan["lam"]`."""
    mask = entry(plan, "mask", image.shape[:-1])
    return Mixed(lerp(mask[..., None], image, partner), lam_of(plan, image), mask)


def mixup(
    alpha: float = 0.2,
    *,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """Mixup: a convex combination of two examples and of their labels.

    `out = lam * x + (1 - lam) * x[partner]`, lam ~ Beta(alpha, alpha). uint8 images are blended in
    float32 and rounded half to even. Given the same plan it equals the mixup of OpenMixup, timm
    (`pairing="flip"`) and torchvision v2 (`pairing="roll"`).

    Args:
        alpha: parameter of the Beta law; 0 leaves the batch unchanged.
        per_batch: one lam for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, L, C], [B, H, W, C] or [B, T, H, W, C] with the plan
        `partner` int32 [B], `lam` float32 [B] (weight of the example itself), `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.
        TypeError: (when applied) a `mask` of classes, which cannot be mixed; one-hot floats can.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, eq. 2.
    """
    check_alpha(alpha)

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        del shape, key
        return {"lam": beta(u, alpha)}

    def blend(plan: Plan, image: Array, partner: Array) -> Mixed:
        lam = lam_of(plan, image)
        weight = along_batch(lam, image)
        return Mixed(lerp(weight, image, partner), lam, weight[..., 0])

    return mixed_sample(
        decide,
        blend,
        uniforms=num_uniforms(alpha),
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(3, 4, 5),
    )


def label_smoothing(s: float = 0.1) -> Augmentation:
    """Moves a share `s` of every label's mass to the uniform distribution over its K classes.

    `label * (1 - s) + s / K`, as in timm; it commutes with mixing.

    Args:
        s: share in [0, 1].

    Returns:
        An augmentation with an empty plan; the batch must have a soft `label` [B, K].

    Raises:
        ValueError: `s` is out of range.
        KeyError: (when applied) the batch has no label.

    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7.
    """
    if not 0.0 <= s <= 1.0:
        raise ValueError(f"label smoothing s must lie in [0, 1], got {s!r}")

    def sample(key: Key, batch: Batch) -> Plan:
        del key, batch
        return {}

    def apply(plan: Plan, batch: Batch) -> Batch:
        del plan
        image_of(batch, ranks=(3, 4, 5))
        label = soft_label_of(batch)
        if label is None:
            raise KeyError("label_smoothing needs a batch with 'label' [B, K]")
        wide = label.astype(working_dtype(label.dtype))
        smooth = wide * (1.0 - s) + s / label.shape[1]
        return {**batch, "label": smooth.astype(label.dtype)}

    return Augmentation(sample, apply)
