"""Robust aggregation against its restatement, and what the faulty models may hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from mixlab.merge import geometry, robust
from tests.reference import merging_robust as reference

N = 9
ROWS = np.random.default_rng(0).normal(size=(N, 6)) + np.linspace(0, 2, N)[:, None]
BASE = np.random.default_rng(1).normal(size=6)


def model(rows):
    return {"a": jnp.asarray(rows[..., :2]), "b": jnp.asarray(rows[..., 2:])}


def joined(tree):
    return np.concatenate([tree["a"], tree["b"]])


def flag_by_hand(lam):
    taus = ROWS - BASE
    y = reference.flag(taus, 2, lam, None, 4)
    return BASE + (taus @ y @ y.T).mean(axis=0)


def test_against_the_restatement():
    weights = np.linspace(0.5, 1.5, N)
    mean = weights @ ROWS / weights.sum()
    cases = {
        "krum": (merge.krum(2), ROWS[reference.krum_order(ROWS, 2)[0]]),
        "multi_krum": (merge.multi_krum(2), reference.multi_krum(ROWS, 2, N - 4)),
        "multi_krum m": (merge.multi_krum(3, 2), reference.multi_krum(ROWS, 3, 2)),
        "bulyan": (merge.bulyan(1), reference.bulyan(ROWS, 1)),
        "mda": (merge.mda(3), reference.mda(ROWS, 3)),
        "smea": (merge.smea(3), reference.smea(ROWS, 3)),
        "caf": (merge.caf(3), reference.caf(ROWS, 3)),
        "monna": (merge.monna(2, trusted=3), reference.nnm(ROWS, 2)[3]),
        "nnm": (merge.nnm(2) | merge.average(), reference.nnm(ROWS, 2).mean(axis=0)),
        "clipping": (
            merge.clipping(1.5) | merge.average(),
            BASE + reference.clipped(ROWS - BASE, 1.5).mean(axis=0),
        ),
        "arc": (
            merge.arc(2) | merge.median(),
            np.median(BASE + reference.arc(ROWS - BASE, 2), axis=0),
        ),
        "twice": (
            merge.arc(2) | merge.nnm(2) | merge.krum(2),
            reference.krum(reference.nnm(BASE + reference.arc(ROWS - BASE, 2), 2), 2),
        ),
        "trimmed_mean": (merge.trimmed_mean(4), np.median(ROWS, axis=0)),
        "phocas": (
            merge.phocas(3),
            reference.mean_around(reference.trimmed_mean(ROWS, 3), ROWS, N - 3),
        ),
        "meamed": (merge.meamed(4), reference.mean_around(np.median(ROWS, axis=0), ROWS, N - 4)),
        "geometric_median": (
            merge.geometric_median(weights=weights),
            reference.geometric_median(ROWS, weights, 1e-6, 100, mean),
        ),
        "centered_clipping": (
            merge.centered_clipping(1.5, 3),
            reference.centered_clipping(ROWS, BASE, 1.5, 3),
        ),
        "flag": (merge.flag(2, 4), flag_by_hand(0.0)),
        "flag pairs": (merge.flag(2, 4, lam=20.0), flag_by_hand(20.0)),
    }
    methods = {name: method for name, (method, _) in cases.items()}
    run = jax.jit(lambda m, b: {name: method(m, base=b) for name, method in methods.items()})
    for name, found in run(model(ROWS), model(BASE)).items():
        np.testing.assert_allclose(joined(found), cases[name][1], atol=1e-5, err_msg=name)


def test_the_geometric_median_has_the_smallest_sum_of_distances():
    found = joined(merge.geometric_median()(model(ROWS)))
    directions = (ROWS - found) / np.linalg.norm(ROWS - found, axis=1, keepdims=True)
    assert np.linalg.norm(directions.sum(axis=0)) < 1e-4


TWO_FAULTY = {
    "median": merge.median(),
    "trimmed_mean": merge.trimmed_mean(2),
    "phocas": merge.phocas(2),
    "meamed": merge.meamed(2),
    "krum": merge.krum(2),
    "multi_krum": merge.multi_krum(2),
    "mda": merge.mda(2),
    "smea": merge.smea(2),
    "caf": merge.caf(2),
    "monna": merge.monna(2, trusted=5),
    "nnm": merge.nnm(2) | merge.trimmed_mean(2),
    "geometric_median": merge.geometric_median(),
}


@jax.jit
def with_two_faulty(models, base):
    bounded = {name: method(models) for name, method in TWO_FAULTY.items()}
    return (
        bounded,
        merge.centered_clipping(1.0)(models, base=base),
        merge.flag(2)(models, base=base),
    )


@pytest.mark.parametrize("faulty", [np.nan, np.inf, 3e38, 1e6])
def test_faulty_models_may_hold_anything(faulty):
    """Two of nine: the merge stays among the honest ones, however large the models are."""
    rows = (ROWS + 300).astype(np.float32)
    rows[:2, 1:4] = faulty
    honest = rows[2:]
    bounded, clipped, projected = with_two_faulty(model(rows), model(honest[0]))
    low, high = honest.min(axis=0) - 1e-3, honest.max(axis=0) + 1e-3
    for name, found in bounded.items():
        assert np.all((joined(found) >= low) & (joined(found) <= high)), name
    assert np.linalg.norm(joined(clipped) - honest[0]) <= 1.001
    assert np.all(np.isfinite(joined(projected)))


def test_distances_of_large_models_that_are_alike():
    rows = np.float32(1000) + np.arange(3, dtype=np.float32)[:, None] * np.ones(50, np.float32)
    found = geometry.squared_distances(merge.core.open_models({"w": rows}).leaves)
    np.testing.assert_array_equal(found, 50 * np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]]))


def test_more_models_than_the_network_sorts():
    rows = np.random.default_rng(2).normal(size=(robust._MOST_IN_NETWORK + 1, 3))
    for few in (rows, rows[:13]):
        values = np.stack(robust._sorted(jnp.asarray(few)))
        np.testing.assert_array_equal(values, np.sort(few.astype(np.float32), axis=0))


def test_too_many_faulty_models_are_an_error_that_states_the_rule():
    models = [model(row) for row in ROWS[:4]]
    for method, rule in {
        merge.krum(1): "krum needs n >= 2f [+] 3: with f = 1 faulty models at least 5 models",
        merge.multi_krum(1): "multi_krum needs n >= 2f [+] 3",
        merge.bulyan(1): "bulyan needs n >= 4f [+] 3.* at least 7 models, got n = 4",
        merge.mda(2): "mda needs n >= 2f [+] 1",
        merge.smea(2): "smea needs n >= 2f [+] 1",
        merge.caf(2): "caf needs n >= 2f [+] 1",
        merge.monna(2): "monna needs n >= 2f [+] 1",
        merge.monna(1, trusted=4): "trusted must lie between 0 and 3, got 4",
        merge.nnm(2) | merge.average(): "nnm needs n >= 2f [+] 1",
        merge.arc(2) | merge.average(): "arc needs n >= 2f [+] 1",
        merge.bucketing(2) | merge.average(): "bucketing is random: give the merge a key=",
        merge.trimmed_mean(2): "trimmed_mean needs n >= 2f [+] 1",
        merge.phocas(2): "phocas needs n >= 2f [+] 1",
        merge.meamed(2): "meamed needs n >= 2f [+] 1",
        merge.multi_krum(0, 5): "m must lie between 1 and 4, got 5",
        merge.krum(0, neighbours=4): "neighbours must lie between 1 and 3, got 4",
        merge.flag(5): "rank must be at most the number of models, 4",
    }.items():
        with pytest.raises(ValueError, match=rule):
            method(models)
    with pytest.raises(ValueError, match="num_byzantine must be at least 0"):
        merge.mda(-1)
    with pytest.raises(ValueError, match="num_byzantine must be an integer, got 0"):
        merge.krum(0.5)
    with pytest.raises(ValueError, match="mda tries every subset of n - f models, here 145422675"):
        merge.mda(14)([{"w": np.float32(1)}] * 30)


def test_zero_and_equal_task_vectors():
    """Fewer directions than the rank, and none at all."""
    base = model(BASE)
    for rows in (np.stack([BASE] * 4), np.stack([BASE] * 3 + [ROWS[0]])):
        for keep in (True, False):
            found = joined(merge.flag(3, 3, keep_magnitude=keep)(model(rows), base=base))
            step = (ROWS[0] - BASE) * float(rows is not None and np.any(rows[3] != BASE))
            step = step / 4 if keep else step / max(np.linalg.norm(step), 1e-9) / 3
            np.testing.assert_allclose(found, BASE + step, atol=1e-5)


def test_buckets_are_of_all_models_once():
    rows = np.eye(5, dtype=np.float32)
    mix = merge.bucketing(2)
    found = np.stack([joined(m) for m in mix(model(rows), key=jax.random.key(0))])
    assert sorted(np.count_nonzero(found, axis=1)) == [1, 2, 2]
    np.testing.assert_array_equal(np.sum(found > 0, axis=0), 1)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    other = np.stack([joined(m) for m in mix(model(rows), key=jax.random.key(1))])
    assert not np.array_equal(found, other)


def test_pre_aggregations_in_text_and_on_every_kind_of_leaf():
    models = [
        {"w": jnp.ones(2, jnp.bfloat16) * i, "n": jnp.int32(i), "none": None} for i in range(5)
    ]
    base = models[0]
    for text in (
        "nnm(1) | krum(1)",
        "clipping(radius=2.0) | bucketing | nnm(1) | median",
        "arc(1) | trim(0.5) | reduce('mean')",
    ):
        method = merge.parse(text)
        run = jax.jit(lambda many, key, method=method: method(many, base=base, key=key))
        found = run(models, jax.random.key(0))
        assert found["w"].dtype == jnp.bfloat16
        assert 0 < found["w"][0] < 4
        assert found["n"] == 0
        assert found["none"] is None
    in_a_list = [[m["w"], m["n"]] for m in models]
    assert type((merge.nnm(1) | merge.average())(in_a_list)) is list
    with pytest.raises(ValueError, match="makes no model yet: let a method follow"):
        merge.parse("nnm(2)")
    with pytest.raises(TypeError, match="unsupported operand"):
        merge.nnm(1) | "krum(1)"
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        merge.bucketing(0)


def test_equal_models_have_a_gradient_through_adaptive_clipping():
    base = {"w": jnp.ones(3)}
    method = merge.parse("arc(1) | average()")
    found = jax.grad(lambda w: method([{"w": w}] * 3, base=base)["w"].sum())(jnp.ones(3))
    assert np.isfinite(found).all()
