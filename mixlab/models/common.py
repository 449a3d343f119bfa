"""The two ends that all models share."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mixlab.types import Array

BATCH_NORM_MOMENTUM = 0.9
"""The factor with which BatchNorm keeps its old running statistics at a training step."""


def images(x: Array, dtype: Any) -> Array:
    """Checks that `x` is a batch of float images and casts it to `dtype`.

    Raises:
        ValueError: `x` is not [B, H, W, C].
        TypeError: `x` is not floating.
    """
    if x.ndim != 4:
        raise ValueError(f"a model takes images [B, H, W, C], got an array of shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"a model takes float images, got {x.dtype}; scale them first, e.g. "
            f"x.astype(jnp.float32) / 255"
        )
    return x.astype(dtype)


def logits(x: Array, num_classes: int) -> Array:
    """The last dense layer, in float32 whatever the layers before it compute in. [B, F] in."""
    return nn.Dense(num_classes, name="head")(x.astype(jnp.float32))
