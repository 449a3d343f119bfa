"""A small experiment for tests, also read as a config file: seconds on two cores."""

from ml_collections import ConfigDict

from mixlab.experiment import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data = "digits"
    config.augment = "random_crop(padding=1) | mixup(alpha=0.2)"
    config.model = "mlp(hidden=(32,))"
    config.optimizer = "adam(1e-2)"
    config.batch_size = 32
    config.agents = 4
    config.partition = "iid"
    config.strategy = "dimat"
    config.matching_examples = 64
    config.pretrain_epochs = 2
    config.rounds = 2
    config.epochs_per_round = 1
    config.eval_batch_size = 128
    return config
