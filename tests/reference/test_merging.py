"""The restatements of merging against the vectors recorded from the reference implementations."""

import json

import numpy as np
import pytest

from tests import golden
from tests.reference import merging

ATOL = 2e-6


def tree(vectors, case):
    prefix = f"{case}::"
    return {key.removeprefix(prefix): vectors[key] for key in vectors if key.startswith(prefix)}


def inputs():
    vectors = golden.load("merging/public_inputs")
    return tree(vectors, "base"), [tree(vectors, f"ft{i}") for i in range(4)]


def load(name):
    vectors = golden.load(f"merging/{name}")
    return vectors, json.loads(str(vectors["__meta__"]))


def assert_trees_close(found, expected, **kwargs):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name], **{"rtol": 0, "atol": ATOL, "err_msg": name, **kwargs}
        )


def test_linear():
    base, models = inputs()
    vectors, meta = load("public_linear")
    assert_trees_close(merging.average(models), tree(vectors, "average/fusionbench"))
    for normalize in (True, False):
        case = f"weighted/mergekit/normalize={normalize}"
        merge = merging.average if normalize else merging.weighted_sum
        assert_trees_close(merge(models, meta[case]["weights"]), tree(vectors, case))
        case = f"task_arithmetic/mergekit/normalize={normalize}"
        weights = np.array(meta[case]["weights"])
        weights = weights / weights.sum() if normalize else weights
        merged = merging.task_arithmetic(models, base, meta[case]["lam"], weights)
        assert_trees_close(merged, tree(vectors, case))
    merged = merging.task_arithmetic(models, base, 0.3)
    assert_trees_close(merged, tree(vectors, "task_arithmetic/fusionbench"))


@pytest.mark.parametrize("k", ["20", "0.5"])
def test_ties(k):
    base, models = inputs()
    vectors, meta = load("public_ties")
    density = float(k) / 100 if float(k) > 1 else float(k)
    taus = np.stack([merging.flatten(merging.task_vector(m, base)) for m in models])
    mask = merging.ties_trim(taus, density)
    np.testing.assert_array_equal(mask, vectors[f"ties/official/K={k}/trim_mask_flat"])
    np.testing.assert_array_equal(
        merging.ties_elect(np.where(mask, taus, 0)),
        vectors[f"ties/official/K={k}/elected_sign_flat"],
    )
    for reduce in ("mean", "sum", "max"):
        case = f"ties/official/K={k}/mass/dis-{reduce}"
        merged = merging.ties(models, base, density, meta[case]["lam"], reduce=reduce)
        assert_trees_close(merged, tree(vectors, case))
    case = f"ties/fusionbench/K={k}/sum"
    merged = merging.ties(models, base, density, meta[case]["scaling_factor"], reduce="sum")
    assert_trees_close(merged, tree(vectors, case))


@pytest.mark.parametrize("density", ["0.2", "0.6"])
def test_ties_mergekit(density):
    base, models = inputs()
    vectors, meta = load("public_ties")
    for normalize in (True, False):
        case = f"ties/mergekit/density={density}/normalize={normalize}"
        merged = merging.ties_mergekit(
            models, base, float(density), meta[case]["lam"], meta[case]["weights"], normalize
        )
        assert_trees_close(merged, tree(vectors, case))
    case = f"ties/mergekit/density={density}/unit_weights"
    merged = merging.ties_mergekit(models, base, float(density), 1.0, np.ones(4))
    assert_trees_close(merged, tree(vectors, case))


@pytest.mark.parametrize("k", ["25", "50", "75", "0.5"])
def test_ties_edge(k):
    vectors, _ = load("public_ties")
    deltas = vectors["ties_edge/deltas"].astype(np.float64)
    mask = merging.ties_trim(deltas, float(k) / 100 if float(k) > 1 else float(k))
    trimmed = np.where(mask, deltas, 0)
    sign = merging.ties_elect(trimmed)
    np.testing.assert_array_equal(mask, vectors[f"ties_edge/K={k}/mask"])
    np.testing.assert_array_equal(trimmed, vectors[f"ties_edge/K={k}/trimmed"])
    np.testing.assert_array_equal(sign, vectors[f"ties_edge/K={k}/sign"])
    for reduce in ("mean", "sum", "max"):
        np.testing.assert_allclose(
            merging.ties_reduce(trimmed, sign, reduce),
            vectors[f"ties_edge/K={k}/dis-{reduce}"],
            atol=ATOL,
        )


def test_ties_mergekit_counts_undecided_signs_as_plus():
    vectors, _ = load("public_ties")
    models = [{"x": delta} for delta in vectors["ties_edge/deltas"]]
    base = {"x": np.zeros(8, np.float32)}
    merged = merging.ties_mergekit(models, base, 1.0, 1.0, np.ones(3))
    assert_trees_close(merged, tree(vectors, "ties_edge/mergekit/density=1"))


def test_ties_trim_to_nothing_keeps_the_largest():
    vectors, _ = load("public_ties")
    deltas = vectors["ties_edge/deltas"]
    trimmed = np.where(merging.ties_trim(deltas, 0.0), deltas, 0)
    np.testing.assert_array_equal(trimmed, vectors["ties_edge/K=0.0/trimmed"])


def test_slerp():
    base, models = inputs()
    vectors, _ = load("public_spherical")
    deltas = [merging.task_vector(m, base) for m in models]
    for t in ("0.0", "0.3", "0.5", "1.0"):
        for reference in ("mergekit", "fusionbench"):
            expected = tree(vectors, f"slerp/{reference}/t={t}")
            assert_trees_close(merging.slerp(float(t), models[0], models[1]), expected)
        expected = tree(vectors, f"slerp_of_deltas/mergekit/t={t}")
        assert_trees_close(merging.slerp(float(t), deltas[0], deltas[1]), expected)


def test_slerp_edge():
    vectors, _ = load("public_spherical")
    v = vectors["slerp_edge/v"].astype(np.float64)
    pairs = {
        "zero_v": (0 * v, v),
        "v_zero": (v, 0 * v),
        "v_2v": (v, 2 * v),
        "v_minus_v": (v, -v),
        "v_v": (v, v),
    }
    for pair, (a, b) in pairs.items():
        for t in ("0.25", "0.5"):
            expected = vectors[f"slerp_edge/{pair}/t={t}/mergekit_slerp"]
            found = merging.slerp_vector(float(t), a, b)
            np.testing.assert_allclose(found, expected, atol=ATOL, err_msg=pair)


def test_fisher():
    _, models = inputs()
    added, meta_added = load("public_fisher")
    official, meta_official = load("public_fisher_official")
    fishers = [tree(added, f"fisher/ft{i}") for i in range(4)]
    for case, settings in meta_added.items():
        if case.startswith("merged/"):
            merged = merging.fisher_merge(
                models,
                fishers,
                settings["coefficients"],
                settings["floor"],
                "normalize=True" in case,
                floor_mode="add",
            )
            assert_trees_close(merged, tree(added, case), err_msg=case)
    for case, settings in meta_official.items():
        if case.startswith("merged/"):
            merged = merging.fisher_merge(
                models,
                fishers,
                settings["coefficients"],
                settings["fisher_floor"],
                settings["normalize_fishers"],
                floor_mode="first" if settings["favor_target_model"] else "max",
            )
            assert_trees_close(merged, tree(official, case), err_msg=case)


def test_exact_fisher():
    added, _ = load("public_fisher")
    official, _ = load("public_fisher_official")
    for model in ("model0", "model1"):
        fisher = merging.softmax_classifier_fisher(
            added[f"tiny/{model}/kernel"], added[f"tiny/{model}/bias"], added["tiny/X"]
        )
        for leaf, found in fisher.items():
            np.testing.assert_allclose(
                found, official[f"tiny/official/fisher/{model}/{leaf}"], atol=ATOL
            )
