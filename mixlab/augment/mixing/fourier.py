"""FMix: mixing with masks whose spectrum decays, in one, two or three dimensions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from mixlab import random
from mixlab.augment.core import Augmentation
from mixlab.augment.mixing.frame import (
    beta,
    blend_by_mask,
    check_alpha,
    mixed_sample,
    num_uniforms,
)
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, Key, Plan

_MODES = ("reference", "spectral")


def _check(shape: tuple[int, ...], mode: str, decay: float, max_soft: float) -> None:
    if len(shape) not in (1, 2, 3) or min(shape) < 1:
        raise ValueError(f"an FMix mask has one, two or three axes of positive length, got {shape}")
    if mode not in _MODES:
        raise ValueError(f"unknown mode {mode!r}; {nearest(str(mode), _MODES)}")
    if not np.isfinite(decay):
        raise ValueError(f"decay must be finite, got {decay}")
    if not 0.0 <= max_soft <= 1.0:
        raise ValueError(f"max_soft is a share of the pixels in [0, 1], got {max_soft}")


def _frequencies(shape: tuple[int, ...], mode: str) -> np.ndarray:
    """Magnitudes of the frequencies that the noise belongs to."""
    if mode == "reference" and len(shape) == 1:
        return np.abs(np.fft.fftfreq(shape[0]))
    # The reference keeps the half axis of the second of three dimensions, and puts it last.
    order = (shape[0], shape[2], shape[1]) if mode == "reference" and len(shape) == 3 else shape
    half = np.fft.fftfreq(order[-1])[: order[-1] // 2 + (2 if order[-1] % 2 else 1)]
    axes = [np.fft.fftfreq(n) for n in order[:-1]] + [half]
    squares = [np.square(f) for f in np.meshgrid(*axes, indexing="ij")]
    return np.sqrt(np.sum(squares, axis=0))


def noise_shape(shape: tuple[int, ...], mode: str = "spectral") -> tuple[int, ...]:
    """The shape of the noise that `fmix_mask` takes for a mask of `shape`."""
    return (1, *_frequencies(shape, mode).shape, 2)


def fmix_grey(
    noise: ArrayLike, shape: tuple[int, ...], *, decay: float = 3.0, mode: str = "spectral"
) -> Array:
    """The grey image whose brightest pixels become the mask.

    The noise is divided by max(f, 1 / longest side) ^ decay, f the magnitude of the frequency, and
    transformed back. `mode="spectral"` does what the paper describes: real and imaginary part lie
    along the last axis of the noise. `mode="reference"` equals the FMix repository and OpenMixup:
    they take the two parts from the first two entries of the first *frequency* axis and zero-pad
    what is left, so that no energy remains above the lowest frequency across.

    Args:
        noise: standard normal, of `noise_shape(shape, mode)`: for (H, W) it is
            [1, H, W // 2 + 1, 2], with one more column if W is odd.
        shape: shape of the image, (L,), (H, W) or three axes.
        decay: power of the decay.
        mode: `"spectral"` or `"reference"`.

    Returns:
        float32 (or wider) of `shape`, from 0 to 1; 0 if the image is constant.

    Raises:
        ValueError: a wrong shape of the noise, or an argument out of its range.

    Source: Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation", 2020, section 4.
    """
    shape = tuple(int(n) for n in shape)
    _check(shape, mode, decay, 0.0)
    noise = jnp.asarray(noise, jnp.result_type(float))
    if noise.shape != noise_shape(shape, mode):
        raise ValueError(
            f"noise for an FMix mask of shape {shape}, mode {mode!r}, must have the shape "
            f"{noise_shape(shape, mode)}, got {noise.shape}"
        )
    scale = 1.0 / np.maximum(_frequencies(shape, mode), 1.0 / max(shape)) ** decay
    spectrum = noise[0] * jnp.asarray(scale[..., None], noise.dtype)
    parts = jnp.moveaxis(spectrum, -1, 0) if mode == "spectral" else spectrum
    imaginary = parts[1] if parts.shape[0] > 1 else jnp.zeros_like(parts[0])
    grey = jnp.fft.irfftn(jax.lax.complex(parts[0], imaginary), shape)
    grey = grey - jnp.min(grey)
    peak = jnp.max(grey)
    return grey / jnp.where(peak > 0, peak, 1.0)


def binarise(
    grey: Array, lam: ArrayLike, *, max_soft: float = 0.0, ceil: ArrayLike = False
) -> Array:
    """Sets the brightest share `lam` of the pixels of every image to one and the others to zero.

    With `max_soft` the edge is a ramp from one to zero over 2 * int(n * soft) of the n pixels in
    the order of their brightness, soft the lesser of `max_soft`, `lam` and `1 - lam`; if it is
    `lam` or `1 - lam` that is the lesser, it limits both sides.

    Args:
        grey: brightness [B, ...] in [0, 1].
        lam: share in [0, 1], [B].
        max_soft: share of the pixels on either side of the edge that the ramp takes.
        ceil: bool [B], round the number of pixels up rather than down.

    Returns:
        float32 masks in the shape of `grey`.

    Source: Harris et al., 2020, section 4, and the released code.
    """
    flat = grey.reshape(len(grey), -1)
    n = flat.shape[1]
    lam = jnp.broadcast_to(jnp.asarray(lam, jnp.result_type(float)), flat.shape[:1])
    count = jnp.where(jnp.asarray(ceil), jnp.ceil(lam * n), jnp.floor(lam * n)).astype(jnp.int32)
    if max_soft == 0.0:
        return _brightest(flat, count).astype(jnp.float32).reshape(grey.shape)
    # Equal pixels count as brighter the later they come, as in a reversed ascending sort.
    rank = n - 1 - jnp.argsort(jnp.argsort(flat, axis=1, stable=True), axis=1).astype(jnp.int32)
    share = jnp.minimum(jnp.asarray(max_soft, lam.dtype), jnp.minimum(lam, 1.0 - lam))
    soft = (share * n).astype(jnp.int32)[:, None]
    count = count[:, None]
    step = rank - (count - soft)
    ramp = 1.0 - step.astype(jnp.float32) / jnp.maximum(2 * soft - 1, 1).astype(jnp.float32)
    mask = jnp.where((step >= 0) & (step < 2 * soft), ramp, (rank < count).astype(jnp.float32))
    return mask.reshape(grey.shape)


_DIGIT = 10
"""Bits that one pass of the selection settles."""


def _brightest(x: Array, count: Array) -> Array:
    """Marks the `count[i]` largest numbers of every row, of equal ones those that come last.

    A histogram of the leading binary digits tells where the last of them lies; the numbers that
    share its digits are told apart by the next ones, until all of them are wanted. Two passes
    are most often enough, where a sort makes many.

    Args:
        x: [B, n] in [0, 1].
        count: int32 [B], in 0..n.

    Returns:
        bool [B, n].
    """
    bins = 2**_DIGIT
    rows = jnp.arange(len(x), dtype=jnp.int32)[:, None]
    passes = math.ceil((jnp.finfo(x.dtype).nmant - jnp.finfo(x.dtype).minexp) / _DIGIT)
    chosen, left_out = jnp.asarray(2, x.dtype), jnp.asarray(-1, x.dtype)

    def ambiguous(state: tuple[Array, Array, Array, Array]) -> Array:
        i, _, wanted, equal = state
        return (i < passes) & jnp.any((equal > wanted) & (wanted > 0))

    def settle(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        i, rest, wanted, _ = state
        open_ = (rest >= 0) & (rest <= 1)
        digit = jnp.minimum((rest * bins).astype(jnp.int32), bins - 1)
        place = jnp.where(open_, rows * bins + digit, bins * len(x)).reshape(-1)
        counts = jnp.zeros(bins * len(x), jnp.int32).at[place].add(1, mode="drop")
        last, wanted, equal = _nth(counts.reshape(len(x), -1), wanted)
        settled = jnp.where(digit > last[:, None], chosen, left_out)
        further = jnp.where(digit == last[:, None], rest * bins - digit.astype(x.dtype), settled)
        return i + 1, jnp.where(open_, further, rest), wanted, equal

    start = jnp.int32(0), x, count, jnp.full_like(count, x.shape[1] + 1)
    _, rest, wanted, equal = jax.lax.while_loop(ambiguous, settle, start)

    def shared(_: None) -> Array:
        open_ = (rest >= 0) & (rest <= 1)
        place = jnp.cumsum(open_[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
        return (rest == chosen) | (open_ & (place <= wanted[:, None]))

    def exact(_: None) -> Array:
        return (rest == chosen) | ((rest >= 0) & (wanted > 0)[:, None])

    return jax.lax.cond(jnp.any((equal > wanted) & (wanted > 0)), shared, exact, None)


def _nth(counts: Array, n: Array) -> tuple[Array, Array, Array]:
    """In which bin the n-th is found, counted from the last bin downwards.

    Args:
        counts: int32 [B, 2^_DIGIT], how many each bin holds.
        n: int32 [B]; for 0 it is the last bin.

    Returns:
        int32 [B]: the bin, the n of those in it that is meant, and how many it holds.
    """
    k = 2 ** (_DIGIT // 2)
    counts = counts.reshape(len(counts), -1, k)

    def step(counts: Array, n: Array) -> tuple[Array, Array, Array]:
        above = jnp.cumsum(counts[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
        found = jnp.maximum(jnp.sum(above >= n[:, None], axis=1, dtype=jnp.int32) - 1, 0)
        held, above = (
            jnp.take_along_axis(x, found[:, None], axis=1)[:, 0] for x in (counts, above)
        )
        return found, n - (above - held), held

    group, n, _ = step(jnp.sum(counts, axis=2, dtype=jnp.int32), n)
    within = jnp.take_along_axis(counts, group[:, None, None], axis=1)[:, 0]
    found, n, held = step(within, n)
    return group * k + found, n, held


def fmix_mask(
    noise: ArrayLike,
    lam: ArrayLike,
    shape: tuple[int, ...],
    *,
    decay: float = 3.0,
    max_soft: float = 0.0,
    ceil: ArrayLike = False,
    mode: str = "spectral",
) -> Array:
    """The FMix mask that given noise makes: the deterministic half of `fmix`.

    Args:
        noise: standard normal, of `noise_shape(shape, mode)`: for (H, W) it is
            [1, H, W // 2 + 1, 2], with one more column if W is odd. `vmap` for more than one.
        lam: share of ones, in [0, 1].
        shape: shape of the mask, (L,), (H, W) or three axes.
        decay: power of the decay of the spectrum.
        max_soft: share of the pixels on either side of the edge that a soft edge takes; 0 is hard.
        ceil: round the number of ones up rather than down.
        mode: `"spectral"`, the method as published, or `"reference"`, see `fmix_grey`.

    Returns:
        float32 mask of `shape`, 1 where the example itself is kept. In the mode `"reference"` it
        equals the FMix repository, exactly in float64; in float32 pixels that are equally bright
        to seven digits may swap.

    Raises:
        ValueError: a wrong shape of the noise, or an argument out of its range.

    Source: Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation", 2020, section 4.
    """
    shape = tuple(int(n) for n in shape)
    _check(shape, mode, decay, max_soft)
    if not isinstance(lam, jax.Array) and not 0.0 <= float(lam) <= 1.0:
        raise ValueError(f"lam is the share of ones, in [0, 1], got {lam}")
    grey = fmix_grey(noise, shape, decay=decay, mode=mode)
    return binarise(grey[None], lam, max_soft=max_soft, ceil=ceil)[0]


@functools.cache
def _quantiles() -> np.ndarray:
    """2^16 equally likely values of the standard normal law, float32."""
    middles = (np.arange(2**16) + 0.5) / 2**16
    return scipy.special.ndtri(middles).astype(np.float32)


def _noise(key: Key, shape: tuple[int, ...]) -> Array:
    """Draws standard normal noise [..., 2], to 16 bits: two numbers from one random word.

    The words are most of the work of FMix, and the logarithm in `jax.random.normal` the rest.
    """
    words = random.bits(key, shape[:-1])
    index = jax.lax.bitcast_convert_type(words, jnp.uint16).astype(jnp.int32)
    return jnp.asarray(_quantiles()).at[index].get(mode="promise_in_bounds")


def fmix(
    alpha: float = 1.0,
    decay: float = 3.0,
    max_soft: float = 0.0,
    reformulate: bool = False,
    *,
    mode: str = "spectral",
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """FMix: mixes with a random mask of low frequency, and the labels by its share.

    `out = mask * x + (1 - mask) * x[partner]`. lam ~ Beta(alpha, alpha) sets the share of ones; a
    coin decides whether the number of pixels is rounded up or down. The noise is normal to 16 bits.

    Args:
        alpha: parameter of the Beta law; 0 leaves the batch unchanged.
        decay: power of the decay of the spectrum: the higher, the larger the blobs.
        max_soft: share of the pixels on either side of the edge that a soft edge takes; 0 is hard.
        reformulate: draw lam from Beta(alpha + 1, alpha).
        mode: `"spectral"` is the method as published; `"reference"` reproduces the FMix repository
            and OpenMixup, whose spectrum has energy only at horizontal frequencies of at most one.
        per_batch: one mask for the whole batch (as both references) instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"`, `"roll"`, `"pair"` or `"half"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, L, C], [B, H, W, C] or [B, T, H, W, C] with the plan `partner`
        int32 [B]; `mask` float32, the image's shape without channels, 1 = own pixel; `lam` float32
        [B], the weight of the example's own label (the mean of the mask differs from it by less
        than one pixel's share); `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.

    Source: Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation", 2020, section 4.
    """
    check_alpha(alpha)
    _check((1,), mode, decay, max_soft)

    def decide(u: Array, shape: tuple[int, ...], key: Key) -> Plan:
        shape = shape[1:-1]
        lam = beta(u[1:], alpha, tilted=reformulate)
        noise = _noise(key, (u.shape[1], *noise_shape(shape, mode)))
        grey = jax.vmap(lambda noise: fmix_grey(noise, shape, decay=decay, mode=mode))(noise)
        return {"lam": lam, "mask": binarise(grey, lam, max_soft=max_soft, ceil=u[0] < 0.5)}

    return mixed_sample(
        decide,
        blend_by_mask,
        uniforms=1 + num_uniforms(alpha, tilted=reformulate),
        per_batch=per_batch,
        prob=prob,
        pairing=pairing,
        ranks=(3, 4, 5),
        whole=max_soft == 0.0,
    )
