"""Folders of images, one folder a class."""

import pathlib

import numpy as np

from mixlab.data import pixels
from mixlab.data.dataset import LazyImages, Split
from mixlab.data.embedded import stratified_split

_SUFFIXES = (".png", ".jpg", ".jpeg")


def load(path: str, split: str, image_size: tuple[int, int] | None, memory_bytes: int) -> Split:
    """One split of the images under `path`.

    Args:
        path: holds `train/<class>/*.png` and `test/<class>/*.png`, or `<class>/*.png`, which is
            then split by `embedded.stratified_split`. PNG and JPEG; grey stays one channel
            unless a file of the split has colour; alpha is dropped.
        split: `train` or `test`.
        image_size: (H, W) to which all are resized; by default all must have one size.
        memory_bytes: up to this size the images are read at once, above it when indexed.

    Returns:
        Images, labels and class names; classes are numbered in the order of their names.

    Raises:
        ValueError: no such folder, no images, or too few for a split, something that is no image,
            sizes that differ.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"folder:{path}: there is no folder {root.absolute()}")
    has_splits = (root / "train").is_dir()
    if has_splits and not (root / split).is_dir():
        raise ValueError(f"folder:{path}: there is a folder train but none named {split}")
    classes = _classes(root / "train" if has_splits else root)
    base = root / split if has_splits else root
    unknown = set(_classes(base)) - set(classes)
    if unknown:
        raise ValueError(
            f"{base}: classes {sorted(unknown)} are not among those of train: {classes}"
        )
    files, labels = [], []
    for k, name in enumerate(classes):
        own = _files(base / name) if (base / name).is_dir() else []
        files += own
        labels += [k] * len(own)
    targets = np.array(labels, np.int32)
    if not has_splits:
        chosen = stratified_split(targets)[split]
        if not len(chosen):
            raise ValueError(
                f"folder:{path}: no class has the three images of which one is for testing; add "
                "images, or folders train and test"
            )
        files, targets = [files[i] for i in chosen], targets[chosen]

    headers = [pixels.probe(file) for file in files]
    colour = any(coloured for _, coloured in headers)
    first = headers[0][0]
    if image_size is None:
        for file, (size, _) in zip(files, headers, strict=True):
            if size != first:
                raise ValueError(
                    f"images differ in size: {files[0]} is {first[0]}x{first[1]}, {file} is "
                    f"{size[0]}x{size[1]}; give image_size= to resize them"
                )
    height, width = image_size or first

    def read(indices: np.ndarray) -> np.ndarray:
        images = [pixels.read(files[i], colour) for i in indices]
        return np.stack([pixels.resize(image, (height, width)) for image in images])

    lazy = LazyImages((len(files), height, width, 3 if colour else 1), read)
    fits = lazy.nbytes <= memory_bytes
    return lazy[np.arange(len(files))] if fits else lazy, targets, tuple(classes)


def single(path: str, image_size: tuple[int, int]) -> Split:
    """The images that lie in one folder, each a class of its own, named after its file.

    Args:
        path: holds PNG and JPEG files, and what else there may be, which is passed over.
        image_size: (H, W) of the images; the middle of each that has this shape is resized to it.

    Raises:
        ValueError: no such folder, no images, or one that Pillow cannot read.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root.absolute()}")
    files = [file for file in _visible(root) if file.suffix.lower() in _SUFFIXES]
    if not files:
        raise ValueError(f"{root}: no images; accepted are {', '.join(_SUFFIXES)} files")
    colour = any([pixels.probe(file)[1] for file in files])
    images = [
        pixels.resize(pixels.middle(pixels.read(file, colour), image_size), image_size)
        for file in files
    ]
    labels = np.arange(len(files), dtype=np.int32)
    return np.stack(images), labels, tuple(file.stem for file in files)


def _visible(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.iterdir() if not p.name.startswith("."))


def _classes(path: pathlib.Path) -> list[str]:
    names = [p.name for p in _visible(path) if p.is_dir()]
    if not names:
        raise ValueError(f"{path}: no class folders; images go into {path}/<class>/")
    return names


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    files = _visible(path)
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"{file}: a class folder holds only {', '.join(_SUFFIXES)} files")
    if not files:
        raise ValueError(f"{path}: a class without images")
    return files
