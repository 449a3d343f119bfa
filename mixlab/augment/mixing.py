"""Mixing an example with a partner from the batch: mixup, cutmix, resizemix, label smoothing.

`mixed_sample` is the frame that all methods of this kind share, those of `fourier.py` included.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import (
    Augmentation,
    along_batch,
    check_probability,
    image_of,
    soft_label_of,
    to_dtype,
    working_dtype,
)
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, Batch, Key, Plan

Decide = Callable[[Key, int, tuple[int, ...]], Plan]
Blend = Callable[[Plan, Array, Array], tuple[Array, Array]]


def beta(key: Key, alpha: float, shape: tuple[int, ...], *, tilted: bool = False) -> Array:
    """Draws from Beta(alpha, alpha), or Beta(alpha + 1, alpha) if `tilted`, in closed form.

    With U, V uniform, S = U^(-1/alpha) - 1 and c = cos(2 pi V), the variable
    (1 + sign(c) / sqrt(1 + 1 / (S c^2))) / 2 is exactly Beta(alpha, alpha): Ulrich, "Computer
    generation of distributions on the m-sphere", 1984; it is Bailey's polar method for Student's
    t, moved to [0, 1]. It has no rejection loop, so it compiles at once where `jax.random.beta`
    takes seconds. The tilted law has the density 2 x f(x), which keeping x with probability x,
    and 1 - x otherwise, gives.

    Args:
        key: PRNG key.
        alpha: shape parameter, positive, or zero for the constant 1.
        shape: shape of the result.
        tilted: draw from Beta(alpha + 1, alpha).

    Returns:
        float32 in [0, 1].
    """
    if alpha == 0.0:
        return jnp.ones(shape, jnp.float32)
    u, v, coin = jax.random.uniform(key, (3, *shape), jnp.float32)
    if alpha == 1.0:
        x = u
    else:
        s = jnp.expm1(-jnp.log1p(-u) / alpha)
        c = jnp.cos(2.0 * jnp.pi * v)
        # The bounds keep 0 / 0 and infinity / infinity out; both lie beyond float32's resolution.
        r = jnp.sqrt(1.0 + 1.0 / jnp.clip(s * jnp.square(c), 1e-30, 1e30))
        tail = (r - 1.0) / (2.0 * r)
        x = jnp.where(c < 0, tail, 1.0 - tail)
    return jnp.where(coin < x, x, 1.0 - x) if tilted else x


def check_alpha(alpha: float) -> None:
    """Raises a `ValueError` unless `alpha` is a finite number that is not negative."""
    if not 0.0 <= alpha < np.inf:
        raise ValueError(
            f"alpha is the parameter of a Beta law, finite and >= 0 (0 mixes nothing), got {alpha}"
        )


def _coin(key: Key, prob: float, n: int) -> Array:
    """Draws bool [n]; certainty costs no random numbers."""
    if prob == 1.0:
        return jnp.ones(n, bool)
    return jax.random.uniform(key, (n,), jnp.float32) < prob


def _partners(key: Key, size: int, pairing: str) -> Array:
    match pairing:
        case "permutation":
            return jax.random.permutation(key, size).astype(jnp.int32)
        case "flip":
            return jnp.arange(size, dtype=jnp.int32)[::-1]
        case _:
            return jnp.roll(jnp.arange(size, dtype=jnp.int32), 1)


def mixed_sample(
    decide: Decide,
    blend: Blend,
    *,
    per_batch: bool,
    prob: float,
    pairing: str,
    ranks: tuple[int, ...] = (4,),
) -> Augmentation:
    """An augmentation that mixes every example with a partner from the batch.

    Args:
        decide: `(key, n, image shape) -> plan`, `n` draws along the leading axis, `lam` among them.
        blend: `(plan, image, partner image) -> (mixed image, weight of the example itself [B])`.
        per_batch: one draw for the batch, which all examples share, instead of one an example.
        prob: probability that an example (or the batch) is mixed at all.
        pairing: `"permutation"`: a random permutation, fixed points allowed; `"flip"`: example i
            with B - 1 - i; `"roll"`: example i with i - 1.
        ranks: the numbers of axes that the image may have.

    Raises:
        ValueError: `prob` is no probability, or `pairing` is unknown.
    """
    check_probability("prob", prob)
    known = ("permutation", "flip", "roll")
    if pairing not in known:
        raise ValueError(f"unknown pairing {pairing!r}; {nearest(str(pairing), known)}")

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch, ranks=ranks)
        size = image.shape[0]
        draws = 1 if per_batch else size
        pair_key, use_key, plan_key = jax.random.split(key, 3)
        plan = decide(plan_key, draws, image.shape)
        plan["use"] = _coin(use_key, prob, draws)
        plan = {name: jnp.broadcast_to(x, (size, *x.shape[1:])) for name, x in plan.items()}
        return {"partner": _partners(pair_key, size, pairing), **plan}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image, label = image_of(batch, ranks=ranks), soft_label_of(batch)
        size = image.shape[0]
        partner = jnp.broadcast_to(jnp.asarray(plan["partner"]), (size,))
        use = jnp.broadcast_to(jnp.asarray(plan.get("use", True)), (size,))
        mixed, lam = blend(plan, image, jnp.take(image, partner, axis=0, mode="clip"))
        batch = {**batch, "image": jnp.where(along_batch(use, image), mixed, image)}
        if label is not None:
            lam = along_batch(jnp.where(use, lam, 1.0), label)
            batch["label"] = lerp(lam, label, jnp.take(label, partner, axis=0, mode="clip"))
        return batch

    return Augmentation(sample, apply)


def lerp(weight: Array, a: Array, b: Array) -> Array:
    """`weight * a + (1 - weight) * b` in float32 or wider, in the dtype of `a`."""
    dtype = working_dtype(a.dtype)
    weight = weight.astype(dtype)
    return to_dtype(weight * a.astype(dtype) + (1.0 - weight) * b.astype(dtype), a.dtype)


def lam_of(plan: Plan, image: Array) -> Array:
    """`plan["lam"]` as float32 (or wider) [B]."""
    lam = jnp.asarray(plan["lam"])
    return jnp.broadcast_to(lam.astype(working_dtype(lam.dtype)), image.shape[:1])


def mixup(
    alpha: float = 0.2,
    *,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """Mixup: a convex combination of two examples and of their labels.

    `out = lam * x + (1 - lam) * x[partner]`, lam ~ Beta(alpha, alpha). uint8 images are blended in
    float32 and rounded half to even. Given the same plan it equals the mixup of OpenMixup, timm
    (`pairing="flip"`) and torchvision v2 (`pairing="roll"`).

    Args:
        alpha: parameter of the Beta law; 0 leaves the batch unchanged.
        per_batch: one lam for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"` or `"roll"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, L, C], [B, H, W, C] or [B, T, H, W, C] with the plan
        `partner` int32 [B], `lam` float32 [B] (weight of the example itself), `use` bool [B].

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, eq. 2.
    """
    check_alpha(alpha)

    def decide(key: Key, n: int, shape: tuple[int, ...]) -> Plan:
        del shape
        return {"lam": beta(key, alpha, (n,))}

    def blend(plan: Plan, image: Array, partner: Array) -> tuple[Array, Array]:
        lam = lam_of(plan, image)
        return lerp(along_batch(lam, image), image, partner), lam

    return mixed_sample(
        decide, blend, per_batch=per_batch, prob=prob, pairing=pairing, ranks=(3, 4, 5)
    )


def cutmix_box(lam: ArrayLike, center: ArrayLike, size: tuple[int, int]) -> Array:
    """The box of CutMix: a share 1 - lam of the image around a centre, clipped to the image.

    The side on an axis of length L is int(L * sqrt(1 - lam)), and the box reaches side // 2 to
    either side of the centre. Equals the official code, OpenMixup, timm (margin 0) and
    torchvision v2.

    Args:
        lam: weight of the example itself, [...] in [0, 1].
        center: int [..., 2], row and column.
        size: height and width of the image.

    Returns:
        int32 [..., 4], half-open (top, left, bottom, right).
    """
    lam = jnp.asarray(lam, jnp.result_type(float))
    length = jnp.asarray(size, jnp.int32)
    side = jnp.sqrt(1.0 - lam)[..., None] * length.astype(lam.dtype)
    return _clipped_box(side.astype(jnp.int32), center, length)


def _clipped_box(side: Array, center: ArrayLike, length: Array) -> Array:
    half, center = side // 2, jnp.asarray(center, jnp.int32)
    corners = [jnp.clip(c, 0, length) for c in (center - half, center + half)]
    return jnp.concatenate(corners, axis=-1)


def inside(box: ArrayLike, size: tuple[int, int]) -> Array:
    """Whether each pixel lies in the box.

    Args:
        box: int [..., 4], half-open (top, left, bottom, right).
        size: height and width.

    Returns:
        bool [..., H, W].
    """
    top, left, bottom, right = (jnp.asarray(box, jnp.int32)[..., i, None, None] for i in range(4))
    rows = jnp.arange(size[0], dtype=jnp.int32)[:, None]
    columns = jnp.arange(size[1], dtype=jnp.int32)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def share_outside(box: ArrayLike, size: tuple[int, int]) -> Array:
    """The share of the image that the box leaves: 1 - area / (H * W), float32 [...]."""
    box = jnp.asarray(box, jnp.int32)
    height, width = (jnp.maximum(box[..., i + 2] - box[..., i], 0) for i in (0, 1))
    kept = size[0] * size[1] - height * width
    return kept.astype(jnp.float32) / float(size[0] * size[1])


def cutmix(
    alpha: float = 1.0,
    *,
    correct_lam: bool = True,
    minmax: tuple[float, float] | None = None,
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """CutMix: pastes a box of the partner, and mixes the labels by area.

    lam ~ Beta(alpha, alpha) sets the size of the box, a uniform pixel its centre (`cutmix_box`).
    The box is clipped to the image, so the pasted area is smaller than 1 - lam on average (mean
    0.299 for alpha = 1 at 32 x 32). Given the same plan it equals the official code, OpenMixup,
    timm (`pairing="flip"`) and torchvision v2 (`pairing="roll"`).

    Args:
        alpha: parameter of the Beta law; 0 leaves the batch unchanged. Not used with `minmax`,
            where it must keep its default.
        correct_lam: label by the area really pasted; otherwise by lam as drawn.
        minmax: timm's `cutmix_minmax`: height and width of the box are uniform integers from
            int(L * min) up to, but not including, int(L * max), and the box lies inside the image.
        per_batch: one box for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"` or `"roll"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] (one box for all T) with the plan
        `partner` int32 [B]; `box` int32 [B, 4], half-open (top, left, bottom, right); `lam` float32
        [B], the weight of the example's own label; `use` bool [B]. With `correct_lam`, `apply`
        takes the weight from `box` whatever `lam` says, so that pixels and labels agree also in a
        plan that holds the lam as drawn.

    Raises:
        ValueError: an argument is out of its range, or excluded by `minmax`.

    Source: Yun et al., "CutMix", ICCV 2019, section 3.1 and its released code.
    """
    check_alpha(alpha)
    if minmax is not None:
        if len(minmax) != 2 or not 0.0 <= minmax[0] <= minmax[1] <= 1.0:
            raise ValueError(f"minmax is a pair 0 <= min <= max <= 1, got {minmax!r}")
        if not correct_lam or alpha != 1.0:
            raise ValueError(
                "minmax draws the box itself and labels by its area: leave alpha and correct_lam "
                f"at their defaults, got alpha={alpha}, correct_lam={correct_lam}"
            )

    def decide(key: Key, n: int, shape: tuple[int, ...]) -> Plan:
        size = (shape[-3], shape[-2])
        if minmax is not None:
            box = _minmax_box(key, n, size, minmax)
            return {"box": box, "lam": share_outside(box, size)}
        lam_key, center_key = jax.random.split(key)
        lam = beta(lam_key, alpha, (n,))
        box = cutmix_box(lam, _uniform_pixels(center_key, n, size), size)
        return {"box": box, "lam": share_outside(box, size) if correct_lam else lam}

    def blend(plan: Plan, image: Array, partner: Array) -> tuple[Array, Array]:
        size = (image.shape[-3], image.shape[-2])
        box = jnp.broadcast_to(jnp.asarray(plan["box"], jnp.int32), (image.shape[0], 4))
        pasted = inside(box, size)[..., None]
        if image.ndim == 5:
            pasted = pasted[:, None]
        lam = share_outside(box, size) if correct_lam else lam_of(plan, image)
        return jnp.where(pasted, partner, image), lam

    return mixed_sample(
        decide, blend, per_batch=per_batch, prob=prob, pairing=pairing, ranks=(4, 5)
    )


def _uniform_pixels(key: Key, n: int, size: tuple[int, int]) -> Array:
    """Uniform rows and columns, int32 [n, 2]."""
    return jax.random.randint(key, (n, 2), 0, jnp.asarray(size, jnp.int32), jnp.int32)


def _minmax_box(key: Key, n: int, size: tuple[int, int], minmax: tuple[float, float]) -> Array:
    side_key, corner_key = jax.random.split(key)
    low = [int(length * minmax[0]) for length in size]
    high = [max(int(length * minmax[1]), lo + 1) for length, lo in zip(size, low, strict=True)]
    side = jax.random.randint(
        side_key, (n, 2), jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32), jnp.int32
    )
    room = jnp.maximum(jnp.asarray(size, jnp.int32) - side, 1)
    corner = jax.random.randint(corner_key, (n, 2), 0, room, jnp.int32)
    return jnp.concatenate([corner, corner + side], axis=-1)


def resizemix(
    scope: tuple[float, float] = (0.1, 0.8),
    alpha: float | None = None,
    *,
    interpolation: str = "nearest",
    per_batch: bool = False,
    prob: float = 1.0,
    pairing: str = "permutation",
) -> Augmentation:
    """ResizeMix: pastes the whole partner, made small, and mixes the labels by area.

    The sides of the box are int(L * tau), at least one pixel, around a uniform centre and clipped
    to the image; the partner is resized into the clipped box. Equals OpenMixup on square images;
    on others OpenMixup confuses rows and columns, and this does not.

    Args:
        scope: smallest and largest tau.
        alpha: draw tau from Beta(alpha, alpha), and uniformly in `scope` if it falls outside
            (OpenMixup's configs use 1); None draws it uniformly in `scope`.
        interpolation: `"nearest"`, or `"bilinear"` with half-pixel centres and no antialiasing.
        per_batch: one box for the whole batch instead of one an example.
        prob: probability that an example (the batch, if `per_batch`) is mixed.
        pairing: `"permutation"`, `"flip"` or `"roll"`, see `mixed_sample`.

    Returns:
        An augmentation of images [B, H, W, C] with the plan `partner` int32 [B]; `box` int32
        [B, 4], half-open (top, left, bottom, right); `lam` float32 [B], 1 - area / (H * W);
        `use` bool [B]. `apply` takes the weight of the label from `box`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Qin et al., "ResizeMix: Mixing Data with Preserved Object Information and True Labels",
    2020, section 3.3.
    """
    if len(scope) != 2 or not 0.0 <= scope[0] <= scope[1] <= 1.0:
        raise ValueError(f"scope is a pair 0 <= min <= max <= 1, got {scope!r}")
    if alpha is not None:
        check_alpha(alpha)
    known = ("nearest", "bilinear")
    if interpolation not in known:
        raise ValueError(
            f"unknown interpolation {interpolation!r}; {nearest(str(interpolation), known)}"
        )

    def decide(key: Key, n: int, shape: tuple[int, ...]) -> Plan:
        size = (shape[1], shape[2])
        tau_key, beta_key, center_key = jax.random.split(key, 3)
        tau = jax.random.uniform(tau_key, (n,), minval=scope[0], maxval=scope[1])
        if alpha is not None:
            drawn = beta(beta_key, alpha, (n,))
            tau = jnp.where((drawn >= scope[0]) & (drawn <= scope[1]), drawn, tau)
        box = resizemix_box(tau, _uniform_pixels(center_key, n, size), size)
        return {"box": box, "lam": share_outside(box, size)}

    def blend(plan: Plan, image: Array, partner: Array) -> tuple[Array, Array]:
        size = (image.shape[1], image.shape[2])
        box = jnp.broadcast_to(jnp.asarray(plan["box"], jnp.int32), (image.shape[0], 4))
        small = partner
        for axis in (1, 0):
            small = _resize_into(
                small, box[:, axis], box[:, axis + 2], axis + 1, interpolation == "bilinear"
            )
        pasted = inside(box, size)[..., None]
        out = jnp.where(pasted, to_dtype(small, image.dtype), image)
        return out, share_outside(box, size)

    return mixed_sample(decide, blend, per_batch=per_batch, prob=prob, pairing=pairing)


def resizemix_box(tau: ArrayLike, center: ArrayLike, size: tuple[int, int]) -> Array:
    """The box of ResizeMix: sides int(L * tau) around a centre, clipped, at least one pixel.

    Args:
        tau: ratio of the sides, [...] in [0, 1].
        center: int [..., 2], row and column.
        size: height and width of the image.

    Returns:
        int32 [..., 4], half-open (top, left, bottom, right).
    """
    tau = jnp.asarray(tau, jnp.result_type(float))
    length = jnp.asarray(size, jnp.int32)
    side = (tau[..., None] * length.astype(tau.dtype)).astype(jnp.int32)
    box = _clipped_box(side, center, length)
    top_left = jnp.minimum(box[..., :2], length - 1)
    return jnp.concatenate([top_left, jnp.maximum(box[..., 2:], top_left + 1)], axis=-1)


def _resize_into(x: Array, start: Array, stop: Array, axis: int, bilinear: bool) -> Array:
    """Resizes `axis` of [B, ...] to the span [start, stop), at its place; outside is undefined."""
    length = x.shape[axis]
    span = jnp.maximum(stop - start, 1)[:, None]
    position = jnp.arange(length, dtype=jnp.int32) - start[:, None]

    def at(index: Array) -> Array:
        shape = [1] * x.ndim
        shape[0], shape[axis] = index.shape
        index = jnp.clip(index, 0, length - 1).reshape(shape)
        return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")

    if not bilinear:
        return at(position * length // span)
    # The centre of the pixel, in pixel centres of the source; in this order as PyTorch rounds.
    dtype = working_dtype(x.dtype)
    scale = jnp.asarray(length, dtype) / span.astype(dtype)
    source = jnp.maximum(scale * (position.astype(dtype) + 0.5) - 0.5, 0.0)
    low = jnp.floor(source)
    t = (source - low).reshape([n if i in (0, axis) else 1 for i, n in enumerate(x.shape)])
    low = low.astype(jnp.int32)
    return (1.0 - t) * at(low).astype(dtype) + t * at(low + 1).astype(dtype)


def label_smoothing(s: float = 0.1) -> Augmentation:
    """Moves a share `s` of every label's mass to the uniform distribution over its K classes.

    `label * (1 - s) + s / K`, as in timm; it commutes with mixing.

    Args:
        s: share in [0, 1].

    Returns:
        An augmentation with an empty plan; the batch must have a soft `label` [B, K].

    Raises:
        ValueError: `s` is out of range.
        KeyError: (when applied) the batch has no label.

    Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7.
    """
    if not 0.0 <= s <= 1.0:
        raise ValueError(f"label smoothing s must lie in [0, 1], got {s!r}")

    def sample(key: Key, batch: Batch) -> Plan:
        del key, batch
        return {}

    def apply(plan: Plan, batch: Batch) -> Batch:
        del plan
        image_of(batch, ranks=(3, 4, 5))
        label = soft_label_of(batch)
        if label is None:
            raise KeyError("label_smoothing needs a batch with 'label' [B, K]")
        wide = label.astype(working_dtype(label.dtype))
        smooth = wide * (1.0 - s) + s / label.shape[1]
        return {**batch, "label": smooth.astype(label.dtype)}

    return Augmentation(sample, apply)
