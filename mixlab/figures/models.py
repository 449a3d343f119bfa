"""Of models: between them, beside their base, and how they can be permuted."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixlab.figures.style import BLUE, CYCLE, GREEN, ORANGE, PINK, RED, SKY, STYLE

_CORNER: Any = {"marker": "^", "edgecolor": "black", "linewidth": 1.2, "zorder": 4}
_DIGITS = re.compile(r"(\d+)")


def landscape(
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
    models: dict[str, tuple[float, float, float, float]],
    marks: dict[str, tuple[float, float, float, float]],
    label: str,
) -> Figure:
    """A map of a score over the plane of three models, with further models marked on it.

    A mark has the colour of the model's own score, at most that of the best place on the map. One
    that lies off the plane may differ from the map around it; the legend says how far off it lies.

    Args:
        x: [X], places along the horizontal axis.
        y: [Y], along the vertical one.
        values: [Y, X], the score; positive ones are coloured by their logarithm.
        models: name -> (x, y, distance off the plane, score), of the three models.
        marks: the same of the others.
        label: what the score is called.
    """
    corners = np.array([spot[:2] for spot in models.values()])
    extent = float(np.ptp(corners, axis=0).max())
    legend = {
        name: f"{name}  {score:.2f}"
        + (f" ({off:.2g} off the plane)" if off > 1e-3 * extent else "")
        for name, (_, _, off, score) in marks.items()
    }
    columns = 2 if max(map(len, legend.values()), default=0) <= 48 else 1
    # Far from the models the score may be huge; the colours are for where the models are.
    finite = values[np.isfinite(values)]
    scores = [spot[3] for spot in models.values()]
    low, high = finite.min(), min(finite.max(), max(np.percentile(finite, 80), *scores))
    high = max(high, low + 1e-6 * max(abs(low), 1.0))  # levels must rise, even on a flat map
    is_positive = low > 0
    levels = np.geomspace(low, high, 17) if is_positive else np.linspace(low, high, 17)
    norm = (mpl.colors.LogNorm if is_positive else mpl.colors.Normalize)(low, high)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        # The map keeps its proportions, and the figure has room for it, the bar and the legend.
        wide = 5.2 * min(1.0, np.ptp(x) / np.ptp(y))
        size = wide + 1.3, wide * np.ptp(y) / np.ptp(x) + 0.7 + 0.2 * -(-len(marks) // columns)
        figure = Figure(figsize=size)
        ax = figure.subplots()
        shown = np.where(np.isfinite(values), values, high)
        filled = ax.contourf(x, y, shown, levels, norm=norm, cmap="viridis_r", extend="both")
        ax.contour(x, y, shown, levels[::2], colors="white", linewidths=0.5, alpha=0.6)
        halo = [mpl.patheffects.withStroke(linewidth=2.2, foreground="white")]
        center = corners.mean(axis=0)
        ax.add_patch(mpl.patches.Polygon(corners, fill=False, edgecolor="white", linewidth=0.8))
        for name, (left, up, _, score) in models.items():
            ax.scatter(left, up, s=90, c=[score], norm=norm, cmap="viridis_r", **_CORNER)
            ax.annotate(
                name,
                (left, up),
                xytext=(0, 11 if up >= center[1] else -11),
                textcoords="offset points",
                ha="center",
                va="bottom" if up >= center[1] else "top",
                fontweight="bold",
                path_effects=halo,
            )
        for number, (name, (left, up, _, score)) in enumerate(marks.items()):
            ax.scatter(
                left,
                up,
                s=62,
                c=[score],
                norm=norm,
                cmap="viridis_r",
                marker="osDvP*Xph<>d"[number % 12],
                edgecolor="black",
                linewidth=1,
                label=legend[name],
                zorder=4,
            )
        ax.set(aspect="equal", xlabel="distance in weights", xlim=x[[0, -1]], ylim=y[[0, -1]])
        ax.spines[:].set_visible(False)
        bar = figure.colorbar(filled, ax=ax, shrink=0.9, label=label)
        bar.ax.minorticks_off()
        ticks = levels[::4].tolist()
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        if marks:
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def agreement(report: dict[str, Any], *, rows: int = 40) -> Figure:
    """Where models agree: sign conflicts, cosines and norms of their task vectors by leaf.

    Args:
        report: of `mixlab.merge.report`.
        rows: of more leaves than this the figure shows layers, what lies under one name: shares
            and cosines averaged by size, and the norm of the whole layer.

    Raises:
        ValueError: the report has no leaf that was merged.
    """
    leaves = report["leaves"]
    if not leaves:
        raise ValueError("the report has no leaf that was merged, so there is nothing to draw")
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, numbers in leaves.items():
        title = name if len(leaves) <= rows else name.rpartition("/")[0] or name
        groups.setdefault(title, []).append(numbers)
    above = np.triu_indices(report["models"], 1)
    conflicts, cosines, norms = [], [], []
    for members in groups.values():
        sizes = np.array([max(numbers["size"], 1) for numbers in members], float)
        shares = sizes / sizes.sum()
        conflicts.append(100 * np.dot(shares, [numbers["conflict"] for numbers in members]))
        pairs = np.array([np.asarray(numbers["cosine"])[above] for numbers in members])
        cosines.append(shares @ pairs)
        norms.append(np.sqrt(np.sum(np.square([numbers["norm"] for numbers in members]), axis=0)))
    place = np.arange(len(groups))
    titles = [title if len(title) <= 36 else "…" + title[-35:] for title in groups]
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(8.0, 1.1 + 0.2 * len(groups)))
        conflict, cosine, norm = figure.subplots(1, 3, sharey=True)
        conflict.barh(place, conflicts, color=ORANGE, height=0.7)
        conflict.set(xlim=(0, 100), title="sign conflicts", xlabel="% of the entries")
        conflict.set_yticks(place, labels=titles)
        conflict.set_axisbelow(True)
        conflict.set_ylim(len(groups) - 0.4, -0.6)
        if len(above[0]):
            pairs = np.array(cosines)
            spots = np.repeat(place, pairs.shape[1])
            cosine.scatter(pairs.ravel(), spots, s=9, color=SKY, linewidth=0)
            cosine.scatter(pairs.mean(axis=1), place, s=30, color=BLUE, marker="|", linewidth=1.6)
        cosine.axvline(0, color="#888888", linewidth=0.8)
        low = min(0.0, float(np.min(cosines, initial=0.0)))
        cosine.set(xlim=(low - 0.05, 1.05), title="cosine", xlabel="each pair, and their mean")
        values = np.array(norms)
        for model in range(report["models"]):
            color = CYCLE[1:][model % (len(CYCLE) - 1)]
            norm.scatter(values[:, model], place, s=9, color=color, linewidth=0)
        positive = values[values > 0]
        if positive.size and positive.max() > 30 * positive.min():
            norm.set_xscale("log")
        norm.set(title="norm", xlabel="each model")
        norm.grid(visible=False, which="minor")
    return figure


def barriers(curves: dict[str, Any]) -> Figure:
    """Metrics along the line between two models: a panel a metric, a curve a method.

    Dotted lines join the two ends; the legend gives the largest distance from them, the barrier.

    Args:
        curves: name -> `t` [T], `values` (metric -> [T]) and `barrier` (metric -> number), as
            `mixlab.align.barrier` gives them. Accuracies in [0, 1] are drawn in per cent.

    Raises:
        ValueError: there are no curves.
    """
    if not curves:
        raise ValueError("there are no curves, so there is nothing to draw")
    # What jit returns is sorted by name; the loss comes first.
    metrics = sorted(next(iter(curves.values())).values, key=lambda name: "accuracy" in name)
    percent = {metric for metric in metrics if "accuracy" in metric}

    def height(metric: str, number: float) -> str:
        return f"{metric} {100 * number:.1f} %" if metric in percent else f"{metric} {number:.3g}"

    heights = {
        name: ", ".join(height(metric, curve.barrier[metric]) for metric in metrics)
        for name, curve in curves.items()
    }
    columns = 2 if len(curves) > 3 and max(map(len, curves)) <= 34 and len(metrics) > 1 else 1
    with mpl.rc_context(STYLE):
        lines = 1 + -(-len(curves) // columns)
        figure = Figure(figsize=(max(4.5, 0.4 + 3.8 * len(metrics)), 3.0 + 0.18 * lines))
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        for ax, metric in zip(axes, metrics, strict=True):
            unit = 100 if metric in percent else 1
            for number, curve in enumerate(curves.values()):
                values = unit * curve.values[metric]
                # Markers stand at different places of each curve, so that none hides another.
                ax.plot(curve.t, values, **_method(number, len(curve.t)))
                ends = curve.t[[0, -1]], values[[0, -1]]
                ax.plot(*ends, color="#555555", linewidth=0.8, linestyle=":", zorder=0)
            shown = np.concatenate([unit * curve.values[metric] for curve in curves.values()])
            shown = shown[np.isfinite(shown)]
            if shown.size and shown.min() > 0 and shown.max() > 30 * shown.min():
                ax.set_yscale("log")
            ax.set(xlabel="share of the second model", ylabel=metric, xlim=(0, 1))
            if metric in percent:
                ax.set_ylabel(f"{metric}, %")
        handles = [
            mpl.lines.Line2D([], [], **_method(number, 1), label=f"{name}: {heights[name]}")
            for number, name in enumerate(curves)
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            title="barrier",
            title_fontsize=8,
        )
    return figure


def _method(number: int, points: int) -> dict[str, Any]:
    every = max(1, points // 6)
    return {
        "color": CYCLE[number % len(CYCLE)],
        "linewidth": 1.6,
        "marker": "os^Dvp*X"[number % 8],
        "markersize": 4.5,
        "markevery": (number % every, every),
    }


def symmetry(symmetry: Any, *, rows: int = 44) -> Figure:
    """The groups of a network's permutable units: a row a leaf, a cell an axis, a colour a group.

    A cell holds the axis's size, and the number of its group in bold; grey axes are fixed. Axes
    that several groups share are cut: `+` where segments follow one another, `×` where a reshape
    made one axis of several. Leaves of one module with the same axes share a row.

    Args:
        symmetry: of `mixlab.align.infer_symmetry`: `groups` (name -> size) and `layouts` (leaf ->
            a term an axis; terms have a `size`, a group's have a `name`, composite ones `parts`).
        rows: of more rows than this the figure shows several columns.

    Raises:
        ValueError: no leaf has an axis.
    """
    lines = _leaf_rows(symmetry.layouts)
    if not lines:
        raise ValueError("no leaf of the symmetry has an axis, so there is nothing to draw")
    numbers = {name: number for number, name in enumerate(symmetry.groups)}
    palette = _palette(len(numbers))
    columns = -(-len(lines) // rows)
    height = -(-len(lines) // columns)
    depth = max(len(layout) for _, layout in lines)
    titles = [title if len(title) <= 48 else "…" + title[-47:] for title, _ in lines]
    wide = 0.06 * max(map(len, titles)) + 0.62 * depth + 0.2
    listed = [f"{n + 1}  {name} ({symmetry.groups[name]})" for name, n in numbers.items()]
    size = max(columns * wide, 4.5)
    across = max(1, min(len(listed), int(size / (0.5 + 0.065 * max(map(len, listed), default=1)))))
    below = 0.17 * -(-len(listed) // across)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(size, 0.5 + 0.2 * height + below))
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for column, ax in enumerate(axes):
            part = slice(column * height, (column + 1) * height)
            for row, (_, layout) in enumerate(lines[part]):
                for axis, term in enumerate(layout):
                    _axis_cell(ax, row, axis, term, numbers, palette)
            ax.set_yticks(range(len(titles[part])), labels=titles[part], fontsize=7)
            used = range(max(len(layout) for _, layout in lines[part]))
            ax.set_xticks(np.array(used) + 0.5, labels=[f"axis {axis}" for axis in used])
            ax.tick_params(length=0, labelsize=7)
            ax.xaxis.tick_top()
            ax.set(xlim=(0, depth), ylim=(height - 0.4, -0.6))
            ax.spines[:].set_visible(False)
        if listed:
            patches = [mpl.patches.Patch(color=color) for color in palette]
            figure.legend(patches, listed, loc="outside lower center", ncols=across, fontsize=7)
    return figure


def _leaf_rows(layouts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Titles and layouts of the rows: leaves of one module that have the same axes are joined."""
    collections = any(name.startswith("params/") for name in layouts)
    rows: dict[Any, list[str]] = {}
    for name, layout in layouts.items():
        if len(layout):
            path = name.partition("/")[2] if collections else name
            module, _, leaf = path.rpartition("/")
            rows.setdefault((module, tuple(layout)), []).append(leaf)
    return [
        (f"{module}/{', '.join(leaves)}" if module else ", ".join(leaves), layout)
        for (module, layout), leaves in sorted(rows.items(), key=lambda row: _by_number(row[0][0]))
    ]


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts `Conv_9` before `Conv_10`."""
    return [(int(part or 0) if i % 2 else 0, part) for i, part in enumerate(_DIGITS.split(name))]


def _axis_cell(
    ax: Axes, row: int, axis: int, term: Any, numbers: dict[str, int], palette: Sequence[Any]
) -> None:
    """Draws one axis of a leaf: its parts side by side, the sign between them in a gap."""
    parts = _parts(term)
    width = 0.96 / len(parts)
    for place, (part, sign) in enumerate(parts):
        left = axis + 0.02 + place * width
        group = numbers.get(getattr(part, "name", ""))
        color = "#EDEDED" if group is None else palette[group]
        gap = 0.0 if place == 0 else min(0.1, width / 4)
        box = (left + gap, row - 0.42), width - gap, 0.84
        ax.add_patch(mpl.patches.Rectangle(*box, color=color, linewidth=0))
        center = left + (width + gap) / 2
        if gap:
            ax.text(left + gap / 2, row, sign, ha="center", va="center", fontsize=5)
        if len(parts) > 4:
            continue
        if group is None:
            ax.text(center, row, str(part.size), ha="center", va="center", fontsize=6, color="#777")
            continue
        dark = np.dot(mpl.colors.to_rgb(color), (0.299, 0.587, 0.114)) < 0.55
        style: Any = {"va": "center", "color": "white" if dark else "black"}
        if len(parts) == 1:
            ax.text(left + 0.06, row, str(group + 1), fontsize=6, fontweight="bold", **style)
            ax.text(left + width - 0.06, row, str(part.size), fontsize=6, ha="right", **style)
        else:
            ax.text(
                center, row, str(group + 1), ha="center", fontsize=6, fontweight="bold", **style
            )


def _parts(term: Any) -> list[tuple[Any, str]]:
    """The simple parts of an axis, each with the sign before it."""
    if not hasattr(term, "parts"):
        return [(term, "")]
    # A product's size is not the sum of its parts' sizes.
    sign = "+" if sum(part.size for part in term.parts) == term.size else "×"
    flat = [_parts(part) for part in term.parts]
    return [
        (part, own if place else sign) for inner in flat for place, (part, own) in enumerate(inner)
    ]


def _palette(count: int) -> list[Any]:
    """Colours for so many groups: those of the other figures, or hues of alternating lightness."""
    if count <= 6:
        return [BLUE, ORANGE, GREEN, PINK, SKY, RED][:count]
    hues = np.arange(count) / count
    light = np.array([0.95, 0.62, 0.8])[np.arange(count) % 3]
    deep = np.array([0.45, 0.8, 0.65])[np.arange(count) % 3]
    return list(mpl.colors.hsv_to_rgb(np.stack([hues, deep, light], axis=-1)))
