"""Models that do not match, tied leaves, and the report of a merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge, trees


def leaf(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def model(seed, rows=5):
    return {"embed": leaf(seed, rows, 3), "out": leaf(seed + 50, 3), "steps": seed}


BASE, MODELS = model(0), [model(1), model(2)]
METHOD = merge.task_arithmetic(0.5)


def equal(found, expected):
    trees.check_same_structure(found, expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("how", ["base", "fill", "overlap"])
def test_models_that_match_merge_as_ever(how):
    expected = METHOD(MODELS, base=BASE)
    equal(METHOD(MODELS, base=BASE, on_mismatch=how), expected)
    equal(METHOD(trees.stack(MODELS), base=BASE, on_mismatch=how), expected)


def test_missing_and_extra_leaves():
    odd = {"embed": MODELS[1]["embed"], "extra": leaf(9, 2), "steps": 4}
    with pytest.raises(ValueError, match="extra"):
        METHOD([MODELS[0], odd], base=BASE)
    merged, report = METHOD([MODELS[0], odd], base=BASE, on_mismatch="base", report=True)
    expected = METHOD(MODELS, base=BASE)
    equal(merged, expected | {"out": BASE["out"]})
    assert set(report["notes"]) == {"out", "extra"}
    assert "models [1]" in report["notes"]["out"]

    filled = METHOD([MODELS[0], odd], base=BASE, on_mismatch="fill")
    equal(filled, METHOD([MODELS[0], MODELS[1] | {"out": BASE["out"]}], base=BASE))
    # Without a base the first model is the pattern.
    first = merge.average()([MODELS[0], odd], on_mismatch="base")
    equal(first, merge.average()(MODELS) | {"out": MODELS[0]["out"]})
    assert merge.average()([odd, MODELS[0]], on_mismatch="base").keys() == odd.keys()


def test_overlap_of_longer_and_shorter_leaves():
    models = [model(1, rows=7), model(2, rows=4)]
    merged, report = METHOD(models, base=BASE, on_mismatch="overlap", report=True)

    def rows(tree):
        return tree | {"embed": tree["embed"][:4]}

    expected = METHOD([rows(m) for m in models], base=rows(BASE))
    np.testing.assert_array_equal(merged["embed"][:4], expected["embed"])
    np.testing.assert_array_equal(merged["embed"][4:], BASE["embed"][4:])
    np.testing.assert_array_equal(merged["out"], expected["out"])
    assert report["notes"] == {"embed": "merged in its first [4, 3] entries"}
    # Of another rank there is no overlap.
    flat = [m | {"embed": m["embed"].ravel()} for m in models]
    copied = METHOD(flat, base=BASE, on_mismatch="overlap")
    np.testing.assert_array_equal(copied["embed"], BASE["embed"])


def test_a_stacked_model_beside_another_base():
    stacked = trees.stack([model(1, rows=7), model(2, rows=7)])
    with pytest.raises(ValueError, match="embed"):
        METHOD(stacked, base=BASE)
    merged = METHOD(stacked, base=BASE, on_mismatch="overlap")
    np.testing.assert_array_equal(merged["embed"], METHOD(MODELS, base=BASE)["embed"])


def test_widths_of_floats():
    """Merged in the widest, with the dtype of the base."""
    base = BASE | {"out": BASE["out"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="bfloat16"):
        METHOD(MODELS, base=base)
    merged = METHOD(MODELS, base=base, on_mismatch="base")
    wide = METHOD(MODELS, base=base | {"out": base["out"].astype(jnp.float32)})
    assert merged["out"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["out"], wide["out"].astype(jnp.bfloat16))


def test_a_number_where_a_float_was_expected_is_copied():
    odd = MODELS[1] | {"out": jnp.ones(3, jnp.int32)}
    merged = METHOD([MODELS[0], odd], base=BASE, on_mismatch="fill")
    equal(merged, METHOD([MODELS[0], MODELS[1] | {"out": BASE["out"]}], base=BASE))


def test_unknown_rule():
    with pytest.raises(ValueError, match="'error', 'base', 'fill', 'overlap', got 'skip'"):
        METHOD(MODELS, base=BASE, on_mismatch="skip")


def tie(tree):
    return tree | {"head": tree["embed"]}


@pytest.mark.parametrize("how", ["error", "overlap"])
def test_tied_leaves_stay_tied_and_count_once(how):
    base, models = tie(BASE), [tie(m) for m in MODELS]
    method = merge.ties(0.3)
    merged, report = method(models, base=base, on_mismatch=how, report=True)
    assert merged["head"] is merged["embed"]
    # The threshold over the whole model is that of a model without the second name.
    np.testing.assert_array_equal(merged["embed"], method(MODELS, base=BASE)["embed"])
    assert report["notes"] == {"head": "tied to embed"}


def test_leaves_tied_in_one_model_only_are_not_tied():
    models = [tie(MODELS[0]), MODELS[1] | {"head": leaf(7, 5, 3)}]
    merged = METHOD(models, base=tie(BASE))
    assert not np.array_equal(merged["head"], merged["embed"])
    stacked = METHOD(trees.stack(models), base=tie(BASE))
    equal(stacked, merged)


def test_report_and_its_table():
    merged, report = METHOD(MODELS, base=BASE, report=True)
    equal(merged, METHOD(MODELS, base=BASE))
    assert report == merge.report(MODELS, base=BASE, merged=merged)
    row = report["leaves"]["out"]
    taus = [np.asarray(m["out"] - BASE["out"], np.float64) for m in MODELS]
    np.testing.assert_allclose(row["norm"], [np.linalg.norm(t) for t in taus], rtol=1e-6)
    cosine = taus[0] @ taus[1] / np.linalg.norm(taus[0]) / np.linalg.norm(taus[1])
    np.testing.assert_allclose(row["cosine"][0][1], cosine, rtol=1e-5)
    assert row["conflict"] == pytest.approx(np.mean(taus[0] * taus[1] < 0))
    assert row["size"] == 3
    assert report["copied"] == {"steps": True}
    text = merge.table(report)
    assert "steps  copied, though the models differ in it" in text
    assert text.splitlines()[0].split()[-3:] == ["merged", "norm", "kept"]
