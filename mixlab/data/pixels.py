"""Decoded images: resizing, and reading files."""

import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# Modes that Pillow turns into 8-bit grey or RGB without loss (alpha is dropped); of the others,
# such as 16-bit grey, it would clip the values.
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "RGB", "RGBA", "CMYK", "YCbCr")


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [H, W, C] to `size` (H, W): bilinear, antialiased where it shrinks."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    # One channel at a time, so that any number of them will do.
    channels = [
        np.asarray(
            Image.fromarray(image[..., c]).resize((width, height), Image.Resampling.BILINEAR)
        )
        for c in range(image.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def middle(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The largest part around the middle of [H, W, C] that has the aspect of `shape`."""
    height, width = image.shape[:2]
    scale = min(height / shape[0], width / shape[1])
    rows, columns = (max(1, round(scale * n)) for n in shape)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[top : top + rows, left : left + columns]


def probe(path: pathlib.Path) -> tuple[tuple[int, int], bool]:
    """Reads the header of an image file: (H, W) and whether it has colour.

    Raises:
        ValueError: it is no image, or its pixels are not 8-bit grey or colour.
    """
    with _open(path) as image:
        if image.mode not in _GREY + _COLOUR:
            raise ValueError(
                f"{path}: pixels of mode {image.mode!r} are not 8-bit grey or colour; convert "
                f"the file to one of {', '.join(_GREY + _COLOUR)}"
            )
        return (image.height, image.width), image.mode in _COLOUR


def read(path: pathlib.Path, colour: bool) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, 3], or [H, W, 1] without `colour`.

    Raises:
        ValueError: it is no image, or damaged.
    """
    with _open(path) as image:
        try:
            pixels = np.asarray(image.convert("RGB" if colour else "L"))
        except OSError as error:
            raise ValueError(f"{path}: damaged image: {error}") from error
    return pixels if colour else pixels[..., None]


def _open(path: pathlib.Path) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that Pillow can read") from error
