"""Twelve agents, three on each of four devices, mix, and others are read; in several processes.

`python -m tests.mixing train FILE` writes what they hold then to FILE, arrays of NumPy's.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import agents, distributed, merge
from mixlab.agents.parallel import parallel
from mixlab.checkpoint import Checkpoints, read_agents
from tests.agents import tasks


def mixed() -> dict[str, np.ndarray]:
    """[12, 5] of agents that mixed on a ring, on a complete graph, and took mean and median of all.

    And a layer [12, 7, 6] of what an evaluation makes of all, aligned and averaged.
    """
    where = parallel(12, num_devices=4)
    state = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)

    def over(topology, communicate):
        def program(axis, state, held, weights):
            adjacency = topology.adjacency
            network = agents.Network(axis, weights, adjacency, jax.random.key(0), jnp.int32(0))
            return communicate(network, state)

        weights = where.replicate(np.asarray(topology.mixing_matrix(), np.float32))
        return where.get(where.compile(program)(where.put(state), {}, weights))

    def agreed(axis, variables, held, shared):
        return agents.consensus(axis, problem, variables).aligned["params"]["Dense_1"]["kernel"]

    problem = tasks.mlp_problem()
    models = where.put(tasks.mlps(12))
    ring, complete = agents.ring(12), agents.complete(12)
    return {
        "ring": over(ring, agents.Network.mix),
        "complete": over(complete, agents.Network.mix),
        "mean": over(ring, agents.Network.mean),
        "median": over(ring, functools.partial(agents.Network.mean, method=merge.median())),
        "consensus": where.get(where.compile(agreed)(models, {}, 0)),
    }


def taken(folder: str) -> np.ndarray:
    """[6, 2] of the agents that another run begins from, of which this one has saved four."""
    variables = {"kernel": np.arange(8, dtype=np.float32).reshape(4, 2)}
    with Checkpoints(f"{folder}/checkpoints") as checkpoints:
        checkpoints.save(1, {"state": {"variables": variables}}, {})
        checkpoints.wait()
    found, _ = read_agents(folder, {"variables": variables}, 6)
    return found["variables"]["kernel"]


if __name__ == "__main__":
    distributed.initialize()
    found = {**mixed(), "taken": taken(f"{sys.argv[2]}_run")}
    if distributed.is_first():
        np.savez(sys.argv[2], **found)
