"""Federated strategies: rounds of local training around a server.

Agent 0, the hub of a star, is the server and a client like the others. In a round each client
that takes part trains from the server's model and sends what it changed; the server takes the
mean of the changes for a gradient, up to the sign, and makes a step of its own optimizer (Reddi
et al., ICLR 2021, algorithm 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixlab import merge as merging
from mixlab import spec, trees
from mixlab.agents.network import Network, kind_of
from mixlab.agents.parallel import Axis
from mixlab.agents.strategies import core
from mixlab.agents.strategies.core import AgentState, Gradients, Problem, Strategy
from mixlab.agents.topology import Topology
from mixlab.types import Array, PyTree

OPT_STATE_OF_CLIENTS = ("keep", "reset")


class Server(NamedTuple):
    """What agent 0 holds as the server, and the others as they last heard of it.

    Attributes:
        variables: the model from which clients begin a round.
        opt_state: of the server's optimizer.
        round: int32, how many steps the server has made.
    """

    variables: PyTree
    opt_state: PyTree
    round: Array


@core.on_topology
def fedavg(
    topology: Topology,
    *,
    weighted: bool = True,
    fraction: float = 1.0,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
    seed: int = 0,
) -> Strategy:
    """Federated averaging: the server's model becomes the mean of the clients' models.

    A client that is absent, or whose message is lost, is left out of the mean. Back again it gets
    the model at the end of that round, and is left out once more, since it began the round from
    an older model.

    Args:
        topology: agent 0 is joined to all others, both ways, as in a star.
        weighted: whether clients count in the mean by their numbers of examples, not equally.
        fraction: in (0, 1], how many of the clients take part in a round, drawn anew for each;
            rounded, but at least one. The others neither train nor send.
        merge: a robust rule in the place of the mean: `"median"`, `"krum(1)"`, ... In the
            place of clients that take no part stands, entry by entry, the median of the others.
        opt_state: the client's, at the end of a round: "reset" it, or "keep" it.
        seed: of the draw of clients.

    Raises:
        ValueError: another topology, or an argument out of range.

    Source: McMahan et al., AISTATS 2017, algorithm 1.
    """
    return _federated(
        "fedavg",
        topology,
        optax.sgd(1.0),
        weighted=weighted,
        fraction=fraction,
        merge=merge,
        opt_state=opt_state,
        seed=seed,
    )


@core.on_topology
def fedprox(
    topology: Topology,
    *,
    mu: float = 0.01,
    weighted: bool = False,
    fraction: float = 1.0,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
    seed: int = 0,
) -> Strategy:
    """FedAvg whose clients are drawn back to the server's model, by `mu (x - server's)`.

    Args:
        topology: see `fedavg`.
        mu: at least 0; 0 is FedAvg, if `weighted` is as there.
        weighted: see `fedavg`; the paper draws clients by their numbers of examples instead.
        fraction: see `fedavg`.
        merge: see `fedavg`.
        opt_state: see `fedavg`.
        seed: see `fedavg`.

    Raises:
        ValueError: another topology, or an argument out of range.

    Source: Li et al., MLSys 2020, algorithm 2.
    """
    if mu < 0:
        raise ValueError(f"mu must be at least 0, got {mu}")
    return _federated(
        "fedprox",
        topology,
        optax.sgd(1.0),
        weighted=weighted,
        fraction=fraction,
        merge=merge,
        opt_state=opt_state,
        seed=seed,
        mu=mu,
    )


@core.on_topology
def fedavgm(
    topology: Topology,
    *,
    momentum: float = 0.9,
    learning_rate: float = 1.0,
    weighted: bool = True,
    fraction: float = 1.0,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
    seed: int = 0,
) -> Strategy:
    """FedAvg whose server has momentum: `v <- momentum v + mean change`, `x <- x + lr v`.

    Args:
        topology: see `fedavg`.
        momentum: in [0, 1).
        learning_rate: of the server, positive.
        weighted: see `fedavg`.
        fraction: see `fedavg`.
        merge: see `fedavg`.
        opt_state: see `fedavg`.
        seed: see `fedavg`.

    Raises:
        ValueError: another topology, or an argument out of range.

    Source: Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for
    federated visual classification", section 4.3.
    """
    return _federated(
        "fedavgm",
        topology,
        _heavy(learning_rate, momentum),
        weighted=weighted,
        fraction=fraction,
        merge=merge,
        opt_state=opt_state,
        seed=seed,
    )


@core.on_topology
def fedadam(
    topology: Topology,
    *,
    learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-3,
    weighted: bool = False,
    fraction: float = 1.0,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
    seed: int = 0,
) -> Strategy:
    """FedAvg whose server runs Adam: `x <- x + lr m / (sqrt(v) + eps)`, m and v of mean changes.

    There is no correction of bias; v begins at eps**2.

    Args:
        topology: see `fedavg`.
        learning_rate: of the server, positive.
        b1: in [0, 1), decay of m.
        b2: in [0, 1), decay of v.
        eps: positive, tau in the paper.
        weighted: see `fedavg`; in the paper's algorithm clients count equally.
        fraction: see `fedavg`.
        merge: see `fedavg`.
        opt_state: see `fedavg`.
        seed: see `fedavg`.

    Raises:
        ValueError: another topology, or an argument out of range.

    Source: Reddi et al., ICLR 2021, algorithm 2 (FedAdam).
    """
    if learning_rate <= 0 or eps <= 0 or not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(
            f"fedadam needs learning_rate > 0, b1 and b2 in [0, 1) and eps > 0, got "
            f"{learning_rate}, {b1}, {b2} and {eps}"
        )
    return _federated(
        "fedadam",
        topology,
        _adam(learning_rate, b1, b2, eps),
        weighted=weighted,
        fraction=fraction,
        merge=merge,
        opt_state=opt_state,
        seed=seed,
    )


@core.on_topology
def diloco(
    topology: Topology,
    *,
    learning_rate: float = 0.7,
    momentum: float = 0.9,
    merge: str | merging.MergeMethod | None = None,
) -> Strategy:
    """DiLoCo: many local steps, whose optimizer goes on, and an outer step with Nesterov momentum.

    The inner optimizer is the configured one; in the paper it is AdamW.

    Args:
        topology: see `fedavg`.
        learning_rate: of the outer step, positive.
        momentum: of the outer step, in [0, 1).
        merge: see `fedavg`.

    Raises:
        ValueError: another topology, or an argument out of range.

    Source: Douillard et al. 2023, "DiLoCo: distributed low-communication training of language
    models", algorithm 1.
    """
    outer = _heavy(learning_rate, momentum, nesterov=True)
    return _federated("diloco", topology, outer, merge=merge, opt_state="keep")


def _federated(
    name: str,
    topology: Topology,
    optimizer: optax.GradientTransformation,
    *,
    weighted: bool = False,
    fraction: float = 1.0,
    merge: str | merging.MergeMethod | None = None,
    opt_state: str = "reset",
    seed: int = 0,
    mu: float = 0.0,
) -> Strategy:
    """The strategy whose server runs `optimizer`; for the rest see `fedavg` and `fedprox`.

    The statistics of BatchNorm have no gradient; the server takes their mean change as it is.
    """
    if not (topology.adjacency[0, 1:].all() and topology.adjacency[1:, 0].all()):
        raise ValueError(
            f"{name} needs agent 0 joined to all others, both ways, but in {topology.name} it is "
            f"not; use a star or a complete graph"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction of the clients must lie in (0, 1], got {fraction}")
    if opt_state not in OPT_STATE_OF_CLIENTS:
        known = spec.nearest(opt_state, OPT_STATE_OF_CLIENTS)
        raise ValueError(f"unknown opt_state={opt_state!r} at the end of a round; {known}")
    method = core.method_of(merge)
    clients = max(1, round(fraction * topology.num_agents))

    def drawn(round_: Array) -> Array:
        """Bool [A], who takes part in a round."""
        if clients == topology.num_agents:
            return jnp.ones(topology.num_agents, bool)
        key = jax.random.fold_in(jax.random.key(seed), round_)
        return jax.random.permutation(key, topology.num_agents) < clients

    def init(axis: Axis, problem: Problem, state: AgentState) -> AgentState:
        first = axis.pick((state.variables, state.opt_state), 0)
        variables, inner = axis.each(lambda agent: first)(axis.ids)
        server = Server(
            variables,
            axis.each(optimizer.init)(variables["params"]),
            jnp.zeros(axis.ids.shape, jnp.int32),
        )
        return state._replace(variables=variables, opt_state=inner, memory=server)

    def local_step(
        network: Network, problem: Problem, state: AgentState, gradients: Gradients
    ) -> AgentState:
        server: Server = state.memory
        if mu:
            grads = jax.tree.map(
                lambda g, x, center: g + mu * (x - center),
                gradients.grads,
                state.variables["params"],
                server.variables["params"],
            )
            gradients = gradients._replace(grads=grads)
        trained = core.local_step(network, problem, state, gradients)
        if clients == topology.num_agents:
            return trained
        takes_part = network.axis.each(lambda agent, now: drawn(now)[agent])
        return trees.where(takes_part(network.axis.ids, server.round), trained, state)

    def communicate(network: Network, problem: Problem, state: AgentState) -> AgentState:
        ids, each = network.axis.ids, network.axis.each
        own: Server = state.memory
        server: Server = network.axis.pick(own, 0)

        # Who took part: drawn, heard by the server, and begun from its present model.
        at_round = network.axis.gather(own.round)
        takes_part = drawn(server.round) & (at_round == server.round)
        change = network.upload(
            state.variables,
            takes_part,
            server.variables,
            method=method,
            weights=problem.examples if weighted else None,
        )

        params = server.variables["params"]
        against = jax.tree.map(jnp.negative, change["params"])
        updates, inner = optimizer.update(against, server.opt_state, params)
        variables = jax.tree.map(_plus, server.variables, change)
        variables["params"] = optax.apply_updates(params, updates)
        server = Server(variables, inner, server.round + 1)

        # Who takes part in the next round loads the model; the others only show it.
        reached = (network.weights[:, 0] > 0).at[0].set(True)
        variables = {
            name: network.download(
                value,
                drawn(server.round),
                kind_of(name),
            )
            for name, value in variables.items()
        }
        new = state._replace(variables=variables, memory=each(lambda agent: server)(ids))
        if opt_state == "reset":
            new = new._replace(opt_state=each(problem.optimizer.init)(variables["params"]))
        return trees.where(reached[ids], new, state)

    is_plain = not mu and clients == topology.num_agents
    return Strategy(
        name, topology, "round", init, core.local_step if is_plain else local_step, communicate
    )


def _plus(a: Array, b: Array) -> Array:
    return a + b if trees.is_inexact(a) else b


def _heavy(
    learning_rate: float, momentum: float, *, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD with momentum, its arguments checked."""
    if learning_rate <= 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"the server needs learning_rate > 0 and momentum in [0, 1), got {learning_rate} and "
            f"{momentum}"
        )
    return optax.sgd(learning_rate, momentum, nesterov=nesterov)


def _adam(learning_rate: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as FedAdam has it, see `fedadam`."""

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        return (
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda x: jnp.full_like(x, eps**2), params),
        )

    def update(
        grads: PyTree, state: tuple[PyTree, PyTree], params: PyTree = None
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[0], grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state[1], grads)
        updates = jax.tree.map(lambda m, v: -learning_rate * m / (jnp.sqrt(v) + eps), m, v)
        return updates, (m, v)

    return optax.GradientTransformation(init, update)
