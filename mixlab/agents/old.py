"""How agents communicate.

A strategy is three pure functions, `init`, `local_step` and `communicate`, written as parts of a
program over the agent axis (see `mixlab.agents.parallel`).

All of them share the gradient, the batch, the optimizer and the evaluation; they differ only in
what they do with the gradients of a step and with the agents' variables at a communication. The
mixing matrix is an argument, row i being the weights of what agent i receives, so that it may
change from call to call, within the edges of the topology, without a new compilation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixlab import align, merge, spec, trees
from mixlab.agents.parallel import Axis
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree

OPT_STATE_AT_MERGE = ("keep", "reset", "permute")


class AgentState(NamedTuple):
    """What training changes; every leaf has the leading axis of the agents.

    Attributes:
        variables: `{"params": ..., "batch_stats": ...}`, the second only where the model has it.
        opt_state: the state of the optimizer.
        failed_at: int32, the first step whose loss was not finite, -1 while there is none.
    """

    variables: PyTree
    opt_state: PyTree
    failed_at: Array


class Problem(NamedTuple):
    """What a strategy may know of the task.

    Attributes:
        optimizer: the optax transformation of every agent.
        symmetry: the permutation symmetries of the model; None where nothing is aligned.
        batch_stats: `batch_stats(variables, images)` gives `variables` with BatchNorm statistics
            re-estimated on `images`; the identity for a model without BatchNorm.
        images: [n, H, W, C], the examples on which activations are compared and statistics
            re-estimated; every agent holds a copy (DIMAT's "proxy" data).
        assignment: backend of `align.assignment`.
    """

    optimizer: optax.GradientTransformation
    symmetry: align.Symmetry | None = None
    batch_stats: Callable[[PyTree, Array], PyTree] = lambda variables, images: variables
    images: Array | None = None
    assignment: str | None = None


class Strategy(NamedTuple):
    """A way to train many agents.

    Attributes:
        name: as the report shows it.
        every: when agents communicate: "never"; "round", when `communicate` replaces their
            variables between rounds of local training; "step", within every local step of the
            rounds; "always", within every step from the first on.
        init: `init(axis, state) -> state`, before the first step.
        local_step: `local_step(axis, problem, state, grads, batch_stats, weights) -> state`.
        communicate: `communicate(axis, problem, state, weights) -> state`. Where agents mix within
            the step it gives the mixture that the next step will form, for evaluation.
        sent_per_step: `sent_per_step(state) -> bytes [A]` that each agent sends in a step, from
            the sizes of the leaves [A, ...] that it sends.
        sent_per_round: likewise for `communicate`.
    """

    name: str
    every: str
    init: Callable[[Axis, AgentState], AgentState]
    local_step: Callable[[Axis, Problem, AgentState, PyTree, PyTree, Array], AgentState]
    communicate: Callable[[Axis, Problem, AgentState, Array], AgentState]
    sent_per_step: Callable[[AgentState], np.ndarray]
    sent_per_round: Callable[[AgentState], np.ndarray]


def mix(axis: Axis, weights: Array, tree: PyTree) -> PyTree:
    """Gives agent i the sum over j of `weights[i, j]` times the leaves of agent j.

    Computed in float32 where leaves are narrower; integer leaves stay the agent's own.

    Args:
        axis: the agent axis of the program.
        weights: [A, A], rows sum to one.
        tree: leaves [k, ...] of the block.
    """
    rows = weights[axis.ids]

    def leaf(x: Array) -> Array:
        if not trees.is_inexact(x):
            return x
        wide = trees.wide(x.dtype)
        everyone = axis.gather(x).astype(wide)
        mixed = jnp.tensordot(
            rows.astype(wide), everyone, axes=1, precision=jax.lax.Precision.HIGHEST
        )
        return mixed.astype(x.dtype)

    return jax.tree.map(leaf, tree)


def _update(
    axis: Axis, problem: Problem, state: AgentState, grads: PyTree
) -> tuple[PyTree, PyTree]:
    """The optimizer's updates and its new state, agent by agent."""
    return axis.each(problem.optimizer.update)(grads, state.opt_state, state.variables["params"])


def _with(state: AgentState, params: PyTree, batch_stats: PyTree, opt_state: PyTree) -> AgentState:
    variables = {**state.variables, "params": params}
    if batch_stats is not None:
        variables["batch_stats"] = batch_stats
    return state._replace(variables=variables, opt_state=opt_state)


def _local_step(
    axis: Axis, problem: Problem, state: AgentState, grads: PyTree, stats: PyTree, weights: Array
) -> AgentState:
    updates, opt_state = _update(axis, problem, state, grads)
    params = optax.apply_updates(state.variables["params"], updates)
    return _with(state, params, stats, opt_state)


def _same(axis: Axis, state: AgentState) -> AgentState:
    return state


def _silent(axis: Axis, problem: Problem, state: AgentState, weights: Array) -> AgentState:
    return state


def _nothing(topology: Topology) -> Callable[[AgentState], np.ndarray]:
    return lambda state: np.zeros(topology.num_agents)


def _to_neighbours(
    topology: Topology, *, moments: bool = False
) -> Callable[[AgentState], np.ndarray]:
    """Every agent sends its variables, and moments, to each agent that gives it a weight."""
    sent_to = (np.asarray(topology.weights) > 0).sum(axis=0) - (np.diag(topology.weights) > 0)

    def sent(state: AgentState) -> np.ndarray:
        message = (state.variables, state.opt_state if moments else ())
        mixed = [leaf for leaf in jax.tree.leaves(message) if trees.is_inexact(leaf)]
        return sent_to * trees.num_bytes(mixed) / topology.num_agents

    return sent


def _check_opt_state(choice: str) -> None:
    if choice not in OPT_STATE_AT_MERGE:
        known = spec.nearest(choice, OPT_STATE_AT_MERGE)
        raise ValueError(f"opt_state={choice!r} at a merge is unknown; {known}")


def none(topology: Topology) -> Strategy:
    """Isolated agents: nobody communicates."""
    quiet = _nothing(topology)
    return Strategy("none", "never", _same, _local_step, _silent, quiet, quiet)


def data_parallel(topology: Topology) -> Strategy:
    """One model, trained on the mean of all agents' gradients; the topology is not used.

    All agents start from agent 0's variables and optimizer state and stay equal. BatchNorm
    statistics are averaged likewise. Bytes are those of a ring all-reduce, 2 (A - 1) / A times
    the gradients and statistics (Patarasuk and Yuan, 2009).
    """
    num_agents = topology.num_agents
    mean = jnp.full((num_agents, num_agents), 1 / num_agents, jnp.float32)

    def init(axis: Axis, state: AgentState) -> AgentState:
        own = (state.variables, state.opt_state)
        first = jax.tree.map(lambda x: axis.gather(x)[0], own)
        variables, opt_state = axis.each(lambda agent: first)(axis.ids)
        return state._replace(variables=variables, opt_state=opt_state)

    def local_step(
        axis: Axis,
        problem: Problem,
        state: AgentState,
        grads: PyTree,
        stats: PyTree,
        weights: Array,
    ) -> AgentState:
        grads, stats = mix(axis, mean, (grads, stats))
        return _local_step(axis, problem, state, grads, stats, weights)

    def sent(state: AgentState) -> np.ndarray:
        one = trees.num_bytes(state.variables) / num_agents
        return np.full(num_agents, 2 * (num_agents - 1) / num_agents * one)

    return Strategy("data_parallel", "always", init, local_step, _silent, sent, _nothing(topology))


def wa(topology: Topology, *, opt_state: str = "keep") -> Strategy:
    """Weighted averaging: every round each agent becomes the mean of its neighbourhood.

    Args:
        topology: who receives from whom, and the weights.
        opt_state: what becomes of the optimizer's state at a merge: "keep" one's own, "reset"
            it, or "permute", which averages the moments as the weights are.

    Source: DIMAT (Saadati et al., CVPR 2024), the baseline WA: all entries of the state are
    averaged, BatchNorm statistics included, and nothing is aligned.
    """
    _check_opt_state(opt_state)

    def communicate(axis: Axis, problem: Problem, state: AgentState, weights: Array) -> AgentState:
        variables = mix(axis, weights, state.variables)
        moments = state.opt_state
        if opt_state == "permute":
            moments = mix(axis, weights, moments)
        elif opt_state == "reset":
            moments = axis.each(problem.optimizer.init)(variables["params"])
        return state._replace(variables=variables, opt_state=moments)

    return Strategy(
        "wa",
        "round",
        _same,
        _local_step,
        communicate,
        _nothing(topology),
        _to_neighbours(topology, moments=opt_state == "permute"),
    )


def dpsgd(topology: Topology) -> Strategy:
    """Decentralized SGD: each step adds the local update to the neighbourhood's mean.

    `x_i <- sum_j W_ij x_j + update(gradient at x_i)`, with any optimizer in the place of plain
    SGD; BatchNorm statistics are averaged likewise.

    Source: Lian et al., NeurIPS 2017, algorithm 1 (combine, then adapt); CDSGD (Jiang et al.,
    NeurIPS 2017) is the same with a fixed step size.
    """

    def local_step(
        axis: Axis,
        problem: Problem,
        state: AgentState,
        grads: PyTree,
        stats: PyTree,
        weights: Array,
    ) -> AgentState:
        updates, opt_state = _update(axis, problem, state, grads)
        params, stats = mix(axis, weights, (state.variables["params"], stats))
        return _with(state, optax.apply_updates(params, updates), stats, opt_state)

    def communicate(axis: Axis, problem: Problem, state: AgentState, weights: Array) -> AgentState:
        return state._replace(variables=mix(axis, weights, state.variables))

    return Strategy(
        "dpsgd",
        "step",
        _same,
        local_step,
        communicate,
        _to_neighbours(topology),
        _nothing(topology),
    )


def dimat(
    topology: Topology,
    *,
    statistic: str = "correlation",
    opt_state: str = "reset",
) -> Strategy:
    """Decentralized iterative merging and training: align the neighbours, then average.

    Every round each agent matches its neighbours' hidden units to its own by their activations on
    the shared images, permutes them, and takes the weighted mean; then BatchNorm statistics are
    re-estimated. All agents merge from the same snapshot. One forward pass an agent serves all
    pairs that it takes part in.

    Args:
        topology: who receives from whom, and the weights.
        statistic: "correlation" (DIMAT) or "second_moment" (git re-basin).
        opt_state: what becomes of the optimizer's state at a merge: "reset" (DIMAT), "keep" one's
            own, or "permute": the neighbours' moments are permuted and averaged as their weights.

    Source: Saadati et al., CVPR 2024, algorithm 1; matching after Li et al. 2015 and ZipIt.
    """
    _check_opt_state(opt_state)
    slots, valid = _neighbour_slots(topology)

    def communicate(axis: Axis, problem: Problem, state: AgentState, weights: Array) -> AgentState:
        symmetry, images = _alignment(problem)
        variables = axis.each(lambda v: problem.batch_stats(v, images))(state.variables)
        activations = axis.each(lambda v: symmetry.activations(v, images))(variables)
        moments = state.opt_state if opt_state == "permute" else ()
        own = {"variables": variables, "moments": moments}
        everyone, everyones_activations = axis.gather((own, activations))

        def merged(agent: Array, own: PyTree, own_activations: PyTree) -> PyTree:
            row = jnp.where(valid[agent], weights[agent][slots[agent]], 0.0)

            def aligned(neighbour: Array) -> PyTree:
                other, acts = jax.tree.map(
                    lambda x: x[neighbour], (everyone, everyones_activations)
                )
                permutations = align.match_activations(
                    own_activations,
                    acts,
                    statistic=statistic,
                    backend=problem.assignment,
                    symmetry=symmetry,
                )
                return symmetry.permute(permutations, other)

            neighbourhood = jax.tree.map(lambda x: x[None], own)
            if slots.shape[1] > 1:
                others = jax.lax.map(aligned, slots[agent, 1:])
                neighbourhood = jax.tree.map(
                    lambda a, b: jnp.concatenate([a, b]), neighbourhood, others
                )
            return merge.average(weights=row)(neighbourhood)

        result = axis.each(merged)(axis.ids, own, activations)
        variables = axis.each(lambda v: problem.batch_stats(v, images))(result["variables"])
        moments = state.opt_state if opt_state == "keep" else result["moments"]
        if opt_state == "reset":
            moments = axis.each(problem.optimizer.init)(variables["params"])
        return state._replace(variables=variables, opt_state=moments)

    return Strategy(
        "dimat",
        "round",
        _same,
        _local_step,
        communicate,
        _nothing(topology),
        _to_neighbours(topology, moments=opt_state == "permute"),
    )


def _neighbour_slots(topology: Topology) -> tuple[Array, Array]:
    """Per agent: itself, its neighbours in ascending order, padding; and which are no padding."""
    adjacency = np.asarray(topology.weights) > 0
    rows = [
        [i, *(j for j in np.flatnonzero(adjacency[i]) if j != i)]
        for i in range(topology.num_agents)
    ]
    width = max(len(row) for row in rows)
    slots = [row + [i] * (width - len(row)) for i, row in enumerate(rows)]
    valid = [[position < len(row) for position in range(width)] for row in rows]
    return jnp.asarray(slots, jnp.int32), jnp.asarray(valid)


def _alignment(problem: Problem) -> tuple[align.Symmetry, Array]:
    if problem.symmetry is None or problem.images is None:
        raise ValueError(
            "aligning agents needs the model's symmetry and images to compare activations on; "
            "give both in Problem(symmetry=..., images=...)"
        )
    return problem.symmetry, problem.images


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
    symmetry, images = _alignment(problem)
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
        mean = mix(axis, _uniform(axis, variables), variables)
        params, center = variables["params"], mean["params"]
        apart = axis.each(
            lambda own, middle: trees.norm(jax.tree.map(jnp.subtract, own, middle)) ** 2
        )(params, center)
        size = axis.each(lambda own: trees.norm(own) ** 2)(params)
        distance = jnp.sqrt(jnp.sum(axis.gather(apart)) / jnp.sum(axis.gather(size)))
        mean = axis.each(lambda v: problem.batch_stats(v, images))(mean)
        return mean, jnp.broadcast_to(distance, axis.ids.shape)

    plain, plain_distance = mean_and_distance(variables)
    aligned, aligned_distance = mean_and_distance(axis.each(to_reference)(variables, activations))
    return Consensus(plain, aligned, plain_distance, aligned_distance)


def _uniform(axis: Axis, tree: PyTree) -> Array:
    num_agents = axis.gather(axis.ids).shape[0]
    return jnp.full((num_agents, num_agents), 1 / num_agents, jnp.float32)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "none": none,
    "data_parallel": data_parallel,
    "wa": wa,
    "dpsgd": dpsgd,
    "dimat": dimat,
}


def parse(text: str | Strategy, topology: Topology) -> Strategy:
    """Builds a strategy from text such as `"dimat(opt_state='permute')"`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: an argument that the strategy does not take.
    """
    if isinstance(text, Strategy):
        return text

    vocabulary = {name: functools.partial(fn, topology) for name, fn in STRATEGIES.items()}
    return spec.parse(text, vocabulary)
