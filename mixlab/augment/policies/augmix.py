"""AugMix: an example blended with a mixture of chains of ops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import Augmentation, along_batch, image_of, size_of, working_dtype
from mixlab.augment.mixing.frame import beta, check_alpha, num_uniforms
from mixlab.augment.ops.geometric import Fill
from mixlab.augment.policies.randaugment import check_deviation, spread
from mixlab.augment.policies.spaces import (
    NOT_OF_RANDAUGMENT,
    Space,
    timm_rules,
    torchvision_rules,
    without,
)
from mixlab.spec import nearest
from mixlab.types import Array, Batch, Key, Plan

SPACES = {
    "timm": Space(
        without(
            timm_rules(increasing=True, bits="increasing"),
            "invert",
            "solarize_add",
            *NOT_OF_RANDAUGMENT,
        ),
        10.0,
        "pil",
        "random",
        128,
    ),
    "torchvision": Space(
        without(
            torchvision_rules(bits=(4, 0), reach=lambda length: length / 3.0), "identity", "invert"
        ),
        9.0,
        "torchvision",
        "bilinear",
        0,
    ),
}
"""The spaces of AugMix by dialect."""

_NOT_IN_THE_PAPER = ("brightness", "color", "contrast", "sharpness")


def dirichlet(key: Key, alpha: float, shape: tuple[int, ...]) -> Array:
    """Draws from the symmetric Dirichlet law along the last axis, float32 of the given shape.

    Normalised Gamma(alpha) variables, whose logarithms are those of Gamma(alpha + 1), drawn by
    Marsaglia and Tsang's rule, and of U / alpha, so that a small alpha does not underflow. Of eight
    proposals the first that the rule accepts is taken: all fail with a probability below 1e-10,
    and without a loop there is little to compile. `alpha = 0` gives equal weights.
    """
    if alpha == 0.0:
        return jnp.full(shape, 1.0 / shape[-1], jnp.float32)
    normal_key, accept_key, power_key = jax.random.split(key, 3)
    log_u = jnp.log1p(-jax.random.uniform(power_key, shape, jnp.float32))
    if alpha == 1.0:
        return jax.nn.softmax(jnp.log(-log_u), axis=-1)
    d = alpha + 2.0 / 3.0
    x = jax.random.normal(normal_key, (8, *shape), jnp.float32)
    v = jnp.maximum(1.0 + x / (9.0 * d) ** 0.5, 0.0) ** 3
    log_v = jnp.log(jnp.maximum(v, 1e-30))
    log_accept = jnp.log1p(-jax.random.uniform(accept_key, x.shape, jnp.float32))
    accepted = (v > 0.0) & (log_accept < 0.5 * jnp.square(x) + d * (1.0 - v + log_v))
    first = jnp.argmax(accepted, axis=0)
    log_gamma = jnp.take_along_axis(log_v, first[None], axis=0)[0] + log_u / alpha
    return jax.nn.softmax(log_gamma, axis=-1)


def augmix(
    severity: float = 3,
    *,
    width: int = 3,
    depth: int | None = None,
    alpha: float = 1.0,
    dialect: str = "torchvision",
    all_ops: bool = True,
    magnitude_std: float | None = None,
    interpolation: str | None = None,
    fill: Fill | None = None,
    per_batch: bool = False,
) -> Augmentation:
    """AugMix: blends an example with a mixture of chains of random ops of it.

    With weights w ~ Dirichlet(alpha, ..., alpha) and m ~ Beta(alpha, alpha), the result is
    (1 - m) x + m * sum of w_i chain_i(x). The label stays; `jsd_loss` with
    `views(3, augmix(), clean=True)` is the loss that belongs to it. Masks, boxes and keypoints stay
    as well: they are true of x.

    Equals torchvision v2 `AugMix` or timm's `AugMixAugment`, but for the random numbers; both
    truncate uint8 to whole levels, timm the mixture already. timm's fails on images that are not
    square, this one does not.

    | dialect | ops | strength of an op | interpolation | fill |
    |---|---|---|---|---|
    | `torchvision` | 13, all certain | one of the first `severity` of ten bins | bilinear | 0 |
    | `timm` | the same 13, stronger | uniform on 0..severity of 10 | random | 128 |

    Args:
        severity: strength, a whole number in 1..10 for torchvision, in 0..10 for timm.
        width: number of chains.
        depth: ops a chain; None draws 1, 2 or 3 for each.
        alpha: parameter of both laws; 0 leaves the example as it is.
        dialect: `"torchvision"` or `"timm"`.
        all_ops: with color, contrast, brightness and sharpness, which are not in the paper since
            they resemble the corruptions that it tests on.
        magnitude_std: standard deviation of a normal law around `severity`, clipped to 0..10, in
            place of the uniform law; only for timm.
        interpolation: of the geometric ops, see `randaugment`; None takes the dialect's.
        fill: colour outside the image on the scale 0..255; None takes the dialect's.
        per_batch: one draw for the whole batch instead of one an example.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `lam` float32 [B],
        the weight 1 - m of the example itself; `weights` float32 [B, width]; `op`, `argument`,
        `use` (and `bicubic`) [B, width, depth] as in `randaugment`.

    Raises:
        ValueError: an argument is out of its range or unknown to the dialect.

    Source: Hendrycks et al., "AugMix", 2020, section 3 and algorithm 1.
    """
    if dialect not in SPACES:
        raise ValueError(f"unknown AugMix dialect {dialect!r}; {nearest(str(dialect), SPACES)}")
    timm = dialect == "timm"
    if not (0 if timm else 1) <= severity <= 10 or (not timm and severity != int(severity)):
        accepted = "a number in 0..10" if timm else "a whole number in 1..10"
        raise ValueError(f"severity is {accepted} in the dialect {dialect!r}, got {severity}")
    for name, count in (("width", width), ("depth", 1 if depth is None else depth)):
        if count < 1 or count != int(count):
            raise ValueError(f"{name} is a whole number of at least 1, got {count}")
    check_alpha(alpha)
    if magnitude_std is not None:
        check_deviation(magnitude_std)
        if not timm:
            raise ValueError(f"only the dialect 'timm' takes magnitude_std, got {magnitude_std}")
    space = SPACES[dialect].sampled(interpolation, fill)
    if not all_ops:
        space = dataclasses.replace(space, rules=without(space.rules, *_NOT_IN_THE_PAPER))

    def strength(key: Key, shape: tuple[int, ...]) -> Array:
        if timm:
            deviation = np.inf if magnitude_std is None else magnitude_std
            return spread(key, severity, deviation, 10.0, shape)
        return jax.random.randint(key, shape, 0, int(severity), jnp.int32).astype(jnp.float32)

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=(4, 5))
        size, n = image.shape[0], 1 if per_batch else image.shape[0]
        keys = jax.random.split(key, 6)
        shape = (n, width, 3 if depth is None else depth)
        op = jax.random.randint(keys[0], shape, 0, len(space.rules), jnp.int32)
        level = strength(keys[1], shape)
        plan = space.decide(keys[2], op, level, size_of(image.shape))
        plan["use"] = jnp.ones(shape, bool)
        if depth is None:
            drawn = jax.random.randint(keys[3], (n, width, 1), 1, 4, jnp.int32)
            plan["use"] = jnp.arange(3, dtype=jnp.int32) < drawn
        plan["weights"] = dirichlet(keys[4], alpha, (n, width))
        u = jax.random.uniform(keys[5], (num_uniforms(alpha), n), jnp.float32)
        plan["lam"] = beta(u, alpha)
        return {name: jnp.broadcast_to(x, (size, *x.shape[1:])) for name, x in plan.items()}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch, ranks=(4, 5))
        dtype = working_dtype(image.dtype)
        chains = {
            name: jnp.reshape(jnp.asarray(x), (-1, *np.shape(x)[2:]))
            for name, x in plan.items()
            if name not in ("lam", "weights")
        }
        runs = space.run(chains, jnp.repeat(image, width, axis=0))
        runs = runs.reshape(image.shape[0], width, *image.shape[1:])
        lam = along_batch(jnp.asarray(plan["lam"]).astype(dtype), image)
        weights = jnp.asarray(plan["weights"]).astype(dtype)
        x = image.astype(dtype)
        mixed = lam * x if not timm else jnp.zeros_like(x)
        for i in range(width):
            weight = along_batch(weights[:, i], image)
            weight = weight if timm else weight * (1.0 - lam)
            mixed = mixed + weight * runs[:, i].astype(dtype)
        if timm:
            mixed = _truncated(mixed, image.dtype).astype(dtype)
            mixed = x + (1.0 - lam) * (mixed - x)
        return {**batch, "image": _truncated(mixed, image.dtype)}

    return Augmentation(sample, apply, ops=tuple(space.rules))


def _truncated(x: Array, dtype: np.dtype) -> Array:
    """Clips to the range of `dtype` and casts to it, dropping fractions of a level."""
    return jnp.clip(x, 0.0, 255.0 if dtype == jnp.uint8 else 1.0).astype(dtype)
