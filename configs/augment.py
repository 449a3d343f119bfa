"""What does each augmentation buy, in accuracy and in calibration? Sixteen of them, three seeds."""

from ml_collections import ConfigDict

from mixlab.experiment import default_config

METHODS = (
    "label_smoothing(0.1)",
    "mixup(1.0)",
    "cutmix(1.0)",
    "one_of(mixup(0.8), cutmix(1.0))",
    "resizemix",
    "fmix",
    "smoothmix",
    "gridmix",
    "cutout(16)",
    "random_erasing",
    "randaugment(2, 9)",
    "trivialaugment",
    "autoaugment('cifar10')",
    "augmix",
    "three_augment",
)


def get_config(variant: str = "mnist5k") -> ConfigDict:
    if variant not in ("mnist5k", "cifar10"):
        raise ValueError(f"variant {variant!r} is unknown; known: mnist5k (the default), cifar10")
    config = default_config()
    config.data = variant
    config.batch_size = 100

    # One agent, who has nobody to communicate with: ordinary training, for 40 epochs. It is
    # evaluated after each round.
    config.agents = 1
    config.strategy = "none"
    config.pretrain_epochs = 0
    config.rounds = 5
    config.epochs_per_round = 8

    if variant == "mnist5k":
        base = "random_crop(padding=2)"
        config.preprocess = "to_float"
        config.model = "mlp(hidden=(256, 256, 256))"
        config.optimizer = "adam(cosine_decay_schedule(1e-3, 1600))"  # 40 steps an epoch
    else:
        base = "random_crop(padding=4) | random_flip"
        config.train_split = "train[:3%]"
        config.test_split = "test[:50%]"
        config.preprocess = "normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
        config.model = "cnn(features=(8, 32, 64))"
        config.optimizer = "adam(cosine_decay_schedule(3e-3, 600))"  # 15 steps an epoch

    config.sweep.augment = (base, *(f"{base} | {method}" for method in METHODS))
    config.sweep.seed = (0, 1, 2)
    return config
