"""Random tones: colour jitter, grey, blur, solarize, each with a probability an example.

They work on images [B, H, W, C] or [B, T, H, W, C], whose frames share the decision.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import Augmentation, check_probability, entry, image_of
from mixlab.augment.ops.blur import gaussian_blur
from mixlab.augment.ops.dispatch import run_each
from mixlab.augment.ops.photometric import brightness as brighten
from mixlab.augment.ops.photometric import color, solarize
from mixlab.augment.ops.photometric import contrast as set_contrast
from mixlab.augment.ops.tones import grayscale
from mixlab.augment.ops.tones import hue as turn_hue
from mixlab.types import Array, Batch, Key, Plan

Range = float | tuple[float, float]


def _range(name: str, value: Range, center: float, bounds: tuple[float, float]) -> np.ndarray:
    """Lowest and highest factor: the pair itself, or the number to either side of the centre."""
    if isinstance(value, tuple | list):
        ends = np.asarray(value, np.float64)
        sound = ends.shape == (2,) and bounds[0] <= ends[0] <= ends[1] <= bounds[1]
    else:
        sound = 0.0 <= value <= bounds[1]
        ends = np.clip([center - value, center + value], *bounds)
    if not (sound and np.all(np.isfinite(ends))):
        raise ValueError(
            f"{name} is a number >= 0 or a pair min <= max, within {bounds[0]:g}..{bounds[1]:g}, "
            f"got {value!r}"
        )
    return ends


def color_jitter(
    brightness: Range = 0.0,
    contrast: Range = 0.0,
    saturation: Range = 0.0,
    hue: Range = 0.0,
    *,
    prob: float = 1.0,
) -> Augmentation:
    """Colour jitter: brightness, contrast, saturation and hue by random factors in random order.

    Equals torchvision `ColorJitter` (of tensors, within one level an op) in everything but the
    random numbers. SwAV has `color_jitter(0.8, 0.8, 0.8, 0.2, prob=0.8)`, DINO
    `color_jitter(0.4, 0.4, 0.2, 0.1, prob=0.8)`, DeiT III `color_jitter(0.3, 0.3, 0.3)`.

    Args:
        brightness: x for factors uniform in [max(0, 1 - x), 1 + x], or their range (min, max).
        contrast: likewise.
        saturation: likewise.
        hue: x in [0, 0.5] for shifts uniform in [-x, x], in turns of the colour circle, or their
            range.
        prob: probability that an example is changed.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `factor` float32
        [B, 4] of brightness, contrast, saturation and hue; `order` int32 [B, 4], which of them is
        first, second, ...; `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.

    Source: torchvision `ColorJitter`.
    """
    check_probability("prob", prob)
    given = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    ranges = [_range(name, value, 1.0, (0.0, np.inf)) for name, value in given.items()]
    low, high = np.stack([*ranges, _range("hue", hue, 0.0, (-0.5, 0.5))], axis=1)
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    moves = (low != neutral) | (high != neutral)
    ops: tuple[Callable[[Array, Array], Array], ...] = (brighten, set_contrast, color, turn_hue)
    branches = [op for op, move in zip(ops, moves, strict=True) if move]
    branches.append(lambda image, factor: image)
    still = len(branches) - 1
    branch_of = np.where(moves, np.cumsum(moves) - 1, still).astype(np.int32)

    def sample(key: Key, batch: Batch) -> Plan:
        size = image_of(batch, ranks=(4, 5)).shape[0]
        factor_key, order_key, use_key = jax.random.split(key, 3)
        u = jax.random.uniform(factor_key, (size, 4), jnp.float32)
        order = jnp.argsort(jax.random.uniform(order_key, (size, 4)), axis=-1)
        return {
            "factor": jnp.asarray(low, jnp.float32) + jnp.asarray(high - low, jnp.float32) * u,
            "order": order.astype(jnp.int32),
            "use": jax.random.uniform(use_key, (size,)) < prob,
        }

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(4, 5))
        factor, order = (entry(plan, name, (len(image), 4)) for name in ("factor", "order"))
        use = entry(plan, "use", (len(image),))
        branch = jnp.where(use[:, None], jnp.asarray(branch_of)[order], still)
        factor = jnp.take_along_axis(factor, order, axis=1)
        return {**batch, "image": run_each(branches, image, branch, factor)}

    return Augmentation(sample, apply)


def random_grayscale(prob: float = 0.1) -> Augmentation:
    """Turns examples grey, keeping their channels, as torchvision `RandomGrayscale`.

    Args:
        prob: probability for each example; SwAV and DINO have 0.2.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `use` bool [B].

    Raises:
        ValueError: `prob` is no probability.
    """
    return _random_op(lambda image, _: grayscale(image), prob)


def random_solarize(threshold: float = 128.0, *, prob: float = 0.2) -> Augmentation:
    """Inverts the levels at and above a threshold, as torchvision `RandomSolarize`.

    Args:
        threshold: on the scale 0..255 whatever the dtype.
        prob: probability for each example; DINO has 0.2.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0.0 <= threshold <= 256.0:
        raise ValueError(f"threshold lies in 0..256, on the scale of levels, got {threshold}")
    return _random_op(lambda image, _: solarize(image, threshold), prob)


def random_blur(sigma: tuple[float, float] = (0.1, 2.0), *, prob: float = 0.5) -> Augmentation:
    """Blurs with a Gaussian of random deviation, as `ops.gaussian_blur`.

    Equals DINO's `GaussianBlur`, by PIL, in everything but the random numbers. torchvision's
    samples the Gaussian at the pixels of a fixed kernel instead.

    Args:
        sigma: range of the deviation, in pixels; it is uniform.
        prob: probability for each example; SwAV and SimCLR have 0.5, DINO 1.0, 0.1 and 0.5.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `use` bool [B] and
        `sigma` float32 [B].

    Raises:
        ValueError: an argument is out of its range.
    """
    if len(sigma) != 2 or not 0.0 <= sigma[0] <= sigma[1] < np.inf:
        raise ValueError(f"sigma is a pair 0 <= min <= max of pixels, got {sigma!r}")
    highest = max(float(sigma[1]), 1e-3)
    return _random_op(
        lambda image, level: gaussian_blur(image, level, max_sigma=highest), prob, sigma=sigma
    )


def _random_op(
    op: Callable[[Array, Array], Array], prob: float, **drawn: tuple[float, float]
) -> Augmentation:
    """An augmentation by `op(image, argument)`.

    Args:
        op: what is applied to an image.
        prob: probability that it is.
        **drawn: name and range of the argument, which is uniform; without it it is 0.
    """
    check_probability("prob", prob)

    def sample(key: Key, batch: Batch) -> Plan:
        shape = image_of(batch, ranks=(4, 5)).shape[:1]
        use_key, key = jax.random.split(key)
        plan: Plan = {"use": jax.random.uniform(use_key, shape) < prob}
        for name, (low, high) in drawn.items():
            plan[name] = jax.random.uniform(key, shape, jnp.float32, low, high)
        return plan

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(4, 5))
        use, *argument = (entry(plan, name, image.shape[:1]) for name in ("use", *drawn))
        branch = use.astype(jnp.int32)
        level = argument[0] if argument else jnp.zeros(image.shape[:1], jnp.float32)
        branches = (lambda image, level: image, op)
        image = run_each(branches, image, branch[:, None], level[:, None])
        return {**batch, "image": image}

    return Augmentation(sample, apply)
