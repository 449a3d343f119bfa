"""What the models of one seed learn and are tested on, and how they are trained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mixlab import augment, data, models, spec, trees
from mixlab.checkpoint import Checkpoints
from mixlab.data import Dataset
from mixlab.experiment import OPTIMIZERS, datasets
from mixlab.experts.tasks import parse_task
from mixlab.types import Array, Key, PyTree

_AFTER_TRAINING = (
    "seeds",
    "data_dir",
    "download",
    "methods",
    "pair_methods",
    "measured_examples",
    "scales",
    "plane",
    "marks",
    "plane_examples",
)
"""Fields that may change between runs in one folder: training does not look at them."""


class Examples(NamedTuple):
    """Examples of one task, or of several.

    Attributes:
        images: float `[N, H, W, C]`.
        labels: int `[N]`.
        classes: bool `[N, K]`, the classes of the example's task.
    """

    images: Array | np.ndarray
    labels: Array | np.ndarray
    classes: Array | np.ndarray

    def at(self, indices: Any) -> "Examples":
        """The examples at some indices."""
        return Examples(*(field[indices] for field in self))

    def take(self, count: int) -> "Examples":
        """The first `count` examples."""
        return self.at(slice(count))


class Setting(NamedTuple):
    """What the models of one seed learn, and are tested on.

    Attributes:
        plain: the examples that the base learns.
        train: those of each task that its expert learns.
        validation: those of each task that scales are chosen on; no model has learned them.
        test: those of each task that the table is made of.
        log_probs: `(params, examples) -> [N, K]`, among the classes of the example's task.
        init: `key -> params`.
    """

    plain: Examples
    train: list[Examples]
    validation: list[Examples]
    test: list[Examples]
    log_probs: Callable[[PyTree, Examples], Array]
    init: Callable[[Key], PyTree]

    def loss(self, params: PyTree, examples: Examples) -> Array:
        """The mean negative log probability of the labels."""
        log_probs = self.log_probs(params, examples)
        return -jnp.mean(jnp.take_along_axis(log_probs, examples.labels[:, None], axis=1))


def prepare(config: ConfigDict, seed: int) -> Setting:
    """Loads the data, and makes the tasks and the model.

    Raises:
        ValueError: a field cannot be used.
    """
    train_set, test_set = datasets(config)
    if not (train_set.in_memory and test_set.in_memory):
        raise ValueError(
            f"{config.data} does not fit in memory; take less, e.g. train_split='train[:10%]'"
        )
    count = round(config.validation * len(train_set))
    if not 0 < count < len(train_set):
        raise ValueError(f"validation must lie between 0 and 1, got {config.validation}")
    order = data.epoch_indices(seed, 0, len(train_set), len(train_set))
    held_out, rest = train_set.subset(order[:count]), train_set.subset(order[count:])
    preprocess = augment.parse(config.preprocess)

    def examples(dataset: Dataset, task: str) -> Examples:
        dataset = parse_task(task)(dataset)
        images = preprocess(jax.random.key(0), {"image": jnp.asarray(dataset.images)})["image"]
        own = np.isin(np.arange(dataset.num_classes), dataset.labels)
        return Examples(
            np.asarray(images),
            dataset.labels,
            np.broadcast_to(own, (len(dataset), dataset.num_classes)),
        )

    model = models.parse(config.model, train_set.num_classes)

    def log_probs(params: PyTree, batch: Examples) -> Array:
        logits: Any = model.apply({"params": params}, batch.images)
        return jax.nn.log_softmax(jnp.where(batch.classes, logits, -1e9))

    def init(key: Key) -> PyTree:
        params, *others = model.init(key, plain.images[:1]).values()
        if others:
            raise ValueError(
                f"model {config.model!r} keeps statistics beside its parameters, and the "
                "statistics of a merge are not the merge of the statistics; take a model without, "
                "such as mlp, vit or cnn(norm='group')"
            )
        return params

    plain = examples(rest, config.pretrain_task)
    return Setting(
        plain=plain,
        train=[examples(rest, task) for task in config.tasks],
        validation=[examples(held_out, task) for task in config.tasks],
        test=[examples(test_set, task) for task in config.tasks],
        log_probs=log_probs,
        init=init,
    )


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several tasks as one."""
    return Examples(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def trained(config: ConfigDict, seed: int, setting: Setting, folder: Path) -> list[PyTree]:
    """Trains, or reads what was trained before.

    Args:
        config: of the experiment.
        seed: of all that is random.
        setting: what `prepare` made of the two.
        folder: where the models are kept.

    Returns:
        The base, the model trained on all tasks together, and the experts.

    Raises:
        ValueError: the folder holds models of another config.
        checkpoint.CheckpointError: saving failed, or what was saved is damaged.
    """
    fields = json.loads(json.dumps(config.to_dict()))
    setup = {name: value for name, value in fields.items() if name not in _AFTER_TRAINING}
    key = jax.random.key(seed)
    like = jax.eval_shape(lambda: trees.stack([setting.init(key)] * (2 + len(config.tasks))))
    with Checkpoints(folder) as checkpoints:
        try:
            found = checkpoints.restore(like)
        except ValueError as error:
            raise ValueError(
                f"{folder} holds models of another config; use another --workdir ({error})"
            ) from error
        if found is not None:
            _, stacked, there = found
            if there != setup:
                changed = [name for name in setup if there.get(name) != setup[name]]
                raise ValueError(
                    f"{folder} holds models of another config, which differs in "
                    f"{', '.join(changed)}; use another --workdir"
                )
            return trees.unstack(stacked)
        fit = _fitter(config, seed, setting)
        base = fit(jax.jit(setting.init)(key), setting.plain, config.pretrain_steps, stream=0)
        experts = [
            fit(base, examples, config.tune_steps, stream=1 + i)
            for i, examples in enumerate(setting.train)
        ]
        steps = len(experts) * config.tune_steps
        together = fit(base, joined(setting.train), steps, stream=1 + len(experts))
        every = [base, together, *experts]
        checkpoints.save(0, jax.tree.map(np.asarray, trees.stack(every)), setup)
        checkpoints.wait()
    return every


def _fitter(config: ConfigDict, seed: int, setting: Setting) -> Callable[..., PyTree]:
    """`fit(params, examples, steps, stream=) -> params`; every stream has an order of its own."""
    optimizer = spec.parse(config.optimizer, OPTIMIZERS, combine=optax.chain)

    @jax.jit
    def step(params: PyTree, state: PyTree, batch: Examples) -> tuple[PyTree, PyTree]:
        grads = jax.grad(setting.loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def fit(params: PyTree, examples: Examples, steps: int, *, stream: int) -> PyTree:
        state = optimizer.init(params)
        size, count = config.batch_size, len(examples.labels)
        order = data.epoch_indices(seed, 0, count, steps * size, stream=stream)
        for indices in order.reshape(steps, size):
            params, state = step(params, state, examples.at(indices))
        return params

    return fit
