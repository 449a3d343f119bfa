"""DIMAT on CIFAR-10: five agents on a ring, ResNet-20 eight times as wide, by TensorFlow Datasets.

The recipe is that of the paper's code (Saadati et al., CVPR 2024): 100 epochs of local training
from different initialisations, Adam at 1e-3, batch 100, then 100 rounds of merging and two local
epochs, the optimizer new after each merge; flips and padded crops. Matching and BatchNorm
re-estimation use 1,000 training images here, all 50,000 there: the activations of all agents are
held at once, about 3.7 MB an image and agent at this width, some 20 GB in all.

Command:  mixlab train --config configs/cifar10_dimat.py --workdir runs/cifar10_dimat
Variants: configs/cifar10_dimat.py:smoke   the same program in minutes on a CPU: width 1, four
          epochs of 1,600 images. It shows that everything runs, not how well it does.
Measured: smoke on two CPU cores (2026-11): 2.5 minutes in all, test accuracy after the last merge
          21.8 % (mean of the agents), of the aligned consensus 21.1 %, of the plain average 13.1 %.
          The full recipe is for an accelerator and has not been run yet.
Data:     downloaded on the first run, or read from --config.data_dir=DIR where it is prepared.
"""

from ml_collections import ConfigDict

from mixlab.experiment import default_config


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"variant {variant!r} is unknown; known: smoke, or none")
    config = default_config()
    config.data = "cifar10"
    config.augment = "random_flip | random_crop(padding=4)"
    config.preprocess = "normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
    config.model = "resnet20(width=8)"
    config.optimizer = "adam(1e-3)"
    config.batch_size = 100

    config.agents = 5
    config.topology = "ring"
    config.partition = "iid"
    config.strategy = "dimat"
    config.matching_examples = 1000

    config.pretrain_epochs = 100
    config.rounds = 100
    config.epochs_per_round = 2

    if variant == "smoke":
        config.train_split = "train[:1600]"
        config.test_split = "test[:1000]"
        config.model = "resnet20"
        config.batch_size = 32
        config.matching_examples = 250
        config.pretrain_epochs = 2
        config.rounds = 2
        config.epochs_per_round = 1
    return config
