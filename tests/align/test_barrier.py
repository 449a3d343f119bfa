import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align

REFERENCE = {"x": jnp.zeros(2), "half": jnp.zeros(1, jnp.bfloat16), "steps": jnp.int32(7)}
OTHER = {"x": jnp.ones(2), "half": jnp.ones(1, jnp.bfloat16), "steps": jnp.int32(9)}
FLAT = {**OTHER, "x": jnp.zeros(2)}


@jax.jit
def evaluate(variables):
    t = variables["x"][0]
    hill = 4 * t * (1 - t)  # 1 in the middle
    return {"loss": 1 + 2 * t + 3 * hill, "accuracy": 0.9 - 0.2 * t - 0.5 * hill}


def test_the_barrier_is_the_height_above_the_line():
    seen = []

    def watched(variables):
        seen.append(variables)
        return evaluate(variables)

    found = align.barrier(watched, REFERENCE, {"hill": OTHER, "flat": FLAT}, points=5)
    hill = found["hill"]
    np.testing.assert_allclose(hill.t, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(hill.values["loss"], [1, 3.75, 5, 4.75, 3], rtol=1e-6)
    np.testing.assert_allclose(hill.values["accuracy"], [0.9, 0.475, 0.3, 0.375, 0.7], rtol=1e-6)
    assert hill.barrier == {"loss": pytest.approx(3), "accuracy": pytest.approx(0.5)}
    assert found["flat"].barrier == {"loss": 0, "accuracy": 0}
    assert all(variables["steps"] == 7 for variables in seen)
    assert seen[1]["half"].dtype == jnp.bfloat16
    assert float(seen[1]["half"][0]) == 0.25
    for end, model in ((0, REFERENCE), (4, OTHER)):
        np.testing.assert_array_equal(seen[end]["x"], model["x"])


def test_a_slope_is_no_barrier_and_more_may_be_better():
    def slope(variables):
        return {"recall": variables["x"][0], "nan": jnp.nan}

    up = align.barrier(slope, REFERENCE, {"b": OTHER}, points=3)["b"].barrier
    assert up["recall"] == 0
    assert np.isnan(up["nan"])
    # The end that is worse lies above the mean of the two.
    above = align.barrier(slope, REFERENCE, {"b": OTHER}, points=3, above="mean")["b"]
    assert above.barrier["recall"] == pytest.approx(0.5)

    def valley(variables):
        t = variables["x"][0]
        return {"recall": 1 - t * (1 - t)}

    found = align.barrier(valley, REFERENCE, {"b": OTHER}, points=3, more_is_better=["recall"])
    assert found["b"].barrier == {"recall": pytest.approx(0.25)}
    assert align.barrier(valley, REFERENCE, {"b": OTHER}, points=3)["b"].barrier["recall"] == 0


def test_models_between_the_ends_can_be_mended():
    calls = []

    def mend(merged, models, weights):
        calls.append((models, np.asarray(weights).tolist()))
        return models[0]

    found = align.barrier(evaluate, REFERENCE, {"b": OTHER}, points=5, post=mend)["b"]
    assert [weights for _, weights in calls] == [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]
    assert all(models == (REFERENCE, OTHER) for models, _ in calls)
    np.testing.assert_allclose(found.values["loss"], [1, 1, 1, 1, 3])
    assert found.barrier["loss"] == 0


def test_errors():
    with pytest.raises(ValueError, match="points must be at least 3"):
        align.barrier(evaluate, REFERENCE, {"b": OTHER}, points=2)
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        align.barrier(evaluate, REFERENCE, {"b": OTHER}, above="means")
    with pytest.raises(ValueError, match="no other models"):
        align.barrier(evaluate, REFERENCE, {})
    with pytest.raises(ValueError, match="others maps names to variables"):
        align.barrier(evaluate, REFERENCE, OTHER)
    with pytest.raises(ValueError, match=r"the reference and 'b'.*only in the first"):
        align.barrier(evaluate, REFERENCE, {"b": {"x": OTHER["x"]}})
    with pytest.raises(TypeError, match="mapping of single numbers"):
        align.barrier(lambda v: v["x"][0], REFERENCE, {"b": OTHER})
    with pytest.raises(TypeError, match="mapping of single numbers"):
        align.barrier(lambda v: {"loss": v["x"]}, REFERENCE, {"b": OTHER})
