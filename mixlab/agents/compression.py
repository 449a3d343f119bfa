"""Messages made small: what a receiver makes of them, and how many bytes they take.

A compressor is a pure function of the message of one agent. What is sent is never built: results
are dense, as the receiver reconstructs them, and the size of the message follows from the shapes.
Integer leaves are sent as they are.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixlab import random, spec, trees
from mixlab.types import Array, Key, PyTree

_INDEX_BYTES = 4
_SCALE_BYTES = 4
_SEED_BYTES = 8
SCOPES = ("model", "leaf")


class Compressor(NamedTuple):
    """A way to make messages small.

    Attributes:
        name: as reports show it.
        compress: `compress(key, tree) -> tree`, what the receiver reconstructs of the message of
            one agent; structure, shapes and dtypes stay.
        num_bytes: `num_bytes(tree)`, the size of that message; needs no more than shapes and
            dtypes, so `jax.eval_shape` results do.
    """

    name: str
    compress: Callable[[Key, PyTree], PyTree]
    num_bytes: Callable[[PyTree], int]


def identity() -> Compressor:
    """Sends everything as it is."""
    return Compressor("identity", lambda key, tree: tree, trees.num_bytes)


def top_k(fraction: float, *, scope: str = "model") -> Compressor:
    """Sends the entries of largest magnitude, earlier ones first among equals.

    A message holds the entries, and their places as 4-byte indices or as one bit for each entry
    of the whole, whichever is shorter.

    Args:
        fraction: in (0, 1]; of d entries `round(fraction * d)` are sent, and at least one.
        scope: `"model"` ranks the entries of all leaves together; `"leaf"` those of each leaf.

    Raises:
        ValueError: an argument is out of range.

    Source: Stich et al. 2018, "Sparsified SGD with Memory", definition 2.2; Koloskova et al. 2019
    for its use in gossip.
    """

    def scores(key: Key, leaf: Array) -> Array:
        return jnp.abs(leaf).astype(trees.wide(leaf.real.dtype)).reshape(-1)

    return _sparse("top_k", fraction, scope, scores, scaled=False, seeded=False)


def random_k(fraction: float, *, scope: str = "model", unbiased: bool = False) -> Compressor:
    """Sends entries that are drawn at random, the same number as `top_k`.

    A message holds the entries, and the 8-byte seed from which the receiver draws their places.

    Args:
        fraction: as in `top_k`.
        scope: `"model"` draws from the entries of all leaves together; `"leaf"` from each leaf.
        unbiased: whether what is sent is divided by the fraction, so that the mean of the message
            is the message itself. CHOCO needs the biased kind, which never lengthens a message.

    Raises:
        ValueError: an argument is out of range.

    Source: Stich et al. 2018, "Sparsified SGD with Memory", definition 2.2.
    """

    def scores(key: Key, leaf: Array) -> Array:
        return random.uniform(key, (leaf.size,))

    return _sparse("random_k", fraction, scope, scores, scaled=unbiased, seeded=True)


def quantise(bits: int, *, bucket: int | None = 512, unbiased: bool = True) -> Compressor:
    """Rounds entries at random to a few levels between zero and the norm of their bucket.

    With `s = 2^(bits - 1) - 1` levels, an entry x of a bucket of norm n becomes `n sign(x) l / s`,
    where l is `s |x| / n` rounded up or down, at random so that the mean is x. A message holds
    `bits` bits an entry and a 4-byte norm a bucket.

    Args:
        bits: 2 to 16, the sign included.
        bucket: how many entries of a leaf share a norm; None for the whole leaf.
        unbiased: False divides by `1 + min(d / s^2, sqrt(d) / s)`, d being the size of a bucket,
            after which errors are no larger than messages, as CHOCO needs.

    Raises:
        ValueError: an argument is out of range.
        TypeError: at the compression: a leaf is complex.

    Source: Alistarh et al. 2017, "QSGD", section 3.1 and, on buckets, 4; Koloskova et al. 2019,
    "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed Communication",
    section 3.1, on the factor.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"quantise takes 2 to 16 bits, one of them the sign, got {bits}")
    if bucket is not None and bucket < 1:
        raise ValueError(f"a bucket has at least 1 entry, got {bucket}")
    levels = 2 ** (bits - 1) - 1

    def buckets(size: int) -> tuple[int, int]:
        """How many, and of how many entries."""
        width = min(bucket or size, size)
        return -(-size // width), width

    def compress(key: Key, tree: PyTree) -> PyTree:
        def leaf_of(name: str, leaf: Array) -> Array:
            if not trees.is_inexact(leaf) or leaf.size == 0:
                return leaf
            x = _real(name, leaf)
            count, width = buckets(x.size)
            rows = jnp.pad(x, (0, count * width - x.size)).reshape(count, width)
            # The largest entry first, or the squares of large and small numbers leave the range.
            largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
            unit = rows / jnp.where(largest > 0, largest, 1)
            length = jnp.sqrt(jnp.sum(jnp.square(unit), axis=1, keepdims=True))
            place = levels * jnp.abs(unit) / jnp.where(length > 0, length, 1)
            drawn = random.uniform(trees.name_key(key, name), rows.shape).astype(rows.dtype)
            level = jnp.floor(place + drawn)
            factor = 1 if unbiased else 1 + min(width / levels**2, math.sqrt(width) / levels)
            sent = jnp.sign(unit) * level * (largest * length / (levels * factor))
            return sent.reshape(-1)[: x.size].reshape(leaf.shape).astype(leaf.dtype)

        return trees.map_named(leaf_of, tree)

    def size(leaf: Array) -> int:
        return -(-bits * leaf.size // 8) + _SCALE_BYTES * buckets(leaf.size)[0]

    return Compressor("quantise", compress, _sum_over_leaves(size))


def sign() -> Compressor:
    """Sends the sign of every entry, and the mean magnitude of each leaf.

    The receiver makes the one times the other of them; zero counts as positive. A message holds a
    bit an entry and 4 bytes a leaf.

    Raises:
        TypeError: at the compression: a leaf is complex.

    Source: Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes", algorithm 1 (scaled sign).
    """

    def compress(key: Key, tree: PyTree) -> PyTree:
        def leaf_of(name: str, leaf: Array) -> Array:
            if not trees.is_inexact(leaf) or leaf.size == 0:
                return leaf
            x = _real(name, leaf)
            scale = jnp.mean(jnp.abs(x))
            return jnp.where(x >= 0, scale, -scale).reshape(leaf.shape).astype(leaf.dtype)

        return trees.map_named(leaf_of, tree)

    return Compressor(
        "sign", compress, _sum_over_leaves(lambda leaf: -(-leaf.size // 8) + _SCALE_BYTES)
    )


def _sparse(
    name: str,
    fraction: float,
    scope: str,
    scores: Callable[[Key, Array], Array],
    *,
    scaled: bool,
    seeded: bool,
) -> Compressor:
    """Sends the entries of highest score, over all leaves or in each."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} takes a fraction in (0, 1], got {fraction}")
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; {spec.nearest(scope, SCOPES)}")

    def count(size: int) -> int:
        return min(max(round(fraction * size), 1), size)

    def grouped(tree: PyTree) -> list[dict[str, Array]]:
        """Leaves whose entries compete, by name."""
        floating = {name: x for name, x in trees.named_leaves(tree) if _has_entries(x)}
        if scope == "leaf":
            return [{name: leaf} for name, leaf in floating.items()]
        return [floating] if floating else []

    def compress(key: Key, tree: PyTree) -> PyTree:
        sent: dict[str, Array] = {}
        for leaves in grouped(tree):
            by_leaf = [scores(trees.name_key(key, name), x) for name, x in leaves.items()]
            widest = jnp.result_type(*(x.dtype for x in by_leaf))
            joined = jnp.concatenate([x.astype(widest) for x in by_leaf])
            _, highest = jax.lax.top_k(joined, count(joined.size))
            kept = jnp.zeros(joined.size, bool).at[highest].set(True)
            factor = joined.size / len(highest) if scaled else 1.0
            start = 0
            for name, leaf in leaves.items():
                own = kept[start : start + leaf.size].reshape(leaf.shape)
                x = leaf.astype(trees.wide(leaf.dtype)) * factor
                sent[name] = jnp.where(own, x, 0).astype(leaf.dtype)
                start += leaf.size
        return trees.map_named(lambda name, leaf: sent.get(name, leaf), tree)

    def num_bytes(tree: PyTree) -> int:
        total = _other_bytes(tree) + (_SEED_BYTES if seeded else 0)
        for leaves in grouped(tree):
            size = sum(leaf.size for leaf in leaves.values())
            # Which leaves the entries come from is not known: they are sent as wide as any.
            total += count(size) * max(leaf.dtype.itemsize for leaf in leaves.values())
            if not seeded:
                total += min(_INDEX_BYTES * count(size), -(-size // 8))
        return total

    return Compressor(name, compress, num_bytes)


def _sum_over_leaves(size: Callable[[Array], int]) -> Callable[[PyTree], int]:
    """Adds up the sizes of floating leaves, and the bytes of the others."""

    def num_bytes(tree: PyTree) -> int:
        floating = (leaf for leaf in jax.tree.leaves(tree) if _has_entries(leaf))
        return _other_bytes(tree) + sum(map(size, floating))

    return num_bytes


def _other_bytes(tree: PyTree) -> int:
    return trees.num_bytes([x for x in jax.tree.leaves(tree) if not trees.is_inexact(x)])


def _has_entries(leaf: Array | None) -> bool:
    return leaf is not None and trees.is_inexact(leaf) and leaf.size > 0


def _real(name: str, leaf: Array) -> Array:
    """The entries of a leaf in a row, in float32 or wider."""
    if jnp.iscomplexobj(leaf):
        raise TypeError(
            f"leaf {name!r} is {leaf.dtype}, and complex numbers have no levels; send its real and "
            "imaginary parts as two leaves"
        )
    return leaf.astype(trees.wide(leaf.dtype)).reshape(-1)


COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    make.__name__: make for make in (identity, quantise, random_k, sign, top_k)
}
"""Every compressor by its name."""


def parse(text: str | Compressor) -> Compressor:
    """Builds a compressor from text such as `"top_k(fraction=0.1)"`.

    Raises:
        ValueError: an unknown name, or an argument out of range.
        TypeError: an argument that the compressor does not take.
    """
    if isinstance(text, Compressor):
        return text
    made: Compressor = spec.parse(text, COMPRESSORS)
    return made
