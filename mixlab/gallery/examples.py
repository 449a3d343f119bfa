"""A few examples to draw on."""

import pathlib

import numpy as np

from mixlab import data
from mixlab.data import folder


def examples(
    name: str = "photos",
    split: str = "train",
    *,
    count: int = 8,
    seed: int = 0,
    image_size: int | None = None,
) -> data.Dataset:
    """A few examples of a data set to draw on, of as many classes as there are.

    Args:
        name: as `mixlab.data.load` takes it. A `folder:PATH` without class folders will do, too:
            each of its images is then a class, named after its file.
        split: likewise.
        count: how many examples.
        seed: which ones.
        image_size: side of the images; by default 256 for folders and the sets' own for others.

    Returns:
        At most `count` examples, in the order of their classes.

    Raises:
        ValueError: no such data, see `mixlab.data.load`.
    """
    found = _load(name, split, image_size)
    order = np.random.default_rng(seed).permutation(len(found))
    # How many of its class come before each: first one of every class, then a second one, ...
    labels = found.labels[order]
    by_class = np.argsort(labels, kind="stable")
    turn = np.empty(len(order), int)
    turn[by_class] = np.arange(len(order)) - np.searchsorted(labels[by_class], labels[by_class])
    chosen = order[np.argsort(turn, kind="stable")[:count]]
    return found.subset(chosen[np.lexsort((chosen, found.labels[chosen]))])


def _load(name: str, split: str, image_size: int | None) -> data.Dataset:
    if not name.startswith("folder:"):
        return data.load(name, split, image_size=image_size)
    side = image_size or 256
    path = pathlib.Path(name.removeprefix("folder:")).expanduser()
    if path.is_dir() and not any(entry.is_dir() for entry in path.glob("[!.]*")):
        images, labels, names = folder.single(str(path), (side, side))
        return data.Dataset(images, labels, len(names), name, split, names)
    return data.load(name, split, image_size=side)
