import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import models
from tests import golden

# Small, so that compiling stays cheap.
SMALL = {
    "mlp": "mlp(hidden=(8, 8))",
    "cnn": "cnn(features=(4, 6, 8))",
    "resnet20": "resnet20(width=0.25, blocks=(1, 1, 1))",
    "vit": "vit(size='micro')",
}
SHAPES = [(8, 8, 1), (28, 28, 3), (32, 40, 5)]


def _variables(model, shape):
    """Random variables without compiling the initialisers, which takes most of the time."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1], initial=1)
        return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def _count(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
def test_any_image_size_and_channel_count(text, shape):
    model = models.parse(text, num_classes=7)
    x = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert logits.shape == (3, 7)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("text", "shape", "count"),
    [
        ("mlp", (28, 28, 1), 784 * 256 + 2 * 256 * 256 + 3 * 256 + 2570),
        # Stem 432 + 32; blocks of a stage from c to f channels: 9cf + 9f² + 4f, of which the first
        # of stages 2 and 3 has 9cf + 2f more in its shortcut; head 650.
        ("resnet20", (32, 32, 3), 292_954),
        # DeiT-Ti has 5.7 M with patch 16 on 224 pixels and 1,000 classes.
        ("vit(size='tiny', patch=16)", (224, 224, 3), 5_526_346),
    ],
)
def test_parameter_count(text, shape, count):
    assert _count(models.parse(text, 10), shape) == count


def test_width_multiplies_the_channels():
    model = models.ResNet(10, width=8)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    kernel = variables["params"]["head"]["kernel"]
    assert kernel.shape == (512, 10)


def test_a_group_norm_keeps_no_statistics_and_knows_no_batch(key):
    model = models.parse("cnn(features=(4,), norm='group')", 4)
    x = jax.random.uniform(key, (3, 8, 8, 3))
    variables = _variables(model, x.shape[1:])
    assert set(variables) == {"params"}
    together = model.apply(variables, x, train=True)
    # An image's own mean and variance are divided out, those of the others do not come in.
    alone = model.apply(variables, 5 * x[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_batch_statistics_change_in_training_only(name, key):
    model = models.parse(SMALL[name], 4)
    x = 2 + jax.random.uniform(key, (16, 8, 8, 3))
    variables = _variables(model, x.shape[1:])
    before = variables["batch_stats"]["BatchNorm_0"]

    @jax.jit
    def both(variables, x):
        evaluated, kept = model.apply(variables, x, mutable=["batch_stats"])
        trained, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        stem = variables["params"]["Conv_0"]["kernel"]
        out = jax.lax.conv_general_dilated(
            x, stem, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return evaluated, kept, trained, updated, out

    evaluated, kept, trained, updated, out = both(variables, x)
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"]["BatchNorm_0"], before)
    after = updated["batch_stats"]["BatchNorm_0"]
    # Running <- 0.9 running + 0.1 batch, the variance from 1.
    mean = 0.9 * before["mean"] + 0.1 * out.mean((0, 1, 2))
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 + 0.1 * out.var((0, 1, 2)), rtol=1e-4)
    assert not np.allclose(evaluated, trained, atol=1e-3)


@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
def test_gradient_reaches_every_parameter(text, key):
    model = models.parse(text, 4)
    x = jax.random.uniform(key, (4, 8, 8, 2))
    variables = _variables(model, x.shape[1:])

    @jax.jit
    def gradient(params):
        def loss(params):
            out, _ = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return -jax.nn.log_softmax(out)[:, 1].mean()

        return jax.grad(loss)(params)

    for path, g in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(g).all(), path
        # Adding the same number to all scores leaves a softmax as it is.
        if "key" not in jax.tree_util.keystr(path) or "kernel" in jax.tree_util.keystr(path):
            assert np.abs(g).max() > 0, path


@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
def test_bfloat16_computation_follows_float32(text, key):
    x = jax.random.uniform(key, (2, 8, 8, 3))
    full = models.parse(text, 4)
    half = models.parse(text.replace("(", "(dtype='bfloat16', ", 1), 4)
    assert half.dtype == "bfloat16"
    variables = _variables(full, x.shape[1:])
    expected, got = jax.jit(lambda x: (full.apply(variables, x), half.apply(variables, x)))(x)
    assert got.dtype == jnp.float32
    assert not np.array_equal(got, expected)
    np.testing.assert_allclose(got, expected, atol=0.1 * np.abs(expected).max() + 0.02)


def test_attention_maps(key):
    model = models.ViT(3, size="micro", patch=4)
    x = jax.random.uniform(key, (2, 8, 12, 1))
    variables = _variables(model, x.shape[1:])
    looking = jax.jit(functools.partial(model.apply, return_attention=True))
    logits, attention = looking(variables, x)
    assert attention.shape == (2, 4, 4, 7, 7)
    assert (attention >= 0).all()
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    assert logits.shape == (2, 3)
    # Swapping two patches, with their positions, swaps rows and columns of the first map.
    order = np.array([0, 2, 1, 3, 4, 5, 6])
    positions = variables["params"]["positions"][:, order]
    swapped = np.array(x)
    swapped[:, :4, :8] = np.roll(swapped[:, :4, :8], 4, axis=2)
    moved = {"params": {**variables["params"], "positions": positions}}
    _, other = looking(moved, swapped)
    np.testing.assert_allclose(other, attention[..., order, :][..., order], rtol=1e-4, atol=1e-6)


def test_resnet_computes_what_the_reference_computes():
    vectors = golden.load("decentral/public_merge_models")
    case = "resnet_N2_equal/merged/"
    state = {k.removeprefix(case): v for k, v in vectors.items() if k.startswith(case)}

    def conv(name):
        return {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0)}

    params, stats = {}, {}

    def norm(here, there, name):
        params_here, stats_here = here, there
        params_here |= {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}
        stats_here |= {"mean": state[f"{name}.running_mean"], "var": state[f"{name}.running_var"]}

    params["Conv_0"] = conv("conv1")
    norm(params.setdefault("BatchNorm_0", {}), stats.setdefault("BatchNorm_0", {}), "bn1")
    blocks = ["layer1.0", "layer2.0", "layer2.1", "layer3.0"]
    for i, block in enumerate(blocks):
        here, there = params.setdefault(f"Block_{i}", {}), stats.setdefault(f"Block_{i}", {})
        layers = [("conv1", "bn1"), ("conv2", "bn2")]
        if f"{block}.shortcut.0.weight" in state:
            layers.append(("shortcut.0", "shortcut.1"))
        for j, (c, n) in enumerate(layers):
            here[f"Conv_{j}"] = conv(f"{block}.{c}")
            norm(
                here.setdefault(f"BatchNorm_{j}", {}),
                there.setdefault(f"BatchNorm_{j}", {}),
                f"{block}.{n}",
            )
    params["head"] = {"kernel": state["linear.weight"].T, "bias": state["linear.bias"]}
    model = models.ResNet(5, width=0.25, blocks=(1, 2, 1))
    x = jnp.asarray(vectors["resnet_N2_equal/x"][:8].transpose(0, 2, 3, 1))
    logits = jax.jit(model.apply)({"params": params, "batch_stats": stats}, x)
    np.testing.assert_allclose(
        logits, vectors["resnet_N2_equal/merged_logits"], rtol=1e-4, atol=1e-5
    )


def test_errors_say_what_to_do():
    image = jnp.zeros((1, 8, 8, 1))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        models.parse("resnet", 10)
    with pytest.raises(TypeError, match=r"hiden.*it takes \(hidden="):
        models.parse("mlp(hiden=(3,))", 10)
    with pytest.raises(TypeError, match="num_classes"):
        models.parse("mlp(num_classes=3)", 10)
    with pytest.raises(ValueError, match=r"\[B, H, W, C\], got an array of shape \(8, 8, 1\)"):
        models.MLP(10).init(key, image[0])
    with pytest.raises(TypeError, match="float images, got uint8"):
        models.CNN(10).init(key, image.astype(jnp.uint8))
    with pytest.raises(ValueError, match="at least 16x16, got 8x8"):
        models.CNN(10, features=(2, 2, 2, 2)).init(key, image)
    with pytest.raises(ValueError, match="'batch' or 'group', got 'layer'"):
        models.CNN(10, norm="layer").init(key, image)
    with pytest.raises(ValueError, match="patch=3 does not divide an image of 8x8"):
        models.ViT(10, size="micro", patch=3).init(key, image)
    with pytest.raises(ValueError, match="unknown ViT size 'tny'; did you mean 'tiny'"):
        models.ViT(10, size="tny").init(key, image)
    with pytest.raises(ValueError, match="without channels"):
        models.ResNet(10, width=0.01).init(key, image)
