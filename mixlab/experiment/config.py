"""The fields of an experiment, what they may say, and the data sets they name."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from ml_collections import ConfigDict, config_dict

from mixlab import agents, augment, data, models, spec


def default_config() -> ConfigDict:
    """Every field of an experiment, with its default. `configs/` starts from here."""
    config = ConfigDict()
    config.seed = 0
    # Data: see mixlab.data.load.
    config.data = "mnist5k"
    config.train_split = "train"  # TFDS sets take slices, "train[:90%]"
    config.test_split = "test"
    config.data_dir = config_dict.placeholder(str)
    config.download = True
    config.image_size = config_dict.placeholder(int)
    config.memory_bytes = 2 << 30  # images up to this size live on the devices
    config.augment = "identity"  # on uint8 images, training only
    config.preprocess = "to_float"  # after that, training and evaluation
    # Model and optimizer.
    config.model = "mlp(hidden=(256, 256, 256))"
    config.optimizer = "adam(1e-3)"
    config.batch_size = 50  # of each agent
    # Agents: see mixlab.agents.
    config.agents = 8
    config.topology = "ring"
    config.partition = "iid"
    config.strategy = "dimat"
    config.same_init = False
    # Where agents are compared, BatchNorm re-estimated: "proxy", `matching_examples` training
    # images that all agents hold; "local", as many of each agent's own; "global", all of them.
    config.matching_data = "proxy"
    config.matching_examples = 1000
    config.faults = "none"  # see mixlab.agents.faults
    config.start_from = config_dict.placeholder(str)  # folder of a run: its agents, cloned in turn
    # Durations. An epoch is the mean, over agents, of the steps needed to see a part once.
    config.pretrain_epochs = 0  # by oneself, before the first round
    config.rounds = 10
    config.epochs_per_round = 1
    config.eval_batch_size = 500
    # Where and how it runs: see mixlab.agents.parallel.
    config.backend = "pmap"
    config.per_device = "auto"
    config.devices = config_dict.placeholder(int)
    config.checkpoint_every_steps = config_dict.placeholder(int)  # by default: every round
    config.keep_checkpoints = config_dict.placeholder(int)  # by default 2; all where agents fail
    # Field -> tuple of values; every combination is run. The report averages over seeds.
    config.sweep = ConfigDict()
    config.sweep_skip = ()  # dicts of field -> value or values: combinations that are left out
    return config


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    name: getattr(optax, name)
    for name in (
        "adabelief",
        "adam",
        "adamw",
        "lamb",
        "lars",
        "lion",
        "nadam",
        "rmsprop",
        "sgd",
        "add_decayed_weights",
        "clip_by_global_norm",
        "cosine_decay_schedule",
        "exponential_decay",
        "linear_schedule",
        "piecewise_constant_schedule",
        "warmup_cosine_decay_schedule",
    )
}
"""What `config.optimizer` may name: optax's own optimizers, transformations and schedules."""


def check(config: ConfigDict) -> None:
    """Refuses values that cannot be used, before any data is loaded.

    What texts describe is built, which costs little, and forgotten.

    Raises:
        ValueError: there is no such field, or one names something unknown, or has a value that
            cannot be used.
        TypeError: a field gives an argument that what it names does not take.
    """
    fields = list(default_config())
    if unknown := [field for field in config if field not in fields]:
        told = "; ".join(f"{field!r}: {spec.nearest(field, fields)}" for field in unknown)
        raise ValueError(f"the config has no field {told}")
    for field, least in _LEAST.items():
        if config[field] is not None and config[field] < least:
            raise ValueError(f"{field} must be at least {least}, got {config[field]}")
    durations = (config.pretrain_epochs, config.rounds)
    if min(durations) < 0 or max(durations) < 1:
        raise ValueError(
            "pretrain_epochs and rounds must be at least 0 and not both 0, got "
            f"{durations[0]} and {durations[1]}"
        )
    for field, known in _CHOICES.items():
        if config[field] not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}, got {config[field]!r}")
    agents.parse(config.strategy, agents.topology.parse(config.topology, config.agents))
    agents.faults.parse(config.faults, config.agents)
    agents.partition.parse(config.partition)
    models.parse(config.model, 2)
    spec.parse(config.optimizer, OPTIMIZERS, combine=optax.chain)
    augment.parse(config.augment)
    augment.parse(config.preprocess)


_LEAST = {
    "agents": 1,
    "batch_size": 1,
    "checkpoint_every_steps": 1,
    "devices": 1,
    "epochs_per_round": 1,
    "eval_batch_size": 1,
    "keep_checkpoints": 2,  # see mixlab.checkpoint.Checkpoints
    "matching_examples": 1,
    "memory_bytes": 0,
    "seed": 0,
}
"""Below which numbers fields make no sense; None is not checked."""

_CHOICES = {
    "backend": agents.BACKENDS,
    "matching_data": ("global", "local", "proxy"),
    "per_device": agents.PER_DEVICE,
}
"""What fields may say that take one of a few words."""


def datasets(config: ConfigDict) -> tuple[data.Dataset, data.Dataset]:
    """Loads the training and the test set that a config names.

    Raises:
        ValueError: no such set or split, or data that cannot be used.
        ModuleNotFoundError: the data set needs the extra `data`.
    """
    options = _data_options(config)
    train_set, test_set = (
        data.load(config.data, split, **options)
        for split in (config.train_split, config.test_split)
    )
    return train_set, test_set


def check_partitions(configs: Mapping[str, ConfigDict]) -> None:
    """Refuses configs whose agents cannot hold their data, each data set loaded once.

    Where all deal out the same data alike nothing is loaded: the first run tells as soon.

    Args:
        configs: that `check` accepts, by name.

    Raises:
        ValueError: data cannot be loaded, or not be dealt out as a config says, which is named.
        ModuleNotFoundError: a data set needs the extra `data`.
    """
    dealt: dict[tuple[str, str, int, int], str] = {}
    for name, config in configs.items():
        source = repr((config.data, config.train_split, _data_options(config)))
        dealt.setdefault((source, config.partition, config.agents, config.seed), name)
    if len(dealt) < 2:
        return
    labels: dict[str, np.ndarray] = {}
    for (source, partition, num_agents, seed), name in dealt.items():
        config = configs[name]
        try:
            if source not in labels:
                options = _data_options(config)
                if config.data.startswith("folder:"):
                    options["memory_bytes"] = 0  # leaves the images where they are
                labels[source] = data.load(config.data, config.train_split, **options).labels
            agents.partition.parse(partition)(labels[source], num_agents, seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _data_options(config: ConfigDict) -> dict[str, Any]:
    """What `data.load` takes of a config, besides name and split."""
    known = ("data_dir", "download", "image_size", "memory_bytes")
    return {name: config[name] for name in known if name in config}
