"""Recorded results of mergekit's and FusionBench's sparse methods, with the recorded masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests import golden
from tests.merge.test_golden import WEIGHTS, check, compare, tree

SCALE = 0.3
KEEP = np.float32(1 - 0.7)
SMALL = ("conv/bias", "layer1/bias", "layer2/bias", "norm/scale")


@pytest.fixture(scope="module")
def inputs():
    vectors = golden.load("merging/public_inputs")
    return tree(vectors, "base"), [tree(vectors, f"ft{i}") for i in range(4)]


@pytest.fixture(scope="module")
def vectors():
    return golden.load("merging/public_sparse")


def stacked(vectors, case):
    """A recorded tree of each model, stacked."""
    columns = [tree(vectors, f"{case}/ft{i}") for i in range(4)]
    return {name: np.stack([column[name] for column in columns]) for name in columns[0]}


def plan_of(uniform, probability):
    """What `drop` decides where it draws these numbers."""
    return {
        name: {"probability": probability[name], "kept": u < probability[name]}
        for name, u in uniform.items()
    }


def replay(methods, decided, models, base):
    """Merges with the decisions `{case: plan of drop}` in place of those that are drawn."""

    @jax.jit
    def run(decided, models, base):
        merged = {}
        for case, method in methods.items():
            plan = method.measure(models, base, jax.random.key(0))
            plan["0/drop"] = decided[case]
            merged[case] = method.combine(plan, models, base)
        return merged

    return run(decided, models, base)


def test_dare(inputs, vectors):
    base, models = inputs
    uniform, masks = stacked(vectors, "uniform"), stacked(vectors, "mask/keep=0.30")
    plan = plan_of(uniform, dict.fromkeys(uniform, KEEP))
    for name, leaf in plan.items():
        np.testing.assert_array_equal(leaf["kept"], masks[name])

    methods = {
        f"dare_{consensus}/mergekit/rescale={rescale is not None}": merge.dare(
            KEEP, SCALE, rescale=rescale, consensus=consensus, weights=WEIGHTS
        )
        for rescale in ("l1", None)
        for consensus in ("linear", "ties")
    }
    for case, merged in replay(methods, dict.fromkeys(methods, plan), models, base).items():
        compare(merged, vectors, case)


def test_dare_of_one_model(inputs, vectors):
    """FusionBench keeps where 1 - u > p; Twin-Merging leaves leaves of one axis as they are."""
    base, models = inputs
    uniform = stacked(vectors, "uniform")
    for name, u in uniform.items():
        np.testing.assert_array_equal(1 - u > np.float32(0.7), u < KEEP, err_msg=name)
    of_twin = {name: KEEP if leaf.ndim > 1 else np.float32(1) for name, leaf in base.items()}
    plans = {
        "dare_drop/fusionbench": plan_of(uniform, dict.fromkeys(uniform, KEEP)),
        "dare_drop/twin_merging": plan_of(uniform, of_twin),
    }
    stage = merge.drop(KEEP)

    @jax.jit
    def dropped(plan, models):
        def leaf(name):
            taus = jnp.stack([model[name] - base[name] for model in models])
            return stage.apply(plan, name, merge.TaskVectors(taus, jnp.ones(4))).values

        return {name: leaf(name) for name in base}

    for case, plan in plans.items():
        values = dropped(plan, models)
        for i in range(4):
            model = {name: leaf[i] for name, leaf in values.items()}
            compare(model, vectors, f"{case}/ft{i}")


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_della(inputs, vectors, density):
    base, models = inputs
    epsilon = 0.15
    probability = tree(vectors, f"della_keep_probability/density={density}")
    probability = {name: p.reshape(4, *base[name].shape) for name, p in probability.items()}

    method = merge.della(density, epsilon, axis=1)
    found = jax.jit(method.measure)(models, base, jax.random.key(0))["0/drop"]
    for name, p in probability.items():
        # Which of equal magnitudes ranks first, torch leaves open; a delta of 0 has many equals.
        moved = np.stack([model[name] - base[name] for model in models]) != 0
        np.testing.assert_allclose(found[name]["probability"][moved], p[moved], atol=1e-7)

    plan = plan_of(stacked(vectors, "uniform"), probability)
    methods = {}
    for rescale in ("l1", None):
        end = f"mergekit/density={density}/rescale={rescale is not None}"
        options = {"rescale": rescale, "axis": 1, "weights": WEIGHTS}
        methods[f"della/{end}"] = merge.della(density, epsilon, SCALE, **options)
        methods[f"della_linear/{end}"] = merge.della(
            density, epsilon, SCALE, consensus="linear", normalize=False, **options
        )
    for case, merged in replay(methods, dict.fromkeys(methods, plan), models, base).items():
        compare(merged, vectors, case)


def test_breadcrumbs(inputs, vectors):
    """Leaves without outliers too, which the reference sets to the base."""
    base, models = inputs
    methods = {}
    for density in (0.2, 0.6):
        for end, consensus in (("", "linear"), ("_ties", "ties")):
            methods[f"breadcrumbs{end}/mergekit/density={density}"] = merge.breadcrumbs(
                density, 0.05, SCALE, consensus=consensus, weights=WEIGHTS
            )
    run = jax.jit(lambda *a, **k: {case: m(*a, **k) for case, m in methods.items()})
    for case, merged in run(models, base=base).items():
        expected = tree(vectors, case)
        density = float(case.rsplit("=")[-1])
        for name in SMALL:
            np.testing.assert_array_equal(expected[name], base[name])
            taus = np.stack([model[name] - base[name] for model in models]).astype(np.float64)
            kept = int(density * base[name].size)
            for tau in taus:
                tau[np.argsort(-np.abs(tau), kind="stable")[kept:]] = 0
            taus *= np.asarray(WEIGHTS)[:, None]
            if "ties" in case:
                taus[np.sign(taus) != np.where(taus.sum(axis=0) >= 0, 1, -1)] = 0
            expected[name] = base[name] + SCALE * taus.sum(axis=0)
            assert np.any(expected[name] != base[name])
        compare(merged, {f"{case}::{name}": leaf for name, leaf in expected.items()}, case)


def test_sce_and_magmax(inputs):
    base, models = inputs
    geometry, linear = golden.load("merging/public_geometry"), golden.load("merging/public_linear")
    methods = {f"sce/mergekit/topk={topk}": merge.sce(topk) for topk in (1.0, 0.4)}
    methods["magmax/fusionbench"] = merge.magmax(SCALE)
    check(methods, geometry | linear, models, base)
