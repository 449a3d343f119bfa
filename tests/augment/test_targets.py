"""Masks, boxes and keypoints follow what the pixels show: the pixels themselves are the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment
from mixlab.augment import targets

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(5)
B, H, W, N = 6, 18, 24, 2
MOVING = [
    "random_crop((14, 20), 3)",
    "random_crop(padding=4, mode='reflect')",
    "random_flip",
    "random_flip(vertical=True)",
    "random_resized_crop((12, 16), interpolation='nearest')",
    "jigsaw((3, 4))",
]
PICKING = [
    "cutmix(prob=0.8)",
    "fmix(prob=0.8)",
    "gridmix(holes=3)",
    "mosaic(prob=0.8)",
    "cutmix(pairing='pair')",
]
WEIGHTS = {n: 1.0 for n in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")}


def geometry(dialect, num_ops=2):
    magnitude = {"torchvision": 30, "timm": 10, "google": 1}[
        dialect
    ]  # google's moves are in pixels
    return augment.randaugment(
        num_ops, magnitude, dialect=dialect, weights=WEIGHTS, interpolation="nearest", fill=0
    )


def scene():
    """Two rectangles of their own colour in every image, and points in the middle of pixels."""
    rng = np.random.default_rng(3)
    image = np.zeros((B, H, W, 1), np.uint8)
    boxes, labels = np.zeros((B, N, 4), np.float32), np.zeros((B, N), np.int32)
    for b in range(B):
        for n in range(N):
            top, left = rng.integers(0, 6), 12 * n + rng.integers(0, 4)
            bottom, right = top + rng.integers(5, 12), left + rng.integers(4, 9)
            colour = 1 + N * b + n
            image[b, top:bottom, left:right] = 10 * colour
            boxes[b, n], labels[b, n] = (top, left, bottom, right), colour
    points = np.stack([(boxes[..., 0] + boxes[..., 2]) // 2, boxes[..., 1]], -1) + np.float32(0.5)
    seen = np.ones((B, N, 1), np.float32)
    batch = {
        "image": image,
        "label": np.eye(B, dtype=np.float32),
        "mask": (image[..., 0] // 10).astype(np.int32),
        "boxes": boxes,
        "box_label": labels,
        "keypoints": np.concatenate([points, seen], -1),
    }
    return jax.tree.map(jnp.asarray, batch)


def shown(image, colour):
    """The box around a colour, and its number of pixels."""
    rows, columns = np.nonzero(image[..., 0] == 10 * colour)
    if not len(rows):
        return np.zeros(4), 0
    return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]), len(rows)


@pytest.mark.parametrize("text", [*MOVING, *PICKING, "resizemix"])
def test_masks_follow(text):
    """Classes exactly as the colours do; one-hot floats and the booleans of instances with them."""
    batch = scene()
    aug = augment.parse(text)
    plan = aug.sample(KEY, batch)
    hot = jax.nn.one_hot(batch["mask"], N * B + 1, dtype=jnp.float32)

    @jax.jit
    def run(*masks):
        return [aug.apply(plan, {"image": batch["image"], "mask": mask}) for mask in masks]

    classes, floats, booleans = run(batch["mask"], hot, hot.astype(bool))
    assert classes["mask"].dtype == jnp.int32
    np.testing.assert_array_equal(classes["mask"] * 10, classes["image"][..., 0])
    assert (
        classes["image"].shape != batch["image"].shape or (classes["image"] != batch["image"]).any()
    )
    covered = np.asarray(classes["mask"]) > 0  # 0 may be background, or nothing of the image
    for out, dtype in ((floats, jnp.float32), (booleans, bool)):
        assert out["mask"].dtype == dtype
        found = np.argmax(np.asarray(out["mask"], np.float32), -1)
        np.testing.assert_array_equal(found[covered], classes["mask"][covered])


@pytest.mark.parametrize("dialect", ["timm", "torchvision", "google"])
def test_policies_move_masks_boxes_and_keypoints(dialect):
    batch = scene()
    boxes, labels = (np.asarray(batch[name]) for name in ("boxes", "box_label"))
    aug = jax.jit(geometry(dialect).__call__)
    moved = 0
    for seed in range(4):
        out = jax.tree.map(np.asarray, aug(jax.random.key(seed), batch))
        np.testing.assert_array_equal(out["mask"] * 10, out["image"][..., 0])
        for b in range(B):
            for n in range(N):
                box, count = shown(out["image"][b], labels[b, n])
                # The box holds what is seen of it, but for the rounding of pixels.
                if count:
                    assert (out["boxes"][b, n, :2] <= box[:2] + 1).all()
                    assert (out["boxes"][b, n, 2:] >= box[2:] - 1).all()
                    moved += (out["boxes"][b, n] != boxes[b, n]).any()
                row, column, seen = out["keypoints"][b, n]
                if seen and 1 < row < H - 1 and 1 < column < W - 1:
                    near = out["mask"][b, int(row) - 1 : int(row) + 2, int(column) - 1 :][:, :3]
                    assert labels[b, n] in near
    assert moved > 20


def test_a_policy_that_moves_nothing_leaves_boxes():
    batch = scene()
    out = jax.jit(augment.randaugment(weights={"invert": 1, "color": 1}, dialect="timm"))(
        KEY, batch
    )
    for name in ("mask", "boxes", "keypoints", "box_label"):
        np.testing.assert_array_equal(out[name], batch[name])


@pytest.mark.parametrize("text", MOVING[:5])
def test_boxes_move_exactly(text):
    batch = scene()
    labels = np.asarray(batch["box_label"])
    aug = augment.parse(text)
    plan = aug.sample(KEY, batch)
    out = jax.tree.map(np.asarray, jax.jit(aug.apply)(plan, batch))
    for b in range(B):
        for n in range(N):
            box, _ = shown(out["image"][b], labels[b, n])
            if "resized" in text:  # edges between pixels
                assert np.abs(out["boxes"][b, n] - box).max() <= 1
            elif "reflect" not in text:  # whose mirrored part shows colours that are of no box
                np.testing.assert_array_equal(out["boxes"][b, n], box)
            row, column, seen = out["keypoints"][b, n]
            inside = 0 <= row < out["image"].shape[1] and 0 <= column < out["image"].shape[2]
            assert seen == inside
            if inside:
                near = out["mask"][b, int(row) :, int(column) :][:2, :2]
                assert labels[b, n] in (near if "resized" in text else near[:1, :1])


@pytest.mark.parametrize("text", PICKING)
def test_mixing_unites_boxes(text):
    """Each box is the smallest around its colour in the mixture, its weight the share shown."""
    batch = scene()
    aug = augment.parse(text)
    plan = aug.sample(KEY, batch)
    out = jax.tree.map(np.asarray, jax.jit(aug.apply)(plan, batch))
    partner = np.asarray(plan["partner"]).reshape(B, -1)
    labels, masks = np.asarray(batch["box_label"]), np.asarray(batch["mask"])
    k = partner.shape[1] + 1
    assert out["boxes"].shape == (B, k * N, 4)
    assert out["keypoints"].shape == (B, k * N, 3)
    hidden = partly = 0
    for b in range(B):
        members = [b, *partner[b]]
        for j, member in enumerate(members):
            if members.count(member) > 1:
                continue  # the same colours twice
            for n in range(N):
                at = j * N + n
                colour = labels[member, n]
                assert out["box_label"][b, at] == colour
                box, count = shown(out["image"][b], colour)
                np.testing.assert_array_equal(out["boxes"][b, at], box)
                area = np.sum(masks[member] == colour)
                assert out["box_weight"][b, at] == pytest.approx(count / area, abs=1e-5)
                hidden, partly = hidden + (count == 0), partly + (0 < count < area)
                row, column, seen = out["keypoints"][b, at]
                within = 0 <= row < H and 0 <= column < W
                there = within and out["mask"][b, int(row), int(column)] == colour
                assert seen == there == out["keypoint_weight"][b, at]
    assert hidden
    assert partly


def test_boxes_between_pixels_are_cut_where_they_are():
    box = np.array([2.25, 3.5, 9.75, 8.125], np.float32)
    batch = {"image": jnp.zeros((2, H, W, 1)), "boxes": jnp.stack([box[None]] * 2)}
    aug = augment.cutmix(pairing="roll")
    plan = aug.sample(KEY, batch) | {"box": jnp.asarray([[0, 0, 5, W], [5, 0, H, W]], jnp.int32)}
    out = jax.jit(aug.apply)(plan, batch)
    upper, lower = [2.25, 3.5, 5, 8.125], [5, 3.5, 9.75, 8.125]
    np.testing.assert_array_equal(out["boxes"], [[lower, upper], [upper, lower]])
    shares = np.array([4.75, 2.75]) / 7.5
    np.testing.assert_allclose(out["box_weight"], [shares, shares[::-1]], rtol=1e-6)


def test_mixup_weighs_boxes_and_one_hot_masks():
    batch = scene()
    aug = augment.mixup(1.0, pairing="roll")
    plan = aug.sample(KEY, batch)
    with pytest.raises(TypeError, match="one_hot"):
        aug.apply(plan, batch)
    hot = jax.nn.one_hot(batch["mask"], N * B + 1, dtype=jnp.bfloat16)
    out = jax.jit(aug.apply)(plan, {**batch, "mask": hot})
    lam = np.asarray(plan["lam"])
    weight = np.repeat(np.stack([lam, 1 - lam], 1), N, 1)
    np.testing.assert_allclose(out["box_weight"], weight, atol=1e-5)
    np.testing.assert_allclose(out["keypoint_weight"], weight, atol=1e-6)
    both = np.concatenate([batch["boxes"], np.roll(batch["boxes"], 1, 0)], 1)
    np.testing.assert_array_equal(out["boxes"], both)
    assert out["mask"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out["mask"].sum(-1), np.float32), 1, atol=0.01)
    # Mixed once more, the weights multiply.
    again = augment.mixup(1.0, pairing="roll")
    twice = jax.jit(again.apply)(again.sample(KEY, batch), {**out, "mask": None})
    assert twice["boxes"].shape == (B, 4 * N, 4)
    np.testing.assert_allclose(twice["box_weight"].sum(1), N, atol=1e-4)


def test_resizemix_shrinks_the_partners_boxes():
    batch = scene()
    labels = np.asarray(batch["box_label"])
    aug = augment.resizemix((0.5, 0.8))
    plan = aug.sample(KEY, batch) | {"use": jnp.arange(B) > 0}
    plan["partner"] = (jnp.arange(B, dtype=jnp.int32) + 1) % B
    out = jax.tree.map(np.asarray, jax.jit(aug.apply)(plan, batch))
    for b in range(1, B):
        for n in range(N):
            box, count = shown(out["image"][b], labels[(b + 1) % B, n])
            assert count
            assert np.abs(out["boxes"][b, N + n] - box).max() <= 1
    assert (out["boxes"][0, N:] == 0).all()  # not used: nothing of the partner
    assert (out["box_weight"][0] == [1, 1, 0, 0]).all()


SPATIAL = ["random_crop(6, 2)", "jigsaw((1, 4))", "cutmix", "patchmix(3)", "resizemix"]


@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize(
    ("shape", "text"),
    [
        *[((4, 8, 8), text) for text in (*SPATIAL, "random_flip(vertical=True)")],
        *[((4, 8, 8), text) for text in ("gridmix", "mosaic", "fmix", "random_resized_crop(6)")],
        *[((20,), text) for text in (*SPATIAL, "random_flip", "fmix")],
    ],
)
def test_masks_follow_videos_and_signals(shape, text, channels):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 255, (3, *shape, 1)), jnp.uint8)
    if "resized_crop" in text:
        text = text.replace(")", ", interpolation='nearest')")
    mask = image if channels else image[..., 0]
    out = augment.parse(text)(KEY, {"image": image, "mask": mask})
    assert out["image"].shape != image.shape or (out["image"] != image).any()
    np.testing.assert_array_equal(out["mask"], out["image"] if channels else out["image"][..., 0])


@pytest.mark.parametrize("dialect", ["timm", "torchvision", "google"])
def test_masks_follow_policies_of_videos(dialect):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 255, (B, 3, H, W, 1)), jnp.uint8)
    out = jax.jit(geometry(dialect))(KEY, {"image": image, "mask": image[..., 0]})
    assert (out["image"] != image).any(axis=(1, 2, 3, 4)).sum() > B // 2
    np.testing.assert_array_equal(out["mask"], out["image"][..., 0])


@pytest.mark.parametrize(
    ("leaf", "value", "error", "says"),
    [
        ("mask", np.zeros((B, H, W + 1)), ValueError, "mask"),
        ("boxes", np.zeros((B, 4), np.float32), ValueError, "boxes"),
        ("boxes", np.zeros((B, N, 4), np.int32), TypeError, "floating"),
        ("keypoints", np.zeros((B, N, 4), np.float32), ValueError, "keypoints"),
    ],
)
def test_errors(leaf, value, error, says):
    batch = {"image": jnp.zeros((B, H, W, 1)), leaf: value}
    for aug in (augment.random_flip(), augment.cutmix()):
        with pytest.raises(error, match=says):
            jax.eval_shape(aug, KEY, batch)
    if leaf in ("boxes", "keypoints"):
        with pytest.raises(ValueError, match="jigsaw"):
            jax.eval_shape(augment.jigsaw(2), KEY, batch)
        for image in (jnp.zeros((B, 2, H, W, 1)), jnp.zeros((B, W, 1))):
            for text in ("cutmix", "random_crop", "random_flip", "resizemix"):
                with pytest.raises(ValueError, match=r"go with images \[B, H, W, C\]"):
                    jax.eval_shape(augment.parse(text), KEY, {"image": image, leaf: value})
        video = {"image": jnp.zeros((B, 2, H, W, 1)), leaf: value}
        for text in ("mosaic", "randaugment"):
            with pytest.raises(ValueError, match=r"go with images \[B, H, W, C\]"):
                jax.eval_shape(augment.parse(text), KEY, video)


def test_mixing_boxes_now_and_then_takes_prob():
    batch = scene()
    with pytest.raises(ValueError, match="prob="):
        jax.eval_shape(augment.parse("sometimes(0.5, cutmix)"), KEY, batch)


def test_a_mask_of_examples_is_no_segmentation():
    batch = {"image": jnp.zeros((B, H, W, 1)), "mask": jnp.arange(B) > 2}
    for text in ("random_flip", "mixup", "random_crop"):
        out = augment.parse(text)(KEY, batch)
        np.testing.assert_array_equal(out["mask"], batch["mask"])


def test_the_low_frequency_crop_scales_what_is_in_the_image():
    batch = scene()
    out = jax.jit(augment.low_frequency_crop((9, 12)))(KEY, batch)
    np.testing.assert_array_equal(out["mask"], batch["mask"][:, 1::2, 1::2])
    np.testing.assert_array_equal(out["boxes"], batch["boxes"] / 2)
    np.testing.assert_array_equal(out["keypoints"][..., :2], batch["keypoints"][..., :2] / 2)
    with pytest.raises(ValueError, match="two sizes"):
        jax.eval_shape(augment.multi_crop((8, 4)), KEY, batch)


def test_transplant():
    """One class of the partner, each that it shows as often as the others; what is left stays."""
    batch = scene()
    aug = augment.transplant(exclude=0, prob=0.8)
    sample, apply = jax.jit(aug.sample), jax.jit(aug.apply)
    counts = np.zeros(N)
    for seed in range(12):
        plan = sample(jax.random.key(seed), batch)
        out = jax.tree.map(np.asarray, apply(plan, batch))
        for b in range(B):
            old, new, donor = (
                np.asarray(m) for m in (batch["mask"][b], out["mask"][b], batch["mask"][b - 1])
            )
            if not plan["use"][b]:
                np.testing.assert_array_equal(new, old)
                continue
            (label,) = np.unique(donor[np.asarray(plan["mask"][b]) == 0])
            assert label > 0
            np.testing.assert_array_equal(new, np.where(donor == label, donor, old))
            np.testing.assert_array_equal(out["image"][b, ..., 0], 10 * new)
            assert out["label"][b, b - 1] == pytest.approx(np.mean(donor == label), abs=1e-6)
            counts[label - 1 - N * ((b - 1) % B)] += 1
    used = counts.sum()
    assert abs(counts[0] / used - 0.5) < 5 * 0.5 / used**0.5
    assert abs(used / (12 * B) - 0.8) < 5 * 0.4 / (12 * B) ** 0.5
    every = augment.transplant(exclude=range(1, 99))
    plan = jax.jit(every.sample)(KEY, batch | {"mask": batch["mask"].at[:].max(1)})
    out = jax.jit(every.apply)(plan, batch)
    assert (plan["mask"] == 1).all()
    np.testing.assert_array_equal(out["image"], batch["image"])
    with pytest.raises(KeyError, match="mask"):
        aug(KEY, {"image": batch["image"]})
    with pytest.raises(TypeError, match="argmax"):
        aug(KEY, {**batch, "mask": batch["mask"].astype(jnp.float32)})


def test_whole_pixels_of_a_partner_leak_nowhere():
    mask = np.zeros((2, 4, 4), np.float32)
    mask[1, 0, 0] = np.nan
    batch = {"image": jnp.zeros((2, 4, 4, 1)), "mask": jnp.asarray(mask)}
    keep = jnp.ones((2, 4, 4), bool).at[:, 2:, 2:].set(False)
    found = targets.pick(batch["mask"], batch["mask"][::-1], keep, whole=True)
    assert np.isfinite(found[0]).all()


def test_half_of_a_batch_asks_for_one_entry_an_example():
    batch = {"image": jnp.ones((4, 2, 2, 1)), "file": ["a", "b", "c", "d"]}
    with pytest.raises(ValueError, match=r"half of the 4 examples, but batch\['file'\]\[0\]"):
        augment.mixup(pairing="half")(jax.random.key(0), batch)
