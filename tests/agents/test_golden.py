"""Strategies held against rounds recorded from DIMAT."""

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
        lambda axis, s: strategy(topology).communicate(tasks.network(axis, topology), here, s),
        state,
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
