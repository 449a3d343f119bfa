"""Methods that work with angles: against their restatement, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests.reference import merging_geometry as reference


def one_leaf(arrays):
    return [{"w": jnp.asarray(x)} for x in arrays]


def test_means_on_the_sphere(x64):
    rng = np.random.default_rng(0)
    leaves, weights = rng.normal(size=(4, 3, 5)), [0.1, 0.4, 0.3, 0.2]
    method = jax.jit(merge.karcher(weights, max_iter=60, tol=1e-14))
    expected = reference.karcher(leaves, weights)
    np.testing.assert_allclose(method(one_leaf(leaves))["w"], expected, rtol=1e-11)
    multi = jax.jit(merge.multislerp(weights))(one_leaf(leaves))["w"]
    np.testing.assert_allclose(multi, reference.multislerp(leaves, weights), rtol=1e-12)
    assert not np.allclose(multi, expected, rtol=1e-3)
    # A zero leaf shortens the mean and does not turn it.
    leaves[2] = 0
    expected = reference.karcher(leaves, weights)
    np.testing.assert_allclose(method(one_leaf(leaves))["w"], expected, rtol=1e-11)
    zeros = one_leaf(0 * leaves)
    for found in (method(zeros), merge.multislerp(weights)(zeros)):
        np.testing.assert_array_equal(found["w"], np.zeros((3, 5)))


def test_unnormalized_weights_scale_the_mean():
    pair = one_leaf([[3.0, 0.0], [0.0, 1.0]])
    found = merge.multislerp([1, 1], normalize=False)(pair)["w"]
    np.testing.assert_allclose(found, 2 * merge.multislerp()(pair)["w"], rtol=1e-6)
    np.testing.assert_allclose(found, [4 * np.sqrt(0.5)] * 2, rtol=1e-6)


def test_directions_that_cancel():
    one = np.asarray([1.0, -2.0, 0.5], np.float32)
    # A straight weighted sum; the first model's direction with the mean norm.
    np.testing.assert_allclose(merge.multislerp()(one_leaf([one, -3 * one]))["w"], -one, rtol=1e-6)
    np.testing.assert_allclose(merge.karcher()(one_leaf([one, -3 * one]))["w"], 2 * one, rtol=1e-6)
    for t, expected in ((0.0, one), (0.4, 0 * one), (1.0, -one)):
        np.testing.assert_array_equal(merge.nuslerp(t)(one_leaf([one, -one]))["w"], expected)


@pytest.mark.parametrize("method", [merge.karcher(), merge.multislerp(), merge.model_stock()])
def test_one_model_is_itself(method):
    model = {"w": jnp.asarray([1.0, 2.0]), "tiny": jnp.asarray([1e-7]), "none": jnp.zeros((0, 2))}
    merged = method([model], base=jax.tree.map(jnp.zeros_like, model))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, model)


def test_nuslerp_of_weights_task_vectors_and_axes():
    rng = np.random.default_rng(1)
    base, *pair = (jnp.asarray(x) for x in rng.normal(size=(3, 2, 3, 4)).astype(np.float32))
    deltas = one_leaf([x - base for x in pair])
    found = merge.nuslerp(weights=[3, 1], axis=1)(one_leaf(pair), base={"w": base})["w"]
    of_one = jax.jit(lambda a, b: merge.nuslerp(0.25)([a, b]))
    for i, j in np.ndindex(2, 4):
        expected = base[i, :, j] + of_one(*(d["w"][i, :, j] for d in deltas))
        np.testing.assert_allclose(found[i, :, j], expected, atol=1e-6)
    # Weights without a sum are halves; a leaf without the axis is one vector.
    half = merge.nuslerp(weights=[1, -1], axis=3)(deltas)["w"]
    np.testing.assert_allclose(half, merge.slerp(0.5)(deltas)["w"], atol=1e-6)


def test_model_stock_of_filters_and_its_bounds():
    rng = np.random.default_rng(2)
    base = rng.normal(size=(2, 3, 4)).astype(np.float32)
    leaves = base + 1 + rng.normal(size=(3, *base.shape)).astype(np.float32)
    method = merge.model_stock(filter_wise=True, out_last=True)
    found = method(one_leaf(leaves), base={"w": jnp.asarray(base)})["w"]
    expected = reference.model_stock_of_filters(leaves, base)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    zero = {"w": jnp.zeros(2)}
    obtuse = one_leaf([[1.0, 0.0], [-0.6, 0.8]])
    found = merge.model_stock().measure(obtuse, zero)["leaves"]["w"]
    np.testing.assert_allclose([found["cosine"], found["t"]], [-0.6, -3.0], rtol=1e-5)
    clipped = merge.model_stock(clip=True)(obtuse, base=zero)["w"]
    np.testing.assert_array_equal(clipped, zero["w"])
    for angle in ("cosine", "angle"):
        opposite = one_leaf([[1.0, 0.0], [-2.0, 0.0]])
        np.testing.assert_array_equal(
            merge.model_stock(angle=angle)(opposite, base=zero)["w"], zero["w"]
        )
    with pytest.raises(ValueError, match="filter_wise=True"):
        merge.model_stock(out_last=True)
    with pytest.raises(ValueError, match="'cosine', 'angle'"):
        merge.model_stock(angle="degrees")


def test_arguments_out_of_range():
    for make, word in (
        (lambda: merge.karcher(max_iter=0), "max_iter"),
        (lambda: merge.karcher(tol=0.0), "tol"),
        (lambda: merge.nuslerp(np.inf), "finite"),
        (lambda: merge.multislerp([-1.0, 2.0]), "negative"),
    ):
        with pytest.raises(ValueError, match=word):
            make()
