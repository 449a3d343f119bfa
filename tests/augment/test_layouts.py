"""Videos [B, T, H, W, C], whose frames share the decision, and 1-D signals [B, L, C]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment
from tests.augment.test_battery import NEEDS_MASK, ROWS

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(11)
B, T = 4, 3
# Beside the rows of the battery.
MORE = [
    "augmix(dialect='timm')",
    "autoaugment('google_v0')",
    "color_jitter(0.4) | random_crop(5, 1, 'reflect')",
    "cutout(4, count=2, per_batch=True)",
    "multi_crop((4, 3), (1, 1), then=randaugment(1, weights={'posterize': 1}))",
    "randaugment(dialect='timm')",
    "random_erasing(1.0, value='channel')",
    "random_flip(vertical=True)",
    "resizemix(prob=0.7, pairing='pair')",
    "smoothmix(per_batch=True)",
    "timm('3a')",
]
# Whose plan has a decision for every frame.
BY_PIXEL = {"fmix", "transplant"}
SIGNALS = {
    "chain", "cutmix", "cutout", "fmix", "identity", "jigsaw", "label_smoothing", "mixup",
    "normalize", "one_of", "patchmix", "random_crop", "random_erasing", "random_flip", "resizemix",
    "smoothmix", "sometimes", "to_float", "transplant", "views",
}  # fmt: skip


def batch(*shape, masked=False):
    rng = np.random.default_rng(3)
    label = rng.dirichlet(np.ones(3), shape[0]).astype(np.float32)
    given = {"image": rng.integers(0, 256, shape).astype(np.uint8), "label": label}
    if masked:
        given["mask"] = rng.integers(0, 3, shape[:-1])
    return jax.tree.map(jnp.asarray, given)


def frame(given, t):
    return {name: leaf[:, t] if name in ("image", "mask") else leaf for name, leaf in given.items()}


def assert_same(found, expected):
    """Whole levels exactly; floats up to their rounding."""
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == expected[name].dtype
        atol = 1e-6 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("text", [*ROWS.values(), *MORE])
def test_frames_share_the_decision(text):
    """Videos equal their frames, one by one as images, under the same plan."""
    aug, name = augment.parse(text), text.split("(")[0]
    given = batch(B, T, 7, 10, 3, masked=name in NEEDS_MASK)
    plan, of_image = jax.jit(lambda b: [aug.sample(KEY, x) for x in (b, frame(b, 0))])(given)
    apply = jax.jit(aug.apply)
    out = apply(plan, given)
    for t in range(T):
        if name in BY_PIXEL:
            of_image = {**plan, "mask": plan["mask"][:, t]}
        found = {**out, "image": out["image"][..., t, :, :, :]}
        if name == "multi_crop":
            found["local"] = out["local"][..., t, :, :, :]
        if name in NEEDS_MASK:
            found["mask"] = out["mask"][:, t]
        assert_same(found, apply(of_image, frame(given, t)))


@pytest.mark.parametrize(
    "text",
    ["random_crop(5, 2)", "resizemix", "gridmix", "jigsaw((7, 2))", "mosaic", "three_augment",
     "transplant"],
)  # fmt: skip
def test_videos_eagerly_and_compiled(text):
    """On one frame, too, which is as an image."""
    aug = augment.parse(text)
    given = batch(2, 1, 7, 10, 3, masked=text in NEEDS_MASK)
    out = jax.jit(aug)(KEY, given)
    assert_same(out, aug(KEY, given))
    expected = aug(KEY, frame(given, 0))
    assert_same(frame(out, 0), expected)


@pytest.mark.parametrize("text", ["randaugment(dialect='timm')", "resizemix", "random_crop"])
def test_frames_and_examples_differ(text):
    """Otherwise the test above would pass whatever became of them."""
    aug, given = augment.parse(text), batch(B, T, 7, 10, 3)
    plan = aug.sample(KEY, given)
    out = np.asarray(aug.apply(plan, given)["image"])
    assert (out[:, 0] != out[:, 1]).any(axis=(1, 2, 3)).all()
    other = aug.apply(jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), plan), given)["image"]
    assert (np.asarray(other) != out).any(axis=(2, 3, 4)).any(axis=0).all()


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        *[
            (text, (T, 7, 10))
            for text in ("fmix", "gridmix", "mosaic", "resizemix", "smoothmix", "transplant")
        ],
        *[
            (text, (40,))
            for text in ("fmix", "patchmix(9)", "resizemix", "smoothmix", "transplant")
        ],
    ],
)
def test_labels_weigh_what_is_shown(text, shape):
    """Of examples that are one-hot everywhere the mean of the pixels is what labels should be."""
    given = batch(B, *shape, 1, masked="transplant" in text)
    hot = jnp.eye(B).reshape(B, *[1] * len(shape), B) + jnp.zeros((B, *shape, B))
    out = augment.parse(text)(KEY, {**given, "image": hot, "label": jnp.eye(B)})
    shown = np.asarray(out["image"]).mean(axis=tuple(range(1, 1 + len(shape))))
    assert (shown != np.eye(B)).any()
    # FMix's lam is that of the mask but for less than a pixel.
    np.testing.assert_allclose(
        out["label"], shown, atol=1 / np.prod(shape) if text == "fmix" else 1e-5
    )


# What each signal [L, C] should become, by its own row of the plan; `other` is its partner.


def boxed(x, other, plan):
    top, left, bottom, right = plan["box"]
    assert (top, bottom) == (0, 1)
    return np.where(((np.arange(len(x)) >= left) & (np.arange(len(x)) < right))[:, None], other, x)


def resampled(x, other, plan):
    _, left, _, right = plan["box"]
    out = x.copy()
    for i in range(left, right):
        out[i] = other[(i - left) * len(x) // (right - left)]
    return out


def interpolated(x, other, plan):
    _, left, _, right = plan["box"]
    n = right - left
    out, place = x.copy(), (np.arange(n) + 0.5) * len(x) / n - 0.5
    for c in range(x.shape[1]):
        inside = np.interp(place, np.arange(len(x)), other[:, c].astype(float))
        out[left:right, c] = np.round(inside)
    return out


def smooth(x, other, plan):
    mask = np.asarray(plan["mask"], np.float64)[0, :, None]
    return np.round(mask * x + (1 - mask) * other).astype(np.uint8)


def cropped(x, other, plan, mode="constant"):
    top, left = plan["offset"]
    assert top == 0
    return np.pad(x, [(3, 3), (0, 0)], mode=mode)[left : left + 17]


def painted(x, other, plan):
    out = x
    for box in np.reshape(plan["box"], (-1, 4)):
        out = boxed(out, np.full_like(x, 9), {"box": box})
    return out


def noisy(x, other, plan):
    paint = np.clip(np.round(255 * plan["noise"][0].astype(np.float64)), 0, 255).astype(np.uint8)
    return boxed(x, np.broadcast_to(paint, x.shape), plan)


def reordered(x, other, plan):
    return x.reshape(4, 5, -1)[plan["order"]].reshape(x.shape)


OF_SIGNALS = {
    "cutmix": boxed,
    "patchmix(6)": boxed,
    "resizemix(prob=0.8)": resampled,
    "resizemix((0.3, 0.9), interpolation='bilinear')": interpolated,
    "smoothmix(prob=0.8)": smooth,
    "random_crop(17, 3)": cropped,
    "random_crop((1, 17), 3, 'reflect')": lambda *given: cropped(*given, mode="reflect"),
    "random_flip": lambda x, other, plan: x[::-1],
    "cutout(8, fill=9)": painted,
    "random_erasing(0.8, (0.1, 0.4), value=9, count=2)": painted,
    "random_erasing(0.8, value='channel', noise=(0.5, 0.2))": noisy,
    "random_erasing(0.8, value='pixel', noise=(0.5, 0.2))": noisy,
    "jigsaw(4, prob=0.8)": reordered,
}


@pytest.mark.parametrize("text", OF_SIGNALS)
def test_signals(text):
    aug, given, size = augment.parse(text), batch(12, 20, 2), 12
    plan, out = jax.jit(lambda b: (aug.sample(KEY, b), aug(KEY, b)))(given)
    rows = {name: np.asarray(x) for name, x in plan.items()}
    image, changed = np.asarray(given["image"]), 0
    partner = rows.get("partner", np.arange(size))
    for i in range(size):
        row = {name: x[i] for name, x in rows.items()}
        expected = OF_SIGNALS[text](image[i], image[partner[i]], row)
        if not row.get("use", True):
            expected = image[i]
        atol = 1 if "smoothmix" in text or "bilinear" in text else 0  # halves of float32
        found = np.asarray(out["image"][i])
        np.testing.assert_allclose(found.astype(int), expected.astype(int), rtol=0, atol=atol)
        changed += found.shape != image[i].shape or (found != image[i]).any()
    assert changed >= size // 3
    assert out["image"].dtype == jnp.uint8
    assert_same(aug.apply(plan, given), out)


@pytest.mark.parametrize(
    "text",
    ["mixup", "fmix", "transplant", "normalize((0.5, 0.2), 0.3)", "to_float", "jigsaw((1, 4))",
     "one_of(cutmix, resizemix)", "views(2, smoothmix | random_flip)"],
)  # fmt: skip
def test_signals_are_images_of_height_one(text):
    aug, given = augment.parse(text), batch(B, 20, 2, masked=text == "transplant")
    plan = aug.sample(KEY, given)
    tall = {
        name: leaf[:, None] if name in ("image", "mask") else leaf for name, leaf in given.items()
    }
    of_tall = {**plan, "mask": plan["mask"][:, None]} if text in BY_PIXEL else plan
    expected = dict(jax.jit(aug.apply)(of_tall, tall))
    expected["image"] = expected["image"].squeeze(-3)
    if "mask" in expected:
        expected["mask"] = expected["mask"].squeeze(-2)
    assert_same(jax.jit(aug)(KEY, given), expected)


def test_laws_of_signals():
    """Shares are those of the length."""
    n, length = 4000, 50
    given = {"image": jnp.zeros((n, length, 1)), "label": jnp.zeros((n, 1))}

    def drawn(text):
        plan = jax.jit(augment.parse(text).sample)(KEY, given)
        return {name: np.asarray(x, np.float64) for name, x in plan.items()}

    def mean_is(sides, expected, deviation):
        assert np.mean(sides) == pytest.approx(expected, abs=4 * deviation / n**0.5)

    box = drawn("random_erasing(0.3, (0.2, 0.6))")["box"]
    sides = box[:, 3] - box[:, 1]
    assert (sides.min(), sides.max()) == (10, 30)
    mean_is(sides, 20, 20 / 12**0.5)
    assert (box[:, [0, 2]] == [0, 1]).all()
    assert (box[:, 1].min(), box[:, 3].max()) == (0, length)
    never = drawn("random_erasing(0.3, (1.0, 1.0))")["box"]  # as of images: it fits strictly
    assert (never[:, 3] == never[:, 1]).all()

    plan = drawn("resizemix((0.2, 0.6))")
    box, sides = plan["box"], plan["box"][:, 3] - plan["box"][:, 1]
    assert (box[:, [0, 2]] == [0, 1]).all()
    np.testing.assert_allclose(plan["lam"], 1 - sides / length, atol=1e-6)
    inner = sides[(box[:, 1] > 0) & (box[:, 3] < length)]
    assert (inner.min(), inner.max()) == (10, 28)  # an odd side loses one pixel, int(30 tau) < 30

    plan = drawn("smoothmix((0.1, 0.2))")
    place = np.arange(length) + 0.5
    deviations = []
    for mask, lam in zip(plan["mask"][:200, 0], plan["lam"], strict=False):
        near = mask < 0.9  # a Gaussian: its logarithm is a parabola through 0
        a, b, c = np.polyfit(place[near], -np.log1p(-mask[near]), 2)
        center = -b / (2 * a)
        assert center == pytest.approx(round(center), abs=0.02)
        assert c - b * b / (4 * a) == pytest.approx(0, abs=1e-3)
        deviations.append((0.5 / a) ** 0.5)
        assert lam == pytest.approx(mask.mean(), abs=1e-5)
    assert 5 <= min(deviations) + 1e-3 < 5.5
    assert 9.5 < max(deviations) <= 10 + 1e-3

    plan = drawn("random_crop(48, 3)")
    assert set(plan["offset"][:, 0]) == {0}
    assert set(plan["offset"][:, 1]) == set(range(9))


@pytest.mark.parametrize("name", sorted(set(ROWS) - SIGNALS))
def test_what_is_not_defined_for_signals_says_so(name):
    for part in (augment.parse(ROWS[name]), augment.chain(augment.parse(ROWS[name]))):
        with pytest.raises(ValueError, match=r"must be \[B, H, W, C\] or \[B, T, H, W, C\]"):
            part(KEY, batch(B, 20, 3))


@pytest.mark.parametrize("name", sorted(SIGNALS - {"identity"}))
def test_what_is_defined_for_signals_takes_them(name):
    text = ROWS[name].replace("(7, 2)", "(1, 2)").replace("0.5, 0.4, 0.3", "0.5, 0.4")
    given = batch(B, 20, 2, masked=name in NEEDS_MASK)
    out = jax.eval_shape(augment.parse(text), KEY, given)
    assert out["image"].shape[-1] == 2


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"identity"}))
def test_other_ranks_are_refused(name):
    for shape in ((B, 20), (B, 2, 2, 7, 10, 3)):
        with pytest.raises(ValueError, match=r"must be .*\[B, T, H, W, C\], got the shape"):
            augment.parse(ROWS[name])(KEY, batch(*shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random_flip(vertical=True)", r"\[B, H, W, C\] or \[B, T, H, W, C\]"),
        ("random_crop(30)", "crop of 1 x 30 does not fit into an image of 1 x 20"),
        ("random_crop((2, 8))", "crop of 2 x 8 does not fit into an image of 1 x 20"),
        ("random_crop(padding=20, mode='reflect')", "at least 21 pixels"),
        ("jigsaw(3)", "1 x 3 tiles does not divide an image of 1 x 20"),
    ],
)
def test_refusals_of_signals(text, message):
    with pytest.raises(ValueError, match=message):
        augment.parse(text)(KEY, batch(B, 20, 2))
