"""TensorFlow Datasets. Nothing of it is imported before a set is asked for."""

import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mixlab import spec
from mixlab.data import pixels
from mixlab.data.dataset import Images, LazyImages, Split


def load(
    name: str,
    split: str,
    *,
    known: tuple[str, ...],
    data_dir: str | os.PathLike[str] | None,
    download: bool,
    image_size: tuple[int, int] | None,
    memory_bytes: int,
) -> Split:
    """One split of the TFDS set `name`; the arguments are those of `mixlab.data.load`.

    Args:
        name: as TFDS has it, with config and version where wanted: `"cifar10:3.0.2"`.
        split: as TFDS has it: `"train"`, `"test[:10%]"`.
        known: the names that need no TFDS, for the error message.
        data_dir: where prepared sets lie; by default TFDS's own.
        download: whether a set that is not there may be fetched and prepared, as array_record.
        image_size: (H, W) to which all images are resized.
        memory_bytes: up to this size the images are read at once, above it when indexed.

    Returns:
        Images, labels and class names.

    Raises:
        ModuleNotFoundError: TFDS is not installed.
        OSError: it could not be fetched.
        ValueError: no such set, it is not there and `download` is off, it has no `image` and
            `label`, its images vary in size, or it is too large to read at once and prepared
            in a format that cannot be indexed.
    """
    builder = _builder(name, known, data_dir, download)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
        raise ValueError(
            f"{name} is no image classification set: it needs features image and label (a "
            f"class), it has {', '.join(sorted(features))}"
        )
    feature = features["image"]
    if feature.np_dtype != np.uint8:
        raise ValueError(f"{name}: images must be uint8, these are {feature.np_dtype}")
    size = image_size or feature.shape[:2]
    if None in size:
        raise ValueError(f"{name}: images vary in size; give image_size= to resize them")

    shape = (builder.info.splits[split].num_examples, *size, feature.shape[-1])
    fits = math.prod(shape) <= memory_bytes
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError as error:
        if not fits:
            raise ValueError(
                f"{name} ({split}) takes {math.prod(shape):,} bytes, more than memory_bytes="
                f"{memory_bytes:,}, and its files ({builder.info.file_format.value} in "
                f"{builder.data_path}) cannot be indexed; raise memory_bytes, or prepare it in "
                f"another folder: tfds.builder({name!r}, data_dir=..., "
                f"file_format='array_record').download_and_prepare()"
            ) from error
        examples = _in_order(builder, split)
    images: Images
    if fits:
        images, labels = _read(examples, shape)
    else:
        images, labels = _index(builder, split, examples, shape)
    return images, labels, tuple(features["label"].names)


def _import(name: str, known: tuple[str, ...]) -> Any:
    # TensorFlow only reads files here: without these it greets with a page of CPU features.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} is not among the sets that need no extra package "
            f"({spec.nearest(name, known)}); to look for it in TensorFlow Datasets: "
            f"pip install 'mixlab[data]' ({error})",
            name=error.name,
        ) from error
    # TensorFlow would reserve the whole memory of a GPU that JAX is to use.
    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")
    return tfds


def _builder(
    name: str, known: tuple[str, ...], data_dir: str | os.PathLike[str] | None, download: bool
) -> Any:
    tfds = _import(name, known)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        # Community sets are left out: listing them asks a server.
        names = {*known, *tfds.list_builders(with_community_datasets=False)}
        close = spec.nearest(name.split(":")[0].split("/")[0], names).split("known:")[0]
        raise ValueError(
            f"no data set {name!r}; {close}without TensorFlow Datasets there are "
            f"{', '.join(known)}; the others: tfds.list_builders()"
        ) from error
    if builder.is_prepared():
        return builder
    if not download:
        raise ValueError(
            f"{name} is not prepared under {builder.data_dir} and download is off; set download "
            f"or prepare it there: tfds.builder({name!r}, data_dir=...).download_and_prepare()"
        )
    # A format that can be indexed, so that the set may be larger than memory.
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise OSError(
            f"{name} is not prepared under {builder.data_dir}, and could not be fetched: {error}; "
            "if it lies elsewhere, give that folder as data_dir"
        ) from error
    return builder


def _in_order(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The examples one after another, for files that cannot be indexed."""
    import tensorflow_datasets as tfds

    data = builder.as_dataset(
        split,
        decoders=tfds.decode.PartialDecoding({"image": True, "label": True}),
        # One file after another: the order of the examples is that of the files.
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    return data.as_numpy_iterator()


def _read(
    examples: Iterable[dict[str, Any]], shape: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.empty(shape, np.uint8), np.empty(shape[0], np.int32)
    for i, example in enumerate(examples):
        images[i] = pixels.resize(example["image"], shape[1:3])
        labels[i] = example["label"]
    return images, labels


def _index(
    builder: Any, split: str, source: Any, shape: tuple[int, int, int, int]
) -> tuple[LazyImages, np.ndarray]:
    import tensorflow_datasets as tfds

    undecoded = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    labels = np.array([example["label"] for example in undecoded], np.int32)

    def read(indices: np.ndarray) -> np.ndarray:
        return np.stack([pixels.resize(source[int(i)]["image"], shape[1:3]) for i in indices])

    return LazyImages(shape, read), labels
