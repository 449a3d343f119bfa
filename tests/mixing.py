"""Twelve agents on a ring, three on each of four devices, mix; as one of several processes.

`python -m tests.mixing train FILE` writes what they hold then to FILE, an array of NumPy's.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import agents, distributed
from mixlab.agents.parallel import parallel


def mixed() -> np.ndarray:
    where, topology = parallel(12, num_devices=4), agents.ring(12)

    def program(axis, state, held, weights):
        adjacency = topology.adjacency
        network = agents.Network(axis, weights, adjacency, jax.random.key(0), jnp.int32(0))
        return network.mix(state)

    weights = where.replicate(np.asarray(topology.mixing_matrix(), np.float32))
    state = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    return where.get(where.compile(program)(where.put(state), {}, weights))


if __name__ == "__main__":
    distributed.initialize()
    found = mixed()
    if distributed.is_first():
        np.save(sys.argv[2], found)
