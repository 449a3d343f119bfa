"""Matching by gradient: Sinkhorn re-basin and the straight-through estimator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align, models
from mixlab.align import soft
from mixlab.align.layout import Atom, Fixed, Prod, Sum
from tests import golden
from tests.align.test_matching import signed_variables
from tests.align.test_symmetry import infer, mlp, mlp_variables, normal

# ---------------------------------------------------------------- sinkhorn


@pytest.mark.parametrize("case", ["sinkhorn0", "sinkhorn1"])
def test_sinkhorn_agrees_with_the_recorded_one(case):
    v = golden.load("decentral/public_extra")
    cost, iterations = v[f"{case}/cost"], int(v[f"{case}/iters"])
    found = align.sinkhorn(-cost, temperature=float(v[f"{case}/lambda"]), num_iters=iterations)
    # Recorded with marginals 1 / n.
    np.testing.assert_allclose(found / len(cost), v[f"{case}/P"], rtol=1e-5, atol=1e-7)


def test_sinkhorn_of_batches_tends_to_the_assignment():
    scores = jnp.asarray(normal(2, 3, 5, 5))
    run = jax.jit(functools.partial(align.sinkhorn, num_iters=500))
    found = run(scores, temperature=0.02)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-2), 1, rtol=1e-2)
    np.testing.assert_array_equal(found.argmax(-1), align.assignment(scores))
    mapped = jax.vmap(lambda s: align.sinkhorn(s, temperature=0.02, num_iters=500))(scores)
    np.testing.assert_allclose(mapped, found, rtol=1e-6)
    assert align.sinkhorn(scores.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def unrolled(scores, temperature, num_iters):
    def normalise(x, _):
        x = x - jax.nn.logsumexp(x, axis=0, keepdims=True)
        return x - jax.nn.logsumexp(x, axis=1, keepdims=True), None

    return jnp.exp(jax.lax.scan(normalise, scores / temperature, length=num_iters)[0])


def test_sinkhorn_gradient_is_that_of_the_unrolled_iteration(x64):
    scores, weights = (normal(2, 6, 6, seed=s).astype(np.float64) for s in (1, 2))

    def implicit(scores, temperature):
        return jnp.sum(weights * align.sinkhorn(scores, temperature=temperature, num_iters=200))

    def explicit(scores, temperature):
        run = jax.vmap(functools.partial(unrolled, num_iters=200), in_axes=(0, None))
        return jnp.sum(weights * run(scores, temperature))

    found = jax.jit(jax.grad(implicit, (0, 1)))(scores, 0.7)
    expected = jax.jit(jax.grad(explicit, (0, 1)))(scores, 0.7)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_sinkhorn_gradient_of_an_almost_hard_permutation(x64):
    weights = normal(6, 6, seed=2).astype(np.float64)
    swap = np.eye(6)[[1, 0, 3, 2, 5, 4]]

    @jax.jit
    @jax.grad
    def gradient(scores):
        balanced = align.sinkhorn(scores, num_iters=50)
        return jnp.sum(weights.astype(scores.dtype) * balanced)

    narrow = gradient((6 * swap).astype(np.float32))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, gradient(6 * swap), rtol=1e-3, atol=1e-6)
    # Hard to the last bit: nothing moves, and nothing is NaN.
    np.testing.assert_allclose(gradient((1e3 * swap).astype(np.float32)), 0, atol=1e-6)


# ---------------------------------------------------------------- matrices along layouts


def varying():
    """Heads within a loop, units within heads, on a segment of an axis; and two plain groups."""
    over = {"h": ("loop",), "d": ("loop", "h"), "a": (), "b": ()}
    sizes = {"h": 2, "d": 3, "a": 4, "b": 5}
    h, d, a, b = (Atom(sizes[name], name, over[name]) for name in sizes)
    segments = Sum((Prod((h, d)), Fixed(2), Prod((a, Fixed(2)))))
    layouts = {"w": (Fixed(3, "loop"), segments, a, b)}
    return align.Symmetry(sizes, layouts, over, {"loop": 3}), {"w": normal(3, 16, 4, 5)}


def test_permutation_matrices_do_what_the_permutations_do():
    symmetry, variables = varying()
    p = symmetry.random(jax.random.key(1))
    matrices = {name: np.eye(symmetry.groups[name])[x].astype(np.float32) for name, x in p.items()}
    found = jax.jit(functools.partial(soft.apply_to_tree, symmetry.layouts))(matrices, variables)
    np.testing.assert_allclose(found["w"], symmetry.permute(p, variables)["w"], rtol=1e-6)


# ---------------------------------------------------------------- sinkhorn re-basin


BATCHES = [(normal(32, 5, seed=s),) for s in (1, 2)]


@functools.cache
def mlp_symmetry():
    reference = jax.tree.map(lambda x: 0.4 * x, mlp_variables((5, 16, 16, 3)))
    return align.infer_symmetry(mlp, reference, BATCHES[0][0], check=False), reference


def shuffled(symmetry, reference, noise):
    """A noisy copy with its units renumbered, and the permutations that undo it."""
    p = symmetry.random(jax.random.key(2))
    noisy = jax.tree.map(lambda x: x + noise * normal(*x.shape, seed=7), reference)
    return symmetry.permute(p, noisy), symmetry.inverse(p)


def cnn_symmetry():
    module = models.CNN(3, (6, 8))
    return infer(module), signed_variables(module)


@pytest.mark.parametrize(
    "network",
    [mlp_symmetry, cnn_symmetry, varying],
    ids=["mlp", "cnn", "varying"],
)
def test_sinkhorn_matching_by_distance_recovers_a_planted_permutation(network):
    symmetry, reference = network()
    other, answer = shuffled(symmetry, reference, 0.01)
    found = align.sinkhorn_matching(symmetry, None, reference, other, key=jax.random.key(0))
    assert set(found) == set(symmetry.groups)
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p, err_msg=name)


@functools.cache
def strangers():
    """A network, a noisy and renumbered copy, a loss, and its value at their midpoint."""
    symmetry, reference = mlp_symmetry()
    other, _ = shuffled(symmetry, reference, 0.2)

    def loss(layers, x):
        return jnp.mean(jnp.square(mlp(layers, x) - mlp(reference, x)))

    def height(permutations):
        moved = symmetry.permute(permutations, other)
        middle = jax.tree.map(lambda a, b: (a + b) / 2, reference, moved)
        return np.mean([loss(middle, *batch) for batch in BATCHES])

    return symmetry, loss, reference, other, height


@pytest.mark.parametrize("point", ["midpoint", "random"])
def test_sinkhorn_matching_by_loss_lowers_the_midpoint(point):
    symmetry, loss, reference, other, height = strangers()
    found = align.sinkhorn_matching(
        symmetry, loss, reference, other, BATCHES, key=jax.random.key(0), point=point
    )
    matched = align.weight_matching(symmetry, reference, other)
    assert height(found) < height(matched) / 2 < height(symmetry.identity()) / 2


# ---------------------------------------------------------------- straight-through


def test_straight_through_recovers_a_planted_permutation():
    symmetry, loss, reference, *_ = strangers()
    other, answer = shuffled(symmetry, reference, 0.01)
    found = align.straight_through(
        symmetry,
        lambda layers, batch: loss(layers, batch["x"]),
        reference,
        other,
        [{"x": BATCHES[0][0]}] * 2,
        key=jax.random.key(0),
    )
    for name, p in answer.items():
        np.testing.assert_array_equal(found[name], p, err_msg=name)


def test_straight_through_lowers_the_midpoint_below_weight_matching():
    symmetry, loss, reference, other, height = strangers()
    found = align.straight_through(
        symmetry, loss, reference, other, BATCHES * 30, key=jax.random.key(0), learning_rate=1.0
    )
    matched = align.weight_matching(symmetry, reference, other)
    assert height(found) < height(matched) < height(symmetry.identity())


# ---------------------------------------------------------------- errors


def test_errors():
    symmetry, loss, reference, other, _ = strangers()
    with pytest.raises(ValueError, match="square matrices"):
        align.sinkhorn(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="must be floating, got int32"):
        align.sinkhorn(jnp.ones((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="num_iters must be at least 1, got 0"):
        align.sinkhorn(jnp.ones((2, 2)), num_iters=0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        align.sinkhorn(jnp.ones((2, 2)), temperature=0)
    key = jax.random.key(0)
    match = functools.partial(align.sinkhorn_matching, symmetry, key=key)
    with pytest.raises(ValueError, match="unknown point 'middle'"):
        match(loss, reference, other, BATCHES, point="middle")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        match(None, reference, other, steps=0)
    with pytest.raises(ValueError, match="temperature must be positive, got -1"):
        match(None, reference, other, temperature=-1)
    with pytest.raises(ValueError, match="give a loss with at least one batch"):
        match(loss, reference, other)
    with pytest.raises(ValueError, match="same structure"):
        match(None, reference, other[:2])
    smaller = mlp_variables((5, 16, 15, 3))
    with pytest.raises(ValueError, match=r"leaf '1/b' of shape \(16,\), the other model \(15,\)"):
        match(None, reference, smaller)
    broken = jax.tree.map(np.array, other)
    broken[1]["w"][0, 0] = np.nan
    with pytest.raises(ValueError, match="objective is nan at step 0"):
        match(None, reference, broken)
    through = functools.partial(align.straight_through, symmetry, loss, key=key)
    with pytest.raises(ValueError, match="no batches"):
        through(reference, other, [])
    with pytest.raises(ValueError, match="loss of batch 1 is not finite"):
        through(reference, other, [BATCHES[0], (np.full_like(BATCHES[0][0], np.nan),)])
