import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align, models
from tests.align import networks
from tests.align.test_symmetry import mlp, mlp_variables, normal, variables_of

IMAGES = normal(6, 8, 8, 3, seed=3)


def signed_variables(module):
    """Random parameters of both signs, and positive batch statistics."""
    variables = dict(variables_of(module))
    variables["params"] = jax.tree.map(lambda x: normal(*x.shape, seed=5) / 2, variables["params"])
    return variables


@functools.cache
def planted(module):
    """A network, a copy of it with its units renumbered and a little noise, and the answer."""
    variables = signed_variables(module)
    symmetry = align.infer_symmetry(module.apply, variables, IMAGES[:1], check=False)
    p = symmetry.random(jax.random.key(4))
    noisy = jax.tree.map(lambda x: x * (1 + 0.01 * normal(*x.shape, seed=6)), variables)
    shuffled = symmetry.permute(p, noisy)
    return symmetry, variables, shuffled, {name: np.argsort(a) for name, a in p.items()}


MODULES = [models.MLP(3, (12, 9)), models.CNN(3, (6, 8)), networks.PaddedResidual()]


# The second moment prefers units of large scale: in the other two it need not find this answer.
@pytest.mark.parametrize(
    ("module", "statistic"),
    [*((module, "correlation") for module in MODULES), (MODULES[0], "second_moment")],
    ids=lambda m: m if isinstance(m, str) else type(m).__name__,
)
def test_activation_matching_recovers_a_planted_permutation(module, statistic):
    symmetry, reference, other, answer = planted(module)
    found = align.activation_matching(
        symmetry, module.apply, reference, other, IMAGES, statistic=statistic
    )
    assert set(found) == set(symmetry.groups)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p, err_msg=name)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("key", [None, 0, 1])
def test_weight_matching_recovers_a_planted_permutation(module, key):
    symmetry, reference, other, answer = planted(module)
    key = None if key is None else jax.random.key(key)
    found = align.weight_matching(symmetry, reference, other, key=key)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p, err_msg=name)


def test_weight_matching_of_recurrent_weights_and_gates():
    def fn(p, x):
        h = jnp.zeros((x.shape[1], 5), x.dtype)
        for xt in x:
            a, b = jnp.split(xt @ p["in"] + jnp.tile(h @ p["rec"], (1, 2)), 2, axis=-1)
            h = jnp.tanh(a) * jax.nn.sigmoid(b)
        return h @ p["out"]

    shapes = {"in": (3, 10), "rec": (5, 5), "out": (5, 2)}
    p = {name: normal(*shape) for name, shape in shapes.items()}
    symmetry = align.infer_symmetry(fn, p, normal(2, 2, 3))
    assert symmetry.groups == {"in": 5}
    drawn = symmetry.random(jax.random.key(0))
    found = align.weight_matching(symmetry, p, symmetry.permute(drawn, p))
    np.testing.assert_array_equal(found["in"], np.argsort(drawn["in"]))


def test_weight_matching_never_lowers_the_inner_product():
    symmetry, reference, _, _ = planted(models.MLP(3, (12, 9)))
    other = jax.tree.map(lambda x: normal(*x.shape, seed=9), reference)

    def objective(p):
        moved = symmetry.permute(p, other)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), reference, moved)))

    sweeps = [
        objective(align.weight_matching(symmetry, reference, other, max_iterations=n))
        for n in range(4)
    ]
    assert sweeps[0] == objective(symmetry.identity())
    assert sweeps[1] > sweeps[0]
    assert sorted(sweeps) == sweeps


def test_batch_statistics_do_not_count_in_weight_matching():
    symmetry, reference, other, answer = planted(models.CNN(3, (6, 8)))
    wild = {**other, "batch_stats": jax.tree.map(lambda x: x[::-1] * 1e3, other["batch_stats"])}
    found = align.weight_matching(symmetry, reference, wild)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p)
    only = ["batch_stats/BatchNorm_0/mean"]
    found = align.weight_matching(symmetry, reference, other, leaves=only)
    np.testing.assert_array_equal(found["Conv_1"], np.arange(8))


def test_moments_stream_over_batches():
    x, y = normal(30, 4) + 100, normal(30, 3)
    whole = align.moments(jnp.asarray(x), jnp.asarray(y))
    cuts = [(0, 7), (7, 8), (8, 30)]
    parts = [align.moments(jnp.asarray(x[a:b]), jnp.asarray(y[a:b])) for a, b in cuts]
    merged = functools.reduce(align.merge_moments, parts)
    for a, b in zip(whole, merged, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    expected = np.corrcoef(x.T.astype(np.float64), y.T.astype(np.float64))[:4, 4:]
    # Far from zero mean: a difference of raw moments would lose these digits in float32.
    np.testing.assert_allclose(align.correlation(merged), expected, atol=1e-5)


def test_match_activations_under_jit_and_vmap():
    a = jnp.asarray(normal(20, 6))
    p = np.random.default_rng(0).permutation(6)
    many = jnp.stack([a, a[:, p], -a[:, p]])
    one = [align.match_activations({"g": a}, {"g": b})["g"] for b in many]
    matched = jax.jit(jax.vmap(lambda b: align.match_activations({"g": a}, {"g": b})["g"]))(many)
    np.testing.assert_array_equal(matched, jnp.stack(one))
    np.testing.assert_array_equal(matched[0], np.arange(6))
    np.testing.assert_array_equal(matched[1], np.argsort(p))


def test_dead_units():
    a, b = normal(20, 6), normal(20, 6, seed=1)
    a[:, 2], b[:, 4] = 0.25, 0.0
    dead = align.dead_units({"g": jnp.asarray(a)})["g"]
    np.testing.assert_array_equal(np.flatnonzero(dead), [2])
    scores = align.correlation(align.moments(jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_array_equal(scores[2], np.zeros(6))
    np.testing.assert_array_equal(scores[:, 4], np.zeros(6))
    p = align.match_activations({"g": jnp.asarray(a)}, {"g": jnp.asarray(b)})["g"]
    np.testing.assert_array_equal(np.sort(p), np.arange(6))


def test_narrow_activations_are_computed_in_float32():
    a = jnp.asarray(normal(300, 4) + 10, jnp.bfloat16)
    assert align.moments(a, a).products.dtype == jnp.float32
    np.testing.assert_allclose(jnp.diag(align.correlation(align.moments(a, a))), 1, atol=1e-5)


def test_errors():
    layers, x = mlp_variables(), normal(4, 5)
    symmetry = align.infer_symmetry(mlp, layers, x, check=False)
    broken = jax.tree.map(np.array, layers)
    broken[1]["w"][0, 0] = np.nan
    with pytest.raises(ValueError, match="group '1' contain NaN"):
        align.activation_matching(symmetry, mlp, layers, broken, x)
    with pytest.raises(ValueError, match="leaf '1/w' contains NaN"):
        align.weight_matching(symmetry, layers, broken)
    with pytest.raises(ValueError, match="only in the first"):
        align.activation_matching(symmetry, mlp, layers, layers[:2], x)
    with pytest.raises(ValueError, match="same structure"):
        align.weight_matching(symmetry, layers, layers[:2])
    smaller = mlp_variables((5, 4, 7, 3))
    with pytest.raises(ValueError, match=r"leaf '0/b' of shape \(6,\)"):
        align.weight_matching(symmetry, smaller, smaller)
    with pytest.raises(ValueError, match="unknown statistic 'cosine'"):
        align.activation_matching(symmetry, mlp, layers, layers, x, statistic="cosine")
    with pytest.raises(ValueError, match="same groups"):
        align.match_activations({"a": jnp.ones((2, 2))}, {"b": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="one shape"):
        align.match_activations({"a": jnp.ones((2, 2))}, {"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="either key"):
        align.weight_matching(symmetry, layers, layers, key=jax.random.key(0), order=[["0"]])
    with pytest.raises(KeyError, match="order names"):
        align.weight_matching(symmetry, layers, layers, order=[["hidden"]])
    with pytest.raises(KeyError, match="no leaf '0/v'"):
        align.weight_matching(symmetry, layers, layers, leaves=["0/v"])


def test_match_models_streams_over_batches():
    symmetry, reference, other, answer = planted(models.MLP(3, (12, 9)))
    batches = [IMAGES[:2], (IMAGES[2:6],)]
    found = align.match_models(symmetry, symmetry.fn, [reference, other, reference], batches)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], [np.arange(len(p)), p, np.arange(len(p))])
    aligned = jax.vmap(symmetry.permute)(
        found, jax.tree.map(lambda *x: jnp.stack(x), reference, other, reference)
    )
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[2]), aligned)


def test_statistics_of_pairs_equal_those_of_the_whole():
    symmetry, reference, other, _ = planted(models.MLP(3, (12, 9)))
    found = align.activation_statistics(
        symmetry, symmetry.fn, [reference, other], [IMAGES[:1], IMAGES[1:]], pairs=[(1, 0), (1, 1)]
    )
    whole = {i: symmetry.activations(m, IMAGES) for i, m in enumerate((reference, other))}
    for (i, j), groups in found.items():
        for name, statistics in groups.items():
            expected = align.moments(whole[i][name], whole[j][name])
            for a, b in zip(statistics, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        align.activation_statistics(symmetry, symmetry.fn, [reference, other], [])
    with pytest.raises(TypeError, match=r"give a list: \[batch\]"):
        align.activation_statistics(symmetry, symmetry.fn, [reference, other], IMAGES)
    with pytest.raises(ValueError, match="no pairs"):
        align.activation_statistics(symmetry, symmetry.fn, [reference], [IMAGES])


def test_report_counts_dead_units():
    a, b = normal(20, 6), normal(20, 6, seed=1)
    a[:, 2], b[:, 4], b[:, 5] = 0.25, 0.0, a[:, 0]
    statistics = {"g": align.moments(jnp.asarray(a), jnp.asarray(b))}
    found = align.match_moments(statistics)
    report = align.matching_report(statistics, found)["g"]
    assert (report["units"], report["dead_reference"], report["dead_other"]) == (6, 1, 1)
    assert int(found["g"][0]) == 5
    assert report["correlation"] > max(report["before"], 1 / 6)


def test_restarts_keep_the_best_order():
    reference = mlp_variables((5, 8, 7, 8, 7, 3))
    symmetry = align.infer_symmetry(mlp, reference, normal(2, 5), check=False)
    other = jax.tree.map(lambda x: normal(*x.shape, seed=9), reference)

    def objective(p):
        moved = symmetry.permute(p, other)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.vdot(a, b), reference, moved)))

    def match(seed=0, **options):
        key = jax.random.key(seed)
        return align.weight_matching(symmetry, reference, other, key=key, **options)

    singles = [objective(match(seed, restarts=1)) for seed in range(8)]
    many = objective(match(restarts=8))
    assert many > max(singles)
    compiled = jax.jit(
        lambda other: align.weight_matching(
            symmetry, reference, other, key=jax.random.key(0), restarts=8
        )
    )(other)
    np.testing.assert_allclose(objective(compiled), many, rtol=1e-5)
    with pytest.raises(ValueError, match="restarts=0"):
        match(restarts=0)
    with pytest.raises(ValueError, match="needs key="):
        align.weight_matching(symmetry, reference, other, restarts=2)
