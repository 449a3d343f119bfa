"""Nine ways to train together on small photos, a network with BatchNorm; see mnist5k.py.

The first 4,000 images of CIFAR-10 at 16x16 pixels and a small CNN; all strategies keep BatchNorm in
training mode. The strategies, optimizers, topologies, partitions and seeds are those of mnist5k.py:
450 runs. Variants run a part.

Command:  mixlab sweep --config configs/dimat/cifar10.py --workdir runs/dimat_cifar10 --jobs 2
Variants: configs/dimat/cifar10.py:five   five agents only, 225 runs.
          configs/dimat/cifar10.py:resnet20   five agents, seed 0, ResNet-20 of a quarter of the
          channels: 75 runs.
Data:     downloaded on the first run, or read from --config.data_dir=DIR where it is prepared.
Measured: three seeds, five agents in two and a half hours on one core, ten in three; ResNet-20 in
          two and a half. After the last merge, even data: a ring of five wa 43.5, dimat 45.7,
          gossip 46.8, dpsgd 48.1 %, isolated agents 39.7; a ring of ten 38.0, 41.0, 41.1, 45.0,
          35.3. Tables and curves are in configs/README.md.
"""

from ml_collections import ConfigDict

from mixlab.experiment import default_config

# Optimizer -> the strategies that train with it.
OPTIMIZERS = {
    "sgd(0.05, momentum=0.9, nesterov=True)": (
        "none",
        "wa",
        "dpsgd",
        "sgp",
        "dimat",
        "gossip(align='once')",
    ),
    "sgd(0.05)": ("cdmsgd(momentum=0.9)", "cga(momentum=0.9)"),
    "sgd(0.2)": ("cdsgd",),
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "five", "resnet20"):
        raise ValueError(f"variant {variant!r} is unknown; known: five, resnet20, or none")
    config = default_config()
    config.data = "cifar10"
    config.train_split = "train[:4000]"
    config.test_split = "test[:2000]"
    config.image_size = 16
    config.augment = "random_flip"
    config.preprocess = "normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
    config.model = "resnet20(width=0.25)" if variant == "resnet20" else "cnn(features=(8, 16, 32))"
    config.batch_size = 50
    config.matching_examples = 500

    config.pretrain_epochs = 10
    config.rounds = 6
    config.epochs_per_round = 2

    strategies = tuple(strategy for own in OPTIMIZERS.values() for strategy in own)
    config.sweep.agents = (5,) if variant else (5, 10)
    config.sweep.topology = ("ring", "complete", "bipartite")
    config.sweep.partition = ("iid", "shards(classes_per_agent=2)", "dirichlet(alpha=0.5)")
    config.sweep.strategy = strategies
    config.sweep.optimizer = tuple(OPTIMIZERS)
    config.sweep.seed = (0,) if variant == "resnet20" else (0, 1, 2)
    config.sweep_skip = (
        {"strategy": "none", "topology": ("complete", "bipartite")},
        *(
            {"optimizer": optimizer, "strategy": tuple(s for s in strategies if s not in own)}
            for optimizer, own in OPTIMIZERS.items()
        ),
    )
    return config
