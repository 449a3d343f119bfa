"""What a config means: `prepare` makes it real, `mixlab.train` runs it."""

from mixlab.experiment.config import OPTIMIZERS, check, datasets, default_config
from mixlab.experiment.preparation import Carry, Experiment, prepare
from mixlab.experiment.scoring import reestimation, scores, tally, test_batches

__all__ = [
    "OPTIMIZERS",
    "Carry",
    "Experiment",
    "check",
    "datasets",
    "default_config",
    "prepare",
    "reestimation",
    "scores",
    "tally",
    "test_batches",
]
