"""The strings by which timm names policies: `"rand-m9-mstd0.5-inc1"`, `"augmix-m5-w4-d2"`."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mixlab.augment.core import Augmentation
from mixlab.augment.ops.geometric import Fill
from mixlab.augment.policies.augmix import augmix
from mixlab.augment.policies.autoaugment import autoaugment
from mixlab.augment.policies.randaugment import RANDAUGMENT, random_ops, spread, three_augment
from mixlab.augment.policies.spaces import Space, only, timm_rules
from mixlab.spec import nearest
from mixlab.types import Array, Key

_EVERY = Space(timm_rules(increasing=True, bits="increasing"), 10.0, "pil", "random", 128)
_THREE = ("solarize", "desaturate", "gaussian_blur")
_WEIGHTS = {
    "3aw": {
        "solarize": 6.0, "desaturate": 6.0, "gaussian_blur": 6.0, "rotate": 3.0, "shear_x": 2.0,
        "shear_y": 2.0, "posterize": 1.0, "autocontrast": 1.0, "color": 1.0, "sharpness": 1.0,
        "contrast": 1.0, "brightness": 1.0, "equalize": 1.0, "invert": 1.0,
    },
    "weights": {
        "rotate": 3.0, "shear_x": 2.0, "shear_y": 2.0, "translate_x": 1.0, "translate_y": 1.0,
        "color": 0.25, "sharpness": 0.25, "autocontrast": 0.25, "solarize": 0.05,
        "solarize_add": 0.05, "contrast": 0.05, "brightness": 0.05, "equalize": 0.05,
        "posterize": 0.05, "invert": 0.05,
    },
}  # fmt: skip
"""timm's weighted sets of ops."""

_AUTO = ("original", "originalr", "v0", "v0r")
_SECTIONS: dict[str, dict[str, type]] = {
    "rand": {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int, "t": str},
    "augmix": {"m": int, "w": int, "d": int, "a": float, "mstd": float},
    **{name: {"mstd": float} for name in _AUTO},
    "3a": {},
}
"""What may stand in front, and the sections that may follow it."""


def timm(
    text: str,
    *,
    interpolation: str = "random",
    fill: Fill = 128,
    per_batch: bool = False,
) -> Augmentation:
    """The policy that timm builds from a string, its `auto_augment` argument (`--aa`).

    | string | policy | sections |
    |---|---|---|
    | `rand-...` | `randaugment` | m magnitude (10), n ops (2), p probability of each (0.5), mstd |
    | | | spread of the magnitude (0; above 100: uniform on 0..m), mmax its bound (10), |
    | | | inc1 increasing ops, t set of ops (3a, 3aw, weights) |
    | `augmix-...` | `augmix` | m severity (3), w width (3), d depth (random), a alpha (1), mstd |
    | `original`, `originalr`, `v0`, `v0r` | `autoaugment` | mstd |
    | `3a` | `three_augment` | |

    Equals timm but for the random numbers, and in these points: `inc0` is false (there every value
    of inc is true); what timm passes over in silence, such as a section without a number or an
    unknown set of ops, is an error; and augmix's blended mode, `b1`, which only rounds otherwise,
    is not offered.

    Args:
        text: the string. `parse` also takes it bare: `"rand-m9-inc1 | mixup"`.
        interpolation: of the geometric ops, see `randaugment`.
        fill: colour outside the image on the scale 0..255, one number or one a channel; timm's
            training script passes the mean colour of its data.
        per_batch: one draw for the whole batch instead of one an example.

    Raises:
        ValueError: a part of the string is unknown or out of its range.
        TypeError: it is no string.

    Source: timm `auto_augment_transform`, `rand_augment_transform`, `augment_and_mix_transform`.
    """
    if not isinstance(text, str):
        raise TypeError(f"timm takes a string, such as 'rand-m9-mstd0.5-inc1', got {text!r}")
    name, options = _parsed(text)
    sampling: dict[str, Any] = {
        "interpolation": interpolation, "fill": fill, "per_batch": per_batch
    }  # fmt: skip
    if name == "rand":
        return _rand(options, **sampling)
    if name == "3a":
        return three_augment(per_batch=per_batch)
    if name == "augmix":
        return augmix(
            options.get("m", 3),
            width=options.get("w", 3),
            depth=options.get("d"),
            alpha=options.get("a", 1.0),
            magnitude_std=options.get("mstd"),
            dialect="timm",
            **sampling,
        )
    return autoaugment(name, magnitude_std=options.get("mstd", 0.0), **sampling)


def _rand(
    options: dict[str, Any], *, interpolation: str, fill: Fill, per_batch: bool
) -> Augmentation:
    deviation, bound = options.get("mstd", 0.0), options.get("mmax", 10)
    deviation = np.inf if deviation > 100 else deviation
    chosen = options.get("t")
    weights = None
    if chosen is None:
        space = RANDAUGMENT["timm_increasing" if options.get("inc") else "timm"]
    elif chosen == "3a":
        space = only(_EVERY, *_THREE)
    elif chosen in _WEIGHTS:
        weights = _WEIGHTS[chosen]
        space = only(_EVERY, *weights)
    else:
        raise ValueError(f"unknown set of ops {chosen!r}; {nearest(chosen, ['3a', *_WEIGHTS])}")

    def strength(key: Key, shape: tuple[int, ...]) -> Array:
        return spread(key, options.get("m", 10), deviation, bound, shape)

    return random_ops(
        space.sampled(interpolation, fill),
        options.get("n", 2),
        strength,
        prob=options.get("p", 0.5),
        weights=weights,
        per_batch=per_batch,
    )


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The first part of a string, and its sections by their letters."""
    name, *sections = text.split("-")
    if name not in _SECTIONS:
        raise ValueError(f"unknown timm policy {name!r} in {text!r}; {nearest(name, _SECTIONS)}")
    known = _SECTIONS[name]
    options: dict[str, Any] = {}
    for section in sections:
        match = re.fullmatch(r"(t)(.*)|([a-z]+)(\d+(?:\.\d*)?)?", section)
        letters = (match[1] or match[3]) if match else section
        value = (match[2] if match[1] else match[4]) if match else None
        if letters not in known:
            listed = nearest(letters, known) if known else f"{name!r} takes none"
            raise ValueError(f"unknown section {section!r} in {text!r}; {listed}")
        kind: Callable[[str], Any] = known[letters]
        try:
            options[letters] = kind(value or "")
        except ValueError as error:
            raise ValueError(
                f"section {section!r} in {text!r} needs a number ({known[letters].__name__})"
            ) from error
    return name, options


_BARE = re.compile(
    rf"""(?<![\w'"=.-])(?:(?:rand|{"|".join(_AUTO)}|3a)(?:-\w+(?:\.\d*)?)*|augmix(?:-\w+(?:\.\d*)?)+)"""
    r"""(?![\w'"(.-])"""
)


def as_calls(text: str) -> str:
    """Writes bare strings as calls: `rand-m9 | mixup` becomes `timm('rand-m9') | mixup`."""
    return _BARE.sub(lambda match: f"timm({match[0]!r})", text)
