"""Experts: one network fine-tuned for several tasks, and merged again by every method.

`mixlab experts` runs it. `merge_by` is how models of one's own are merged, too: read the method with
`merge.parse`, give it the models, the base, a key, and what else it asks for.
"""

import csv
import functools
import inspect
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, config_dict

from mixlab import augment, data, landscape, merge, models, report, spec, trees
from mixlab.checkpoint import Checkpoints
from mixlab.data import Dataset
from mixlab.experiment import OPTIMIZERS
from mixlab.types import Array, Key, PyTree

Task = Callable[[Dataset], Dataset]

Inputs = dict[str, Callable[[Sequence[int]], PyTree]]
"""What a method may ask for beside the models, by the name of the argument, of some experts."""

Tester = Callable[[PyTree, Sequence["Examples"], Sequence[int]], np.ndarray]
"""`test(model, examples of all tasks, group) -> [T]`: accuracies on the tasks of a group.

In place of one model, a list of them has each tested on the task at its place in the group.
"""

_AFTER_TRAINING = (
    "seeds data_dir download methods pair_methods measured_examples scales plane marks plane_examples".split()
)


def default_config() -> ConfigDict:
    """Every field of the experiment, with its default. `configs/experts.py` starts from here."""
    config = ConfigDict()
    config.seeds = (0, 1, 2)  # of initialisation, order, held-out examples, permuted pixels, draws
    # Data: see mixlab.data.load.
    config.data = "mnist5k"
    config.train_split = "train"
    config.test_split = "test"
    config.data_dir = config_dict.placeholder(str)
    config.download = True
    config.validation = 0.1  # of the training split: held out to choose `scales` on
    config.preprocess = "to_float"
    # Tasks: see TASKS. A task's accuracy is among its own classes, as if each had its own head.
    config.pretrain_task = "plain"
    config.tasks = ("rotated", "inverted", "permuted")
    # Model and training. Models with running statistics, such as BatchNorm's, are not accepted.
    config.model = "mlp(hidden=(512, 512))"
    config.optimizer = "adam(3e-4)"
    config.batch_size = 50
    config.pretrain_steps = 300
    config.tune_steps = 200  # of each expert; training on all tasks together takes all of them
    # Merging: see mixlab.merge.
    config.methods = tuple(name for name in merge.METHODS)
    config.pair_methods = ()  # run on every pair of experts
    config.measured_examples = 100  # of each expert's training data: Fishers, Gram matrices
    config.scales = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
    # The picture: three tasks, and methods that are marked in the plane of their experts.
    config.plane = (0, 1, 2)
    config.marks = ("average", "task_arithmetic")
    config.plane_examples = 100  # of each task's test examples
    return config


def plain() -> Task:
    """The data as they are."""
    return lambda dataset: dataset


def rotated(quarter_turns: int = 1) -> Task:
    """Images turned counter-clockwise."""
    return lambda dataset: replace(
        dataset, images=np.rot90(dataset.images, quarter_turns, axes=(1, 2))
    )


def flipped() -> Task:
    """Images upside down."""
    return lambda dataset: replace(dataset, images=np.asarray(dataset.images)[:, ::-1])


def inverted() -> Task:
    """Black for white."""
    return lambda dataset: replace(dataset, images=255 - np.asarray(dataset.images))


def permuted(seed: int = 0) -> Task:
    """The pixels of every image in one order, drawn from `seed`."""

    def task(dataset: Dataset) -> Dataset:
        count, height, width, channels = dataset.images.shape
        order = np.random.default_rng(seed).permutation(height * width)
        pixels = np.asarray(dataset.images).reshape(count, height * width, channels)
        return replace(dataset, images=pixels[:, order].reshape(dataset.images.shape))

    return task


def classes(*kept: int) -> Task:
    """The examples of some classes alone."""
    return lambda dataset: dataset.subset(np.flatnonzero(np.isin(dataset.labels, kept)))


TASKS = {task.__name__: task for task in (plain, rotated, flipped, inverted, permuted, classes)}
"""What `config.tasks` may name; `"flipped | classes(0, 1)"` is one task after the other."""


def parse_task(text: str) -> Task:
    """The task that a text describes.

    Raises:
        ValueError: the text does not parse or names something unknown.
        TypeError: an argument that the task does not take.
    """

    def chain(*tasks: Task) -> Task:
        return lambda dataset: functools.reduce(lambda changed, task: task(changed), tasks, dataset)

    return spec.parse(text, TASKS, combine=chain)


class Examples(NamedTuple):
    """Examples of one task, or of several.

    Attributes:
        images: float `[N, H, W, C]`.
        labels: int `[N]`.
        classes: bool `[N, K]`, the classes of the example's task.
    """

    images: Array
    labels: Array
    classes: Array

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


class Result(NamedTuple):
    """What one method reached with one seed.

    Attributes:
        method: its text, or what else was tested.
        seed: of all that is random.
        tasks: `[T]`, numbers of the tasks whose experts were merged.
        accuracy: `[T]`, on the test examples of these tasks.
        scale: the one of `config.scales` that does best on the validation examples.
        scaled: `[T]`, the test accuracy of `base + scale * (merged - base)`.
    """

    method: str
    seed: int
    tasks: tuple[int, ...]
    accuracy: np.ndarray
    scale: float | None = None
    scaled: np.ndarray | None = None


def run(config: ConfigDict, workdir: str | Path) -> Path:
    """Fine-tunes, merges, tests and reports.

    Trained models are kept in the workdir: running again with other methods does not train again.

    Args:
        config: as `default_config`, with any fields changed.
        workdir: made if it is missing. Gets `report.md`, `results.csv`, `pairs.csv`, the picture
            `landscape.png` of the first seed, and the models.

    Returns:
        The path of the report.

    Raises:
        ValueError: a field cannot be used, or the folder holds models of another config.
    """
    workdir = Path(workdir).absolute()
    merged: list[Result] = []
    paired: list[Result] = []
    for number, seed in enumerate(config.seeds):
        start = time.perf_counter()
        setting = prepare(config, seed)
        base, together, *experts = _trained(config, seed, setting, workdir / "models" / str(seed))
        trained = time.perf_counter()
        inputs = _inputs(config, setting, experts)
        test = _tester(setting)
        everyone = tuple(range(len(experts)))
        for name, models_of_tasks in (
            ("pretrained", base),
            ("individual experts", experts),
            ("trained together", together),
        ):
            accuracy = test(models_of_tasks, setting.test, everyone)
            merged.append(Result(name, seed, everyone, accuracy))

        def result(text: str, group: tuple[int, ...]) -> Result:
            model = merge_by(text, experts, base, jax.random.key(seed), inputs, group)
            return _scaled(config, text, seed, test, setting, base, model, group)

        merged += [result(text, everyone) for text in config.methods]
        paired += [
            result(text, pair)
            for text in config.pair_methods
            for pair in itertools.combinations(everyone, 2)
        ]
        if number == 0:
            _draw_plane(config, setting, base, experts, inputs, workdir / "landscape.png")
        print(
            f"[{number + 1}/{len(config.seeds)}] seed {seed}: {trained - start:.0f} s of training, "
            f"{time.perf_counter() - trained:.0f} s of merging and testing",
            flush=True,
        )
    _write_csv(workdir / "results.csv", config.tasks, merged)
    _write_csv(workdir / "pairs.csv", config.tasks, paired)
    path = workdir / "report.md"
    path.write_text(_report(config, workdir.name, merged, paired))
    return path


def prepare(config: ConfigDict, seed: int) -> Setting:
    """Loads the data, and makes the tasks and the model.

    Raises:
        ValueError: a field cannot be used.
    """
    train_set, test_set = (
        data.load(config.data, split, data_dir=config.data_dir, download=config.download)
        for split in (config.train_split, config.test_split)
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
        logits = model.apply({"params": params}, batch.images)
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


def merge_by(
    text: str,
    experts: Sequence[PyTree],
    base: PyTree,
    key: Key,
    inputs: Inputs,
    group: Sequence[int],
) -> PyTree | list[PyTree]:
    """Merges some experts by the method that a text describes.

    Args:
        text: what `merge.parse` reads.
        experts: of all tasks.
        base: that they were fine-tuned from.
        key: of methods that draw.
        inputs: what a method may ask for beside the models.
        group: numbers of the experts to merge.

    Returns:
        One model, or a list of them, one an expert, from methods that keep one for each.
    """
    method = merge.parse(text)
    # A method names what it measures beside the models among the arguments of its first half.
    asked = inspect.signature(method.measure).parameters
    given = {name: of(group) for name, of in inputs.items() if name in asked}
    merged = method([experts[i] for i in group], base=base, key=key, **given)
    stacked = jnp.ndim(jax.tree.leaves(merged)[0]) > jnp.ndim(jax.tree.leaves(base)[0])
    return trees.unstack(merged) if stacked else merged


def _draw_plane(
    config: ConfigDict,
    setting: Setting,
    base: PyTree,
    experts: Sequence[PyTree],
    inputs: Inputs,
    path: Path,
) -> None:
    """Draws the test loss in the plane of three experts, over their tasks, with merges marked."""
    group = tuple(config.plane)
    chosen = _joined([setting.test[i].take(config.plane_examples) for i in group])
    marks = {
        text: merge_by(text, experts, base, jax.random.key(config.seeds[0]), inputs, group)
        for text in config.marks
    }
    corners = {config.tasks[i]: experts[i] for i in group}
    figure = landscape.draw(
        lambda params: setting.loss(params, chosen),
        corners,
        {"pretrained": base, **marks},
        label="test loss, mean over the three tasks",
    )
    figure.savefig(path)


def _joined(parts: Sequence[Examples]) -> Examples:
    return Examples(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def _trained(config: ConfigDict, seed: int, setting: Setting, folder: Path) -> list[PyTree]:
    """The base, the model trained on all tasks together, and the experts; from `folder` if there."""
    fields = json.loads(json.dumps(config.to_dict()))
    setup = {name: value for name, value in fields.items() if name not in _AFTER_TRAINING}
    key = jax.random.key(seed)
    like = jax.eval_shape(lambda: trees.stack([setting.init(key)] * (2 + len(config.tasks))))
    with Checkpoints(folder) as checkpoints:
        if (found := checkpoints.restore(like)) is not None:
            _, stacked, there = found
            if there != setup:
                changed = [name for name in setup if there.get(name) != setup[name]]
                raise ValueError(
                    f"{folder} holds models of another config, which differs in "
                    f"{', '.join(changed)}; use another --workdir"
                )
            return trees.unstack(stacked)
        fit = _fitter(config, seed, setting)
        base = fit(setting.init(key), setting.plain, config.pretrain_steps, stream=0)
        experts = [
            fit(base, examples, config.tune_steps, stream=1 + i)
            for i, examples in enumerate(setting.train)
        ]
        steps = len(experts) * config.tune_steps
        together = fit(base, _joined(setting.train), steps, stream=1 + len(experts))
        found = [base, together, *experts]
        checkpoints.save(0, jax.tree.map(np.asarray, trees.stack(found)), setup)
        checkpoints.wait()
    return found


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


def _inputs(config: ConfigDict, setting: Setting, experts: Sequence[PyTree]) -> Inputs:
    """What methods may ask for, each measured when it is first asked for."""
    count = config.measured_examples

    @jax.jit
    def fisher(params: PyTree, examples: Examples, kept: Array) -> PyTree:
        def log_probs(params: PyTree, batch: Examples) -> Array:
            return setting.log_probs(params, batch)[:, kept]

        return merge.diagonal_fisher(log_probs, params, examples)

    @functools.cache
    def fisher_of(i: int) -> PyTree:
        examples = setting.train[i].take(config.measured_examples)
        # The expectation goes over the task's own classes.
        return fisher(experts[i], examples, np.flatnonzero(examples.classes[0]))

    return {"fishers": lambda group: [fisher_of(i) for i in group]}


def _tester(setting: Setting) -> Tester:
    @jax.jit
    def accuracy(params: PyTree, examples: Examples) -> Array:
        return jnp.mean(jnp.argmax(setting.log_probs(params, examples), -1) == examples.labels)

    def test(model: PyTree, examples: Sequence[Examples], group: Sequence[int]) -> np.ndarray:
        each = model if isinstance(model, list) else [model] * len(group)
        return np.array([accuracy(m, examples[i]) for m, i in zip(each, group, strict=True)])

    return test


def _scaled(
    config: ConfigDict,
    text: str,
    seed: int,
    test: Tester,
    setting: Setting,
    base: PyTree,
    model: PyTree | list[PyTree],
    group: tuple[int, ...],
) -> Result:
    """Tests a merge as it is, and at the distance from the base that validation prefers."""

    def at(scale: float) -> PyTree | list[PyTree]:
        line = merge.interpolate(scale)
        if isinstance(model, list):
            return [line([base, one]) for one in model]
        return line([base, model])

    validated = [np.mean(test(at(scale), setting.validation, group)) for scale in config.scales]
    scale = config.scales[int(np.argmax(validated))]
    accuracy, scaled = (test(at(s), setting.test, group) for s in (1.0, scale))
    return Result(text, seed, group, accuracy, scale, scaled)


def _write_csv(path: Path, tasks: Sequence[str], results: Sequence[Result]) -> None:
    """One line a method, seed and way to scale, with the accuracy on each task."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "scale", *tasks])
        for result in results:
            lines = [("", result.accuracy)]
            if result.scaled is not None:
                lines.append((str(result.scale), result.scaled))
            for scale, accuracy in lines:
                by_task = dict(zip(result.tasks, accuracy.tolist(), strict=True))
                row = [by_task.get(i, "") for i in range(len(tasks))]
                writer.writerow([result.method, result.seed, scale, *row])


_LEGEND = """\
Test accuracy in percent: the mean over the tasks (*average*) and the lowest of them (*worst*); mean ±
sample standard deviation over seeds {seeds}. *as it is*: the method with the arguments that are shown.
*scaled*: `base + scale * (merged - base)`, the scale of {scales} that does best on average over the
tasks' validation examples, which no model has learned; *scale* is its mean over the seeds.
"""


def _report(config: ConfigDict, title: str, merged: list[Result], paired: list[Result]) -> str:
    """`report.md`."""
    listed = ", ".join(f"`{task}`" for task in config.tasks)
    lines = [
        f"# {title}",
        "",
        f"{config.model} on {config.data}: {config.pretrain_steps} steps on `{config.pretrain_task}`, "
        f"then {config.tune_steps} on each of {listed}; `{config.optimizer}`, batch "
        f"{config.batch_size}.",
        "",
        _table(merged),
        "",
        _LEGEND.format(
            seeds=", ".join(map(str, config.seeds)), scales=", ".join(map(str, config.scales))
        ),
        *(["## Pairs of experts", "", _table(paired), ""] if paired else []),
        "## The plane of three experts",
        "",
        "![Test loss in the plane of three experts](landscape.png)",
        "",
    ]
    return "\n".join(lines)


def _table(results: list[Result]) -> str:
    """One row a method: means and deviations over seeds; over pairs the mean is taken first."""
    rows = [["method", "average", "worst", "scaled average", "scaled worst", "scale"]]
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        seeds = list(dict.fromkeys(result.seed for result in own))

        def cell(value: Callable[[Result], Any]) -> str:
            by_seed = [[value(r) for r in own if r.seed == seed] for seed in seeds]
            return report.cell([100 * float(np.mean(values)) for values in by_seed], "{:.1f}")

        row = [f"`{method}`", cell(lambda r: r.accuracy.mean()), cell(lambda r: r.accuracy.min())]
        if own[0].scaled is None:
            rows.append([method, *row[1:], "-", "-", "-"])
            continue
        row += [cell(lambda r: r.scaled.mean()), cell(lambda r: r.scaled.min())]
        rows.append([*row, f"{np.mean([r.scale for r in own]):.2f}"])
    return report.markdown(rows, left=1)
