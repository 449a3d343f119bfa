"""Losses that belong to an augmentation."""

import jax
import jax.numpy as jnp

from mixlab.augment.core import working_dtype
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike


def jensen_shannon(logits: Array) -> Array:
    """How far the predictions for several views of an example are apart.

    The mean over the views of the Kullback-Leibler divergence from the mean prediction to the
    view's: 0 where all agree, at most log(views).

    Args:
        logits: [B, V, K], V views of each example.

    Returns:
        [B], in float32 or wider.
    """
    logits = _logits(logits)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_mean = jax.nn.logsumexp(log_p, axis=1, keepdims=True) - jnp.log(
        jnp.asarray(logits.shape[1], logits.dtype)
    )
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_mean), axis=-1), axis=1)


def jsd_loss(logits: Array, label: Array, *, weight: float = 12.0) -> Array:
    """AugMix's loss: cross-entropy of the clean view, and consistency of all of them.

    Equals timm `JsdCrossEntropy` for labels smoothed beforehand, but that the mean prediction is
    not held above 1e-7, which this form of it does not need.

    Args:
        logits: [B, V, K]; the first view is the clean one: `views(3, augmix(), clean=True)`.
        label: soft, [B, K], or [B, V, K] as `views` gives it, of which the first is taken.
        weight: of the consistency, `jensen_shannon`; the paper's lambda.

    Returns:
        Scalar, the mean over the batch.

    Raises:
        ValueError: the shapes do not fit.

    Source: Hendrycks et al., "AugMix", 2020, section 3, equations 1 and 2.
    """
    logits = _logits(logits)
    label = jnp.asarray(label)
    label = label[:, 0] if label.ndim == 3 else label
    if label.shape != (logits.shape[0], logits.shape[2]):
        raise ValueError(
            f"label must be [B, K] or [B, V, K] for logits [B, V, K], got the shapes "
            f"{label.shape} and {logits.shape}"
        )
    log_p = jax.nn.log_softmax(logits[:, 0], axis=-1)
    cross_entropy = -jnp.sum(label.astype(log_p.dtype) * log_p, axis=-1)
    return jnp.mean(cross_entropy + weight * jensen_shannon(logits))


def decoupled_loss(logits: Array, label: Array, *, eta: float = 0.1, eps: float = 1e-3) -> Array:
    """Decoupled mixup: soft cross-entropy, and confidence in each mixed class on its own.

    The second term is, for each of the classes that were mixed, the cross-entropy of that class
    against the classes that were not, so that the two do not compete: it is there only where two or
    more were. In the manner of OpenMixup's `soft_mix_cross_entropy`, which leaves the term out of a
    whole batch whose first example was mixed half and half, and averages mixed and unmixed
    examples apart; this one does neither.

    Args:
        logits: [B, K].
        label: soft, [B, K], as the mixing ops make it.
        eta: weight of the second term.
        eps: classes with no more than this share do not count as mixed (smoothed labels have some).

    Returns:
        Scalar, the mean over the batch.

    Raises:
        ValueError: the shapes do not fit.

    Source: Liu et al., "Harnessing Hard Mixed Samples with Decoupled Regularizer", NeurIPS 2023,
    section 4.
    """
    logits, label = _pair(logits, label)
    mixed = label > eps
    rest = jax.nn.logsumexp(jnp.where(mixed, jnp.finfo(logits.dtype).min, logits), axis=-1)
    alone = jnp.where(mixed, jax.nn.softplus(rest[:, None] - logits), 0.0)
    several = jnp.sum(mixed, axis=-1, dtype=jnp.int32) > 1
    cross_entropy = -jnp.sum(label * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return jnp.mean(cross_entropy + eta * jnp.where(several, jnp.sum(alone, axis=-1), 0.0))


def rescale_lam(
    lam: ArrayLike, *, threshold: float = 1.0, power: float = 1.0, mode: str = "pow"
) -> Array:
    """Bends the weights of mixed labels: 0 stays 0, `threshold` and more become 1.

    Of mixed labels [B, K], whose entries are the weights, it makes targets for a sigmoid for each
    class, which need not sum to one. Equals OpenMixup's `lambda_adjust`.

    Args:
        lam: weights in [0, 1], any shape.
        threshold: in (0, 1].
        power: positive; `"pow"`: (lam / threshold) ^ power. `"exp"`: the exponential curve of base
            power ^ 2 through the same ends, with power other than 1.
        mode: `"pow"` or `"exp"`.

    Returns:
        In the shape of `lam`, float32 or wider.

    Raises:
        ValueError: an argument is out of its range.
    """
    known = ("pow", "exp")
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}; {nearest(str(mode), known)}")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold lies in (0, 1], got {threshold}")
    if not power > 0.0 or (mode == "exp" and power == 1.0):
        raise ValueError(f"power must be positive, and not 1 with mode='exp', got {power}")
    lam = jnp.asarray(lam)
    lam = lam.astype(working_dtype(lam.dtype))
    share = lam / threshold
    if mode == "pow":
        bent = share**power
    else:
        base = power ** (2.0 * threshold)
        bent = (base**share - 1.0) / (base - 1.0)
    return jnp.where(share < 1.0, bent, 1.0)


def two_hot_loss(
    logits: Array,
    label: Array,
    *,
    threshold: float = 1.0,
    power: float = 1.0,
    mode: str = "pow",
    negative_weight: float = 1.0,
) -> Array:
    """Mixed labels as several right answers: binary cross-entropy of every class.

    Args:
        logits: [B, K].
        label: soft, [B, K], as the mixing ops make it.
        threshold: see `rescale_lam`, which makes the targets of the weights.
        power: likewise.
        mode: likewise.
        negative_weight: weight of the classes that are not in the mixture.

    Returns:
        Scalar: the sum over the classes, the mean over the batch.

    Raises:
        ValueError: the shapes do not fit, or an argument is out of its range.

    Source: Wightman et al., "ResNet strikes back", 2021, section 3; OpenMixup `ClsMixupHead`.
    """
    logits, label = _pair(logits, label)
    target = rescale_lam(label, threshold=threshold, power=power, mode=mode)
    loss = jax.nn.softplus(logits) - target * logits
    weight = jnp.where(label > 0.0, 1.0, negative_weight)
    return jnp.mean(jnp.sum(weight * loss, axis=-1))


def _pair(logits: Array, label: Array) -> tuple[Array, Array]:
    logits, label = jnp.asarray(logits), jnp.asarray(label)
    if logits.ndim != 2 or label.shape != logits.shape:
        raise ValueError(
            f"logits and soft label must be [B, K] both, got {logits.shape} and {label.shape}; "
            "use jax.nn.one_hot(label, num_classes)"
        )
    dtype = working_dtype(logits.dtype)
    return logits.astype(dtype), label.astype(dtype)


def _logits(logits: Array) -> Array:
    logits = jnp.asarray(logits)
    if logits.ndim != 3:
        raise ValueError(
            f"logits must be [B, V, K], V views of each example, got the shape {logits.shape}"
        )
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
