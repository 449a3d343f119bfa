"""Agents brought into one order of their hidden units, within a program over the agent axis.

`match` compares every agent with some others, `match_neighbours` with those it hears of;
`spanning_forest` and `to_one_order` bring all agents into the order of one, over the edges of their
graph.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.csgraph

from mixlab import align, spec, trees
from mixlab.agents.network import Network, neighbour_slots
from mixlab.agents.parallel import Axis, Fetched
from mixlab.agents.strategies.core import Problem
from mixlab.align.activations import STATISTICS
from mixlab.types import Array, PyTree

MATCHINGS = ("activations", "weights")

# What agents hold is bounded to this before it is compared: no square of it overflows, so that an
# agent that diverged, or lies, matches badly and stops nobody.
_BOUND = 1e9
_SWEEPS = 10


@dataclasses.dataclass(frozen=True)
class Matching:
    """By what the units of two agents are matched.

    Attributes:
        by: "activations" or "weights".
        statistic: of activations, "correlation" or "second_moment".
        batch: the number of images of one forward pass; None is all of them at once.

    Raises:
        ValueError: an unknown name, or a batch below 1.
    """

    by: str = "activations"
    statistic: str = "correlation"
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.by not in MATCHINGS:
            raise ValueError(f"unknown matching {self.by!r}; {spec.nearest(self.by, MATCHINGS)}")
        if self.statistic not in STATISTICS:
            known = spec.nearest(self.statistic, STATISTICS)
            raise ValueError(f"unknown statistic {self.statistic!r}; {known}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"a batch for matching must be at least 1, got batch={self.batch}")

    def symmetry(self, problem: Problem) -> align.Symmetry:
        """The symmetry of a problem.

        Raises:
            ValueError: it lacks the symmetry, or the images that activations are compared on.
        """
        if problem.symmetry is None or (self.by == "activations" and problem.images is None):
            raise ValueError(
                "aligning agents needs the model's symmetry and images to compare activations on; "
                "give both in Problem(symmetry=..., images=...)"
            )
        return problem.symmetry


def reestimated(axis: Axis, problem: Problem, variables: PyTree) -> PyTree:
    """The agents' variables, BatchNorm statistics re-estimated on the images, if there are any."""
    images = problem.images
    if images is None:
        return variables
    if problem.local:
        return axis.each(problem.batch_stats)(variables, images)
    return axis.each(lambda own: problem.batch_stats(own, images))(variables)


def match(
    axis: Axis,
    problem: Problem,
    matching: Matching,
    own: PyTree,
    others: Fetched,
    reach: Callable[[PyTree], Fetched],
    *,
    shown: PyTree | None = None,
) -> align.Permutations:
    """Matches every agent with some others.

    Images that all agents share are seen by each model once, whatever the number of its pairs.
    Where every agent has images of its own, it runs its partners' models on them.

    Args:
        axis: the agent axis.
        problem: gives the symmetry and the images.
        matching: how.
        own: variables of the block's agents, leaves [k, ...].
        others: the variables with which each agent compares its own, m of them.
        reach: brings what else, leaves [k, ...], is asked of the same agents.
        shown: as `own`, what the others see of each agent; where it is another than it holds.

    Returns:
        Leaves [k, m, ...]: they bring the partners into the agent's order.
    """
    symmetry = matching.symmetry(problem)
    if matching.by == "weights":

        def by_weights(mine: PyTree, row: Array) -> align.Permutations:
            find = functools.partial(
                align.weight_matching, symmetry, _bounded(mine), backend=problem.assignment
            )
            return jax.lax.map(lambda j: find(_bounded(_row(others.pool, j))), row)

        return axis.each(by_weights)(own, others.rows)

    def seen(variables: PyTree, images: Array) -> dict[str, align.Centred]:
        return align.centre(_bounded(symmetry.activations(variables, images)), symmetry)

    def on_shared(images: Array) -> PyTree:
        views = axis.each(lambda variables: seen(variables, images))
        ours = views(own)
        theirs = reach(ours if shown is None else views(shown))

        def pairs(mine: PyTree, row: Array) -> PyTree:
            return jax.lax.map(lambda j: align.cross_moments(mine, _row(theirs.pool, j)), row)

        return axis.each(pairs)(ours, theirs.rows)

    def on_own(images: Array) -> PyTree:
        def pairs(mine: PyTree, row: Array, images: Array) -> PyTree:
            # Unrolled: convolutions within a loop are slow on CPU.
            ours = seen(mine, images)
            found = [
                align.cross_moments(ours, seen(_row(others.pool, row[s]), images))
                for s in range(others.rows.shape[1])
            ]
            return trees.stack(found)

        return axis.each(pairs)(own, others.rows, images)

    def together(first: align.Moments, second: align.Moments) -> align.Moments:
        return jax.vmap(jax.vmap(align.merge_moments))(first, second)

    assert problem.images is not None
    of_batch, dim = (on_own, 1) if problem.local else (on_shared, 0)
    everything = problem.images
    count = everything.shape[dim]
    size = min(matching.batch or count, count)
    whole = count // size

    def add(total: PyTree, images: Array) -> PyTree:
        return jax.tree.map(
            together, total, of_batch(images), is_leaf=lambda x: isinstance(x, align.Moments)
        )

    def part(start: int, stop: int) -> Array:
        return jax.lax.slice_in_dim(everything, start, stop, axis=dim)

    total = of_batch(part(0, size))
    if whole > 1:
        # A loop, since XLA would otherwise hold the activations of several batches at once.
        first = part(size, size * whole)
        shape = (*first.shape[:dim], whole - 1, size, *first.shape[dim + 1 :])
        in_turn = jnp.moveaxis(first.reshape(shape), dim, 0)
        total, _ = jax.lax.scan(lambda total, images: (add(total, images), None), total, in_turn)
    if size * whole < count:
        total = add(total, part(size * whole, count))
    find = functools.partial(
        align.match_moments,
        statistic=matching.statistic,
        backend=problem.assignment,
        symmetry=symmetry,
    )
    return axis.each(jax.vmap(find))(total)


def match_neighbours(
    network: Network,
    problem: Problem,
    matching: Matching,
    own: PyTree,
    arrived: Fetched,
) -> align.Permutations:
    """Matches every agent with all those it receives from.

    Args:
        network: who that is, and how they are seen.
        problem: as for `match`.
        matching: as for `match`.
        own: variables of the block's agents, leaves [k, ...].
        arrived: what `Network.broadcast` gave of them.

    Returns:
        Leaves [k, m, ...], in the order of `neighbour_slots` without the agent itself.
    """
    axis, slots = network.axis, neighbour_slots(network.adjacency)[0][:, 1:]
    others = Fetched(arrived.pool, arrived.rows[:, 1:])
    seen_as_they_are = network.late is None and network.attack is None
    both_ways = network.lost is None and (network.adjacency == network.adjacency.T).all()
    on_shared = matching.by == "activations" and not problem.local
    if not (seen_as_they_are and both_ways and on_shared):
        shown = None if seen_as_they_are else arrived.column(0)
        return match(
            axis, problem, matching, own, others, lambda tree: axis.fetch(tree, slots), shown=shown
        )

    # Both agents of a pair would find the same: one does, and the other takes the inverse.
    does = share_pairs(network.adjacency)
    partners = neighbour_slots(does)[0][:, 1:]
    found = match(axis, problem, matching, own, others, lambda tree: axis.fetch(tree, partners))
    ids = np.arange(len(does))[:, None]
    mine = does[ids, slots]
    finder, partner = np.where(mine, ids, slots), np.where(mine, slots, ids)
    place = np.argmax(partners[finder] == partner[..., None], axis=-1)
    at = axis.fetch(found, finder)
    symmetry = matching.symmetry(problem)

    def answer(row: Array, place: Array, mine: Array) -> align.Permutations:
        there = jax.tree.map(lambda x: x[row, place], at.pool)
        back = symmetry.inverse(there)
        return jax.tree.map(lambda x, y: jnp.where(mine, x, y), there, back)

    here = (jnp.asarray(table)[axis.ids] for table in (place, mine))
    return axis.each(jax.vmap(answer))(at.rows, *here)


def share_pairs(adjacency: np.ndarray) -> np.ndarray:
    """Gives each pair of neighbours to one of the two, so that nobody has more than it must.

    Args:
        adjacency: bool [A, A], symmetric.

    Returns:
        bool [A, A], whether agent i does the pair with j; the largest row sum is the least
        possible.
    """
    pairs = np.argwhere(np.triu(adjacency))
    number, count = len(pairs), len(adjacency)
    least = -(-number // count)
    # On a ring everyone takes the next: one model from one other is all that travels.
    ahead = (np.arange(count) - np.arange(count)[:, None]) % count
    second = np.tri(count, dtype=bool)
    does = adjacency & ((2 * ahead < count) | ((2 * ahead == count) & ~second))
    if does.sum(axis=1).max() <= least:
        return does
    # A flow from a source over the pairs and their two agents to a sink; each agent lets `most` by.
    nodes, agent, sink = np.arange(1, number + 1), number + 1 + pairs, number + 1 + count
    start = np.concatenate([np.zeros(number, int), nodes, nodes, number + 1 + np.arange(count)])
    stop = np.concatenate([nodes, *agent.T, np.full(count, sink)])
    for most in range(least, count):
        capacity = np.r_[np.ones(3 * number, np.int32), np.full(count, most, np.int32)]
        graph = scipy.sparse.csr_array((capacity, (start, stop)), shape=(sink + 1, sink + 1))
        found = scipy.sparse.csgraph.maximum_flow(graph, 0, sink)
        if found.flow_value == number:
            break
    first = np.asarray(found.flow[nodes, agent[:, 0]]).ravel() > 0
    i, j = np.where(first, pairs.T, pairs.T[::-1])
    does = np.zeros_like(adjacency)
    does[i, j] = True
    return does


class Forest(NamedTuple):
    """Over which edges agents are brought into one order, breadth first.

    Attributes:
        parent: int32 [A], whom each agent is matched to; itself for a root, and for whom no root
            reaches.
        level: int32 [A], how many edges there are to the root; -1 where no root reaches.
    """

    parent: Array
    level: Array


def spanning_forest(
    adjacency: np.ndarray, awake: Array, settled: Array, lost: Array | None = None
) -> Forest:
    """A tree for each part of the graph, of the agents that are awake.

    Args:
        adjacency: bool [A, A]; edges are taken both ways.
        awake: bool [A].
        settled: bool [A], who is in the common order: these are the roots. In a part where
            nobody is, also of those asleep, it is the first agent awake.
        lost: bool [A, A], what agent i should hear of agent j and does not; nothing by default.
    """
    joined = adjacency | adjacency.T
    _, part = scipy.sparse.csgraph.connected_components(joined, directed=False)
    together = part[:, None] == part
    ids = jnp.arange(len(joined), dtype=jnp.int32)
    started = jnp.any(together & settled, axis=1)
    first = jnp.argmax(together & awake, axis=1) == ids
    roots = awake & jnp.where(started, settled, first)
    edges = joined & awake & awake[:, None]
    if lost is not None:
        edges &= ~lost

    def grow(forest: tuple[Array, Forest]) -> tuple[Array, Forest]:
        depth, (parent, level) = forest
        near = edges & (level == depth)
        new = jnp.any(near, axis=1) & (level < 0)
        parent = jnp.where(new, jnp.argmax(near, axis=1).astype(jnp.int32), parent)
        return depth + 1, Forest(parent, jnp.where(new, depth + 1, level))

    start = jnp.int32(0), Forest(ids, jnp.where(roots, 0, -1).astype(jnp.int32))
    return jax.lax.while_loop(lambda at: jnp.any(at[1].level == at[0]), grow, start)[1]


def to_one_order(
    network: Network,
    problem: Problem,
    matching: Matching,
    variables: PyTree,
    forest: Forest,
    *,
    universe: bool = False,
) -> align.Permutations:
    """The permutations that bring every agent of a forest into the order of its root.

    Every agent is matched to its parent as both are; permutations are composed down the tree.

    Args:
        network: shows what the others hold.
        problem: as for `match`.
        matching: as for `match`.
        variables: leaves [k, ...] of the block.
        forest: see `spanning_forest`.
        universe: go on from there, matching one agent after the other to the mean of all others,
            until none moves, ten times around at most: the result is consistent around every cycle
            of agents. Roots stay.

    Returns:
        Leaves [k, ...].

    Raises:
        ValueError: a universe by activations where every agent has images of its own.
    """
    symmetry, axis = matching.symmetry(problem), network.axis
    below = forest.level > 0
    slots, _ = neighbour_slots(network.adjacency | network.adjacency.T)
    is_parent = jnp.asarray(slots)[axis.ids] == forest.parent[axis.ids][:, None]
    place = jnp.argmax(is_parent, axis=1)[:, None]

    def of_parent(tree: PyTree) -> Fetched:
        near = axis.fetch(tree, slots)
        return Fetched(near.pool, jnp.take_along_axis(near.rows, place, axis=1))

    faithful = network.attack is None
    shown = variables if faithful else _row(network.exchange(variables), axis.ids)
    found = match(
        axis,
        problem,
        matching,
        variables,
        of_parent(shown),
        of_parent,
        shown=None if faithful else shown,
    )
    identity = symmetry.identity()

    def to_parent(moving: Array, found: align.Permutations) -> align.Permutations:
        there = symmetry.inverse({name: p[0] for name, p in found.items()})
        return jax.tree.map(lambda p, own: jnp.where(moving, p, own), there, identity)

    steps = axis.gather(axis.each(to_parent)(below[axis.ids], found))

    def descend(depth: Array, composed: align.Permutations) -> align.Permutations:
        onward = jax.vmap(symmetry.compose)(_row(composed, forest.parent), steps)
        here = forest.level == depth
        return trees.where(here, onward, composed)

    start = jax.tree.map(lambda p: jnp.broadcast_to(p, (len(below), *p.shape)), identity)
    composed = jax.lax.fori_loop(1, jnp.max(forest.level) + 1, descend, start)
    if universe:
        views = _views(axis, problem, matching, shown)
        composed = _ascend(problem, matching, views, composed, forest.level)
    return _row(composed, axis.ids)


def _views(axis: Axis, problem: Problem, matching: Matching, shown: PyTree) -> PyTree:
    """What the universe is matched by, leaves [A, ...]; its mean over agents makes sense."""
    if matching.by == "weights":
        return _bounded(axis.gather(shown))
    if problem.local:
        raise ValueError(
            "align='universe' compares all agents on the same images, but every agent has its "
            "own; use images that all share, matching='weights' or align='once'"
        )
    symmetry, images = matching.symmetry(problem), problem.images
    assert images is not None

    def view(variables: PyTree) -> dict[str, Array]:
        seen = align.centre(_bounded(symmetry.activations(variables, images)), symmetry)
        found = {}
        for name, units in seen.items():
            if not symmetry.over[name]:
                # The sum of correlations is the correlation with a sum of such.
                spread = jnp.sqrt(units.squares / units.deviations.shape[-2])
                found[name] = (
                    units.deviations / jnp.maximum(spread, 1e-7)
                    if matching.statistic == "correlation"
                    else units.deviations + units.mean
                )
        return found

    return axis.gather(axis.each(view)(shown))


def _ascend(
    problem: Problem,
    matching: Matching,
    views: PyTree,
    composed: align.Permutations,
    level: Array,
) -> align.Permutations:
    """Matches one agent after the other to the sum of the others, leaves [A, ...]."""
    symmetry = matching.symmetry(problem)

    def place(permutations: align.Permutations, view: PyTree) -> PyTree:
        if matching.by == "weights":
            return symmetry.permute(permutations, view)
        return {name: jnp.take(x, permutations[name], axis=-1) for name, x in view.items()}

    def best(others: PyTree, view: PyTree, now: align.Permutations) -> align.Permutations:
        if matching.by == "weights":
            return align.weight_matching(
                symmetry, others, view, init=now, backend=problem.assignment
            )
        # Inner products add up over the others, which correlations with a sum do not.
        products = align.cross_moments(align.centre(others), align.centre(view))
        found = align.match_moments(products, statistic="second_moment", backend=problem.assignment)
        return {**now, **found}

    def visit(i: Array, state: tuple[Any, Any, Array]) -> tuple[Any, Any, Array]:
        composed, total, moved = state
        now, view = _row(composed, i), _row(views, i)
        others = jax.tree.map(jnp.subtract, total, place(now, view))
        new = jax.tree.map(lambda a, b: jnp.where(level[i] > 0, a, b), best(others, view, now), now)
        changed = jnp.any(jnp.stack([jnp.any(new[name] != now[name]) for name in now]))
        total = jax.tree.map(jnp.add, others, place(new, view))
        composed = jax.tree.map(lambda all_, p: all_.at[i].set(p), composed, new)
        return composed, total, moved | changed

    def sweep(state: tuple[Array, Any, Any, Array]) -> tuple[Array, Any, Any, Array]:
        count, composed, total, _ = state
        start = composed, total, jnp.asarray(False)
        return count + 1, *jax.lax.fori_loop(0, len(level), visit, start)

    here = level >= 0
    present = jax.tree.map(
        lambda x: jnp.where(trees.along(here, x), x, 0), jax.vmap(place)(composed, views)
    )
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), present)
    _, composed, _, _ = jax.lax.while_loop(
        lambda state: (state[0] < _SWEEPS) & state[3],
        sweep,
        (jnp.int32(0), composed, total, jnp.asarray(True)),
    )
    return composed


def _bounded(tree: PyTree) -> PyTree:
    """The floating leaves in float32 or wider, finite and below `_BOUND`."""

    def leaf(x: Array) -> Array:
        if not trees.is_inexact(x):
            return x
        return jnp.clip(jnp.nan_to_num(x.astype(trees.wide(x.dtype))), -_BOUND, _BOUND)

    return jax.tree.map(leaf, tree)


def _row(tree: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda x: x[i], tree)
