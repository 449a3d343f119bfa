"""Mixed-sample augmentations against their independent restatements, on random batches and plans.

`lam` is a multiple of 1 / 256: blends of uint8 are then exact in float32, halves included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment
from mixlab.augment.mixing.boxes import cutmix_box, resizemix_box
from mixlab.augment.mixing.fourier import fmix_grey
from tests.reference import mixing

SIZES = [(5, 12, 7), (1, 6, 16)]


def make_batch(seed, size, dtype=np.float32, classes=4):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    if dtype != np.uint8:
        image = (image / 255).astype(dtype)
    label = rng.dirichlet(np.ones(classes), size[0]).astype(np.float32)
    return rng, {"image": image, "label": label}


def make_plan(rng, n):
    """Partner, lam (0 and 1 among them) and who takes part; the first example always does."""
    lam = rng.choice([0, 1, 37, 128, 200, 255, 256], n) / 256
    lam[0] = 0.5
    use = rng.random(n) < 0.7
    use[0] = True
    return {
        "partner": rng.permutation(n).astype(np.int32),
        "lam": lam.astype(np.float32),
        "use": use,
    }


def apply(aug, plan, batch):
    out = jax.jit(aug.apply)(plan, batch)
    assert out["image"].dtype == batch["image"].dtype
    return {name: np.asarray(leaf) for name, leaf in out.items()}


def assert_images(found, expected, dtype):
    if dtype == np.uint8:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-6)


def random_boxes(rng, size):
    n, h, w = size
    rows = np.sort(rng.integers(0, h + 1, (n, 2)), axis=1)
    cols = np.sort(rng.integers(0, w + 1, (n, 2)), axis=1)
    return np.stack([rows[:, 0], cols[:, 0], rows[:, 1], cols[:, 1]], axis=1).astype(np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("size", SIZES)
def test_mixup(size, dtype):
    rng, batch = make_batch(0, size, dtype)
    plan = make_plan(rng, size[0])
    lam = np.where(plan["use"], plan["lam"], 1)
    out = apply(augment.mixup(), plan, batch)
    assert_images(out["image"], mixing.mixup(batch["image"], plan["partner"], lam), dtype)
    label = mixing.mix_labels(batch["label"], plan["partner"], lam)
    np.testing.assert_allclose(out["label"], label, atol=1e-6)


@pytest.mark.parametrize("correct_lam", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_cutmix(size, correct_lam):
    for seed in range(3):
        rng, batch = make_batch(seed, size)
        plan = make_plan(rng, size[0]) | {"box": random_boxes(rng, size)}
        if seed == 0:
            plan["box"][0] = (2, 3, 2, 6)  # empty
        boxes = np.where(plan["use"][:, None], plan["box"], 0)
        out = apply(augment.cutmix(correct_lam=correct_lam), plan, batch)
        expected = mixing.cutmix(batch["image"], plan["partner"], boxes)
        np.testing.assert_array_equal(out["image"], expected)
        lam = [mixing.box_lam(*size[1:], box) for box in boxes]
        lam = lam if correct_lam else np.where(plan["use"], plan["lam"], 1)
        label = mixing.mix_labels(batch["label"], plan["partner"], lam)
        np.testing.assert_allclose(out["label"], label, atol=1e-6)


def test_cutmix_box():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 30), (32, 32)):
        lam = np.concatenate([[0, 1, 0.75], rng.random(200)]).astype(np.float32)
        centre = np.stack([rng.integers(0, height, 203), rng.integers(0, width, 203)], axis=1)
        found = cutmix_box(jnp.asarray(lam), jnp.asarray(centre), (height, width))
        expected = [
            mixing.cutmix_box(height, width, share, c)
            for share, c in zip(lam.astype(float), centre, strict=True)
        ]
        np.testing.assert_array_equal(found, expected)


def test_cutmix_draws_the_box_of_its_lam():
    _, batch = make_batch(1, (64, 14, 9))
    for minmax in (None, (0.3, 0.8)):
        aug = augment.cutmix(minmax=minmax)
        plan = jax.tree.map(np.asarray, jax.jit(aug.sample)(jax.random.key(3), batch))
        for lam, box in zip(plan["lam"], plan["box"], strict=True):
            np.testing.assert_allclose(lam, mixing.box_lam(14, 9, box), atol=1e-6)
        if minmax:
            sides = plan["box"][:, 2:] - plan["box"][:, :2]
            # int(14 * .3) up to, but not including, int(14 * .8); likewise for 9.
            assert set(sides[:, 0]) == set(range(4, 11))
            assert set(sides[:, 1]) == set(range(2, 7))


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_resizemix(interpolation, dtype):
    resize = getattr(mixing, f"resize_{interpolation}")
    for seed, size in enumerate(SIZES):
        rng, batch = make_batch(seed, size, dtype)
        n, h, w = size
        taus, centres = rng.uniform(0.05, 0.9, n), rng.integers(0, [h, w], (n, 2))
        boxes = np.array(
            [mixing.resizemix_box(h, w, t, c) for t, c in zip(taus, centres, strict=True)], np.int32
        )
        plan = make_plan(rng, n) | {"box": boxes}
        out = apply(augment.resizemix(interpolation=interpolation), plan, batch)
        expected = mixing.resizemix(batch["image"], plan["partner"], boxes, resize)
        expected = np.where(plan["use"][:, None, None, None], expected, batch["image"])
        if interpolation == "bilinear" and dtype == np.uint8:
            # Halves between two levels are common, and float32 falls on either side of them.
            assert np.abs(out["image"].astype(int) - expected).max() <= 1
            assert (out["image"] != expected).mean() < 0.01
        else:
            assert_images(out["image"], expected, dtype)
        lam = np.where(plan["use"], [mixing.box_lam(h, w, box) for box in boxes], 1)
        label = mixing.mix_labels(batch["label"], plan["partner"], lam)
        np.testing.assert_allclose(out["label"], label, atol=1e-6)


def test_resizemix_box():
    rng = np.random.default_rng(2)
    for height, width in ((3, 50), (32, 32)):
        tau = rng.uniform(0.01, 0.95, 100).astype(np.float32)
        centre = rng.integers(0, [height, width], (100, 2))
        found = resizemix_box(jnp.asarray(tau), jnp.asarray(centre), (height, width))
        expected = [
            mixing.resizemix_box(height, width, t, c)
            for t, c in zip(tau.astype(float), centre, strict=True)
        ]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((16, 16), "reference"),
        ((9, 14), "reference"),
        ((14, 9), "spectral"),
        ((8, 12), "spectral"),
        ((21,), "reference"),
        ((20,), "reference"),
        ((6, 10, 8), "reference"),
        ((6, 7, 9), "reference"),
    ],
)
def test_fmix_grey(shape, mode):
    rng = np.random.default_rng(4)
    for decay in (3.0, 1.5):
        noise = rng.normal(size=(1, *mixing.fmix_frequencies(shape).shape, 2))
        with jax.enable_x64(True):
            found = fmix_grey(jnp.asarray(noise), shape, decay=decay, mode=mode)
        expected = mixing.fmix_grey(noise, shape, decay, mode)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 14), (17,), (4, 6, 5)])
def test_fmix_masks(shape):
    rng = np.random.default_rng(6)
    noise = rng.normal(size=(1, *mixing.fmix_frequencies(shape).shape, 2))
    grey = mixing.fmix_grey(noise, shape)
    lams = np.repeat([0, 0.1, 0.35, 0.5, 0.777, 1], 2)
    ceils = np.tile([True, False], 6)
    for max_soft in (0.0, 0.1, 0.3):
        options = {"shape": shape, "max_soft": max_soft, "mode": "reference"}
        mask_of = functools.partial(augment.fmix_mask, noise, **options)
        with jax.enable_x64(True):
            found = jax.jit(jax.vmap(lambda lam, ceil, f=mask_of: f(lam, ceil=ceil)))(lams, ceils)
        for lam, ceil, mask in zip(lams, ceils, found, strict=True):
            expected = mixing.fmix_mask(grey, lam, max_soft, ceil)
            np.testing.assert_allclose(mask, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 14), (17,), (3, 6, 5)])
def test_fmix(shape):
    rng, batch = make_batch(7, (5, *shape))
    plan = make_plan(rng, 5) | {"mask": rng.random((5, *shape)).astype(np.float32)}
    mask = plan["mask"].reshape(5, -1)
    mask[~plan["use"]] = 1
    out = apply(augment.fmix(), plan, batch)
    expected = mixing.fmix(batch["image"], plan["partner"], mask.reshape(5, *shape))
    np.testing.assert_allclose(out["image"], expected, atol=1e-6)
    lam = np.where(plan["use"], plan["lam"], 1)
    label = mixing.mix_labels(batch["label"], plan["partner"], lam)
    np.testing.assert_allclose(out["label"], label, atol=1e-6)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("size", [None, (5, 9)])
def test_random_crop(mode, size):
    _, batch = make_batch(8, (6, 7, 10), np.uint8)
    aug = augment.random_crop(size, padding=3, mode=mode)
    offset = np.array([[0, 0], [6, 6], [3, 3], [0, 6], [2, 5], [6, 1]], np.int32)
    if size:
        offset = offset + np.array([2, 1], np.int32)
    found = apply(aug, {"offset": offset}, batch)["image"]
    for image, start, out in zip(batch["image"], offset, found, strict=True):
        expected = mixing.random_crop(image, 3, start, size or (7, 10), mode)
        np.testing.assert_array_equal(out, expected)


def test_flip_and_normalize():
    _, batch = make_batch(9, (4, 3, 5), np.uint8)
    use = np.array([True, False, True, False])
    found = apply(augment.random_flip(), {"use": use}, batch)["image"]
    for image, flipped, out in zip(batch["image"], use, found, strict=True):
        np.testing.assert_array_equal(out, mixing.flip(image) if flipped else image)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.5)
    for dtype in (np.uint8, np.float32):
        _, batch = make_batch(9, (4, 3, 5), dtype)
        found = augment.normalize(mean, std).apply({}, batch)["image"]
        assert found.dtype == np.float32
        expected = mixing.normalize(batch["image"], mean, std)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_label_smoothing():
    rng, batch = make_batch(5, (6, 2, 2), classes=5)
    classes = rng.integers(0, 5, 6)
    batch["label"] = np.eye(5, dtype=np.float32)[classes]
    out = apply(augment.label_smoothing(0.2), {}, batch)
    np.testing.assert_allclose(out["label"], mixing.smooth_labels(classes, 5, 0.2), atol=1e-6)
