"""What policies add to the single image operations, restated: tables, Google's geometry, AugMix.

Google's geometric operations are those of TensorFlow Addons: affine maps of whole pixel indices
from the output to the input, the nearest pixel with halves rounded away from zero, and one colour
wherever the map leaves the image.
"""

import math

import numpy as np

from tests.reference import images


def google_sample(image, matrix, fill):
    """The pixels at `matrix @ (column, row, 1)` of an image [H, W, C]."""
    height, width = image.shape[:2]
    out = np.empty_like(image)
    for row in range(height):
        for col in range(width):
            x, y = (a * col + b * row + c for a, b, c in matrix)
            x, y = (int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in (x, y))
            inside = 0 <= x < width and 0 <= y < height
            out[row, col] = image[y, x] if inside else fill
    return out


def google(name, image, argument, fill, center=None):
    """One of Google's geometric operations, or cutout around a centre (row, column)."""
    height, width = image.shape[:2]
    if name == "cutout":
        out, (row, col) = image.copy(), center
        pad = int(argument)
        top, left = max(0, row - pad), max(0, col - pad)
        below, right = max(0, height - row - pad), max(0, width - col - pad)
        out[top : height - below, left : width - right] = fill
        return out
    if name == "rotate":
        c, s = math.cos(math.radians(argument)), math.sin(math.radians(argument))
        w, h = width - 1, height - 1
        x = (w - (c * w - s * h)) / 2
        y = (h - (s * w + c * h)) / 2
        return google_sample(image, [[c, -s, x], [s, c, y]], fill)
    matrix = {
        "shear_x": [[1, argument, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [argument, 1, 0]],
        "translate_x": [[1, 0, argument], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, argument]],
    }[name]
    return google_sample(image, matrix, fill)


def google_argument(name, level, translate=100, cutout=40):
    """Google's argument of an operation at `level` of 10, with a positive sign."""
    share = level / 10
    enhance = 1.8 * share + 0.1
    return {
        "rotate": 30 * share,
        "posterize": int(4 * share),
        "solarize": int(256 * share),
        "solarize_add": int(110 * share),
        "color": enhance,
        "contrast": enhance,
        "brightness": enhance,
        "sharpness": enhance,
        "shear_x": 0.3 * share,
        "shear_y": 0.3 * share,
        "translate_x": translate * share,
        "translate_y": translate * share,
        "cutout": int(cutout * share),
    }.get(name, 0.0)


def gaussian_blur(image, sigma):
    """Pillow's blur: three boxes with fractional ends on each axis, rounded to levels each time."""
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) ** 2)
    inner = int(np.float32(2**24) / np.float32(2 * (whole + part) + 1))
    outer = (2**24 - (2 * whole + 1) * inner) // 2
    out = image.astype(np.int64)
    for axis in (1, 0):
        last = image.shape[axis] - 1
        for _ in range(3):
            at = [
                np.take(out, np.clip(np.arange(last + 1) + d, 0, last), axis)
                for d in range(-whole - 1, whole + 2)
            ]
            out = (sum(at[1:-1]) * inner + (at[0] + at[-1]) * outer + 2**23) >> 24
    return out.astype(np.uint8)


def single(name, image, argument, dialect, fill, interpolation="nearest", center=None):
    """One operation of a policy by its name, in the dialect "pil", "torchvision" or "google"."""
    if name in ("identity", "autocontrast", "equalize", "invert"):
        return image if name == "identity" else getattr(images, name)(image)
    if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout"):
        if dialect == "google":
            return google(name, image, argument, fill, center)
        name = f"{name}_torchvision" if dialect == "torchvision" else name
        return getattr(images, name)(image, argument, interpolation, fill)
    if name == "contrast":
        return images.contrast(image, argument, "google" if dialect == "google" else "pil")
    if name == "gaussian_blur":
        return gaussian_blur(image, argument)
    return getattr(images, "color" if name == "desaturate" else name)(image, argument)


def augmix(image, chains, weights, lam, dialect, slack=0.0):
    """Blends an image with its weighted chains [width, H, W, C]; whole levels by truncation.

    `slack` is added before each truncation: sums that are whole numbers but for rounding are
    common, and with a small one of either sign the two results enclose what rounding may give.
    """
    total = sum(w * c for w, c in zip(weights, chains.astype(float), strict=True))
    if dialect == "timm":
        total = np.clip(np.floor(total + slack), 0, 255)
    return np.clip(np.floor(lam * image + (1 - lam) * total + slack), 0, 255).astype(np.uint8)


def jsd_loss(logits, label, weight):
    """Cross-entropy of the first view and the divergence of all from their mean, [B, V, K]."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(1, keepdims=True)
    divergence = (p * np.log(p / mean)).sum(-1).mean()
    return -(label * np.log(p[:, 0])).sum(-1).mean() + weight * divergence
