"""Ops on the tones of an image beside those of the policies: hue, gamma, grey."""

import jax.numpy as jnp

from mixlab.augment.core import working_dtype
from mixlab.augment.ops.photometric import color, image_op
from mixlab.types import Array, ArrayLike


def _to_unit(image: Array) -> Array:
    """The image in [0, 1], in the working dtype."""
    x = image.astype(working_dtype(image.dtype))
    return x / 255.0 if image.dtype == jnp.uint8 else x


def _from_unit(x: Array, image: Array) -> Array:
    """Back to the dtype of `image`, into levels as torchvision does: 256 bins of equal width."""
    if image.dtype == jnp.uint8:
        return jnp.floor(jnp.clip(x, 0.0, 1.0) * (256.0 - 1e-3)).astype(jnp.uint8)
    return x.astype(image.dtype)


@image_op
def hue(image: Array, shift: ArrayLike) -> Array:
    """Turns the hues around the colour circle of HSV, saturation and value kept.

    Equals torchvision's `adjust_hue` of tensors within one level on uint8. PIL images differ by
    more there, since PIL rounds hue, saturation and value to 256 levels each. Images with other
    than three channels have no hue and stay as they are.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        shift: share of the circle, scalar; -0.5 and 0.5 are the complementary hues.

    Source: Smith, "Color Gamut Transform Pairs", 1978.
    """
    if image.shape[-1] != 3:
        return image
    x = _to_unit(image)
    red, green, blue = (x[..., i] for i in range(3))
    value, least = jnp.max(x, axis=-1), jnp.min(x, axis=-1)
    span = value - least
    safe = jnp.where(span > 0, span, 1.0)
    # Sixths of the circle, counted from red.
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    sixth = sixth + 6.0 * jnp.asarray(shift, x.dtype)
    # A channel lies between the least and the value by how far its own hue is away.
    away = jnp.stack([jnp.mod(n + sixth, 6.0) for n in (5.0, 3.0, 1.0)], axis=-1)
    drop = jnp.clip(jnp.minimum(away, 4.0 - away), 0.0, 1.0)
    return _from_unit(value[..., None] - span[..., None] * drop, image)


@image_op
def gamma(image: Array, power: ArrayLike, gain: ArrayLike = 1.0) -> Array:
    """Takes `gain * x ** power` of x in [0, 1], clipped: below 1 it brightens the shadows.

    Equals torchvision's `adjust_gamma` within one level on uint8.

    Args:
        image: uint8 or floating, [H, W, C], [B, H, W, C] or [B, T, H, W, C].
        power: scalar >= 0.
        gain: scalar.
    """
    x = _to_unit(image)
    power = jnp.asarray(power, x.dtype)
    # The slope at black would be infinite for powers below 1; there it counts as 0.
    lit, dark = jnp.where(x > 0, x, 1.0), jnp.where(power > 0, 0.0, 1.0)
    raised = jnp.where(x > 0, lit**power, dark.astype(x.dtype))
    return _from_unit(jnp.clip(jnp.asarray(gain, x.dtype) * raised, 0.0, 1.0), image)


@image_op
def grayscale(image: Array) -> Array:
    """Luma in every channel, or the mean of the channels if they are not three.

    Equals PIL `convert("L")`, and torchvision's `rgb_to_grayscale` within one level.
    """
    return color(image, 0.0)
