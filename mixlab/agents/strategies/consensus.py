"""One model of all agents, and how far they are from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixlab import align, trees
from mixlab.agents import alignment
from mixlab.agents.parallel import Axis
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import Problem
from mixlab.types import Array, PyTree


class Consensus(NamedTuple):
    """Two ways to make one model of all agents, and how far the agents are from each.

    Attributes:
        plain: the variables' mean over agents.
        aligned: the mean after every agent has been aligned to agent 0.
        plain_distance: root mean square over agents of the parameters' distance to their mean,
            as a fraction of the root mean square of the agents' norms. 0 is consensus.
        aligned_distance: the same after alignment.
    """

    plain: PyTree
    aligned: PyTree
    plain_distance: Array
    aligned_distance: Array


def consensus(axis: Axis, problem: Problem, variables: PyTree) -> Consensus:
    """Averages all agents, as they are and aligned to agent 0, BatchNorm re-estimated.

    Agents that were aligned only pairwise live in different bases, where the plain mean is of no
    use: it is the aligned mean that tells whether they agree.

    Returns:
        A `Consensus` whose leaves have the block's leading axis, equal for every agent.
    """
    symmetry, images = alignment.needs(problem)
    activations = axis.each(lambda v: symmetry.activations(v, images))(variables)
    reference = jax.tree.map(lambda x: axis.gather(x)[0], activations)

    def to_reference(own: PyTree, own_activations: PyTree) -> PyTree:
        permutations = align.match_activations(
            reference,
            own_activations,
            backend=problem.assignment,
            symmetry=symmetry,
        )
        return symmetry.permute(permutations, own)

    def mean_and_distance(variables: PyTree) -> tuple[PyTree, Array]:
        def leaf(x: Array) -> Array:
            if not trees.is_inexact(x):
                return x
            mean = jnp.mean(axis.gather(x).astype(trees.wide(x.dtype)), axis=0)
            return jnp.broadcast_to(mean.astype(x.dtype), x.shape)

        mean = jax.tree.map(leaf, variables)
        distance = core.distance(axis, variables, mean)
        return axis.each(lambda v: problem.batch_stats(v, images))(mean), distance

    plain, plain_distance = mean_and_distance(variables)
    aligned, aligned_distance = mean_and_distance(axis.each(to_reference)(variables, activations))
    return Consensus(plain, aligned, plain_distance, aligned_distance)
