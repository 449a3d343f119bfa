"""Single image operations against their independent restatements, pixel by pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mixlab import augment
from mixlab.augment.policies.randaugment import randaugment_arguments
from tests.reference import images

HEIGHT, WIDTH = 11, 14
FILL = (128, 7, 255)


def photos():
    """Noise, a gradient, a narrow range, two levels, one level, black: [6, H, W, 3]."""
    rng = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH, 3)
    rows, cols, channels = np.indices(shape)
    return np.stack(
        [
            rng.integers(0, 256, shape),
            (9 * rows + 7 * cols + 20 * channels) % 256,
            rng.integers(100, 131, shape),
            np.where(rng.random(shape) < 0.3, 40, 200),
            np.full(shape, (17, 200, 90)),
            np.zeros(shape),
        ]
    ).astype(np.uint8)


ENHANCE = ("brightness", "color", "contrast", "sharpness")
FACTORS = (0.0, 0.28, 1.0, 1.7)
PHOTOMETRIC = {
    "autocontrast": (None,),
    "equalize": (None,),
    "invert": (None,),
    "posterize": (0, 1, 3, 8),
    "solarize": (0, 77, 255, 256),
    "solarize_add": (0, 40, 110),
    "color": FACTORS,
    "contrast": FACTORS,
    "brightness": FACTORS,
    "sharpness": FACTORS,
}


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric(name):
    batch = photos()
    op, restated = jax.jit(getattr(augment.ops, name)), getattr(images, name)
    for level in PHOTOMETRIC[name]:
        arguments = () if level is None else (level,)
        found = op(jnp.asarray(batch), *arguments)
        assert found.dtype == np.uint8
        expected = np.stack([restated(image, *arguments) for image in batch])
        np.testing.assert_array_equal(found, expected, err_msg=f"{name} {level}")
        if name in ("autocontrast", "color", "contrast", "sharpness"):
            # torchvision rounds elsewhere: within a level. Contrast adds the difference of two
            # mean greys, one of rounded and one of truncated levels, itself rounded or not.
            expected = np.stack([restated(i, *arguments, dialect="torchvision") for i in batch])
            atol = 2 if name == "contrast" else 1
            np.testing.assert_allclose(np.asarray(found, int), expected, rtol=0, atol=atol)


def test_contrast_of_google():
    batch = np.tile(photos(), (1, 4, 4, 1))
    found = augment.ops.contrast(jnp.asarray(batch), 1.6, dialect="google")
    expected = np.stack([images.contrast(image, 1.6, "google") for image in batch])
    np.testing.assert_array_equal(found, expected)


GEOMETRIC = {
    "rotate": (13.7, -31.0, 110.0, 0.0),
    "shear_x": (0.13, -0.29),
    "shear_y": (0.13, -0.29),
    "translate_x": (3, -5),
    "translate_y": (3, -20),
}


@pytest.mark.parametrize("dialect", ["pil", "torchvision"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric(name, dialect):
    batch = photos()
    op = getattr(augment.ops, name)

    @jax.jit
    def both(batch, level):
        return {
            interpolation: op(batch, level, interpolation=interpolation, fill=FILL, dialect=dialect)
            for interpolation in ("nearest", "bilinear")
        }

    restated = getattr(images, name if dialect == "pil" else f"{name}_torchvision")
    for level in GEOMETRIC[name]:
        for interpolation, found in both(jnp.asarray(batch), level).items():
            expected = np.stack([restated(image, level, interpolation, FILL) for image in batch])
            message = f"{name} {dialect} {interpolation} {level}"
            if interpolation == "nearest" or isinstance(level, int) or level == 0:
                np.testing.assert_array_equal(found, expected, err_msg=message)
            else:
                # Weights differ in float32's last digit; a value next to a whole level may fall
                # on its other side.
                assert np.abs(np.asarray(found, int) - expected).max() <= 1, message
                assert (found != expected).mean() < 0.01, message


def title(name):
    """`shear_x` as the reference tables spell it: `ShearX`."""
    return name.title().replace("_", "")


@pytest.mark.parametrize("sign", [1, -1])
def test_magnitudes_of_torchvision(sign):
    levels = np.arange(31)
    found = randaugment_arguments("torchvision", jnp.arange(31.0), jnp.full(31, sign), (32, 64))
    assert len(found) == 14
    assert not found.keys() & {"invert", "solarize_add"}
    for name, arguments in found.items():
        if name in ("identity", "autocontrast", "equalize"):
            continue
        table = np.array([images.torchvision_magnitude(title(name), k, 32, 64) for k in levels])
        if name in ENHANCE:
            table = 1 + sign * table
        elif name == "solarize":
            table = 255 * table
        elif name != "posterize":
            table = sign * table
        if name.startswith("translate"):
            arguments, table = np.trunc(arguments), np.trunc(table)
        np.testing.assert_allclose(arguments, table, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dialect", ["timm", "timm_increasing"])
def test_magnitudes_of_timm(dialect, sign):
    found = randaugment_arguments(dialect, jnp.arange(11.0), jnp.full(11, sign), (32, 64))
    assert len(found) == 15
    assert "identity" not in found
    increasing = "Increasing" if dialect == "timm_increasing" else ""
    for name, arguments in found.items():
        if name in ("autocontrast", "equalize", "invert"):
            continue
        suffix = ""
        if name in (*ENHANCE, "posterize", "solarize"):
            suffix = increasing
        elif name.startswith("translate"):
            suffix = "Rel"
        reference = title(name) + suffix
        table = np.array([images.timm_argument(reference, m) for m in range(11)])
        if name in ENHANCE and increasing:
            table = np.maximum(0.1, 1 + sign * (table - 1))
        elif name.startswith(("rotate", "shear")):
            table = sign * table
        elif name.startswith("translate"):
            table = sign * table * (64 if name.endswith("x") else 32)
        np.testing.assert_allclose(arguments, table, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dialect", ["torchvision", "timm_increasing"])
def test_randaugment_replays_its_plan(dialect):
    rng = np.random.default_rng(1)
    batch = {"image": rng.integers(0, 256, (16, HEIGHT, WIDTH, 3)).astype(np.uint8)}
    aug = augment.randaugment(3, 7, dialect=dialect, interpolation="nearest", fill=FILL)
    plan = jax.jit(aug.sample)(jax.random.key(5), batch)
    found = np.asarray(jax.jit(aug.apply)(plan, batch)["image"])
    names = list(randaugment_arguments(dialect, jnp.ones(()), jnp.ones(()), (HEIGHT, WIDTH)))
    plan = jax.tree.map(np.asarray, plan)
    for i, expected in enumerate(batch["image"]):
        steps = []
        for op, argument, use in zip(*(plan[k][i] for k in ("op", "argument", "use")), strict=True):
            name = names[op]
            if not use or name == "identity":
                continue
            steps.append((name, float(argument)))
            geometric = name in GEOMETRIC
            suffix = "_torchvision" if geometric and dialect == "torchvision" else ""
            settings = {"fill": FILL} if geometric else {}
            arguments = () if name in ("autocontrast", "equalize", "invert") else (argument,)
            expected = getattr(images, name + suffix)(expected, *arguments, **settings)
        np.testing.assert_array_equal(found[i], expected, err_msg=str(steps))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(31, 31), (17, 23), (32, 32)])
def test_compiled_rotations_equal_pillow_where_points_fall_on_the_edges_of_pixels(
    size, interpolation
):
    """As many do after a rotation about the centre of an odd image; one image and a batch."""
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    turned = jax.jit(lambda x, d: augment.ops.rotate(x, d, interpolation=interpolation))
    resample = getattr(Image.Resampling, interpolation.upper())
    for degrees in (3.0, 15.0, 30.0, 45.0, 60.0, 120.0, 135.0):
        expected = np.asarray(Image.fromarray(image).rotate(degrees, resample)).astype(int)
        for found in (turned(image, degrees), turned(np.stack([image, image]), degrees)[1]):
            off = np.abs(np.asarray(found, int) - expected)
            assert off.max() <= (interpolation != "nearest"), f"{degrees} degrees"
