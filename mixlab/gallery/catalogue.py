"""What the sheet shows: every method and op, with arguments by which one sees what it does."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mixlab import augment
from mixlab.augment import Augmentation
from mixlab.types import Batch

Method = Callable[[tuple[int, int]], Augmentation]
"""From height and width to an augmentation that shows well on images of that size."""


def _plain(name: str, **options: Any) -> Method:
    return lambda size: augment.CONSTRUCTORS[name](**options)


def _jigsaw(size: tuple[int, int]) -> Augmentation:
    rows, columns = (max(n for n in (1, 2, 3, 4) if length % n == 0) for length in size)
    return augment.jigsaw((rows, columns))


def _transplant(size: tuple[int, int]) -> Augmentation:
    """Transplants what is bright, for want of a segmentation."""
    aug = augment.transplant(exclude=0, prob=1.0)

    def segmented(batch: Batch) -> Batch:
        grey = jnp.mean(batch["image"], axis=-1, dtype=jnp.float32)
        bright = grey > jnp.mean(grey, axis=(1, 2), keepdims=True)
        return {**batch, "mask": bright.astype(jnp.int32)}

    return Augmentation(
        lambda key, batch: aug.sample(key, segmented(batch)),
        lambda plan, batch: aug.apply(plan, segmented(batch)),
    )


METHODS: dict[str, dict[str, Method]] = {
    "Mixing": {
        "mixup": _plain("mixup", alpha=8.0, pairing="roll"),
        "cutmix": _plain("cutmix", minmax=(0.4, 0.8), pairing="roll"),
        "resizemix": _plain("resizemix", scope=(0.4, 0.7), pairing="roll"),
        "fmix": _plain("fmix", alpha=8.0, pairing="roll"),
        "smoothmix": _plain("smoothmix", spread=(0.4, 0.5), pairing="roll"),
        "gridmix": _plain("gridmix", alpha=8.0, pairing="roll"),
        "patchmix": lambda size: augment.patchmix(min(size) // 2, pairing="roll"),
        "transplant": _transplant,
    },
    "Tiles": {"mosaic": _plain("mosaic"), "jigsaw": _jigsaw},
    "Erasing": {
        "cutout": lambda size: augment.cutout(size=min(size) * 3 // 8),
        "random_erasing": _plain(
            "random_erasing", prob=1.0, area=(0.15, 1 / 3), value="pixel", noise=(0.5, 0.25)
        ),
    },
    "Tones": {
        "color_jitter": _plain("color_jitter", brightness=0.4, contrast=0.4, hue=(0.3, 0.5)),
        "random_grayscale": _plain("random_grayscale", prob=1.0),
        "random_blur": lambda size: augment.random_blur((min(size) / 50, min(size) / 40), prob=1.0),
        "random_solarize": _plain("random_solarize", prob=1.0),
    },
    "Crops, flips, views": {
        "random_crop": lambda size: augment.random_crop(padding=min(size) // 4),
        "random_flip": _plain("random_flip", p=1.0),
        "random_resized_crop": lambda size: augment.random_resized_crop(size, (0.1, 0.3)),
        "low_frequency_crop": lambda size: augment.low_frequency_crop(max(1, min(size) // 8)),
        "multi_crop": lambda size: augment.multi_crop((min(size), max(1, min(size) // 3))),
        "views": lambda size: augment.views(4, augment.randaugment(magnitude=15)),
    },
    "Policies": {
        "randaugment": _plain("randaugment", magnitude=15),
        "trivialaugment": _plain("trivialaugment"),
        "autoaugment": _plain("autoaugment"),
        "augmix": _plain("augmix", severity=8),
        "three_augment": _plain("three_augment"),
        "timm": _plain("timm", text="rand-m9-p1-inc1"),
    },
}
"""What `sheet` shows of `augment.CONSTRUCTORS`, under its headings."""

NOT_SHOWN = ("chain", "identity", "label_smoothing", "normalize", "one_of", "sometimes", "to_float")
"""The constructors that change no picture by themselves."""

OPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "Geometric ops": {
        "rotate": (25,),
        "shear_x": (0.3,),
        "shear_y": (0.3,),
        "translate_x": (0.25,),
        "translate_y": (0.25,),
        "affine": (20, (0, 0), 0.8, (20, 0)),
        "center_crop": (0.5,),
        "resize": (0.125,),
    },
    "Photometric ops": {
        "brightness": (1.6,),
        "contrast": (1.8,),
        "color": (0.2,),
        "sharpness": (6,),
        "autocontrast": (),
        "equalize": (),
        "invert": (),
        "posterize": (2,),
        "solarize": (128,),
        "solarize_add": (80,),
        "hue": (0.4,),
        "gamma": (0.5,),
        "grayscale": (),
        "gaussian_blur": (2,),
    },
}
"""The arguments that `sheet` gives to `augment.ops`, under its headings."""

SHARES = ("center_crop", "resize", "translate_x", "translate_y")
"""The ops whose argument above is a share of the side, where the op takes pixels."""
