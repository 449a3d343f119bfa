import jax
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
