import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align

BACKENDS = ("scipy", "optax", "jax")


def scores_of(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def total(scores, p):
    return np.take_along_axis(np.asarray(scores), np.asarray(p)[..., None], -1).sum((-1, -2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_of_all_permutations(backend):
    scores = scores_of(0, 4, 5, 5)
    every = np.array(list(itertools.permutations(range(5))))
    sums = np.stack([total(scores, np.broadcast_to(p, (4, 5))) for p in every])
    p = align.assignment(scores, backend=backend)
    assert p.dtype == jnp.int32
    np.testing.assert_allclose(total(scores, p), sums.max(0), rtol=1e-6)
    p = align.assignment(scores, backend=backend, maximize=False)
    np.testing.assert_allclose(total(scores, p), sums.min(0), rtol=1e-6)


def test_narrow_and_integer_scores():
    scores = jnp.eye(5)[np.array([3, 1, 0, 4, 2])]
    for dtype in (jnp.bfloat16, jnp.int32):
        np.testing.assert_array_equal(align.assignment(scores.astype(dtype)), [3, 1, 0, 4, 2])


def test_direction():
    p = np.random.default_rng(1).permutation(7)
    np.testing.assert_array_equal(align.assignment(jnp.eye(7)[p]), p)


@pytest.mark.parametrize("backend", ["scipy", "jax"])
def test_transformations_agree(backend):
    scores = scores_of(2, 3, 8, 8)
    one = jnp.stack([align.assignment(s, backend=backend) for s in scores])
    solve = jax.jit(lambda s: align.assignment(s, backend=backend))
    np.testing.assert_array_equal(one, solve(scores))
    np.testing.assert_array_equal(one, jax.jit(jax.vmap(solve))(scores))
    np.testing.assert_array_equal(one, jax.pmap(solve)(scores))


def test_backends_agree():
    scores = scores_of(3, 3, 8, 8)
    found = [align.assignment(scores, backend=backend) for backend in BACKENDS]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_the_solver_on_the_device_is_exact_with_ties_and_in_batches_that_finish_unevenly():
    rng = np.random.default_rng(6)
    planted = np.eye(24)[rng.permutation(24)]
    constant, ties = np.full((24, 24), -3.0), rng.integers(0, 4, (24, 24))
    uneven = rng.normal(size=(24, 24)) * 10.0 ** rng.integers(-6, 6, (24, 1))
    scores = np.stack([planted, constant, ties, uneven, rng.normal(size=(24, 24))])
    scores = scores.astype(np.float32)
    p, best = (align.assignment(scores, backend=backend) for backend in ("jax", "scipy"))
    np.testing.assert_array_equal(np.sort(p), np.broadcast_to(np.arange(24), (5, 24)))
    np.testing.assert_allclose(total(scores, p), total(scores, best), rtol=1e-6)
    assert total(scores[2], p[2]) == total(scores[2], best[2])


def test_the_largest_scores_still_give_a_permutation():
    scores = scores_of(7, 6, 6).at[0].set(3e38).at[1].set(-3e38)
    p = jax.jit(lambda s: align.assignment(s, backend="jax"))(scores)
    np.testing.assert_array_equal(np.sort(p), np.arange(6))


def test_large_callbacks_in_one_program_do_not_wait_for_each_other():
    # The host reads arguments that the device may still be computing.
    x = scores_of(4, 4, 512, 512)
    solve = jax.jit(lambda xs: [align.assignment(a @ a.T, backend="scipy") for a in xs])
    for p in solve(x):
        np.testing.assert_array_equal(np.sort(p), np.arange(512))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite(backend, bad):
    scores = scores_of(5, 4, 4).at[1, 2].set(bad)
    with pytest.raises(ValueError, match=r"at \[1, 2\]"):
        align.assignment(scores, backend=backend)
    solve = jax.jit(lambda s: align.assignment(s, backend=backend))
    if backend != "scipy":
        np.testing.assert_array_equal(np.sort(solve(scores)), np.arange(4))
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="must be finite"):
            jax.block_until_ready(solve(scores))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_is_assigned_to_nobody(backend):
    for shape in ((0, 0), (3, 0, 0), (0, 2, 2)):
        found = align.assignment(np.zeros(shape), backend=backend)
        assert (found.shape, found.dtype) == (shape[:-1], jnp.int32)


def test_errors():
    with pytest.raises(ValueError, match="square"):
        align.assignment(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="real"):
        align.assignment(jnp.ones((2, 2), jnp.complex64))
    with pytest.raises(ValueError, match="known: scipy, optax, jax"):
        align.assignment(jnp.ones((2, 2)), backend="sinkhorn")
