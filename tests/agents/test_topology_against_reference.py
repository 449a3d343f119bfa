"""Topologies, their mixing and a step of decentralized SGD against independent restatements."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents
from tests.agents import tasks
from tests.reference import decentral

SHAPES = {"kernel": (3, 2), "bias": (2,)}
UNDIRECTED = {
    "ring": (agents.ring, decentral.ring),
    "complete": (agents.complete, decentral.complete),
    "star": (agents.star, decentral.star),
}


def assert_topology(topology, adjacency, weights):
    np.testing.assert_array_equal(topology.adjacency, adjacency.astype(bool))
    np.testing.assert_allclose(topology.weights, weights, atol=1e-12)
    gap = decentral.spectral_gap(weights) if len(weights) > 1 else 1
    np.testing.assert_allclose(topology.spectral_gap(), gap, atol=1e-7)
    for i, row in enumerate(adjacency):
        np.testing.assert_array_equal(topology.neighbours(i), np.flatnonzero(row))
    assert topology.messages == adjacency.sum()


@pytest.mark.parametrize("name", UNDIRECTED)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_undirected(name, n):
    build, adjacency_of = UNDIRECTED[name]
    adjacency = adjacency_of(n)
    assert_topology(build(n), adjacency, decentral.metropolis_hastings(adjacency))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (2, 2), (2, 5), (3, 3), (4, 3)])
def test_torus(rows, cols):
    adjacency = decentral.torus(rows, cols)
    topology = agents.torus(rows * cols, rows)
    assert_topology(topology, adjacency, decentral.uniform_weights(adjacency))


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 13])
def test_exponential(n):
    adjacency = decentral.exponential(n)
    assert_topology(agents.exponential(n), adjacency, decentral.uniform_weights(adjacency))


@pytest.mark.parametrize("seed", range(5))
def test_random_graphs(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 12))
    adjacency = decentral.ring(n) | np.triu(rng.random((n, n)) < 0.3, 1)
    adjacency = adjacency | adjacency.T
    edges = np.argwhere(np.triu(adjacency))
    for weights, restated in (
        ("metropolis", decentral.metropolis_hastings),
        ("uniform", decentral.uniform_weights),
    ):
        topology = agents.from_edges(n, edges, weights=weights)
        assert_topology(topology, adjacency, restated(adjacency))
        assert topology.doubly_stochastic == np.allclose(topology.weights.sum(axis=0), 1)


def test_steps():
    """Three steps of CDSGD, and one round of weighted averaging, on a star."""
    rng = np.random.default_rng(0)
    topology = agents.star(4)
    start = {name: rng.normal(size=(4, *s)).astype(np.float32) for name, s in SHAPES.items()}
    grads = [
        {name: rng.normal(size=x.shape).astype(np.float32) for name, x in start.items()}
        for _ in range(3)
    ]
    weights = jnp.asarray(topology.weights, jnp.float32)
    backend = agents.parallel(4, "loop")
    problem = agents.Problem(optax.sgd(0.1))
    sgd, averaging = agents.dpsgd(topology), agents.wa(topology)

    def program(axis, params, agents_grads, weights):
        opt_state = axis.each(problem.optimizer.init)(params)
        failed_at = jnp.full(4, -1, jnp.int32)
        state = agents.AgentState({"params": params}, opt_state, failed_at)
        network = tasks.network(axis, topology, weights)
        merged = averaging.communicate(network, problem, state)
        found = agents.Gradients(agents_grads, None, {}, lambda variables, batch: variables)
        state = sgd.local_step(network, problem, state, found)
        return state.variables["params"], merged.variables["params"]

    step = backend.compile(program)
    found = backend.put(start)
    expected = {name: x.astype(np.float64) for name, x in start.items()}
    for i, own in enumerate(grads):
        before = expected
        found, merged = step(found, backend.put(own), weights)
        expected = {
            name: decentral.cdsgd_step(topology.weights, x, own[name], 0.1)
            for name, x in before.items()
        }
        found_here, merged = backend.get(found), backend.get(merged)
        for name in SHAPES:
            np.testing.assert_allclose(found_here[name], expected[name], atol=1e-5, err_msg=i)
            mixed = decentral.mix(topology.weights, before[name])
            np.testing.assert_allclose(merged[name], mixed, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mixing_narrow_floats(dtype):
    states = np.random.default_rng(1).normal(size=(5, 7))
    states = np.asarray(jnp.asarray(states, dtype))
    topology = agents.ring(5)
    backend = agents.parallel(5, "loop")
    run = backend.compile(
        lambda axis, state, _, weights: tasks.network(axis, topology, weights).mix(state)
    )
    found = backend.get(run(backend.put(states), (), jnp.asarray(topology.weights, jnp.float32)))
    assert found.dtype == dtype
    expected = decentral.mix(topology.weights, states.astype(np.float64))
    resolution = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=resolution, atol=resolution)
