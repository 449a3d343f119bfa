"""Twelve agents, three on each of four devices, mix; as one of several processes.

`python -m tests.mixing train FILE` writes what they hold then to FILE, arrays of NumPy's.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import agents, distributed
from mixlab.agents.parallel import parallel


def mixed() -> dict[str, np.ndarray]:
    """[12, 5] of agents that mixed on a ring, on a complete graph, and took the mean of all."""
    where = parallel(12, num_devices=4)
    state = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)

    def over(topology, communicate):
        def program(axis, state, held, weights):
            adjacency = topology.adjacency
            network = agents.Network(axis, weights, adjacency, jax.random.key(0), jnp.int32(0))
            return communicate(network, state)

        weights = where.replicate(np.asarray(topology.mixing_matrix(), np.float32))
        return where.get(where.compile(program)(where.put(state), {}, weights))

    ring, complete = agents.ring(12), agents.complete(12)
    return {
        "ring": over(ring, agents.Network.mix),
        "complete": over(complete, agents.Network.mix),
        "mean": over(ring, agents.Network.mean),
    }


if __name__ == "__main__":
    distributed.initialize()
    found = mixed()
    if distributed.is_first():
        np.savez(sys.argv[2], **found)
