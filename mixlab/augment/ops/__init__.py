"""The single image ops, `augment.ops.rotate(image, 30)` and so on, gathered from their families.

Each takes one image [H, W, C], or a batch [B, H, W, C] or [B, T, H, W, C], uint8 in 0..255 or
floating in [0, 1], and draws no random numbers.
"""

from mixlab.augment.ops.affine import affine
from mixlab.augment.ops.blur import gaussian_blur
from mixlab.augment.ops.geometric import rotate, shear_x, shear_y, translate_x, translate_y
from mixlab.augment.ops.photometric import (
    autocontrast,
    brightness,
    color,
    contrast,
    equalize,
    invert,
    posterize,
    sharpness,
    solarize,
    solarize_add,
)
from mixlab.augment.ops.resized import center_crop, resize
from mixlab.augment.ops.tones import gamma, grayscale, hue

__all__ = [
    "affine",
    "autocontrast",
    "brightness",
    "center_crop",
    "color",
    "contrast",
    "equalize",
    "gamma",
    "gaussian_blur",
    "grayscale",
    "hue",
    "invert",
    "posterize",
    "resize",
    "rotate",
    "sharpness",
    "shear_x",
    "shear_y",
    "solarize",
    "solarize_add",
    "translate_x",
    "translate_y",
]
