"""What all pairs of networks have in common: the function, the data, and the test."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mixlab import align, augment, data, experiment, models
from mixlab.align import Symmetry
from mixlab.types import Array, Batch, PyTree


class Setting(NamedTuple):
    """What matchings and repairs may use, and how the outcome is tested.

    Attributes:
        symmetry: the groups of `fn`.
        fn: `fn(variables, images) -> logits [B, K]`, in evaluation mode.
        loss: `loss(variables, batch)`, the mean cross-entropy, a scalar. BatchNorm takes the
            batch's own statistics, which fit a merge as the parents' do not.
        examples: training images, float `[N, H, W, C]`, and labels, int `[N]`, drawn at random.
        batch_size: of those who take `examples` in parts.
        test: `test(variables)`, the loss and the accuracy on the test set.
        batch_norm: whether the network keeps running statistics.
        repair: `repair(merged, models, weights)`, the merged variables with BatchNorm's statistics
            of `examples`, or without BatchNorm after REPAIR.
    """

    symmetry: Symmetry
    fn: Callable[..., Any]
    loss: Callable[[PyTree, Batch], Array]
    examples: Batch
    batch_size: int
    test: Callable[[PyTree], dict[str, float]]
    batch_norm: bool
    repair: Callable[..., PyTree]

    def batches(self, epochs: int = 1) -> list[Batch]:
        """The examples in batches of one size, in another order every epoch; a rest is dropped."""
        count = len(self.examples["label"])
        size = min(self.batch_size, count)
        order = [
            data.epoch_indices(0, epoch, count, count - count % size) for epoch in range(epochs)
        ]
        return [
            {name: x[indices] for name, x in self.examples.items()}
            for indices in np.concatenate(order).reshape(-1, size)
        ]


def prepare(config: ConfigDict, variables: PyTree) -> Setting:
    """Loads the data and finds the symmetry of the networks.

    Args:
        config: of the experiment.
        variables: of one of the networks.

    Raises:
        ValueError: a field cannot be used.
    """
    train_set, test_set = experiment.datasets(config)
    model = models.parse(config.model, train_set.num_classes)
    preprocess = augment.parse(config.preprocess)

    def prepared(images: np.ndarray) -> Array:
        return preprocess(jax.random.key(0), {"image": jnp.asarray(images)})["image"]

    count = min(config.matching_examples, len(train_set))
    chosen = train_set.batch(np.sort(data.epoch_indices(0, 0, len(train_set), count)))
    examples = {"image": prepared(chosen["image"]), "label": jnp.asarray(chosen["label"])}
    tested = list(experiment.test_batches(test_set, config.eval_batch_size, prepared))
    tally = jax.jit(lambda variables, batch: experiment.tally(model, variables, batch))

    def test(variables: PyTree) -> dict[str, float]:
        sums = [jax.device_get(tally(variables, batch)) for batch in tested]
        scores = experiment.scores({name: sum(s[name] for s in sums) for name in sums[0]})
        return {name: float(scores[name]) for name in ("loss", "accuracy")}

    def loss(variables: PyTree, batch: Batch) -> Array:
        logits, _ = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    fn = model.apply  # once: every look makes another object, which JAX would compile again
    batch_norm = "batch_stats" in variables
    reestimate = jax.jit(experiment.reestimation(model, variables))

    def repair(merged: PyTree, parents: Sequence[PyTree], weights: Array) -> PyTree:
        if batch_norm:
            return reestimate(merged, examples["image"])
        return align.repair(fn, merged, parents, [examples["image"]], weights=weights)

    return Setting(
        symmetry=align.infer_symmetry(fn, variables, examples["image"][:2]),
        fn=fn,
        loss=loss,
        examples=examples,
        batch_size=config.batch_size,
        test=test,
        batch_norm=batch_norm,
        repair=repair,
    )
