"""Mosaics and jigsaws against their restatements, and the laws of their draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment
from tests.reference import mixing

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_batch(dtype):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 12, 8, 3)).astype(np.uint8)
    if dtype != "uint8":
        image = (image / np.float32(255)).astype(dtype)
    return {"image": image, "label": rng.dirichlet(np.ones(4), 5).astype(np.float32)}


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_mosaic_is_a_window_onto_four(dtype):
    batch, rng = make_batch(dtype), np.random.default_rng(1)
    partner = rng.integers(0, 5, (5, 3)).astype(np.int32)
    corner = np.array([[0, 0], [12, 8], [3, 5], [12, 0], [7, 1]], np.int32)
    out = jax.jit(augment.mosaic().apply)({"partner": partner, "corner": corner}, batch)
    image, label = mixing.mosaic(batch["image"], batch["label"], partner, corner)
    np.testing.assert_array_equal(out["image"], image)
    np.testing.assert_allclose(out["label"], label, rtol=0, atol=1e-6)


def test_mosaic_corners_and_who_takes_part():
    batch = {"image": jnp.zeros((4000, 40, 20, 1), jnp.uint8)}
    plan = augment.mosaic((0.25, 0.75), prob=0.3).sample(jax.random.key(0), batch)
    assert plan["corner"].min(0).tolist() == [10, 5]
    assert plan["corner"].max(0).tolist() == [29, 14]
    # Four standard deviations of a mean of 4000 draws.
    assert plan["use"].mean() == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)
    own = (1 - plan["corner"][:, 0] / 40) * (1 - plan["corner"][:, 1] / 20)
    np.testing.assert_allclose(plan["lam"], own, rtol=1e-6)


def test_mosaic_leaves_out_whom_it_does_not_use():
    batch = make_batch("uint8")
    aug = augment.mosaic(per_batch=True)
    plan = aug.sample(jax.random.key(3), batch)
    assert len(set(map(tuple, plan["corner"].tolist()))) == 1
    use = np.array([True, False, True, False, False])
    out = aug.apply(plan | {"use": use}, batch)
    for name, leaf in out.items():
        np.testing.assert_array_equal(leaf[~use], batch[name][~use])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_jigsaw(dtype):
    batch = make_batch(dtype)
    aug = augment.jigsaw((3, 2), prob=0.6)
    plan = aug.sample(jax.random.key(6), batch)
    assert sorted(set(plan["use"].tolist())) == [False, True]
    out = jax.jit(aug.apply)(plan, batch)
    for i, image in enumerate(batch["image"]):
        order = plan["order"][i] if plan["use"][i] else range(6)
        np.testing.assert_array_equal(out["image"][i], mixing.jigsaw(image, 3, 2, order))
    np.testing.assert_array_equal(np.sort(plan["order"], axis=1), np.tile(np.arange(6), (5, 1)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: augment.mosaic((0.7, 0.3)), "start"),
        (lambda: augment.mosaic(prob=2.0), "prob"),
        (lambda: augment.jigsaw(0), "grid"),
        (lambda: augment.jigsaw(5)(jax.random.key(0), make_batch("uint8")), "5 x 5.*12 x 8"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
