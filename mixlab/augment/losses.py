"""Losses that belong to an augmentation."""

import jax
import jax.numpy as jnp

from mixlab.types import Array


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


def _logits(logits: Array) -> Array:
    logits = jnp.asarray(logits)
    if logits.ndim != 3:
        raise ValueError(
            f"logits must be [B, V, K], V views of each example, got the shape {logits.shape}"
        )
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
