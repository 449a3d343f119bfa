"""Strategies held against steps and rounds recorded from DIMAT."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents, align
from tests import golden
from tests.agents import tasks
from tests.align import test_golden as recorded


def shaped(flat, shapes):
    """The recorded tensors of [A, D], by number."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    parts = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
    return {
        str(i): part.reshape(len(flat), *shape)
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True))
    }


@pytest.mark.parametrize("graph", ["fc", "ring", "bipar"])
def test_dpsgd_with_a_fixed_step_is_cdsgd(graph):
    v = golden.load("decentral/public_optim")
    shapes = [ast.literal_eval(str(shape)) for shape in v["shapes"]]
    topology = agents.from_matrix(v[f"pi_{graph}"])
    strategy = agents.dpsgd(topology)
    problem = agents.Problem(optimizer=optax.sgd(float(v["lr"])))
    state = tasks.start({"params": shaped(v["P0"], shapes)}, problem.optimizer, 5)
    where = agents.parallel(5)
    step = where.compile(
        lambda axis, state, gradients, w: strategy.local_step(
            axis, problem, state, gradients, None, w
        )
    )
    placed, weights = where.put(state), where.replicate(np.float32(topology.weights))
    for gradients, expected in zip(v["G"], v[f"{graph}/CDSGD"], strict=True):
        placed = step(placed, where.put(shaped(gradients, shapes)), weights)
        found = where.get(placed).variables["params"]
        flat = np.concatenate([found[k].reshape(5, -1) for k in sorted(found)], 1)
        np.testing.assert_allclose(flat, expected, rtol=2e-5, atol=1e-6)


CASES = ("dimat_mlp_ring5", "dimat_mlp_bipar5", "dimat_resnet_ring5", "dimat_resnet_fc5")


@functools.cache
def problem(case):
    v = golden.load(recorded.MERGES)
    size = int(v[f"{case}/batch"])

    def batch_stats(variables, images):
        batches = [images[i : i + size] for i in range(0, len(images), size)]
        return align.reestimate_batch_stats(recorded.run_train, variables, batches)

    return agents.Problem(
        optimizer=optax.sgd(0.1),
        symmetry=recorded.symmetry_of(case.split("_")[1]),
        batch_stats=batch_stats,
        images=jnp.asarray(v[f"{case}/x"]),
    )


def a_round(case, strategy):
    v = golden.load(recorded.MERGES)
    topology = agents.from_matrix(v[f"{case}/pi"])
    models = [recorded.model(v, f"{case}/in{i}/") for i in range(5)]
    variables = jax.tree.map(lambda *x: np.stack(x), *models)
    state = tasks.start(variables, optax.sgd(0.1), 5)
    here = problem(case) if strategy is agents.dimat else agents.Problem(optax.sgd(0.1))
    return tasks.over(
        5,
        lambda axis, s, w: strategy(topology).communicate(axis, here, s, w),
        state,
        shared=[np.float32(topology.weights)],
    ).variables


@pytest.mark.parametrize("case", CASES)
def test_weighted_average(case):
    v = golden.load(recorded.MERGES)
    found = a_round(case, agents.wa)
    for i in range(5):
        expected = recorded.model(v, f"{case}/wa{i}/")
        recorded.assert_models(tasks.agent(found, i), expected, rtol=2e-5)


@pytest.mark.parametrize("case", CASES[:3])
def test_dimat_round(case):
    """The reference scales aligned rows by N / (N + 1e-5), hence the tolerance."""
    v = golden.load(recorded.MERGES)
    found = a_round(case, agents.dimat)
    for i in range(5):
        expected = recorded.model(v, f"{case}/dimat{i}/")
        recorded.assert_models(tasks.agent(found, i), expected, rtol=3e-4, atol=1e-5)
