"""Merges experts by every method, and tests the merges."""

import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, config_dict

from mixlab import landscape, merge, trees
from mixlab.experts import tables
from mixlab.experts.setting import Examples, Setting, joined, prepare, trained
from mixlab.experts.tables import Group, Result
from mixlab.types import Array, PyTree

FUNCTIONS = ("greedy_soup", "regmean_plus_plus")
"""Functions of `mixlab.merge` that a config may name among its methods."""


def default_config() -> ConfigDict:
    """Every field of the experiment, with its default. `configs/experts.py` starts from here."""
    config = ConfigDict()
    config.seeds = (0, 1, 2)  # of initialisation, order, held-out examples, methods that draw
    # Data: see mixlab.data.load.
    config.data = "mnist5k"
    config.train_split = "train"
    config.test_split = "test"
    config.data_dir = config_dict.placeholder(str)
    config.download = True
    config.image_size = config_dict.placeholder(int)
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
    config.methods = ("average", "task_arithmetic(scale=0.3)", "ties(density=0.2)")
    config.pair_methods = ()  # run on every pair of experts
    config.measured_examples = 100  # of each expert's training data: Fishers, Gram matrices
    config.scales = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
    # The picture: three tasks, and methods that are marked in the plane of their experts.
    config.plane = (0, 1, 2)
    config.marks = ("average", "task_arithmetic(scale=0.3)")
    config.plane_examples = 100  # of each task's test examples
    return config


@dataclass(frozen=True, eq=False)
class Family:
    """A base and the experts made of it, to be merged and tested.

    Attributes:
        base: params.
        experts: params, one a task.
        setting: the tasks.
        seed: of methods that draw.
        measured: how many of its own training examples an expert is measured on.
        scales: the multiples of what a merge adds to the base that are tried.
    """

    base: PyTree
    experts: list[PyTree]
    setting: Setting
    seed: int
    measured: int
    scales: tuple[float, ...]

    def merge(self, text: str, group: Group, *, based: bool = True) -> PyTree | list[PyTree]:
        """Merges some experts by the method that a text describes.

        Args:
            text: what `merge.parse` reads, or one of `FUNCTIONS`.
            group: the experts.
            based: whether the method is told of the base.

        Returns:
            One model, or a list of them, one an expert, from methods that keep one for each.
        """
        if text in self._functions:
            return self._functions[text](group)
        method = merge.parse(text)
        # A method names what it needs beside the models among the arguments of its first half.
        asked = inspect.signature(method.measure).parameters
        given = {name: of(group) for name, of in self._inputs.items() if name in asked}
        base, key = self.base if based else None, jax.random.key(self.seed)
        merged = method(self.of(group), base=base, key=key, **given)
        stacked = jnp.ndim(jax.tree.leaves(merged)[0]) > jnp.ndim(jax.tree.leaves(self.base)[0])
        return trees.unstack(merged) if stacked else merged

    def of(self, group: Group) -> list[PyTree]:
        """The experts of a group."""
        return [self.experts[i] for i in group]

    def test(self, model: PyTree, examples: Sequence[Examples], group: Group) -> np.ndarray:
        """The accuracies on the tasks of a group, `[T]`.

        Args:
            model: one for all, or a list of one for each of the group.
            examples: of every task.
            group: the tasks to test on.
        """
        each = model if isinstance(model, list) else [model] * len(group)
        return np.array([self._accuracy(m, examples[i]) for m, i in zip(each, group, strict=True)])

    def result(self, text: str, group: Group, *, based: bool = True) -> Result:
        """Merges, and tests as it is and at the distance from the base that validation prefers."""
        merged = self.merge(text, group, based=based)

        def at(scale: float) -> PyTree | list[PyTree]:
            line = merge.interpolate(scale)
            if isinstance(merged, list):
                return [line([self.base, model]) for model in merged]
            return line([self.base, merged])

        validated = [self.test(at(s), self.setting.validation, group).mean() for s in self.scales]
        scale = self.scales[int(np.argmax(validated))]
        accuracy, scaled = (self.test(m, self.setting.test, group) for m in (merged, at(scale)))
        return Result(text, self.seed, group, accuracy, scaled, scale)

    @cached_property
    def _accuracy(self) -> Callable[[PyTree, Examples], Array]:
        @jax.jit
        def accuracy(params: PyTree, examples: Examples) -> Array:
            found = jnp.argmax(self.setting.log_probs(params, examples), axis=-1)
            return jnp.mean(found == examples.labels)

        return accuracy

    @cached_property
    def _own(self) -> list[Examples]:
        return [examples.take(self.measured) for examples in self.setting.train]

    @cached_property
    def _inputs(self) -> dict[str, Callable[[Group], PyTree]]:
        """What methods may ask for beside the models."""
        return {
            "fishers": lambda group: [self._fishers[i] for i in group],
            "grams": lambda group: [self._grams[i] for i in group],
            # As if a router knew the task of every example.
            "router_weights": lambda group: np.eye(len(group)),
        }

    @cached_property
    def _functions(self) -> dict[str, Callable[[Group], PyTree]]:
        """What merges by more than models and inputs."""

        def greedy_soup(group: Group) -> PyTree:
            def score(params: PyTree) -> float:
                return float(self.test(params, self.setting.validation, group).mean())

            return merge.greedy_soup(self.of(group), score, base=self.base).params

        def regmean_plus_plus(group: Group) -> PyTree:
            batches = [[self._own[i]] for i in group]
            return merge.regmean_plus_plus(self.setting.log_probs, self.of(group), batches)

        return dict(zip(FUNCTIONS, (greedy_soup, regmean_plus_plus), strict=True))

    @cached_property
    def _fishers(self) -> list[PyTree]:
        @jax.jit
        def fisher(params: PyTree, examples: Examples, kept: Array) -> PyTree:
            def log_probs(params: PyTree, batch: Examples) -> Array:
                return self.setting.log_probs(params, batch)[:, kept]

            return merge.diagonal_fisher(log_probs, params, examples)

        # The expectation goes over the task's own classes.
        return [
            fisher(expert, own, np.flatnonzero(own.classes[0]))
            for expert, own in zip(self.experts, self._own, strict=True)
        ]

    @cached_property
    def _grams(self) -> list[PyTree]:
        return [
            merge.grams(self.setting.log_probs, expert, [own])
            for expert, own in zip(self.experts, self._own, strict=True)
        ]


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
        TypeError: a method does not take an argument.
        checkpoint.CheckpointError: saving failed, or what was saved is damaged.
    """
    for text in (*config.methods, *config.pair_methods, *config.marks):
        if text not in FUNCTIONS:
            merge.parse(text)  # before anything is trained
    workdir = Path(workdir).absolute()
    merged: list[Result] = []
    paired: list[Result] = []
    for number, seed in enumerate(config.seeds):
        start = time.perf_counter()
        setting = prepare(config, seed)
        base, together, *experts = trained(config, seed, setting, workdir / "models" / str(seed))
        family = Family(
            base, experts, setting, seed, config.measured_examples, tuple(config.scales)
        )
        between = time.perf_counter()
        everyone = tuple(range(len(experts)))
        pairs = list(itertools.combinations(everyone, 2))
        references = {
            "pretrained": base,
            "individual experts": experts,
            "trained together": together,
        }
        for name, model in references.items():
            accuracy = family.test(model, setting.test, everyone)
            merged.append(Result(name, seed, everyone, accuracy))
        merged += [family.result(text, everyone) for text in config.methods]
        paired += [
            family.result(text, pair, based=False) for text in config.pair_methods for pair in pairs
        ]
        if number == 0:
            _draw_plane(config, family, workdir / "landscape.png")
        print(
            f"[{number + 1}/{len(config.seeds)}] seed {seed}: {between - start:.0f} s of training, "
            f"{time.perf_counter() - between:.0f} s of merging and testing",
            flush=True,
        )
    tables.write_csv(workdir / "results.csv", config.tasks, merged)
    tables.write_csv(workdir / "pairs.csv", config.tasks, paired)
    path = workdir / "report.md"
    path.write_text(tables.page(config, workdir.name, merged, paired))
    return path


def _draw_plane(config: ConfigDict, family: Family, path: Path) -> None:
    """Draws the test loss in the plane of three experts, over their tasks, with merges marked."""
    group = tuple(config.plane)
    examples = joined([family.setting.test[i].take(config.plane_examples) for i in group])
    figure = landscape.draw(
        lambda params: family.setting.loss(params, examples),
        {config.tasks[i]: family.experts[i] for i in group},
        {"pretrained": family.base, **{text: family.merge(text, group) for text in config.marks}},
        label="test loss, mean over the three tasks",
    )
    figure.savefig(path)
