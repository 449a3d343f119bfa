"""The agents' training batches: from device memory where they fit, else streamed from the host."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from mixlab.data.dataset import Dataset
from mixlab.data.order import epoch_indices, prefetch
from mixlab.types import Array, Batch, PyTree


class Feed:
    """The batches that A agents see, each from its own part of a data set.

    Which examples a batch holds is a pure function of (seed, agent, step), the same whether they
    lie on the device or are streamed. All agents make equally many steps an epoch; one with fewer
    examples than the mean sees its own more often.

    Args:
        dataset: the training set.
        parts: per agent, the int indices of its examples.
        batch_size: B, examples an agent and step.
        seed: of the order.
        put: lays host leaves [A, ...] out over the devices.
        budget: bytes; the images are kept on the devices if they take no more, padded to the
            largest part.

    Attributes:
        steps_per_epoch: mean part divided by B, rounded up.
        resident: whether the images lie on the devices.
    """

    def __init__(
        self,
        dataset: Dataset,
        parts: list[np.ndarray],
        batch_size: int,
        seed: int,
        put: Callable[[PyTree], PyTree],
        budget: int = 2 << 30,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        empty = [agent for agent, part in enumerate(parts) if not len(part)]
        if empty:
            raise ValueError(f"agents {empty} hold no examples; use fewer agents or another seed")
        self._dataset, self._parts, self._put = dataset, parts, put
        self._batch_size, self._seed = batch_size, seed
        total = sum(len(part) for part in parts)
        self.steps_per_epoch = -(-total // (len(parts) * batch_size))
        longest = max(len(part) for part in parts)
        height, width, channels = dataset.images.shape[1:]
        self.resident = dataset.in_memory and (
            len(parts) * longest * height * width * channels <= budget
        )
        self._held: dict[str, Any] = {}
        if self.resident:
            # Padding repeats the agent's own examples; the order never reaches it.
            rows = np.stack([np.resize(part, longest) for part in parts])
            batch = dataset.batch(rows.ravel())
            self._held = put({k: v.reshape(*rows.shape, *v.shape[1:]) for k, v in batch.items()})

    def order(self, epoch: int) -> np.ndarray:
        """int32 [A, steps, B]: positions within each agent's part."""
        count = self.steps_per_epoch * self._batch_size
        return np.stack(
            [
                epoch_indices(self._seed, epoch, len(part), count, stream=agent)
                for agent, part in enumerate(self._parts)
            ]
        ).reshape(len(self._parts), self.steps_per_epoch, self._batch_size)

    def steps(self, start: int, stop: int) -> Generator[PyTree, None, None]:
        """What `select` needs at each step of [start, stop), leaves [A, ...] on the devices."""
        if self.resident:
            order: Any = None
            for step in range(start, stop):
                if order is None or step % self.steps_per_epoch == 0:
                    order = self._put(self.order(step // self.steps_per_epoch))
                yield {**self._held, "order": order}
        else:
            yield from map(self._put, prefetch(self._stream(start, stop)))

    def select(self, held: PyTree, step: Array) -> Batch:
        """One agent's batch of `step`, inside a compiled program.

        Args:
            held: the agent's slice of what `steps` gave.
            step: int32, the step of the run.

        Returns:
            `{"image": uint8 [B, H, W, C], "label": int32 [B]}`.
        """
        if not self.resident:
            return held
        indices = held["order"][step % self.steps_per_epoch]
        return jax.tree.map(lambda x: x[indices], {k: held[k] for k in ("image", "label")})

    def _stream(self, start: int, stop: int) -> Iterator[Batch]:
        order: Any = None
        for step in range(start, stop):
            if order is None or step % self.steps_per_epoch == 0:
                order = self.order(step // self.steps_per_epoch)
            position = order[:, step % self.steps_per_epoch]
            rows = np.stack([part[p] for part, p in zip(self._parts, position, strict=True)])
            batch = self._dataset.batch(rows.ravel())
            yield {k: v.reshape(*rows.shape, *v.shape[1:]) for k, v in batch.items()}
