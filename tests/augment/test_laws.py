"""The distributions that the random halves draw from. Bounds are five standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mixlab import augment
from mixlab.augment.mixing import frame as mixing

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)


def plan_of(aug, n, height=8, width=8):
    batch = {"image": jnp.zeros((n, height, width, 1), jnp.uint8)}
    return jax.tree.map(np.asarray, jax.jit(aug.sample)(KEY, batch))


def assert_share(hits, p):
    assert abs(np.mean(hits) - p) < 5 * np.sqrt(p * (1 - p) / np.size(hits))


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0])
def test_beta(alpha, tilted):
    n = 40_000
    u = jax.random.uniform(KEY, (mixing.num_uniforms(alpha, tilted=tilted), n))
    x = np.asarray(mixing.beta(u, alpha, tilted=tilted), np.float64)
    law = stats.beta(alpha + tilted, alpha)
    assert x.min() >= 0
    assert x.max() <= 1
    assert abs(x.mean() - law.mean()) < 5 * law.std() / np.sqrt(n)
    fourth = law.moment(4) - 4 * law.mean() * law.moment(3)
    fourth += 6 * law.mean() ** 2 * law.moment(2) - 3 * law.mean() ** 4
    error = np.sqrt((fourth - law.var() ** 2) / n)
    assert abs(np.mean((x - law.mean()) ** 2) - law.var()) < 5 * error
    # Rounded to float32 some draws are 0 or 1 exactly, so compare with the law in between.
    points = np.linspace(0.001, 0.999, 999)
    found = np.searchsorted(np.sort(x), points) / n
    assert np.abs(found - law.cdf(points)).max() < 2.2 / np.sqrt(n)


def test_cutmix_area_and_labels():
    n = 100_000
    plan = plan_of(augment.cutmix(alpha=1.0), n, 32, 32)
    box = plan["box"]
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / 32**2
    # 0.299 is recorded from the references with three digits.
    assert abs(area.mean() - 0.299) < 0.0005 + 5 * area.std() / np.sqrt(n)
    np.testing.assert_allclose(plan["lam"], 1 - area, atol=1e-6)
    empty = area == 0
    assert 0.002 < empty.mean() < 0.006
    assert (plan["lam"][empty] == 1).all()


def test_resizemix_area():
    plan = plan_of(augment.resizemix(alpha=1.0), 4000, 32, 16)
    sides = plan["box"][:, 2:] - plan["box"][:, :2]
    assert sides.min() >= 1
    assert (sides <= [int(32 * 0.8), int(16 * 0.8)]).all()
    np.testing.assert_allclose(plan["lam"], 1 - sides.prod(1) / (32 * 16), atol=1e-6)


@pytest.mark.parametrize(("dialect", "kinds"), [("torchvision", 14), ("timm_increasing", 15)])
def test_randaugment_choices(dialect, kinds):
    plan = plan_of(augment.randaugment(num_ops=3, dialect=dialect), 6000)
    names = list(augment.randaugment_arguments(dialect, 9, 1.0, (8, 8)))
    assert len(names) == kinds
    for layer in range(3):
        counts = np.bincount(plan["op"][:, layer], minlength=kinds)
        assert stats.chisquare(counts).pvalue > 1e-4
    # Layers are independent: the same op twice as often as chance has it.
    assert_share(plan["op"][:, 0] == plan["op"][:, 1], 1 / kinds)
    assert_share(plan["argument"][plan["op"] == names.index("rotate")] > 0, 0.5)
    assert_share(plan["argument"][plan["op"] == names.index("color")] > 1, 0.5)
    if dialect == "torchvision":
        assert plan["use"].all()
    else:
        assert_share(plan["use"], 0.5)


def test_randaugment_spread():
    aug = augment.randaugment(1, 5, dialect="timm", magnitude_std=1.0)
    plan = plan_of(aug, 20_000)
    rotate = list(augment.randaugment_arguments("timm", 5, 1.0, (8, 8))).index("rotate")
    levels = np.abs(plan["argument"][plan["op"] == rotate]) / 3
    assert stats.kstest(levels, stats.norm(5, 1).cdf).pvalue > 1e-4


def test_partners():
    n = 60
    assert sorted(plan_of(augment.mixup(), n)["partner"]) == list(range(n))
    flip = plan_of(augment.mixup(pairing="flip"), n)["partner"]
    roll = plan_of(augment.mixup(pairing="roll"), n)["partner"]
    np.testing.assert_array_equal(flip, np.arange(n)[::-1])
    np.testing.assert_array_equal(roll, np.roll(np.arange(n), 1))


def test_per_batch_draws_once():
    for aug in (augment.mixup(per_batch=True), augment.cutmix(per_batch=True)):
        plan = plan_of(aug, 9)
        for name in ("lam", "use", *(["box"] if "box" in plan else [])):
            assert len(np.unique(plan[name], axis=0)) == 1
    assert len(np.unique(plan_of(augment.mixup(), 9)["lam"])) == 9


def test_probabilities():
    n = 20_000
    assert_share(plan_of(augment.mixup(prob=0.3), n)["use"], 0.3)
    assert_share(plan_of(augment.random_flip(0.2), n)["use"], 0.2)
    three = augment.one_of(*[augment.identity()] * 3, weights=[1, 0, 3])
    choice = plan_of(three, n)["choice"]
    assert_share(choice == 0, 0.25)
    assert not (choice == 1).any()
    assert_share(plan_of(augment.sometimes(0.7, augment.identity()), n)["choice"] == 1, 0.7)
    offset = plan_of(augment.random_crop(padding=2), n)["offset"]
    for axis in (0, 1):
        counts = np.bincount(offset[:, axis], minlength=5)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_boxes_in_bounds():
    """Nothing is clipped: the area is that of the sides, and the corners reach every edge."""
    aug = augment.cutmix(in_bounds=True)
    plan = jax.jit(aug.sample)(jax.random.key(3), {"image": jnp.zeros((20000, 32, 24, 1))})
    top, left, bottom, right = np.asarray(plan["box"]).T
    assert (top.min(), left.min(), bottom.max(), right.max()) == (0, 0, 32, 24)
    assert ((top <= bottom) & (left <= right)).all()
    # E[1 - lam] = 1/2 less the rounding of both sides, about half a pixel each.
    exact = np.mean([int(32 * u**0.5) * int(24 * u**0.5) / 768 for u in np.linspace(0, 1, 20001)])
    assert np.mean(1 - plan["lam"]) == pytest.approx(exact, abs=4 * 0.29 / 20000**0.5)


def test_patches():
    """All of one size, anywhere inside, every place as often as the others; labels by area."""
    batch = {"image": jnp.zeros((3000, 9, 12, 1)), "label": jnp.eye(3000)}
    aug = augment.patchmix((4, 20))
    plan = jax.tree.map(np.asarray, aug.sample(jax.random.key(4), batch))
    sides = plan["box"][:, 2:] - plan["box"][:, :2]
    assert (sides == [4, 12]).all()
    counts = np.bincount(plan["box"][:, 0], minlength=6)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-4
    np.testing.assert_allclose(plan["lam"], 1 - 48 / 108, atol=1e-6)


def test_segments_of_signals():
    aug = augment.cutmix()
    batch = {"image": jnp.arange(4000.0)[:, None, None] * jnp.ones((1, 40, 1)) / 4000}
    plan = jax.jit(aug.sample)(jax.random.key(4), batch)
    out = jax.jit(aug.apply)(plan, batch)["image"][..., 0]
    own = np.mean(out == batch["image"][..., 0], axis=1)
    moved = np.asarray(plan["partner"]) != np.arange(4000)
    np.testing.assert_allclose(own[moved], plan["lam"][moved], atol=1e-6)
    assert (plan["box"][:, [0, 2]] == jnp.asarray([0, 1])).all()


@pytest.mark.parametrize("count", [1, 3])
def test_random_erasing_area(count):
    """Uniform areas, but for the boxes that do not fit: at ratio 1 all up to the whole image do."""
    aug = augment.random_erasing(0.4, (0.1, 0.5), (1.0, 1.0), count=count)
    plan = jax.jit(aug.sample)(jax.random.key(5), {"image": jnp.zeros((10000, 50, 50, 1))})
    box = np.asarray(plan["box"]).reshape(-1, 4)
    sides = box[:, 2:] - box[:, :2]
    assert (sides[:, 0] == sides[:, 1]).all()
    low, high = (round((share * 2500 / count) ** 0.5) for share in (0.1, 0.5))
    assert (sides.min(), sides.max()) == (low, high)
    mean = np.mean(sides.prod(1)) / 2500 * count
    # Standard error of a uniform law, and the rounding of the side.
    assert mean == pytest.approx(0.3, abs=4 * 0.4 / 12**0.5 / len(box) ** 0.5 + 0.002)
    assert np.mean(plan["use"]) == pytest.approx(0.4, abs=4 * (0.24 / 10000) ** 0.5)
    assert box[:, :2].min() == 0
    assert box[:, 2:].max() == 50


def test_random_erasing_gives_up_and_paints():
    """A box that never fits strictly is left out; the ratio's logarithm is symmetric."""
    batch = {"image": jnp.full((300, 20, 30, 3), 9, jnp.uint8)}
    never = augment.random_erasing(1.0, (1.0, 1.0), (1.0, 1.0), 255)
    for image in (batch["image"], batch["image"][:, :, :20]):
        out = jax.jit(never)(jax.random.key(0), {"image": image})["image"]
        np.testing.assert_array_equal(out, image)
    aug = augment.random_erasing(1.0, value=(0, 128, 255))
    plan = jax.jit(aug.sample)(jax.random.key(1), batch)
    out = np.asarray(jax.jit(aug.apply)(plan, batch)["image"])
    for image, (top, left, bottom, right) in zip(out, plan["box"], strict=True):
        want = np.full((20, 30, 3), 9)
        want[top:bottom, left:right] = (0, 128, 255)
        np.testing.assert_array_equal(image, want)
    for kind, extent in (("channel", (1, 1)), ("pixel", (20, 30))):
        noisy = augment.random_erasing(1.0, value=kind, noise=(0.5, 0.1))
        drawn = np.asarray(jax.jit(noisy.sample)(jax.random.key(2), batch)["noise"])
        assert drawn.shape == (300, *extent, 3)
        assert drawn.mean() == pytest.approx(0.5, abs=4 * 0.1 / drawn.size**0.5)
        assert drawn.std() == pytest.approx(0.1, abs=0.01)


def test_cutout():
    batch = {"image": jnp.ones((400, 9, 12, 2))}
    aug = augment.cutout(4)
    plan = aug.sample(jax.random.key(2), batch)
    assert plan["box"].min(0).tolist() == [0, 0, 2, 2]
    assert plan["box"].max(0).tolist() == [6, 9, 9, 12]
    sides = np.asarray(plan["box"][:, 2:] - plan["box"][:, :2])
    assert set(sides.ravel().tolist()) == {2, 3, 4}  # clipped at the edges
    erased = np.mean(np.asarray(aug.apply(plan, batch)["image"]) == 0, axis=(1, 2, 3))
    np.testing.assert_allclose(erased, sides.prod(1) / 108, rtol=1e-6)


def test_holes_of_gridmix():
    """The mask's share is the label's; at lam = 1 there are no holes; any size of image works."""
    batch = {"image": jnp.zeros((200, 18, 27, 1)), "label": jnp.eye(200)}
    plan = jax.jit(augment.gridmix().sample)(jax.random.key(6), batch)
    np.testing.assert_allclose(plan["mask"].mean((1, 2)), plan["lam"], atol=1e-6)
    assert 0.5 < float(plan["lam"].mean()) < 0.9
    assert (jax.jit(augment.gridmix(0).sample)(jax.random.key(6), batch)["mask"] == 1).all()
