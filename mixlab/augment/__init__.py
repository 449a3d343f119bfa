"""Mixing and augmenting examples: batches to batches.

Every constructor returns an `Augmentation`: `aug.sample(key, batch)` makes all the random decisions
and returns them as a plan, `aug.apply(plan, batch)` carries them out, `aug(key, batch)` does both.
A batch is a dict with `image` [B, H, W, C], uint8 or floating in [0, 1], and, for the ops that mix
labels, a soft `label` [B, K]. `image` may also be videos [B, T, H, W, C], whose frames share every
decision, and, for what is defined on them, 1-D signals [B, L, C], as images of height 1.
Segmentation masks, bounding boxes and keypoints follow, see `augment.targets`; leaves that no op
knows travel along. `augment.ops` has the single image ops.
"""

from collections.abc import Callable

from mixlab import spec
from mixlab.augment import ops
from mixlab.augment.core import Augmentation, chain, identity, one_of, sometimes, views
from mixlab.augment.crops import (
    normalize,
    random_crop,
    random_flip,
    random_resized_crop,
    to_float,
)
from mixlab.augment.efficienttrain import efficienttrain_curriculum, low_frequency_crop
from mixlab.augment.erasing import cutout, random_erasing
from mixlab.augment.jitter import (
    color_jitter,
    random_blur,
    random_grayscale,
    random_solarize,
)
from mixlab.augment.losses import (
    decoupled_loss,
    jensen_shannon,
    jsd_loss,
    rescale_lam,
    two_hot_loss,
)
from mixlab.augment.mixing.boxes import cutmix, patchmix, resizemix
from mixlab.augment.mixing.fourier import fmix, fmix_mask
from mixlab.augment.mixing.frame import label_smoothing, mixup
from mixlab.augment.mixing.manifold import hidden_layers, manifold_mixup
from mixlab.augment.mixing.masks import gridmix, smoothmix
from mixlab.augment.mixing.mosaic import jigsaw, mosaic
from mixlab.augment.mixing.transplant import transplant
from mixlab.augment.multicrop import multi_crop
from mixlab.augment.policies.augmix import augmix
from mixlab.augment.policies.autoaugment import autoaugment
from mixlab.augment.policies.randaugment import (
    randaugment,
    randaugment_arguments,
    three_augment,
    trivialaugment,
)
from mixlab.augment.policies.timm import as_calls, timm

CONSTRUCTORS: dict[str, Callable[..., Augmentation]] = {
    fn.__name__: fn
    for fn in (
        augmix,
        autoaugment,
        chain,
        color_jitter,
        cutmix,
        cutout,
        fmix,
        gridmix,
        identity,
        jigsaw,
        label_smoothing,
        low_frequency_crop,
        mixup,
        mosaic,
        multi_crop,
        normalize,
        one_of,
        patchmix,
        randaugment,
        random_blur,
        random_crop,
        random_erasing,
        random_flip,
        random_grayscale,
        random_resized_crop,
        random_solarize,
        resizemix,
        smoothmix,
        sometimes,
        three_augment,
        timm,
        to_float,
        transplant,
        trivialaugment,
        views,
    )
}
"""Every constructor by its name: what `parse` knows, and what the battery of tests covers."""


def parse(text: str | Augmentation) -> Augmentation:
    """The augmentation that a text describes: `"randaugment() | one_of(mixup(), cutmix())"`.

    Args:
        text: calls of `CONSTRUCTORS` with literal arguments, joined by `|` to a chain. timm's
            strings may stand for calls: `"rand-m9-mstd0.5-inc1 | mixup"`, see `timm`. An empty
            text is the identity. An `Augmentation` is returned as it is.

    Raises:
        ValueError: the text does not parse or names something unknown; the message lists what is
            known.
        TypeError: `text` is neither text nor Augmentation, or a constructor does not take an
            argument.
    """
    if isinstance(text, Augmentation):
        return text
    if not isinstance(text, str):
        raise TypeError(f"parse takes a text or an Augmentation, got {text!r}")
    if not text.strip():
        return identity()
    aug = spec.parse(as_calls(text), CONSTRUCTORS, combine=chain, what="augmentation")
    if not isinstance(aug, Augmentation):
        raise ValueError(f"{text!r} describes no augmentation but {aug!r}; call one, as mixup()")
    return aug


__all__ = [
    "CONSTRUCTORS",
    "Augmentation",
    "augmix",
    "autoaugment",
    "chain",
    "color_jitter",
    "cutmix",
    "cutout",
    "decoupled_loss",
    "efficienttrain_curriculum",
    "fmix",
    "fmix_mask",
    "gridmix",
    "hidden_layers",
    "identity",
    "jensen_shannon",
    "jigsaw",
    "jsd_loss",
    "label_smoothing",
    "low_frequency_crop",
    "manifold_mixup",
    "mixup",
    "mosaic",
    "multi_crop",
    "normalize",
    "one_of",
    "ops",
    "parse",
    "patchmix",
    "randaugment",
    "randaugment_arguments",
    "random_blur",
    "random_crop",
    "random_erasing",
    "random_flip",
    "random_grayscale",
    "random_resized_crop",
    "random_solarize",
    "rescale_lam",
    "resizemix",
    "smoothmix",
    "sometimes",
    "three_augment",
    "timm",
    "to_float",
    "transplant",
    "trivialaugment",
    "two_hot_loss",
    "views",
]
