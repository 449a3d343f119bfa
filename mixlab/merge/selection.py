"""The exact k-th smallest magnitude of a model, by counting.

A non-negative float orders like the integer of the same bits. So the k-th smallest is found digit
by digit: count the entries by their highest 16 bits, pick the bin that holds the k-th, and look
at the next 16 bits of that bin only. A count is a sum over leaves, so the models are never
sorted, copied or held together; float32 takes two sweeps over the leaves, float64 four.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge.core import Leaves
from mixlab.types import Array, ArrayLike

_DIGIT = 16


def kth_smallest(magnitudes: Leaves, k: ArrayLike) -> Array:
    """The k-th smallest entry of each model over all the leaves together.

    Args:
        magnitudes: non-negative floats, `[M, ...]` a leaf.
        k: an integer of 1 ... d, where d is the number of entries that one model has in the
            leaves; numbers outside are clipped to that range. May be traced.

    Returns:
        `[M]`, in the widest dtype of the leaves: one of the entries, exactly.

    Raises:
        ValueError: there are more entries than a 32-bit counter holds.
    """
    if magnitudes.size >= 2**32:
        raise ValueError(
            f"a model of {magnitudes.size} entries is too large to count in 32 bits; "
            'select leaf by leaf (scope="leaf")'
        )
    is_double = any(jnp.finfo(spec.dtype).bits == 64 for spec in magnitudes.specs.values())
    word, number = (jnp.uint64, jnp.float64) if is_double else (jnp.uint32, jnp.float32)
    num_models = magnitudes.num_models

    # How many entries must lie below the answer, within the bin that is looked at.
    clip = jnp.clip if isinstance(k, jax.Array) else np.clip
    below = jnp.asarray(clip(k, 1, max(magnitudes.size, 1)) - 1).astype(jnp.uint32)
    below = jnp.broadcast_to(below, (num_models,))
    prefix = jnp.zeros(num_models, word)
    for shift in range(jnp.iinfo(word).bits - _DIGIT, -1, -_DIGIT):

        def count(name: str, x: Array, prefix: Array = prefix, shift: int = shift) -> Array:
            bits = jax.lax.bitcast_convert_type(x.astype(number), word)
            return _count_digits(bits.reshape(num_models, -1), prefix, shift)

        zero = jnp.zeros((num_models, 2**_DIGIT), jnp.uint32)
        cumulative = jnp.cumsum(magnitudes.total(count, zero), axis=1, dtype=jnp.uint32)
        digit = jnp.argmax(cumulative > below[:, None], axis=1)
        passed = jnp.take_along_axis(cumulative, jnp.maximum(digit - 1, 0)[:, None], axis=1)[:, 0]
        below = below - jnp.where(digit > 0, passed, jnp.uint32(0))
        prefix = (prefix << _DIGIT) | digit.astype(word)
    return jax.lax.bitcast_convert_type(prefix, number)


@functools.partial(jax.jit, static_argnums=2)
def _count_digits(bits: Array, prefix: Array, shift: int) -> Array:
    """Counts by the digit at `shift` those `bits [M, n]` whose higher digits are `prefix [M]`."""
    digit = ((bits >> shift) & (2**_DIGIT - 1)).astype(jnp.int32)
    # Two shifts, because a shift by the full width of the word is undefined.
    in_bin = ((bits >> shift) >> _DIGIT) == prefix[:, None]
    # Entries of other bins go to an index past the end, which the scatter drops.
    index = jnp.where(in_bin, digit, 2**_DIGIT)
    counts = jnp.zeros((bits.shape[0], 2**_DIGIT), jnp.uint32)
    row = jnp.arange(bits.shape[0])[:, None]
    return counts.at[row, index].add(jnp.uint32(1), mode="drop")
