"""Fisher merging and the Fishers themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3)).astype(np.float32)
PARAMS = {
    "kernel": RNG.normal(size=(3, 4)).astype(np.float32),
    "steps": np.asarray(3, np.int32),
    "bias": None,
}


def log_probs(params, x):
    return jax.nn.log_softmax(x @ params["kernel"])


def by_hand(x, weights):
    """Mean over examples of `sum_y weights[y] (d log p_y / d kernel)^2`, `[n, classes]` weights."""
    p = np.exp(np.asarray(log_probs(PARAMS, x), np.float64))
    total = np.zeros(PARAMS["kernel"].shape)
    for row, p_row, w_row in zip(x, p, weights, strict=True):
        for y, w in enumerate(w_row):
            total += w * np.outer(row, np.eye(len(p_row))[y] - p_row) ** 2
    return total / len(x)


LABELS = np.asarray([0, 1, 2, 3, 1])


def all_modes(key, **kwargs):
    fisher = functools.partial(merge.diagonal_fisher, log_probs, PARAMS, **kwargs)
    return {
        "exact": fisher(X),
        "given": fisher(X, labels=LABELS),
        "sampled": fisher(X, labels="sampled", key=key),
    }


def test_the_three_kinds_of_labels(key):
    found = all_modes(key)
    p = np.exp(log_probs(PARAMS, X))
    np.testing.assert_allclose(found["exact"]["kernel"], by_hand(X, p), rtol=1e-5)
    one_hot = np.eye(4)[LABELS]
    np.testing.assert_allclose(found["given"]["kernel"], by_hand(X, one_hot), rtol=1e-5)
    assert found["exact"]["bias"] is None
    assert found["exact"]["steps"].dtype == PARAMS["steps"].dtype
    assert found["exact"]["steps"] == 0

    # Sampled labels agree with the exact expectation on average, and are drawn anew by example.
    many = np.repeat(X, 800, axis=0)
    sampled = merge.diagonal_fisher(
        log_probs, PARAMS, many, labels="sampled", key=key, at_once=1000
    )
    np.testing.assert_allclose(sampled["kernel"], by_hand(X, p), rtol=0.2)
    other = merge.diagonal_fisher(log_probs, PARAMS, X, labels="sampled", key=jax.random.key(1))
    assert not np.array_equal(found["sampled"]["kernel"], other["kernel"])


@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_batches_do_not_matter(key, at_once):
    """Neither how many gradients are taken at a time, with remainders, nor how the data come."""
    expected = all_modes(key)
    found = all_modes(key, at_once=at_once)
    cuts = (slice(0, 2), slice(2, 2), slice(2, 5))
    fisher = functools.partial(merge.diagonal_fisher, log_probs, PARAMS, at_once=at_once)
    streamed = {
        "exact": fisher(X[cut] for cut in cuts),
        "given": fisher(((X[cut], LABELS[cut]) for cut in cuts), labels="empirical"),
        "sampled": fisher((X[cut] for cut in cuts), labels="sampled", key=key),
    }
    for mode, value in expected.items():
        for other in (found, streamed):
            np.testing.assert_allclose(other[mode]["kernel"], value["kernel"], rtol=1e-5)


def test_inputs_may_be_a_tree():
    def of_dict(params, inputs):
        return log_probs(params, inputs["x"] + inputs["y"])

    found = merge.diagonal_fisher(of_dict, PARAMS, {"x": X, "y": np.zeros_like(X)})
    expected = merge.diagonal_fisher(log_probs, PARAMS, X)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-6)


def test_narrow_params_have_a_wide_fisher():
    params = {"kernel": jnp.asarray(PARAMS["kernel"], jnp.bfloat16)}
    found = merge.diagonal_fisher(log_probs, params, jnp.asarray(X, jnp.bfloat16))
    assert found["kernel"].dtype == jnp.float32
    p = np.exp(log_probs(PARAMS, X))
    np.testing.assert_allclose(found["kernel"], by_hand(X, p), rtol=0.1)


def test_wrong_labels_and_inputs():
    def fisher(x=X, **kwargs):
        return merge.diagonal_fisher(log_probs, PARAMS, x, **kwargs)

    with pytest.raises(ValueError, match="'exact', 'sampled'"):
        fisher(labels="true")
    with pytest.raises(ValueError, match="give a key="):
        fisher(labels="sampled")
    with pytest.raises(ValueError, match="each of 5 inputs"):
        fisher(labels=np.asarray([1, 2]))
    with pytest.raises(TypeError, match="integers"):
        fisher(labels=np.ones(5, np.float32))
    with pytest.raises(ValueError, match="between 0 and 3"):
        fisher(labels=np.asarray([0, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match="N at least 1"):
        fisher(X[:0])
    with pytest.raises(ValueError, match="N at least 1"):
        fisher(iter([]))
    with pytest.raises(ValueError, match="at_once"):
        fisher(at_once=0)
    for batch in (X, X[:2], (X,), iter([X])):
        with pytest.raises(TypeError, match=r"takes pairs \(inputs, labels \[N\]\), got a .* give"):
            fisher(batch, labels="empirical")
    with pytest.raises(TypeError, match="key is a PRNG key"):
        fisher(labels="sampled", key=0)
    with pytest.raises(ValueError, match=r"\[B, K\], got \(1,\)"):
        merge.diagonal_fisher(lambda p, x: log_probs(p, x)[:, 0], PARAMS, X)


MODELS = [{"w": jnp.asarray([1.0, 2.0]), "n": 1}, {"w": jnp.asarray([3.0, 6.0]), "n": 2}]
FISHERS = [{"w": jnp.asarray([3.0, 0.0])}, {"w": jnp.asarray([1.0, 0.0])}]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_what_is_no_fisher_is_refused_and_seen_under_jit(bad):
    wrong = [FISHERS[0], {"w": jnp.asarray([1.0, bad])}]
    stacked = jax.tree.map(lambda *x: np.stack(x), *wrong)
    for given in (wrong, stacked):
        with pytest.raises(
            ValueError, match=rf"leaf 'w' of model 1 must be finite .* got {bad} at \[1\]"
        ):
            merge.fisher()(MODELS, fishers=given)
    for mode in ("max", "first", "add"):
        for floor in (0.0, 1e-6):
            method = merge.fisher(floor=floor, floor_mode=mode)
            merged = jax.jit(method)(MODELS, fishers=wrong)["w"]
            np.testing.assert_allclose(merged, [1.5, np.nan], rtol=1e-5)
    if bad > 0:
        return
    # The norm of such a Fisher is none either.
    assert np.isnan(jax.jit(merge.fisher(normalize=True))(MODELS, fishers=wrong)["w"][1])


def test_fishers_weigh_the_entries_and_may_lack_copied_leaves():
    merged = merge.fisher()(MODELS, fishers=FISHERS)
    np.testing.assert_allclose(merged["w"], [1.5, 4.0], rtol=1e-6)
    assert merged["n"] == 1
    # No floor: where no model knows anything, the weights alone decide.
    merged = merge.fisher([3, 1], floor=0.0)(MODELS, fishers=FISHERS)
    np.testing.assert_allclose(merged["w"], [1.2, 3.0], rtol=1e-6)
    merged = merge.fisher(floor_mode="first")(MODELS, fishers=FISHERS)
    np.testing.assert_allclose(merged["w"], [1.5, 2.0], rtol=1e-6)


def test_independent_gaussian_posteriors_multiply():
    """Means merge by precision: the posterior given all data, where the Fisher is exact."""
    rng = np.random.default_rng(1)
    data = [rng.normal(size=(n, 3)) * [1, 2, 3] for n in (4, 10)]
    models = [{"mean": x.mean(axis=0, dtype=np.float32)} for x in data]
    variance = np.asarray([1, 4, 9], np.float32)
    precisions = [{"mean": len(x) / variance} for x in data]
    merged = merge.fisher()(models, fishers=precisions)["mean"]
    np.testing.assert_allclose(merged, np.concatenate(data).mean(axis=0), rtol=1e-5)


def test_wrong_fishers():
    with pytest.raises(ValueError, match="fishers="):
        merge.fisher()(MODELS)
    with pytest.raises(ValueError, match="each of the 2 models, got 1"):
        merge.fisher()(MODELS, fishers=FISHERS[:1])
    with pytest.raises(ValueError, match="'w' of shape \\[2\\], got none"):
        merge.fisher()(MODELS, fishers=[{"v": f["w"]} for f in FISHERS])
    with pytest.raises(ValueError, match="got \\[1\\]"):
        merge.fisher()(MODELS, fishers=[{"w": f["w"][:1]} for f in FISHERS])
    fishers = [FISHERS[0], {"w": jnp.zeros(2)}]
    with pytest.raises(ValueError, match=r"models \[1\] are zero everywhere"):
        merge.fisher(normalize=True)(MODELS, fishers=fishers)
    with pytest.raises(ValueError, match="floor"):
        merge.fisher(floor=-1.0)
