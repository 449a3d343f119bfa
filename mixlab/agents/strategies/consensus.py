"""One model of all agents, and how far they are from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixlab import trees
from mixlab.agents.parallel import Axis, Fetched
from mixlab.agents.strategies import alignment, core
from mixlab.agents.strategies.core import Problem
from mixlab.align import Permutations
from mixlab.types import Array, PyTree


class Consensus(NamedTuple):
    """Two ways to make one model of all agents, and how far the agents are from each.

    Attributes:
        plain: the variables' mean over agents.
        aligned: the mean after every agent has been aligned to the first.
        plain_distance: root mean square over agents of the parameters' distance to their mean,
            as a fraction of the root mean square of the agents' norms. 0 is consensus.
        aligned_distance: the same after alignment.
    """

    plain: PyTree
    aligned: PyTree
    plain_distance: Array
    aligned_distance: Array


def consensus(
    axis: Axis, problem: Problem, variables: PyTree, *, among: Array | None = None
) -> Consensus:
    """Averages all agents, as they are and aligned to the first, BatchNorm re-estimated.

    Agents that were aligned only pairwise live in different bases, where the plain mean is of no
    use: it is the aligned mean that tells whether they agree. Where every agent has images of its
    own, each aligns itself on these, and the statistics that the mean has on them are averaged.

    Args:
        axis: the agent axis.
        problem: gives the symmetry and the images.
        variables: leaves [k, ...].
        among: bool [A], the agents that count, such as those that are honest and awake; all by
            default. There must be one.

    Returns:
        A `Consensus` whose leaves have the block's leading axis, equal for every agent.
    """
    among = jnp.ones(axis.gather(axis.ids).shape, bool) if among is None else among
    count = jnp.sum(among, dtype=jnp.float32)
    matching = alignment.Matching()
    symmetry = matching.symmetry(problem)
    first = jnp.argmax(among)

    def of_first(tree: PyTree) -> Fetched:
        pool = jax.tree.map(lambda x: x[None], axis.pick(tree, first))
        return Fetched(pool, jnp.zeros((*axis.ids.shape, 1), jnp.int32))

    permutations = alignment.match(
        axis, problem, matching, variables, of_first(variables), of_first
    )

    def to_first(permutations: Permutations, own: PyTree) -> PyTree:
        there = symmetry.inverse(jax.tree.map(lambda p: p[0], permutations))
        return symmetry.permute(there, own)

    def counted(x: Array) -> Array:
        return jnp.where(trees.along(among[axis.ids], x), x, jnp.zeros((), x.dtype))

    def middle(x: Array) -> Array:
        if not trees.is_inexact(x):
            return x[first]
        wide = trees.wide(x.dtype)
        present = jnp.where(among[:, None], x, jnp.zeros((), x.dtype))
        return (jnp.sum(present.astype(wide), axis=0) / count.astype(wide)).astype(x.dtype)

    def mean(tree: PyTree) -> PyTree:
        one = axis.reduce(middle, tree)
        return axis.each(lambda agent: one)(axis.ids)

    def mean_and_distance(variables: PyTree) -> tuple[PyTree, Array]:
        middle = mean(variables)
        # Who does not count adds nothing to the distances, nor to the norms.
        distance = core.distance(axis, *jax.tree.map(counted, (variables, middle)))
        middle = alignment.reestimated(axis, problem, middle)
        return (mean(middle) if problem.local else middle), distance

    plain, plain_distance = mean_and_distance(variables)
    aligned, aligned_distance = mean_and_distance(axis.each(to_first)(permutations, variables))
    return Consensus(plain, aligned, plain_distance, aligned_distance)
