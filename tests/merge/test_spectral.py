"""Methods that work with singular values, and low-rank adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from mixlab.merge import spectral
from tests.reference import merging_geometry as reference


def case(shape, num_models=3, seed=0):
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=shape), "bias": rng.normal(size=shape[-1])}
    models = [
        {name: x + rng.normal(size=x.shape) for name, x in base.items()} for _ in range(num_models)
    ]
    return base, models


def as_jax(tree, dtype="float32"):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def test_kernels_of_higher_rank(x64):
    """Averaged, or decomposed as one matrix."""
    base, models = case((2, 3, 5), 2)
    taus = np.stack([(m["w"] - base["w"]).reshape(6, 5) for m in models])
    expected = {
        "iso_c(0.5, fold=True)": reference.iso_c(taus),
        "tsv(0.5, fold=True)": reference.tsv(taus, 2),
        "tsv(0.5, density=0.3, fold=True)": reference.tsv(taus, 1),
        "iso_c(0.5)": np.mean(taus, axis=0),
        "tsv(0.5, fold=True, exclude='w')": np.mean(taus, axis=0),
    }

    @jax.jit
    def run(models, base):
        return {text: merge.parse(text)(models, base=base) for text in expected}

    bias = (base["bias"] + np.mean([m["bias"] for m in models], axis=0)) / 2
    for text, merged in run(as_jax(models, float), as_jax(base, float)).items():
        found = (merged["w"] - base["w"]).reshape(6, 5)
        np.testing.assert_allclose(found, 0.5 * expected[text], atol=1e-12, err_msg=text)
        np.testing.assert_allclose(merged["bias"], bias, rtol=1e-12)


def test_a_model_that_learned_nothing_does_not_disturb():
    """Of a task vector of zeros a decomposition returns arbitrary directions; none is used."""
    base, models = as_jax(case((6, 5), 2))

    @jax.jit
    def run(models, base):
        method = merge.tsv(density=0.4)
        two, three = method(models, base=base), method([*models, base], base=base)
        return two["w"], three["w"], merge.tsv(density=1.0)(models[:1], base=base)["w"]

    two, three, alone = run(models, base)
    np.testing.assert_allclose(two, three, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone, models[0]["w"], rtol=1e-5, atol=1e-5)


def test_task_vectors_of_low_rank():
    """What a common space leaves of them is rounding, which must not become a direction."""
    rng = np.random.default_rng(5)
    taus = np.einsum("mir,mrj->mij", rng.normal(size=(2, 8, 1)), rng.normal(size=(2, 1, 8)))
    base = {"w": jnp.zeros((8, 8))}
    merged = jax.jit(merge.iso_cts())([{"w": jnp.asarray(x, "float32")} for x in taus], base=base)
    u, s, vt = np.linalg.svd(np.sum(taus, axis=0))
    expected = s[:2].sum() / 8 * u[:, :2] @ vt[:2]
    np.testing.assert_allclose(merged["w"], expected, atol=1e-5)


def test_weights_multiply_the_task_vectors():
    base, models = as_jax(case((4, 4), 2))

    @jax.jit
    def run(models, base):
        first, second = (jax.tree.map(jnp.subtract, m, base) for m in models)
        moved = [
            jax.tree.map(lambda x, d: x + 2 * d, base, first),
            jax.tree.map(lambda x, d: x - d, base, second),
        ]
        return merge.tsv(weights=[2, -1])(models, base=base), merge.tsv()(moved, base=base)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *run(models, base))


def test_the_scale_may_be_traced():
    base, models = as_jax(case((4, 3), 2))

    def length(scale):
        return jnp.sum(jnp.square(merge.iso_c(scale)(models, base=base)["w"] - base["w"]))

    found, slope = jax.jit(jax.vmap(jax.value_and_grad(length)))(jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(found[1], 4 * found[0], rtol=1e-5)
    np.testing.assert_allclose(slope, found * jnp.asarray([2.0, 1.0]), rtol=1e-5)


def test_common_spaces_of_any_size():
    """From nothing in common, where rounding asks for more directions than there are, to all."""
    base, models = as_jax(case((3, 7), 2))
    methods = {str(x): merge.iso_cts(1.0, x) for x in (0.0, 0.3, 1.0)} | {"iso_c": merge.iso_c()}
    run = jax.jit(lambda models, base: {x: m(models, base=base) for x, m in methods.items()})
    merged = {x: model["w"] - base["w"] for x, model in run(models, base).items()}
    for delta in merged.values():
        values = np.linalg.svd(np.asarray(delta), compute_uv=False)
        np.testing.assert_allclose(values, values[0], rtol=1e-4)
    np.testing.assert_allclose(merged["1.0"], merged["iso_c"], atol=1e-5)
    assert not np.allclose(merged["0.3"], merged["iso_c"], atol=1e-2)


@pytest.mark.parametrize(
    ("what", "shape"), [("polar", (4, 3)), ("polar", (3, 4)), ("iso_cts", (4, 3)), ("tsv", (4, 3))]
)
def test_gradients_are_those_of_finite_differences(what, shape, x64):
    rng = np.random.default_rng(3)
    x, y, along, out = rng.normal(size=(4, *shape))
    methods = {"iso_cts": merge.iso_cts(1.0, 0.4), "tsv": merge.tsv()}

    def fn(x):
        if what == "polar":
            return jnp.sum(out * spectral.polar(x))
        models, zeros = [{"w": x}, {"w": jnp.asarray(y)}], {"w": jnp.zeros(shape)}
        return jnp.sum(out * methods[what](models, base=zeros)["w"])

    at = [x]
    if what == "polar":
        # Less than full rank, as long as it stays; and equal singular values, which have no
        # vectors of their own, but one polar factor.
        lacking = x * (np.indices(shape) < 2).all(axis=0)
        at += [lacking, 2 * np.eye(*shape)]
    along = np.stack([along * (point != 0) if i == 1 else along for i, point in enumerate(at)])
    at = np.stack(at)
    points = np.concatenate([at, at + 1e-5 * along, at - 1e-5 * along, [0 * x, np.eye(*shape), y]])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(fn)))(points)
    num = len(at)
    expected = (values[num : 2 * num] - values[2 * num : 3 * num]) / 2e-5
    found = jnp.sum(slopes[:num] * along, axis=(1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    # Where there is no gradient (no rank, equal values, equal models) it is still finite.
    assert np.all(np.isfinite(slopes))


def test_spectral_arguments_out_of_range():
    for make, word in (
        (lambda: merge.tsv(density=0.0), "density"),
        (lambda: merge.tsv(density=1.5), "density"),
        (lambda: merge.iso_cts(common_space_fraction=-0.1), "common_space_fraction"),
        (lambda: merge.iso_c(np.nan), "scale"),
        (lambda: merge.iso_c(exclude=[None]), "patterns are texts"),
    ):
        with pytest.raises(ValueError, match=word):
            make()


def test_extraction_is_the_nearest_of_its_rank():
    base, (model,) = case((6, 4), 1)
    delta = model["w"] - base["w"]
    for rank in (1, 3, 9):
        adapter = merge.extract_lora(as_jax(model), as_jax(base), rank)
        kept = min(rank, 4)
        assert adapter["w"]["A"].shape == (6, kept)
        assert adapter["w"]["B"].shape == (kept, 4)
        nearest, error = reference.truncate(delta, rank)
        merged = merge.apply_lora(as_jax(base), adapter)
        np.testing.assert_allclose(merged["w"], base["w"] + nearest, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(merged["w"] - model["w"]), error, atol=1e-5)
        np.testing.assert_allclose(merged["bias"], model["bias"], rtol=1e-6)
        # Both factors carry the root of the singular values.
        np.testing.assert_allclose(
            adapter["w"]["A"].T @ adapter["w"]["A"],
            adapter["w"]["B"] @ adapter["w"]["B"].T,
            atol=1e-5,
        )


def test_extraction_follows_the_singular_values_and_the_names():
    base, (model,) = case((2, 3, 4), 1)
    base["steps"], model["steps"] = np.int32(1), np.int32(2)
    rng = np.random.default_rng(1)
    model["w"] = base["w"] + np.outer(rng.normal(size=6), rng.normal(size=4)).reshape(2, 3, 4)
    base, model = (as_jax(t) | {"steps": t["steps"], "none": None} for t in (base, model))

    adapter = merge.extract_lora(model, base, 4, sv_epsilon=1e-3, fold=True, rest="drop")
    assert {name: parts.keys() for name, parts in adapter.items()} == {"w": {"A", "B"}}
    assert adapter["w"]["A"].shape == (6, 1)
    merged = merge.apply_lora(base, adapter, 0.5)
    np.testing.assert_allclose(merged["w"], (base["w"] + model["w"]) / 2, atol=1e-5)
    np.testing.assert_array_equal(merged["bias"], base["bias"])
    assert merged["steps"] == 1
    for kept in ({"fold": False}, {"fold": True, "exclude": "w"}):
        adapter = merge.extract_lora(model, base, 4, **kept)
        assert {name: parts.keys() for name, parts in adapter.items()} == {
            "bias": {"delta"},
            "w": {"delta"},
        }
    none = merge.extract_lora(base, base, 2, sv_epsilon=1e-3, fold=True)
    assert none["w"]["A"].shape == (6, 0)
    np.testing.assert_array_equal(merge.apply_lora(base, none)["w"], base["w"])
    narrow = merge.extract_lora(as_jax(model, "bfloat16"), as_jax(base, "bfloat16"), 2, fold=True)
    assert narrow["w"]["A"].dtype == narrow["bias"]["delta"].dtype == jnp.bfloat16


def test_adapters_add_up_exactly():
    base, models = as_jax(case((6, 4), 3))
    adapters = [merge.extract_lora(m, base, r) for m, r in zip(models, (1, 2, 1), strict=True)]
    del adapters[1]["bias"]
    weights = [0.5, -1.0, 2.0]
    expected = base
    for weight, adapter in zip(weights, adapters, strict=True):
        expected = merge.apply_lora(expected, adapter, weight)
    summed = merge.merge_lora(adapters, weights)
    assert summed["w"]["A"].shape == (6, 4)
    merged = merge.apply_lora(base, summed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, expected)

    delta = np.asarray(expected["w"] - base["w"], np.float64)
    for rank in (2, 4):
        small = jax.jit(merge.merge_lora, static_argnums=2)(adapters, jnp.asarray(weights), rank)
        assert small["w"]["A"].shape == (6, rank)
        nearest, _ = reference.truncate(delta, rank)
        np.testing.assert_allclose(small["w"]["A"] @ small["w"]["B"], nearest, atol=1e-5)
    twice = merge.apply_lora(base, merge.merge_lora(adapters[:1] * 2))
    assert_close = np.testing.assert_allclose
    assert_close(twice["w"], merge.apply_lora(base, adapters[0], 2.0)["w"], atol=1e-5)


def test_adapters_that_do_not_fit():
    base, models = as_jax(case((6, 4), 2))
    adapter = merge.extract_lora(models[0], base, 2)
    with pytest.raises(ValueError, match="no floating leaves of the base: \\['v'\\]"):
        merge.apply_lora(base, {"v": adapter["w"]})
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \[4\], but the leaf \[6, 4\]"):
        merge.apply_lora(base, {"w": adapter["bias"]})
    with pytest.raises(ValueError, match=r"leaf 'w' must hold A and B, or delta, got \['A'\]"):
        merge.apply_lora({"w": np.zeros((6, 4), np.float32)}, {"w": {"A": np.zeros((6, 2))}})
    with pytest.raises(ValueError, match="leaf 'w' is not alike"):
        merge.merge_lora([adapter, {"w": adapter["bias"]}])
    with pytest.raises(ValueError, match="adapters is empty"):
        merge.merge_lora([])
    for wrong in (
        lambda: merge.extract_lora(models[0], base, 0),
        lambda: merge.merge_lora([adapter], rank=0),
    ):
        with pytest.raises(ValueError, match="rank must be at least 1"):
            wrong()
    with pytest.raises(ValueError, match="'keep', 'drop'"):
        merge.extract_lora(models[0], base, 2, rest="zero")
    with pytest.raises(ValueError, match="each of the 1 models"):
        merge.merge_lora([adapter], [1, 2])


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_what_is_not_a_number_stays_so(method):
    models = np.random.default_rng(0).normal(size=(3, 7, 6)).astype(np.float32)
    models[1, 6, 5] = np.nan
    base = {"w": np.zeros((7, 6), np.float32)}
    assert np.isnan(merge.parse(method)([{"w": w} for w in models], base=base)["w"]).all()
