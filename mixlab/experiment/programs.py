"""What the agents of an experiment do, as programs over the agent axis."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixlab import agents, augment, data
from mixlab.agents.parallel import whole_axis
from mixlab.experiment.scoring import tally
from mixlab.types import Array, Batch, Key, PyTree


class Carry(NamedTuple):
    """What goes from step to step; every leaf has the leading axis of the agents.

    Attributes:
        state: the agents.
        totals: sums of the loss and the accuracy over the `steps` of a phase.
        messages: int32 [A, messages, 2], how many of each were sent and received, by "step" and by
            "round".
        outbox: what was last sent on time, likewise; empty where nobody can be late.
    """

    state: agents.AgentState
    totals: dict[str, Array]
    messages: dict[str, Array]
    outbox: dict[str, PyTree]


def prepared(preprocess: augment.Augmentation, batch: Batch) -> Batch:
    """The batch as models get it: alike in training and evaluation, by chance as well."""
    return preprocess(jax.random.key(0), batch)


@dataclasses.dataclass(frozen=True, eq=False)  # programs are told apart by who they are
class Programs:
    """Programs for `agents.Parallel.compile`: `program(axis, carry, held, shared)`.

    `held` is what each agent has of its own: its batch, or its images for matching. `shared` holds
    what all see: the keys `init_key`, `train_key` and `fault_key`, which are arguments so that runs
    with other seeds share the programs; the mixing `weights` [T, A, A]; the `images` that all have;
    the numbers of `examples` [A]; and of the moment the `step`, the `time` (how many communications
    were before) and the `round`.

    Attributes:
        model: of every agent.
        image: one image [1, H, W, C] as the model gets it.
        num_classes: of the labels.
        same_init: whether all agents begin with the same variables.
        strategy: how they communicate, and with whom.
        problem: what they train.
        faults: what goes wrong.
        feed: what they read.
        augmentation: of training images, as they are read.
        preprocess: what follows, and comes before evaluation too.
        pretrain_steps: steps before the first round.
        sent: what messages there are, by "step" and by "round"; filled when programs are traced.
    """

    model: Any
    image: Array
    num_classes: int
    same_init: bool
    strategy: agents.Strategy
    problem: agents.Problem
    faults: agents.faults.Faults
    feed: data.Feed
    augmentation: augment.Augmentation
    preprocess: augment.Augmentation
    pretrain_steps: int
    sent: dict[str, list[agents.Message]] = dataclasses.field(default_factory=dict)

    @property
    def num_agents(self) -> int:
        """A."""
        return self.strategy.topology.num_agents

    def init(self, axis: agents.Axis, ids: Array, held: PyTree, shared: PyTree) -> Carry:
        """The agents before the first step, without the messages that they have sent."""

        def first(agent: Array) -> tuple[PyTree, PyTree]:
            common = shared["init_key"]
            own = common if self.same_init else jax.random.fold_in(common, agent)
            variables = self.model.init(own, self.image)
            return variables, self.problem.optimizer.init(variables["params"])

        variables, opt_state = axis.each(first)(ids)
        healthy = jnp.full(ids.shape, -1, jnp.int32)
        state = agents.AgentState(variables, opt_state, healthy)
        totals = {name: jnp.zeros(ids.shape) for name in ("loss", "accuracy", "steps")}
        return Carry(self.strategy.init(axis, self.problem, state), totals, {}, {})

    def adopt(self, axis: agents.Axis, carry: Carry, taken: PyTree, shared: PyTree) -> Carry:
        """The agents with other variables and optimizer states, `taken`, by name."""
        state = self.strategy.init(axis, self.problem, carry.state._replace(**taken))
        return carry._replace(state=state)

    def step(self, axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> Carry:
        """A step of a round, as the strategy makes it; `held` is of `feed`."""
        return self._step(axis, carry, held, shared, self.strategy.local_step)

    def alone(self, axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> Carry:
        """As `step`, of agents that train by themselves, as they do before the first round."""
        return self._step(axis, carry, held, shared, agents.strategies.local_step)

    def _step(
        self,
        axis: agents.Axis,
        carry: Carry,
        held: PyTree,
        shared: PyTree,
        local_step: Callable[..., agents.AgentState],
    ) -> Carry:
        state, now = carry.state, shared["step"]
        shared = {**shared, "time": now - self.pretrain_steps}
        net = self._network(axis, carry.outbox.get("step"), shared)

        def batch_of(agent: Array, held: PyTree) -> tuple[Batch, Key]:
            batch = self.feed.select(held, now)
            batch["label"] = jax.nn.one_hot(batch["label"], self.num_classes)
            mixing_key, own_key = jax.random.split(
                jax.random.fold_in(jax.random.fold_in(shared["train_key"], now), agent)
            )
            batch = prepared(self.preprocess, self.augmentation(mixing_key, batch))
            if self.faults.data_attack is not None:
                poisoned = self.faults.data_attack(jax.random.fold_in(own_key, 1), batch)
                assert net.byzantine is not None
                bad = net.byzantine[agent]
                batch = jax.tree.map(lambda x, y: jnp.where(bad, x, y), poisoned, batch)
            return batch, own_key

        batch, own_key = axis.each(batch_of)(axis.ids, held)
        grads, stats, metrics = axis.each(self._gradients)(own_key, state.variables, batch)
        unfit = ~jnp.isfinite(metrics["loss"]) & net.taking_part()
        diverged = (state.failed_at < 0) & unfit
        state = state._replace(failed_at=jnp.where(diverged, now, state.failed_at))
        # Of gradients at others' variables: a key of this step that is no agent's own.
        their_key = jax.random.fold_in(
            jax.random.fold_in(shared["train_key"], now), self.num_agents
        )
        found = agents.Gradients(
            grads,
            stats,
            batch,
            lambda variables, batch: self._gradients(their_key, variables, batch)[0],
        )
        after = local_step(net, self.problem, state, found)
        if net.awake is not None:
            here = net.awake[axis.ids]
            metrics = jax.tree.map(lambda x: jnp.where(here, x, 0), metrics)
        totals = jax.tree.map(jnp.add, carry.totals, metrics)
        return self._settled(net, "step", carry._replace(state=state, totals=totals), after)

    def communicate(self, axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> Carry:
        """What opens a round; `held` is the agents' own images."""
        net = self._network(axis, carry.outbox.get("round"), shared)
        new = self.strategy.communicate(net, self._on_data(held, shared), carry.state)
        return self._settled(net, "round", carry, new)

    def match(self, axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> PyTree:
        """What `communicate` does before it merges."""
        assert self.strategy.match is not None
        net = self._network(axis, carry.outbox.get("round"), shared)
        return self.strategy.match(net, self._on_data(held, shared), carry.state)

    def evaluate(self, axis: agents.Axis, variables: PyTree, held: PyTree, batch: Batch) -> PyTree:
        """What `tally` sums up of every agent on a batch of the test set, `shared` here."""
        return axis.each(lambda own: tally(self.model, own, batch))(variables)

    def consensus(
        self, axis: agents.Axis, variables: PyTree, held: PyTree, shared: PyTree
    ) -> agents.Consensus:
        """On what the honest agents agree that are there; `held` is the agents' own images."""
        fault = self.faults.sample(shared["fault_key"], shared["round"])
        honest = ~self.faults.sample(shared["fault_key"], 0).byzantine
        present = honest & fault.awake
        among = jnp.where(jnp.any(present), present, honest)
        return agents.consensus(axis, self._on_data(held, shared), variables, among=among)

    def shapes(self, batch: PyTree, images: PyTree, shared: PyTree) -> Carry:
        """Shapes of what a step and a communication leave, as if all agents were one block.

        Args:
            batch: what a step holds, in the layout of `agents.Parallel.put`.
            images: likewise the agents' own images.
            shared: without the moment.
        """

        def both(ids: Array, batch: PyTree, images: PyTree, shared: PyTree) -> Carry:
            axis = whole_axis(ids, jax.vmap)
            carry = self.step(axis, self.init(axis, ids, {}, shared), batch, shared)
            return self.communicate(axis, carry, images, shared)

        def whole(x: Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.num_agents, *x.shape[2:]), x.dtype)

        held = jax.tree.map(whole, (batch, images))
        moment = {name: np.int32(0) for name in ("step", "time", "round")}
        return jax.eval_shape(both, np.arange(self.num_agents), *held, {**shared, **moment})

    def _on_data(self, held: PyTree, shared: PyTree) -> agents.Problem:
        images = held if self.problem.local else shared["images"]
        return self.problem._replace(images=images, examples=shared["examples"])

    def _network(
        self, axis: agents.Axis, outbox: tuple[PyTree, ...] | None, shared: PyTree
    ) -> agents.Network:
        """The network at the communication `shared["time"]`, in `shared["round"]`.

        Before the first round, which is round -1, nobody fails.
        """
        stack, time = shared["weights"], shared["time"]
        key = jax.random.fold_in(jax.random.fold_in(shared["fault_key"], 1), time)
        adjacency = self.strategy.topology.adjacency
        return self.faults.strike(
            agents.Network(
                axis, stack[time % len(stack)], adjacency, key, time, outbox=outbox or None
            ),
            shared["fault_key"],
            shared["round"],
            by_step=self.strategy.every != "round",
            push=self.strategy.rule == "push",
        )

    def _settled(self, net: agents.Network, kind: str, old: Carry, new: agents.AgentState) -> Carry:
        """The carry after a communication: who is absent stays as it was; messages are counted."""
        new = net.keep_absent(old.state, new)
        counts, outbox = net.received()
        if not net.messages:
            return old._replace(state=new)
        self.sent[kind] = net.messages
        before = old.messages.get(kind)
        return old._replace(
            state=new,
            messages={**old.messages, kind: counts if before is None else before + counts},
            outbox={**old.outbox, kind: outbox},
        )

    def _gradients(
        self, key: Key, variables: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """Gradients, new BatchNorm statistics and metrics of one agent on one batch."""
        stats = variables.get("batch_stats")

        def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            logits, changed = self.model.apply(
                {**variables, "params": params},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            logits = logits.astype(jnp.float32)
            loss = optax.softmax_cross_entropy(logits, batch["label"]).mean()
            return loss, (logits, changed.get("batch_stats", stats))

        differentiated = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, stats)), grads = differentiated(variables["params"])
        right = jnp.argmax(logits, -1) == jnp.argmax(batch["label"], -1)
        metrics = {"loss": loss, "accuracy": right.mean(), "steps": jnp.ones(())}
        return grads, stats, metrics
