"""Random words as `jax.random` draws them, written out.

On CPUs JAX compiles its generator as a loop whose every round goes through memory. Without the
loop a compiler keeps the rounds in registers: the same numbers, to the bit, several times faster,
and compiled sooner.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.types import Array, ArrayLike, Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_GROUPS = 5
_CHUNK = 2**18


def bits(key: Key, shape: tuple[int, ...]) -> Array:
    """Random words, those of `jax.random.bits(key, shape, jnp.uint32)`.

    Args:
        key: PRNG key; of another kind than Threefry it is left to JAX.
        shape: shape of the result.

    Returns:
        uint32, uniform.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Threefry-2x32
    with 20 rounds).
    """
    size = math.prod(shape)
    if str(jax.random.key_impl(key)) != "threefry2x32" or size >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32)
    if size == 0:
        return jnp.zeros(shape, jnp.uint32)
    num = max(2, math.ceil(size / _CHUNK))
    length = math.ceil(size / num)

    def chunk(start: Array) -> Array:
        high, low = _threefry(key, start + jnp.arange(length, dtype=jnp.uint32))
        return high ^ low

    # In a loop of at least two turns, or XLA would compile a generator of its own into every use.
    words = jax.lax.map(chunk, length * jnp.arange(num, dtype=jnp.uint32))
    return words.reshape(-1)[:size].reshape(shape)


def uniform(key: Key, shape: tuple[int, ...]) -> Array:
    """Numbers in [0, 1), those of `jax.random.uniform(key, shape, jnp.float32)`."""
    return unit(bits(key, shape))


def unit(words: Array) -> Array:
    """Turns random words into float32 in [0, 1), multiples of 2^-23."""
    return (words >> 9).astype(jnp.float32) * 2.0**-23


def whole_number(u: Array, count: ArrayLike | tuple[int, ...]) -> Array:
    """Turns uniform numbers in [0, 1) into uniform integers of 0 ... count - 1, int32."""
    count = jnp.asarray(count, jnp.int32)
    return jnp.minimum((u * count.astype(u.dtype)).astype(jnp.int32), count - 1)


def _threefry(key: Key, counter: Array) -> tuple[Array, Array]:
    first, second = jax.random.key_data(key)
    schedule = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    x, y = jnp.broadcast_to(first, counter.shape), counter + second
    for group in range(_GROUPS):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << distance) | (y >> (32 - distance))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y
