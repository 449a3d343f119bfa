"""Which groups are found in the architectures that are in use, each proved in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixlab import align, models
from mixlab.align.inference import rules
from mixlab.align.inference.layout import Atom, Fixed
from tests.align import networks

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = RNG.integers(0, 11, size=(2, 5)).astype(np.int32)
SERIES = RNG.normal(size=(2, 4, 3)).astype(np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def random_like(shapes):
    """Random variables of both signs, statistics positive: quicker than compiling `init`."""

    def draw(path, leaf):
        values = RNG.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        positive = "batch_stats" in jax.tree_util.keystr(path)
        return (np.abs(values) + 0.1 if positive else values).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def infer(module, *inputs):
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return align.infer_symmetry(module.apply, variables, *inputs, check=False)


@pytest.mark.parametrize(
    ("module", "inputs", "sizes"),
    [
        # One group a layer.
        (networks.VGG(), IMAGES, [4, 5, 6, 7, 9, 8]),
        # The stem, the stream of each of four stages, two inner groups in each of 16 blocks.
        (
            networks.ResNet50(2),
            IMAGES,
            [2] + [8, 16, 32, 64] + [2] * 6 + [4] * 8 + [8] * 12 + [16] * 6,
        ),
        # The stream; groups, and channels in them before and behind the grouped convolution.
        (networks.ResNeXt(), IMAGES, [8, 3, 2, 4]),
        # The stem, and for each stage its stream and one inner group in each of two blocks.
        (networks.WideResNet(), IMAGES, [4] + [6] * 3 + [8] * 3 + [10] * 3),
        # Every layer's new channels and every bottleneck by itself: nothing is summed.
        (networks.DenseNet(), IMAGES, [4, 6, 3, 6, 3, 5, 6, 3]),
        # The stem is tied to the first block's output; expanded and squeezed channels are free.
        (networks.MobileNet(), IMAGES, [4, 8, 2, 12, 3, 6]),
        # A stream and hidden units for each of two stages.
        (networks.ConvNeXt(), IMAGES, [5, 20, 6, 24]),
        # The channels, and in each block hidden units over patches and over channels.
        (networks.Mixer(), IMAGES, [6, 5, 9, 5, 9]),
        # The stream; in each block heads, query-key and value dimensions in them, hidden units.
        (models.ViT(3, "micro"), IMAGES, [64] + [4, 16, 16, 256] * 4),
        # As in a ViT: the three parts of the fused projection share their heads.
        (networks.WindowAttention(), IMAGES, [8, 2, 4, 4]),
        # The latents themselves, their features, heads, and dimensions in heads.
        (networks.Perceiver(), SERIES, [5, 6, 2, 2, 2]),
        # The stream, inner channels, the rank of the steps, the state of each channel.
        (networks.Mamba(), SERIES, [6, 8, 2, 5]),
        (networks.UNet(), IMAGES, [4, 6, 5, 7, 8]),
        # As in a ViT, once for all the layers.
        (networks.GPT(), TOKENS, [8, 2, 3, 3, 16]),
        # Rotations tell the query-key dimensions apart. Two heads of keys and values, three
        # queries to each, and the value dimensions.
        (networks.Llama(), TOKENS, [8, 2, 3, 5, 10]),
        # Hidden state, cell state and the four gates are permuted together.
        (networks.LSTM(), SERIES, [6]),
        (networks.Recurrent(), SERIES, [4, 5, 7]),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "apply") else "",
)
def test_groups_of_architectures(module, inputs, sizes):
    symmetry = infer(module, inputs)
    assert symmetry.notes == ()
    assert sorted(symmetry.groups.values()) == sorted(sizes), str(symmetry)
    # Flax's norms mix precisions when the variables are in float64.
    with jax.numpy_dtype_promotion("standard"):
        assert symmetry.check(jax.random.key(1)) < 1e-9


# ---------------------------------------------------------------- containers


def test_nnx():
    net = nnx.eval_shape(lambda: networks.NNX(nnx.Rngs(0)))
    net.eval()
    graph, state = nnx.split(net)
    state = jax.tree.map(lambda x: np.abs(normal(*x.shape)) + np.float32(0.1), state)
    symmetry = align.infer_symmetry(lambda state, x: nnx.merge(graph, state)(x), state, IMAGES)
    assert symmetry.groups == {"conv": 4, "hidden/0": 5, "hidden/1": 6}
    assert set(symmetry.leaves_of("conv")) == {
        "conv/bias", "conv/kernel", "hidden/0/kernel", "norm/bias", "norm/mean", "norm/scale",
        "norm/var",
    }  # fmt: skip
    permuted = symmetry.permute(symmetry.random(jax.random.key(1)), state)
    assert isinstance(permuted, nnx.State)
    assert jax.tree.structure(permuted) == jax.tree.structure(state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    weight: jax.Array
    bias: jax.Array | None
    name: str = dataclasses.field(metadata={"static": True}, default="linear")

    def __call__(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    layers: tuple[Linear, ...]
    head: Linear

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)


def test_modules_that_are_pytrees():
    layers = tuple(Linear(normal(m, n), normal(n)) for m, n in ((3, 4), (4, 5)))
    network = Network(layers, Linear(normal(5, 2), None))
    symmetry = align.infer_symmetry(lambda network, x: network(x), network, normal(2, 3))
    assert symmetry.groups == {"layers/0": 4, "layers/1": 5}
    permutation = np.array([3, 1, 0, 2])
    permuted = symmetry.permute({"layers/0": permutation}, network)
    assert isinstance(permuted, Network)
    np.testing.assert_array_equal(permuted.layers[0].bias, layers[0].bias[permutation])
    np.testing.assert_array_equal(permuted.layers[1].weight, layers[1].weight[permutation])


# ---------------------------------------------------------------- ways to write the same thing


def hand_written_lstm(p, x):
    """Rows of the kernel are input and hidden state; the gates are sliced out of one product."""

    def cell(carry, xt):
        h, c = carry
        gates = jnp.concatenate([xt, h], -1) @ p["kernel"] + p["bias"]
        i, f, g, o = (gates[:, k * 4 : (k + 1) * 4] for k in range(4))
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), None

    zeros = jnp.zeros((x.shape[1], 4), x.dtype)
    (h, _), _ = jax.lax.scan(cell, (zeros, zeros), x)
    return h @ p["out"]


def attend(q, k, v):
    """Attention between [B, T, heads, d]."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


def split_projection(p, x):
    q, k, v = (z.reshape(2, 5, 2, 3) for z in jnp.split(x @ p["qkv"], 3, axis=-1))
    return attend(q, k, v) @ p["out"]


def heads_outermost(p, x):
    q, k, v = jnp.split((x @ p["qkv"]).reshape(2, 5, 2, 9), 3, axis=-1)
    return attend(q, k, v) @ p["out"]


def heads_innermost(p, x):
    q, k, v = jnp.unstack((x @ p["qkv"]).reshape(2, 5, 3, 2, 3), axis=2)
    return attend(q, k, v) @ p["out"]


def builtin_attention(p, x):
    q, k, v = ((x @ p[name]).reshape(2, 5, 2, 3) for name in ("q", "k", "v"))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(2, 5, -1) @ p["out"]


def grouped_queries(p, x):
    q = jnp.einsum("btc,cgrd->btgrd", x, p["q"])
    k, v = (jnp.einsum("btc,cgd->btgd", x, p[name]) for name in ("k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bqgrd,bkgd->bgrqk", q, k))
    return jnp.einsum("bgrqk,bkgd,grdo->bqo", weights, v, p["out"])


def mixture_of_experts(p, x):
    weights = jax.nn.softmax(x @ p["router"])
    hidden = jax.nn.silu(jnp.einsum("bc,ech->beh", x, p["up"]))
    return jnp.einsum("be,beh,eho->bo", weights, hidden, p["down"])


def message_passing(p, x):
    source, target = jnp.array([0, 1, 2, 2], jnp.int32), jnp.array([1, 2, 0, 1], jnp.int32)
    h = jnp.tanh(x @ p["node"])
    h = h + jax.ops.segment_sum(jnp.tanh(h[source] @ p["edge"]) @ p["back"], target, 3)
    return h.at[0].add(p["bias"]) @ p["out"]


def pixel_shuffle(p, x):
    h = jnp.tanh(x @ p["a"]).reshape(2, 2, 2, 3)
    return jnp.tanh(h.transpose(1, 0, 2, 3).reshape(4, 2, 3)) @ p["b"]


def branches(p, x):
    h = x @ p["a"]
    small = [jnp.tanh, lambda z: z * p["scale"], lambda z: -z]
    h = jax.lax.switch(x.sum().astype(jnp.int32) % 3, small, h)
    h = jax.lax.cond(x.sum() > 0, lambda z: z @ p["b"], lambda z: z @ p["c"], h)
    return h @ p["out"]


WAYS = [
    # One permutation of hidden units, cell and gates; the rows of the input stay.
    (hand_written_lstm, {"kernel": (7, 16), "bias": (16,), "out": (4, 2)}, normal(5, 2, 3), [4]),
    # Heads, query-key dimensions, value dimensions, however the projections are laid out.
    (split_projection, {"qkv": (4, 18), "out": (6, 2)}, normal(2, 5, 4), [2, 3, 3]),
    (heads_outermost, {"qkv": (4, 18), "out": (6, 2)}, normal(2, 5, 4), [2, 3, 3]),
    (heads_innermost, {"qkv": (4, 18), "out": (6, 2)}, normal(2, 5, 4), [2, 3, 3]),
    (
        builtin_attention,
        {"q": (4, 6), "k": (4, 6), "v": (4, 6), "out": (6, 2)},
        normal(2, 5, 4),
        [2, 3, 3],
    ),
    # Groups of heads, heads in a group, and the dimensions as ever.
    (
        grouped_queries,
        {"q": (4, 2, 3, 5), "k": (4, 2, 5), "v": (4, 2, 6), "out": (2, 3, 6, 3)},
        normal(2, 5, 4),
        [2, 3, 5, 6],
    ),
    # The experts are units themselves; hidden units are permuted alike in all of them.
    (
        mixture_of_experts,
        {"router": (4, 3), "up": (3, 4, 5), "down": (3, 5, 2)},
        normal(2, 4),
        [3, 5],
    ),
    (
        message_passing,
        {"node": (4, 5), "edge": (5, 6), "back": (6, 5), "bias": (5,), "out": (5, 2)},
        normal(3, 4),
        [5, 6],
    ),
    # Positions in the channels stay where they are, the channels in a position do not.
    (pixel_shuffle, {"a": (4, 12), "b": (3, 2)}, normal(2, 4), [3]),
    (
        branches,
        {"a": (3, 4), "scale": (4,), "b": (4, 5), "c": (4, 5), "out": (5, 2)},
        normal(2, 3),
        [4, 5],
    ),
]


def test_ways_to_write_a_network():
    # One program for all of them, since compiling is what takes time.
    variables = {
        fn.__name__: {name: normal(*shape) for name, shape in shapes.items()}
        for fn, shapes, _, _ in WAYS
    }

    def every(variables, inputs):
        return {fn.__name__: fn(variables[fn.__name__], inputs[fn.__name__]) for fn, *_ in WAYS}

    symmetry = align.infer_symmetry(every, variables, {fn.__name__: x for fn, _, x, _ in WAYS})
    assert symmetry.notes == ()
    for fn, _, _, sizes in WAYS:
        found = [size for name, size in symmetry.groups.items() if name.startswith(fn.__name__)]
        assert sorted(found) == sorted(sizes), f"{fn.__name__}: {symmetry}"


def test_a_defective_rule_is_caught(monkeypatch):
    monkeypatch.setitem(rules._RULES, "cumsum", rules._RULES["exp"])
    variables = {"a": normal(3, 4), "b": normal(4, 2)}

    def fn(p, x):
        return jnp.cumsum(x @ p["a"], axis=1) @ p["b"]

    with pytest.raises(ValueError, match=r"not invariant.* At fault: a .*leaves a, b\)"):
        align.infer_symmetry(fn, variables, normal(2, 3))


# ---------------------------------------------------------------- primitives

OTHER = jnp.array([1, 0], jnp.int32)
MIXED = jnp.array([0, 1, 1, 0], jnp.int32)


def pool(h, window):
    return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, (1, 1), "SAME")


def pool_gradient(h, window):
    # Linear in what is pooled, so that the pooling itself is not needed.
    return jax.grad(lambda z: pool(z, window).sum())(h)


def pool_tangent(h, window):
    return jax.jvp(lambda z: pool(z, window), (h,), (h * h,))[1]


def mask(*shape):
    return jax.random.bernoulli(jax.random.key(3), 0.5, shape)


def grouped_by_example(h, p):
    """The gradient of a depthwise convolution for its kernel: its groups lie in the batch."""
    image = h.T[:, :, None]
    return jax.lax.conv_general_dilated(
        image, p["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
        batch_group_count=4,
    )[0, :1]  # fmt: skip


def general_pool(h, window):
    zero = jnp.zeros((), h.dtype)
    return jax.lax.reduce_window(h, zero, jnp.hypot, window, (1, 1), "SAME")


def general_sum(h, axis):
    return jnp.expand_dims(jax.lax.reduce(h, jnp.zeros((), h.dtype), jnp.hypot, (axis,)), axis)


def write(row, i):
    return row.at[i].add(1.0)


KEEP = {
    "rows paired with one index": lambda h, p: jnp.take_along_axis(h, OTHER[:, None], 0),
    "one index for all": lambda h, p: jax.vmap(lambda row: row[1], 1)(h)[None] * h,
    "segment sum": lambda h, p: jax.ops.segment_sum(h, OTHER, 3)[:2],
    "segment maximum": lambda h, p: jax.ops.segment_max(h, OTHER, 2),
    "scatter whole rows": lambda h, p: h.at[0].set(p["d"]),
    "scatter into zeros": lambda h, p: jnp.zeros_like(h).at[OTHER].set(h),
    "multiply rows in place": lambda h, p: h.at[1].multiply(p["d"]),
    "update in each column": lambda h, p: jax.vmap(lambda c: write(c, 0), 1, 1)(h),
    "gradient of pooling": lambda h, p: pool_gradient(h, (2, 1)),
    "tangent of pooling": lambda h, p: pool_tangent(h, (2, 1)),
    "general pooling": lambda h, p: general_pool(h, (2, 1)),
    "general reduction": lambda h, p: h * general_sum(h, 0),
    "approximate top k": lambda h, p: jax.lax.approx_max_k(h, 1, reduction_dimension=0)[0] + h,
    "sorting permutation": lambda h, p: h * jnp.argsort(h, axis=0).astype(h.dtype),
    "dropout of whole rows": lambda h, p: jnp.where(mask(2, 1), h, 0.0),
    "noise on rows": lambda h, p: h + jax.random.normal(jax.random.key(0), (2, 1), h.dtype),
    "ragged product": lambda h, p: jax.lax.ragged_dot(h, p["experts"], OTHER) @ p["back"],
    "stacked and reduced": lambda h, p: jnp.stack([h, h * p["d"]], axis=1).max(1),
    "kernel gradient": grouped_by_example,
    "covariance": lambda h, p: h @ jnp.cov(h.T).astype(h.dtype),
    "associative scan": lambda h, p: jax.lax.associative_scan(jnp.add, h, axis=0),
    "cumulative logarithm": lambda h, p: jax.lax.cumlogsumexp(h, 0),
}
FIX = {
    "an index for each": lambda h, p: jnp.take_along_axis(h, MIXED[None] % 2, 0),
    "columns with an index each": lambda h, p: jax.vmap(lambda c, i: c[i], (1, 0))(h, MIXED) + h,
    "columns gathered": lambda h, p: jnp.take_along_axis(h, jnp.stack([MIXED, MIXED]), 1),
    "scatter one column": lambda h, p: h.at[:, 0].set(p["d"][:2]),
    "scatter columns": lambda h, p: h.at[:, MIXED].add(1.0),
    "last update wins": lambda h, p: (
        h * jnp.zeros((2, 1), h.dtype).at[:, jnp.zeros(4, jnp.int32)].set(h)
    ),
    "segments of units": lambda h, p: jax.ops.segment_sum(h.T, MIXED, 4).T,
    "update by column": lambda h, p: jax.vmap(write, (1, 0), 1)(h, MIXED),
    "update of nothing by column": lambda h, p: (
        h + jax.vmap(write, (1, 0), 1)(jnp.zeros_like(h), MIXED)
    ),
    "gradient of pooling": lambda h, p: pool_gradient(h, (1, 2)),
    "tangent of pooling": lambda h, p: pool_tangent(h, (1, 2)),
    "general pooling": lambda h, p: general_pool(h, (1, 2)),
    "general reduction": lambda h, p: h * general_sum(h, 1),
    "approximate top k": lambda h, p: jax.lax.approx_max_k(h, 4)[0] + h,
    "sorting permutation": lambda h, p: h * jnp.argsort(h, axis=1).astype(h.dtype),
    "dropout": lambda h, p: jnp.where(mask(2, 4), h, 0.0),
    "noise": lambda h, p: h + jax.random.normal(jax.random.key(0), h.shape, h.dtype),
    "stacked beside": lambda h, p: jnp.stack([h, h * p["d"]], -1).reshape(2, 8)[:, 2:6],
    "halves swapped and added": lambda h, p: jnp.concatenate([h[:, 2:], h[:, :1], h[:, 1:2]], -1),
    "halves unequal": lambda h, p: h[:, :1] + h[:, 1:].sum(-1, keepdims=True) * h,
    "read apart, then by position": lambda h, p: (
        h.reshape(2, 2, 2)[:, 0].repeat(2, -1) * jnp.arange(4.0, dtype=h.dtype) + h
    ),
    "associative scan": lambda h, p: jax.lax.associative_scan(jnp.add, h, axis=1),
    "cumulative logarithm": lambda h, p: jax.lax.cumlogsumexp(h, 1),
    "branches of different order": lambda h, p: jax.lax.cond(
        h.sum() > 0, lambda z: z, lambda z: z[:, ::-1], h
    ),
}


@pytest.mark.parametrize(("cases", "is_free"), [(KEEP, True), (FIX, False)], ids=["free", "fixed"])
def test_axes_that_primitives_keep_free_or_fix(cases, is_free):
    shapes = {
        "a": (3, 4), "b": (4, 2), "d": (4,), "experts": (2, 4, 5), "back": (5, 4),
        "kernel": (2, 1, 4),
    }  # fmt: skip
    variables = {
        case: {name: normal(*shape, seed=i) for name, shape in shapes.items()}
        for i, case in enumerate(cases)
    }

    def every(variables, x):
        return {
            case: middle(jnp.tanh(x @ variables[case]["a"]), variables[case]) @ variables[case]["b"]
            for case, middle in cases.items()
        }

    symmetry = align.infer_symmetry(every, variables, normal(2, 3))
    assert not any("primitive" in note for note in symmetry.notes), symmetry.notes
    for case in cases:
        units = symmetry.layouts[f"{case}/a"][1]
        assert isinstance(units, Atom if is_free else Fixed), f"{case}: {units}"
