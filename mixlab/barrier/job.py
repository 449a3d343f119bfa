"""Trains networks apart, matches them, and measures what lies between them."""

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mixlab import align, experiment, figures, train
from mixlab.barrier import tables
from mixlab.barrier.matchings import Pair, parse_matching
from mixlab.barrier.setting import prepare
from mixlab.barrier.tables import Result
from mixlab.checkpoint import read_models
from mixlab.types import PyTree

_OF_TRAINING = (
    *("data", "train_split", "test_split", "data_dir", "download", "image_size", "memory_bytes"),
    *("augment", "preprocess", "model", "optimizer", "batch_size", "eval_batch_size"),
)
"""Fields that mean here what they mean to `mixlab train`."""


def default_config() -> ConfigDict:
    """Every field of the experiment, with its default. `configs/align.py` starts from here."""
    defaults = experiment.default_config()
    config = ConfigDict({name: defaults.get_ref(name) for name in _OF_TRAINING})
    # Training: a seed a network, of its initialisation, order and augmentation.
    config.seeds = (0, 1)  # the first two are a pair, so are the next two, ...
    config.epochs = 10
    # Matching: see MATCHINGS. Those that draw do so by the seed of the pair's first network.
    config.matchings = (
        "none",
        "weight_matching",
        "activation_matching('correlation')",
        "activation_matching('second_moment')",
    )
    config.matching_examples = 1000  # training images that matchings and repairs look at
    config.points = 11  # of the line between two networks; odd, so that the midpoint is one
    return config


def run(config: ConfigDict, workdir: str | Path) -> Path:
    """Trains, matches, measures and reports.

    Trained networks are kept in the workdir: running again with other matchings, or another
    number of points, does not train again.

    Args:
        config: as `default_config`, with any fields changed.
        workdir: made if it is missing. Gets `report.md`, `results.csv`, the figures
            `barriers.png` and `barriers_repaired.png` of the first pair, and in `training` all
            that `mixlab train` writes.

    Returns:
        The path of the report.

    Raises:
        ValueError: a field cannot be used, or the folder holds networks of another config.
        TypeError: a matching does not take an argument.
        train.Diverged: a loss became NaN or infinite.
        train.Stopped: SIGTERM arrived in training; the state has been saved.
        checkpoint.CheckpointError: saving failed, or what was saved is damaged.
    """
    for text in config.matchings:
        parse_matching(text)  # before anything is trained
    if len(config.seeds) % 2 or not config.seeds:
        raise ValueError(f"two seeds make a pair of networks, got {tuple(config.seeds)}")
    if config.points < 3 or config.points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, got {config.points}")
    workdir = Path(workdir).absolute()
    train.train(_training(config), workdir / "training")
    seeds = [(a, b) for a, b in zip(config.seeds[::2], config.seeds[1::2], strict=True)]
    pairs = [tuple(_network(workdir / "training", seed) for seed in both) for both in seeds]
    setting = prepare(config, pairs[0][0])
    results: list[Result] = []
    for (reference, other), both in zip(pairs, seeds, strict=True):
        aligned = {}
        for text in config.matchings:
            start = time.perf_counter()
            pair = Pair(setting, reference, other, jax.random.key(both[0]))
            permutations = jax.block_until_ready(parse_matching(text)(pair))
            aligned[text] = setting.symmetry.permute(permutations, other)
            spent = time.perf_counter() - start
            print(f"networks {both[0]} and {both[1]}: {text} took {spent:.1f} s", flush=True)
        for repaired in (False, True):
            lines = align.barrier(
                setting.test,
                reference,
                aligned,
                points=config.points,
                post=setting.repair if repaired else None,
            )
            results += [Result(text, both, repaired, line) for text, line in lines.items()]
    for repaired, name in ((False, "barriers.png"), (True, "barriers_repaired.png")):
        first = [r for r in results if r.seeds == seeds[0] and r.repaired == repaired]
        figures.barriers({r.matching: r.line for r in first}).savefig(workdir / name)
    tables.write_csv(workdir / "results.csv", results)
    path = workdir / "report.md"
    path.write_text(tables.page(config, workdir.name, results, setting.batch_norm))
    return path


def _training(config: ConfigDict) -> ConfigDict:
    """What `mixlab train` is asked for: networks alone, all with the same data."""
    training = experiment.default_config()
    training.update({name: config[name] for name in _OF_TRAINING})
    training.agents = 1
    training.strategy = "none"
    training.rounds = config.epochs  # it is tested after each
    training.sweep.seed = tuple(config.seeds)
    return training


def _network(folder: Path, seed: int) -> PyTree:
    (network,) = read_models(folder / "runs" / str(seed))
    return network
