"""What is in the models, before and after they are merged."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core
from mixlab.types import Array, PyTree


def report(
    models: PyTree,
    *,
    base: PyTree | None = None,
    merged: PyTree | None = None,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measures models leaf by leaf: how far they moved, and how far they agree.

    A "task vector" is a model minus the base, or the model itself where there is no base.

    Args:
        models: M models, a list or one stacked tree.
        base: the model that they were fine-tuned from.
        merged: what became of them: one model, or several stacked.
        notes: what else is to be said of a leaf, by name.

    Returns:
        Plain numbers and lists: `"models"` M; `"leaves"`, by name a dict of `norm [M]` of the task
        vectors; `cosine [M, M]` between them (0 where one is zero); `distance [M, M]` of the
        models from each other; `conflict`, the fraction of entries where one is positive and
        another negative; `size`, the number of entries; `not_finite`, how many entries of all the
        models are infinite or NaN; and with `merged` also `merged_norm` of its task vector (a list
        of several), `kept`, the fraction of its entries that are not zero, and
        `merged_not_finite`. `"copied"`, by name: whether the models differ in a leaf that was
        copied, not merged. `"notes"` as they were given.

    Raises:
        ValueError: models, base or merged do not match; the message names the leaf.
        TypeError: a leaf is complex.
    """
    opened = core.open_models(models, base)
    results = None
    if merged is not None:
        is_one = opened.several(merged) is None
        results = core.open_models([merged] if is_one else merged, opened.template).leaves

    def row(name: str, stacked: Array) -> dict[str, Any]:
        core.check_real(name, stacked.dtype, "report")
        origin = jnp.zeros(stacked.shape[1:], stacked.dtype)
        if opened.base is not None:
            origin = opened.base.read(name)
        numbers = _measure(stacked, origin)
        if results is not None:
            of_merged = _measure(results.read(name), origin)
            numbers["merged_norm"] = of_merged["norm"][0] if is_one else of_merged["norm"]
            numbers["kept"] = of_merged["nonzero"]
            numbers["merged_not_finite"] = of_merged["not_finite"]
        del numbers["nonzero"]
        measured = {what: np.asarray(value).tolist() for what, value in numbers.items()}
        return measured | {"size": origin.size}

    return {
        "models": opened.leaves.num_models,
        "leaves": opened.leaves.each(row),
        "copied": {name: opened.differ(name) for name in opened.copied},
        "notes": dict(notes or {}),
    }


@jax.jit
def _measure(stacked: Array, origin: Array) -> dict[str, Array]:
    taus = (stacked - origin).reshape(stacked.shape[0], -1)
    norms = jnp.sqrt(jnp.sum(jnp.square(taus), axis=1))
    units = taus / jnp.where(norms > 0, norms, 1)[:, None]
    distances = [jnp.sqrt(jnp.sum(jnp.square(taus - tau), axis=1)) for tau in taus]
    conflicts = jnp.any(taus > 0, axis=0) & jnp.any(taus < 0, axis=0)
    size = max(taus.shape[1], 1)
    return {
        "norm": norms,
        "cosine": jnp.matmul(units, units.T, precision="highest"),
        "distance": jnp.stack(distances),
        "conflict": jnp.sum(conflicts) / size,
        "not_finite": jnp.sum(~jnp.isfinite(stacked)),
        "nonzero": jnp.sum(taus != 0) / taus.size if taus.size else jnp.zeros(()),
    }


def table(report: dict[str, Any]) -> str:
    """A report as text, a line a leaf; distance and cosine are means over the pairs of models."""
    header = ["leaf", "norm", "distance", "cosine", "conflict", "not finite"]
    has_merged = any("kept" in numbers for numbers in report["leaves"].values())
    rows = [header + (["merged norm", "kept"] if has_merged else [])]
    above = np.triu_indices(report["models"], 1)
    for name, numbers in report["leaves"].items():
        distances, cosines = (np.asarray(numbers[key])[above] for key in ("distance", "cosine"))
        cells = [
            name,
            _numbers(numbers["norm"]),
            f"{distances.mean():.3g}" if distances.size else "-",
            f"{cosines.mean():.3f}" if cosines.size else "-",
            f"{numbers['conflict']:.1%}",
            str(numbers["not_finite"]),
        ]
        if has_merged:
            norms = np.atleast_1d(numbers["merged_norm"]).tolist()
            cells += [_numbers(norms), f"{numbers['kept']:.1%}"]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for name, differ in report["copied"].items():
        if name not in report["notes"]:
            lines.append(f"{name}  copied" + (", though the models differ in it" if differ else ""))
    lines += [f"{name}  {note}" for name, note in report["notes"].items()]
    return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    """All of a few, the range of many."""
    shown = values if len(values) <= 4 else [min(values), max(values)]
    return (" " if shown is values else " to ").join(f"{value:.3g}" for value in shown)
