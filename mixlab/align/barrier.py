"""The loss barrier: how much worse a model gets on the straight way to another one."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, PyTree

_ABOVE = ("line", "mean")


class Barrier(NamedTuple):
    """Metrics along the line between two models, and how far they leave the straight line.

    Attributes:
        t: `[T]`, the share of the second model, from 0 to 1.
        values: metric -> `[T]`, its value there.
        barrier: metric -> the largest rise above the straight line between the values at the two
            ends, or above their mean, in the metric's own unit; of a metric where more is better,
            the largest fall below it. At least 0; NaN where the metric is NaN somewhere.
    """

    t: np.ndarray
    values: dict[str, np.ndarray]
    barrier: dict[str, float]


def barrier(
    evaluate: Callable[[PyTree], Mapping[str, ArrayLike]],
    reference: PyTree,
    others: Mapping[str, PyTree],
    *,
    points: int = 25,
    post: Callable[[PyTree, tuple[PyTree, PyTree], Array], PyTree] | None = None,
    more_is_better: Collection[str] = ("accuracy",),
    above: str = "line",
) -> dict[str, Barrier]:
    """Evaluates the models on the line between the reference and each of the others.

    `mixlab.figures.barriers` draws the result. To compare, join several: `barrier(evaluate, a,
    {"as trained": b, "matched": c}) | barrier(evaluate, a, {"matched, REPAIR": c}, post=mend)`.

    Args:
        evaluate: `evaluate(variables)` gives a number for each metric, such as
            `{"loss": ..., "accuracy": ...}`; compile it first.
        reference: the variables at t = 0. Leaves that are not floating are those of the reference
            along the whole line.
        others: name -> the variables at t = 1, such as the other model as trained and permuted by
            each matching.
        points: T, at least 3: evenly spaced, both ends included.
        post: `post(merged, models, weights)` mends the model at a point between the ends, with
            `models = (reference, other)` and `weights = [1 - t, t]`, such as
            `lambda merged, models, weights: repair(fn, merged, models, batches, weights=weights)`
            or `lambda merged, *_: reestimate_batch_stats(train, merged, batches)`.
        more_is_better: the metrics of which more is better; their barrier is a fall.
        above: above what it is a rise: `"line"`, the straight line between the two ends, or
            `"mean"`, the mean of the two, which a model worse than the other lies above itself.

    Returns:
        A `Barrier` for each of the others. Models are interpolated in float32 or wider and have
        the dtypes of the reference.

    Raises:
        ValueError: fewer than 3 points, no other models, one of another structure, or an unknown
            `above`.
        TypeError: `evaluate` does not return a mapping of single numbers.

    Source: the barrier over the linear interpolation of the two ends is that of Entezari et al.
    2022, "The role of permutation invariance in linear mode connectivity", definition 1. Frankle
    et al. 2020 and the figures of Git Re-Basin (Ainsworth et al. 2023) take the mean of the two
    ends, which is the same where both are equally good.
    """
    if above not in _ABOVE:
        raise ValueError(f"above is unknown: {above!r}; {nearest(str(above), _ABOVE)}")
    if points < 3:
        raise ValueError(f"points must be at least 3, of which two are the ends, got {points}")
    if not others:
        raise ValueError("no other models: give a name and variables for at least one")
    own: Any = jax.tree.structure(reference)
    if own == jax.tree.structure(others):
        raise ValueError("others maps names to variables: write {'name': variables}")
    for name, other in others.items():
        trees.check_same_structure(reference, other, what=f"the reference and {name!r}")
    t = np.linspace(0, 1, points)

    def along(other: PyTree) -> Barrier:
        rows = []
        for share in t:
            weights = jnp.asarray([1 - share, share], jnp.float32)
            model = _between(reference, other, weights)
            if post is not None and 0 < share < 1:
                model = post(model, (reference, other), weights)
            rows.append(_checked(evaluate(model)))
        values = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
        heights = {
            name: _height(t, -curve if name in more_is_better else curve, above)
            for name, curve in values.items()
        }
        return Barrier(t, values, heights)

    return {name: along(other) for name, other in others.items()}


@jax.jit
def _between(first: PyTree, second: PyTree, weights: Array) -> PyTree:
    def leaf(name: str, a: Any, b: Any) -> Any:
        if not trees.is_inexact(a):
            return a
        dtype = trees.wide(jnp.result_type(a))
        low, high = weights.astype(dtype)
        mixed = low * jnp.asarray(a, dtype) + high * jnp.asarray(b, dtype)
        return mixed.astype(jnp.result_type(a))

    return trees.map_named(leaf, first, second)


def _checked(metrics: Any) -> Mapping[str, ArrayLike]:
    if not isinstance(metrics, Mapping) or not all(np.size(x) == 1 for x in metrics.values()):
        raise TypeError(
            "evaluate must return a mapping of single numbers, such as {'loss': ..., "
            f"'accuracy': ...}}, got {jax.tree.map(np.shape, metrics)}"
        )
    return metrics


def _height(t: np.ndarray, curve: np.ndarray, above: str) -> float:
    t = t if above == "line" else np.full_like(t, 0.5)
    return float(np.max(curve - ((1 - t) * curve[0] + t * curve[-1])))
