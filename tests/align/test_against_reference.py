"""Matching and permuting against their independent restatements, in double precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align
from tests.reference import decentral

pytestmark = pytest.mark.usefixtures("x64")


def to_numpy(tree):
    return {name: np.asarray(value) for name, value in tree.items()}


@pytest.mark.parametrize("backend", ["scipy", "optax"])
def test_assignment_is_the_best_permutation(backend):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 5, 5))
    found = np.asarray(align.assignment(jnp.asarray(scores), backend=backend))
    for matrix, perm in zip(scores, found, strict=True):
        best = max(itertools.permutations(range(5)), key=lambda p: matrix[np.arange(5), p].sum())
        np.testing.assert_array_equal(perm, best)


def test_assignment_of_least_cost():
    cost = np.random.default_rng(1).normal(size=(9, 9))
    found = align.assignment(jnp.asarray(cost), backend="scipy", maximize=False)
    np.testing.assert_array_equal(found, decentral.assign(-cost))


def activations(seed, rows=40):
    """Two agents' activations [S, n]; those of the second are permuted and noisy."""
    rng = np.random.default_rng(seed)
    reference, other = {}, {}
    for name, units in (("narrow", 3), ("wide", 9)):
        x = rng.normal(size=(rows, units)) * rng.exponential(size=units) + rng.normal(size=units)
        x = np.maximum(x, 0)
        reference[name] = x
        noise = rng.normal(size=x.shape) * 0.3
        other[name] = x[:, rng.permutation(units)] * rng.exponential(size=units) + noise
    return reference, other


@pytest.mark.parametrize("statistic", ["correlation", "second_moment"])
def test_match_activations(statistic):
    match = {
        "correlation": decentral.match_correlation,
        "second_moment": decentral.match_second_moment,
    }[statistic]
    for seed in range(4):
        reference, other = activations(seed)
        found = align.match_activations(reference, other, statistic=statistic)
        assert found.keys() == reference.keys()
        for name in reference:
            expected = match(reference[name].T, other[name].T)
            np.testing.assert_array_equal(found[name], expected)


def test_match_activations_with_dead_units():
    reference, other = activations(4)
    reference["wide"][:, [1, 5]] = 0.0
    other["wide"][:, 2] = 3.0
    found = np.asarray(align.match_activations(reference, other)["wide"])
    assert sorted(found) == list(range(9))
    both = np.concatenate([reference["wide"].T, other["wide"].T])
    scores = decentral.correlation(decentral.covariance(both))[:9, 9:]
    expected = decentral.match_correlation(reference["wide"].T, other["wide"].T)
    # Dead units correlate with nothing, so that several permutations are as good.
    rows = np.arange(9)
    np.testing.assert_allclose(scores[rows, found].sum(), scores[rows, expected].sum(), rtol=1e-9)


# One axis is a convolution's, one leaf is touched by no permutation.
AXES = {
    "conv/kernel": (None, None, None, "c"),
    "conv/bias": ("c",),
    "hidden/kernel": ("c", "h"),
    "hidden/bias": ("h",),
    "out/kernel": ("h", None),
    "out/bias": (None,),
}
SHAPES = {
    "conv/kernel": (2, 2, 3, 7),
    "conv/bias": (7,),
    "hidden/kernel": (7, 5),
    "hidden/bias": (5,),
    "out/kernel": (5, 3),
    "out/bias": (3,),
}


def params(seed):
    rng = np.random.default_rng(seed)
    return {leaf: rng.normal(size=shape) for leaf, shape in SHAPES.items()}


def hidden(params, x, xp):
    """The activations [S, n] of both groups; `x` is [S, 12], each a patch of 2 x 2 x 3."""
    c = xp.maximum(x @ params["conv/kernel"].reshape(12, 7) + params["conv/bias"], 0.0)
    h = xp.maximum(c @ params["hidden/kernel"] + params["hidden/bias"], 0.0)
    return {"c": c, "h": h}


def network(params, x):
    return hidden(params, x, jnp)["h"] @ params["out/kernel"] + params["out/bias"]


def test_permute():
    symmetry = align.Symmetry.from_axes(AXES, params(0))
    perms = to_numpy(symmetry.random(jax.random.key(1)))
    assert {name: len(p) for name, p in perms.items()} == {"c": 7, "h": 5}
    given = params(0)
    found = symmetry.permute(perms, given)
    for leaf, expected in decentral.permute(given, AXES, perms).items():
        np.testing.assert_array_equal(found[leaf], expected)


@pytest.mark.parametrize("seed", range(4))
def test_weight_matching(seed):
    a, b = params(seed), params(seed + 10)
    symmetry = align.Symmetry.from_axes(AXES, a)
    rng = np.random.default_rng(seed)
    order = [list(rng.permutation(["c", "h"])) for _ in range(6)]
    found = to_numpy(align.weight_matching(symmetry, a, b, order=order))
    expected, gains = decentral.weight_matching(AXES, a, b, [name for row in order for name in row])
    assert gains[0] > 0
    np.testing.assert_allclose(gains[-2:], 0, atol=1e-9)  # so many sweeps reach a fixed point
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_aligned_average():
    """DIMAT's merge: match by activations, renumber, take the weighted mean."""
    models, weights = [params(seed) for seed in range(3)], (0.5, 0.3, 0.2)
    x = np.random.default_rng(9).normal(size=(30, 12))
    symmetry = align.Symmetry.from_axes(AXES, models[0], network, x)
    perms, aligned = [], []
    acts = [hidden(model, x, np) for model in models]
    for model, act in zip(models, acts, strict=True):
        found = align.activation_matching(symmetry, network, models[0], model, x)
        expected = {n: decentral.match_correlation(acts[0][n].T, act[n].T) for n in act}
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
        perms.append(expected)
        aligned.append(symmetry.permute(found, model))
    for leaf, expected in decentral.aligned_average(AXES, models, perms, weights).items():
        found = sum(w * model[leaf] for w, model in zip(weights, aligned, strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("unbiased", [False, True])
def test_batch_statistics(momentum, unbiased):
    rng = np.random.default_rng(3)
    batches = [rng.normal(size=(n, 3, 2, 4)) * 2 + 1 for n in (6, 6, 5)]
    old = {"mean": jnp.full(4, 7.0), "var": jnp.full(4, 9.0)}

    def run(variables, batch):
        new = {
            "mean": batch.mean((0, 1, 2)),
            "var": batch.var((0, 1, 2), ddof=int(unbiased)),
        }
        kept = variables["batch_stats"]
        return {k: momentum * kept[k] + (1 - momentum) * new[k] for k in new}

    variables = {"params": {}, "batch_stats": old}
    found = align.reestimate_batch_stats(
        jax.jit(run), variables, [jnp.asarray(batch) for batch in batches], momentum=momentum
    )
    mean, var = decentral.reset_statistics(batches, unbiased=unbiased)
    np.testing.assert_allclose(found["batch_stats"]["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(found["batch_stats"]["var"], var, rtol=1e-12)
