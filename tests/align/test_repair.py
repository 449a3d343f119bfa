import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mixlab import align, trees


class Net(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=self.momentum)(x)
        return nn.BatchNorm(use_running_average=False, momentum=self.momentum)(nn.relu(x))


BATCHES = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 16, 4)).astype(np.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_statistics_are_the_average_over_batches(momentum):
    net = Net(momentum)
    variables = net.init(jax.random.key(0), BATCHES[0])

    @jax.jit
    def fn(variables, batch):
        return net.apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]

    found = align.reestimate_batch_stats(fn, variables, iter(BATCHES), momentum=momentum)
    first = found["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(first["mean"], BATCHES.mean(1).mean(0), rtol=1e-5)
    # Flax's variance divides by the number of rows.
    np.testing.assert_allclose(first["var"], BATCHES.var(1).mean(0), rtol=1e-4)
    normal = (BATCHES - BATCHES.mean(1, keepdims=True)) / np.sqrt(
        BATCHES.var(1, keepdims=True) + 1e-5
    )
    second = np.maximum(normal, 0).mean(1).mean(0)
    np.testing.assert_allclose(found["batch_stats"]["BatchNorm_1"]["mean"], second, rtol=1e-4)
    assert found["params"] is variables["params"]


def test_dtypes_are_kept_and_averages_are_wide():
    variables = {"batch_stats": {"mean": jnp.zeros(2, jnp.bfloat16)}}
    batches = [jnp.full(2, v, jnp.bfloat16) for v in (256.0, 1.0, 1.0, 2.0)]
    found = align.reestimate_batch_stats(lambda v, x: {"mean": x}, variables, batches)
    assert found["batch_stats"]["mean"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["batch_stats"]["mean"].astype(jnp.float32), [65.0, 65.0])


def test_errors():
    variables = {"params": {}, "batch_stats": {"mean": jnp.zeros(2)}}

    def fn(variables, batch):
        return {"mean": batch}

    with pytest.raises(ValueError, match="no batches"):
        align.reestimate_batch_stats(fn, variables, [])
    with pytest.raises(ValueError, match="momentum"):
        align.reestimate_batch_stats(fn, variables, [jnp.ones(2)], momentum=1.0)
    with pytest.raises(KeyError, match="no collection 'stats'"):
        align.reestimate_batch_stats(fn, variables, [jnp.ones(2)], collection="stats")
    with pytest.raises(ValueError, match="'batch_stats' before and after fn"):
        align.reestimate_batch_stats(lambda v, b: {"var": b}, variables, [jnp.ones(2)])


def mlp(depth):
    def fn(variables, x):
        for i in range(depth):
            x = jnp.tanh(x @ variables[f"w{i}"] + variables[f"b{i}"])
        return x @ variables["out"]

    return fn


def mlp_variables(rng, widths):
    variables = {"out": rng.normal(size=(widths[-1], 2))}
    for i, shape in enumerate(itertools.pairwise(widths)):
        variables |= {f"w{i}": rng.normal(size=shape), f"b{i}": rng.normal(size=shape[1])}
    return {name: x.astype(np.float32) for name, x in variables.items()}


def preactivations(variables, x, depth):
    found = []
    for i in range(depth):
        found.append(x @ variables[f"w{i}"] + variables[f"b{i}"])
        x = np.tanh(found[-1])
    return found


RNG = np.random.default_rng(1)
PARENTS = [mlp_variables(RNG, (5, 7, 6, 8)) for _ in range(3)]
WEIGHTS = [0.5, 0.2, 0.3]
MERGED = {k: sum(w * p[k] for w, p in zip(WEIGHTS, PARENTS, strict=True)) for k in PARENTS[0]}
INPUTS = RNG.normal(size=(4, 64, 5)).astype(np.float32)
DEEP = mlp(3)


def wanted(x):
    """Means and deviations of every layer that the repaired model should have."""
    outputs = [preactivations(parent, x, 3) for parent in PARENTS]
    return [
        [
            sum(w * moment(own[i], axis=0) for w, own in zip(WEIGHTS, outputs, strict=True))
            for moment in (np.mean, np.std)
        ]
        for i in range(3)
    ]


def test_repaired_units_have_the_parents_mean_and_deviation():
    found = align.repair(DEEP, MERGED, PARENTS, INPUTS[:1], weights=WEIGHTS)
    for output, (mean, deviation) in zip(
        preactivations(found, INPUTS[0], 3), wanted(INPUTS[0]), strict=True
    ):
        np.testing.assert_allclose(output.mean(0), mean, atol=1e-5)
        np.testing.assert_allclose(output.std(0), deviation, rtol=1e-5)
    np.testing.assert_array_equal(found["out"], MERGED["out"])
    # Under jit the weights may be traced, as on a line.
    traced = jax.jit(lambda w: align.repair(DEEP, MERGED, PARENTS, INPUTS[:1], weights=w))(
        jnp.asarray(WEIGHTS)
    )
    for name, leaf in found.items():
        np.testing.assert_allclose(traced[name], leaf, rtol=1e-4, atol=1e-5)


def test_batches_are_pooled():
    rows = INPUTS.reshape(-1, 5)
    found = align.repair(DEEP, MERGED, PARENTS, iter(INPUTS), weights=WEIGHTS)
    outputs = preactivations(found, rows, 3)
    # The inputs of the first layer are the same whatever is corrected, so it is exact.
    for tolerance, output, (mean, deviation) in zip(
        (1e-5, 0.02, 0.04), outputs, wanted(rows), strict=True
    ):
        np.testing.assert_allclose(output.std(0), deviation, rtol=tolerance)
        np.testing.assert_allclose(output.mean(0), mean, atol=3 * tolerance)


def test_dead_units_and_dtypes():
    def half(variable, dead):
        variables = {k: jnp.asarray(v, jnp.bfloat16) for k, v in variable.items()}
        if dead:
            variables["w1"] = variables["w1"].at[:, 2].set(0)
        return {**variables, "steps": jnp.int32(3)}

    parents = [half(parent, True) for parent in PARENTS[:2]]
    found = align.repair(DEEP, parents[0], parents, INPUTS[:1].astype(jnp.bfloat16))
    assert all(leaf.dtype == parents[0][name].dtype for name, leaf in found.items())
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(found["w1"][:, 2], jnp.zeros(7, jnp.bfloat16))
    bias = (parents[0]["b1"][2].astype(float) + parents[1]["b1"][2].astype(float)) / 2
    assert float(found["b1"][2]) == pytest.approx(float(bias), rel=1e-2)


class Views(nn.Module):
    """Kernels and biases behind views, and layers that share leaves or have no bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(x))
        x = nn.tanh(nn.DenseGeneral((2, 4), axis=(2, 3))(x))
        w = self.param("turned", nn.initializers.normal(1.0), (2, 5, 4))
        b = self.param("shift", nn.initializers.normal(1.0), (10,))
        x = jnp.einsum("bthd,hed->beth", x, w) + b.reshape(2, 5).T[:, None]
        x = nn.tanh(x.transpose(0, 2, 3, 1).reshape(*x.shape[:1], x.shape[2], -1))
        x = nn.tanh(nn.Dense(10, use_bias=False, name="no_bias")(x))
        shared = nn.Dense(10, name="shared")
        x = nn.tanh(shared(nn.tanh(shared(x))))
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(4)(x)).mean(1))


def test_layers_are_found_through_views_and_convolutions():
    net = Views()
    x = jnp.asarray(RNG.normal(size=(4, 4, 4, 3)), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    parents = [
        jax.tree.map(lambda v: (RNG.normal(size=v.shape) / 3).astype(np.float32), shapes)
        for _ in range(2)
    ]
    merged = jax.tree.map(lambda a, b: (a + b) / 2, *parents)
    found = align.repair(net.apply, merged, parents, [x])
    same = {
        name.removeprefix("params/")
        for (name, old), (_, new) in zip(
            trees.named_leaves(merged), trees.named_leaves(found), strict=True
        )
        if np.array_equal(old, new)
    }
    left = {"no_bias/kernel", "shared/kernel", "shared/bias", "head/kernel", "head/bias"}
    assert same == left

    @jax.jit
    def outputs(variables):
        own = net.apply(variables, x, capture_intermediates=True)[1]["intermediates"]
        params = variables["params"]
        return {
            **{k: own[k]["__call__"][0] for k in ("ConvTranspose_0", "grouped")},
            "Dense_0": own["Dense_0"]["__call__"][0],
            "DenseGeneral_0": (h := own["DenseGeneral_0"]["__call__"][0]).reshape(*h.shape[:2], 8),
            "turned": jnp.einsum("bthd,hed->bthe", jnp.tanh(h), params["turned"]).reshape(4, 8, 10)
            + params["shift"],
        }

    ours, *theirs = (outputs(variables) for variables in (found, *parents))
    for name, output in ours.items():
        axes = tuple(range(output.ndim - 1))
        for moment in (jnp.mean, jnp.std):
            target = sum(moment(other[name], axis=axes) for other in theirs) / 2
            np.testing.assert_allclose(moment(output, axis=axes), target, rtol=1e-4, atol=1e-5)


def test_layers_inside_control_flow_are_warned_of():
    def fn(variables, x):
        x = jnp.tanh(x @ variables["in"] + variables["bias"])
        layers = variables["layers"], variables["biases"]
        x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer[0] + layer[1]), None), x, layers)
        return x @ variables["out"]

    shapes = {"in": (5, 4), "bias": 4, "layers": (2, 4, 4), "biases": (2, 4), "out": (4, 2)}
    parents = [
        {k: RNG.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
        for _ in range(2)
    ]
    merged = jax.tree.map(lambda a, b: (a + b) / 2, *parents)
    with pytest.warns(UserWarning, match="inside scan"):
        found = align.repair(fn, merged, parents, INPUTS[:1])
    changed = {name for name, leaf in found.items() if not np.array_equal(leaf, merged[name])}
    assert changed == {"in", "bias"}


def test_repair_errors():
    with pytest.raises(ValueError, match="no batches"):
        align.repair(DEEP, MERGED, PARENTS, [])
    with pytest.raises(ValueError, match="no models"):
        align.repair(DEEP, MERGED, [], INPUTS)
    with pytest.raises(ValueError, match="3 models need as many weights"):
        align.repair(DEEP, MERGED, PARENTS, INPUTS, weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="sum to 1"):
        align.repair(DEEP, MERGED, PARENTS, INPUTS, weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="the merged model and model 1"):
        align.repair(DEEP, MERGED, [MERGED, {"w0": MERGED["w0"]}], INPUTS)
    with pytest.raises(ValueError, match=r"nothing to repair.*reestimate_batch_stats"):
        align.repair(lambda v, x: jnp.tanh(x @ v["w0"] + v["b0"]), MERGED, PARENTS, INPUTS)
    sick = {**MERGED, "w1": MERGED["w1"] * np.nan}
    with pytest.raises(ValueError, match="layer of 'w1' contain NaN"):
        align.repair(DEEP, MERGED, [*PARENTS[:2], sick], INPUTS[:1])
