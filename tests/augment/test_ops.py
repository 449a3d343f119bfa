"""The single image ops where no recorded vector reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mixlab import augment
from mixlab.augment import ops
from mixlab.augment.ops.photometric import autocontrast_table

pytestmark = pytest.mark.usefixtures("quick_compilation")

ARGUMENTS = {
    "autocontrast": (), "equalize": (), "invert": (), "posterize": (3,), "solarize": (100,),
    "solarize_add": (40,), "color": (1.7,), "contrast": (0.4,), "brightness": (1.3,),
    "sharpness": (1.8,), "rotate": (20.0,), "shear_x": (0.2,), "shear_y": (-0.3,),
    "translate_x": (2.0,), "translate_y": (-3.0,), "affine": (20.0, (1.0, -2.0), 1.2, (5.0, -9.0)),
    "gaussian_blur": (1.3,), "gamma": (0.7,), "grayscale": (), "hue": (0.3,), "resize": ((5, 9),),
    "center_crop": (1,),
}  # fmt: skip
every = pytest.mark.parametrize("name", ARGUMENTS)


def photo(shape=(9, 7, 3), seed=0):
    """Smooth enough that a level of rounding is not amplified."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    noise = np.random.default_rng(seed).integers(0, 60, shape)
    return jnp.asarray(60 + 9 * rows[..., None] + 7 * columns[..., None] + noise, jnp.uint8)


def run(name, image, **options):
    return jax.jit(lambda image: getattr(ops, name)(image, *ARGUMENTS[name], **options))(image)


def test_every_op_has_arguments_here():
    assert set(ARGUMENTS) == set(ops.__all__)


@every
def test_batch_is_image_by_image(name):
    batch = jnp.stack([photo(seed=0), photo(seed=1)])
    out = run(name, batch)
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out[1], run(name, batch[1]))
    np.testing.assert_array_equal(run(name, batch[:, None]), out[:, None])


@every
def test_floats_follow_uint8(name):
    image = photo()
    whole = np.asarray(run(name, image), np.float64)
    real = run(name, image.astype(jnp.float32) / 255)
    assert real.dtype == jnp.float32
    # Floats are not rounded to levels; posterized, 3 bits of 1 are 7/8 and not 224/255.
    atol = 4.0 if name == "posterize" else 2.0
    np.testing.assert_allclose(np.asarray(real) * 255, whole, atol=atol)


@every
def test_small_and_many_channels(name):
    for image in (photo((1, 1, 1)), photo((5, 4, 7)).astype(jnp.bfloat16) / 255):
        out = run(name, image)
        size = {"resize": (5, 9), "center_crop": (1, 1)}.get(name, image.shape[:2])
        assert (out.shape, out.dtype) == ((*size, image.shape[-1]), image.dtype)
        assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(
    "name",
    sorted(
        set(ARGUMENTS) - {"invert", "posterize", "solarize", "solarize_add", "brightness", "gamma"}
    ),
)
def test_constant_images_stay(name):
    image = jnp.full((6, 6, 3), 50, jnp.uint8)
    filled = name.startswith(("affine", "rotate", "shear", "translate"))
    out = run(name, image, **({"fill": 50} if filled else {}))
    np.testing.assert_array_equal(out, np.full(out.shape, 50))


def test_autocontrast_equals_double_precision_everywhere():
    low, high = (np.ravel(v) for v in np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))
    low, high = low[low < high], high[low < high]
    ours = np.asarray(jax.jit(jax.vmap(autocontrast_table))(low, high))
    scale = 255.0 / (high - low)
    levels = np.arange(256)
    want = np.clip((levels * scale[:, None] + (-low * scale)[:, None]).astype(int), 0, 255)
    inside = (levels >= low[:, None]) & (levels <= high[:, None])
    np.testing.assert_array_equal(ours[inside], want[inside])


def test_edges_of_the_arguments():
    image = photo()
    assert not ops.posterize(image, 0).any()
    np.testing.assert_array_equal(ops.posterize(image, 8), image)
    np.testing.assert_array_equal(ops.solarize(image, 256), image)
    np.testing.assert_array_equal(ops.solarize(image, 0), 255 - image)
    for name in ("color", "contrast", "brightness", "sharpness"):
        np.testing.assert_array_equal(getattr(ops, name)(image, 1.0), image)
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        for dialect in ("pil", "torchvision"):
            for interpolation in ("nearest", "bilinear"):
                out = getattr(ops, name)(
                    image, 0.0, dialect=dialect, interpolation=interpolation, fill=9
                )
                np.testing.assert_array_equal(out, image)


def test_directions():
    image = jnp.arange(16, dtype=jnp.uint8).reshape(4, 4, 1)
    x = np.asarray(image)
    np.testing.assert_array_equal(ops.rotate(image, 90), np.rot90(x))
    np.testing.assert_array_equal(ops.translate_x(image, 1, fill=99)[:, :3], x[:, 1:])
    moved = ops.translate_x(image, 1.7, fill=99, dialect="torchvision")
    np.testing.assert_array_equal(moved[:, 1:], x[:, :3])
    assert (moved[:, 0] == 99).all()
    np.testing.assert_array_equal(ops.translate_y(image, 1)[:3], x[1:])
    np.testing.assert_array_equal(ops.shear_x(image, 1.0)[1, :2, 0], x[1, 2:, 0])


def test_refusals():
    with pytest.raises(ValueError, match="'torchvision' has no interpolation 'bicubic'"):
        ops.rotate(photo(), 3, interpolation="bicubic", dialect="torchvision")
    with pytest.raises(ValueError, match="did you mean 'pil'"):
        ops.rotate(photo(), 3, dialect="pill")
    for bits in (-1, 9, 2.5, np.int64(9)):
        with pytest.raises(ValueError, match=f"0 to 8 bits, got {bits}"):
            ops.posterize(photo(), bits)
    with pytest.raises(ValueError, match=r"lam is the share of ones, in \[0, 1\], got 1.7"):
        augment.fmix_mask(jnp.zeros((1, 4, 2)), 1.7, (7,))
    with pytest.raises(ValueError, match="3 channels"):
        ops.rotate(photo(), 3, fill=(1, 2))
    for image in (photo()[..., 0], photo()[None, None, None]):
        with pytest.raises(ValueError, match=r"\[H, W, C\] or \[B, H, W, C\] or \[B, T, H, W, C\]"):
            ops.invert(image)
    with pytest.raises(TypeError, match="int32"):
        ops.invert(photo().astype(jnp.int32))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_quarter_turns_equal_pillow(interpolation):
    image = np.random.default_rng(0).integers(0, 256, (11, 14, 3), dtype=np.uint8)
    turned = jax.jit(lambda d: ops.rotate(image, d, interpolation=interpolation, fill=128))
    resample = getattr(Image.Resampling, interpolation.upper())
    for degrees in (0, 90, 180, 270, -90):
        expected = Image.fromarray(image).rotate(degrees, resample, fillcolor=(128, 128, 128))
        np.testing.assert_array_equal(turned(degrees), np.asarray(expected), err_msg=str(degrees))
