"""Agents in a training loop of your own: a strategy as pure functions of stacked agents."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.agents.network import Network
from mixlab.agents.parallel import Axis, each_of, loop_or_vmap, whole_axis
from mixlab.agents.strategies import AgentState, Consensus, Gradients, Problem, Strategy, consensus
from mixlab.types import ArrayLike, Key, PyTree


@dataclasses.dataclass(frozen=True, eq=False)  # jit tells methods apart by whose they are
class Team:
    """Agents that train together by a strategy, in a loop that you write.

    Every method is a pure function of leaves [A, ...], to be jitted; where these are laid out over
    several devices, so is what it does. The loss is yours to watch: `failed_at` stays as it is.
    Whole experiments, with faults, accounts of what is sent, checkpoints and several processes,
    are of `mixlab.train`.

    Attributes:
        strategy: such as `agents.dimat(agents.ring(8))`. If its `every` is "round", agents
            communicate in `communicate`, between rounds of steps; otherwise in every `step`.
        problem: the optimizer of every agent, to which the strategy may add; for strategies that
            align agents also the model's symmetry and images.
        per_device: how agents run on a device: "vmap", "loop" (unrolled), or "auto": "loop" on
            CPU, where a vmapped convolution is about ten times slower, else "vmap".

    Raises:
        ValueError: an unknown `per_device`.
    """

    strategy: Strategy
    problem: Problem
    per_device: str = "auto"

    def __post_init__(self) -> None:
        loop_or_vmap(self.per_device)

    def begin(self, variables: PyTree) -> AgentState:
        """The agents before their first step.

        Args:
            variables: `{"params": ..., "batch_stats": ...}`, the second only where the model has
                it; leaves [A, ...].

        Raises:
            ValueError: there are no "params", or a leaf has not the leading axis of the agents.
        """
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ValueError("agents begin with variables {'params': ...}, as Flax's init gives")
        num_agents = self.strategy.topology.num_agents
        for name, leaf in trees.named_leaves(variables):
            if leaf is not None and np.shape(leaf)[:1] != (num_agents,):
                raise ValueError(
                    f"{name} has the shape {np.shape(leaf)}, and should have the {num_agents} "
                    "agents as its leading axis; stack what they hold, or vmap what makes it"
                )
        variables = {name: jax.tree.map(jnp.asarray, tree) for name, tree in variables.items()}
        opt_state = self._axis().each(self._problem.optimizer.init)(variables["params"])
        state = AgentState(variables, opt_state, jnp.full(num_agents, -1, jnp.int32))
        return self.strategy.init(self._axis(), self._problem, state)

    def step(
        self, key: Key, state: AgentState, gradients: Gradients, time: ArrayLike = 0
    ) -> AgentState:
        """One step of every agent's optimizer; strategies that mix by steps communicate in it.

        Args:
            key: of the run; what is random depends on it and on `time`.
            state: as `begin` or a method gave it.
            gradients: `Gradients(grads)`, and what else there is; leaves [A, ...]. With `of`, which
                is a function, they are made within what is jitted.
            time: int32, how many steps were made before.

        Raises:
            ValueError: the strategy needs more of the gradients, see `Gradients`.
        """
        return self.strategy.local_step(self._network(key, time), self._problem, state, gradients)

    def communicate(self, key: Key, state: AgentState, time: ArrayLike = 0) -> AgentState:
        """What agents do with each other before a round of steps.

        Of strategies that mix by steps it is what the next step will form before it trains, to be
        looked at; or nothing, where they train first.

        Args:
            key: as for `step`.
            state: as for `step`.
            time: int32, how many rounds were before.

        Raises:
            ValueError: the strategy aligns agents, and the problem has no symmetry or no images.
        """
        return self.strategy.communicate(self._network(key, time), self._problem, state)

    def consensus(self, variables: PyTree) -> Consensus:
        """One model of all agents; see `agents.consensus`, of which this has no agent axis.

        Args:
            variables: leaves [A, ...].

        Raises:
            ValueError: the problem has no symmetry or no images.
        """
        everyone = consensus(self._axis(), self._problem, variables)
        return jax.tree.map(lambda x: x[0], everyone)

    @functools.cached_property
    def _problem(self) -> Problem:
        return self.problem._replace(optimizer=self.strategy.optimizer(self.problem.optimizer))

    @functools.cached_property
    def _rounds(self) -> np.ndarray:
        """The mixing matrices, [T, A, A]."""
        matrix = self.strategy.topology.mixing_matrix(self.strategy.rule)
        return matrix.reshape(-1, *matrix.shape[-2:]).astype(np.float32)

    def _axis(self) -> Axis:
        ids = jnp.arange(self.strategy.topology.num_agents)
        return whole_axis(ids, each_of(self.per_device))

    def _network(self, key: Key, time: ArrayLike) -> Network:
        time = jnp.asarray(time, jnp.int32)
        weights = jnp.asarray(self._rounds)[time % len(self._rounds)]
        adjacency = self.strategy.topology.adjacency
        return Network(self._axis(), weights, adjacency, jax.random.fold_in(key, time), time)
