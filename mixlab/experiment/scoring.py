"""How good models are: accuracy, loss and calibration over a test set."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixlab import align, data, models
from mixlab.types import Array, Batch, PyTree

CALIBRATION_BINS = 15
"""Bins of equal width into which `test_ece` sorts the confidences, as Guo et al. do."""


def tally(model: Any, variables: PyTree, batch: Batch) -> dict[str, Array]:
    """Sums over the examples of `batch` whose label is not -1 (padding), for `scores`.

    An example's confidence is its largest probability; `gap` [CALIBRATION_BINS] holds, of each bin
    of confidence, (0, 1/M], ..., (1 - 1/M, 1], the sum of right - confidence.
    """
    logits = model.apply(variables, batch["image"]).astype(jnp.float32)
    real = batch["label"] >= 0
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["label"], 0))
    right = jnp.argmax(logits, -1) == batch["label"]
    confidence = jnp.max(jax.nn.softmax(logits), -1)
    bins = jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1
    gap = jnp.where(real, right - confidence, 0.0)
    return {
        "accuracy": jnp.sum(right & real, dtype=jnp.float32),
        "confidence": jnp.sum(jnp.where(real, confidence, 0.0)),
        "gap": jax.ops.segment_sum(gap, bins, CALIBRATION_BINS),
        "loss": jnp.sum(jnp.where(real, loss, 0.0)),
        "examples": jnp.sum(real, dtype=jnp.float32),
    }


def scores(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over the test set, [A], from the sums of `tally`, leaves [A, ...].

    The expected calibration error is the mean over bins, weighted by their examples, of the
    distance between accuracy and mean confidence. Weight times distance is `gap` over all examples.

    Source: Guo et al. 2017, "On calibration of modern neural networks", s. 2.
    """
    examples = sums["examples"]
    means = {name: sums[name] / examples for name in ("accuracy", "loss", "confidence")}
    return {**means, "ece": np.abs(sums["gap"]).sum(axis=-1) / examples}


def test_batches(
    test_set: data.Dataset, size: int, prepared: Callable[[np.ndarray], Array]
) -> Iterator[Batch]:
    """The test set in batches of equal size; the last is padded with label -1."""
    size = min(size, len(test_set))
    for start in range(0, len(test_set), size):
        indices = np.arange(start, start + size)
        batch = test_set.batch(np.minimum(indices, len(test_set) - 1))
        label = np.where(indices < len(test_set), batch["label"], -1)
        yield {"image": prepared(batch["image"]), "label": label}


def reestimation(model: Any, variables: PyTree) -> Callable[[PyTree, Array], PyTree]:
    """How BatchNorm statistics are re-estimated; nothing to do for a model that has none."""
    if "batch_stats" not in variables:
        return lambda variables, images: variables

    def seen(variables: PyTree, images: Array) -> PyTree:
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    def reestimated(variables: PyTree, images: Array) -> PyTree:
        momentum = models.BATCH_NORM_MOMENTUM
        return align.reestimate_batch_stats(seen, variables, [images], momentum=momentum)

    return reestimated
