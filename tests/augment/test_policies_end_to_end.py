"""Whole policies against their restatements, replayed from the plans that they draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import stats

from mixlab import augment
from mixlab.augment.ops.blur import gaussian_blur
from mixlab.augment.policies.augmix import SPACES, dirichlet
from mixlab.augment.policies.autoaugment import POLICIES
from mixlab.augment.policies.autoaugment_tables import TABLES
from mixlab.augment.policies.randaugment import RANDAUGMENT, WIDE
from mixlab.augment.policies.spaces import timm_rules
from tests import golden
from tests.augment.test_laws import assert_share, plan_of
from tests.augment.test_policies import assert_recorded
from tests.reference import images
from tests.reference import policies as restated

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(5)
POSTERIZE = {"v0": "Posterize", "original": "PosterizeOriginal", "r": "PosterizeIncreasing"}


def photos(n, size=(9, 12)):
    return np.random.default_rng(0).integers(0, 256, (n, *size, 3)).astype(np.uint8)


def run_row(names, plan, i, image, dialect, fill):
    """One image through the ops of row `i` (any index) of a plan."""
    for j in range(plan["op"][i].shape[0]):
        if plan["use"][i][j]:
            center = plan["center"][i][j] if "center" in plan else None
            name, argument = names[plan["op"][i][j]], float(plan["argument"][i][j])
            image = restated.single(name, image, argument, dialect, fill, center=center)
    return image


@pytest.mark.parametrize(
    ("aug", "names", "dialect", "fill"),
    [
        (augment.randaugment(3), RANDAUGMENT["torchvision"].rules, "torchvision", 0),
        (augment.trivialaugment(fill=9), WIDE.rules, "torchvision", 9),
        (
            augment.randaugment(3, dialect="timm_increasing", interpolation="nearest"),
            RANDAUGMENT["timm"].rules,
            "pil",
            128,
        ),
        (augment.randaugment(2, dialect="google"), RANDAUGMENT["google"].rules, "google", 128),
        (augment.three_augment(), ("desaturate", "gaussian_blur", "solarize"), "pil", 0),
    ],
    ids=["torchvision", "trivial", "timm", "google", "three"],
)
def test_pixels(aug, names, dialect, fill):
    image = photos(60)
    batch = {"image": jnp.asarray(image)}
    plan = jax.tree.map(np.asarray, aug.sample(KEY, batch))
    assert len(set(plan["op"].ravel())) == len(names)
    found = np.asarray(jax.jit(aug.apply)(plan, batch)["image"])
    for i in range(len(image)):
        expected = run_row(list(names), plan, i, image[i], dialect, fill)
        # Google's geometry is computed in float32: a pixel may fall on the other side of a half.
        limit = 0.02 if dialect == "google" else 0.0
        assert (found[i] != expected).mean() <= limit, i


def names_of(policy):
    table, space = POLICIES[policy]
    met = {name for row in TABLES[table] for name in (row[0], row[3])}
    return [name for name in space.rules if name in met]


@pytest.mark.parametrize("policy", POLICIES)
def test_autoaugment_decides_by_its_table(policy):
    """Every pair with its ops, probabilities and strengths; the pair itself is uniform."""
    n, size = 12_000, (32, 64)
    plan = plan_of(augment.autoaugment(policy), n, *size)
    names, rows = names_of(policy), TABLES[POLICIES[policy][0]]
    assert stats.chisquare(np.bincount(plan["pair"], minlength=25)).pvalue > 1e-4
    for pair, row in enumerate(rows):
        of = plan["pair"] == pair
        for j, (name, prob, level) in enumerate((row[:3], row[3:])):
            assert {names[op] for op in plan["op"][of, j]} == {name}
            used = plan["use"][of, j]
            if 0 < prob < 1:
                assert_share(used, prob)
            else:
                assert (used == bool(prob)).all()
            found = plan["argument"][of, j]
            expected = argument_of(policy, name, level, size)
            if expected is not None:
                values = {round(float(v), 4) for v in np.abs(found)}
                assert values <= {round(v, 4) for v in expected}, (pair, name)


def argument_of(policy, name, level, size):
    """The sizes that an argument may have, or None for ops without one."""
    reference = {"shear_x": "ShearX", "shear_y": "ShearY", "solarize_add": "SolarizeAdd"}
    if name in ("autocontrast", "equalize", "invert"):
        return None
    if policy in ("imagenet", "cifar10", "svhn"):
        name = "".join(part.capitalize() for part in name.split("_"))
        value = images.torchvision_magnitude(name, level, *size, bins=10)
        if name in ("Brightness", "Color", "Contrast", "Sharpness"):
            return {1 + value, 1 - value}
        return {{"Solarize": 255 * value, "TranslateX": int(value), "TranslateY": int(value)}.get(
            name, value
        )}  # fmt: skip
    if policy == "google_v0":
        return {restated.google_argument(name, level, 250, 100) % 256}
    if name == "posterize":
        reference["posterize"] = POSTERIZE["r" if policy.endswith("r") else policy]
    if name == "translate_y":
        return {images.timm_argument("TranslateYRel", level) * size[0]}
    return {images.timm_argument(reference.get(name, name.capitalize()), level)}


def test_autoaugment_spread_and_pixels():
    aug = augment.autoaugment("v0", magnitude_std=0.5, interpolation="nearest")
    image = photos(40)
    batch = {"image": jnp.asarray(image)}
    plan = jax.tree.map(np.asarray, aug.sample(KEY, batch))
    found = np.asarray(jax.jit(aug.apply)(plan, batch)["image"])
    for i in range(len(image)):
        expected = run_row(names_of("v0"), plan, i, image[i], "pil", 128)
        np.testing.assert_array_equal(found[i], expected)
    plan = plan_of(aug, 30_000)
    rows = np.array([(row[0] == "rotate") * row[2] for row in TABLES["v0"]], np.float32)
    of = plan["op"][:, 0] == names_of("v0").index("rotate")
    off = np.abs(plan["argument"][of, 0]) / 3 - rows[plan["pair"][of]]
    assert stats.kstest(off, stats.norm(0, 0.5).cdf).pvalue > 1e-4


def test_augmix_table():
    assert_recorded(SPACES["torchvision"], "AugMix")


@pytest.mark.parametrize("dialect", SPACES)
def test_augmix_pixels(dialect):
    aug = augment.augmix(dialect=dialect, interpolation="nearest")
    image = photos(24, (7, 6))  # larger ones have ties in their shears
    batch = {"image": jnp.asarray(image)}
    plan = jax.tree.map(np.asarray, aug.sample(KEY, batch))
    names, fill = list(SPACES[dialect].rules), SPACES[dialect].fill
    found = np.asarray(jax.jit(aug.apply)(plan, batch)["image"])
    kind = "torchvision" if dialect == "torchvision" else "pil"
    for i in range(len(image)):
        chains = np.stack([run_row(names, plan, (i, j), image[i], kind, fill) for j in range(3)])
        given = (image[i], chains, plan["weights"][i], plan["lam"][i], dialect)
        assert (restated.augmix(*given, slack=-1e-3) <= found[i]).all(), i
        assert (found[i] <= restated.augmix(*given, slack=1e-3)).all(), i


def test_augmix_laws():
    n = 6000
    plan = plan_of(augment.augmix(4, width=2), n)
    names = list(SPACES["torchvision"].rules)
    assert stats.chisquare(np.bincount(plan["op"].ravel(), minlength=13)).pvalue > 1e-4
    depth = plan["use"].sum(-1)
    assert stats.chisquare(np.bincount(depth.ravel(), minlength=4)[1:]).pvalue > 1e-4
    assert (np.sort(plan["use"], -1)[..., ::-1] == plan["use"]).all()
    assert stats.kstest(plan["lam"], stats.uniform.cdf).pvalue > 1e-4
    assert stats.kstest(plan["weights"][:, 0], stats.uniform.cdf).pvalue > 1e-4
    rotate = np.abs(plan["argument"][plan["op"] == names.index("rotate")]) / (30 / 9)
    np.testing.assert_allclose(rotate, np.round(rotate), atol=1e-5)
    assert stats.chisquare(np.bincount(np.round(rotate).astype(int), minlength=4)).pvalue > 1e-4
    timm = plan_of(augment.augmix(3, dialect="timm", depth=2), n)
    assert timm["op"].shape == (n, 3, 2)
    names = list(SPACES["timm"].rules)
    rotate = np.abs(timm["argument"][timm["op"] == names.index("rotate")]) / 3
    assert stats.kstest(rotate, stats.uniform(0, 3).cdf).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_dirichlet(alpha):
    draws = np.asarray(jax.jit(lambda key: dirichlet(key, alpha, (20_000, 3)))(KEY), np.float64)
    np.testing.assert_allclose(draws.sum(-1), 1, atol=1e-6)
    law = stats.beta(alpha, 2 * alpha)
    for i in range(3):
        # Below float32's resolution draws are 0 or 1 exactly, so compare in between.
        points = np.linspace(0.001, 0.999, 999)
        found = np.searchsorted(np.sort(draws[:, i]), points) / len(draws)
        assert np.abs(found - law.cdf(points)).max() < 2.2 / np.sqrt(len(draws))


@pytest.mark.parametrize("dialect", SPACES)
def test_augmix_of_nothing(dialect):
    image = jnp.asarray(photos(3))
    out = jax.jit(augment.augmix(alpha=0.0, dialect=dialect))(KEY, {"image": image})["image"]
    np.testing.assert_array_equal(out, image)


def test_clean_view_and_loss():
    batch = {"image": jnp.asarray(photos(4)), "label": jnp.eye(4)}
    out = jax.jit(augment.views(3, augment.timm("3a"), clean=True))(KEY, batch)
    np.testing.assert_array_equal(out["image"][:, 0], batch["image"])
    assert (out["image"][:, 1] != out["image"][:, 2]).any()
    rng = np.random.default_rng(1)
    logits, label = 3 * rng.normal(size=(4, 3, 5)), rng.dirichlet(np.ones(5), 4)
    for given in (label, np.repeat(label[:, None], 3, axis=1)):
        found = jax.jit(augment.jsd_loss)(
            jnp.asarray(logits, jnp.float32), jnp.asarray(given, jnp.float32), weight=7.0
        )
        np.testing.assert_allclose(found, restated.jsd_loss(logits, label, 7.0), rtol=1e-5)
    same = jnp.broadcast_to(jnp.asarray(logits[:, :1], jnp.float32), logits.shape)
    np.testing.assert_allclose(augment.jensen_shannon(same), 0, atol=1e-6)
    far = 1e4 * jnp.eye(3, 5)[None]
    np.testing.assert_allclose(augment.jensen_shannon(far), np.log(3), rtol=1e-6)
    grad = jax.jit(jax.grad(lambda x: augment.jsd_loss(x, jnp.eye(1, 5))))
    assert np.isfinite(grad(far)).all()
    with pytest.raises(ValueError, match=r"\[B, V, K\]"):
        augment.jsd_loss(jnp.zeros((2, 5)), jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="label"):
        augment.jsd_loss(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4)))


def test_levels_of_timm():
    """The recorded tables of the ops that only timm's other policies use."""
    v = golden.load("mixing/public_ra_tv")
    levels = jnp.arange(11, dtype=jnp.float32)

    def ours(name, **rules):
        rule = timm_rules(**{"increasing": False, "bits": "original"} | rules)[name]
        return np.asarray(rule(lambda x: levels * x / 10, jnp.ones(11), (8, 8)))

    kept = v["timm_level/PosterizeOriginal"]
    np.testing.assert_array_equal(ours("posterize"), kept)
    np.testing.assert_allclose(1 - ours("desaturate"), v["timm_level/Desaturate"], atol=1e-6)
    np.testing.assert_allclose(ours("gaussian_blur"), v["timm_level/GaussianBlur"], rtol=1e-6)
    google = POLICIES["google_v0"][1]
    for name in ("X", "Y"):
        found = google.arguments(levels, jnp.ones(11), (8, 8))[f"translate_{name.lower()}"]
        np.testing.assert_allclose(found, v[f"timm_level/Translate{name}"], rtol=1e-6)


def test_recorded_blur_and_desaturation():
    v = golden.load("mixing/public_ra_timm")
    seen = 0
    blur, grey = jax.jit(gaussian_blur), jax.jit(augment.ops.color)
    for key, want in v.items():
        name, photo = key.split("/")[0], key.split("/")[-1]
        if name not in ("GaussianBlur", "Desaturate") or photo == "arg":
            continue
        argument = float(v[f"{key.rsplit('/', 1)[0]}/arg"][0])
        image = jnp.asarray(v[f"input/{photo}"])
        found = blur(image, argument) if name == "GaussianBlur" else grey(image, 1 - argument)
        np.testing.assert_array_equal(found, want, err_msg=key)
        seen += 1
    assert seen == 32


@pytest.mark.parametrize("size", [(9, 12), (1, 5), (1, 1)])
def test_blur_is_pillows(size):
    image = photos(1, size)[0]
    blur = jax.jit(gaussian_blur)
    for sigma in (0.0, 0.1, 0.6, 1.3, 1.99, 2.0):
        found = blur(jnp.asarray(image), sigma)
        radius = ImageFilter.GaussianBlur(sigma)
        np.testing.assert_array_equal(found, np.asarray(Image.fromarray(image).filter(radius)))
        np.testing.assert_array_equal(found, restated.gaussian_blur(image, sigma))
        smooth = np.asarray(blur(jnp.asarray(image / 255, jnp.float32), sigma))
        np.testing.assert_allclose(smooth * 255, found, atol=3)  # six roundings


def test_three_augment_laws():
    plan = plan_of(augment.three_augment(), 12_000)
    assert stats.chisquare(np.bincount(plan["op"][:, 0], minlength=3)).pvalue > 1e-4
    sigma = plan["argument"][plan["op"] == 1]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-4
    assert plan["use"].all()


def same_plans(a, b):
    batch = {"image": jnp.zeros((50, 8, 8, 3), jnp.uint8)}
    jax.tree.map(np.testing.assert_array_equal, a.sample(KEY, batch), b.sample(KEY, batch))


@pytest.mark.parametrize(
    ("text", "aug"),
    [
        ("rand", augment.randaugment(2, 10, dialect="timm")),
        (
            "rand-m9-mstd0.5-inc1",
            augment.randaugment(2, 9, dialect="timm_increasing", magnitude_std=0.5),
        ),
        ("rand-m9-inc0", augment.randaugment(2, 9, dialect="timm")),
        (
            "rand-m12-n3-p0.7-mmax20-mstd101",
            augment.randaugment(
                3, 12, dialect="timm", prob=0.7, magnitude_max=20, magnitude_std=np.inf
            ),
        ),
        ("augmix-m5-w4-d2", augment.augmix(5, width=4, depth=2, dialect="timm")),
        ("augmix-a0.5-mstd1", augment.augmix(alpha=0.5, magnitude_std=1.0, dialect="timm")),
        ("original-mstd0.5", augment.autoaugment("original", magnitude_std=0.5)),
        ("v0r", augment.autoaugment("v0r")),
        ("3a", augment.three_augment()),
    ],
)
def test_strings_of_timm(text, aug):
    same_plans(augment.timm(text), aug)
    same_plans(augment.parse(text), aug)


def test_sets_of_timm():
    n = 9000
    three = plan_of(augment.timm("rand-m10-inc1-n1-p1-t3a"), n)
    assert set(three["op"].ravel()) == {0, 1, 2}
    assert three["use"].all()
    # At full strength: solarize from 0 on, all colour gone, and the widest blur.
    for op, value in enumerate((0.0, 0.0, 2.0)):
        np.testing.assert_allclose(three["argument"][three["op"] == op], value, atol=1e-6)
    weighted = plan_of(augment.timm("rand-m9-tweights"), n)
    names = list(RANDAUGMENT["timm"].rules)
    assert_share(weighted["op"][:, 0] == names.index("rotate"), 3 / 10.65)
    assert (weighted["op"][:, 0] != weighted["op"][:, 1]).all()
    aug = augment.timm("rand-m9-n2-t3aw")
    out = jax.eval_shape(aug, KEY, {"image": jnp.asarray(photos(30))})
    assert out["image"].shape == (30, 9, 12, 3)
    # timm clips a magnitude beyond the bound.
    clipped = plan_of(augment.timm("rand-m15-n1"), 500)
    turned = clipped["argument"][clipped["op"] == names.index("rotate")]
    np.testing.assert_allclose(np.abs(turned), 30, rtol=1e-6)


def test_strings_within_chains():
    chain = augment.parse("random_flip | one_of(rand-m9-mstd0.5-inc1, v0, augmix-w2, 3a)")
    plan = jax.jit(chain.sample)(KEY, {"image": jnp.asarray(photos(4))})
    assert set(plan) == {"0", "1"}
    assert plan["1"]["2"]["weights"].shape == (4, 2)
    same_plans(augment.parse("timm('rand-m9', fill=0)"), augment.timm("rand-m9"))
    same_plans(augment.parse("autoaugment('v0')"), augment.autoaugment("v0"))
    same_plans(augment.parse("augmix"), augment.augmix())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: augment.timm("rnd-m9"), "mean 'rand'"),
        (lambda: augment.timm("rand-x9"), "unknown section 'x9'.*mstd"),
        (lambda: augment.timm("rand-m"), "needs a number"),
        (lambda: augment.timm("rand-m9.5"), "needs a number"),
        (lambda: augment.timm("rand-t3b"), "unknown set of ops '3b'.*3aw"),
        (lambda: augment.timm("3a-mstd1"), "takes none"),
        (lambda: augment.timm("augmix-b1"), "unknown section 'b1'"),
        (lambda: augment.parse("rand-q1 | mixup"), "unknown section 'q1'"),
        (lambda: augment.autoaugment("image_net"), "mean 'imagenet'"),
        (lambda: augment.autoaugment("svhn", magnitude_std=1.0), "magnitude_std"),
        (lambda: augment.augmix(dialect="tim"), "mean 'timm'"),
        (lambda: augment.augmix(2.5), "whole number in 1"),
        (lambda: augment.augmix(11, dialect="timm"), r"0\.\.10"),
        (lambda: augment.augmix(width=0), "width"),
        (lambda: augment.augmix(depth=0), "depth"),
        (lambda: augment.augmix(magnitude_std=1.0), "timm"),
    ],
)
def test_unsound_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
