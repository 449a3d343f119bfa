"""Policies of one strength for all ops: RandAugment in its dialects, TrivialAugment, 3-Augment."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random
from mixlab.augment import targets
from mixlab.augment.core import (
    Augmentation,
    as_images,
    check_probability,
    image_of,
    size_of,
)
from mixlab.augment.ops.geometric import Fill
from mixlab.augment.policies.spaces import (
    NOT_OF_RANDAUGMENT,
    Space,
    google_rules,
    timm_rules,
    torchvision_rules,
    without,
)
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, Batch, Key, Plan

Draw = Callable[[Key, int], Plan]
"""`draw(key, n)`: `op` int32 [n, ops in a row], `strength` and `prob`, which broadcast to it, and
what else the plan shall have."""


def _timm(increasing: bool) -> Space:
    bits = "increasing" if increasing else "decreasing"
    rules = without(timm_rules(increasing=increasing, bits=bits), *NOT_OF_RANDAUGMENT)
    return Space(rules, 10.0, "pil", "random", 128)


RANDAUGMENT = {
    "google": Space(google_rules(translate=100.0, cutout=40.0), 10.0, "google", "nearest", 128),
    "timm": _timm(increasing=False),
    "timm_increasing": _timm(increasing=True),
    "torchvision": Space(without(torchvision_rules(), "invert"), 30.0, "torchvision", "nearest", 0),
}
"""The spaces of RandAugment by dialect."""

WIDE = Space(
    without(
        torchvision_rules(
            shear=0.99, rotate=135.0, enhance=0.99, bits=(8, 2), reach=lambda length: 32.0
        ),
        "invert",
    ),
    30.0,
    "torchvision",
    "nearest",
    0,
)
"""The space of TrivialAugment."""

_THREE = Space(
    {
        "desaturate": lambda part, sign, size: 0.0 * sign,
        "gaussian_blur": lambda part, sign, size: 0.1 + part(1.9),
        "solarize": lambda part, sign, size: 128.0 + 0.0 * sign,
    },
    1.0,
    "pil",
    "nearest",
    0,
)


def space_policy(space: Space, draw: Draw, *, per_batch: bool) -> Augmentation:
    """An augmentation that puts every example through a few ops of a space, one after the other.

    Args:
        space: the ops.
        draw: which of them, how strong, and with what probability.
        per_batch: one draw for the whole batch instead of one an example.
    """

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=(4, 5))
        draw_key, use_key, space_key = jax.random.split(key, 3)
        plan = draw(draw_key, 1 if per_batch else image.shape[0])
        op, strength, prob = plan.pop("op"), plan.pop("strength"), plan.pop("prob")
        strength = jnp.broadcast_to(jnp.asarray(strength, jnp.float32), op.shape)
        plan |= space.decide(space_key, op, strength, size_of(image.shape))
        certain = isinstance(prob, int | float) and prob == 1.0  # then no numbers are spent on it
        plan["use"] = (
            jnp.ones(op.shape, bool)
            if certain
            else random.uniform(use_key, op.shape) < jnp.asarray(prob, jnp.float32)
        )
        return {
            name: jnp.broadcast_to(x, (image.shape[0], *x.shape[1:])) for name, x in plan.items()
        }

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(4, 5))
        steps = jnp.moveaxis(space.matrices(plan, size_of(image.shape)), 1, 0)

        def move(mask: Array) -> Array:
            return as_images(lambda frame: space.move(plan, frame), mask)

        return targets.follow(batch, space.run(plan, image), move, list(steps))

    return Augmentation(sample, apply, ops=tuple(space.rules))


def spread(
    key: Key, magnitude: ArrayLike, deviation: float, bound: float, shape: tuple[int, ...]
) -> Array:
    """Strengths around `magnitude`, clipped to 0..bound; an infinite deviation: U(0, magnitude)."""
    level = jnp.broadcast_to(jnp.asarray(magnitude, jnp.float32), shape)
    if deviation == np.inf:
        level = level * random.uniform(key, shape)
    elif deviation > 0.0:
        level = level + deviation * jax.random.normal(key, shape, jnp.float32)
    return jnp.clip(level, 0.0, bound)


def check_deviation(deviation: float) -> None:
    """Raises a `ValueError` unless `deviation` is a number >= 0, infinity included."""
    if not deviation >= 0.0:
        raise ValueError(f"magnitude_std must be >= 0, got {deviation}")


def _dialect(name: str) -> Space:
    if name not in RANDAUGMENT:
        raise ValueError(f"unknown RandAugment dialect {name!r}; {nearest(str(name), RANDAUGMENT)}")
    return RANDAUGMENT[name]


def randaugment_arguments(
    dialect: str, magnitude: ArrayLike, sign: ArrayLike, size: tuple[int, int]
) -> dict[str, Array]:
    """What each op of a dialect is given at a magnitude: its table of magnitudes.

    Args:
        dialect: `"torchvision"`, `"timm"`, `"timm_increasing"` or `"google"`.
        magnitude: any shape, in 0..30 (torchvision's bins) or from 0 to 10 or more (the others).
        sign: 1 or -1, of the same shape; ops without direction do not use it.
        size: height and width of the images.

    Returns:
        The argument of each op by its name in `augment.ops`, in the order of the dialect: float32,
        factors, degrees, pixels, bits or levels; 0 for ops without argument.

    Raises:
        ValueError: the dialect is unknown.
    """
    return _dialect(dialect).arguments(magnitude, sign, size)


def randaugment(
    num_ops: int = 2,
    magnitude: ArrayLike = 9,
    *,
    dialect: str = "torchvision",
    magnitude_std: float = 0.0,
    magnitude_max: float | None = None,
    prob: float | None = None,
    weights: Mapping[str, float] | None = None,
    interpolation: str | None = None,
    fill: Fill | None = None,
    per_batch: bool = False,
) -> Augmentation:
    """RandAugment: a few random ops of one common strength.

    Each op is drawn uniformly, with replacement, its direction by a fair coin. The single ops equal
    those of the dialect, see `augment.ops`; the tables of strength are `randaugment_arguments`.

    | dialect | ops | magnitude | per op | interpolation | fill |
    |---|---|---|---|---|---|
    | `torchvision` | 14, identity among them | bin 0..30 | always | nearest | 0 |
    | `timm` | 15, invert and solarize_add among them | 0..10 | probability 1/2 | random | 128 |
    | `timm_increasing` | the same, stronger with the magnitude | 0..10 | 1/2 | random | 128 |
    | `google` | those of `timm` and cutout | 0..30, in tenths | always | nearest | 128 |

    Of the first three, `randaugment` differs from the references in nothing but the random numbers;
    posterize to 0 bits, which Pillow 13 refuses, is black. `google` follows TensorFlow's 8-bit
    arithmetic, in which solarize at magnitude 10 inverts everything; but 0 bits are black there,
    too (TensorFlow 2.21 keeps one), and autocontrast, color and sharpness may differ by one level.

    Args:
        num_ops: ops one after the other.
        magnitude: strength on the scale of the dialect; a traced number, such as a schedule's
            value inside a compiled step, is clipped to the scale.
        dialect: whose ops and tables: see above.
        magnitude_std: standard deviation of a normal law around `magnitude` from which every op's
            strength is drawn (timm's `mstd`), or infinity for the uniform law on 0..magnitude;
            only for the timm dialects.
        magnitude_max: the strongest that a drawn strength may be, 10 by default (timm's `mmax`);
            only for the timm dialects.
        prob: probability of each op; None takes the dialect's.
        weights: relative probabilities of the ops by their names in `augment.ops`; the others are
            never drawn. Draws are then without replacement, as in timm.
        interpolation: of the geometric ops, `"nearest"`, `"bilinear"` or, for timm, `"bicubic"` or
            `"random"` (bilinear or bicubic by a coin at every op, as there); None takes the
            dialect's.
        fill: colour outside the image on the scale 0..255, one number or one a channel; None takes
            the dialect's.
        per_batch: the same ops for the whole batch instead of one draw an example.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `op` int32
        [B, num_ops], an index into `randaugment_arguments(dialect, ...)`; `argument` float32
        [B, num_ops], what the op is given, with its sign; `use` bool [B, num_ops]; with random
        interpolation `bicubic` bool [B, num_ops]; with cutout `center` int32 [B, num_ops, 2], its
        row and column.

    Raises:
        ValueError: an argument is out of its range or unknown to the dialect.

    Source: Cubuk et al., "RandAugment", 2020, section 3; torchvision v2 `RandAugment`, timm
    `rand_augment_transform`, big_vision `distort_image_with_randaugment`.
    """
    space = _dialect(dialect).sampled(interpolation, fill)
    timm = dialect.startswith("timm")
    check_deviation(magnitude_std)
    if not timm and (magnitude_std or magnitude_max is not None):
        raise ValueError(
            f"the dialect {dialect!r} takes a magnitude without spread and bound, got "
            f"magnitude_std={magnitude_std}, magnitude_max={magnitude_max}; the timm dialects do"
        )
    if magnitude_max is not None and not 0 < magnitude_max < np.inf:
        raise ValueError(f"magnitude_max must be positive, got {magnitude_max}")
    bound = 30.0 if not timm else 10.0 if magnitude_max is None else magnitude_max
    if not isinstance(magnitude, jax.core.Tracer):
        magnitude = float(magnitude)
        if not 0 <= magnitude <= bound:
            raise ValueError(
                f"magnitude lies in 0..{bound:g} in the dialect {dialect!r}, got {magnitude:g}"
            )
        if dialect == "torchvision" and magnitude != int(magnitude):
            raise ValueError(
                "magnitude is the index of a bin in the dialect 'torchvision', a whole number, got "
                f"{magnitude:g}; the timm dialects take fractions"
            )
    if prob is None:
        prob = 0.5 if timm else 1.0

    def strength(key: Key, shape: tuple[int, ...]) -> Array:
        return spread(key, magnitude, magnitude_std, bound, shape)

    return random_ops(space, num_ops, strength, prob=prob, weights=weights, per_batch=per_batch)


def random_ops(
    space: Space,
    num_ops: int,
    strength: Callable[[Key, tuple[int, ...]], Array],
    *,
    prob: float = 1.0,
    weights: Mapping[str, float] | None = None,
    per_batch: bool = False,
) -> Augmentation:
    """Ops of a space one after the other, drawn uniformly or, without replacement, by weight.

    Args:
        space: the ops.
        num_ops: how many of them each image goes through.
        strength: `(key, shape) -> strength of each op`.
        prob: probability of each op.
        weights: relative probabilities by name, see `randaugment`.
        per_batch: the same ops for the whole batch.

    Raises:
        ValueError: an argument is out of its range, or a weight is for an op that is not there.
    """
    if num_ops < 1 or num_ops != int(num_ops):
        raise ValueError(f"num_ops is a whole number of at least 1, got {num_ops}")
    check_probability("prob", prob)
    names = list(space.rules)
    shares = np.ones(len(names), np.float32)
    if weights is not None:
        for name in weights:
            if name not in names:
                raise ValueError(f"weights has an unknown op {name!r}; {nearest(name, names)}")
        shares = np.array([weights.get(name, 0.0) for name in names], np.float32)
        if not np.all((shares >= 0) & (shares < np.inf)) or np.sum(shares > 0) < num_ops:
            raise ValueError(
                f"weights must be non-negative numbers, at least num_ops={num_ops} of them "
                f"positive since ops are drawn without replacement, got {dict(weights)}"
            )

    def draw(key: Key, n: int) -> Plan:
        op_key, level_key = jax.random.split(key)
        if weights is None:
            op = random.whole_number(random.uniform(op_key, (n, num_ops)), len(names))
        else:
            # The highest of these scores, in their order, are a weighted draw without replacement.
            noise = jax.random.gumbel(op_key, (n, len(names)), jnp.float32)
            op = jax.lax.top_k(jnp.log(jnp.asarray(shares)) + noise, num_ops)[1].astype(jnp.int32)
        return {"op": op, "strength": strength(level_key, op.shape), "prob": prob}

    return space_policy(space, draw, per_batch=per_batch)


def trivialaugment(
    *, interpolation: str = "nearest", fill: Fill = 0, per_batch: bool = False
) -> Augmentation:
    """TrivialAugment in its wide form: one random op of a random strength.

    The op is one of the 14 of `randaugment`'s dialect `torchvision`, with its own, wider table:
    shears up to 0.99, translations up to 32 pixels, rotations up to 135 degrees, factors from 0.01
    to 1.99, posterize down to 2 bits. The strength is one of 31 bins. Equals torchvision v2
    `TrivialAugmentWide` in everything but the random numbers.

    Args:
        interpolation: of the geometric ops, `"nearest"` or `"bilinear"`.
        fill: colour outside the image on the scale 0..255, one number or one a channel.
        per_batch: the same op for the whole batch instead of one draw an example.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan of `randaugment`,
        for one op.

    Raises:
        ValueError: the interpolation is unknown.

    Source: Müller and Hutter, "TrivialAugment", 2021, section 3 and table 1.
    """

    def strength(key: Key, shape: tuple[int, ...]) -> Array:
        return random.whole_number(random.uniform(key, shape), 31).astype(jnp.float32)

    return random_ops(WIDE.sampled(interpolation, fill), 1, strength, per_batch=per_batch)


def three_augment(*, per_batch: bool = False) -> Augmentation:
    """3-Augment: grayscale, Gaussian blur or solarize, one of the three with equal chances.

    Solarize inverts the levels from 128 on, the blur's deviation is uniform on 0.1..2 pixels.
    Equals timm's `3a` and the three of DeiT III in everything but the random numbers. DeiT III has
    a colour jitter after them: `three_augment() | color_jitter(0.3, 0.3, 0.3)`.

    Args:
        per_batch: the same op for the whole batch instead of one draw an example.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan of `randaugment`,
        for one op: 0 is grayscale, 1 the blur, whose `argument` is its deviation, 2 solarize.

    Source: Touvron et al., "DeiT III", 2022, section 3.
    """
    return random_ops(_THREE, 1, random.uniform, per_batch=per_batch)
