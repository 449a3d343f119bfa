"""Multi-layer perceptron."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mixlab.models.common import images, logits
from mixlab.types import Array


class MLP(nn.Module):
    """Dense layers with ReLU between them, on the flattened image.

    Attributes:
        num_classes: width of the output.
        hidden: widths of the hidden layers; `()` gives a linear classifier.
        dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    hidden: tuple[int, ...] = (256, 256, 256)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps images [B, H, W, C] to logits float32 [B, num_classes]; `train` changes nothing."""
        if not isinstance(self.hidden, tuple | list) or any(width < 1 for width in self.hidden):
            raise ValueError(
                f"hidden takes widths above 0, such as (256, 256); got {self.hidden!r}"
            )
        x = images(x, self.dtype).reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return logits(x, self.num_classes)
