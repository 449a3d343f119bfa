"""Small networks that the tests of `mixlab.align` share."""

import flax.linen as nn
import jax.numpy as jnp


class ConvNet(nn.Module):
    """Convolutions with every kind of normalisation, pooling, and a flatten before dense."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), strides=2, kernel_dilation=1)(x)
        x = nn.gelu(nn.GroupNorm(2)(x))
        x = nn.Conv(5, (3, 3), kernel_dilation=2)(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.tanh(nn.LayerNorm()(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


class PaddedResidual(nn.Module):
    """Residual blocks whose shortcut subsamples and pads the channels, as in ResNet option A."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        h = nn.Conv(8, (3, 3), strides=2)(x)
        shortcut = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        return nn.Dense(3)(nn.relu(h + shortcut).mean((1, 2)))


class Depthwise(nn.Module):
    """A depthwise-separable block with squeeze-and-excite, and a grouped convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (1, 1))(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6)(x))
        gate = nn.sigmoid(nn.Dense(6)(nn.relu(nn.Dense(3)(x.mean((1, 2))))))
        x = nn.Conv(4, (1, 1))(x * gate[:, None, None])
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
    """One pre-norm block with a class token, as in a ViT."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2)(x).reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 8))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])
