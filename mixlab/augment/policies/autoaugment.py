"""AutoAugment: one of 25 searched pairs of ops, each op with its own strength and probability."""

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import Augmentation
from mixlab.augment.ops.geometric import Fill
from mixlab.augment.policies.autoaugment_tables import TABLES
from mixlab.augment.policies.randaugment import check_deviation, space_policy, spread
from mixlab.augment.policies.spaces import Space, google_rules, only, timm_rules, torchvision_rules
from mixlab.spec import nearest
from mixlab.types import Key, Plan

_TORCHVISION = Space(torchvision_rules(), 9.0, "torchvision", "nearest", 0)
_GOOGLE = Space(google_rules(translate=250.0, cutout=100.0), 10.0, "google", "nearest", 128)


def _timm(bits: str) -> Space:
    return Space(timm_rules(increasing=False, bits=bits), 10.0, "pil", "random", 128)


POLICIES = {
    "cifar10": ("cifar10", _TORCHVISION),
    "imagenet": ("imagenet", _TORCHVISION),
    "svhn": ("svhn", _TORCHVISION),
    "original": ("imagenet", _timm("original")),
    "originalr": ("imagenet", _timm("increasing")),
    "v0": ("v0", _timm("decreasing")),
    "v0r": ("v0", _timm("increasing")),
    "google_v0": ("v0", _GOOGLE),
}
"""The table of sub-policies and the space of ops behind each name."""


def autoaugment(
    policy: str = "imagenet",
    *,
    magnitude_std: float = 0.0,
    interpolation: str | None = None,
    fill: Fill | None = None,
    per_batch: bool = False,
) -> Augmentation:
    """AutoAugment: one of 25 searched pairs of ops, each with its own strength and probability.

    | policy | equals, but for the random numbers | interpolation | fill |
    |---|---|---|---|
    | `imagenet`, `cifar10`, `svhn` | torchvision v2 `AutoAugment` | nearest | 0 |
    | `original`, `originalr` | timm's: the table of `imagenet` | random | 128 |
    | `v0`, `v0r` | timm's: the table of Google's EfficientNet | random | 128 |
    | `google_v0` | Google's TensorFlow code (big_vision, `v0`) | nearest | 128 |

    timm's names that end in r let posterize keep 4 bits at no strength and 0 at full, `original`
    4 to 8 and `v0` 0 to 4. Its bits of 0, which Pillow 13 refuses, are black.

    Args:
        policy: which table and whose ops, see above.
        magnitude_std: standard deviation of a normal law around the strength of every op, clipped
            to 0..10 (timm's `mstd`); only for the policies of timm.
        interpolation: of the geometric ops, see `randaugment`; None takes the policy's.
        fill: colour outside the image on the scale 0..255; None takes the policy's.
        per_batch: the same pair for the whole batch instead of one draw an example.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with the plan `pair` int32 [B],
        which of the 25 it is, and `op`, `argument`, `use` [B, 2] as in `randaugment`; `op` counts
        the ops that the policy has, in the order of `randaugment_arguments`.

    Raises:
        ValueError: an argument is unknown or out of its range.

    Source: Cubuk et al., "AutoAugment", 2019, tables 7, 8 and 9.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown AutoAugment policy {policy!r}; {nearest(str(policy), POLICIES)}")
    table, space = POLICIES[policy]
    space = space.sampled(interpolation, fill)
    check_deviation(magnitude_std)
    if magnitude_std and space.dialect != "pil":
        raise ValueError(f"the policy {policy!r} takes no magnitude_std, got {magnitude_std}")
    pairs = [(row[:3], row[3:]) for row in TABLES[table]]
    met = {name for pair in pairs for name, _, _ in pair}
    space = only(space, *met)
    names = list(space.rules)
    ops = np.array([[names.index(name) for name, _, _ in pair] for pair in pairs], np.int32)
    probs = np.array([[prob for _, prob, _ in pair] for pair in pairs], np.float32)
    levels = np.array([[level for _, _, level in pair] for pair in pairs], np.float32)

    def draw(key: Key, n: int) -> Plan:
        pair_key, level_key = jax.random.split(key)
        pair = jax.random.randint(pair_key, (n,), 0, len(pairs), jnp.int32)
        op, prob, level = (jnp.asarray(x)[pair] for x in (ops, probs, levels))
        level = spread(level_key, level, magnitude_std, space.top, level.shape)
        return {"pair": pair, "op": op, "strength": level, "prob": prob}

    return space_policy(space, draw, per_batch=per_batch)
