"""Labelled images, in memory or read when asked for."""

import dataclasses
from collections.abc import Callable

import numpy as np

from mixlab.types import Batch

Split = tuple["Images", np.ndarray, tuple[str, ...]]
"""What a source returns for one split: images, int labels [N], class names."""


@dataclasses.dataclass(frozen=True)
class LazyImages:
    """Images that do not fit in memory: an int array indexes them like an array does.

    Attributes:
        shape: `(N, H, W, C)`.
        read: from int indices [B] to uint8 [B, H, W, C].
    """

    shape: tuple[int, int, int, int]
    read: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the images would take in memory."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.read(indices)

    def subset(self, indices: np.ndarray) -> "LazyImages":
        """The images at `indices`, still unread."""
        return LazyImages((len(indices), *self.shape[1:]), lambda i: self.read(indices[i]))


Images = np.ndarray | LazyImages


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a labelled image set.

    Attributes:
        images: uint8 [N, H, W, C], or `LazyImages` of that shape where they exceed the memory
            budget.
        labels: int32 [N] in [0, num_classes).
        num_classes: the number of classes.
        name: as given to `load`.
        split: as given to `load`.
        class_names: one a class.
    """

    images: Images
    labels: np.ndarray
    num_classes: int
    name: str
    split: str
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        what = f"{self.name} ({self.split})"
        if isinstance(self.images, np.ndarray) and self.images.dtype != np.uint8:
            raise TypeError(f"{what}: images must be uint8, got {self.images.dtype}")
        if len(self.images.shape) != 4:
            raise ValueError(f"{what}: images must be [N, H, W, C], got {self.images.shape}")
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"{what}: labels must be int32 [{len(self.images)}], one an image, got "
                f"{self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{what}: {self.num_classes} classes, but {len(self.class_names)} class_names"
            )
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if outside.size:
            raise ValueError(
                f"{what}: label {self.labels[outside[0]]} of example {outside[0]} lies outside "
                f"[0, {self.num_classes}); {outside.size} such labels in all"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether `images` is an array, which can be put on a device whole."""
        return isinstance(self.images, np.ndarray)

    @property
    def num_bytes(self) -> int:
        """Bytes that images and labels take in memory, whether or not they lie there."""
        return int(self.images.nbytes + self.labels.nbytes)

    def subset(self, indices: np.ndarray) -> "Dataset":
        """The examples at `indices`, an int array [M], in that order."""
        if isinstance(self.images, LazyImages):
            images: Images = self.images.subset(indices)
        else:
            images = self.images[indices]
        return dataclasses.replace(self, images=images, labels=self.labels[indices])

    def batch(self, indices: np.ndarray) -> Batch:
        """`{"image": uint8 [B, H, W, C], "label": int32 [B]}` at `indices`, an int array [B]."""
        return {"image": self.images[indices], "label": self.labels[indices]}
