"""Small networks that the tests of `mixlab.align` share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


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


class VGG(nn.Module):
    """Convolutions with BatchNorm, maximum pooling, and two hidden dense layers."""

    @nn.compact
    def __call__(self, x):
        for width in (4, "pool", 5, "pool", 6, 7, "pool"):
            if width == "pool":
                x = nn.max_pool(x, (2, 2), (2, 2))
            else:
                x = nn.relu(norm(nn.Conv(width, (3, 3))(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(9)(x))
        x = nn.Dropout(0.5, deterministic=True)(x)
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Bottleneck(nn.Module):
    """A block of ResNet-50; the shortcut is a convolution where the shape changes."""

    width: int
    strides: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(norm(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.width, (3, 3), self.strides, padding=1, use_bias=False)(y)
        y = norm(nn.Conv(4 * self.width, (1, 1), use_bias=False)(nn.relu(norm(y))))
        if x.shape != y.shape:
            x = norm(nn.Conv(4 * self.width, (1, 1), self.strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """The whole depth of ResNet-50, narrow."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                x = Bottleneck(self.width * 2**stage, strides)(x)
        return nn.Dense(3)(x.mean((1, 2)))


class WideResNet(nn.Module):
    """Pre-activation blocks, two a stage; the shortcut reads the activated values."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        for stage, width in enumerate((6, 8, 10)):
            for block in range(2):
                strides = 2 if stage and not block else 1
                h = nn.relu(norm(x))
                if x.shape[-1] != width:
                    x = nn.Conv(width, (1, 1), strides)(h)
                h = nn.relu(norm(nn.Conv(width, (3, 3), strides)(h)))
                h = nn.Dropout(0.3, deterministic=True)(h)
                x = x + nn.Conv(width, (3, 3))(h)
        return nn.Dense(3)(nn.relu(norm(x)).mean((1, 2)))


class DenseNet(nn.Module):
    """Two dense blocks of bottleneck layers with a transition between them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        for block, layers in enumerate((2, 1)):
            if block:
                x = nn.Conv(5, (1, 1))(nn.relu(norm(x)))
                x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4
            for _ in range(layers):
                h = nn.Conv(6, (1, 1))(nn.relu(norm(x)))
                h = nn.Conv(3, (3, 3))(nn.relu(norm(h)))
                x = jnp.concatenate([x, h], axis=-1)
        return nn.Dense(3)(nn.relu(norm(x)).mean((1, 2)))


class MobileNet(nn.Module):
    """Two inverted residuals with squeeze-and-excite; only the first has a shortcut."""

    @nn.compact
    def __call__(self, x):
        x = nn.hard_swish(norm(nn.Conv(4, (3, 3), 2)(x)))
        for expanded, squeezed, out, strides in ((8, 2, 4, 1), (12, 3, 6, 2)):
            h = nn.hard_swish(norm(nn.Conv(expanded, (1, 1))(x)))
            h = nn.Conv(expanded, (3, 3), strides, feature_group_count=expanded)(h)
            h = nn.relu6(norm(h))
            gate = nn.relu(nn.Conv(squeezed, (1, 1))(h.mean((1, 2), keepdims=True)))
            h = h * nn.hard_sigmoid(nn.Conv(expanded, (1, 1))(gate))
            h = norm(nn.Conv(out, (1, 1))(h))
            x = x + h if x.shape == h.shape else h
        return nn.Dense(3)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """Depthwise 7x7 convolutions, LayerNorm, layer scale, and a convolution between stages."""

    @nn.compact
    def __call__(self, x):
        for stage, (width, patch) in enumerate(((5, 2), (6, 2))):
            x = nn.Conv(width, (patch, patch), patch)(nn.LayerNorm()(x) if stage else x)
            x = x if stage else nn.LayerNorm()(x)
            h = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
            h = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(h)))
            x = x + self.param(f"scale_{stage}", nn.initializers.ones, (width,)) * h
        return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))


class Mixer(nn.Module):
    """MLP-Mixer: dense layers over the patches, then over the channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (4, 4), 4)(x).reshape(x.shape[0], -1, 6)
        for _ in range(2):
            h = nn.LayerNorm()(x).swapaxes(1, 2)
            h = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(5)(h)))
            x = x + h.swapaxes(1, 2)
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(9)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


class UNet(nn.Module):
    """An encoder and a decoder with a skip connection; the output is an image."""

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.GroupNorm(1)(nn.Conv(4, (3, 3))(x)))
        x = nn.relu(nn.Conv(6, (3, 3), 2)(skip))
        x = nn.relu(nn.ConvTranspose(5, (2, 2), (2, 2))(x))
        x = nn.relu(nn.Conv(7, (3, 3))(jnp.concatenate([skip, x], axis=-1)))
        x = nn.relu(nn.ConvTranspose(8, (3, 3), (2, 2), transpose_kernel=True)(x))
        x = jax.image.resize(x, (*skip.shape[:3], 8), "nearest")
        return nn.Conv(2, (1, 1))(x)


class GPTBlock(nn.Module):
    """A pre-norm block with causal attention, made to be scanned over."""

    @nn.compact
    def __call__(self, x, _):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        attention = nn.MultiHeadDotProductAttention(2, qkv_features=6)
        x = x + attention(nn.LayerNorm()(x), mask=mask[None, None])
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return x, None


class GPT(nn.Module):
    """Tied embeddings around three scanned and rematerialised blocks."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens) + nn.Embed(5, 8)(jnp.arange(tokens.shape[1]))
        layers = nn.scan(nn.remat(GPTBlock), {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers()(x, None)
        return embed.attend(nn.LayerNorm()(x))


def rotary(x):
    """Rotates pairs of features `x` [B, T, heads, d], one from each half, by their position."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10.0 ** -np.arange(half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, a fused gated MLP, and no biases."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        h = nn.RMSNorm()(x)
        query = rotary(nn.DenseGeneral((6, 4), use_bias=False, name="query")(h))
        key = rotary(nn.DenseGeneral((2, 4), use_bias=False, name="key")(h))
        value = nn.DenseGeneral((2, 5), use_bias=False, name="value")(h)
        # Three query heads share a head of keys and values.
        key, value = (jnp.repeat(z, 3, axis=2) for z in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -1e9)
        h = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out")(h)
        gate, up = jnp.split(nn.Dense(20, use_bias=False)(nn.RMSNorm()(x)), 2, axis=-1)
        x = x + nn.Dense(8, use_bias=False)(nn.silu(gate) * up)
        return nn.Dense(11, use_bias=False)(nn.RMSNorm()(x))


class WindowAttention(nn.Module):
    """Attention with one fused projection and a bias looked up by relative position (Swin)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), 4)(x).reshape(x.shape[0], -1, 8)
        count = x.shape[1]
        table = self.param("bias", nn.initializers.normal(), (2 * count - 1, 2))
        relative = np.arange(count)[:, None] - np.arange(count) + count - 1
        q, k, v = jnp.moveaxis(nn.Dense(24)(x).reshape(*x.shape[:2], 3, 2, 4), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) + jnp.moveaxis(table[relative], 2, 0)
        h = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        x = x + nn.Dense(8)(h.reshape(x.shape))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


class LSTM(nn.Module):
    """Flax's fused LSTM over time."""

    @nn.compact
    def __call__(self, x):
        zeros = jnp.zeros((x.shape[0], 6), x.dtype)
        x = nn.RNN(nn.OptimizedLSTMCell(6))(x, initial_carry=(zeros, zeros))
        return nn.Dense(3)(x[:, -1])


class Recurrent(nn.Module):
    """Gated recurrent units in both directions, joined before two dense layers."""

    @nn.compact
    def __call__(self, x):
        zeros = jnp.zeros((x.shape[0], 4), x.dtype)
        forward = nn.RNN(nn.GRUCell(4))(x, initial_carry=zeros)
        zeros = jnp.zeros((x.shape[0], 5), x.dtype)
        backward = nn.RNN(nn.SimpleCell(5), reverse=True, keep_order=True)
        x = jnp.concatenate([forward, backward(x, initial_carry=zeros)], axis=-1)
        return nn.Dense(3)(nn.Dense(7)(nn.tanh(x)))


class ResNeXt(nn.Module):
    """A bottleneck whose middle convolution is grouped."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        h = nn.relu(nn.Conv(6, (1, 1))(x))
        h = nn.relu(nn.Conv(12, (3, 3), feature_group_count=3)(h))
        return nn.Dense(3)((x + nn.Conv(8, (1, 1))(h)).mean((1, 2)))


class Perceiver(nn.Module):
    """Learned latents that attend to the input, and are averaged."""

    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", nn.initializers.normal(), (1, 5, 6))
        z = jnp.tile(latents, (x.shape[0], 1, 1))
        z = z + nn.MultiHeadDotProductAttention(2, qkv_features=4)(nn.LayerNorm()(z), x)
        return nn.Dense(3)(nn.LayerNorm()(z).mean(1))


class Mamba(nn.Module):
    """A selective state space: a causal depthwise convolution and an associative scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        y = nn.Dense(16)(nn.RMSNorm()(x))
        u, gate = y[..., :8], y[..., 8:]
        u = nn.silu(nn.Conv(8, (3,), padding=((2, 0),), feature_group_count=8)(u))
        step = nn.softplus(nn.Dense(8)(nn.Dense(2)(u)))[..., None]
        enter, leave = jnp.split(nn.Dense(10)(u)[:, :, None], 2, axis=-1)
        decay = jnp.exp(-step * jnp.exp(self.param("decay", nn.initializers.ones, (8, 5))))
        _, state = jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]),
            (decay, step * enter * u[..., None]),
            axis=1,
        )
        y = (state * leave).sum(-1) + u * self.param("skip", nn.initializers.ones, (8,))
        return nn.Dense(3)(x + nn.Dense(6)(y * nn.silu(gate)))


class NNX(nnx.Module):
    """A small convolutional network in Flax NNX."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 6, rngs=rngs)])
        self.out = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x)
