"""placeholder"""

from ml_collections import ConfigDict

from mixlab.experts import default_config


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
        config.test_split = "test[:20%]"
        config.preprocess = "normalize(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))"
        config.tasks = tuple(
            f"classes({a}, {b})" for a, b in ((0, 8), (1, 9), (2, 6), (3, 5), (4, 7))
        )
        config.model = "cnn(features=(16, 32, 64), norm='group')"
        config.optimizer = "adam(1e-3)"
        config.pretrain_steps = 100
        config.tune_steps = 300
    config.methods = (
        "average", "fisher", "task_arithmetic(0.3)", "ties(0.2, 1.0)", "ties(0.2, 0.3, reduce='sum')"
    )
    config.marks = ("average", "task_arithmetic(0.5)", "ties(0.2, 1.0)", "fisher")
    config.pair_methods = ("average", "slerp(0.5)")
    return config
