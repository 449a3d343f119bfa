import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.data import Dataset, Feed, LazyImages

NUM = 40


def dataset(lazy=False):
    """Image i shows the number i, its label is i % 7: a batch tells which examples it holds."""
    images = np.broadcast_to(np.arange(NUM, dtype=np.uint8)[:, None, None, None], (NUM, 2, 3, 1))
    images = np.ascontiguousarray(images)
    labels = (np.arange(NUM) % 7).astype(np.int32)
    names = tuple("abcdefg")
    whole = Dataset(images, labels, 7, "numbers", "train", names)
    if not lazy:
        return whole
    return dataclasses.replace(whole, images=LazyImages(images.shape, lambda i: images[i]))


def parts():
    """Unequal and shuffled: 3, 8, 9 and 1 of the 40 examples."""
    order = np.random.default_rng(0).permutation(NUM)
    return np.split(order[:21], [3, 11, 20])


def feed(lazy=False, budget=1 << 20, batch_size=4, seed=5, parts=parts):
    put = lambda tree: jax.tree.map(jnp.asarray, tree)  # noqa: E731
    return Feed(dataset(lazy), parts(), batch_size, seed, put, budget)


KINDS = {
    "resident": {},
    "streamed for want of memory": {"budget": 0},
    "streamed from a lazy set": {"lazy": True},
}


def shown(feed, start, stop):
    """The examples' numbers [stop - start, A, B], read from the batches."""
    select = jax.jit(jax.vmap(feed.select, (0, None)))
    found = []
    for step, held in zip(range(start, stop), feed.steps(start, stop), strict=True):
        batch = select(held, jnp.int32(step))
        assert set(batch) == {"image", "label"}
        assert batch["image"].dtype == jnp.uint8
        assert batch["label"].dtype == jnp.int32
        assert batch["image"].shape[2:] == (2, 3, 1)
        numbers = np.asarray(batch["image"])[..., 0, 0, 0]
        assert (np.asarray(batch["image"]) == numbers[..., None, None, None]).all()
        np.testing.assert_array_equal(batch["label"], numbers % 7)
        found.append(numbers)
    return np.stack(found)


def test_what_is_resident():
    # Four agents, padded to the largest part of 9, of 6 bytes an image.
    size = 4 * 9 * 6
    assert feed(budget=size).resident
    assert not feed(budget=size - 1).resident
    assert not feed(lazy=True).resident


def test_resident_and_streamed_batches_are_the_same():
    first, *others = (shown(feed(**kind), 0, 9) for kind in KINDS.values())
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_depends_on_its_step_alone(kind):
    """So that a run that is resumed, from within an epoch or not, goes on as if uninterrupted."""
    built = feed(**KINDS[kind])
    assert built.steps_per_epoch == 2
    whole = shown(built, 0, 9)
    for start in (1, 2, 5):
        np.testing.assert_array_equal(shown(feed(**KINDS[kind]), start, 9), whole[start:])
    np.testing.assert_array_equal(shown(built, 3, 6), whole[3:6])
    assert len(list(built.steps(4, 4))) == 0


@pytest.mark.parametrize("kind", ["resident", "streamed for want of memory"])
def test_unequal_parts_take_equal_steps_each_through_its_own(kind):
    found = shown(feed(**KINDS[kind]), 0, 18)
    assert found.shape == (18, 4, 4)
    for agent, part in enumerate(parts()):
        own = found[:, agent].ravel()
        passes, n = len(own) // len(part), len(part)
        # Every pass shows each own example once, whatever the number of batches that it takes.
        for i in range(passes):
            np.testing.assert_array_equal(np.sort(own[i * n : (i + 1) * n]), np.sort(part))
        assert set(own) == set(part)
    # The passes differ in order, and agents with the same number of examples do as well.
    assert not np.array_equal(found[:2, 1].ravel(), found[2:4, 1].ravel())


def test_seed_and_agent_matter():
    same = lambda: [np.arange(8), np.arange(8)]  # noqa: E731
    found = shown(feed(parts=same), 0, 2)
    assert not np.array_equal(found[:, 0], found[:, 1])
    assert not np.array_equal(found, shown(feed(parts=same, seed=6), 0, 2))
    np.testing.assert_array_equal(found, shown(feed(parts=same), 0, 2))


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 6), (5, 2), (6, 1), (100, 1)])
def test_an_epoch_is_as_long_as_the_mean_agent_needs(batch_size, steps):
    """21 examples of four agents: a mean of 5.25, rounded up to whole batches."""
    built = feed(batch_size=batch_size)
    assert built.steps_per_epoch == steps
    assert built.order(0).shape == (4, steps, batch_size)
    assert built.order(0).dtype == np.int32


def test_a_consumer_that_stops_leaves_no_thread_behind():
    steps = feed(budget=0).steps(0, 1000)
    next(steps)
    assert "mixlab-prefetch" in {thread.name for thread in threading.enumerate()}
    steps.close()
    del steps
    assert "mixlab-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_what_cannot_be_fed_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        feed(batch_size=0)
    with pytest.raises(ValueError, match=r"agents \[1, 3\] hold no examples"):
        feed(parts=lambda: [np.arange(3), np.arange(0), np.arange(3, 5), np.array([], int)])
