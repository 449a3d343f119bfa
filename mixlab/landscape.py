"""The loss in the plane through three models, and where merges lie in it.

In a notebook: `landscape.draw(loss, {"a": a, "b": b, "c": c}, {"average": average, "ties": ties})`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mixlab import figures, trees
from mixlab.types import Array, PyTree


class Landscape(NamedTuple):
    """A score over the plane through three models.

    Distances are Euclidean, in weights. The first model is the origin, the second lies on the x
    axis, the third above it.

    Attributes:
        x: `[X]`, where the score was taken along the x axis.
        y: `[Y]`, likewise.
        values: `[Y, X]`, the score there.
        models: name -> `(x, y, distance off the plane, score)`: the three, with distance 0.
        marks: the same of the other models; x and y are of the nearest point of the plane, the
            score is the model's own.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    models: dict[str, tuple[float, float, float, float]]
    marks: dict[str, tuple[float, float, float, float]]


def measure(
    score: Callable[[PyTree], Array],
    models: Mapping[str, PyTree],
    marks: Mapping[str, PyTree] | None = None,
    *,
    points: int = 25,
    margin: float = 0.3,
) -> Landscape:
    """Takes the score on a grid in the plane of three models, and at further models.

    Args:
        score: `params -> a number`, e.g. the loss on some examples; it is jitted.
        models: name -> params, three of one structure that do not lie on a line. Integer, bool and
            None leaves are those of the first.
        marks: name -> params, of the same structure: merges, the base.
        points: of the grid along the longer side, at least 2.
        margin: how far the grid goes beyond the models and marks, as a fraction of their extent.

    Raises:
        ValueError: there are not three models, they differ in structure, or lie on a line; the
            score is nowhere finite.

    Source: Garipov et al. 2018, "Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    section 3 (the plane), but with the spacing the same on both axes.
    """
    marks = marks or {}
    if len(models) != 3:
        raise ValueError(f"a plane goes through three models, got {len(models)}: {list(models)}")
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    first, *others = models.values()
    for name, model in {**models, **marks}.items():
        trees.check_same_structure(first, model, what=f"{next(iter(models))!r} and {name!r}")

    # Whatever lies in the plane is the first model plus multiples of two edges. The lower
    # triangle L of edges edges^T = L L^T holds their coordinates in an orthonormal basis.
    edges = [_minus(model, first) for model in others]
    products = np.array([[_dot(a, b) for b in edges] for a in edges])
    # The determinant is that of perpendicular edges times the squared sine of their angle.
    if np.linalg.det(products) <= 1e-6 * products[0, 0] * products[1, 1]:
        raise ValueError(f"the models {', '.join(models)} lie on a line and span no plane")
    lower = np.linalg.cholesky(products)

    def at(weights: Array) -> PyTree:
        def leaf(name: str, *own: Array) -> Array:
            origin, *steps = own
            if not trees.is_inexact(origin):
                return origin
            parts = (w.astype(step.dtype) * step for w, step in zip(weights, steps, strict=True))
            return (origin + sum(parts)).astype(jnp.result_type(origin))

        return trees.map_named(leaf, first, *edges)

    own_score = jax.jit(score)
    score_at = jax.jit(lambda weights: score(at(weights)))

    def place(model: PyTree) -> tuple[float, float, float, float]:
        difference = _minus(model, first)
        along = np.array([_dot(edge, difference) for edge in edges])
        weights = np.linalg.solve(products, along)
        off = _minus(model, at(jnp.asarray(weights, jnp.float32)))
        x, y = weights @ lower
        return float(x), float(y), float(np.sqrt(_dot(off, off))), float(own_score(model))

    corners = {
        name: (float(x), float(y), 0.0, float(own_score(model)))
        for (name, model), (x, y) in zip(models.items(), [(0, 0), *lower], strict=True)
    }
    placed = {name: place(model) for name, model in marks.items()}
    spots = np.array([spot[:2] for spot in (*corners.values(), *placed.values())])
    low, high = spots.min(axis=0), spots.max(axis=0)
    extent = margin * (high - low)
    low, high = low - extent, high + extent
    step = max(high - low) / (points - 1)
    x, y = (a + step * np.arange(round((b - a) / step) + 1) for a, b in zip(low, high, strict=True))
    weights = np.stack(np.meshgrid(x, y), axis=-1) @ np.linalg.inv(lower)
    values = [[float(score_at(jnp.asarray(w, jnp.float32))) for w in row] for row in weights]
    if not np.any(np.isfinite(values)):
        raise ValueError("the score is a finite number nowhere on the plane")
    return Landscape(x, y, np.array(values), corners, placed)


def draw(
    score: Callable[[PyTree], Array],
    models: Mapping[str, PyTree],
    marks: Mapping[str, PyTree] | None = None,
    *,
    label: str = "loss",
    points: int = 25,
    margin: float = 0.3,
) -> Figure:
    """Draws what `measure` takes: a map of the score, the three models, and the marks upon it.

    Args:
        score: as for `measure`.
        models: likewise.
        marks: likewise.
        label: what the score is called.
        points: as for `measure`.
        margin: likewise.
    """
    found = measure(score, models, marks, points=points, margin=margin)
    return figures.landscape(*found, label=label)


def _minus(a: PyTree, b: PyTree) -> PyTree:
    """`a - b` in float32 or wider; None in place of what is not floating."""

    def leaf(name: str, x: Array, y: Array) -> Array | None:
        if not trees.is_inexact(x):
            return None
        wide = trees.wide(jnp.result_type(x))
        return jnp.asarray(x, wide) - jnp.asarray(y, wide)

    return trees.map_named(leaf, a, b)


def _dot(a: PyTree, b: PyTree) -> float:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(jnp.vdot(x, y, precision="highest")) for x, y in leaves)
