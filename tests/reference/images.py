"""The single image operations of RandAugment on uint8 [H, W, C], as Pillow and torchvision do them.

Where the two differ there are two functions or a `dialect`. Blends are computed in float32, as
both do, because they end in a truncation to whole levels. Geometric functions sample the input at
`matrix @ (column, row)` of each output pixel; `fill=None` is black.
"""

import math

import numpy as np


def by_table(image, table_of):
    """Each channel through its own table of 256 levels."""
    channels = [table_of(image[..., c])[image[..., c]] for c in range(image.shape[-1])]
    return np.stack(channels, axis=-1).astype(np.uint8)


def truncate(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def autocontrast(image, dialect="pil"):
    """Stretches each channel to 0..255; a constant channel stays."""

    def table(channel):
        low, high = float(channel.min()), float(channel.max())
        levels = np.arange(256.0)
        if high <= low:
            return levels
        if dialect == "pil":
            scale = 255 / (high - low)
            return np.clip(np.trunc(levels * scale - low * scale), 0, 255)
        scale = (np.float32(high) - np.float32(low)) * np.float32(1 / 255)
        return truncate((levels.astype(np.float32) - np.float32(low)) / scale)

    return by_table(image, table)


def equalize(image):
    """Flattens the histogram of each channel, in whole steps; see the specification, 11.1."""

    def table(channel):
        counts = [int((channel == level).sum()) for level in range(256)]
        last = [count for count in counts if count][-1]
        step = (sum(counts) - last) // 255
        if step == 0:
            return np.arange(256)
        below = [sum(counts[:level]) for level in range(256)]
        return np.array([min((step // 2 + n) // step, 255) for n in below])

    return by_table(image, table)


def invert(image):
    return (255 - image.astype(int)).astype(np.uint8)


def posterize(image, bits):
    """Keeps the highest `bits` bits; none of them is black."""
    step = 2 ** (8 - int(bits))
    return (image.astype(int) // step * step).astype(np.uint8)


def solarize(image, threshold):
    """Inverts what reaches the threshold."""
    return np.where(image < threshold, image, invert(image))


def solarize_add(image, addition, threshold=128):
    """Adds to what lies below the threshold."""
    return np.where(image < threshold, np.minimum(image.astype(int) + addition, 255), image).astype(
        np.uint8
    )


def blend(degenerate, image, factor, dialect="pil"):
    """`degenerate + factor (image - degenerate)`, clipped and truncated."""
    factor, rest = np.float32(factor), np.float32(1 - factor)
    degenerate = np.asarray(degenerate, np.float32)
    image = image.astype(np.float32)
    if dialect == "pil":
        return truncate(degenerate + factor * (image - degenerate))
    # torch rounds once when it adds a scaled term (a fused multiply and add).
    scaled = degenerate.astype(np.float64) * rest
    return truncate((image * factor + scaled).astype(np.float32))


def grey(image, dialect="pil"):
    """Whole grey levels [H, W, 1] of an RGB image."""
    r, g, b = (image[..., c : c + 1].astype(np.int64) for c in range(3))
    if dialect == "pil":
        return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
    return np.floor(0.2989 * r + 0.587 * g + 0.114 * b)


def color(image, factor, dialect="pil"):
    return blend(grey(image, dialect), image, factor, dialect)


def contrast(image, factor, dialect="pil"):
    """Blends with one grey: the mean (rounded by Pillow), or H W / 256 levels in Google's code."""
    if dialect == "google":
        return blend(min(image.shape[0] * image.shape[1] // 256, 255), image, factor)
    mean = grey(image, dialect).mean()
    return blend(int(mean + 0.5) if dialect == "pil" else mean, image, factor, dialect)


def brightness(image, factor):
    return blend(0, image, factor)


def sharpness(image, factor, dialect="pil"):
    """Blends with the 3x3 smoothing [1 1 1; 1 5 1; 1 1 1] / 13; the border keeps its pixels."""
    smooth = image.astype(np.float64)
    height, width = image.shape[:2]
    rows, cols = np.arange(1, height - 1)[:, None], np.arange(1, width - 1)
    window = sum(smooth[rows + i, cols + j] for i in (-1, 0, 1) for j in (-1, 0, 1))
    smooth[rows, cols] = np.rint((window + 4 * smooth[rows, cols]) / 13)
    if dialect == "pil":
        return blend(smooth, image, factor)
    rest = np.float32(1 - factor)
    x = image.astype(np.float32)
    return truncate(x + rest * (smooth.astype(np.float32) - x))


def linear(a, b, d):
    return a + (b - a) * d


def cubic(a, b, c, d, t):
    """Cubic convolution with parameter -1, between `b` and `c`."""
    return b + t * (c - a + t * (2 * (a - b) + c - d + t * (b - a + d - c)))


# The neighbours on each axis and the curve through them.
INTERPOLATION = {"bilinear": ((0, 1), linear), "bicubic": ((-1, 0, 1, 2), cubic)}


def interpolate(at, x, y, interpolation):
    """The value between the pixels `at(rows, columns)`, along rows first."""
    left, top = np.floor(x), np.floor(y)
    offsets, curve = INTERPOLATION[interpolation]
    dx, dy = (x - left)[..., None], (y - top)[..., None]
    return curve(*(curve(*(at(top + i, left + j) for j in offsets), dx) for i in offsets), dy)


def fixed(value):
    return math.floor(value * 65536 + 0.5)


def sample_pil(image, matrix, interpolation, fill=None):
    """Pillow's affine transform: pixel centres at half integers, origin at the corner.

    Pixels whose centre maps outside of the image are filled; inside, neighbours are clamped. Where
    the axes are sheared or turned, nearest computes in integers, in units of 1 / 65536.
    """
    height, width = image.shape[:2]
    col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = (a * col + b * row + c for a, b, c in matrix)
    if interpolation == "nearest" and (matrix[0][1] or matrix[1][0]):
        x, y = (
            (col - 0.5) * fixed(a) + (row - 0.5) * fixed(b) + fixed(c + a / 2 + b / 2)
            for a, b, c in matrix
        )
        x, y = x / 65536, y / 65536
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)

    def at(rows, cols):
        rows, cols = np.clip(rows, 0, height - 1), np.clip(cols, 0, width - 1)
        return image[rows.astype(int), cols.astype(int)].astype(np.float64)

    if interpolation == "nearest":
        value = at(np.floor(y), np.floor(x))
    else:
        value = interpolate(at, x - 0.5, y - 0.5, interpolation)
    outside = np.zeros(image.shape[-1]) if fill is None else np.asarray(fill, np.float64)
    return truncate(np.where(inside[..., None], value, outside))


def shear_x(image, level, interpolation="nearest", fill=None):
    return sample_pil(image, [[1, level, 0], [0, 1, 0]], interpolation, fill)


def shear_y(image, level, interpolation="nearest", fill=None):
    return sample_pil(image, [[1, 0, 0], [level, 1, 0]], interpolation, fill)


def translate_x(image, pixels, interpolation="nearest", fill=None):
    return sample_pil(image, [[1, 0, pixels], [0, 1, 0]], interpolation, fill)


def translate_y(image, pixels, interpolation="nearest", fill=None):
    return sample_pil(image, [[1, 0, 0], [0, 1, pixels]], interpolation, fill)


def rotate(image, degrees, interpolation="nearest", fill=None):
    """Counter-clockwise about the centre."""
    height, width = image.shape[:2]
    c = round(math.cos(math.radians(degrees)), 15)
    s = round(math.sin(math.radians(degrees)), 15)
    x, y = width / 2, height / 2
    matrix = [[c, -s, -c * x + s * y + x], [s, c, -s * x - c * y + y]]
    return sample_pil(image, matrix, interpolation, fill)


def sample_torchvision(image, matrix, interpolation, fill=None):
    """torchvision's affine transform: coordinates from the image's centre, zeros outside.

    A mask of ones travels with the image; nearest takes the fill where it misses the image, and
    bilinear, whose border is already darkened, is blended with the fill by the mask.
    """
    height, width = image.shape[:2]
    padded = np.zeros((height + 2, width + 2, image.shape[-1] + 1))
    padded[1:-1, 1:-1, :-1] = image
    padded[1:-1, 1:-1, -1] = 1
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    col, row = np.meshgrid(np.arange(width) - middle_x, np.arange(height) - middle_y)
    x, y = (a * col + b * row + c for a, b, c in matrix)
    x, y = x + middle_x, y + middle_y

    def at(rows, cols):
        rows, cols = np.clip(rows, -1, height) + 1, np.clip(cols, -1, width) + 1
        return padded[rows.astype(int), cols.astype(int)]

    if interpolation == "nearest":
        value = at(np.rint(y), np.rint(x))
    else:
        value = interpolate(at, x, y, interpolation)
    pixel, mask = value[..., :-1], value[..., -1:]
    if fill is not None:
        pixel = pixel * mask + (1 - mask) * np.asarray(fill, np.float64)
    return truncate(np.rint(pixel))


def shear_x_torchvision(image, level, interpolation="nearest", fill=None):
    """Sheared about the upper left corner."""
    up = image.shape[0] / 2
    return sample_torchvision(image, [[1, level, level * up], [0, 1, 0]], interpolation, fill)


def shear_y_torchvision(image, level, interpolation="nearest", fill=None):
    """Sheared about the upper left corner."""
    left = image.shape[1] / 2
    return sample_torchvision(image, [[1, 0, 0], [level, 1, level * left]], interpolation, fill)


def translate_x_torchvision(image, pixels, interpolation="nearest", fill=None):
    """Moved to the right by whole pixels, truncated towards zero."""
    return sample_torchvision(image, [[1, 0, -int(pixels)], [0, 1, 0]], interpolation, fill)


def translate_y_torchvision(image, pixels, interpolation="nearest", fill=None):
    """Moved down by whole pixels, truncated towards zero."""
    return sample_torchvision(image, [[1, 0, 0], [0, 1, -int(pixels)]], interpolation, fill)


def rotate_torchvision(image, degrees, interpolation="nearest", fill=None):
    """Counter-clockwise about the centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return sample_torchvision(image, [[c, -s, 0], [s, c, 0]], interpolation, fill)


def torchvision_magnitude(name, index, height, width, bins=31):
    """RandAugment's table of torchvision: what an operation is handed at `index` of `bins`."""
    share = index / (bins - 1)
    return {
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": 150 / 331 * width * share,
        "TranslateY": 150 / 331 * height * share,
        "Rotate": 30 * share,
        "Brightness": 0.9 * share,
        "Color": 0.9 * share,
        "Contrast": 0.9 * share,
        "Sharpness": 0.9 * share,
        "Posterize": 8 - round(4 * share),
        "Solarize": 1 - share,
    }[name]


def timm_argument(name, level, translate=250):
    """timm's argument of an operation at `level` of 10, with a positive sign."""
    share = level / 10
    enhance, increasing = 0.1 + 1.8 * share, 1 + 0.9 * share
    table = {
        "Rotate": 30 * share,
        "Posterize": int(4 * share),
        "PosterizeIncreasing": 4 - int(4 * share),
        "PosterizeOriginal": 4 + int(4 * share),
        "Solarize": int(256 * share),
        "SolarizeIncreasing": 256 - int(256 * share),
        "SolarizeAdd": min(128, int(110 * share)),
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": translate * share,
        "TranslateY": translate * share,
        "TranslateXRel": 0.45 * share,
        "TranslateYRel": 0.45 * share,
        "Desaturate": 0.5 + 0.5 * share,
        "GaussianBlur": 0.1 + 1.9 * share,
    }
    for name_ in ("Color", "Contrast", "Brightness", "Sharpness"):
        table[name_], table[f"{name_}Increasing"] = enhance, increasing
    return table[name]
