"""How high is the barrier between two networks trained apart, before and after matching them?

Two networks are trained on the same data from different initialisations, in different orders. On
the line between them the loss and the accuracy on the test set are measured, as they are, after
the units of one were brought into the order of the other's by each matching of mixlab.align, and
with statistics repaired: BatchNorm's estimated anew, or REPAIR where there is no BatchNorm.

Command:  mixlab barrier --config configs/align.py --workdir runs/align
Variants: configs/align.py:mnist5k   the default: three dense layers of 512 units; three pairs.
          configs/align.py:cifar10   ResNet-20 on 20,000 images of 16x16. Needs the extra `data`,
          which downloads CIFAR-10, or --config.data_dir=DIR where it is prepared already.
          configs/align.py:vit       a small vision transformer on mnist5k; one pair.
Measured: 2026-11-25, two cores (AMD EPYC, Zen 4), shared with other work: mnist5k 5 minutes,
          cifar10 30, vit 5. Barrier of the accuracy in points: as trained, after weight matching,
          after matching activations by correlation, and after that repaired:
          mnist5k: 15.2 ± 2.4, 3.0 ± 0.8, 0.8 ± 0.3, 0.6 ± 0.4.
          cifar10: 58.1, 47.4, 43.0, 16.6.
          vit: 78.9, 79.2, 75.9, 74.9.
          All matchings, beside the published results: configs/README.md.
"""

from ml_collections import ConfigDict

from mixlab.barrier import default_config

MATCHINGS = (
    "none",
    "weight_matching",
    "activation_matching('correlation')",
    "activation_matching('second_moment')",
    "straight_through(epochs=5)",
    "sinkhorn_matching(data=False)",
)


def get_config(variant: str = "mnist5k") -> ConfigDict:
    if variant not in ("mnist5k", "cifar10", "vit"):
        known = "mnist5k (the default), cifar10, vit"
        raise ValueError(f"variant {variant!r} is unknown; known: {known}")
    config = default_config()
    config.matchings = MATCHINGS
    if variant == "mnist5k":
        config.model = "mlp(hidden=(512, 512, 512))"
        config.optimizer = "adam(cosine_decay_schedule(1e-3, 800))"  # 40 steps an epoch
        config.batch_size = 100
        config.epochs = 20
        config.seeds = (0, 1, 2, 3, 4, 5)
    elif variant == "vit":
        config.model = "vit(size='micro', patch=7)"
        config.optimizer = "adam(warmup_cosine_decay_schedule(0.0, 1e-3, 80, 800))"
        config.batch_size = 100
        config.epochs = 20
    else:
        config.data = "cifar10"
        config.train_split = "train[:40%]"
        config.test_split = "test[:40%]"
        config.image_size = 16
        config.augment = "random_crop(padding=2) | random_flip"
        config.preprocess = "normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
        config.model = "resnet20"
        config.optimizer = (
            "add_decayed_weights(5e-4) | "
            "sgd(warmup_cosine_decay_schedule(0.0, 0.1, 156, 1560), momentum=0.9, nesterov=True)"
        )
        config.batch_size = 128
        config.epochs = 10
    return config
