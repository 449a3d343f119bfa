"""What do agents that fail cost those that do not? Ten agents on a ring, three kinds of fault.

One in five agents is absent from a round and comes back with what it had; or what one in five sends
is a round old; or one in five messages is lost. With averaging, D-PSGD, SGP and DIMAT, on even data
and on two classes an agent; three seeds, 96 runs. The report tells what happened in which round.

Command:  mixlab sweep --config configs/dimat/faults.py --workdir runs/dimat_faults --jobs 2
Data:     5,000 real handwritten digits that come with the installation (4,000 to train on).
Measured: 33 minutes on one core. With even data an absence costs 1.3 to 3.0 points, late and lost
          messages at most half a point, of SGP 2.5. Table and figures are in configs/README.md.
"""

from ml_collections import ConfigDict

from mixlab.experiment import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data = "mnist5k"
    config.model = "mlp(hidden=(128, 128, 128))"
    config.optimizer = "sgd(0.05, momentum=0.9, nesterov=True)"
    config.batch_size = 50
    config.backend = "vmap"  # the agents of a small network are fastest as one batch
    config.matching_examples = 500

    config.agents = 10
    config.topology = "ring"
    config.pretrain_epochs = 10
    config.rounds = 10
    config.epochs_per_round = 2

    config.sweep.partition = ("iid", "shards(classes_per_agent=2)")
    config.sweep.faults = ("none", "dropout(0.2)", "late(0.2)", "lost(0.2)")
    config.sweep.strategy = ("wa", "dpsgd", "sgp", "dimat")
    config.sweep.seed = (0, 1, 2)
    return config
