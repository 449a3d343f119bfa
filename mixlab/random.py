"""Keys, and random numbers in bulk: Threefry written out.

On CPUs JAX compiles its generator as a loop whose every round goes through memory. Without the
loop a compiler keeps the rounds in registers: the same numbers, to the bit, several times faster,
and compiled sooner.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mixlab.types import Array, ArrayLike, Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_CHUNK = 2**18
_LANES = 4


def check_key(key: Any) -> None:
    """Raises a `TypeError` unless `key` is a PRNG key, typed or of the old kind (uint32)."""
    dtype = getattr(key, "dtype", None)
    old = dtype == jnp.uint32 and jnp.ndim(key) > 0
    if not old and (dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key is a PRNG key such as jax.random.key(0), got {key!r}")


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
        counter = start + jnp.arange(length, dtype=jnp.uint32)
        high, low = threefry(jax.random.key_data(key), jnp.zeros_like(counter), counter)
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


@functools.partial(jax.jit, static_argnums=2)
def bernoulli(key: Key, probability: ArrayLike, shape: tuple[int, ...]) -> Array:
    """True with a given probability, independently for every entry.

    What one row draws does not depend on how many rows there are. Probabilities are exact to
    2^-24, so that 0 is never and 1 is always.

    Args:
        key: a PRNG key of any kind.
        probability: in [0, 1]; broadcasts to `shape`.
        shape: `(M, ...)`, fewer than 2^34 entries a row.

    Returns:
        bools of `shape`.
    """
    # One cipher block of 64 bits decides four entries; jax.random spends a block on each. An
    # entry is decided by 16 bits of its own and, only where these are the leading bits of the
    # probability, by those of its neighbour as well: the two remain independent but for 2^-16.
    rows, size = shape[0], math.prod(shape[1:])
    length = -(-size // _LANES)
    block = jnp.arange(length, dtype=jnp.uint32)[None]
    seed = jax.random.bits(key, (2,), jnp.uint32)
    high, low = threefry(seed, block, jnp.arange(rows, dtype=jnp.uint32)[:, None])
    limits = jnp.broadcast_to(jnp.asarray(probability, jnp.float32), shape).reshape(rows, size)

    def decide(lane: int, words: Array) -> Array:
        # Compared before they are joined: XLA for CPUs does not vectorise what follows a join.
        limit = limits[:, lane * length : (lane + 1) * length]
        return (words[:, : limit.shape[1]] >> 8).astype(jnp.float32) * 2.0**-24 < limit

    lanes = (high, _rotate(high, 16), low, _rotate(low, 16))
    kept = [decide(lane, words) for lane, words in enumerate(lanes)]
    return jnp.concatenate(kept, axis=1).reshape(shape)


def threefry(seed: Array, high: Array, low: Array) -> tuple[Array, Array]:
    """Enciphers two 32-bit words under a seed `[2]`: Threefry-2x32 of 20 rounds.

    The generator of `jax.random`, in one expression that compilers keep in registers.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(0x1BD11BDA))
    high, low = high + keys[0], low + keys[1]
    for i in range(1, 6):
        for distance in _ROTATIONS[(i - 1) % 2]:
            high = high + low
            low = _rotate(low, distance) ^ high
        high, low = high + keys[i % 3], low + keys[(i + 1) % 3] + jnp.uint32(i)
    return high, low


def _rotate(word: Array, distance: int) -> Array:
    return (word << distance) | (word >> (32 - distance))
