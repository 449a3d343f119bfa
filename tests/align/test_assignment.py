import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align

BACKENDS = ("scipy", "optax")


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


@pytest.mark.parametrize("backend", BACKENDS)
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
    np.testing.assert_array_equal(*found)


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
    if backend == "optax":
        np.testing.assert_array_equal(np.sort(solve(scores)), np.arange(4))
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="must be finite"):
            jax.block_until_ready(solve(scores))


def test_errors():
    with pytest.raises(ValueError, match="square"):
        align.assignment(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="real"):
        align.assignment(jnp.ones((2, 2), jnp.complex64))
    with pytest.raises(ValueError, match="known: scipy, optax"):
        align.assignment(jnp.ones((2, 2)), backend="sinkhorn")
