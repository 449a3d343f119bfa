"""Tasks: what is made of a data set for one expert."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mixlab import spec
from mixlab.data import Dataset

Task = Callable[[Dataset], Dataset]


def plain() -> Task:
    """The data as they are."""
    return lambda dataset: dataset


def rotated(quarter_turns: int = 1) -> Task:
    """Images turned counter-clockwise."""
    return _on_images(lambda images: np.rot90(images, quarter_turns, axes=(1, 2)))


def flipped() -> Task:
    """Images upside down."""
    return _on_images(lambda images: images[:, ::-1])


def inverted() -> Task:
    """Black for white."""
    return _on_images(lambda images: 255 - images)


def permuted(seed: int = 0) -> Task:
    """The pixels of every image in one order, drawn from `seed`."""

    def change(images: np.ndarray) -> np.ndarray:
        count, height, width, channels = images.shape
        order = np.random.default_rng(seed).permutation(height * width)
        return images.reshape(count, -1, channels)[:, order].reshape(images.shape)

    return _on_images(change)


def classes(*kept: int) -> Task:
    """The examples of some classes alone."""
    return lambda dataset: dataset.subset(np.flatnonzero(np.isin(dataset.labels, kept)))


TASKS = {task.__name__: task for task in (plain, rotated, flipped, inverted, permuted, classes)}
"""What `config.tasks` may name; `"flipped | classes(0, 1)"` is one task after the other."""


def parse_task(text: str) -> Task:
    """The task that a text describes.

    Raises:
        ValueError: the text does not parse or names something unknown.
        TypeError: an argument that the task does not take.
    """

    def chain(*tasks: Task) -> Task:
        return lambda dataset: functools.reduce(lambda changed, task: task(changed), tasks, dataset)

    return spec.parse(text, TASKS, combine=chain)


def _on_images(change: Callable[[np.ndarray], np.ndarray]) -> Task:
    return lambda dataset: replace(dataset, images=change(np.asarray(dataset.images)))
