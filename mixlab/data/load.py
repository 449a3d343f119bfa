"""One door to every source of data."""

import os

from mixlab import spec
from mixlab.data import embedded, folder, tfds
from mixlab.data.dataset import Dataset

_SPLITS = ("train", "test")


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    image_size: int | tuple[int, int] | None = None,
    memory_bytes: int = 2 * 2**30,
) -> Dataset:
    """Loads one split of a labelled image set.

    Args:
        name: `"mnist5k"` (5,000 MNIST digits, 28x28x1), `"digits"` (1,797 digits, 8x8x1), both
            in a fixed stratified split (a fifth of each class for testing); `"photos"` (eight
            colour photos, 256x256x3, each a class; only `"train"`); `"folder:PATH"` with
            `PATH/train/<class>/*.png` and `PATH/test/...`, or `PATH/<class>/...` in such a split;
            any other name is looked up in TensorFlow Datasets (extra `[data]`).
        split: `"train"` or `"test"`; of TFDS sets, what TFDS accepts, e.g. `"train[:10%]"`.
        data_dir: where prepared TFDS sets lie; by default TFDS's own folder.
        download: whether a TFDS set that is not there may be downloaded.
        image_size: resizes images to this (H, W), or to a square. Needed where sizes vary.
        memory_bytes: images of a folder or TFDS set that take more than this are not read into
            memory but one by one when indexed.

    Returns:
        The examples in the order of the source; shuffle with `epoch_indices`.

    Raises:
        ValueError: no such set or split, or data that break what `Dataset` promises; the message
            names the file or example.
        ModuleNotFoundError: the package that holds the set, or for others TFDS, is missing.
        OSError: a TFDS set could not be fetched.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"image_size must be a positive int or (height, width), got {image_size}")
    is_folder = name.startswith("folder:")
    if is_folder or name in embedded.SOURCES:
        known = _SPLITS if is_folder else embedded.splits(name)
        if split not in known:
            raise ValueError(f"{name} has no split {split!r}; {spec.nearest(split, known)}")
    if is_folder:
        path = name.removeprefix("folder:")
        images, labels, class_names = folder.load(path, split, size, memory_bytes)
    elif name in embedded.SOURCES:
        images, labels, class_names = embedded.load(name, split, size)
    else:
        images, labels, class_names = tfds.load(
            name,
            split,
            known=(*embedded.SOURCES, "folder:PATH"),
            data_dir=data_dir,
            download=download,
            image_size=size,
            memory_bytes=memory_bytes,
        )
    return Dataset(images, labels, len(class_names), name, split, class_names)
