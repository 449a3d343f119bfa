import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.data import epoch_indices, order, prefetch


@given(
    seed=st.integers(0, 2**40),
    stream=st.integers(0, 1000),
    num_examples=st.integers(1, 40),
    count=st.integers(1, 60),
)
def test_a_stream_is_one_permutation_after_another(seed, stream, num_examples, count):
    epochs = [epoch_indices(seed, e, num_examples, count, stream=stream) for e in range(5)]
    shown = np.concatenate(epochs)
    assert shown.dtype == np.int32
    assert len(shown) == 5 * count
    for own in range(len(shown) // num_examples):
        seen = shown[own * num_examples : (own + 1) * num_examples]
        expected = order.permutation(seed, stream, own, num_examples)
        np.testing.assert_array_equal(seen, expected)
        np.testing.assert_array_equal(np.sort(seen), np.arange(num_examples))
    # How the run is cut into epochs does not change the stream.
    whole = epoch_indices(seed, 0, num_examples, 5 * count, stream=stream)
    np.testing.assert_array_equal(whole, shown)


def test_permutations_are_the_same_on_every_machine():
    np.testing.assert_array_equal(order.permutation(7, 3, 2, 10), [4, 2, 1, 6, 0, 7, 8, 5, 3, 9])


def test_seed_stream_and_epoch_all_matter():
    drawn = [
        tuple(order.permutation(seed, stream, epoch, 50))
        for seed, stream, epoch in itertools.product((0, 1), (0, 1), (0, 1))
    ]
    assert len(set(drawn)) == 8


def test_permutations_are_uniform():
    """Chi-squared over the 24 orders of four examples; 3 sigma above the mean of 23 degrees."""
    drawn, tally = np.unique(
        [order.permutation(0, s, 0, 4) for s in range(2400)], axis=0, return_counts=True
    )
    assert len(drawn) == 24
    assert ((tally - 100) ** 2 / 100).sum() < 23 + 3 * (2 * 23) ** 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 0, 0, 5), "num_examples=0"),
        ((0, 0, 5, 0), "count=0"),
        ((-1, 0, 5, 5), "seed=-1"),
        ((0, -1, 5, 5), "epoch=-1"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        epoch_indices(*args)


def _threads():
    return [t for t in threading.enumerate() if t.name == "mixlab-prefetch"]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_prefetch_keeps_items_and_order(size):
    assert list(prefetch(iter(range(50)), size)) == list(range(50))
    assert list(prefetch([], size)) == []
    assert not _threads()


def test_prefetch_runs_ahead_by_size_and_no_further():
    made = threading.Semaphore(0)
    count = itertools.count()

    def source():
        while True:
            made.release()
            yield next(count)

    ahead = prefetch(source(), 3)
    assert next(ahead) == 0
    for _ in range(4):  # The item taken and three more.
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.2)
    assert next(ahead) == 1
    assert made.acquire(timeout=10)
    ahead.close()
    assert not _threads()


def test_prefetch_hands_on_exceptions_in_their_place():
    def source():
        yield 1
        raise OSError("disk gone")

    ahead = prefetch(source())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert not _threads()


def test_prefetch_stops_with_its_consumer():
    for item in prefetch(itertools.count()):
        if item == 3:
            break
    # The loop's iterator is closed as soon as nothing holds it.
    assert not _threads()

    def consumer():
        for _ in prefetch(itertools.count()):
            raise RuntimeError("consumer failed")

    with pytest.raises(RuntimeError, match="consumer failed") as caught:
        consumer()
    del caught
    ahead = prefetch(itertools.count())
    next(ahead)
    del ahead
    assert not _threads()
    with pytest.raises(ValueError, match="size >= 1, got 0"):
        prefetch([1], 0)
