"""EfficientTrain: images of low frequencies first, and the curriculum that adds the high ones."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment.core import Augmentation, image_of, pair_of, to_dtype, working_dtype
from mixlab.augment.crops import follow_box
from mixlab.augment.ops.dispatch import each
from mixlab.spec import nearest
from mixlab.types import Array, Batch, Key, Plan

_SIZE = 224
_STAGES = {
    "efficienttrain": ((160, 160, 160, 192, 224), (1, 3, 5, 7, 9)),
    "efficienttrain++": ((96,) * 2 + (160,) * 4 + (192,) * 2 + (224,) * 2, tuple(range(10))),
}
"""Bandwidth for images of 224 pixels, and magnitude, stage by stage."""


def _low_frequencies(length: int, band: int) -> tuple[np.ndarray, np.ndarray]:
    """Fourier transform, crop and transform back of one axis as a real matrix.

    Returns:
        The real part [band, length]; and what an even crop leaves as the imaginary part, whose
        row n is (-1)^n times this vector [length]: the lowest frequency, -band / 2, is there
        without its conjugate.
    """
    place = np.arange(length) / length
    frequency = np.arange(band) - band // 2
    phase = np.arange(band)[:, None] / band - place
    real = np.cos(2.0 * np.pi * frequency * phase[..., None]).sum(-1) / length
    unpaired = 0.0 if band % 2 or band == length else np.sin(np.pi * band * place) / length
    return real, np.broadcast_to(unpaired, length)


def low_frequency_crop(band: int | tuple[int, int]) -> Augmentation:
    """EfficientTrain's low-frequency crop: a smaller image with the low frequencies of the large.

    The Fourier transform of each channel is cropped to the `band` frequencies around zero,
    transformed back and multiplied by the share of the pixels that are left; the real part is the
    result. Written as two matrix products, which is the same and faster.

    The frequencies that stay are -(band // 2) to (band - 1) // 2 cycles an image, so the mean
    stays, and a cosine below band / 2 cycles becomes the same cosine of `band` pixels. At an even
    band the cosine of exactly band / 2 cycles stays with half its amplitude, since the crop has one
    of its two frequencies. `band` equal to the size leaves the image as it is.

    Args:
        band: height and width of the result in pixels, one number for both. It is static: each
            value compiles a program of its own.

    Returns:
        An augmentation of images [B, H, W, C] or [B, T, H, W, C] with an empty plan. Edges ring:
        floats may leave [0, 1] and are not clipped, which keeps the crop linear; uint8 is rounded
        and clipped.

    Raises:
        ValueError: the band is not positive, or (when applied) larger than the image.

    Source: Wang et al., "EfficientTrain: Exploring Generalized Curriculum Learning for Training
    Visual Backbones", 2023, section 4.1.
    """
    wanted = pair_of(band)

    def sample(key: Key, batch: Batch) -> Plan:
        del key, batch
        return {}

    def apply(plan: Plan, batch: Batch) -> Batch:
        del plan
        image = image_of(batch, ranks=(4, 5))
        size = image.shape[-3:-1]
        if wanted[0] > size[0] or wanted[1] > size[1]:
            raise ValueError(
                f"a band of {wanted[0]} x {wanted[1]} is larger than the image, {size[0]} x "
                f"{size[1]}; lower the band"
            )
        if wanted == size:
            return batch
        dtype = working_dtype(image.dtype)
        (rows, odd_rows), (columns, odd_columns) = (
            [jnp.asarray(v, dtype) for v in _low_frequencies(n, m)]
            for n, m in zip(size, wanted, strict=True)
        )

        def weighted(equation: str, *operands: Array) -> Array:
            return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

        signs = (-1.0) ** np.add.outer(*map(np.arange, wanted))[..., None]

        def crop(image: Array) -> Array:
            x = image.astype(dtype)
            low = weighted("ow,...hwc->...hoc", columns, x)
            low = weighted("oh,...hwc->...owc", rows, low)
            corner = weighted("h,w,...hwc->...c", odd_rows, odd_columns, x)
            low = low - corner[..., None, None, :] * jnp.asarray(signs, dtype)
            return to_dtype(low, image.dtype)

        whole = jnp.broadcast_to(jnp.asarray((0, 0, *size), jnp.int32), (len(image), 4))
        return follow_box(batch, each(crop, image), whole, wanted)

    return Augmentation(sample, apply)


def efficienttrain_curriculum(
    step: int,
    total_steps: int,
    *,
    variant: str = "efficienttrain++",
    size: int = _SIZE,
    multiple: int = 2,
) -> tuple[int, int]:
    """Bandwidth and strength of augmentation at a step of EfficientTrain's curriculum.

    `"efficienttrain"`: five stages of the same number of steps, with the bands 160, 160, 160, 192
    and 224 and RandAugment's magnitudes 1, 3, 5, 7 and 9. `"efficienttrain++"`: ten stages, twice
    96, four times 160, twice 192 and twice 224 with the magnitudes 0 to 9, and of the same
    arithmetic, so steps in proportion to 1 / band^2. Both are the authors' released code.

        @functools.partial(jax.jit, static_argnames="band")  # one program for each of the 3-4 bands
        def train_step(state, key, batch, band, magnitude):
            policy = randaugment(
                2, magnitude, dialect="timm_increasing", magnitude_std=0.5, fill=128)
            batch = chain(policy, low_frequency_crop(band))(key, batch)
            ...

        for step, batch in enumerate(batches):
            band, magnitude = efficienttrain_curriculum(step, total_steps)
            state = train_step(state, jax.random.fold_in(key, step), batch, band, magnitude)

    What a network whose work goes with the area computes is exact arithmetic: the mean of
    (band / size)^2 over the steps, 0.653 and 0.426 of training at full size.

    Args:
        step: from 0 to total_steps - 1, a Python number.
        total_steps: length of the training.
        variant: `"efficienttrain"` or `"efficienttrain++"`.
        size: side of the images. Other than 224, the bands are in proportion, rounded to the
            nearest `multiple`, halves up; the last is `size` itself.
        multiple: what the bands before are a multiple of: the patch of a vision transformer.

    Returns:
        band: int, for `low_frequency_crop`.
        magnitude: int, for `randaugment` on timm's scale of 0..10; `train_step` may trace it.

    Raises:
        ValueError: an unknown variant, a step outside the training, or a size or multiple that is
            not positive.

    Source: Wang et al., "EfficientTrain", 2023, section 4.3; Wang et al., "EfficientTrain++:
    Generalized Curriculum Learning for Efficient Visual Backbone Training", 2024, section 5.
    """
    if variant not in _STAGES:
        raise ValueError(f"unknown variant {variant!r}; {nearest(str(variant), _STAGES)}")
    if not 0 <= step < total_steps:
        raise ValueError(f"step lies in 0..total_steps - 1, got step={step} of {total_steps}")
    if size < 1 or not 1 <= multiple <= size:
        raise ValueError(f"1 <= multiple <= size must hold, got multiple={multiple}, size={size}")
    bands, magnitudes = _STAGES[variant]
    exponent = 0 if variant == "efficienttrain" else 2
    ends = list(itertools.accumulate(Fraction(1, band) ** exponent for band in bands))
    elapsed = Fraction(step, total_steps) * ends[-1]
    stage = sum(elapsed >= end for end in ends)
    rounded = int(Fraction(bands[stage] * size, _SIZE * multiple) + Fraction(1, 2)) * multiple
    band = size if bands[stage] == _SIZE else max(multiple, min(rounded, size))
    return band, magnitudes[stage]
