"""What policies add to the single image operations, restated: tables, Google's geometry, AugMix.

Google's geometric operations are those of TensorFlow Addons: affine maps of whole pixel indices
from the output to the input, the nearest pixel with halves rounded away from zero, and one colour
wherever the map leaves the image.
"""

import math

import numpy as np


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
