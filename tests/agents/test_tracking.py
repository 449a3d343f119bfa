"""Where mixing leads: to the true mean, to the common optimum, and by small messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from mixlab import agents
from mixlab.agents.strategies import stepwise
from tests.agents import tasks

A, SIZE = 5, 4
SLOPES = np.float32([1, 2, 3, 4, 5])


def centers():
    return np.random.default_rng(0).normal(size=(A, SIZE)).astype(np.float32)


def run(strategy, topology, optimizer, steps, slopes=SLOPES):
    """Where agents end whose losses are `slopes[i] / 2 |x - centers[i]|^2`, and their memories."""
    axis, problem = tasks.axis(A), agents.Problem(strategy.optimizer(optimizer))

    def gradient(variables, batch):
        return {"x": batch["slope"] * (variables["params"]["x"] - batch["center"])}

    @jax.jit
    def train(state):
        batch = {"slope": jnp.asarray(slopes), "center": jnp.asarray(centers())}

        def step(state, time):
            key = jax.random.fold_in(jax.random.key(0), time)
            weights = topology.mixing_matrix(strategy.rule)
            net = tasks.network(axis, topology, weights, time=time, key=key)
            grads = axis.each(gradient)(state.variables, batch)
            found = agents.Gradients(grads, None, batch, gradient)
            return strategy.local_step(net, problem, state, found), None

        start = strategy.init(axis, problem, state)
        return jax.lax.scan(step, start, jnp.arange(steps))[0]

    start = tasks.start({"params": {"x": centers()[::-1]}}, problem.optimizer, A)
    state = train(start)
    return np.asarray(state.variables["params"]["x"]), jax.tree.map(np.asarray, state.memory)


def test_push_sum_finds_the_mean_on_a_directed_graph():
    """A directed ring with a shortcut: agents are heard by one or two others."""
    edges = np.roll(np.eye(A), 1, axis=0) + np.eye(A)
    edges[3, 0] = 1
    topology = agents.from_matrix(edges / edges.sum(1, keepdims=True))
    assert not topology.doubly_stochastic
    mean = centers().mean(0)
    found, weights = run(agents.sgp(topology), topology, optax.sgd(0.0), 200)
    np.testing.assert_allclose(found, np.stack([mean] * A), atol=1e-5)
    np.testing.assert_allclose(weights.sum(), A, rtol=1e-5)
    assert np.ptp(weights) > 0.1
    biased, _ = run(agents.dpsgd(topology, biased=True), topology, optax.sgd(0.0), 200)
    assert np.abs(biased - mean).max() > 0.05
    # With the gradient it stays near the optimum of the sum, up to the bias of a constant step.
    found, _ = run(agents.sgp(topology), topology, optax.sgd(1e-3), 6000, np.ones(A, np.float32))
    np.testing.assert_allclose(found, np.stack([mean] * A), atol=0.02)


def test_tracking_reaches_the_common_optimum():
    topology = agents.ring(A)
    optimum = (SLOPES[:, None] * centers()).sum(0) / SLOPES.sum()
    found, memory = run(agents.gradient_tracking(topology), topology, optax.sgd(0.05), 400)
    np.testing.assert_allclose(found, np.stack([optimum] * A), atol=1e-5)
    # The mean of what is tracked is that of the gradients.
    np.testing.assert_allclose(
        memory["tracked"]["x"].mean(0), memory["last"]["x"].mean(0), atol=1e-5
    )
    found, _ = run(agents.dpsgd(topology), topology, optax.sgd(0.05), 400)
    assert np.abs(found - optimum).max() > 0.05
    with pytest.raises(ValueError, match=r"gradient_tracking needs doubly stoch.*'metropolis'"):
        agents.gradient_tracking(agents.star(4, weights="uniform"))


def test_choco_reaches_consensus_with_small_messages():
    topology = agents.ring(A)
    strategy = agents.choco(topology, "top_k(0.25)", gamma=0.3)
    found, _ = run(strategy, topology, optax.sgd(0.0), 400)
    np.testing.assert_allclose(found, np.stack([centers().mean(0)] * A), atol=1e-4)
    # With everything sent and a whole step it is adapt, then combine.
    whole = agents.choco(topology, "identity()", gamma=1.0)
    plain = agents.dpsgd(topology, order="adapt_then_combine")
    pair = [run(strategy, topology, optax.sgd(0.1), 3)[0] for strategy in (whole, plain)]
    np.testing.assert_allclose(*pair, atol=1e-5)
    with pytest.raises(ValueError, match=r"choco needs doubly stochastic"):
        agents.choco(agents.star(4, weights="uniform"))
    with pytest.raises(ValueError, match=r"gamma must lie in \(0, 1\], got 0"):
        agents.choco(topology, gamma=0)


def test_swarm_moves_two_at_a_time():
    topology = agents.ring(A)
    start = centers()[::-1]
    one, _ = run(agents.swarm(topology), topology, optax.sgd(0.1), 1)
    moved = np.flatnonzero((one != start).any(axis=1))
    assert len(moved) == 2
    assert topology.adjacency[moved[0], moved[1]]
    stepped = start - 0.1 * SLOPES[:, None] * (start - centers())
    np.testing.assert_allclose(one[moved], np.stack([stepped[moved].mean(0)] * 2), rtol=1e-5)
    many, _ = run(agents.swarm(topology, momentum=0.0), topology, optax.sgd(0.0), 200)
    np.testing.assert_allclose(many, np.stack([centers().mean(0)] * A), atol=1e-5)


@pytest.mark.parametrize("entries", [2, 3, 20])
def test_cross_gradients_solve_their_quadratic_program(entries):
    """Against another solver; with fewer entries than neighbours many v give the same direction."""
    rng = np.random.default_rng(entries)
    rows = rng.normal(size=(4, entries)).astype(np.float32)
    own = rng.normal(size=entries).astype(np.float32)
    weights = np.float32([0.2, 0.1, 0.3, 0.0])
    args = {"w": jnp.asarray(own)}, {"w": jnp.asarray(rows)}, jnp.float32(0.4), jnp.asarray(weights)
    m, q = weights[:, None] * rows.astype(float), 0.4 * own.astype(float)
    for projection, sign, low, high in (("dimat", 1, -np.inf, 0.5), ("cone", -1, 0, np.inf)):
        v = scipy.optimize.lsq_linear(m[:3].T, sign * q, (low, high), tol=1e-12).x
        found = np.asarray(stepwise._cross(*args, projection)["w"])
        np.testing.assert_allclose(found, q + v @ m[:3], atol=2e-4)
    assert (rows[:3] @ found > -1e-3).all()  # nobody's loss grows along the last one
