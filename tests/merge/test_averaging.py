"""Averages: weights by pattern, over time, and by score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge


def model(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {
        "encoder": {"kernel": jnp.asarray(rng.normal(size=(2, 3)), dtype), "bias": jnp.ones(3)},
        "head": {"bias": jnp.asarray(rng.normal(size=2), dtype)},
        "steps": jnp.asarray(seed),
    }


MODELS = [model(seed) for seed in range(3)]


def mean(weights, pick):
    return np.average([pick(m) for m in MODELS[: len(weights)]], axis=0, weights=weights)


def test_weights_by_pattern():
    weights = {"encoder/kernel": [1, 0, 3], "*/bias": [0, 1, 1]}
    method = merge.average(weights)
    merged = method(MODELS)
    np.testing.assert_allclose(
        merged["encoder"]["kernel"], mean([1, 0, 3], lambda m: m["encoder"]["kernel"]), rtol=1e-6
    )
    np.testing.assert_allclose(
        merged["head"]["bias"], mean([0, 1, 1], lambda m: m["head"]["bias"]), rtol=1e-6
    )
    plan = method.measure(MODELS)
    part = method.combine(plan, [{"head": m["head"]} for m in MODELS])
    np.testing.assert_array_equal(part["head"]["bias"], merged["head"]["bias"])
    text = "interpolate({'encoder/*': 0.0, '*': 1.0})"
    mixed = jax.jit(merge.parse(text))(MODELS[:2])
    np.testing.assert_array_equal(mixed["encoder"]["kernel"], MODELS[0]["encoder"]["kernel"])
    np.testing.assert_array_equal(mixed["head"]["bias"], MODELS[1]["head"]["bias"])


def test_task_vectors_are_weighed_by_pattern():
    weights = {"encoder/kernel": [1, 0, -3], "*/bias": [0, 2, 1]}
    base, scale = model(9), 0.5
    method = merge.task_arithmetic(scale, weights)
    merged = method(MODELS, base=base)

    def by_hand(weights, pick):
        origin = np.asarray(pick(base), np.float64)
        return origin + scale * sum(
            w * (pick(m) - origin) for w, m in zip(weights, MODELS, strict=True)
        )

    for found in (merged, jax.jit(method)(MODELS, base=base)):
        kernel = by_hand([1, 0, -3], lambda m: m["encoder"]["kernel"])
        np.testing.assert_allclose(found["encoder"]["kernel"], kernel, rtol=1e-5)
        bias = by_hand([0, 2, 1], lambda m: m["head"]["bias"])
        np.testing.assert_allclose(found["head"]["bias"], bias, rtol=1e-5)
    text = "breadcrumbs(0.5, weights={'head/*': [1, 0, 0], '*': [0, 1, 2]}, consensus='ties')"
    found = merge.parse(text)(MODELS, base=base)
    for name, weights in (("head", [1, 0, 0]), ("encoder", [0, 1, 2])):
        alone = merge.breadcrumbs(0.5, weights=weights, consensus="ties")(MODELS, base=base)
        jax.tree.map(np.testing.assert_array_equal, found[name], alone[name])
    with pytest.raises(ValueError, match="each of the 3 models"):
        merge.task_arithmetic(weights={"*": [1, 1]})(MODELS, base=base)
    with pytest.raises(ValueError, match="decide for no leaf"):
        merge.task_arithmetic(weights={"decoder/*": [1, 1, 1], "*": [1, 1, 1]})(MODELS, base=base)


def test_patterns_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"matches the leaves \['head/bias'\]; end with '\*'"):
        merge.average({"encoder/*": [1, 1, 1]})(MODELS)
    with pytest.raises(ValueError, match=r"\['decoder/\*'\] decide for no leaf"):
        merge.average({"decoder/*": [1, 1, 1], "*": [1, 1, 1]})(MODELS)
    with pytest.raises(ValueError, match="an earlier pattern matches first"):
        merge.interpolate({"*": 0.5, "head/*": 1.0})(MODELS[:2])
    with pytest.raises(ValueError, match="each of the 3 models"):
        merge.average({"*": [1, 1]})(MODELS)
    with pytest.raises(ValueError, match="negative"):
        merge.average({"*": [1, -1]})
    with pytest.raises(ValueError, match="t must be finite"):
        merge.interpolate({"*": np.inf})


def test_by_depth():
    layers = [f"Block_{i}/*" for i in range(5)]
    found = merge.by_depth([0, 1, 0.5], layers)
    assert found == dict(zip(layers, [0, 0.5, 1, 0.75, 0.5], strict=True))
    pairs = merge.by_depth([[1, 0], [0, 1]], layers[:3])
    np.testing.assert_allclose(list(pairs.values()), [[1, 0], [0.5, 0.5], [0, 1]])
    assert merge.by_depth([0.3], layers[:2]) == dict.fromkeys(layers[:2], 0.3)
    with pytest.raises(ValueError, match="K at least 1"):
        merge.by_depth([], layers)


def by_hand(shares):
    """`m <- (1 - s) m + s theta` for each share."""
    kernel = np.zeros((2, 3))
    for share, m in zip(shares, MODELS, strict=True):
        kernel = (1 - share) * kernel + share * np.asarray(m["encoder"]["kernel"], np.float64)
    return kernel


@pytest.mark.parametrize(
    ("running", "method", "shares"),
    [
        (merge.running_average(), merge.swa(), [1, 1 / 2, 1 / 3]),
        (merge.running_average(0.9), merge.ema(0.9), [1, 0.1, 0.1]),
        (
            merge.running_average(0.9, debias=True),
            merge.ema(0.9, debias=True),
            [1, 0.1 / (1 - 0.9**2), 0.1 / (1 - 0.9**3)],
        ),
        (merge.running_average(0.5, warmup=True), None, [1, 1 - 2 / 11, 1 - 3 / 12]),
    ],
)
def test_running_is_all_at_once(running, method, shares):
    update = jax.jit(running.update)
    state = running.init(MODELS[2])
    for each in MODELS:
        state = update(state, each)
    found = running.read(state, MODELS[0])
    assert state.num_models == 3
    assert found["steps"] == MODELS[-1]["steps"]
    expected = by_hand(shares)
    np.testing.assert_allclose(found["encoder"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    if method is not None:
        merged = method(MODELS)
        np.testing.assert_allclose(merged["encoder"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_running_average_of_narrow_models_is_wide():
    """A change below the precision of the model's dtype adds up."""
    running = merge.running_average(0.999)
    state = running.update(running.init({"w": jnp.bfloat16(1)}), {"w": jnp.bfloat16(1)})
    for _ in range(5):
        state = running.update(state, {"w": jnp.bfloat16(2)})
    np.testing.assert_allclose(state.params["w"], 2 - 0.999**5, rtol=1e-6)
    assert running.read(state, {"w": jnp.bfloat16(1)})["w"].dtype == jnp.bfloat16


def test_swa_takes_every_other_checkpoint():
    merged = merge.swa(start=0, every=2)(MODELS)
    expected = mean([1, 0, 1], lambda m: m["head"]["bias"])
    np.testing.assert_allclose(merged["head"]["bias"], expected, rtol=1e-6)
    diverged = [{"w": jnp.asarray([np.nan, 1.0])}, {"w": jnp.ones(2)}, {"w": jnp.ones(2) * 3}]
    for method in (merge.swa(start=1), jax.jit(merge.swa(start=1))):
        np.testing.assert_array_equal(method(diverged)["w"], [2, 2])  # the first does not count
    with pytest.raises(ValueError, match="start=3 leaves none of the 3 checkpoints"):
        merge.swa(3)(MODELS)
    with pytest.raises(ValueError, match="every at least 1"):
        merge.swa(every=0)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="decay must"):
            merge.ema(wrong)
    with pytest.raises(ValueError, match="give one, with it"):
        merge.running_average(debias=True)


def test_greedy_soup():
    """The best point is at 3: 2 first, then 5 (mean 3.5), but not 9, nor the one that diverged."""
    models = [{"w": jnp.float32(x)} for x in (9, 2, np.nan, 5)]
    soup = merge.greedy_soup(models, lambda params: -abs(float(params["w"]) - 3))
    assert soup.picks == [1, 3]
    assert soup.scores == [-6, -1, -np.inf, -2]
    assert (soup.params["w"], soup.score) == (3.5, -0.5)
    stacked = {"w": jnp.stack([m["w"] for m in models])}
    again = merge.greedy_soup(stacked, lambda params: -abs(float(params["w"]) - 3))
    assert again.picks == soup.picks
    tie = merge.greedy_soup(models[:2], lambda params: 0.0)
    assert tie.picks == [0, 1]
    with pytest.raises(ValueError, match="empty list"):
        merge.greedy_soup([], float)


def test_listed_weights_may_be_traced():
    a, b = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    found = jax.grad(lambda t: merge.average([1 - t, t])([a, b])["w"].sum())(0.25)
    np.testing.assert_allclose(found, -3, rtol=1e-6)


def test_a_running_average_takes_models_of_its_own_shapes():
    running = merge.running_average()
    state = running.init({"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"leaf 'w' of the model is \(2, 3\).*\(3,\)"):
        running.update(state, {"w": jnp.zeros((2, 3))})
