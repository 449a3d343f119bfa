"""Permutations that vary: over the layers of a scan, the heads of an attention, their product."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align
from mixlab.align.inference.layout import Fixed, take

WIDTH, HEADS, DIM, HIDDEN, LAYERS, TOKENS = 6, 2, 3, 5, 3, 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in ("q", "k", "v"))
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q + p["bias"], k), axis=-1)
    return jnp.einsum("bthe,hed->btd", jnp.einsum("bhts,bshe->bthe", scores, v), p["out"])


def gpt(p, tokens):
    """Tied embedding, layers in a scan, attention and hidden units in each."""

    def layer(x, p):
        x = x + attention(p, x)
        return x + jnp.tanh(x @ p["up"] + p["up_bias"]) @ p["down"], None

    x, _ = jax.lax.scan(layer, p["table"][tokens], p["layers"])
    return x @ p["table"].T


def gpt_variables(seed=0, layers=LAYERS):
    shapes = {
        **dict.fromkeys("qkv", (WIDTH, HEADS, DIM)),
        "bias": (HEADS, DIM),
        "out": (HEADS, DIM, WIDTH),
        "up": (WIDTH, HIDDEN),
        "up_bias": (HIDDEN,),
        "down": (HIDDEN, WIDTH),
    }
    stacked = {
        name: normal(layers, *shape, seed=seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {"table": normal(7, WIDTH, seed=seed), "layers": stacked}


TOKEN_IDS = np.random.default_rng(0).integers(0, 7, size=(5, TOKENS))


@functools.cache
def gpt_symmetry():
    return align.infer_symmetry(gpt, gpt_variables(), TOKEN_IDS, check=False)


def group_at(symmetry, leaf, axis):
    return symmetry.layouts[leaf][axis].name


def test_layers_and_heads_have_permutations_of_their_own():
    symmetry = gpt_symmetry()
    assert symmetry.notes == ()
    assert symmetry.loops == {"layers": LAYERS}
    shapes = {name: symmetry.shape(name) for name in symmetry.groups}
    heads = group_at(symmetry, "layers/q", 2)
    assert shapes == {
        "table": (WIDTH,),
        heads: (LAYERS, HEADS),
        group_at(symmetry, "layers/q", 3): (LAYERS, HEADS, DIM),
        group_at(symmetry, "layers/v", 3): (LAYERS, HEADS, DIM),
        "layers/up": (LAYERS, HIDDEN),
    }
    assert symmetry.over[group_at(symmetry, "layers/q", 3)] == ("layers", heads)
    assert symmetry.check(jax.random.key(1)) < 1e-9
    assert "one for each of layers" in str(symmetry)


def test_one_array_serves_all_layers():
    symmetry, variables = gpt_symmetry(), gpt_variables()
    p = np.random.default_rng(0).permutation(HIDDEN)
    one = symmetry.permute({"layers/up": p}, variables)
    many = symmetry.permute({"layers/up": np.stack([p] * LAYERS)}, variables)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    np.testing.assert_array_equal(one["layers"]["up"], variables["layers"]["up"][:, :, p])


def test_what_a_permutation_varies_over_counts_in_the_new_order():
    symmetry, variables = gpt_symmetry(), gpt_variables()
    p = symmetry.random(jax.random.key(0))
    heads, inner = (group_at(symmetry, "layers/q", axis) for axis in (2, 3))
    found = symmetry.permute({heads: p[heads], inner: p[inner]}, variables)["layers"]["q"]
    q = variables["layers"]["q"]
    for layer in range(LAYERS):
        for h in range(HEADS):
            expected = q[layer][:, p[heads][layer, h]][:, p[inner][layer, h]]
            np.testing.assert_array_equal(found[layer][:, h], expected)


def test_compose_and_inverse():
    symmetry, variables = gpt_symmetry(), gpt_variables()
    first, second = (symmetry.random(jax.random.key(seed)) for seed in (1, 2))
    both = symmetry.permute(symmetry.compose(second, first), variables)
    one_by_one = symmetry.permute(second, symmetry.permute(first, variables))
    jax.tree.map(np.testing.assert_array_equal, both, one_by_one)
    undone = symmetry.permute(symmetry.inverse(first), symmetry.permute(first, variables))
    jax.tree.map(np.testing.assert_array_equal, undone, variables)


def test_activations_permute_with_the_units():
    symmetry, variables = gpt_symmetry(), gpt_variables()
    p = symmetry.random(jax.random.key(3))
    before = symmetry.activations(variables, TOKEN_IDS)
    after = symmetry.activations(symmetry.permute(p, variables), TOKEN_IDS)
    rows = TOKEN_IDS.size
    assert {a.shape for a in before.values()} == {
        (rows, WIDTH), (LAYERS, rows, HIDDEN), (LAYERS, rows, HEADS, DIM)
    }  # fmt: skip
    for name, values in before.items():
        *outer, unit = symmetry.layout_of_group(name)
        loops = [term for term in outer if isinstance(term, Fixed)]
        layout = (*loops, Fixed(rows), *outer[len(loops) :], unit)
        np.testing.assert_allclose(after[name], take(values, layout, p), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def planted():
    symmetry, variables = gpt_symmetry(), gpt_variables()
    p = symmetry.random(jax.random.key(4))
    noisy = jax.tree.map(lambda x: x * (1 + 0.01 * normal(*x.shape, seed=6)), variables)
    return symmetry, variables, symmetry.permute(p, noisy), symmetry.inverse(p)


def test_activation_matching_finds_heads_and_their_insides(planted):
    symmetry, reference, other, answer = planted
    found = align.activation_matching(symmetry, gpt, reference, other, TOKEN_IDS)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p, err_msg=name)


def test_weight_matching_finds_heads_and_their_insides(planted):
    symmetry, reference, other, answer = planted
    found = align.weight_matching(symmetry, reference, other)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p, err_msg=name)


def test_weight_matching_of_many_models_in_one_program(planted):
    symmetry, reference, other, _ = planted
    models = [other, gpt_variables(seed=20)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    key = jax.random.key(5)
    match = functools.partial(align.weight_matching, symmetry, reference, key=key)
    together = jax.jit(jax.vmap(match))(stacked)
    for i, model in enumerate(models):
        for name, p in match(model).items():
            np.testing.assert_array_equal(together[name][i], p, err_msg=name)


def test_heads_are_matched_by_the_best_of_their_insides():
    # Brute force: all permutations of heads and, for each, of their insides.
    symmetry = align.infer_symmetry(
        attention,
        {
            k: v[0]
            for k, v in gpt_variables()["layers"].items()
            if k in ("q", "k", "v", "bias", "out")
        },
        normal(2, TOKENS, WIDTH),
        check=False,
    )
    ours, theirs = (
        {
            k: v[0]
            for k, v in gpt_variables(seed=s)["layers"].items()
            if k in ("q", "k", "v", "bias", "out")
        }
        for s in (0, 40)
    )
    found = symmetry.permute(align.weight_matching(symmetry, ours, theirs), theirs)
    objective = sum(np.vdot(ours[k], np.asarray(found[k])) for k in ours)

    def pair(a, b, names):
        moves = itertools.permutations(range(DIM))
        return max(
            sum(
                np.vdot(
                    np.moveaxis(ours[n], axis, 0)[a],
                    np.take(np.moveaxis(theirs[n], axis, 0)[b], p, axis=inner),
                )
                for n, axis, inner in names
            )
            for p in moves
        )

    qk, vo = [("q", 1, 1), ("k", 1, 1), ("bias", 0, 0)], [("v", 1, 1), ("out", 0, 0)]
    best = max(
        sum(pair(a, p[a], qk) + pair(a, p[a], vo) for a in range(HEADS))
        for p in itertools.permutations(range(HEADS))
    )
    np.testing.assert_allclose(objective, best, rtol=1e-5)


# ---------------------------------------------------------------- made to break it


@pytest.mark.parametrize(
    "scale",
    [
        # A scale that all heads share ties their insides.
        pytest.param(lambda p, q: q * p["scale"], id="shared scale"),
        # Summing over heads before the insides are read ties them.
        pytest.param(lambda p, q: q + q.sum(2, keepdims=True), id="mixed heads"),
        # Products between heads see the insides of both.
        pytest.param(
            lambda p, q: q + jnp.einsum("bthe,btge,btge->bthe", q, q, q), id="across heads"
        ),
    ],
)
def test_insides_of_heads_that_meet_share_a_permutation(scale):
    def fn(p, x):
        q = jnp.einsum("btd,dhe->bthe", x, p["q"])
        return jnp.einsum("bthe,hed->btd", jnp.tanh(scale(p, q)), p["out"])

    p = {"q": normal(4, 2, 3), "out": normal(2, 3, 4), "scale": normal(3)}
    symmetry = align.infer_symmetry(fn, p, normal(2, 5, 4))
    inner = group_at(symmetry, "q", 2)
    assert symmetry.shape(inner) == (3,), str(symmetry)


def test_layers_that_share_units_have_one_permutation():
    def fn(p, x):
        def layer(carry, p):
            hidden = jnp.tanh(carry[0] @ p["up"])
            return (carry[0] + hidden @ p["down"], carry[1] + hidden), hidden.sum(-1)

        (x, hidden), sums = jax.lax.scan(layer, (x, jnp.zeros((len(x), 5), x.dtype)), p["layers"])
        return x @ p["out"] + (hidden * p["scale"]).sum(-1, keepdims=True), sums

    p = {
        "layers": {"up": normal(3, 4, 5), "down": normal(3, 5, 4)},
        "out": normal(4, 2),
        "scale": normal(5),
    }
    symmetry = align.infer_symmetry(fn, p, normal(2, 4))
    assert {name: symmetry.shape(name) for name in symmetry.groups} == {"layers": (5,)}
    assert symmetry.over == {"layers": ()}
