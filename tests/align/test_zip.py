import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align, models
from tests import golden
from tests.align import networks
from tests.align.test_matching import IMAGES, signed_variables
from tests.align.test_symmetry import mlp_variables, normal

SETTINGS = {
    "a0.0001_b0.075": (1e-4, 0.075),
    "a0.3_b0.125": (0.3, 0.125),
    "a1_b1": (1, 1),
    "a0_b1": (0, 1),
}


# ---------------------------------------------------------------- one layer


def test_zip_units_gives_what_zipit_recorded():
    v = golden.load("decentral/public_matching")
    for case in golden.cases(v, "c", 1):
        for setting, (alpha, beta) in SETTINGS.items():
            merge, unmerge = align.zip_units(
                v[f"{case}/corr"], len(v[f"{case}/feats"]), alpha=alpha, beta=beta
            )
            name = f"{case}/zipit_{setting}"
            np.testing.assert_array_equal(unmerge, v[f"{name}_unmerge"], err_msg=name)
            np.testing.assert_allclose(merge, v[f"{name}_merge"], rtol=2e-5, err_msg=name)
        if f"{case}/optimal_merge" in v:
            merge, _ = align.optimal_zip_units(v[f"{case}/corr"])
            # The recorded units are in no particular order.
            expected = sorted(v[f"{case}/optimal_merge"].tolist(), reverse=True)
            np.testing.assert_allclose(merge, expected, rtol=2e-5)


def plainly(scores, num_models, kept, alpha, beta):
    """The greedy search as ZipIt's section 4 states it, deleting rows and columns; alpha > 0."""
    scores = np.where(np.eye(len(scores)), -np.inf, scores)
    members = [[i] for i in range(len(scores))]
    model = [i * num_models // len(scores) for i in members for i in i]
    budget = [int((len(scores) - kept) // num_models * beta + 1e-4)] * num_models
    while len(members) > kept and scores.max() > -np.inf:
        i, j = sorted(np.unravel_index(scores.argmax(), scores.shape))
        row = np.minimum(scores[i], scores[j]) * scores.dtype.type(alpha)
        scores[i], scores[:, i] = row, row
        scores[i, i] = -np.inf
        inside = model[i] == model[j]
        members[i] += members.pop(j)
        model.pop(j)
        scores = np.delete(np.delete(scores, j, 0), j, 1)
        if inside:
            budget[model[i]] -= 1
            if budget[model[i]] <= 0:
                same = np.flatnonzero(np.asarray(model) == model[i])
                scores[np.ix_(same, same)] = -np.inf
    return members


@pytest.mark.parametrize("alpha", [1.0, 0.4, 1e-3])
def test_zip_units_is_the_plain_greedy_search(alpha):
    for seed, num_models in [(0, 1), (1, 2), (2, 2), (3, 4)]:
        # Rounded, so that equal scores are frequent.
        scores = np.round(np.corrcoef(normal(24, 30, seed=seed)), 1).astype(np.float32)
        for ratio, beta in [(0.5, 0.3), (0.25, 1.0)]:
            _, unmerge = align.zip_units(scores, num_models, ratio=ratio, alpha=alpha, beta=beta)
            members = plainly(scores, num_models, int(24 * (1 - ratio)), alpha, beta)
            kept = members[len(members) - unmerge.shape[1] :]
            found = [np.flatnonzero(column).tolist() for column in unmerge.T]
            assert found == [sorted(unit) for unit in kept]


def test_no_unit_is_dropped_where_merging_goes_on():
    similarity = np.corrcoef(normal(30, 20, seed=7))
    _, dropped = align.zip_units(similarity, 3)
    merge, unmerge = align.zip_units(similarity, 3, exhausted="merge")
    assert merge.shape == (10, 30)
    assert dropped.shape == unmerge.shape == (30, 10)
    assert not dropped.any(axis=1).all()
    np.testing.assert_array_equal(unmerge.sum(axis=1), 1)
    np.testing.assert_allclose(merge @ unmerge, np.eye(10))
    np.testing.assert_allclose(merge.sum(axis=1), 1)


# ---------------------------------------------------------------- whole networks


class Scanned:
    """A residual stream through scanned layers, whose weights are transposed on the way."""

    @staticmethod
    def apply(p, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w["in"].T) @ w["out"], None

        x = jnp.tanh(x.reshape(len(x), -1) @ p["embed"] + p["bias"])
        return jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]

    @staticmethod
    def variables():
        layers = {"in": normal(2, 5, 6), "out": normal(2, 5, 6, seed=1)}
        shapes = {"embed": (192, 6), "bias": (6,), "head": (6, 3)}
        return {"layers": layers, **{k: normal(*s) / 5 for k, s in shapes.items()}}


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (models.MLP(3, (12, 9)), set()),
        (models.CNN(3, (6, 8)), set()),
        # Depthwise and grouped convolutions, a squeeze-and-excite gate.
        (networks.Depthwise(), {"Conv_2.0", "Conv_2.1", "Conv_3"}),
        (Scanned(), {"layers"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_copies_with_other_orders_zip_to_the_model_itself(module, kept):
    variables = module.variables() if isinstance(module, Scanned) else signed_variables(module)
    symmetry = align.infer_symmetry(module.apply, variables, IMAGES[:1], check=False)
    p = symmetry.random(jax.random.key(2))
    assert kept <= set(p)
    other = symmetry.permute({k: v for k, v in p.items() if k not in kept}, variables)
    zipped = align.zip_models(symmetry, module.apply, [variables, other], [IMAGES], beta=0)
    assert jax.tree.map(jnp.shape, zipped) == jax.tree.map(jnp.shape, variables)
    run = jax.jit(module.apply)
    np.testing.assert_allclose(run(zipped, IMAGES), run(variables, IMAGES), rtol=1e-4, atol=1e-4)


def mlp(layers, x):
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def doubled(seed, dtype=np.float32):
    """A network each of whose hidden units is there twice, in some order."""
    w1, w2, w3 = normal(5, 4, seed=seed), normal(4, 3, seed=seed), normal(3, 2, seed=seed)
    at1, at2 = (np.random.default_rng(seed).permutation(2 * n) for n in (4, 3))
    share = np.random.default_rng(seed).uniform(size=(4, 1))

    def read(w, share):
        return np.concatenate([w * share, w * (1 - share)])

    layers = [
        {"w": np.tile(w1, 2)[:, at1], "b": np.tile(normal(4, seed=seed), 2)[at1]},
        {"w": np.tile(read(w2, share)[at1], 2)[:, at2], "b": np.tile(normal(3, seed=seed), 2)[at2]},
        {"w": read(w3, share[:3])[at2], "b": normal(2, seed=seed)},
    ]
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), layers)


@functools.cache
def two_tasks():
    pair = [doubled(7), doubled(8)]
    symmetry = align.infer_symmetry(mlp, pair[0], normal(2, 5), check=False)
    return symmetry, pair, normal(40, 5)


@pytest.mark.parametrize("groups", [("0",), ("0", "1")])
def test_a_partial_zip_of_redundant_models_keeps_every_head(groups):
    symmetry, pair, x = two_tasks()
    batches = [x[:20], x[20:]]
    zipped = align.zip_models_partially(symmetry, mlp, pair, batches, groups, beta=1.0)
    assert zipped.shared == {f"{g}/{leaf}" for g in groups for leaf in "wb"}
    outputs = zipped.apply(mlp, x)
    for i, layers in enumerate(pair):
        np.testing.assert_allclose(outputs[i], mlp(layers, x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mlp(zipped.model(i), x), outputs[i], rtol=1e-5, atol=1e-5)
    # What is shared runs once: no axis of models on its products.
    products = [
        eqn.outvars[0].aval.ndim
        for eqn in jax.make_jaxpr(lambda x: zipped.apply(mlp, x))(x).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert products == [2] * len(groups) + [3] * (3 - len(groups))


def test_zipping_keeps_dtypes_and_averages_what_has_no_units():
    symmetry, _, x = two_tasks()
    pair = [doubled(seed, jnp.bfloat16) for seed in (7, 8)]
    zipped = align.zip_models(symmetry, mlp, pair, [jnp.asarray(x, jnp.bfloat16)])
    assert {leaf.dtype for leaf in jax.tree.leaves(zipped)} == {jnp.dtype(jnp.bfloat16)}
    mean = (pair[0][2]["b"].astype(jnp.float32) + pair[1][2]["b"].astype(jnp.float32)) / 2
    np.testing.assert_array_equal(zipped[2]["b"], mean.astype(jnp.bfloat16))


def test_a_group_that_a_leaf_brings_forth_and_reads_is_averaged_by_place():
    def tied(p, tokens):
        return jax.nn.relu(p["embed"][tokens] @ p["w"]) @ p["embed"].T

    pair = [{"embed": normal(7, 6, seed=s), "w": normal(6, 6, seed=s)} for s in (0, 1)]
    tokens = jnp.arange(7)
    symmetry = align.infer_symmetry(tied, pair[0], tokens, check=False)
    zipped = align.zip_models(symmetry, tied, pair, [tokens])
    np.testing.assert_allclose(zipped["embed"], (pair[0]["embed"] + pair[1]["embed"]) / 2)


def test_errors():
    symmetry, pair, x = two_tasks()
    with pytest.raises(ValueError, match=r"leaf '1/w' brings forth .*'1'.* also serves .'0'"):
        align.zip_models_partially(symmetry, mlp, pair, [x], ["1"])
    with pytest.raises(KeyError, match="no group 'hidden'"):
        align.zip_models_partially(symmetry, mlp, pair, [x], ["hidden"])
    with pytest.raises(ValueError, match="at least two models, got 1"):
        align.zip_models(symmetry, mlp, pair[:1], [x])
    with pytest.raises(ValueError, match="no batches"):
        align.zip_models(symmetry, mlp, pair, [])
    with pytest.raises(ValueError, match=r"leaf '0/b' of shape \(8,\), model 1 \(6,\)"):
        align.zip_models(symmetry, mlp, [pair[0], mlp_variables()], [x])
    with pytest.raises(ValueError, match="group '0' contain NaN"):
        align.zip_models(symmetry, mlp, [pair[0], jax.tree.map(lambda v: v * np.nan, pair[1])], [x])
    masked = [{"w": p[0]["w"], "keep": jnp.arange(8) > 2, "out": p[1]["w"]} for p in pair]

    def with_mask(p, x):
        return jnp.tanh(jnp.where(p["keep"], x @ p["w"], 0)) @ p["out"]

    symmetry = align.infer_symmetry(with_mask, masked[0], x, check=False)
    with pytest.raises(ValueError, match="leaf 'keep' has units to zip, but its bool"):
        align.zip_models(symmetry, with_mask, masked, [x])
    for change, message in [
        ({"ratio": 1.0}, "ratio must lie in"),
        ({"alpha": 2.0}, "alpha must lie in"),
        ({"beta": -0.1}, "beta must lie in"),
        ({"exhausted": "stop"}, "'drop' or 'merge'"),
        ({"num_models": 3}, "does not divide among 3"),
        ({"similarity": np.full((4, 4), np.inf)}, "NaN or infinity"),
        ({"similarity": np.ones((4, 2))}, "need a similarity"),
    ]:
        with pytest.raises(ValueError, match=message):
            align.zip_units(**{"similarity": np.eye(4), "num_models": 2, **change})
