"""The order of examples, and reading ahead of the consumer."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def permutation(seed: int, stream: int, epoch: int, num_examples: int) -> np.ndarray:
    """A uniform permutation of `range(num_examples)`, the same on every machine.

    Sorts 64-bit words of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"), keyed by `(seed, stream)` and counted from `epoch`. NumPy keeps the words that a bit
    generator gives, though not what `Generator.permutation` makes of them, across versions.

    Args:
        seed: in [0, 2**64).
        stream: in [0, 2**64), e.g. the agent's number.
        epoch: in [0, 2**64).
        num_examples: length N.

    Returns:
        int64 [N].
    """
    philox = np.random.Philox(
        key=np.array([seed, stream], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64)
    )
    return np.argsort(philox.random_raw(num_examples), kind="stable")


def epoch_indices(
    seed: int, epoch: int, num_examples: int, count: int, *, stream: int = 0
) -> np.ndarray:
    """The `count` examples that a stream shows in `epoch`: a pure function of its arguments.

    A stream goes through its own N examples again and again, each time in a fresh order: element
    t of the stream is `permutation(seed, stream, t // N, N)[t % N]`, and epoch e shows the
    elements `[e * count, (e + 1) * count)`. So nothing need be saved to resume, and agents with
    unequal shares make equally many steps: the one with fewer examples sees its own more often.

    Args:
        seed: non-negative.
        epoch: the run's epoch, from 0.
        num_examples: the stream's examples N, at least 1.
        count: examples an epoch shows (steps times batch size), at least 1; need not divide N.
        stream: non-negative; streams of different numbers are independent.

    Returns:
        int32 [count] in [0, N).

    Raises:
        ValueError: an argument is out of range.
    """
    if num_examples < 1 or count < 1:
        raise ValueError(
            f"a stream needs num_examples >= 1 and count >= 1, got num_examples={num_examples}, "
            f"count={count}; does every agent hold an example?"
        )
    if min(seed, epoch, stream) < 0:
        raise ValueError(
            f"seed, epoch and stream must be non-negative, got seed={seed}, epoch={epoch}, "
            f"stream={stream}"
        )
    start, stop = epoch * count, (epoch + 1) * count
    first, last = start // num_examples, (stop - 1) // num_examples
    passes = [permutation(seed, stream, own, num_examples) for own in range(first, last + 1)]
    offset = start - first * num_examples
    return np.concatenate(passes)[offset : offset + count].astype(np.int32)


def prefetch(iterator: Iterable[T], size: int = 2) -> Iterator[T]:
    """Runs `iterator` in a background thread that keeps up to `size` items ready.

    The thread starts with the first item asked for. It ends with the iterator, and also when the
    consumer stops early (`break`, `close()`, an exception), once the item then being made is done.

    Args:
        iterator: gives, say, host batches.
        size: items ahead of the consumer, at least 1.

    Returns:
        An iterator over the same items in the same order. An exception of `iterator` is raised
        where its item would have come.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"prefetch needs size >= 1, got {size}")
    return _ahead(iter(iterator), size)


def _ahead(iterator: Iterator[T], size: int) -> Iterator[T]:
    ready: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()
    slots = threading.Semaphore(size)
    stopped = threading.Event()

    def work() -> None:
        try:
            while True:
                slots.acquire()
                if stopped.is_set():
                    return
                ready.put(([next(iterator)], None))
        except BaseException as error:  # Handed to the consumer, StopIteration included.
            ready.put(([], error))

    thread = threading.Thread(target=work, name="mixlab-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            slots.release()
            yield item[0]
    finally:
        stopped.set()
        slots.release()
        thread.join()
