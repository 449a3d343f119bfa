"""The rules for models and weights, and what a report tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mixlab import merge


def tree(*values):
    return {f"w{i}": jnp.asarray(v, jnp.float32) for i, v in enumerate(values)}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, -0.5, 1.0], "not be negative"),
        ([0.0, 0.0], "all be zero"),
        ([np.inf, 1.0], "finite"),
    ],
)
def test_weights_that_are_no_shares(weights, message):
    for method in (merge.average, merge.fisher):
        with pytest.raises(ValueError, match=message):
            method(weights=weights)


PAIR = [tree([1.0, 4.0], [2.0]), tree([3.0, 0.0], [4.0])]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: merge.ties("0.2"), "density must be one number, got '0.2'"),
        (lambda: merge.ties(None), "density must be one number, got None"),
        (lambda: merge.ties([0.1, 0.2]), r"density must be one number, got \[0.1, 0.2\]"),
        (lambda: merge.dare("0.5"), "density must be one number, got '0.5'"),
        (lambda: merge.pcb("0.5"), "ratio must be one number, got '0.5'"),
        (lambda: merge.task_arithmetic({"*": 1.0}), "scale must be one number, got {"),
        (lambda: merge.task_arithmetic(np.ones(2)), r"scale must be one number, got array\("),
        (lambda: merge.interpolate({"*": "half"}), "t must be one number, got 'half'"),
        (lambda: merge.fisher({"*": [1, 2]}), "weights must be numbers, got {"),
        (lambda: merge.average("12"), "weights must be numbers, got '12'"),
        (lambda: merge.average([1, None]), r"weights must be numbers, got \[1, None\]"),
        (lambda: merge.average([[1, 2], [3]]), r"weights must be numbers, got \[\[1, 2\], \[3\]\]"),
        (
            lambda: merge.average()(PAIR, fishers=PAIR),
            "takes no fishers=; .* it takes nothing else",
        ),
        (lambda: merge.ties()(PAIR, base=PAIR[0], grams=1), "takes no grams=; .* nothing else"),
        (lambda: merge.regmean()(PAIR, fishers=PAIR), "takes no fishers=; .* it takes grams=$"),
        (lambda: merge.dare()(PAIR, base=PAIR[0], key=0), r"key\(0\), got 0"),
        (lambda: merge.dare()(PAIR, base=PAIR[0], key=np.zeros(2)), r"got array\(\[0., 0.\]\)"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_a_traced_number_must_be_one():
    with pytest.raises(TypeError, match="scale must be one number"):
        jax.jit(lambda scale: merge.task_arithmetic(scale)(PAIR, base=PAIR[0]))(jnp.ones(2))


def test_models_may_come_one_by_one():
    np.testing.assert_allclose(merge.average()(model for model in PAIR)["w0"], [2.0, 2.0])
    with pytest.raises(ValueError, match="empty list"):
        merge.average()(iter([]))


def test_keys_of_the_old_kind_draw():
    base = tree([0.0, 0.0], [0.0])
    typed = merge.dare(0.5)(PAIR, base=base, key=jax.random.key(3))
    old = jax.random.PRNGKey(3)
    for key in (old, np.asarray(old)):
        for method in (merge.dare(0.5), jax.jit(merge.dare(0.5))):
            found = method(PAIR, base=base, key=key)
            jax.tree.map(np.testing.assert_array_equal, found, typed)


def test_average_normalizes_its_weights():
    merged = merge.average([3, 1])([tree([0.0, 4.0]), tree([8.0, 0.0])])
    np.testing.assert_allclose(merged["w0"], [2.0, 3.0])


def test_a_sum_takes_weights_as_they_are():
    found = merge.parse("average([0.5, -0.25], normalize=False)")(PAIR)
    expected = jax.tree.map(lambda a, b: 0.5 * a - 0.25 * b, *PAIR)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    whole = merge.average(normalize=False)(PAIR)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(jnp.add, *PAIR))


def test_rows_of_a_mixing_matrix_may_be_traced():
    stacked = {"w": jnp.arange(12.0).reshape(3, 4), "count": jnp.arange(3)}
    matrix = jnp.asarray([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75]])
    mixed = jax.jit(jax.vmap(lambda row: merge.average(row)(stacked)))(matrix)
    np.testing.assert_allclose(mixed["w"], matrix @ stacked["w"], rtol=1e-6)
    np.testing.assert_array_equal(mixed["count"], [0, 0, 0])


def test_interpolate_reaches_beyond_the_models():
    a, b = tree([1.0, 2.0]), tree([3.0, 2.0])
    for t, expected in ((0.0, [1, 2]), (1.0, [3, 2]), (1.5, [4, 2]), (-1.0, [-1, 2])):
        np.testing.assert_allclose(merge.interpolate(t)([a, b])["w0"], expected)


def test_a_stacked_tree_needs_one_leading_axis():
    with pytest.raises(ValueError, match=r"a: 2, b: 3"):
        merge.average()({"a": jnp.ones(2), "b": jnp.ones((3, 2))})


def test_leaves_of_one_name_are_an_error():
    model = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"same name: \['a/b'\]"):
        merge.average()([model, model])


def test_numbers_and_keys_as_leaves():
    models = [{"w": 1.0, "rng": jax.random.key(i), "n": i} for i in range(2)]
    merged = merge.average()(models)
    assert merged["w"] == 1.0
    assert merged["n"] == 0
    assert merged["rng"] == jax.random.key(0)


def test_complex_leaves_are_averaged_and_have_no_sign():
    models = [{"w": jnp.asarray([1 + 1j, 2j])}, {"w": jnp.asarray([1 - 1j, 0j])}]
    merged = merge.average()(models)["w"]
    np.testing.assert_allclose(merged, [1, 1j])
    base = {"w": jnp.zeros(2, jnp.complex64)}
    np.testing.assert_allclose(merge.task_arithmetic(0.5)(models, base=base)["w"], [1, 1j])
    for method in (merge.ties(), merge.slerp()):
        with pytest.raises(TypeError, match="'w' is complex64"):
            method(models, base=base)


def test_slerp_keeps_to_the_arc():
    pair = [tree([1.0, 0.0]), tree([0.0, 1.0])]
    np.testing.assert_allclose(merge.slerp(1 / 3)(pair)["w0"], [np.sqrt(0.75), 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
        merge.slerp(threshold=1.5)


def test_report_counts_by_hand():
    base = tree([0.0, 0.0, 0.0, 0.0], 0.0) | {"steps": jnp.asarray(7), "ids": jnp.arange(2)}
    models = [
        tree([3.0, 4.0, 0.0, 0.0], 1.0) | {"steps": jnp.asarray(8), "ids": jnp.arange(2)},
        tree([-4.0, 3.0, 0.0, np.nan], 1.0) | {"steps": jnp.asarray(9), "ids": jnp.arange(2)},
        tree([0.0, 0.0, 0.0, 0.0], 1.0) | {"steps": jnp.asarray(9), "ids": jnp.arange(2)},
    ]
    assert merge.report(models, base=base)["leaves"]["w0"]["not_finite"] == 1
    models[1] = models[1] | tree([-4.0, 3.0, 0.0, 0.0])
    merged = merge.task_arithmetic(1.0)(models, base=base)
    found = merge.report(models, base=base, merged=merged)

    assert found["models"] == 3
    assert found["copied"] == {"steps": True, "ids": False}
    w0 = found["leaves"]["w0"]
    assert w0["norm"] == [5.0, 5.0, 0.0]
    np.testing.assert_allclose(w0["cosine"], np.diag([1.0, 1.0, 0.0]), atol=1e-6)
    assert w0["conflict"] == 0.25
    assert w0["not_finite"] == w0["merged_not_finite"] == 0
    assert w0["kept"] == 0.5
    assert w0["merged_norm"] == pytest.approx(np.hypot(-1.0, 7.0))
    assert found["leaves"]["w1"]["conflict"] == 0

    lines = merge.table(found).splitlines()
    assert lines[0].split() == [
        "leaf",
        "norm",
        "distance",
        "cosine",
        "conflict",
        "not",
        "finite",
        "merged",
        "norm",
        "kept",
    ]
    distance = f"{(np.hypot(7, 1) + 5 + 5) / 3:.3g}"
    expected = f"w0 5 5 0 {distance} 0.000 25.0% 0 7.07 50.0%"
    assert lines[1].split() == expected.split()
    assert lines[-2:] == ["ids  copied", "steps  copied, though the models differ in it"]
    with pytest.raises(ValueError, match="w1"):
        merge.report(models, base=base, merged=merged | tree([0.0] * 4, [1.0]))


def test_parse_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="did you mean 'ties'"):
        merge.parse("tie(density=0.2)")
    with pytest.raises(TypeError, match="densty"):
        merge.parse("ties(densty=0.2)")
    with pytest.raises(TypeError, match="whole methods cannot be chained"):
        merge.parse("trim(0.2) | average")
    with pytest.raises(ValueError, match="needs a reduce"):
        merge.parse("trim(0.2) | rescale(2.0)")


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")])
@pytest.mark.parametrize("text", ["average", "ties(0.5)", "fisher", "krum(0)", "iso_c"])
def test_models_on_a_mesh_with_explicit_axes(text, spec):
    """As `MergeMethod` tells to; most methods would fail without `auto_axes`."""
    base, *models = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
    method = merge.parse(text)
    inputs = {"fishers": [x**2 for x in models]} if text == "fisher" else {}
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))

    def run(models, base, inputs):
        return method(models, base=base, **inputs)

    expected = run(models, base, inputs)
    with jax.set_mesh(mesh):
        given = jax.device_put((models, base, inputs), jax.NamedSharding(mesh, spec))
        merged = jax.jit(jax.sharding.auto_axes(run, out_sharding=spec))(*given)
    assert merged.sharding.is_equivalent_to(given[1].sharding, 2)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
