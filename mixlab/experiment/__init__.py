"""What a config means: `prepare` makes it real, `mixlab.train` runs it."""

from mixlab.experiment.config import OPTIMIZERS, check, datasets, default_config
from mixlab.experiment.preparation import Experiment, prepare
from mixlab.experiment.programs import Carry, Programs
from mixlab.experiment.scoring import reestimation, scores, tally, test_batches

__all__ = [
    "OPTIMIZERS",
    "Carry",
    "Experiment",
    "Programs",
    "check",
    "datasets",
    "default_config",
    "prepare",
    "reestimation",
    "scores",
    "tally",
    "test_batches",
]
