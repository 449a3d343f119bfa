"""Strategies that act within every step, held against steps recorded from DIMAT's baselines."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents
from tests import golden
from tests.agents import tasks

A = 5


def vectors():
    return golden.load("decentral/public_optim")


def tensors(flat):
    """The recorded tensors of [..., D], by number."""
    shapes = [ast.literal_eval(str(shape)) for shape in vectors()["shapes"]]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = np.split(flat, ends, axis=-1)
    return {
        str(i): part.reshape(*flat.shape[:-1], *shape)
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True))
    }


def flat(tree):
    return np.concatenate([tree[k].reshape(A, -1) for k in sorted(tree)], axis=1)


def recorded_gradients(everyone):
    """What `Gradients.of` gives: agent r's parameters are found among everyone's by value."""

    def of(variables, batch):
        unlike = jnp.abs(everyone["1"] - variables["params"]["1"]).sum(axis=1)
        return jax.tree.map(lambda x: x[jnp.argmin(unlike)], batch)

    return of


def steps(text, graph, **options):
    """The parameters after each recorded step, [T, A, D]."""
    v = vectors()
    topology = agents.from_matrix(v[f"pi_{graph}"])
    strategy = agents.strategies.STRATEGIES[text](topology, **options)
    problem = agents.Problem(strategy.optimizer(optax.sgd(float(v["lr"]))))

    def step(axis, state, held, time):
        net = tasks.network(axis, topology, time=time)
        of = recorded_gradients(axis.gather(state.variables["params"]))
        found = agents.Gradients(held["own"], None, held["crossed"], of)
        return strategy.local_step(net, problem, state, found)

    where = agents.parallel(A, "vmap")
    program = where.compile(step)
    state = tasks.start({"params": tensors(v["P0"])}, problem.optimizer, A)
    state = where.put(tasks.over(A, lambda axis, s: strategy.init(axis, problem, s), state))
    seen = []
    for t, (own, crossed) in enumerate(zip(v["G"], v["crossG"], strict=True)):
        held = {"own": tensors(own), "crossed": tensors(crossed.swapaxes(0, 1))}
        state = program(state, where.put(held), np.int32(t))
        seen.append(flat(where.get(state.variables["params"])))
    return np.stack(seen)


RECORDED = {
    "CDSGD": ("cdsgd", {}),
    "CDMSGD": ("cdmsgd", {"momentum": 0.9}),
    "SGP": ("sgp", {}),
    "LDSGD_I1_2_I2_1": ("ldsgd", {"local": 2, "mixing": 1, "momentum": 0.9}),
    "SwarmSGD_I1_1_I2_1": ("swarm", {"local": 1, "mixing": 1, "momentum": 0.9}),
    "CGA_patched": ("cga", {"momentum": 0.9}),
}


@pytest.mark.parametrize("graph", ["fc", "ring", "bipar"])
@pytest.mark.parametrize("name", RECORDED)
def test_steps_as_recorded(name, graph):
    """Those of CGA go through a quadratic program, hence its tolerance."""
    text, options = RECORDED[name]
    if text == "swarm":
        options = {**options, "pairs": vectors()["swarm_selected"]}
    rtol, atol = (1e-3, 1e-5) if text == "cga" else (2e-5, 1e-6)
    found = steps(text, graph, **options)
    np.testing.assert_allclose(found, vectors()[f"{graph}/{name}"], rtol, atol)
