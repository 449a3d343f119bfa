import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import align, models
from mixlab.align.inference.layout import Fixed, take
from tests.align import networks

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def mlp_variables(sizes=(5, 6, 7, 3)):
    return [{"w": normal(m, n), "b": normal(n)} for m, n in itertools.pairwise(sizes)]


def mlp(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def variables_of(module):
    """Random variables, positive as variances must be: quicker than compiling `init`."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda x: np.abs(normal(*x.shape)) + np.float32(0.1), shapes)


@functools.cache
def infer(module):
    return align.infer_symmetry(module.apply, variables_of(module), IMAGES, check=False)


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (models.MLP(3, (6, 5)), [6, 5]),
        (models.CNN(3, (4, 6)), [4, 6]),
        # Three residual streams and one inner group a block.
        (models.ResNet(3, 1), [16] * 4 + [32] * 4 + [64] * 4),
        # GroupNorm keeps its groups: the groups among themselves, and positions within them.
        (networks.ConvNet(), [4, 2, 3, 5, 8]),
        # The channels that the padding adds stay free on either side of the padded ones.
        (networks.PaddedResidual(), [4, 2, 2]),
        (networks.Depthwise(), [6, 3, 2, 2, 4]),
        # Residual stream, heads, query-key and value dimensions inside heads, hidden units.
        (networks.Transformer(), [8, 2, 4, 4, 16]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_groups_of_networks(module, sizes):
    symmetry = infer(module)
    assert symmetry.notes == ()
    assert sorted(symmetry.groups.values()) == sorted(sizes), str(symmetry)
    assert symmetry.check(jax.random.key(1)) < 1e-9


def test_batch_statistics_move_with_their_channels():
    symmetry = infer(models.CNN(3, (4, 6)))
    layouts = symmetry.layouts
    assert layouts["batch_stats/BatchNorm_0/var"] == layouts["params/BatchNorm_0/scale"]
    assert layouts["params/BatchNorm_0/scale"][0] == layouts["params/Conv_0/kernel"][3]
    assert layouts["params/Conv_1/kernel"][2] == layouts["params/Conv_0/kernel"][3]


def test_training_mode_is_covered():
    module = networks.ConvNet()
    variables = variables_of(module)

    def fn(variables, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    symmetry = align.infer_symmetry(fn, variables, IMAGES)
    assert sorted(symmetry.groups.values()) == [2, 3, 4, 5, 8]
    assert any("batch_stats/BatchNorm_0/mean" in note for note in symmetry.notes)


def test_names_come_from_the_modules():
    assert list(infer(models.MLP(3, (6, 5))).groups) == ["Dense_0", "Dense_1"]
    plain = {"enc": {"w1": normal(4, 5), "w2": normal(5, 6)}, "head": normal(6, 2)}
    symmetry = align.infer_symmetry(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["enc"]["w1"]) @ p["enc"]["w2"]) @ p["head"],
        plain,
        normal(3, 4),
    )
    assert symmetry.groups == {"enc/w1": 5, "enc/w2": 6}
    attention = infer(networks.Transformer())
    assert "MultiHeadDotProductAttention_0/query.0" in attention.groups


def test_table_names_groups_leaves_and_notes():
    text = str(
        align.infer_symmetry(lambda p, x: jnp.fft.fft(x @ p).real, normal(3, 4), normal(2, 3))
    )
    assert "0 groups" in text
    assert "note: primitive 'fft' has no rule" in text
    text = str(infer(networks.ConvNet()))
    assert "[4 x Conv_2]" in text
    assert "params/Dense_0/kernel" in text


def test_abstract_variables_and_inputs():
    variables, x = mlp_variables(), normal(2, 5)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (variables, x))
    assert align.infer_symmetry(mlp, *abstract).groups == {"0": 6, "1": 7}


# ---------------------------------------------------------------- plain functions, control flow


def recurrent(p, x):
    def cell(h, xt):
        h = jnp.tanh(xt @ p["in"] + h @ p["rec"])
        return h, h.sum(-1)

    h, sums = jax.lax.scan(cell, jnp.zeros((x.shape[1], 4), p["in"].dtype), x)
    return h @ p["out"], sums


def looped(p, x):
    h = x @ p["a"]
    h = jax.lax.fori_loop(0, 3, lambda _, z: jnp.tanh(z * p["scale"]), h)
    return jax.lax.cond(h.sum() > 0, lambda z: jnp.exp(z), lambda z: -z, h) @ p["b"]


def repeated(p, x):
    def body(carry):
        i, h = carry
        return i + 1, jnp.tanh(h @ p["b"] @ p["c"]) + p["d"]

    h = jax.lax.while_loop(lambda carry: carry[1].sum() + carry[0] < 5, body, (0, x @ p["a"]))[1]
    return h @ p["out"]


@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defvjp(lambda x: (swish(x), x), lambda x, g: (g,))


def rematerialised(p, x):
    inner = jax.checkpoint(lambda h, w: jax.jit(swish)(h @ w))
    return inner(inner(x, p["a"]), p["b"]) @ p["c"]


def gated(p, x):
    a, b = jnp.split(x @ p["ab"], 2, axis=-1)
    return (a * jax.nn.silu(b)) @ p["out"]


def dense_block(p, x):
    h = jax.nn.relu(x @ p["a"])
    h = jnp.concatenate([h, jax.nn.relu(h @ p["b"])], axis=-1)
    return h @ p["c"]


def siamese(p, xy):
    left, right = (jnp.tanh(x @ p["a"]) for x in xy)
    return jnp.abs(left - right) @ p["b"]


def embedding(p, tokens):
    return jnp.tanh(p["table"][tokens]).mean(-2) @ p["out"]


def pair_product(p, x):
    return jnp.einsum("nd,de,me->nm", x, p["a"] @ p["b"].T, x)


@pytest.mark.parametrize(
    ("fn", "shapes", "x", "groups"),
    [
        (recurrent, {"in": (3, 4), "rec": (4, 4), "out": (4, 2)}, normal(5, 2, 3), {"in": 4}),
        (looped, {"a": (3, 4), "scale": (4,), "b": (4, 2)}, normal(2, 3), {"a": 4}),
        (
            repeated,
            {"a": (3, 4), "b": (4, 6), "c": (6, 4), "d": (4,), "out": (4, 2)},
            normal(2, 3),
            {"a": 4, "b": 6},
        ),
        (rematerialised, {"a": (3, 4), "b": (4, 5), "c": (5, 2)}, normal(2, 3), {"a": 4, "b": 5}),
        # One permutation acts on both halves of a fused gate.
        (gated, {"ab": (3, 8), "out": (4, 2)}, normal(2, 3), {"ab": 4}),
        (dense_block, {"a": (3, 4), "b": (4, 5), "c": (9, 2)}, normal(2, 3), {"a": 4, "b": 5}),
        (siamese, {"a": (3, 4), "b": (4, 2)}, normal(2, 5, 3), {"a": 4}),
        (embedding, {"table": (7, 4), "out": (4, 2)}, np.array([[1, 2], [3, 0]]), {"table": 4}),
        (pair_product, {"a": (3, 4), "b": (3, 4)}, normal(2, 3), {"a": 4}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_groups_of_plain_functions(fn, shapes, x, groups):
    variables = {name: normal(*shape) for name, shape in shapes.items()}
    symmetry = align.infer_symmetry(fn, variables, x, check=False)
    assert symmetry.notes == ()
    assert symmetry.groups == groups, str(symmetry)
    assert symmetry.check(jax.random.key(1)) < 1e-9


# ---------------------------------------------------------------- made to break it

RANDOM = normal(4, 4, seed=7)
NEARLY_ONE = np.array([1, 1, 1 + 1e-6, 1], np.float32)


@pytest.mark.parametrize(
    "middle",
    [
        lambda h, p: h[:, 1:3].sum(-1, keepdims=True) * h,
        lambda h, p: h.at[:, 0].set(0.0),
        lambda h, p: jax.nn.one_hot(jnp.argmax(h, -1), 4, dtype=h.dtype) * h,
        lambda h, p: jnp.take_along_axis(h, jnp.argmax(h, -1, keepdims=True), -1) * p["d"],
        lambda h, p: jnp.sort(h, axis=-1) * p["d"],
        lambda h, p: jnp.cumsum(h, axis=-1) * p["d"],
        lambda h, p: h[:, ::-1] + h,
        lambda h, p: jnp.roll(h, 1, axis=-1) * p["d"],
        lambda h, p: h @ RANDOM.astype(h.dtype),
        lambda h, p: h * NEARLY_ONE.astype(h.dtype),
        lambda h, p: h * jnp.linspace(0.0, 1.0, 4, dtype=h.dtype),
        # A square matrix used both ways ties its axes; the constant then fixes both.
        lambda h, p: h @ p["s"] @ p["s"].T + RANDOM[:1].astype(h.dtype) @ p["s"],
        lambda h, p: jnp.linalg.cholesky(h.T @ h + 9 * jnp.eye(4, dtype=h.dtype))[0] + h,
        lambda h, p: jax.lax.top_k(h, 4)[0] * p["d"],
        lambda h, p: jnp.where(jnp.arange(4) < 2, h, 0.0),
        lambda h, p: jnp.pad(h[:, :-1], ((0, 0), (1, 0))) + h,
        lambda h, p: jnp.diag(p["d"]) @ h[:1].T @ h[:1] + h[:1],
        lambda h, p: h.reshape(-1, 2, 2).swapaxes(1, 2).reshape(-1, 4) + h * RANDOM[0],
    ],
)
def test_axes_used_by_position_are_fixed(middle):
    def fn(p, x):
        return middle(jnp.tanh(x @ p["a"]), p) @ p["b"]

    shapes = {"a": (3, 4), "b": (4, 2), "d": (4,), "s": (4, 4)}
    variables = {name: normal(*shape) for name, shape in shapes.items()}
    symmetry = align.infer_symmetry(fn, variables, normal(2, 3))
    assert symmetry.layouts["a"] == (Fixed(3), Fixed(4)), str(symmetry)


def test_outer_product_of_a_layer_with_itself():
    # The Gram matrix is permuted on both axes at once; flattened before a dense layer, the layer
    # must follow as a product, and reading it by position fixes everything.
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h.T @ h).reshape(-1) @ p["b"]

    variables = {"a": normal(3, 4), "b": normal(16, 2)}
    symmetry = align.infer_symmetry(fn, variables, normal(2, 3))
    assert symmetry.groups == {"a": 4}

    def by_position(p, x):
        h = jnp.tanh(x @ p["a"])
        return h.T @ h, p["b"].sum()

    assert align.infer_symmetry(by_position, variables, normal(2, 3)).layouts["a"][1] == Fixed(4)


def test_reading_the_examples_against_each_other_keeps_features_free():
    def fn(p, x):
        h = jnp.tanh(x @ p)
        return h @ h.T

    assert align.infer_symmetry(fn, normal(3, 4), normal(2, 3)).groups == {"": 4}


# ---------------------------------------------------------------- permute


def test_permute_direction_and_leaf_kinds():
    variables = {
        "w1": jnp.asarray(normal(3, 4), jnp.bfloat16),
        "w2": jnp.asarray(normal(4, 2)),
        "steps": jnp.asarray(3, jnp.int32),
        "mask": jnp.array([True, False, True, True]),
        "nothing": None,
    }

    def fn(p, x):
        h = jnp.where(p["mask"], jnp.tanh(x @ p["w1"].astype(jnp.float32)), 0.0)
        return h @ p["w2"]

    symmetry = align.infer_symmetry(fn, variables, normal(2, 3))
    p = np.array([2, 0, 3, 1])
    permuted = symmetry.permute({"w1": p}, variables)
    np.testing.assert_array_equal(permuted["w1"], variables["w1"][:, p])
    np.testing.assert_array_equal(permuted["w2"], variables["w2"][p])
    np.testing.assert_array_equal(permuted["mask"], [True, True, True, False])
    assert permuted["nothing"] is None
    assert jax.tree.map(lambda x: x.dtype, permuted) == jax.tree.map(lambda x: x.dtype, variables)
    unchanged = symmetry.permute(symmetry.identity(), variables)
    jax.tree.map(np.testing.assert_array_equal, unchanged, variables)


def test_permute_under_jit_and_vmap():
    variables = jax.tree.map(jnp.asarray, mlp_variables())
    symmetry = align.infer_symmetry(mlp, variables, normal(2, 5), check=False)
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(lambda key: symmetry.permute(symmetry.random(key), variables)))(keys)
    one = symmetry.permute(symmetry.random(keys[1]), variables)
    jax.tree.map(lambda m, o: np.testing.assert_array_equal(m[1], o), many, one)
    for name, p in symmetry.random(keys[0]).items():
        np.testing.assert_array_equal(np.sort(p), np.arange(symmetry.groups[name]))


def test_optimizer_moments_follow_their_weights():
    module = models.CNN(3, (4, 6))
    symmetry = infer(module)
    params = symmetry.variables["params"]
    optimizer = optax.chain(optax.scale_by_rms(), optax.add_decayed_weights(0.1), optax.trace(0.9))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    gradients = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params
    )
    state = update(gradients, state, params)[1]
    p = symmetry.random(jax.random.key(2))
    moved = symmetry.permute(
        p, {"params": params, "opt": state, "ema": params, "step": jnp.asarray(4)}
    )
    expected = symmetry.permute(p, symmetry.variables)["params"]
    jax.tree.map(np.testing.assert_array_equal, moved["ema"], expected)
    # Updating and permuting commute.
    later = update(symmetry.permute(p, gradients), moved["opt"], moved["params"])[0]
    first = symmetry.permute(p, update(gradients, state, params)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), later, first)
    statistics = symmetry.permute(p, symmetry.variables["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal,
        statistics,
        symmetry.permute(p, symmetry.variables)["batch_stats"],
    )


# ---------------------------------------------------------------- activations


def test_activations_are_the_values_that_the_next_layer_reads():
    layers, x = mlp_variables(), normal(9, 5)
    symmetry = align.infer_symmetry(mlp, layers, normal(2, 5), check=False)
    found = symmetry.activations(layers, x)
    h = jax.nn.relu(x @ layers[0]["w"] + layers[0]["b"])
    np.testing.assert_allclose(found["0"], h, rtol=1e-5)
    h = jax.nn.relu(h @ layers[1]["w"] + layers[1]["b"])
    np.testing.assert_allclose(found["1"], h, rtol=1e-4)


def test_activations_permute_with_the_units():
    symmetry = infer(networks.ConvNet())
    p = symmetry.random(jax.random.key(3))
    x = IMAGES[:1]
    before = symmetry.jitted_activations(symmetry.variables, x)
    after = symmetry.jitted_activations(symmetry.permute(p, symmetry.variables), x)
    # The two groups of a GroupNorm are seen together, by the positions inside them.
    assert symmetry.over["Conv_1.1"] == ("Conv_1.0",)
    assert {name: a.shape[1:] for name, a in before.items()} == {
        "Conv_0": (4,), "Conv_1.1": (2, 3), "Conv_2": (5,), "Dense_0": (8,)
    }  # fmt: skip
    assert before["Conv_0"].shape[0] == 16  # after max pooling
    for name, values in before.items():
        layout = (Fixed(len(values)), *symmetry.layout_of_group(name))
        moved = take(values, layout, p)
        np.testing.assert_allclose(after[name], moved, rtol=1e-4, atol=1e-5)


def test_residual_stream_is_read_at_its_end_before_pooling():
    symmetry = infer(networks.PaddedResidual())
    a = symmetry.jitted_activations(symmetry.variables, IMAGES)
    assert a["Conv_0"].shape == (2 * 4 * 4, 4)


# ---------------------------------------------------------------- errors


def test_output_that_ignores_the_variables():
    with pytest.raises(ValueError, match="depends on its variables"):
        align.infer_symmetry(lambda v, x: x + 1, mlp_variables(), normal(2, 5))


@pytest.mark.parametrize("wrong", [3, None, "mlp"])
def test_what_is_no_function_is_not_traced(wrong):
    with pytest.raises(TypeError, match=f"fn is a function of .*, got {wrong!r}"):
        align.infer_symmetry(wrong, mlp_variables(), normal(2, 5))


def test_nan_output_proves_nothing():
    with pytest.raises(ValueError, match="NaN"):
        align.infer_symmetry(lambda v, x: jnp.log(-jnp.abs(x @ v)), normal(3, 4), normal(2, 3))


def test_unused_leaf_is_fixed_and_noted():
    variables = {"used": normal(3, 4), "out": normal(4, 2), "unused": normal(5)}
    symmetry = align.infer_symmetry(
        lambda v, x: jnp.tanh(x @ v["used"]) @ v["out"], variables, normal(2, 3)
    )
    assert symmetry.groups == {"used": 4}
    assert symmetry.notes == ("leaf 'unused' does not influence the output: its axes are fixed",)


def test_permute_errors():
    layers = mlp_variables()
    symmetry = align.infer_symmetry(mlp, layers, normal(2, 5), check=False)
    with pytest.raises(KeyError, match="no group '9'"):
        symmetry.permute({"9": np.arange(6)}, layers)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        symmetry.permute({"0": np.arange(5)}, layers)
    with pytest.raises(ValueError, match="integer"):
        symmetry.permute({"0": np.arange(6.0)}, layers)
    with pytest.raises(ValueError, match="not a permutation"):
        symmetry.permute({"0": np.array([0, 0, 1, 2, 3, 4])}, layers)
    with pytest.raises(ValueError, match="not a permutation"):
        symmetry.permute({"0": [0, 0, 1, 2, 3, 4]}, layers)
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        symmetry.permute({"0": [0, 1]}, layers)
    with pytest.raises(ValueError, match="'other' of shape"):
        symmetry.permute({}, {"other": normal(6, 6)})


def test_a_permutation_may_be_a_list():
    layers = mlp_variables()
    symmetry = align.infer_symmetry(mlp, layers, normal(2, 5), check=False)
    p = [2, 0, 1, 5, 3, 4]
    found = symmetry.permute({"0": p}, layers)
    np.testing.assert_array_equal(found[0]["w"], np.asarray(layers[0]["w"])[:, p])
    np.testing.assert_array_equal(found[1]["w"], np.asarray(layers[1]["w"])[p])
    np.testing.assert_array_equal(symmetry.inverse({"0": p})["0"], np.argsort(p))
    np.testing.assert_array_equal(
        symmetry.compose({"0": p}, {"0": p})["0"], np.asarray(p)[np.asarray(p)]
    )


@pytest.mark.parametrize("key", [0, None, "0", np.zeros(2)])
def test_a_key_is_a_key(key):
    layers = mlp_variables()
    symmetry = align.infer_symmetry(mlp, layers, normal(2, 5), check=False)
    draws = [
        symmetry.random,
        symmetry.check,
        lambda key: align.sinkhorn_matching(symmetry, None, layers, layers, key=key),
        lambda key: align.straight_through(symmetry, mlp, layers, layers, [], key=key),
    ]
    if key is not None:
        draws += [
            lambda key: align.weight_matching(symmetry, layers, layers, key=key),
            lambda key: align.weight_universe(symmetry, [layers, layers], key=key),
            lambda key: align.infer_symmetry(mlp, layers, normal(2, 5), key=key),
        ]
    for draw in draws:
        with pytest.raises(TypeError, match=r"key is a PRNG key such as jax.random.key\(0\), got"):
            draw(key)
    old, typed = jax.random.PRNGKey(1), jax.random.key(1)
    jax.tree.map(np.testing.assert_array_equal, symmetry.random(old), symmetry.random(typed))


def test_hand_written_specification():
    layers = mlp_variables()
    axes = {
        "0/w": (None, "first"), "0/b": ("first",),
        "1/w": ("first", "second"), "1/b": ("second",),
        "2/w": ("second", None), "2/b": (None,),
    }  # fmt: skip
    symmetry = align.Symmetry.from_axes(axes, layers, mlp, normal(2, 5))
    assert symmetry.groups == {"first": 6, "second": 7}
    assert set(symmetry.activations(layers, normal(4, 5))) == {"first", "second"}

    with pytest.raises(ValueError, match=r"At fault: first .*leaves 0/w, 1/w"):
        align.Symmetry.from_axes({**axes, "0/b": (None,)}, layers, mlp, normal(2, 5))
    wrong = {**axes, "2/w": ("second", "out"), "2/b": ("out",)}
    with pytest.raises(ValueError, match=r"At fault: out .*leaves 2/b, 2/w"):
        align.Symmetry.from_axes(wrong, layers, mlp, normal(2, 5))
    with pytest.raises(KeyError, match="lacks"):
        align.Symmetry.from_axes({k: v for k, v in axes.items() if k != "1/b"}, layers)
    with pytest.raises(KeyError, match="no leaf '3/w'"):
        align.Symmetry.from_axes({**axes, "3/w": (None,)}, layers)
    with pytest.raises(ValueError, match="entries"):
        align.Symmetry.from_axes({**axes, "0/w": ("first",)}, layers)
    with pytest.raises(ValueError, match="has 6 units"):
        align.Symmetry.from_axes({**axes, "1/b": ("first",)}, layers)
    unproved = align.Symmetry.from_axes(axes, layers)
    with pytest.raises(ValueError, match="without a function"):
        unproved.check(jax.random.key(0))
    with pytest.raises(ValueError, match="without a function"):
        unproved.activations(layers, normal(2, 5))
    with pytest.raises(ValueError, match="does not admit"):
        align.activation_matching(
            unproved, lambda v, x: jnp.cumsum(mlp(v, x) + v[0]["b"].sum(), 1) + v[0]["b"][:3],
            layers, layers, normal(2, 5),
        )  # fmt: skip
