"""The exact k-th smallest magnitude of a model, by counting.

A non-negative float orders like the integer of the same bits. So the k-th smallest is found by
bisection over integers, with seven edges at a time instead of one: a sweep over the leaves counts
how many entries lie below each edge, and the answer stays between two of them. A sorted sample
tells where to lay the first edges, and from then on the counts tell it: three or four sweeps are
enough for a large model; where such a guess fails, the next sweep narrows the bracket by eight,
whatever the data. A count is a sum over leaves, so the models are never sorted, copied or held
together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core
from mixlab.merge.core import Leaves, Packing
from mixlab.types import Array, ArrayLike

_BINS = 8
"""Into how many bins a sweep counts: as many as a 32-bit word has half-bytes."""
_SAMPLE = 2**14
"""About how many entries of a model are sorted for the first guess."""
_DEVIATIONS = 4.0
"""Half the width of a guess in standard deviations of what is guessed."""
_FEW = 2**12
"""Up to so many entries are counted in the way that compiles fast, more in the fast one."""


class _Bracket(NamedTuple):
    """Where the answers are, as integers of the floats' bits; every field is `[M]`.

    Attributes:
        low: at most the answer.
        high: above the answer.
        below_low: how many entries are below `low`.
        below_high: how many entries are below `high`.
        first: the first edge of the next sweep.
        shift: the edges are `2**shift` apart.
    """

    low: Array
    high: Array
    below_low: Array
    below_high: Array
    first: Array
    shift: Array


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
    size, num_models = magnitudes.size, magnitudes.num_models
    if size >= 2**32:
        raise ValueError(
            f"a model of {size} entries is too large to count in 32 bits; "
            'select leaf by leaf (scope="leaf")'
        )
    is_double = any(jnp.finfo(spec.dtype).bits == 64 for spec in magnitudes.specs.values())
    word, number = (jnp.uint64, jnp.float64) if is_double else (jnp.uint32, jnp.float32)
    if size == 0:
        return jnp.zeros(num_models, number)

    words = Packing(magnitudes.specs).pack(magnitudes.map(lambda _, x: _words(x, number, word)))
    clip = jnp.clip if isinstance(k, jax.Array) else np.clip
    rank = jnp.asarray(clip(k, 1, size) - 1, jnp.uint32)

    def sweep(bracket: _Bracket) -> _Bracket:
        def count(name: str, x: Array) -> Array:
            return _count_below(x, bracket.first, bracket.shift)

        zero = jnp.zeros((num_models, _BINS - 1), jnp.uint32)
        return _narrow(bracket, words.total(count, zero), rank)

    def unfinished(bracket: _Bracket) -> Array:
        return jnp.any(bracket.high - bracket.low > 1)

    return jax.lax.bitcast_convert_type(
        _while(unfinished, sweep, _first_bracket(words, rank)).low, number
    )


def _while(
    unfinished: Callable[[_Bracket], Array], sweep: Callable[[_Bracket], _Bracket], start: _Bracket
) -> _Bracket:
    """Sweeps to the end; outside of `jit` in Python, so that leaves can come from a file."""
    if not any(isinstance(x, jax.core.Tracer) for x in start):
        while unfinished(start):
            start = sweep(start)
        return start
    pure, given = jax.closure_convert(sweep, start)

    def body(bracket: _Bracket) -> _Bracket:
        # Otherwise the compiler takes the task vectors, which no sweep changes, out of the loop:
        # then all of them are in memory together.
        held, bracket = jax.lax.optimization_barrier((given, bracket))
        return pure(bracket, *held)

    return jax.lax.while_loop(unfinished, body, start)


def _first_bracket(words: Leaves, rank: Array) -> _Bracket:
    """All that a float can be, and edges around the quantile of a sample."""
    stride, position, parts = max(1, words.size // _SAMPLE), 0, []
    for name, spec in words.specs.items():
        parts.append(jnp.stack([w[-position % stride :: stride] for w in words.read(name)]))
        position += int(np.prod(spec.shape))
    sample = jnp.sort(jnp.concatenate(parts, axis=1), axis=1)
    num = sample.shape[1]
    share = (rank.astype(jnp.float32) + 0.5) / words.size
    margin = _DEVIATIONS * jnp.sqrt(num * share * (1 - share)) if stride > 1 else 0.0

    def at(place: Array) -> Array:
        index = jnp.clip(place, 0, num - 1).astype(jnp.int32)
        return sample[:, index]

    from_, to = at(num * share - margin), at(num * share + margin)
    zero = jnp.zeros(words.num_models, jnp.uint32)
    high = jnp.full_like(from_, 1 << (_bits(from_) - 1))
    shift = _log2((to - from_) // (_BINS - 2) + 1)
    return _Bracket(jnp.zeros_like(from_), high, zero, zero + jnp.uint32(words.size), from_, shift)


def _narrow(bracket: _Bracket, below: Array, rank: Array) -> _Bracket:
    """The bracket after a sweep that found `below [M, 7]` entries below the edges."""
    edges = _edges(bracket.first, bracket.shift)
    passed = jnp.sum(below <= rank, axis=1, dtype=jnp.int32)

    def pick(values: Array, i: Array) -> Array:
        return jnp.take_along_axis(values, jnp.clip(i, 0, _BINS - 2)[:, None], axis=1)[:, 0]

    raised = (passed > 0) & (pick(edges, passed - 1) > bracket.low)
    low = jnp.where(raised, pick(edges, passed - 1), bracket.low)
    below_low = jnp.where(raised, pick(below, passed - 1), bracket.below_low)
    lowered = (passed < _BINS - 1) & (pick(edges, passed) < bracket.high)
    high = jnp.where(lowered, pick(edges, passed), bracket.high)
    below_high = jnp.where(lowered, pick(below, passed), bracket.below_high)

    # Edges over the whole bracket narrow it by eight for certain.
    width = high - low
    shift = _log2((width - 1) // _BINS + 1)
    first = low + (jnp.ones_like(low) << shift)
    # Were the entries spread evenly within the bracket, the answer would be at `guess`, give or
    # take `margin`. That is tried unless the last edges missed.
    hit = raised & lowered & (width <= jnp.ones_like(low) << bracket.shift)
    num = (below_high - below_low).astype(jnp.float32)
    span = width.astype(jnp.float32)
    guess = span * (((rank - below_low).astype(jnp.float32) + 0.5) / num)
    margin = _DEVIATIONS / 2 * span / jnp.sqrt(num)
    near = _log2((2 * margin / (_BINS - 2)).astype(low.dtype) + 1)
    is_guess = hit & (near < shift)
    first = jnp.where(is_guess, low + jnp.maximum(guess - margin, 1).astype(low.dtype), first)
    return _Bracket(low, high, below_low, below_high, first, jnp.where(is_guess, near, shift))


def _edges(first: Array, shift: Array) -> Array:
    return first[:, None] + (jnp.arange(_BINS - 1, dtype=first.dtype) << shift[:, None])


def _log2(x: Array) -> Array:
    """The binary logarithm of a positive integer, rounded up."""
    return jnp.asarray(_bits(x), x.dtype) - jax.lax.clz(x - 1)


def _bits(x: Array) -> int:
    return int(jnp.iinfo(x.dtype).bits)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _words(x: Array, number: Any, word: Any) -> Array:
    """The bits of `[M, ...]` as integers `[M, n]`."""
    return core.each_model(
        lambda row: jax.lax.bitcast_convert_type(row.astype(number), word).reshape(-1), x
    )


@jax.jit
def _count_below(words: Array, first: Array, shift: Array) -> Array:
    """How many of `words [M, n]` are below each edge, `[M, 7]`."""
    return core.each_model(_count_row, words, first, shift)


def _count_row(words: Array, first: Array, shift: Array) -> Array:
    """Counts `words [n]`, `[7]`."""
    num = len(words) // 128 * 128 if len(words) > _FEW else 0
    edges = _edges(first[None], shift[None])[0, :, None]
    rest = jnp.sum(words[None, num:] < edges, axis=1, dtype=jnp.uint32)
    return rest + _count_many(words[None, :num], first, shift)[0] if num else rest


def _count_many(words: Array, first: Array, shift: Array) -> Array:
    """The same for n a multiple of 128.

    XLA makes vector instructions of sums of slices, on a CPU, but not of counts along an axis. So
    eight slices at a time are counted, each entry as a one in one of the eight half-bytes of a
    word; then sixteen slices of these words are added up, in bytes.
    """

    def one(x: Array) -> Array:
        distance = (jnp.maximum(x, first) - first) >> shift
        bin_ = jnp.where(x < first, 0, jnp.minimum(distance, _BINS - 2) + 1)
        return jnp.uint32(1) << (4 * bin_.astype(jnp.uint32))

    ones = sum(map(one, jnp.split(words, 8, axis=1)))
    parts = jnp.split(ones, 16, axis=1)
    even, odd = (sum((x >> by) & 0x0F0F0F0F for x in parts) for by in (0, 4))
    counts = [
        jnp.sum((half >> by) & 0xFF, axis=1, dtype=jnp.uint32)
        for by in range(0, 32, 8)
        for half in (even, odd)
    ]
    return jnp.cumsum(jnp.stack(counts[:-1], axis=1), axis=1, dtype=jnp.uint32)
