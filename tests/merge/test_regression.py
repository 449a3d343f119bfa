"""RegMean, RegMean++ and the Gram matrices they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mixlab import merge, trees
from tests.reference import merging_regression as reference

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def gram(x):
    return {"w": x.T @ x / len(x)}


def run(method, models, grams):
    return jax.jit(method)(models, grams=grams)


def test_regressors_merge_to_the_regression_on_all_data():
    """The fits of two data sets of different sizes merge to the fit of both together."""
    scales = np.asarray([1, 1e-3, 1, 20], np.float32)
    inputs, targets = [normal(n, 4) * scales for n in (20, 60)], [normal(20, 3), normal(60, 3)]
    models = [{"w": np.linalg.lstsq(x, y)[0]} for x, y in zip(inputs, targets, strict=True)]
    merged = run(merge.regmean(weights=[20, 60]), models, [gram(x) for x in inputs])["w"]
    expected = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets))[0]
    np.testing.assert_allclose(merged * scales[:, None], expected * scales[:, None], atol=1e-5)


def test_directions_without_inputs_keep_the_mean():
    """Whether they are axes, where the factor is sure, or turned, where eigenvalues are needed."""
    models = [{"w": normal(5, 2)} for _ in range(2)]
    mean = (models[0]["w"] + models[1]["w"]) / 2
    seen = [normal(9, 3) for _ in range(2)]
    padded = [np.pad(x, ((0, 0), (0, 2))) for x in seen]
    expected = mean.copy()
    expected[:3] = reference.regmean([m["w"][:3] for m in models], [gram(x)["w"] for x in seen])
    merged = run(merge.regmean(), models, [gram(x) for x in padded])["w"]
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(merged[3:], mean[3:])

    turn = np.linalg.qr(normal(5, 5))[0]
    turned = [{"w": turn.T @ m["w"]} for m in models]
    merged = run(merge.regmean(), turned, [gram(x @ turn) for x in padded])["w"]
    # Of the answers to the inputs there is one that is best; in the rest W stays bounded.
    np.testing.assert_allclose((turn @ merged)[:3], expected[:3], atol=1e-2)
    assert np.max(np.abs(merged)) < 10


def test_off_diagonal_weights_and_ridge():
    models = [{"w": normal(3, 2)} for _ in range(2)]
    grams = [gram(normal(9, 3)) for _ in models]
    merged = run(merge.regmean(0.6, [1, 3], ridge=0.2), models, grams)["w"]
    expected = reference.regmean(
        [m["w"] for m in models], [g["w"] for g in grams], 0.6, [1, 3], ridge=0.2
    )
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)


def test_gradient_through_many_merges_at_once():
    """With respect to `off_diagonal`, at 1 of a singular matrix whose eigenvalues are equal."""
    models = [{"w": normal(4, 2)} for _ in range(2)]
    eye, ones = np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32)
    grams = [{"w": np.kron(eye, ones)}, {"w": np.kron(ones, eye)}]

    @jax.jit
    @jax.vmap
    def both(ratio):
        def loss(ratio):
            return jnp.sum(merge.regmean(ratio)(models, grams=grams)["w"] ** 2)

        return loss(ratio), jax.grad(loss)(ratio)

    values, slopes = both(jnp.asarray([0.49, 0.5, 0.51, 1.0]))
    assert np.all(np.isfinite(slopes))
    np.testing.assert_allclose(slopes[1], (values[2] - values[0]) / 0.02, rtol=1e-2, atol=1e-3)


def test_wrong_grams():
    models = [{"w": np.ones((2, 3, 4), np.float32), "n": 1}] * 2
    eye = np.eye(6, dtype=np.float32)
    regmean = merge.regmean()
    with pytest.raises(ValueError, match="grams="):
        regmean(models)
    with pytest.raises(ValueError, match="each of the 2 models, got 1"):
        regmean(models, grams=[{"w": eye}])
    with pytest.raises(ValueError, match=r"one of \[2, 6, 24\], got float32\[3, 3\]"):
        regmean(models, grams=[{"w": eye[:3, :3]}] * 2)
    with pytest.raises(ValueError, match=r"must be floating .* got int32\[6, 6\]"):
        regmean(models, grams=[{"w": np.eye(6, dtype=np.int32)}] * 2)
    for name in ("v", "n"):
        with pytest.raises(ValueError, match=f"'{name}', which is no floating leaf"):
            regmean(models, grams=[{name: eye}] * 2)
    wrong = eye.copy()
    for bad in (np.nan, np.inf, 0.5):
        wrong[1, 2] = bad
        with pytest.raises(
            ValueError, match=rf"leaf 'w' of model 1 must be finite and sym.* got {bad} at \[1, 2\]"
        ):
            regmean(models, grams=[{"w": eye}, {"w": wrong}])
    wrong[1, 2] = np.nan
    different = [models[0], models[0] | {"w": np.zeros((2, 3, 4), np.float32)}]
    merged = jax.jit(regmean)(different, grams=[{"w": eye}, {"w": wrong}])
    assert np.isnan(merged["w"]).any()
    with pytest.raises(ValueError, match="off_diagonal"):
        merge.regmean(1.5)
    with pytest.raises(ValueError, match="ridge"):
        merge.regmean(ridge=-1.0)


class Net(nn.Module):
    """Every kind of layer that is seen, one that is called twice, and two that are not seen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), name="conv")(x)
        x = nn.Conv(6, (2, 2), feature_group_count=3, name="grouped")(x)
        x = x.reshape(len(x), -1, 6)
        x = nn.remat(nn.Dense)(6, name="remat")(x)
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.DenseGeneral(4, axis=(-2, -1), name="joined")(x)
        shared = nn.Dense(4, name="shared")
        return shared(nn.relu(shared(x)))


APPLY = Net().apply


@functools.cache
def net():
    x = normal(6, 4, 4, 2)
    return x, jax.jit(Net().init)(jax.random.key(0), x)


def test_grams_of_a_linen_model():
    x, variables = net()
    grams = merge.grams(APPLY, variables, [x[:3], x[3:]])
    trees.check_same_structure(grams, variables)
    grams = grams["params"]
    assert {name for name, leaf in trees.named_leaves(grams) if leaf is not None} == {
        f"{name}/kernel" for name in ("conv", "joined", "shared", "split")
    }
    capture = functools.partial(APPLY, capture_intermediates=True, mutable="intermediates")
    _, found = jax.jit(capture)(variables, x)
    outputs = {
        name: [np.asarray(y, np.float64) for y in found["intermediates"][name]["__call__"]]
        for name in ("remat", "split", "joined", "shared")
    }
    both = np.concatenate([outputs["joined"][0], np.maximum(outputs["shared"][0], 0)])
    rows = {
        "conv": reference.patches(x, (3, 2), strides=(2, 1), dilation=(1, 2)),
        "split": outputs["remat"][0].reshape(-1, 6),
        "joined": outputs["split"][0].reshape(-1, 6),
        "shared": both.reshape(-1, 4),
    }
    for name, each in rows.items():
        expected = each.T @ each / len(each)
        np.testing.assert_allclose(grams[name]["kernel"], expected, rtol=1e-4, atol=1e-5)
    # They fit the kernels, whatever their axes.
    conv = {name: variables["params"]["conv"][name] for name in ("kernel", "bias")}
    merged = run(merge.regmean(), [conv] * 2, [grams["conv"]] * 2)
    np.testing.assert_allclose(merged["kernel"], conv["kernel"], rtol=1e-6)


def test_grams_of_some_layers():
    x, variables = net()
    some = merge.grams(APPLY, variables, iter([x]), layers=["params/split"])["params"]
    assert some["split"]["kernel"].shape == (6, 6)
    assert some["joined"]["kernel"] is None
    for wrong in ("params/grouped", "params/spli", "split"):
        with pytest.raises(ValueError, match=f"no linear layer '{wrong}' was seen"):
            merge.grams(APPLY, variables, [x[:3]], layers=[wrong])
    with pytest.raises(ValueError, match="at least one batch"):
        merge.grams(APPLY, variables, [])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Named against the order in which they run.
        x = nn.relu(nn.Dense(4, name="b")(x))
        return nn.relu(nn.Dense(4, name="a")(x))


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Block(name="trunk")(x))


PATHS = (("trunk", "b"), ("trunk", "a"), ("head",))


@pytest.mark.parametrize(
    ("layers", "blocks"), [(None, (1, 1, 1)), (["params/trunk", "params/head"], (2, 1))]
)
def test_regmean_plus_plus(layers, blocks):
    rng = np.random.default_rng(1)
    data = [rng.normal(size=(40, 3)).astype(np.float32) for _ in range(2)]
    init = jax.jit(Chain().init)
    models = [init(jax.random.key(i), data[0]) for i in range(2)]
    models = [jax.tree.map(lambda w: w + 0.3, model) for model in models]

    def chain(model):
        parts = [functools.reduce(lambda tree, key: tree[key], p, model["params"]) for p in PATHS]
        return [(np.asarray(part["kernel"]), np.asarray(part["bias"])) for part in parts]

    merged = merge.regmean_plus_plus(
        Chain().apply, models, [[x[:25], x[25:]] for x in data], layers=layers
    )
    expected = reference.regmean_plus_plus([chain(m) for m in models], data, blocks)
    for (kernel, bias), (expected_kernel, expected_bias) in zip(
        chain(merged), expected, strict=True
    ):
        np.testing.assert_allclose(kernel, expected_kernel, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(bias, expected_bias, rtol=1e-5)


def test_wrong_batches_for_regmean_plus_plus():
    x, variables = net()
    with pytest.raises(ValueError, match="each of the 2 models, got 1"):
        merge.regmean_plus_plus(APPLY, [variables] * 2, [[x]])
    with pytest.raises(ValueError, match="not iterators"):
        merge.regmean_plus_plus(APPLY, [variables], [iter([x])])
