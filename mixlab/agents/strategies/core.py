"""What a strategy is: pure functions, written as parts of a program over the agent axis."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax

from mixlab import align, merge, spec, trees
from mixlab.agents.network import Network, kind_of
from mixlab.agents.parallel import Axis, Fetched
from mixlab.agents.topology import Topology
from mixlab.types import Array, Batch, PyTree

_Given = ParamSpec("_Given")
OPT_STATE_AT_MERGE = ("keep", "reset", "permute")
# Numbers of models on which a merge method is tried: some take two alone, others need many.
_TRIED = (2, 4, 8, 16, 32, 64)


class AgentState(NamedTuple):
    """What training changes; every leaf has the leading axis of the agents.

    Attributes:
        variables: `{"params": ..., "batch_stats": ...}`, the second only where the model has it.
            Always a model that can be used as it is.
        opt_state: the state of the optimizer.
        failed_at: int32, the first step whose loss was not finite, -1 while there is none.
        memory: what else the strategy keeps from call to call, made by its `init`.
    """

    variables: PyTree
    opt_state: PyTree
    failed_at: Array
    memory: PyTree = ()


class Problem(NamedTuple):
    """What a strategy may know of the task.

    Attributes:
        optimizer: the optax transformation of every agent.
        symmetry: the permutation symmetries of the model; None where nothing is aligned.
        batch_stats: `batch_stats(variables, images)` gives `variables` with BatchNorm statistics
            re-estimated on `images`; the identity for a model without BatchNorm.
        images: the examples on which activations are compared and statistics re-estimated:
            [n, H, W, C], of which every agent holds a copy, or, with `local`, [k, n, H, W, C],
            each agent's own.
        local: whether every agent has images of its own.
        assignment: backend of `align.assignment`.
        examples: float32 [A], how many training examples each agent has; None where they have
            equally many.
    """

    optimizer: optax.GradientTransformation
    symmetry: align.Symmetry | None = None
    batch_stats: Callable[[PyTree, Array], PyTree] = lambda variables, images: variables
    images: Array | None = None
    local: bool = False
    assignment: str | None = None
    examples: Array | None = None


class Gradients(NamedTuple):
    """What the common half of a local step has found; every leaf has the block's leading axis.

    Attributes:
        grads: of the loss at the agents' own variables on their own batches.
        batch_stats: BatchNorm statistics after the batch, None for a model without.
        batch: the batches, as the model sees them. It and `of` are for `cga` alone.
        of: `of(variables, batch) -> grads`, for one agent, of any variables on any batch.
    """

    grads: PyTree
    batch_stats: PyTree = None
    batch: Batch | None = None
    of: Callable[[PyTree, Batch], PyTree] | None = None


class Strategy(NamedTuple):
    """A way to train many agents.

    All of them share the batch, the gradient (BatchNorm in training mode), the optimizer, the
    evaluation and the accounting; they differ only in what they do with the gradients of a step
    and with the agents' variables at a communication.

    Attributes:
        name: as the report shows it.
        topology: who receives from whom, and the weights, for the `Network` that the parts below
            are given.
        every: when agents communicate: "never"; "round", when `communicate` replaces their
            variables between rounds of local training; "step", within every local step of the
            rounds; "always", within every step from the first on.
        init: `init(axis, problem, state) -> state`, before the first step.
        local_step: `local_step(network, problem, state, gradients) -> state`, in the rounds. What
            comes before the first round is the same for all strategies, the `local_step` of this
            module, but where `every` is "always".
        communicate: `communicate(network, problem, state) -> state`. Where agents mix within
            the step it gives the mixture that the next step will form, for evaluation.
        match: `match(network, problem, state)`, what `communicate` does before it merges; None
            where nothing is matched. It is for measuring time.
        match_once: whether only the first `communicate` matches.
        optimizer: makes the agents' optimizer from the one that is configured.
        rule: how the mixing matrix is made of the graph, see `Topology.mixing_matrix`; None is
            the topology's own.
    """

    name: str
    topology: Topology
    every: str
    init: Callable[[Axis, Problem, AgentState], AgentState]
    local_step: Callable[[Network, Problem, AgentState, Gradients], AgentState]
    communicate: Callable[[Network, Problem, AgentState], AgentState]
    match: Callable[[Network, Problem, AgentState], PyTree] | None = None
    match_once: bool = False
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = (
        lambda optimizer: optimizer
    )
    rule: str | None = None


def on_topology(make: Callable[_Given, Strategy]) -> Callable[_Given, Strategy]:
    """Makes what makes a strategy refuse a topology that is none, with a `TypeError`."""

    @functools.wraps(make)
    def checked(*args: _Given.args, **kwargs: _Given.kwargs) -> Strategy:
        given = args[0] if args else kwargs.get("topology")
        if (args or kwargs) and not isinstance(given, Topology):
            raise TypeError(
                f"{make.__name__} takes a topology such as agents.ring(8), got {given!r}"
            )
        return make(*args, **kwargs)

    return checked


# ---------------------------------------------------------------- parts of strategies


def nothing_before(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
    """The `init` of strategies that remember nothing."""
    return state


def stay(network: Network, problem: Problem, state: AgentState) -> AgentState:
    """The `communicate` of strategies that have nothing to do between rounds."""
    return state


def updates(
    network: Network, problem: Problem, state: AgentState, grads: PyTree
) -> tuple[PyTree, PyTree]:
    """The optimizer's updates and its new state, agent by agent."""
    update = network.axis.each(problem.optimizer.update)
    changes, opt_state = update(grads, state.opt_state, state.variables["params"])
    return changes, opt_state


def local_step(
    network: Network, problem: Problem, state: AgentState, gradients: Gradients
) -> AgentState:
    """A step of the optimizer, by oneself."""
    changes, opt_state = updates(network, problem, state, gradients.grads)
    params = optax.apply_updates(state.variables["params"], changes)
    return with_model(state, params, gradients.batch_stats)._replace(opt_state=opt_state)


def with_model(state: AgentState, params: PyTree, batch_stats: PyTree) -> AgentState:
    """The state with other parameters and, where there are any, statistics."""
    variables = {**state.variables, "params": params}
    if batch_stats is not None:
        variables["batch_stats"] = batch_stats
    return state._replace(variables=variables)


def broadcast_variables(network: Network, variables: PyTree) -> Fetched:
    """Sends parameters and statistics; see `Network.broadcast`."""
    return together(
        {name: network.broadcast(value, kind_of(name)) for name, value in variables.items()}
    )


def together(arrived: Mapping[str, Fetched]) -> Fetched:
    """As one, what several broadcasts of a network gave."""
    rows = next(iter(arrived.values())).rows
    return Fetched({name: fetched.pool for name, fetched in arrived.items()}, rows)


def mix_variables(
    network: Network, variables: PyTree, method: merge.MergeMethod | None = None
) -> PyTree:
    """Mixes, or merges, parameters and statistics over every agent's neighbourhood."""
    if method is not None:
        return network.merge(variables, broadcast_variables(network, variables), method)
    return {name: network.mix(value, kind_of(name)) for name, value in variables.items()}


def at_merge(
    choice: str, network: Network, problem: Problem, state: AgentState, params: PyTree
) -> PyTree:
    """The optimizer's state after a merge to `params`, where moments are not mixed."""
    if choice == "reset":
        return network.axis.each(problem.optimizer.init)(params)
    return state.opt_state


def check_opt_state(choice: str) -> None:
    """Raises a `ValueError` for an unknown `opt_state`."""
    if choice not in OPT_STATE_AT_MERGE:
        known = spec.nearest(choice, OPT_STATE_AT_MERGE)
        raise ValueError(f"opt_state={choice!r} at a merge is unknown; {known}")


def method_of(
    method: str | merge.MergeMethod | None, topology: Topology | None = None
) -> merge.MergeMethod | None:
    """The merge method of a text; None, the weighted mean, stays None.

    Args:
        method: the text, or the method itself.
        topology: of neighbourhoods that it is to merge; None where it merges all agents.

    Raises:
        ValueError: it is unknown, needs more of the models than their variables or another number
            of them than a neighbourhood has, makes several models, or the neighbourhoods change
            with time: it merges a fixed number of models.
    """
    if method is None:
        return None
    made = merge.parse(method)
    if topology is not None and topology.period > 1:
        raise ValueError(
            f"merge={method!r} merges a fixed neighbourhood, but {topology.name} changes with "
            "time; leave merge out, which mixes by the round's weights, or choose a fixed graph"
        )
    base = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    counts = _TRIED if topology is None else sorted({int(d) + 1 for d in topology.degree})
    against = {}
    for count in counts:
        models = {"w": jax.ShapeDtypeStruct((count, 4, 3), jnp.float32)}
        try:
            merged = jax.eval_shape(
                lambda models, base, key: made(models, base=base, key=key), models, base, key
            )
        except (ValueError, TypeError) as error:
            against[count] = str(error)
            continue
        if merged["w"].shape != base["w"].shape:
            raise ValueError(f"merge={method!r} makes several models, and agents need one")
        if topology is None:
            return made
    if not against:
        return made
    count, reason = against.popitem()
    where = "" if topology is None else f" in neighbourhoods of {count}, as {topology.name} has"
    raise ValueError(f"merge={method!r} cannot merge agents{where}: {reason}")


def distance(axis: Axis, variables: PyTree, center: PyTree) -> Array:
    """Root mean square over agents of the parameters' distance, as a fraction of their norms."""
    params, middle = variables["params"], center["params"]
    apart = axis.each(lambda a, b: trees.norm(jax.tree.map(lambda x, y: x - y, a, b)) ** 2)
    size = axis.each(lambda a: trees.norm(a) ** 2)
    fraction = axis.gather(apart(params, middle)).sum() / axis.gather(size(params)).sum()
    return jax.numpy.broadcast_to(jax.numpy.sqrt(fraction), axis.ids.shape)
