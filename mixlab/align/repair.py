"""BatchNorm statistics after a merge: those of the parents do not fit the merged weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mixlab import trees
from mixlab.types import PyTree


def reestimate_batch_stats(
    fn: Callable[[Any, Any], PyTree],
    variables: Mapping[str, PyTree],
    batches: Iterable[Any],
    *,
    momentum: float = 0.0,
    collection: str = "batch_stats",
) -> dict[str, PyTree]:
    """Replaces the running statistics by their average over `batches`, every batch alike.

    This is what BatchNorm with a cumulative average computes. Whether the variance of a batch is
    the biased one (Flax) or the unbiased one (PyTorch) is the layer's own choice and is kept.

    Args:
        fn: `fn(variables, batch)` runs the network in training mode and returns the collection as
            the batch left it; compile it first.
        variables: holds the running statistics under `collection`.
        batches: what `fn` takes, one after the other.
        momentum: the factor in [0, 1) with which the layers keep the old statistics, in Flax
            `BatchNorm.momentum` (by default 0.99 there): they then return
            `momentum * old + (1 - momentum) * batch`, which is undone here.
        collection: the key of the statistics.

    Returns:
        The variables as a dict, with the collection replaced; dtypes are kept, averages are
        computed in float32 or wider.

    Raises:
        KeyError: `variables` has no such collection.
        ValueError: no batches, momentum outside [0, 1), or `fn` returns another structure.

    Source: `reset_bn` of DIMAT (Saadati et al. 2024) and of REPAIR (Jordan et al. 2023, section 4).
    """
    if collection not in variables:
        raise KeyError(f"no collection {collection!r} among {sorted(variables)}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    old = variables[collection]
    # From zeros the old statistics drop out exactly, whatever the momentum.
    blank = {**variables, collection: jax.tree.map(jnp.zeros_like, old)}
    average: PyTree = None
    count = 0
    for batch in batches:
        seen = fn(blank, batch)
        trees.check_same_structure(old, seen, what=f"the {collection!r} before and after fn")
        seen = jax.tree.map(lambda x: x.astype(trees.wide(x.dtype)) / (1 - momentum), seen)
        count += 1
        weight = 1 / count
        average = (
            seen
            if average is None
            else jax.tree.map(lambda a, x: a + (x - a) * weight, average, seen)  # noqa: B023
        )
    if not count:
        raise ValueError("no batches: statistics need at least one")
    return {**variables, collection: jax.tree.map(lambda x, a: a.astype(x.dtype), old, average)}
