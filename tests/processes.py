"""`mixlab train` for a small run, as one of several processes.

`python -m tests.processes train FOLDER[:STEPS] ...` runs it in one folder after the other; after
STEPS steps there, the last process sends itself SIGTERM.
"""

import os
import signal
import sys
import time

import jax
from ml_collections import ConfigDict

from mixlab import distributed, train
from tests import run_config


def get_config() -> ConfigDict:
    config = run_config.get_config()
    config.devices = 4  # of all processes together
    config.augment = "identity"
    config.pretrain_epochs = 1
    config.model = "mlp(hidden=(16,))"
    return config


def run(folder: str, steps: int = 0) -> None:
    prepare = train.prepare

    def preparing(config):
        experiment = prepare(config)
        left = [steps]

        def step(*args):
            left[0] -= 1
            if left[0] == 0 and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if steps and left[0] <= 0:
                time.sleep(0.5)  # these steps are far shorter than any that are worth saving
            return experiment.step(*args)

        # Without the test of consensus, half of what is compiled.
        return experiment._replace(
            step=step, consensus=lambda variables, number: {"consensus_accuracy": 0.0}
        )

    train.prepare, train.report.write = (
        preparing,
        lambda workdir: workdir,
    )  # it has tests of its own
    try:
        train.train(get_config(), folder)
    except train.Stopped as stopped:
        print(stopped)
    finally:
        train.prepare = prepare


if __name__ == "__main__":
    distributed.initialize()
    # One folder after the other compiles the same programs.
    jax.config.update("jax_compilation_cache_dir", sys.argv[2].split(":")[0] + "_cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for argument in sys.argv[2:]:
        place, _, count = argument.partition(":")
        run(place, int(count or 0))
