import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import random


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_the_numbers_are_those_of_jax(impl):
    key = jax.random.key(7, impl=impl)
    for shape in ((), (0,), (1,), (5, 3)):
        words = jax.random.bits(key, shape, jnp.uint32)
        np.testing.assert_array_equal(random.bits(key, shape), words)
        u = jax.random.uniform(key, shape, jnp.float32)
        np.testing.assert_array_equal(random.uniform(key, shape), u)


def test_bits_of_many_keys_under_jit():
    keys = jax.random.split(jax.random.key(3), 4)
    found = jax.jit(jax.vmap(lambda key: random.bits(key, (9,))))(keys)
    np.testing.assert_array_equal(found, jax.vmap(lambda key: jax.random.bits(key, (9,)))(keys))


def test_whole_numbers_stay_in_range():
    u = jnp.asarray([0.0, 0.5, 1.0 - 2.0**-23], jnp.float32)
    np.testing.assert_array_equal(random.whole_number(u, 3), [0, 1, 2])
    # 2^30 - 2^7 would round up to the count.
    assert random.whole_number(u[-1], 2**30 - 1) < 2**30 - 1
    np.testing.assert_array_equal(random.whole_number(u[:2], (7, 4)), [0, 2])


def test_the_cipher_is_threefry():
    seed, counters = jnp.asarray([7, 2**31], jnp.uint32), jnp.arange(10, dtype=jnp.uint32)
    expected = jax.extend.random.threefry_2x32(seed, counters)
    found = jnp.concatenate(random.threefry(seed, counters[:5], counters[5:]))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("probability", [0.001, 0.3, 0.99])
def test_decisions_have_their_probability_and_are_independent(probability):
    rows, size = 3, 4 * 50_001 - 2
    kept = np.asarray(random.bernoulli(jax.random.key(0), probability, (rows, size)))
    few = random.bernoulli(jax.random.key(0), probability, (1, size))
    np.testing.assert_array_equal(few, kept[:1])
    spread = np.sqrt(probability * (1 - probability) / size)
    assert np.all(np.abs(kept.mean(axis=1) - probability) < 5 * spread)
    # Of models, of entries side by side, and of the four that share a block.
    quarter = 50_001
    lanes = [kept[0, i * quarter : (i + 1) * quarter][: quarter - 2] for i in range(4)]
    pairs = [(kept[0], kept[1]), (kept[1], kept[2]), (kept[0, 1:], kept[0, :-1])]
    pairs += [(lanes[i], lanes[j]) for i in range(4) for j in range(i)]
    for a, b in pairs:
        both = np.mean(a & b)
        assert abs(both - probability**2) < 6 * probability * np.sqrt(
            (1 - probability**2) / len(a)
        ), probability
