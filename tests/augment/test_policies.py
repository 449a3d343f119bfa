"""Policies against recorded tables, restatements and their sampling laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mixlab import augment
from mixlab.augment.policies import randaugment as policies
from tests import golden
from tests.augment.test_golden import OPS
from tests.augment.test_laws import assert_share, plan_of
from tests.reference import images
from tests.reference import policies as restated

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(11)


def assert_recorded(space, prefix, size=(32, 64)):
    """Holds a torchvision space against its recorded table: the argument of every bin."""
    v = golden.load("mixing/public_ra_tv")
    seen = set()
    for key in (k for k in v if k.startswith(f"tv_space/{prefix}/")):
        name, recorded = OPS[key.split("/")[2]], v[key]
        bins = np.arange(len(recorded), dtype=np.float32)
        ours = np.asarray(space.arguments(bins, np.ones_like(bins), size)[name])
        if name in ("brightness", "color", "contrast", "sharpness"):
            ours = ours - 1.0
        elif name == "solarize":
            ours = ours / 255.0
        elif name.startswith("translate"):
            recorded = np.trunc(recorded)
        np.testing.assert_allclose(ours, recorded, rtol=0, atol=1e-5, err_msg=key)
        seen.add(name)
    assert seen | {"identity", "autocontrast", "equalize"} >= set(space.rules)


def test_wide_table():
    assert_recorded(policies.WIDE, "TrivialAugmentWide")


def test_table_of_google():
    for level in (0, 1, 5, 9, 10, 17, 30):
        ours = augment.randaugment_arguments("google", level, 1.0, (32, 64))
        assert len(ours) == 16
        for name, value in ours.items():
            expected = restated.google_argument(name, level)
            if name == "posterize":
                expected = min(expected, 8)  # more bits than eight keep all of them
            elif name == "solarize":
                expected %= 256  # as an 8-bit number
            assert float(value) == pytest.approx(expected, abs=1e-5), (name, level)


def space_run(space, name, argument, image, **more):
    plan = {"op": np.array([[list(space.rules).index(name)]], np.int32)}
    plan |= {"argument": np.array([[argument]], np.float32)}
    if "cutout" in space.rules:
        plan["center"] = np.zeros((1, 1, 2), np.int32)
    plan |= more
    return np.asarray(runner(id(space))(plan, jnp.asarray(image)[None])[0])


@functools.cache
def runner(number):
    return jax.jit(next(s for s in policies.RANDAUGMENT.values() if id(s) == number).run)


@pytest.mark.parametrize("size", [(11, 14), (9, 6), (1, 1)])
def test_geometry_of_google(size):
    space = policies.RANDAUGMENT["google"]
    image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    for name, arguments in {
        "rotate": (13.7, -31.0, 0.0, 77.0),
        # Quarters and halves: ties are common.
        "shear_x": (0.13, -0.29, 0.25, -0.5),
        "shear_y": (0.13, -0.29, 0.25, -0.5),
        "translate_x": (3, -5, 2.5, -2.5, 100),
        "translate_y": (3, -5, 2.5, -2.5, 100),
    }.items():
        for argument in arguments:
            found = space_run(space, name, argument, image)
            expected = restated.google(name, image, argument, 128)
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} {argument}")
    for half, center in ((0, (0, 0)), (2, (0, 0)), (3, (size[0] - 1, size[1] // 2)), (40, (0, 0))):
        found = space_run(space, "cutout", half, image, center=np.array([[center]], np.int32))
        expected = restated.google("cutout", image, half, 128, center)
        np.testing.assert_array_equal(found, expected, err_msg=f"cutout {half} {center}")


def test_contrast_of_google_is_in_its_policy():
    image = np.random.default_rng(2).integers(0, 256, (11, 14, 3)).astype(np.uint8)
    found = space_run(policies.RANDAUGMENT["google"], "contrast", 1.6, image)
    np.testing.assert_array_equal(found, images.contrast(image, 1.6, "google"))


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_random_interpolation_is_that_of_the_plan(name):
    space = policies.RANDAUGMENT["timm"]
    image = np.random.default_rng(3).integers(0, 256, (11, 14, 3)).astype(np.uint8)
    for bicubic in (False, True):
        found = space_run(space, name, 0.2137, image, bicubic=np.array([[bicubic]]))
        kind = "bicubic" if bicubic else "bilinear"
        expected = getattr(images, name)(image, np.float32(0.2137), kind, 128)
        off = np.abs(found.astype(int) - expected)
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01


def test_laws_of_the_dialects():
    n = 8000
    for dialect, prob in (("google", 1.0), ("timm", 0.5)):
        plan = plan_of(augment.randaugment(num_ops=2, dialect=dialect), n)
        names = list(augment.randaugment_arguments(dialect, 9, 1.0, (8, 8)))
        for layer in (0, 1):
            counts = np.bincount(plan["op"][:, layer], minlength=len(names))
            assert stats.chisquare(counts).pvalue > 1e-4
        assert_share(plan["op"][:, 0] == plan["op"][:, 1], 1 / len(names))
        for name in ("rotate", "shear_x", "translate_y"):
            assert_share(plan["argument"][plan["op"] == names.index(name)] > 0, 0.5)
        assert_share(plan["use"], prob) if prob < 1 else np.testing.assert_array_equal(
            plan["use"], 1
        )
        if dialect == "timm":
            assert_share(plan["bicubic"], 0.5)
        else:
            assert plan["center"].shape == (n, 2, 2)
            for axis in (0, 1):
                assert stats.chisquare(np.bincount(plan["center"][:, 0, axis])).pvalue > 1e-4


def test_weights_draw_without_replacement():
    weights = {"rotate": 3.0, "invert": 1.0, "equalize": 1.0}
    aug = augment.randaugment(2, 5, dialect="timm", weights=weights)
    plan = plan_of(aug, 20_000)
    names = list(augment.randaugment_arguments("timm", 5, 1.0, (8, 8)))
    first, second = plan["op"].T
    assert (first != second).all()
    for name, weight in weights.items():
        assert_share(first == names.index(name), weight / 5)
    assert_share(second[first == names.index("rotate")] == names.index("invert"), 1 / 2)
    assert_share(second[first == names.index("invert")] == names.index("rotate"), 3 / 4)


def test_uniform_magnitudes_and_bounds():
    names = list(augment.randaugment_arguments("timm", 5, 1.0, (8, 8)))
    for options, law in (
        ({"magnitude": 8, "magnitude_std": np.inf}, stats.uniform(0, 8)),
        ({"magnitude": 15, "magnitude_std": 1.0, "magnitude_max": 20}, stats.norm(15, 1)),
    ):
        plan = plan_of(augment.randaugment(1, dialect="timm", **options), 20_000)
        levels = np.abs(plan["argument"][plan["op"] == names.index("rotate")]) / 3
        assert stats.kstest(levels, law.cdf).pvalue > 1e-4


def test_trivialaugment_draws_bins():
    plan = plan_of(augment.trivialaugment(), 40_000)
    names = list(policies.WIDE.rules)
    assert plan["op"].shape == (40_000, 1)
    assert plan["use"].all()
    assert stats.chisquare(np.bincount(plan["op"][:, 0], minlength=14)).pvalue > 1e-4
    for name, scale in (("rotate", 4.5), ("solarize", 8.5)):
        bins = np.abs(plan["argument"][plan["op"] == names.index(name)]) / scale
        np.testing.assert_allclose(bins, np.round(bins), atol=1e-4)
        assert stats.chisquare(np.bincount(np.round(bins).astype(int), minlength=31)).pvalue > 1e-4


@pytest.mark.parametrize("dialect", policies.RANDAUGMENT)
def test_traced_magnitude(dialect):
    """A schedule changes the strength without another compilation, clipped to the scale."""
    batch = {"image": jnp.zeros((64, 8, 8, 3), jnp.uint8)}

    @jax.jit
    def plan(magnitude):
        return augment.randaugment(2, magnitude, dialect=dialect).sample(KEY, batch)

    for magnitude in (0, 4):
        expected = augment.randaugment(2, magnitude, dialect=dialect).sample(KEY, batch)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
            plan(jnp.float32(magnitude)),
            expected,
        )
    assert plan._cache_size() == 1
    np.testing.assert_array_equal(plan(-1.0)["argument"], plan(0.0)["argument"])


@pytest.mark.parametrize("text", ["randaugment(dialect='timm')", "randaugment(dialect='google')"])
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
def test_small_and_odd_images(text, dtype):
    aug = augment.parse(text)
    for shape in ((40, 1, 1, 3), (40, 3, 7, 2)):
        image = np.random.default_rng(4).random(shape)
        image = jnp.asarray((image * 255).astype("uint8") if dtype == "uint8" else image, dtype)
        out = jax.jit(aug)(KEY, {"image": image})["image"]
        assert (out.shape, out.dtype) == (image.shape, image.dtype)
        assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: augment.randaugment(dialect="google", interpolation="bilinear"), "nearest"),
        (lambda: augment.randaugment(dialect="google", magnitude_max=3), "bound"),
        (lambda: augment.randaugment(dialect="timm", magnitude_max=0), "positive"),
        (lambda: augment.randaugment(dialect="timm", weights={"rotat": 1}), "mean 'rotate'"),
        (lambda: augment.randaugment(dialect="timm", weights={"rotate": 1}), "replacement"),
        (lambda: augment.trivialaugment(interpolation="bicubic"), "bicubic"),
    ],
)
def test_unsound_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
