"""Data, agents, model and strategy, and the programs that they make together.

`prepare` is read from top to bottom.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mixlab import agents, align, augment, data, models, spec
from mixlab.agents.parallel import host_callbacks_are_safe, whole_axis
from mixlab.experiment.config import OPTIMIZERS, check, datasets
from mixlab.experiment.scoring import reestimation, scores, tally, test_batches
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


class Experiment(NamedTuple):
    """A config made real: what `mixlab.train` needs to train, evaluate and describe it.

    Attributes:
        parallel: where the agents run.
        strategy: how they communicate, and with whom.
        feed: what they read.
        init: `init() -> carry`, in the layout of `parallel`.
        adopt: `adopt(carry, taken) -> carry` begins with other variables and optimizer states,
            `taken`, by name.
        step: `step(carry, held, step) -> carry`; the old carry's memory is reused. Before the
            first round nobody mixes and nobody fails.
        communicate: `communicate(carry, round) -> carry`.
        match: `match(carry, round)` does what `communicate` does before it merges; None where
            nothing is matched. It is there to be timed.
        test: `test(variables) -> dict` of the accuracy, loss, confidence (mean of the largest
            probability) and ece (expected calibration error) of every agent, each [A].
        consensus: `consensus(variables, round) -> dict` of the accuracies, calibration error and
            distances of the consensus among honest agents that are there in that round; empty
            for one agent.
        traffic: `traffic(carry) -> dict` of the bytes that every agent has sent and received, by
            kind, and of its messages.
        about: what the report says of the set-up, as JSON can hold it.
        sheet: arrays of a few training images before and after augmentation, with their labels.
    """

    parallel: agents.Parallel
    strategy: agents.Strategy
    feed: data.Feed
    init: Callable[[], Carry]
    adopt: Callable[[Carry, PyTree], Carry]
    step: Callable[[Carry, PyTree, int], Carry]
    communicate: Callable[[Carry, int], Carry]
    match: Callable[[Carry, int], PyTree] | None
    test: Callable[[PyTree], dict[str, np.ndarray]]
    consensus: Callable[[PyTree, int], dict[str, float]]
    traffic: Callable[[Carry], dict[str, Any]]
    about: dict[str, Any]
    sheet: dict[str, np.ndarray]


def prepare(config: ConfigDict) -> Experiment:
    """Loads the data, places the agents and compiles what they do.

    Args:
        config: as `default_config`, with any fields changed; its `sweep` is not looked at.

    Raises:
        ValueError: a field has a value that cannot be used, or names something unknown.
        TypeError: a field gives an argument that what it names does not take.
        ModuleNotFoundError: the data set needs the extra `data`.
    """
    check(config)
    key = jax.random.key(config.seed)
    init_key, train_key, match_key, sheet_key = jax.random.split(key, 4)
    fault_key = jax.random.fold_in(key, 1)

    # 1. Data, and who holds what.
    train_set, test_set = datasets(config)
    num_classes = train_set.num_classes
    parts = agents.partition.parse(config.partition)(train_set.labels, config.agents, config.seed)
    largest = max(map(len, parts))
    if config.batch_size > largest:
        raise ValueError(
            f"batch_size={config.batch_size} is more than any agent has: the largest part of "
            f"{config.partition} among {config.agents} holds {largest} examples"
        )

    # 2. Who talks to whom, what fails, where they run, what they read.
    strategy = agents.parse(config.strategy, agents.topology.parse(config.topology, config.agents))
    topology = strategy.topology
    faults = agents.faults.parse(config.faults, config.agents)
    parallel = agents.parallel(
        config.agents, config.backend, per_device=config.per_device, num_devices=config.devices
    )
    feed = data.Feed(
        train_set, parts, config.batch_size, config.seed, parallel.put, config.memory_bytes
    )
    pretrain_steps = config.pretrain_epochs * feed.steps_per_epoch
    round_steps = config.epochs_per_round * feed.steps_per_epoch
    augmentation = augment.parse(config.augment)
    preprocess = augment.parse(config.preprocess)

    fixed_key = jax.random.key(0)  # training and evaluation preprocess alike, by chance as well

    def prepared(images: np.ndarray) -> Array:
        return preprocess(fixed_key, {"image": jnp.asarray(images)})["image"]

    # 3. Model, optimizer, symmetries.
    model = models.parse(config.model, num_classes)
    chosen = _matching_examples(config, match_key, parts)
    images = prepared(train_set.batch(chosen.ravel())["image"])
    one = images[:1]
    variables = jax.jit(model.init)(init_key, one)
    symmetry = align.infer_symmetry(model.apply, variables, images[:2])
    problem = agents.Problem(
        optimizer=strategy.optimizer(spec.parse(config.optimizer, OPTIMIZERS, combine=optax.chain)),
        symmetry=symmetry,
        batch_stats=reestimation(model, variables),
        local=config.matching_data == "local",
        assignment="scipy" if host_callbacks_are_safe(parallel) else "jax",
    )
    # Keys are arguments too, not constants, so that runs with other seeds share the programs.
    weights = topology.mixing_matrix(strategy.rule).reshape(-1, config.agents, config.agents)
    shared = {
        "weights": parallel.replicate(jnp.asarray(weights, jnp.float32)),
        "init_key": parallel.replicate(init_key),
        "train_key": parallel.replicate(train_key),
        "fault_key": parallel.replicate(fault_key),
    }
    if problem.local:
        own_images = parallel.put(np.asarray(images).reshape(*chosen.shape, *images.shape[1:]))
    else:
        own_images, shared["images"] = {}, parallel.replicate(images)

    # 4. Programs over the agent axis.
    sent: dict[str, list[agents.Message]] = {}  # filled when the programs are traced

    def network(axis: agents.Axis, outbox: PyTree, shared: PyTree) -> agents.Network:
        """The network at the communication `shared["time"]`, in `shared["round"]`.

        Before the first round, which is round -1, nobody mixes and nobody fails.
        """
        stack, time, alone = shared["weights"], shared["time"], shared["round"] < 0
        mixing = jnp.where(alone, jnp.eye(config.agents), stack[time % len(stack)])
        key = jax.random.fold_in(jax.random.fold_in(shared["fault_key"], 1), time)
        whole = agents.Network(axis, mixing, topology.adjacency, key, time, outbox=outbox or None)
        return faults.strike(
            whole,
            shared["fault_key"],
            shared["round"],
            by_step=strategy.every != "round",
            push=strategy.rule == "push",
        )

    def settled(net: agents.Network, kind: str, old: Carry, new: agents.AgentState) -> Carry:
        """The carry after a communication: who is absent stays as it was; messages are counted."""
        new = net.keep_absent(old.state, new)
        counts, outbox = net.received()
        if not net.messages:
            return old._replace(state=new)
        sent[kind] = net.messages
        before = old.messages.get(kind)
        return old._replace(
            state=new,
            messages={**old.messages, kind: counts if before is None else before + counts},
            outbox={**old.outbox, kind: outbox},
        )

    def init(axis: agents.Axis, ids: Array, held: PyTree, shared: PyTree) -> PyTree:
        def first(agent: Array) -> tuple[PyTree, PyTree]:
            common = shared["init_key"]
            own = common if config.same_init else jax.random.fold_in(common, agent)
            variables = model.init(own, one)
            return variables, problem.optimizer.init(variables["params"])

        variables, opt_state = axis.each(first)(ids)
        healthy = jnp.full(ids.shape, -1, jnp.int32)
        state = strategy.init(axis, problem, agents.AgentState(variables, opt_state, healthy))
        totals = {name: jnp.zeros(ids.shape) for name in ("loss", "accuracy", "steps")}
        return Carry(state, totals, {}, {})

    def step(axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> Carry:
        state, now = carry.state, shared["step"]
        shared = {**shared, "time": now - pretrain_steps}
        net = network(axis, carry.outbox.get("step"), shared)

        def batch_of(agent: Array, held: PyTree) -> tuple[Batch, Key]:
            batch = feed.select(held, now)
            batch["label"] = jax.nn.one_hot(batch["label"], num_classes)
            mixing_key, own_key = jax.random.split(
                jax.random.fold_in(jax.random.fold_in(shared["train_key"], now), agent)
            )
            batch = preprocess(fixed_key, augmentation(mixing_key, batch))
            if faults.data_attack is not None:
                poisoned = faults.data_attack(jax.random.fold_in(own_key, 1), batch)
                assert net.byzantine is not None
                bad = net.byzantine[agent]
                batch = jax.tree.map(lambda x, y: jnp.where(bad, x, y), poisoned, batch)
            return batch, own_key

        batch, own_key = axis.each(batch_of)(axis.ids, held)
        gradients = functools.partial(_gradients, model)
        grads, stats, metrics = axis.each(gradients)(own_key, state.variables, batch)
        unfit = ~jnp.isfinite(metrics["loss"]) & net.taking_part()
        diverged = (state.failed_at < 0) & unfit
        state = state._replace(failed_at=jnp.where(diverged, now, state.failed_at))
        # Of gradients at others' variables: a key of this step that is no agent's own.
        their_key = jax.random.fold_in(jax.random.fold_in(shared["train_key"], now), config.agents)
        found = agents.Gradients(
            grads, stats, batch, lambda variables, batch: gradients(their_key, variables, batch)[0]
        )
        after = strategy.local_step(net, problem, state, found)
        if net.awake is not None:
            here = net.awake[axis.ids]
            metrics = jax.tree.map(lambda x: jnp.where(here, x, 0), metrics)
        totals = jax.tree.map(jnp.add, carry.totals, metrics)
        return settled(net, "step", carry._replace(state=state, totals=totals), after)

    def at_round(axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> Any:
        net = network(axis, carry.outbox.get("round"), shared)
        return net, problem._replace(images=held if problem.local else shared["images"])

    def communicate(axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> Carry:
        net, here = at_round(axis, carry, held, shared)
        return settled(net, "round", carry, strategy.communicate(net, here, carry.state))

    def match(axis: agents.Axis, carry: Carry, held: PyTree, shared: PyTree) -> PyTree:
        assert strategy.match is not None
        net, here = at_round(axis, carry, held, shared)
        return strategy.match(net, here, carry.state)

    def evaluate(axis: agents.Axis, variables: PyTree, held: PyTree, batch: Batch) -> PyTree:
        return axis.each(lambda own: tally(model, own, batch))(variables)

    def consensus(axis: agents.Axis, variables: PyTree, held: PyTree, shared: PyTree) -> PyTree:
        here = problem._replace(images=held if problem.local else shared["images"])
        fault = faults.sample(shared["fault_key"], shared["round"])
        honest = ~faults.sample(shared["fault_key"], 0).byzantine
        present = honest & fault.awake
        among = jnp.where(jnp.any(present), present, honest)
        return agents.consensus(axis, here, variables, among=among)

    def abstract() -> Carry:
        """Shapes of what a step and a communication leave, as if all agents were one block."""

        def both(ids: Array, held: PyTree, own_images: PyTree, shared: PyTree) -> Carry:
            axis = whole_axis(ids, jax.vmap)
            carry = step(axis, init(axis, ids, {}, shared), held, shared)
            return communicate(axis, carry, own_images, shared)

        def whole(tree: PyTree) -> PyTree:
            def leaf(x: Array) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct((config.agents, *x.shape[2:]), x.dtype)

            return jax.tree.map(leaf, tree)

        with closing(feed.steps(0, 1)) as steps:
            held = whole(next(steps))
        now = {name: np.int32(0) for name in ("step", "time", "round")}
        return jax.eval_shape(
            both, np.arange(config.agents), held, whole(own_images), {**shared, **now}
        )

    shapes = abstract()

    def start(axis: agents.Axis, ids: Array, held: PyTree, shared: PyTree) -> Carry:
        """The first carry: nothing sent yet."""

        def blank(shape: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros((*ids.shape, *shape.shape[1:]), shape.dtype)

        carry = init(axis, ids, held, shared)
        messages, outbox = jax.tree.map(blank, (shapes.messages, shapes.outbox))
        return carry._replace(messages=messages, outbox=outbox)

    def adopt(axis: agents.Axis, carry: Carry, taken: PyTree, shared: PyTree) -> Carry:
        state = strategy.init(axis, problem, carry.state._replace(**taken))
        return carry._replace(state=state)

    run_start = parallel.compile(start)
    run_adopt = parallel.compile(adopt)
    run_step = parallel.compile(step, donate=True)
    run_communicate = parallel.compile(communicate)
    run_match = parallel.compile(match)
    run_evaluate = parallel.compile(evaluate)
    run_consensus = parallel.compile(consensus)

    def stream() -> Iterator[Batch]:
        return map(parallel.replicate, test_batches(test_set, config.eval_batch_size, prepared))

    # As float32 the images take four times their bytes, and every device holds a copy.
    copies = 4 * len(parallel.devices) * test_set.num_bytes
    resident = list(stream()) if copies <= config.memory_bytes else None

    def run(carry: Carry, held: PyTree, now: int) -> Carry:
        number = (now - pretrain_steps) // round_steps if now >= pretrain_steps else -1
        known = {name: x for name, x in shared.items() if name != "images"}
        return run_step(carry, held, {**known, "step": np.int32(now), "round": np.int32(number)})

    def in_round(number: int) -> PyTree:
        time = number if strategy.every == "round" else number * round_steps  # the next step
        return {**shared, "time": np.int32(time), "round": np.int32(number)}

    def test(variables: PyTree) -> dict[str, np.ndarray]:
        batches = stream() if resident is None else resident
        sums = [parallel.get(run_evaluate(variables, {}, batch)) for batch in batches]
        return scores({name: sum(s[name] for s in sums) for name in sums[0]})

    def test_consensus(variables: PyTree, number: int) -> dict[str, float]:
        if config.agents == 1:
            return {}
        found = run_consensus(variables, own_images, in_round(number))
        aligned = test(found.aligned)
        return {
            "consensus_accuracy": float(aligned["accuracy"][0]),
            "consensus_ece": float(aligned["ece"][0]),
            "plain_accuracy": float(test(found.plain)["accuracy"][0]),
            "consensus_distance": float(parallel.get(found.aligned_distance)[0]),
            "plain_distance": float(parallel.get(found.plain_distance)[0]),
        }

    # 5. What the report shows of all this.
    happened = ""
    if faults:
        by_step = strategy.every in ("step", "always")
        happened = faults.describe(fault_key, config.rounds, topology.adjacency, by_step=by_step)
    about = {
        "topology": str(topology),
        "weights": np.asarray(topology.weights).tolist(),
        "faults": happened,
        "byzantine": np.flatnonzero(faults.sample(fault_key, 0).byzantine).tolist(),
        "partition": agents.partition.counts(parts, train_set.labels, num_classes).tolist(),
        "class_names": list(train_set.class_names),
        "parallel": str(parallel),
        "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
        "symmetry": {name: int(size) for name, size in symmetry.groups.items()},
        "steps_per_epoch": feed.steps_per_epoch,
    }
    return Experiment(
        parallel=parallel,
        strategy=strategy,
        feed=feed,
        init=lambda: run_start(parallel.put(np.arange(config.agents)), {}, shared),
        adopt=lambda carry, taken: run_adopt(carry, taken, {}),
        step=run,
        communicate=lambda carry, number: run_communicate(carry, own_images, in_round(number)),
        match=(
            None
            if strategy.match is None
            else lambda carry, number: run_match(carry, own_images, in_round(number))
        ),
        test=test,
        consensus=test_consensus,
        traffic=lambda carry: _traffic(config.agents, parallel.get(carry.messages), sent),
        about=about,
        sheet=_sheet(train_set, augmentation, sheet_key),
    )


def _matching_examples(config: ConfigDict, key: Key, parts: list[np.ndarray]) -> np.ndarray:
    """Indices of the examples on which agents are compared: int64 [n], or [A, n] if "local"."""
    count = config.matching_examples
    if config.matching_data == "local":
        # Who has fewer shows its own several times.
        count = min(count, max(map(len, parts)))
        drawn = (
            np.resize(jax.random.permutation(jax.random.fold_in(key, agent), part), count)
            for agent, part in enumerate(parts)
        )
        return np.sort(np.stack([np.asarray(indices) for indices in drawn]), axis=1)
    total = sum(map(len, parts))
    if config.matching_data == "global":
        return np.arange(total)
    return np.sort(np.asarray(jax.random.permutation(key, total)[: min(count, total)]))


def _traffic(
    num_agents: int, counts: dict[str, np.ndarray], sent: dict[str, list[agents.Message]]
) -> dict[str, dict[str, list[float]] | list[int]]:
    """What every agent has sent and received: bytes by kind, and the number of messages sent.

    Args:
        num_agents: A.
        counts: `Carry.messages`, on the host.
        sent: what the messages are, likewise by "step" and by "round".
    """
    total: dict[str, dict[str, Any]] = {"bytes_sent": {}, "bytes_received": {}}
    for when, messages in sent.items():
        for i, message in enumerate(messages):
            for j, sums in enumerate(total.values()):
                amount = counts[when][:, i, j] * message.num_bytes
                sums[message.kind] = sums.get(message.kind, 0) + amount
    bytes_of = {
        direction: {kind: amount.tolist() for kind, amount in sums.items()}
        for direction, sums in total.items()
    }
    number = np.zeros(num_agents, int)
    for count in counts.values():
        number += count[..., 0].sum(axis=1)
    return {**bytes_of, "messages": number.tolist()}


def _sheet(
    train_set: data.Dataset, augmentation: augment.Augmentation, key: Key
) -> dict[str, np.ndarray]:
    """A few training images, of as many classes as there are, before and after augmentation."""
    spread = np.linspace(0, len(train_set) - 1, min(8, len(train_set))).astype(np.int64)
    by_class = np.argsort(train_set.labels, kind="stable")
    sample = train_set.batch(by_class[spread])
    sample["label"] = np.eye(train_set.num_classes, dtype=np.float32)[sample["label"]]
    mixed = jax.tree.map(np.asarray, jax.jit(augmentation.__call__)(key, sample))
    return {"before": sample["image"], "image": mixed["image"], "label": mixed["label"]}


def _gradients(
    model: Any, key: Key, variables: PyTree, batch: Batch
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Gradients, new BatchNorm statistics and metrics of one agent on one batch."""
    stats = variables.get("batch_stats")

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        logits, changed = model.apply(
            {**variables, "params": params},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy(logits, batch["label"]).mean()
        return loss, (logits, changed.get("batch_stats", stats))

    (loss, (logits, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    right = jnp.argmax(logits, -1) == jnp.argmax(batch["label"], -1)
    metrics = {"loss": loss, "accuracy": right.mean(), "steps": jnp.ones(())}
    return grads, stats, metrics
