"""What is computed in another way on a CPU, or on bytes, against the plain way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment
from mixlab.augment import ops
from mixlab.augment.mixing.fourier import _brightest
from mixlab.augment.ops.photometric import divide

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.integers(0, 256, (3, 9, 7, 3), np.uint8))


@pytest.mark.parametrize(
    "op",
    [
        lambda image: ops.translate_x(image, -2.6, fill=(1, 2, 3)),
        lambda image: ops.translate_y(image, 40.0, fill=9),
        lambda image: ops.translate_y(image, 3.0, fill=9, dialect="torchvision"),
        lambda image: ops.shear_x(image, 0.7, fill=5),
        lambda image: ops.rotate(image, 25.0, fill=5),
        ops.equalize,
    ],
)
def test_an_accelerator_gets_the_same_pixels(op, monkeypatch):
    in_turn = jax.jit(op)(IMAGE)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(jax.jit(lambda image: op(image))(IMAGE), in_turn)


@pytest.mark.parametrize("aug", [augment.cutmix(), augment.resizemix()], ids=["cutmix", "resize"])
def test_long_rows_of_bytes_are_pasted_as_floats_are(aug):
    image = RNG.integers(0, 256, (16, 11, 90, 3), np.uint8)
    batch = {"image": jnp.asarray(image), "label": jnp.eye(16)}
    plan = jax.jit(aug.sample)(jax.random.key(3), batch)
    plan["use"] = plan["use"].at[2].set(False)
    plan["box"] = plan["box"].at[:2].set(jnp.array([[-4, 60, 7, 95], [3, 3, 3, 9]], jnp.int32))
    area = jnp.prod(plan["box"][:, 2:] - plan["box"][:, :2], axis=1)
    assert jnp.sum(area > 0) > 8  # there is something to see
    bytes_, floats = (jax.jit(aug.apply)(plan, {**batch, "image": jnp.asarray(image, dtype)})
                      for dtype in (jnp.uint8, jnp.float32))  # fmt: skip
    assert bytes_["image"].dtype == jnp.uint8
    np.testing.assert_array_equal(bytes_["image"], floats["image"])
    np.testing.assert_array_equal(bytes_["label"], floats["label"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_brightest_are_the_last_of_a_stable_sort(dtype, x64):
    x = RNG.integers(0, 6, (8, 40)).astype(dtype) / 5.0  # many equal ones, 0 and 1 among them
    x[4:] = RNG.random((4, 40)) ** 9
    count = np.array([0, 1, 17, 40, 0, 1, 17, 40], np.int32)
    expected = np.zeros(x.shape, bool)
    for row, order, n in zip(expected, np.argsort(x, axis=1, kind="stable"), count, strict=True):
        row[order[len(order) - n :]] = True
    np.testing.assert_array_equal(jax.jit(_brightest)(x, count), expected)


def test_long_rows_of_bytes_under_vmap():
    image = jnp.asarray(RNG.integers(0, 256, (2, 3, 4, 90, 3), np.uint8))
    keys = jax.random.split(jax.random.key(0), 2)
    aug = augment.cutmix()
    mixed = jax.jit(jax.vmap(aug))(keys, {"image": image})["image"]
    for key, batch, found in zip(keys, image, mixed, strict=True):
        np.testing.assert_array_equal(jax.jit(aug)(key, {"image": batch})["image"], found)


def test_division_by_floats_is_exact():
    n = np.concatenate([RNG.integers(-(2**30), 2**30, 5000), np.arange(-600, 600)]).astype(np.int32)
    d = np.concatenate([RNG.integers(2**11, 2**20, 5000), np.repeat([1, 7, 255], 400)])
    d = d.astype(np.int32)
    np.testing.assert_array_equal(divide(jnp.asarray(n), jnp.asarray(d)), n // d)
