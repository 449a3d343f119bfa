"""Convolutional networks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mixlab.models.common import BATCH_NORM_MOMENTUM, images, logits
from mixlab.types import Array


def _conv(features: int, dtype: Any, strides: int = 1) -> nn.Module:
    # Padding of one on each side, as the references have it: "SAME" pads a strided convolution
    # unevenly.
    return nn.Conv(
        features,
        (3, 3),
        (strides, strides),
        padding=1,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
    )


def _norm(x: Array, train: bool) -> Array:
    # In float32, as Flax would do anyway, but without relying on implicit promotion.
    norm = nn.BatchNorm(use_running_average=not train, momentum=BATCH_NORM_MOMENTUM, epsilon=1e-5)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def _group_norm(x: Array) -> Array:
    return nn.GroupNorm(num_groups=1, epsilon=1e-5)(x.astype(jnp.float32)).astype(x.dtype)


class CNN(nn.Module):
    """A small network for small images: 3x3 convolution, norm, ReLU, 2x2 mean in each stage.

    The last stage is flattened into a dense layer. On 500 digits of mnist5k this learns faster
    and reaches more than strided convolutions, maximum pooling or a global mean do.

    Attributes:
        num_classes: width of the output.
        features: channels of each stage.
        dtype: of the computation; parameters, statistics and logits are float32.
        norm: `"batch"`, or `"group"`: all channels and pixels of an image as one group. It keeps
            no statistics, so that merged parameters are a model as they stand.
    """

    num_classes: int
    features: tuple[int, ...] = (16, 32, 64)
    dtype: Any = jnp.float32
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps images [B, H, W, C] to logits float32 [B, num_classes].

        Args:
            x: float images of any channel count, at least 2**stages pixels high and wide.
            train: normalise by the batch's own statistics and update the running ones, which are
                in `batch_stats`; changes nothing where the norm is `"group"`.
        """
        if self.norm not in ("batch", "group"):
            raise ValueError(f"norm must be 'batch' or 'group', got {self.norm!r}")
        x = images(x, self.dtype)
        least = 2 ** len(self.features)
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f"{len(self.features)} stages halve the image {len(self.features)} times: it "
                f"must be at least {least}x{least}, got {x.shape[1]}x{x.shape[2]}; resize it or "
                f"give fewer features"
            )
        for width in self.features:
            x = _conv(width, self.dtype)(x)
            x = nn.relu(_norm(x, train) if self.norm == "batch" else _group_norm(x))
            x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4
        return logits(x.reshape(x.shape[0], -1), self.num_classes)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ReLU after the sum.

    The shortcut is the identity where input and output have one shape, elsewhere a 3x3
    convolution with BatchNorm.

    Attributes:
        features: channels of the output.
        strides: of the first convolution.
        dtype: of the computation.
    """

    features: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), features]."""
        y = _conv(self.features, self.dtype, self.strides)(x)
        y = nn.relu(_norm(y, train))
        y = _norm(_conv(self.features, self.dtype)(y), train)
        if self.strides > 1 or x.shape[-1] != self.features:
            x = _norm(_conv(self.features, self.dtype, self.strides)(x), train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The residual network for small images, by default ResNet-20.

    He et al. 2016, "Deep residual learning for image recognition", s. 4.2: a 3x3 stem without
    pooling, stages of 16, 32 and 64 channels, the latter two halving the image, global average
    pooling. Where a stage changes the shape, the shortcut is a 3x3 convolution with BatchNorm, as
    in DIMAT (Saadati et al. 2024), not the paper's zero padding; ReLU follows the sum. The
    running statistics (momentum 0.9) are in `batch_stats`.

    Attributes:
        num_classes: width of the output.
        width: multiplies the channels, 8 in DIMAT's CIFAR runs; fractions are rounded.
        blocks: blocks of each stage; `(3, 3, 3)` is ResNet-20, `(9, 9, 9)` ResNet-56.
        dtype: of the computation; parameters, statistics and logits are float32.
    """

    num_classes: int
    width: float = 1
    blocks: tuple[int, ...] = (3, 3, 3)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps images [B, H, W, C] to logits float32 [B, num_classes].

        Args:
            x: float images of any size and channel count.
            train: normalise by the batch's own statistics and update the running ones.
        """
        channels = [round(16 * self.width * 2**stage) for stage in range(len(self.blocks))]
        if min(channels) < 1:
            raise ValueError(f"width={self.width} leaves a stage without channels: {channels}")
        x = images(x, self.dtype)
        x = nn.relu(_norm(_conv(channels[0], self.dtype)(x), train))
        for stage, (features, count) in enumerate(zip(channels, self.blocks, strict=True)):
            for block in range(count):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Block(features, strides, self.dtype)(x, train=train)
        return logits(x.mean((1, 2)), self.num_classes)
