"""Every merge method against its independent restatement, in double precision, on random models.

The models are multiples of 1 / 64: sums of task vectors are then exact, so signs that cancel,
entries that are all zero and magnitudes that tie at a threshold all occur.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests.reference import merging

SHAPES = {
    "conv/bias": (5,),
    "conv/kernel": (2, 3, 2, 5),
    "dense/kernel": (7, 4),
    "temperature": (),
}
pytestmark = pytest.mark.usefixtures("x64")


def on_grid(rng, spread):
    return {name: np.array(rng.integers(-spread, spread + 1, s)) / 64 for name, s in SHAPES.items()}


def case(seed, num_models=4, spread=8):
    """A base and fine-tuned models; a small `spread` makes many ties and cancellations."""
    rng = np.random.default_rng(seed)
    base = on_grid(rng, 64)
    models = []
    for _ in range(num_models):
        delta = on_grid(rng, spread)
        models.append({name: base[name] + delta[name] for name in base})
    return base, models


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def assert_agree(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-12, atol=1e-13, err_msg=name
        )


@pytest.mark.parametrize("num_models", [1, 4])
def test_averages(num_models):
    base, models = case(num_models, num_models)
    given, given_base = to_jax(models), to_jax(base)
    weights = np.arange(1.0, num_models + 1)
    assert_agree(jax.jit(merge.average())(given), merging.average(models))
    assert_agree(jax.jit(merge.average(weights))(given), merging.average(models, weights))
    assert_agree(
        jax.jit(merge.task_arithmetic(0.4))(given, base=given_base),
        merging.task_arithmetic(models, base, 0.4),
    )
    signed = weights * (-1) ** np.arange(num_models)
    assert_agree(
        jax.jit(merge.task_arithmetic(1.5, signed))(given, base=given_base),
        merging.task_arithmetic(models, base, 1.5, signed),
    )


@pytest.mark.parametrize(
    ("scope", "reduce"), [("model", "mean"), ("model", "max"), ("leaf", "mean"), ("leaf", "sum")]
)
def test_ties(scope, reduce):
    @jax.jit
    def method(models, base, density):
        return merge.ties(density, 0.7, scope=scope, reduce=reduce)(models, base=base)

    # With a small spread most magnitudes tie and many sums cancel.
    for seed, (spread, density) in enumerate([(1, 0.2), (2, 0.5), (8, 0.35), (3, 1.0), (40, 0.02)]):
        base, models = case(seed, 3, spread)
        assert_agree(
            method(to_jax(models), to_jax(base), density),
            merging.ties(models, base, density, 0.7, scope, reduce),
        )


@pytest.mark.parametrize("majority", [-1, 1])
def test_ties_undecided_signs_follow_the_majority(majority):
    base = {"x": np.zeros(4)}
    deltas = np.array([[2, 1, -1, 3], [-2, 1, -1, 3]]) * np.array([1, 1, 1, majority]) / 4
    deltas[:, 1:3] = majority / 4
    models = [{"x": delta} for delta in deltas]
    merged = jax.jit(merge.ties(1.0))(to_jax(models), base=to_jax(base))
    assert_agree(merged, merging.ties(models, base, 1.0, 1.0))
    assert np.sign(merged["x"][0]) == majority


def test_ties_mergekit():
    weights = np.array([0.7, 0.2, 0.9])
    rng = np.random.default_rng(0)
    # Without ties: there mergekit's own choice depends on an unstable sort.
    base = {name: rng.normal(size=shape) for name, shape in SHAPES.items() if np.prod(shape) > 1}
    models = [{name: x + rng.normal(size=x.shape) for name, x in base.items()} for _ in weights]
    method = merge.chain(
        merge.trim(0.6, scope="leaf", exact=True),
        merge.weigh(weights),
        merge.elect_sign(zero="positive"),
        merge.reduce("mean"),
        merge.rescale(0.3),
    )
    assert_agree(
        jax.jit(method)(to_jax(models), base=to_jax(base)),
        merging.ties_mergekit(models, base, 0.6, 0.3, weights),
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t):
    rng = np.random.default_rng(3)
    a = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    b = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    b["conv/bias"] = 3 * a["conv/bias"]  # parallel: the straight line
    b["dense/kernel"] = -a["dense/kernel"]  # opposite: the straight line
    a["conv/kernel"] = np.zeros(SHAPES["conv/kernel"])  # no direction
    assert_agree(jax.jit(merge.slerp(t))(to_jax([a, b])), merging.slerp(t, a, b))


@pytest.mark.parametrize("floor_mode", ["max", "first", "add"])
def test_fisher(floor_mode):
    _, models = case(5, 3)
    rng = np.random.default_rng(6)
    # Some far below the floor, some zero in every model.
    fishers = [
        {name: np.array(rng.exponential(size=s) ** 8 * 1e-4) for name, s in SHAPES.items()}
        for _ in models
    ]
    for fisher in fishers:
        fisher["conv/bias"][:2] = 0
    weights = np.array([0.2, 0.5, 0.3])
    for normalize in (False, True) if floor_mode != "add" else (False,):
        method = merge.fisher(weights, 1e-5, normalize, floor_mode=floor_mode)
        assert_agree(
            jax.jit(method)(to_jax(models), fishers=to_jax(fishers)),
            merging.fisher_merge(models, fishers, weights, 1e-5, normalize, floor_mode),
        )


def test_exact_diagonal_fisher():
    rng = np.random.default_rng(7)
    params = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}
    inputs = rng.normal(size=(7, 5))

    def log_probs(params, x):
        return jax.nn.log_softmax(x @ params["kernel"] + params["bias"])

    found = merge.diagonal_fisher(log_probs, to_jax(params), jnp.asarray(inputs))
    expected = merging.softmax_classifier_fisher(params["kernel"], params["bias"], inputs)
    assert_agree(found, expected)
