"""Strategies that mix parameters within the steps of local training.

As with all strategies here, BatchNorm stays in training mode: gradients are those of normalised
batches, and the running statistics are mixed as the parameters are. (The published comparisons of
DIMAT froze it for these baselines by accident.)
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixlab import merge as merging
from mixlab import spec, trees
from mixlab.agents.network import Network, kind_of, neighbour_slots
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree

ORDERS = ("combine_then_adapt", "adapt_then_combine")
PROJECTIONS = ("dimat", "cone")
# Of CGA's quadratic programs; flat ones, of more neighbours than entries, need hundreds.
_ITERATIONS = 2000


@core.on_topology
def dpsgd(
    topology: Topology,
    *,
    order: str = "combine_then_adapt",
    merge: str | merging.MergeMethod | None = None,
    biased: bool = False,
) -> Strategy:
    """Decentralized SGD: each step mixes the neighbourhood's parameters and adds a local update.

    `x_i <- sum_j W_ij x_j + update_i`, or, adapt then combine, `x_i <- sum_j W_ij (x_j +
    update_j)`, with updates at one's own x_i by any optimizer in the place of plain SGD.

    Args:
        topology: who receives from whom, and the weights; doubly stochastic, or else agents count
            by how much others listen to them, and the mean loss is not what is minimised.
        order: "combine_then_adapt" (D-PSGD, CDSGD) or "adapt_then_combine" (diffusion).
        merge: a robust rule in the place of the weighted sum: `"median"`, `"krum(1)"`, ...
        biased: whether to take weights that are not doubly stochastic all the same.

    Raises:
        ValueError: an unknown order or rule, or weights that are not doubly stochastic.

    Source: Lian et al., NeurIPS 2017, algorithm 1; for the orders Cattivelli and Sayed, IEEE
    Trans. Signal Processing 58(3), 2010.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order={order!r}; {spec.nearest(order, ORDERS)}")
    method = core.method_of(merge, topology)
    if method is None and not biased:
        topology.require_doubly_stochastic("dpsgd")
    combine_first = order == "combine_then_adapt"

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        if combine_first:
            return _combine_then_adapt(network, problem, state, gradients, method)
        state = core.local_step(network, problem, state, gradients)
        return state._replace(variables=core.mix_variables(network, state.variables, method))

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        return state._replace(variables=core.mix_variables(network, state.variables, method))

    return Strategy(
        "dpsgd",
        topology,
        "step",
        core.nothing_before,
        local_step,
        communicate if combine_first else core.stay,
    )


def _combine_then_adapt(
    network: Network,
    problem: Problem,
    state: AgentState,
    gradients: Gradients,
    method: merging.MergeMethod | None = None,
) -> AgentState:
    """The mixture of the neighbourhood's parameters, and the update at one's own."""
    changes, opt_state = core.updates(network, problem, state, gradients.grads)
    seen = core.with_model(state, state.variables["params"], gradients.batch_stats)
    mixed = core.mix_variables(network, seen.variables, method)
    mixed["params"] = optax.apply_updates(mixed["params"], changes)
    return state._replace(variables=mixed, opt_state=opt_state)


@core.on_topology
def cdsgd(topology: Topology) -> Strategy:
    """Consensus-based distributed SGD: `x_i <- sum_j W_ij x_j - lr g_i(x_i)`.

    It is `dpsgd` with combine then adapt, which appeared in the same year.

    Raises:
        ValueError: the weights are not doubly stochastic.

    Source: Jiang et al., NeurIPS 2017, "Collaborative deep learning in fixed topology networks",
    algorithm 1.
    """
    topology.require_doubly_stochastic("cdsgd")
    return dpsgd(topology)._replace(name="cdsgd")


@core.on_topology
def cdmsgd(topology: Topology, *, momentum: float = 0.9) -> Strategy:
    """CDSGD with Nesterov momentum, which every agent keeps to itself.

    `v_i <- momentum v_i + g_i`, `x_i <- sum_j W_ij x_j - lr (g_i + momentum v_i)`. The momentum
    comes before the configured optimizer, which should be plain SGD.

    Args:
        topology: as for `dpsgd`.
        momentum: in [0, 1).

    Raises:
        ValueError: the momentum is out of range, or the weights are not doubly stochastic.

    Source: Jiang et al., NeurIPS 2017, algorithm 2; the form is that of DIMAT's baseline.
    """
    _check_momentum(momentum)
    topology.require_doubly_stochastic("cdmsgd")
    return cdsgd(topology)._replace(
        name="cdmsgd", optimizer=functools.partial(_with_momentum, momentum, True)
    )


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")


def _with_momentum(
    momentum: float, nesterov: bool, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    return optax.chain(optax.trace(momentum, nesterov=nesterov), optimizer)


def _mixing(network: Network, local: int, mixing: int) -> Array:
    """Whether this step, of cycles of `local` steps and then `mixing` steps, mixes: bool."""
    return network.time % (local + mixing) >= local


def _check_cycle(local: int, mixing: int) -> None:
    if local < 0 or mixing < 1:
        raise ValueError(f"a cycle has local >= 0 and mixing >= 1 steps, got {local} and {mixing}")


@core.on_topology
def ldsgd(
    topology: Topology, *, local: int = 10, mixing: int = 20, momentum: float = 0.9
) -> Strategy:
    """Local decentralized SGD: cycles of steps without communication, then steps of CDMSGD.

    Args:
        topology: who receives from whom, and the weights.
        local: I1 >= 0, steps at the start of a cycle that do not mix.
        mixing: I2 >= 1, the steps after them, which do.
        momentum: Nesterov, see `cdmsgd`.

    Raises:
        ValueError: a cycle of no steps, a momentum that is out of range, or weights that are not
            doubly stochastic.

    Source: Li, Yang, Wang and Zhang 2019, "Communication-efficient local decentralized SGD
    methods"; the momentum and the defaults are of DIMAT's baseline.
    """
    _check_cycle(local, mixing)
    topology.require_doubly_stochastic("ldsgd")
    plain = cdmsgd(topology, momentum=momentum)

    def sometimes(network: Network) -> Network:
        alone, mixes = jnp.eye(network.num_agents), _mixing(network, local, mixing)
        weights = jnp.where(mixes, network.weights, alone.astype(network.weights.dtype))
        return network.weighted(weights, mixes)

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        return plain.local_step(sometimes(network), problem, state, gradients)

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        return plain.communicate(sometimes(network), problem, state)

    return plain._replace(name="ldsgd", local_step=local_step, communicate=communicate)


@core.on_topology
def swarm(
    topology: Topology,
    *,
    local: int = 0,
    mixing: int = 1,
    momentum: float = 0.9,
    pairs: Sequence[tuple[int, int]] | np.ndarray | None = None,
) -> Strategy:
    """SwarmSGD: in every step the two agents of one edge train, then average their models.

    All others stand still, so A agents need A / 2 times the steps of the other strategies. An
    agent that does not hear from its partner keeps its own model.

    Args:
        topology: the edges, of which one is drawn evenly in each step; where they vary with time,
            one of those there are.
        local: steps at the start of a cycle in which the two only train.
        mixing: the steps after them, in which they average too.
        momentum: heavy ball, kept to oneself, before the configured optimizer.
        pairs: whom to take instead, [T, 2], again and again; they need not be neighbours.

    Raises:
        ValueError: a topology without edges that go both ways, pairs that are not of two different
            agents, a cycle of no steps, or a momentum that is out of range.

    Source: Nadiradze et al., NeurIPS 2021, "Asynchronous decentralized SGD with quantized and
    local updates", algorithm 1 without quantisation; the cycles are of DIMAT's baseline.
    """
    _check_cycle(local, mixing)
    _check_momentum(momentum)
    if pairs is None:
        both_ways = (topology.rounds > 0) & (topology.rounds > 0).swapaxes(1, 2)
        by_round = [np.argwhere(np.triu(joined, 1)) for joined in both_ways]
        if not any(map(len, by_round)):
            raise ValueError(f"swarm needs edges that go both ways, {topology.name} has none")
    else:
        given = np.asarray(pairs, np.int32)
        if (
            given.ndim != 2
            or given.shape[1] != 2
            or not len(given)
            or given.min() < 0
            or given.max() >= topology.num_agents
            or (given[:, 0] == given[:, 1]).any()
        ):
            raise ValueError(
                f"pairs must be [T, 2], each two different agents of the "
                f"{topology.num_agents}, got {pairs}"
            )
        by_round = [pair[None] for pair in given]
    counts = np.array([len(edges) for edges in by_round], np.int32)
    edges = np.zeros((len(by_round), counts.max(), 2), np.int32)
    for padded, found in zip(edges, by_round, strict=True):
        padded[: len(found)] = found

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        now = network.time % len(edges)
        key = jax.random.fold_in(network.key, 0)
        draw = jax.random.randint(key, (), 0, jnp.asarray(counts)[now])
        a, b = jnp.asarray(edges)[now, draw]
        ids = network.axis.ids
        meets = jnp.asarray(counts)[now] > 0  # a round may have no edges
        moves = meets & ((ids == a) | (ids == b))
        trained = core.local_step(network, problem, state, gradients)
        state = trees.where(moves, trained, state)

        # Replayed pairs need not be edges of the graph, whose weights say nothing of them.
        outside = ~(jnp.asarray(network.adjacency)[[a, b], [b, a]])
        there = jnp.stack([a, b]), jnp.stack([b, a])
        mixes = meets & _mixing(network, local, mixing)
        reached = mixes & ((network.weights[there] > 0) | outside)
        pair = jnp.zeros_like(network.weights)
        pair = pair.at[there].set(jnp.where(reached, 0.5, 0.0).astype(pair.dtype))
        meeting = jnp.zeros(pair.shape, bool).at[there].set(mixes)
        met_by = network.weighted(pair, meeting)
        arrived = {
            name: met_by.select(value, jnp.stack([a, b]), kind_of(name))
            for name, value in state.variables.items()
        }
        partner, where = jnp.where(ids == a, b, a), (ids == a).astype(jnp.int32)

        def leaf(own: Array, arrived: Array) -> Array:
            if not trees.is_inexact(own):
                return own
            wide = trees.wide(own.dtype)
            return ((own.astype(wide) + arrived[where].astype(wide)) / 2).astype(own.dtype)

        met = jax.tree.map(leaf, state.variables, arrived)
        average = pair[ids, partner] > 0
        return state._replace(variables=trees.where(average, met, state.variables))

    return Strategy(
        "swarm",
        topology,
        "step",
        core.nothing_before,
        local_step,
        core.stay,
        optimizer=functools.partial(_with_momentum, momentum, False),
    )


@core.on_topology
def cga(topology: Topology, *, momentum: float = 0.9, projection: str = "dimat") -> Strategy:
    """Cross-gradient aggregation: the neighbours return the gradient of one's model on their data.

    Every agent sends its parameters to its neighbours, which send back the gradient of their
    batch at these. With q the own gradient times W_ii, and rows M_j of the returned ones times
    W_ij, the direction is `q + M^T v`, parameter by parameter, with which a step of `cdmsgd` is
    made. It costs 1 + degree gradients a step.

    Args:
        topology: who receives from whom, and the weights; its edges go both ways.
        momentum: Nesterov, see `cdmsgd`.
        projection: how v is found. "dimat": least `|M^T v - q|^2` for v <= 1/2, as in the
            published runs. "cone": least `|M^T v + q|^2` for v >= 0, as in the paper; the
            direction then is the one nearest to q that no neighbour's gradient opposes.

    Raises:
        ValueError: an edge that goes one way, an unknown projection, a momentum that is out of
            range, or weights that are not doubly stochastic; in a step, gradients without the
            batch and the function that gives others.

    Source: Esfandiari et al., ICML 2021, algorithm 1; Lopez-Paz and Ranzato, NeurIPS 2017 (GEM).
    """
    if projection not in PROJECTIONS:
        raise ValueError(
            f"unknown projection={projection!r}; {spec.nearest(projection, PROJECTIONS)}"
        )
    if (topology.adjacency != topology.adjacency.T).any():
        raise ValueError(
            f"cga needs neighbours that answer, but {topology.name} has edges that go one way; "
            f"use an undirected graph"
        )
    topology.require_doubly_stochastic("cga")
    plain = cdmsgd(topology, momentum=momentum)

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        slots, valid = neighbour_slots(network.adjacency)
        others, real = slots[:, 1:], valid[:, 1:]
        if not others.shape[1]:
            return plain.local_step(network, problem, state, gradients)
        if gradients.of is None or gradients.batch is None:
            raise ValueError("cga takes gradients of others' models: Gradients(batch=..., of=...)")
        gradient_of = gradients.of
        # As which neighbour of j agent i is answered, for j the neighbour of i in slot s.
        mine = np.argmax(others[others] == np.arange(len(others))[:, None, None], axis=2)

        arrived = network.broadcast(state.variables["params"], "parameters")

        def answers(asked: Array, variables: PyTree, batch: PyTree) -> PyTree:
            def answer(row: Array) -> PyTree:
                params = jax.tree.map(lambda x: x[row], arrived.pool)
                return gradient_of({**variables, "params": params}, batch)

            return trees.stack([answer(asked[s]) for s in range(others.shape[1])])

        ids = network.axis.ids
        sent = network.axis.each(answers)(arrived.rows[:, 1:], state.variables, gradients.batch)
        one = trees.num_bytes(gradients.grads) / len(ids)
        # Who was not asked does not answer.
        asked = network.weights.T > 0
        answering = network.weighted(jnp.where(asked, network.weights, 0), asked)
        crossed = answering.broadcast(sent, "gradients", num_bytes=one)

        def direction(agent: Array, answered: Array, own: PyTree) -> PyTree:
            js = jnp.asarray(others)[agent]
            row = jnp.where(jnp.asarray(real)[agent], answering.weights[agent][js], 0.0)
            mine_there = jnp.asarray(mine)[agent]
            got = jax.tree.map(lambda x: x[answered, mine_there], crossed.pool)
            return _cross(own, got, network.weights[agent, agent], row, projection)

        grads = network.axis.each(direction)(ids, crossed.rows[:, 1:], gradients.grads)
        changes, opt_state = core.updates(network, problem, state, grads)
        # The neighbours' parameters have arrived before.
        mixed = {"params": network.mix_arrived(state.variables["params"], arrived)}
        if gradients.batch_stats is not None:
            mixed["batch_stats"] = network.mix(gradients.batch_stats, "statistics")
        mixed["params"] = optax.apply_updates(mixed["params"], changes)
        return state._replace(variables={**state.variables, **mixed}, opt_state=opt_state)

    return plain._replace(name="cga", local_step=local_step)


def _cross(own: PyTree, got: PyTree, weight: Array, row: Array, projection: str) -> PyTree:
    """The direction of CGA of one agent.

    Args:
        own: the own gradient.
        got: the gradients from the neighbours, leaves [n, ...].
        weight: of oneself.
        row: [n], of the neighbours; those of whom nothing came have zero.
        projection: see `cga`.
    """
    leaves, treedef = jax.tree.flatten(own)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    q = [weight * leaf.ravel().astype(jnp.float32) for leaf in leaves]
    matrices = (leaf.reshape(len(row), -1).astype(jnp.float32) for leaf in jax.tree.leaves(got))
    scale = row[:, None]
    rows = [jnp.where(scale > 0, scale * m, 0) for m in matrices]  # zero times infinity is NaN
    gram = jnp.stack([dot(m, m.T) for m in rows])
    target = jnp.stack([dot(m, x) for m, x in zip(rows, q, strict=True)])
    # With v = -u, the cone's program is the other one with the bound zero.
    sign, bound = (1.0, 0.5) if projection == "dimat" else (-1.0, 0.0)
    v = sign * _least_squares_below(gram, target, bound)
    return jax.tree.unflatten(
        treedef,
        [
            (x + dot(u, m)).reshape(leaf.shape).astype(leaf.dtype)
            for x, u, m, leaf in zip(q, v, rows, leaves, strict=True)
        ],
    )


class _Descent(NamedTuple):
    """Where `_least_squares_below` is, was, looks, and with what momentum."""

    iteration: Array
    u: Array
    before: Array
    ahead: Array
    t: Array


def _least_squares_below(gram: Array, target: Array, bound: float) -> Array:
    """Minimises `u^T gram u / 2 - target^T u` subject to `u <= bound`, for T problems at once.

    Accelerated projected gradients that start anew where momentum leads uphill (O'Donoghue and
    Candès 2015, "Adaptive restart for accelerated gradient schemes"), the rows scaled to norm 1.

    Args:
        gram: [T, n, n], positive semidefinite.
        target: [T, n].
        bound: for every entry.

    Returns:
        [T, n].
    """
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
    gram = gram / (scale[:, :, None] * scale[:, None, :])
    target = target / scale
    steepness = jnp.maximum(jnp.abs(gram).sum(axis=2).max(axis=1), 1.0)[:, None]

    def moved(held: _Descent) -> Array:
        tolerance = 1e-7 * (jnp.abs(held.u).max() + 1e-30)
        change = jnp.abs(held.u - held.before).max()
        return (held.iteration < 2) | ((held.iteration < _ITERATIONS) & (change > tolerance))

    def descend(held: _Descent) -> _Descent:
        slope = jnp.einsum("tij,tj->ti", gram, held.ahead, precision=jax.lax.Precision.HIGHEST)
        new = jnp.minimum(held.ahead - (slope - target) / steepness, bound * scale)
        step = new - held.u
        uphill = jnp.sum((held.ahead - new) * step, axis=1, keepdims=True) > 0
        t = jnp.where(uphill, 1.0, held.t)
        later = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return _Descent(held.iteration + 1, new, held.u, new + (t - 1) / later * step, later)

    zero = jnp.zeros_like(target)
    start = _Descent(jnp.int32(0), zero, zero, zero, jnp.ones_like(steepness))
    return jax.lax.while_loop(moved, descend, start).u / scale
