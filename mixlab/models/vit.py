"""Vision transformer whose attention can be looked at."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mixlab import spec
from mixlab.models.common import images, logits
from mixlab.types import Array

SIZES = {
    "micro": (64, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
"""Channels, depth and heads. `tiny` to `base` are DeiT's (Touvron et al. 2021, table 1); `micro`
is for small images and for tests."""


def _norm(x: Array) -> Array:
    # In float32, as Flax would do anyway, but without relying on implicit promotion.
    return nn.LayerNorm()(x.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention that also gives its weights.

    Attributes:
        heads: number of heads; divides the channels.
        dtype: of the computation; the softmax is in float32.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Maps tokens [B, N, C] to tokens of that shape and weights float32 [B, heads, N, N]."""
        channels = x.shape[-1]
        per_head = channels // self.heads
        q, k, v = (
            nn.DenseGeneral((self.heads, per_head), dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * per_head**-0.5
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
        out = nn.DenseGeneral(channels, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)
        return out, weights


class ViT(nn.Module):
    """Pre-norm vision transformer with a class token and learned positions.

    Dosovitskiy et al. 2021, "An image is worth 16x16 words", s. 3.1. No dropout.

    Attributes:
        num_classes: width of the output.
        size: one of `SIZES`.
        patch: side of the square patches in pixels; must divide height and width.
        dtype: of the computation; parameters, attention weights and logits are float32.
    """

    num_classes: int
    size: str = "tiny"
    patch: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, return_attention: bool = False
    ) -> Array | tuple[Array, Array]:
        """Maps images to logits, and to the attention on the way there.

        Args:
            x: float [B, H, W, C] of any size that `patch` divides, and any channel count. The
                positions are learned for the size that the parameters were made with.
            train: changes nothing.
            return_attention: also return the attention weights.

        Returns:
            logits float32 [B, num_classes], with `return_attention` also float32
            [B, depth, heads, N, N]: row q of a map says how token q weighs all tokens and sums
            to one. Token 0 is the class token, the patches follow row by row, N = 1 + HW/patch².

        Raises:
            ValueError: unknown `size`, or `patch` does not divide the image.
        """
        if self.size not in SIZES:
            raise ValueError(f"unknown ViT size {self.size!r}; {spec.nearest(self.size, SIZES)}")
        channels, depth, heads = SIZES[self.size]
        x = images(x, self.dtype)
        batch, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"patch={self.patch} does not divide an image of {height}x{width}; resize or pad "
                f"it, or choose another patch"
            )
        side = (self.patch, self.patch)
        x = nn.Conv(channels, side, side, padding="VALID", dtype=self.dtype, name="embed")(x)
        x = x.reshape(batch, -1, channels)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, channels), jnp.float32)
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (batch, 1, 1)), x], axis=1)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, x.shape[1], channels), jnp.float32
        )
        x = x + positions.astype(x.dtype)

        attention = []
        for _ in range(depth):
            y, weights = Attention(heads, self.dtype)(_norm(x))
            attention.append(weights)
            x = x + y
            y = nn.Dense(4 * channels, dtype=self.dtype)(_norm(x))
            x = x + nn.Dense(channels, dtype=self.dtype)(nn.gelu(y))
        out = logits(_norm(x)[:, 0], self.num_classes)
        return (out, jnp.stack(attention, axis=1)) if return_attention else out
