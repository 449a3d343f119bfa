"""What is left of five experts when they are merged? Every method of mixlab.merge, three seeds.

One network is trained a little on plain data and then, five times, on a task of its own. The
experts are merged, and the merges are tested on all five tasks, each among its own classes, as if
it had a head of its own. Methods have the arguments that their papers or FusionBench give them. In
a second column, what a method adds to the base is scaled by one of eight factors, the same for all
methods, chosen on held-out training examples. No network has BatchNorm, so that merged parameters
are a model as they stand: the dense one has no normalisation, the CNN has GroupNorm.

Command:  mixlab experts --config configs/experts.py --workdir runs/experts
Variants: configs/experts.py:mnist5k   the default: a dense network; digits turned, inverted, with
          permuted pixels, and upside down in two halves of the classes, none of which the base
          knows.
          configs/experts.py:cifar10   a small CNN on 20,000 images of 16x16; five pairs of classes
          that look alike, all of which the base has seen. Needs the extra `data`, which downloads
          CIFAR-10, or --config.data_dir=DIR where it is prepared already.
Measured: 2026-11-25 and 30, two cores (AMD EPYC, Zen 4), shared with other work: 7 minutes for
          mnist5k, 8 for cifar10, three seeds each. Average accuracy over the tasks, in percent:
          mnist5k: base 20.9 ± 1.5, average 39.4 ± 1.7, task arithmetic 49.5 ± 2.1, Fisher 57.0 ±
          3.1, TIES 59.5 ± 5.1, RegMean 74.2 ± 0.9, TALL masks 89.1 ± 0.8, experts 92.7 ± 0.3.
          cifar10: base 64.1 ± 1.9, average 67.5 ± 0.6, experts 73.7 ± 1.7; nothing that makes one
          model differs from the average by more than the deviations but downwards.
          All methods, beside the published results of CLIP: configs/README.md.
"""

from ml_collections import ConfigDict

from mixlab.experts import default_config

METHODS = (
    # Averages, by the models' weights alone and by what the models do with data.
    "average",
    "fisher",
    "regmean",
    "regmean_plus_plus",
    "greedy_soup",
    # Task vectors.
    "task_arithmetic(scale=0.3)",
    "ties(density=0.2, scale=1.0)",
    "ties(density=0.2, scale=0.3, reduce='sum')",
    "dare(density=0.1, scale=0.3)",
    "della(density=0.3, epsilon=0.15)",
    "breadcrumbs(density=0.2, gamma=0.01, scale=0.3)",
    "magmax(scale=0.6)",
    "sce(select_topk=1.0)",
    "pcb(ratio=0.1)",
    "ram",
    "ram_plus",
    "consensus(k=2, lam=0.4, scale=0.3)",
    # Geometry and spectra.
    "multislerp",
    "karcher",
    "model_stock",
    "iso_c(fold=True)",
    "iso_cts(fold=True)",
    "tsv(fold=True)",
    # Robust aggregation: rules against faulty models, of which there are none here.
    "median",
    "geometric_median",
    "trimmed_mean(num_byzantine=1)",
    "phocas(num_byzantine=1)",
    "meamed(num_byzantine=1)",
    "krum(num_byzantine=1)",
    "multi_krum(num_byzantine=1)",
    "mda(num_byzantine=1)",
    "monna(num_byzantine=1)",
    "smea(num_byzantine=1)",
    "caf(num_byzantine=1)",
    "bulyan(num_byzantine=0)",
    "centered_clipping(radius=1.0)",
    "flag(rank=3)",
    # A model for each task.
    "emr",
    "tall_masks(lam=0.4)",
    "twin(density=0.1, scale=0.3)",
)
PAIR_METHODS = (
    "interpolate(t=0.5)",
    "slerp(t=0.5)",
    "nuslerp(t=0.5)",
    "nearswap(t=0.003)",
    "arcee_fusion",
)
NOT_HERE = ("ema", "swa")
"""Averages over the course of one training, not over experts."""


def get_config(variant: str = "mnist5k") -> ConfigDict:
    if variant not in ("mnist5k", "cifar10"):
        raise ValueError(f"variant {variant!r} is unknown; known: mnist5k (the default), cifar10")
    config = default_config()
    config.data = variant
    if variant == "mnist5k":
        config.preprocess = "normalize(mean=(0.5,), std=(0.5,))"
        config.tasks = (
            "rotated",
            "inverted",
            "permuted",
            "flipped | classes(0, 1, 2, 3, 4)",
            "flipped | classes(5, 6, 7, 8, 9)",
        )
    else:
        config.train_split = "train[:40%]"
        config.validation = 0.05
        config.image_size = 16
        config.test_split = "test[:20%]"
        config.preprocess = "normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
        config.tasks = tuple(
            f"classes({a}, {b})" for a, b in ((0, 8), (1, 9), (2, 6), (3, 5), (4, 7))
        )
        config.model = "cnn(features=(8, 16, 32), norm='group')"
        config.optimizer = "adam(3e-3)"
        config.pretrain_steps = 100
        config.tune_steps = 200
    config.methods = METHODS
    config.pair_methods = PAIR_METHODS
    config.marks = (
        "average",
        "task_arithmetic(0.5)",
        "ties(0.2)",
        "fisher",
        "regmean",
    )
    return config
