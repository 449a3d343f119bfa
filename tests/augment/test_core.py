import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import augment

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def batch(shape=(4, 6, 5, 3), **leaves):
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.random(shape), jnp.float32)
    return {"image": image, "label": jnp.eye(shape[0], 4), **leaves}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"label": np.eye(4)}, KeyError, "no 'image'.*label"),
        ({"image": np.zeros((6, 5), np.float32)}, ValueError, r"\[B, H, W, C\].*\(6, 5\)"),
        ({"image": np.zeros((4, 6, 5, 3), np.int32)}, TypeError, "uint8.*int32"),
        ({"image": np.zeros((0, 6, 5, 3), np.uint8)}, ValueError, "no examples"),
        (batch(label=jnp.zeros(4, jnp.int32)), ValueError, r"\[B, K\].*one_hot"),
        (batch(label=jnp.eye(4, dtype=jnp.int32)), TypeError, "floating.*int32"),
        (batch(label=jnp.zeros((3, 4))), ValueError, r"\(3, 4\) and \(4, 6, 5, 3\)"),
        ([1], TypeError, "dict"),
    ],
)
def test_unsound_batches_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        augment.mixup()(KEY, given)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: augment.mixup(alpha=-1), ValueError, "alpha"),
        (lambda: augment.mixup(alpha=float("nan")), ValueError, "alpha"),
        (lambda: augment.mixup(prob=1.5), ValueError, "prob"),
        (lambda: augment.mixup(pairing="rol"), ValueError, "did you mean 'roll'"),
        (lambda: augment.cutmix(minmax=(0.8, 0.2)), ValueError, "minmax"),
        (lambda: augment.cutmix(minmax=(0.2, 0.8), correct_lam=False), ValueError, "minmax"),
        (lambda: augment.resizemix(scope=(0.5, 2.0)), ValueError, "scope"),
        (lambda: augment.resizemix(interpolation="cubic"), ValueError, "nearest"),
        (lambda: augment.fmix(mode="spectrl"), ValueError, "did you mean 'spectral'"),
        (lambda: augment.fmix(max_soft=1.7), ValueError, "max_soft"),
        (lambda: augment.fmix_mask(np.zeros((1, 8, 5, 2)), 0.5, (8, 9)), ValueError, "noise"),
        (lambda: augment.label_smoothing(2.0), ValueError, "smoothing"),
        (lambda: augment.randaugment(dialect="tim"), ValueError, "did you mean 'timm'"),
        (lambda: augment.randaugment(magnitude=11, dialect="timm"), ValueError, r"0\.\.10"),
        (lambda: augment.randaugment(magnitude_std=0.5), ValueError, "spread"),
        (lambda: augment.randaugment(interpolation="bicubic"), ValueError, "interpolation"),
        (lambda: augment.randaugment(num_ops=0), ValueError, "num_ops"),
        (lambda: augment.random_crop(mode="edge"), ValueError, "mode"),
        (lambda: augment.random_crop(2.5), ValueError, "whole number, at least 1, .*got 2.5"),
        (lambda: augment.jigsaw((2, 2, 2)), ValueError, "grid is a whole number, at least 1"),
        (lambda: augment.cutout(3.5), ValueError, "size is a whole number, at least 0"),
        (lambda: augment.patchmix((3.5, 2)), ValueError, r"or a pair of them, got \(3.5, 2\)"),
        (lambda: augment.random_crop(padding=-1), ValueError, "padding"),
        (lambda: augment.normalize(0.5, 0.0), ValueError, "std"),
        (lambda: augment.views(0, augment.mixup()), ValueError, "n=0"),
        (lambda: augment.chain(augment.mixup), TypeError, r"mixup\(\)"),
        (lambda: augment.one_of(), ValueError, "at least one"),
        (lambda: augment.one_of(augment.mixup(), weights=[1, 2]), ValueError, "weights"),
        (lambda: augment.parse("mixap"), ValueError, "did you mean 'mixup'"),
        (lambda: augment.parse("mixup(alfa=1)"), TypeError, "alfa.*alpha"),
        (lambda: augment.parse("3"), ValueError, "no augmentation"),
    ],
)
def test_unsound_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_sizes_of_numpy_are_sizes():
    pixels = {"image": jnp.zeros((2, 8, 12, 3))}
    signal = {"image": jnp.zeros((2, 12, 3))}
    for four in (4, np.int64(4)):
        for size in (four, (four, four), np.array([4, 4])):
            out = jax.eval_shape(augment.random_crop(size), jax.random.key(0), pixels)
            assert out["image"].shape == (2, 4, 4, 3)
        for make in (augment.random_crop, augment.jigsaw, augment.cutout, augment.patchmix):
            out = jax.eval_shape(make(four), jax.random.key(0), signal | {"label": jnp.eye(2)})
            assert out["image"].shape == (2, 4 if make is augment.random_crop else 12, 3)


def test_late_errors():
    with pytest.raises(ValueError, match="does not fit"):
        augment.random_crop(20)(KEY, batch())
    with pytest.raises(ValueError, match="reflecting 5"):
        augment.random_crop(padding=5, mode="reflect")(KEY, batch())
    with pytest.raises(ValueError, match="std has 2 entries for 3"):
        augment.normalize(0.0, (1.0, 2.0))(KEY, batch())
    with pytest.raises(KeyError, match="label"):
        augment.label_smoothing()(KEY, {"image": batch()["image"]})
    for per_batch in (False, True):
        odd = augment.one_of(augment.identity(), augment.random_crop(2), per_batch=per_batch)
        with pytest.raises(ValueError, match=r"'image' is float32.*after part 1"):
            odd(KEY, batch())


def test_parse():
    aug = augment.parse("random_flip(1.0) | to_float | identity")
    out = aug(KEY, batch())
    np.testing.assert_array_equal(out["image"], batch()["image"][:, :, ::-1])
    assert augment.parse(aug) is aug
    assert augment.parse("").sample(KEY, batch()) == {}


def test_chain_hands_the_batch_on():
    aug = augment.chain(augment.random_crop(3, 0), augment.random_crop(2, 0))
    plan = aug.sample(KEY, batch())
    assert set(plan) == {"0", "1"}
    assert plan["1"]["offset"].max() <= 1
    assert aug.apply(plan, batch())["image"].shape == (4, 2, 2, 3)
    assert augment.chain()(KEY, batch())["image"].shape == (4, 6, 5, 3)


def test_a_bar_between_augmentations_chains_them():
    flip, crop, mix = augment.random_flip(), augment.random_crop(3, 0), augment.mixup(1.0)
    given = batch()
    for aug in (flip | crop | mix, augment.chain(flip, crop) | mix):
        found = aug(KEY, given)
        assert len(aug.parts) == 3
        jax.tree.map(
            np.testing.assert_array_equal, found, augment.chain(flip, crop, mix)(KEY, given)
        )
    # What is chosen between stays one part.
    assert len((augment.one_of(flip, mix) | crop).parts) == 2
    with pytest.raises(
        TypeError, match=r"part 1 is .*; call the constructor: mixup\(\), not mixup"
    ):
        flip | augment.mixup


def test_one_of_applies_what_was_chosen():
    flip, same = augment.random_flip(1.0), augment.identity()
    image = batch()["image"]
    for per_batch in (False, True):
        aug = augment.one_of(same, flip, per_batch=per_batch)
        plan = aug.sample(jax.random.key(5), batch())
        assert plan["choice"].shape == (() if per_batch else (4,))
        choice = np.broadcast_to(plan["choice"], (4,)).astype(bool)[:, None, None, None]
        want = np.where(choice, image[:, :, ::-1], image)
        np.testing.assert_array_equal(aug.apply(plan, batch())["image"], want)


def test_views_are_independent():
    out = augment.views(3, augment.mixup(alpha=1.0))(KEY, batch())
    assert out["image"].shape == (4, 3, 6, 5, 3)
    assert out["label"].shape == (4, 3, 4)
    assert (out["image"][:, 0] != out["image"][:, 1]).any()


@pytest.mark.parametrize(
    "aug", [augment.mixup(0), augment.cutmix(0), augment.fmix(0), augment.resizemix(alpha=0)]
)
def test_alpha_zero_changes_nothing(aug):
    given = batch()
    plan = aug.sample(KEY, given)
    np.testing.assert_array_equal(plan["lam"], 1)
    jax.tree.map(np.testing.assert_array_equal, aug.apply(plan, given), given)


def test_mixup_rounds_half_to_even():
    image = jnp.asarray([[0, 1, 2, 255], [1, 2, 5, 254]], jnp.uint8).reshape(2, 1, 4, 1)
    plan = {"partner": jnp.asarray([1, 0]), "lam": jnp.float32(0.5)}
    out = augment.mixup().apply(plan, {"image": image})
    np.testing.assert_array_equal(out["image"].reshape(2, 4), [[0, 2, 4, 254]] * 2)


@pytest.mark.parametrize("name", ["mixup", "fmix"])
@pytest.mark.parametrize("shape", [(3, 9, 2), (3, 2, 4, 5, 1)])
def test_signals_and_videos(name, shape):
    aug = augment.parse(f"{name}(alpha=1.0)")
    given = {"image": batch(shape)["image"], "label": jnp.eye(3)}
    plan = aug.sample(KEY, given)
    weight = plan["lam"] if name == "mixup" else plan["mask"]
    weight = np.asarray(weight).reshape(weight.shape + (1,) * (len(shape) - weight.ndim))
    image = np.asarray(given["image"])
    want = weight * image + (1 - weight) * image[plan["partner"]]
    np.testing.assert_allclose(aug.apply(plan, given)["image"], want, rtol=1e-6, atol=1e-6)


def test_crop_and_pad():
    image = jnp.arange(1, 13, dtype=jnp.uint8).reshape(1, 3, 4, 1)
    for mode, numpy_mode in (("constant", "constant"), ("reflect", "reflect")):
        aug = augment.random_crop((4, 5), 2, mode)
        padded = np.pad(image[0, :, :, 0], 2, numpy_mode)
        for top, left in [(0, 0), (3, 1), (1, 3)]:
            out = aug.apply({"offset": jnp.asarray([[top, left]])}, {"image": image})["image"]
            np.testing.assert_array_equal(out[0, :, :, 0], padded[top : top + 4, left : left + 5])


def test_normalize_and_to_float():
    image = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
    out = augment.normalize(0.2, 0.5)(KEY, {"image": image})["image"]
    np.testing.assert_allclose(out.ravel(), [-0.4, 0.0, 1.6], atol=1e-6)
    assert augment.to_float()(KEY, {"image": image})["image"].dtype == jnp.float32


def test_plans_by_hand():
    """Shared by all examples, or in parts; what is wrong with one is said."""
    given = batch()
    box = np.array([[0, 0, 2, 4], [1, 1, 3, 5], [2, 0, 6, 1], [0, 0, 0, 0]])
    plan = {"partner": [1, 2, 3, 0], "lam": 0.5, "box": box}
    whole = augment.cutmix().apply(plan, given)
    # As (top, left, bottom, right), also where there are as many examples as sides.
    parts = augment.cutmix().apply(plan | {"box": tuple(box.T)}, given)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    np.testing.assert_allclose(whole["label"][0, 0], 1 - 8 / 30, rtol=1e-6)
    for aug, changed, error, says in (
        (augment.mixup(), {"lam": None}, KeyError, "the plan has no 'lam', which sample"),
        (
            augment.cutmix(),
            {"box": None},
            KeyError,
            r"no 'box'.*it has \['box', 'lam', 'partner'\]",
        ),
        (augment.fmix(), {}, KeyError, "no 'mask'"),
        (
            augment.fmix(),
            {"mask": np.ones((4, 3, 5))},
            ValueError,
            r"'mask' must have .*\(4, 6, 5\)",
        ),
        (augment.mixup(), {"partner": [0, 1]}, ValueError, r"'partner' must have the shape \(4,\)"),
        (augment.mixup(), {"partner": [0, 1, 2, 9]}, ValueError, r"'partner' .*\[0, 3\], got 9"),
        (augment.mixup(), {"lam": 1.5}, ValueError, r"'lam' must lie in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(error, match=says):
            aug.apply({**plan, **changed}, given)
