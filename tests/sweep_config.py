"""A sweep of three small runs, one of which diverges; also read as a config file."""

from ml_collections import ConfigDict

from tests.run_config import get_config as one_run


def get_config() -> ConfigDict:
    config = one_run()
    config.augment = "identity"
    config.agents = 2
    config.sweep.optimizer = ("adam(1e-2)", "sgd(1e30)")
    config.sweep.strategy = ("none", "wa")
    config.sweep_skip = ({"optimizer": "sgd(1e30)", "strategy": ("wa", "dimat")},)
    return config
