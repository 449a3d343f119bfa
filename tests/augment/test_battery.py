"""What every augmentation must hold, one row each; a constructor without a row fails a test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment

pytestmark = pytest.mark.usefixtures("quick_compilation")

# The text for `augment.parse`, by constructor. `reshapes`: the image comes out in another shape;
# `rescales`: in another range or dtype; `adds`: leaves that are new.
ROWS = {
    "augmix": "augmix",
    "autoaugment": "autoaugment",
    "chain": "chain(random_flip, mixup)",
    "color_jitter": "color_jitter(0.4, 0.4, 0.4, 0.1, prob=0.8)",
    "cutmix": "cutmix(prob=0.7)",
    "cutout": "cutout(4, fill=128, prob=0.7)",
    "fmix": "fmix(max_soft=0.1)",
    "gridmix": "gridmix(holes=2)",
    "identity": "identity",
    "jigsaw": "jigsaw((7, 2), prob=0.7)",
    "label_smoothing": "label_smoothing(0.1)",
    "low_frequency_crop": "low_frequency_crop((4, 5))",
    "mixup": "mixup",
    "mosaic": "mosaic(prob=0.7)",
    "multi_crop": "multi_crop((4, 3), (2, 1), then=random_flip, interpolation='nearest')",
    "normalize": "normalize((0.5, 0.4, 0.3), 0.25)",
    "one_of": "one_of(mixup, random_flip)",
    "patchmix": "patchmix((3, 4), prob=0.7)",
    "randaugment": "randaugment",
    "random_blur": "random_blur",
    "random_crop": "random_crop(5, 2)",
    "random_erasing": "random_erasing(0.8, value='pixel', noise=(0.5, 0.1), count=2)",
    "random_flip": "random_flip",
    "random_grayscale": "random_grayscale(0.5)",
    "random_resized_crop": "random_resized_crop((5, 6), interpolation='bicubic')",
    "random_solarize": "random_solarize(100, prob=0.5)",
    "resizemix": "resizemix(interpolation='bilinear')",
    "smoothmix": "smoothmix",
    "sometimes": "sometimes(0.5, mixup(alpha=1.0))",
    "three_augment": "three_augment",
    "timm": "timm('rand-m9-mstd0.5-inc1')",
    "to_float": "to_float",
    "transplant": "transplant",
    "trivialaugment": "trivialaugment",
    "views": "views(2, random_flip)",
}
RESHAPES = {"low_frequency_crop", "multi_crop", "random_crop", "random_resized_crop", "views"}
RESCALES = {"low_frequency_crop", "normalize", "to_float"}
ADDS = {"multi_crop": {"local"}}
NEEDS_MASK = {"transplant"}
KEY = jax.random.key(7)


@functools.cache
def built(name):
    return augment.parse(ROWS[name])


@functools.cache
def batch(dtype="float32", size=5, masked=False):
    """An odd, non-square batch with leaves that no op knows."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, 7, 10, 3)).astype(np.uint8)
    if dtype != "uint8":
        image = (image / np.float32(255)).astype(dtype)
    label = rng.dirichlet(np.ones(4), size).astype(np.float32)
    leaves = {"image": image, "label": label, "index": np.arange(size, dtype=np.int32)}
    mask = jnp.asarray(rng.integers(0, 3, image.shape[:3])) if masked else None
    return {name: jnp.asarray(x) for name, x in leaves.items()} | {"mask": mask}


@functools.cache
def float_run(name):
    """The result on the float32 batch, and the gradient of a loss of it, in one compilation."""

    given = batch(masked=name in NEEDS_MASK)

    @jax.jit
    def run(key, image, label):
        def loss(image, label):
            out = built(name)(key, given | {"image": image, "label": label})
            return jnp.sum(jnp.square(out["image"])) + jnp.sum(jnp.square(out["label"])), out

        return jax.grad(loss, (0, 1), has_aux=True)(image, label)

    return run(KEY, batch()["image"], batch()["label"])


def assert_same(a, b, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = (np.asarray(v, np.float64) for v in (x, y))
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol)


every = pytest.mark.parametrize("name", ROWS)


def test_every_constructor_has_a_row():
    assert set(ROWS) == set(augment.CONSTRUCTORS)
    assert set(augment.CONSTRUCTORS) <= set(augment.__all__)
    for name, text in ROWS.items():
        assert text.startswith(name)


@every
@pytest.mark.parametrize("dtype", ["float32", "uint8", "bfloat16"])
def test_structure_dtype_range(name, dtype):
    given = batch(dtype, masked=name in NEEDS_MASK)
    if dtype == "float32":
        _, out = float_run(name)
    else:
        out = jax.jit(built(name))(KEY, given)
    assert set(out) == set(given) | ADDS.get(name, set())
    if name not in RESCALES:
        assert out["image"].dtype == given["image"].dtype
        top = 255 if dtype == "uint8" else 1
        values = np.asarray(out["image"], np.float32)
        assert values.min() >= 0
        assert values.max() <= top + 1e-6
    assert out["label"].dtype == given["label"].dtype
    if name not in RESHAPES:
        assert out["image"].shape == given["image"].shape
        np.testing.assert_array_equal(out["index"], given["index"])
        np.testing.assert_allclose(jnp.sum(out["label"], -1), 1.0, rtol=1e-6)
    assert (out["mask"] is None) == (given["mask"] is None)
    assert np.isfinite(np.asarray(out["image"], np.float32)).all()


@every
def test_gradient_is_finite(name):
    (image, label), _ = float_run(name)
    assert np.isfinite(image).all()
    assert np.isfinite(label).all()
    assert np.abs(image).max() > 0
    assert np.abs(label).max() > 0


@every
def test_eager_is_jit_and_plans_replay(name):
    """On a batch of one; the same key gives the same plan, and a saved plan the same result."""
    aug, given = built(name), batch(size=1, masked=name in NEEDS_MASK)
    plan = aug.sample(KEY, given)
    eager = aug.apply(plan, given)
    plan_of_jit, jitted = jax.jit(lambda key: (aug.sample(key, given), aug(key, given)))(
        jax.random.key(7)
    )
    assert_same(plan_of_jit, plan)
    assert_same(jitted, eager)
    assert_same(aug.apply(jax.tree.map(np.asarray, plan), given), eager, atol=0)
    if name not in RESHAPES:
        # The only partner is the example itself.
        np.testing.assert_allclose(eager["label"], given["label"], atol=0.1)


@every
def test_vmap_is_jit(name):
    keys = jnp.stack([jax.random.key(8), KEY])
    out = jax.jit(jax.vmap(built(name), (0, None)))(keys, batch(masked=name in NEEDS_MASK))
    assert_same(jax.tree.map(lambda x: x[1], out), float_run(name)[1])


@pytest.mark.parametrize("name", ["cutmix", "mixup", "random_flip"])
def test_pmap_is_jit(name):
    # Devices that draw from one key do the same; a key of its own makes each differ.
    keys = jnp.stack([KEY, *jax.random.split(jax.random.key(8), 7)])
    out = jax.pmap(built(name), in_axes=(0, None))(keys, batch())
    rows = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], out) for i in range(8)]
    assert_same(jax.tree.map(jnp.asarray, rows[0]), float_run(name)[1])
    assert any(np.any(row["image"] != rows[0]["image"]) for row in rows[1:])
