"""What does each augmentation buy, in accuracy and in calibration? Fifteen of them, three seeds.

Ordinary training: one small network, 40 epochs, Adam with a cosine schedule. Every augmentation
follows the same base (padded crops, on CIFAR-10 also flips) and has its usual settings; none was
tuned, and the length is the same for all. The base alone overfits what little data there is, which
is when augmentation can help; 40 epochs are too few for the strong ones to pay off in accuracy, as
they do in the papers after hundreds. So this compares behaviour at a small budget, above all
confidence; it ranks no method for large networks and long training.

Command:  mixlab train --config configs/augment.py --workdir runs/augment_mnist5k
Variants: configs/augment.py:mnist5k   the default: a dense network on 4,000 digits that come with
          the installation; tests on 1,000. Ops on colours leave grey images as they are.
          configs/augment.py:cifar10   a small CNN on 1,500 images; tests on 5,000. Needs the extra
          `data`, which downloads CIFAR-10, or --config.data_dir=DIR where it is prepared already.
Measured: 2026-11-25, one core of two of an AMD EPYC (Zen 4) machine, shared with other work: some
          12 minutes of processor time for mnist5k, 28 for cifar10, 48 runs each. Test accuracy and
          expected calibration error (ECE), in percent, mean and deviation of three seeds:
          mnist5k: base 96.9 ± 0.4, ECE 1.3; nothing differs from it by more than the deviations
          but downwards, save label smoothing, 97.3 ± 0.1, and mixing costs calibration: ECE
          mixup 8.8, CutMix 18.1.
          cifar10: base 51.0 ± 0.9, ECE 8.2 (too sure of itself); label smoothing 51.4 ± 1.2, ECE
          2.0; AutoAugment 51.0 ± 1.4, ECE 2.0; mixup 49.6 ± 1.0, ECE 2.9; CutMix 46.4 ± 0.4, ECE
          2.8. No method gains accuracy beyond the deviation; most of them calibrate.
          All fifteen, with figures: configs/README.md.
"""

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
