"""Data, agents, model and strategy, and the programs that they make together.

`prepare` is read from top to bottom.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mixlab import agents, align, augment, data, models, spec
from mixlab.agents.parallel import host_callbacks_are_safe
from mixlab.experiment.config import OPTIMIZERS, check, datasets
from mixlab.experiment.programs import Carry, Programs, prepared
from mixlab.experiment.scoring import reestimation, scores, test_batches
from mixlab.types import Array, Batch, Key, PyTree


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
            first round nobody fails, and agents train by themselves unless they communicate always.
        alone: as `step`, by themselves at any time; None where a strategy's steps are just that.
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
    alone: Callable[[Carry, PyTree, int], Carry] | None
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
    augmentation, preprocess = augment.parse(config.augment), augment.parse(config.preprocess)

    def ready(images: np.ndarray) -> Array:
        return prepared(preprocess, {"image": jnp.asarray(images)})["image"]

    # 3. Model, optimizer, symmetries.
    model = models.parse(config.model, num_classes)
    chosen = _matching_examples(config, match_key, parts)
    images = ready(train_set.batch(chosen.ravel())["image"])
    variables = jax.jit(model.init)(init_key, images[:1])
    symmetry = align.infer_symmetry(model.apply, variables, images[:2])
    problem = agents.Problem(
        optimizer=strategy.optimizer(spec.parse(config.optimizer, OPTIMIZERS, combine=optax.chain)),
        symmetry=symmetry,
        batch_stats=reestimation(model, variables),
        local=config.matching_data == "local",
        assignment="scipy" if host_callbacks_are_safe(parallel) else "jax",
    )

    # 4. What agents do, and what all of them see.
    programs = Programs(
        model=model,
        image=images[:1],
        num_classes=num_classes,
        same_init=config.same_init,
        strategy=strategy,
        problem=problem,
        faults=faults,
        feed=feed,
        augmentation=augmentation,
        preprocess=preprocess,
        pretrain_steps=pretrain_steps,
    )
    weights = topology.mixing_matrix(strategy.rule).reshape(-1, config.agents, config.agents)
    shared = {
        "weights": parallel.replicate(jnp.asarray(weights, jnp.float32)),
        "init_key": parallel.replicate(init_key),
        "train_key": parallel.replicate(train_key),
        "fault_key": parallel.replicate(fault_key),
        "examples": parallel.replicate(jnp.array([len(part) for part in parts], jnp.float32)),
    }
    if problem.local:
        own_images = parallel.put(np.asarray(images).reshape(*chosen.shape, *images.shape[1:]))
    else:
        own_images, shared["images"] = {}, parallel.replicate(images)
    with closing(feed.steps(0, 1)) as steps:
        shapes = programs.shapes(next(steps), own_images, shared)

    def start(axis: agents.Axis, ids: Array, held: PyTree, shared: PyTree) -> Carry:
        """The first carry: nothing sent yet."""

        def blank(shape: jax.ShapeDtypeStruct) -> Array:
            return jnp.zeros((*ids.shape, *shape.shape[1:]), shape.dtype)

        carry = programs.init(axis, ids, held, shared)
        messages, outbox = jax.tree.map(blank, (shapes.messages, shapes.outbox))
        return carry._replace(messages=messages, outbox=outbox)

    run_start = parallel.compile(start)
    run_adopt = parallel.compile(programs.adopt)
    run_alone = parallel.compile(programs.alone, donate=True)
    is_own = strategy.local_step is not agents.strategies.local_step
    run_step = parallel.compile(programs.step, donate=True) if is_own else run_alone
    run_communicate = parallel.compile(programs.communicate)
    run_match = parallel.compile(programs.match)
    run_evaluate = parallel.compile(programs.evaluate)
    run_consensus = parallel.compile(programs.consensus)

    def stream() -> Iterator[Batch]:
        return map(parallel.replicate, test_batches(test_set, config.eval_batch_size, ready))

    # As float32 the images take four times their bytes, and every device holds a copy.
    copies = 4 * len(parallel.devices) * test_set.num_bytes
    resident = list(stream()) if copies <= config.memory_bytes else None

    def in_step(now: int) -> PyTree:
        number = (now - pretrain_steps) // round_steps if now >= pretrain_steps else -1
        known = {name: x for name, x in shared.items() if name != "images"}
        return {**known, "step": np.int32(now), "round": np.int32(number)}

    def step(carry: Carry, held: PyTree, now: int) -> Carry:
        begun = now >= pretrain_steps or strategy.every == "always"
        return (run_step if begun else run_alone)(carry, held, in_step(now))

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
        step=step,
        alone=((lambda carry, held, now: run_alone(carry, held, in_step(now))) if is_own else None),
        communicate=lambda carry, number: run_communicate(carry, own_images, in_round(number)),
        match=(
            None
            if strategy.match is None
            else lambda carry, number: run_match(carry, own_images, in_round(number))
        ),
        test=test,
        consensus=test_consensus,
        traffic=lambda carry: _traffic(config.agents, parallel.get(carry.messages), programs.sent),
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
