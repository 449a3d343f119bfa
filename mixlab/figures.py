"""The figures of a report. Each function draws one and returns it; nothing is shown or saved.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart.
"""

import itertools
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY = (
    "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #9A9A9A".split()  # noqa: SIM905
)
CYCLE = (GREY, ORANGE, GREEN, BLUE, PINK, RED, SKY, "#000000")

_STYLE: Any = {
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def accuracy(panels: dict[tuple[str, str], dict[str, Any]]) -> Figure:
    """Test accuracy over epochs: a thin line an agent, their mean, and the consensus models.

    Args:
        panels: by (row, column) title; each holds `epoch` [T], `agents` [T, A], `consensus` [T],
            `plain` [T], in [0, 1], and `rounds_from`, the epoch at which communication begins.
    """
    rows = list(dict.fromkeys(row for row, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    if len(rows) == 1:  # wrapped, each panel with its title
        width = min(5, len(columns))
        places = {key: divmod(number, width) for number, key in enumerate(panels)}
    else:
        width = len(columns)
        places = {key: (rows.index(key[0]), columns.index(key[1])) for key in panels}
    height = 1 + max(row for row, _ in places.values())
    with mpl.rc_context(_STYLE):
        wide = 2.5 if width <= 4 else 1.9
        figure = Figure(figsize=(max(4.5, 1.2 + wide * width), 1.1 + 2.0 * height))
        axes = figure.subplots(height, width, sharex=True, sharey=True, squeeze=False)
        for key, panel in panels.items():
            ax = axes[places[key]]
            agents = 100 * panel["agents"]
            ax.plot(panel["epoch"], agents, color=SKY, linewidth=0.7, alpha=0.8)
            ax.plot(panel["epoch"], np.mean(agents, axis=1), color=BLUE, linewidth=1.8)
            look = {"color": RED, "linewidth": 1.4, "linestyle": "--"}
            ax.plot(panel["epoch"], 100 * panel["consensus"], **look)
            look = {"color": "#333333", "linewidth": 1, "linestyle": ":"}
            ax.plot(panel["epoch"], 100 * panel["plain"], **look)
            if panel["rounds_from"]:
                ax.axvline(panel["rounds_from"], color="#BBBBBB", linewidth=0.8, zorder=0)
            ax.set_ylim(0, 100)
            if places[key][0] == 0 or len(rows) == 1:
                name, bracket, options = key[1].partition("(")
                short = len(key[1]) < 9 * wide or not options
                ax.set_title(key[1] if short else f"{name}\n{bracket}{options}", fontsize=9)
        taken = np.zeros(axes.shape, bool)
        for place in places.values():
            taken[place] = True
        for ax in axes[~taken]:  # but for the row's label, nothing
            ax.set_frame_on(False)
            ax.tick_params(which="both", length=0, labelleft=False, labelbottom=False)
            ax.grid(visible=False)
        for line, full, row in zip(axes, taken, itertools.cycle(rows)):
            line[0].set_ylabel("\n".join([*_wrapped(row), "test accuracy, %"]), fontsize=8)
            line[np.argmax(full)].tick_params(labelleft=True)
        for line, full in zip(axes.T, taken.T, strict=True):
            ax = line[np.flatnonzero(full)[-1]]
            ax.set_xlabel("epoch")
            ax.tick_params(labelbottom=True)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        handles = [
            mpl.lines.Line2D([], [], color=SKY, linewidth=0.8, label="each agent"),
            mpl.lines.Line2D([], [], color=BLUE, linewidth=1.8, label="mean of agents"),
            mpl.lines.Line2D(
                [], [], color=RED, linestyle="--", label="consensus (aligned, then averaged)"
            ),
            mpl.lines.Line2D([], [], color="#333333", linestyle=":", label="plain average"),
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=4 if width > 2 else 2,
            fontsize=8,
        )
    return figure


def distance(
    groups: dict[str, dict[str, dict[str, Any]]], styles: dict[str, dict[str, Any]]
) -> Figure:
    """Distance to consensus over epochs, after alignment (thick) and as the agents are (thin).

    Args:
        groups: group title -> strategy -> `epoch` [T], `aligned` [T], `plain` [T].
        styles: of the strategies.
    """
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.5, 1.2 + 3.0 * columns), 0.7 + 2.5 * rows))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, (title, runs) in zip(axes.flat, groups.items(), strict=False):
            for name, run in runs.items():
                style = {"color": styles[name]["color"]}
                marker = {"marker": styles[name]["marker"], "markersize": 3}
                ax.plot(run["epoch"], run["aligned"], linewidth=1.6, **marker, **style)
                ax.plot(run["epoch"], run["plain"], linewidth=1, linestyle=":", **style)
            ax.set_title(title, fontsize=8)
            ax.set_ylim(0, None)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _close_grid(axes, len(groups), "epoch")
        for ax in axes[:, 0]:
            ax.set_ylabel("distance to consensus\n(fraction of the agents' norm)")
        shown = {name for runs in groups.values() for name in runs}
        handles = [
            mpl.lines.Line2D(
                [], [], color=style["color"], marker=style["marker"], markersize=4, label=name
            )
            for name, style in styles.items()
            if name in shown
        ]
        handles += [
            mpl.lines.Line2D([], [], color="#555555", label="after alignment"),
            mpl.lines.Line2D([], [], color="#555555", linestyle=":", label="as they are"),
        ]
        _legend_below(figure, handles, 2 * columns)
    return figure


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, marker and kind of line for each strategy, the same in all figures of a report."""
    colors = (*CYCLE, "#7A5C2E")
    return {
        name: {
            "color": colors[number % len(colors)],
            "marker": "os^Dvp*X<>Ph"[number % 12],
            "linestyle": ("-", "--", ":")[number // len(colors) % 3],
        }
        for number, name in enumerate(names)
    }


def curves(
    rows: dict[str, dict[str, dict[str, np.ndarray]]], styles: dict[str, dict[str, Any]]
) -> Figure:
    """Accuracy against rounds, bytes and seconds: mean over seeds and a band of one deviation.

    Strategies that send nothing are drawn, against bytes, as the level at which they end. An axis
    of bytes or seconds is logarithmic where some strategies end at ten times what others do.

    Args:
        rows: row title -> strategy -> `rounds` [T], `MB` [T], `seconds` [T], from 0, and
            `accuracy` [S, T] in [0, 1], of S seeds.
        styles: of the strategies.
    """
    axis_labels = {
        "rounds": "rounds of local training",
        "MB": "megabytes sent by an agent",
        "seconds": "seconds of training and merging",
    }
    with mpl.rc_context(_STYLE):
        logarithmic = {unit for unit in ("MB", "seconds") if _is_wide(rows, unit)}
        figure = Figure(figsize=(10.5, 0.9 + 2.4 * len(rows)))
        axes = figure.subplots(len(rows), 3, sharex="col", sharey="row", squeeze=False)
        for (title, by_strategy), line in zip(rows.items(), axes, strict=True):
            for name, run in by_strategy.items():
                mean, spread = _mean_and_deviation(100 * run["accuracy"])
                look = {"linewidth": 1.4, "markersize": 3.5, **styles[name]}
                for ax, unit in zip(line, axis_labels, strict=True):
                    if unit == "MB" and not run["MB"].any():
                        quiet = {"linewidth": 1, "alpha": 0.8, "color": look["color"]}
                        ax.axhline(mean[-1], linestyle="-.", **quiet)
                        continue
                    x = np.where(run[unit] > 0, run[unit], np.nan if unit in logarithmic else 0)
                    ax.plot(x, mean, **look)
                    band = mean - spread, mean + spread
                    ax.fill_between(x, *band, color=look["color"], alpha=0.15, linewidth=0)
            line[0].set_ylabel("test accuracy, %")
            line[0].set_title(title, loc="left", fontsize=9)
        for ax, (unit, label) in zip(axes[-1], axis_labels.items(), strict=True):
            if unit in logarithmic:
                ax.set_xscale("log")
            ax.set_xlabel(label)
        axes[-1, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        shown = {name for runs in rows.values() for name in runs}
        handles = [
            mpl.lines.Line2D([], [], markersize=4, label=name, **style)
            for name, style in styles.items()
            if name in shown
        ]
        if not all(run["MB"].any() for runs in rows.values() for run in runs.values()):
            silent: Any = {"color": "#555555", "linestyle": "-.", "linewidth": 1}
            handles.append(mpl.lines.Line2D([], [], label="sends nothing: its end", **silent))
        _legend_below(figure, handles, 5)
    return figure


def _legend_below(figure: Figure, handles: list[mpl.lines.Line2D], columns: int) -> None:
    """A legend under all panels, in at most so many columns, and no more than there is room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    room = int(13 * figure.get_figwidth()) // (longest + 7)  # 13 letters an inch; a line is 7
    columns = max(1, min(columns, room))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
    )


def _is_wide(rows: dict[str, dict[str, dict[str, np.ndarray]]], unit: str) -> bool:
    """Whether some curves end at more than ten times what others, that are above 0, end at."""
    ends = [run[unit][-1] for runs in rows.values() for run in runs.values() if run[unit][-1] > 0]
    return bool(ends) and max(ends) > 10 * min(ends)


def _wrapped(title: str) -> list[str]:
    return textwrap.wrap(title, 26, break_long_words=False)


def summary(
    values: dict[tuple[str, Any], np.ndarray],
    failed: dict[tuple[str, Any], int],
    strategies: Sequence[str],
    settings: dict[Any, tuple[str, ...]],
) -> Figure:
    """Accuracy of each strategy (row) in each setting (column), the best of a column in bold.

    Colours compare within a column: from its worst, light, to its best, dark.

    Args:
        values: (strategy, setting) -> accuracies [S] in percent, of S seeds.
        failed: (strategy, setting) -> how many of its runs failed.
        strategies: rows.
        settings: columns, each with its labels; columns that are equal but in the last label
            stand together.
    """
    columns = list(settings)
    means = np.full((len(strategies), len(columns)), np.nan)
    for (strategy, setting), found in values.items():
        means[strategies.index(strategy), columns.index(setting)] = found.mean()
    low, high = np.nanmin(means, axis=0), np.nanmax(means, axis=0)
    shade = (means - low) / np.where(high > low, high - low, 1)
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, setting in enumerate(columns):
        groups.setdefault(settings[setting][:-1], []).append(place)
    names = 0.075 * max(map(len, strategies))
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        size = max(4.8, 0.5 + names + 0.66 * len(columns)), 1.7 + 0.4 * len(strategies)
        figure = Figure(figsize=size)
        ax = figure.subplots()
        ax.imshow(np.ma.masked_invalid(shade), cmap="Blues", vmin=-0.1, vmax=2.2, aspect="auto")
        for row, strategy in enumerate(strategies):
            for column, setting in enumerate(columns):
                found = values.get((strategy, setting), np.empty(0))
                lost = failed.get((strategy, setting), 0)
                _, spread = _mean_and_deviation(found) if len(found) else (0, 0)
                below = f"{lost} failed" if lost else f"± {spread:.1f}" if len(found) > 1 else ""
                best = bool(len(found)) and shade[row, column] == 1
                text: Any = {"ha": "center", "va": "center", "color": "#222222"}
                if len(found):
                    weight = "bold" if best else "normal"
                    up = row - 0.13 if below else row
                    ax.text(column, up, f"{found.mean():.1f}", fontsize=8, weight=weight, **text)
                if below:
                    down = row + 0.22 if len(found) else row
                    ax.text(
                        column,
                        down,
                        below,
                        fontsize=6,
                        **{**text, "color": "#A00000" if lost else "#333333"},
                    )
        ax.set_yticks(range(len(strategies)), labels=list(strategies))
        last = [settings[setting][-1] if settings[setting] else "" for setting in columns]
        ax.set_xticks(range(len(columns)), labels=last, rotation=40, ha="right")
        for labels, places in groups.items():
            ax.axvline(places[-1] + 0.5, color="white", linewidth=4)
            ax.text(
                float(np.mean(places)),
                -0.6,
                "\n".join(labels),
                ha="center",
                va="bottom",
                fontsize=8,
            )
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        figure.suptitle("test accuracy after the last merge, %, mean of the agents", fontsize=9)
    return figure


def learning(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Test accuracy over epochs, a panel a method: mean over seeds and a band of one deviation.

    In each panel the means of the other methods are drawn in grey, so that all can be compared.

    Args:
        curves: by title; each holds `epoch` [T] and `accuracy` [S, T] in [0, 1], of S seeds.
    """
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    several = max(len(curve["accuracy"]) for curve in curves.values()) > 1
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.5, 0.6 + 2.2 * columns), 1.0 + 1.7 * rows))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, (title, curve) in zip(axes.flat, curves.items(), strict=False):
            for other in curves.values():
                if other is not curve:
                    mean = 100 * other["accuracy"].mean(axis=0)
                    ax.plot(other["epoch"], mean, color="#DADADA", linewidth=0.8)
            mean, spread = _mean_and_deviation(100 * curve["accuracy"])
            band = mean - spread, mean + spread
            ax.fill_between(curve["epoch"], *band, color=SKY, alpha=0.4, linewidth=0)
            ax.plot(curve["epoch"], mean, color=BLUE, linewidth=1.6, marker=".", markersize=4)
            ax.set_title(title, fontsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _close_grid(axes, len(curves), "epoch")
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy, %")
        label = "mean over seeds" if several else "test accuracy"
        handles: list[Any] = [mpl.lines.Line2D([], [], color=BLUE, marker=".", label=label)]
        if several:
            handles.append(mpl.patches.Patch(color=SKY, alpha=0.4, label="± one deviation"))
        if len(curves) > 1:
            handles.append(mpl.lines.Line2D([], [], color="#DADADA", label="the others"))
            figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _close_grid(axes: np.ndarray, count: int, label: str) -> None:
    """Hides what is left of a grid of panels after `count`; labels the lowest of each column."""
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    columns = axes.shape[1]
    for column in range(columns):
        ax = axes.flat[:count][column::columns][-1]
        ax.set_xlabel(label)
        ax.tick_params(labelbottom=True)


def calibration(points: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Accuracy against expected calibration error: mean over seeds, bars of one deviation.

    Lower right is better. Dotted lines go through the first method.

    Args:
        points: by name; each holds `accuracy` [S] and `ece` [S] in [0, 1], of S seeds.
    """
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(7.5, 4.2))
        ax = figure.subplots()
        for number, (name, point) in enumerate(points.items()):
            accuracy, across = _mean_and_deviation(100 * point["accuracy"])
            error, along = _mean_and_deviation(100 * point["ece"])
            if number == 0:
                ax.axvline(accuracy, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
                ax.axhline(error, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
            ax.errorbar(
                accuracy,
                error,
                xerr=across,
                yerr=along,
                color=CYCLE[-1 - number % len(CYCLE)],
                marker="os^"[number // len(CYCLE) % 3],
                markersize=6,
                elinewidth=0.8,
                linestyle="",
                label=name,
            )
        ax.set_xlabel("test accuracy, %")
        ax.set_ylabel("expected calibration error, %")
        ax.set_ylim(0, None)
        several = max(len(point["ece"]) for point in points.values()) > 1
        title = "mean ± deviation over seeds" if several else None
        figure.legend(loc="outside right center", title=title, fontsize=8, title_fontsize=8)
    return figure


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
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
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


_CORNER: Any = {"marker": "^", "edgecolor": "black", "linewidth": 1.2, "zorder": 4}


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
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "x"}):
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


def _mean_and_deviation(values: np.ndarray) -> tuple[Any, Any]:
    """Mean and sample standard deviation over the leading axis; 0 for a single value."""
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(axis=0), spread


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
    with mpl.rc_context(_STYLE):
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
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
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


_DIGITS = re.compile(r"(\d+)")


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


def topology(weights: np.ndarray, title: str, *, columns: int = 4) -> Figure:
    """The graph, as a circle of agents, and the mixing matrix; hubs stand inside the circle.

    Args:
        weights: [A, A], row i the weights of what agent i receives, or [T, A, A], those of rounds
            that take turns; an arrow shows where messages go one way only.
        title: of the figure.
        columns: how many rounds, the first ones, are drawn.
    """
    rounds = weights.reshape(-1, *weights.shape[-2:])
    shown, size = rounds[:columns], rounds.shape[-1]
    several = len(rounds) > 1
    width = 2 * len(shown) + 0.8 if several else 7
    if len(shown) < len(rounds):
        title += f"; rounds 0-{len(shown) - 1} of {len(rounds)}"
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(width, 4.6 if several else 3.4))
        if several:
            graphs, matrices = figure.subplots(2, len(shown))
        else:
            graphs, matrices = figure.subplots(1, 2)[:, None]
        places = _circle(np.any(rounds > 0, axis=0))
        for t, (w, graph, matrix) in enumerate(zip(shown, graphs, matrices, strict=True)):
            _draw_graph(graph, w, places, 0.6 if several else 1.0)
            graph.set_title(f"round {t}" if several else "who talks to whom")
            image = matrix.imshow(w, cmap="Blues", vmin=0, vmax=rounds.max())
            if size <= (8 if several else 12):
                for i, j in np.argwhere(w):
                    matrix.text(
                        j,
                        i,
                        f"{w[i, j]:.2f}".removeprefix("0"),
                        ha="center",
                        va="center",
                        fontsize=5 if several else 7,
                        color="white" if w[i, j] > 0.6 * rounds.max() else "#333333",
                    )
            matrix.set_xlabel("weight given to agent")
            ticks = _some(size, 6 if several or size > 100 else 12)
            matrix.set(xticks=ticks, yticks=ticks)
            matrix.spines[:].set_visible(False)
        matrices[0].set_ylabel("by agent")
        if not several:
            matrices[0].set_title("mixing matrix")
        bar = figure.colorbar(image, ax=list(matrices), shrink=0.8)
        bar.locator = MaxNLocator(4)
        figure.suptitle(textwrap.fill(title, int(13 * width)), fontsize=9)
    return figure


def _some(size: int, count: int) -> np.ndarray:
    """At most about so many of the numbers below `size`, evenly spaced from 0 on."""
    values = np.asarray(MaxNLocator(count, integer=True).tick_values(0, size))
    return values[(values >= 0) & (values < size)].astype(int)


def _circle(joined: np.ndarray) -> np.ndarray:
    """Places [A, 2] on the unit circle; agents with far more neighbours than most, inside it."""
    degree = (joined | joined.T).sum(axis=1) - 1
    hub = degree > 2 * np.median(degree) + 1
    if hub.mean() > 0.25:
        hub[:] = False
    places = np.zeros((len(joined), 2))
    for group, radius in ((~hub, 1.0), (hub, 0.3 if hub.sum() > 1 else 0.0)):
        angles = np.pi / 2 - 2 * np.pi * np.arange(group.sum()) / max(group.sum(), 1)
        places[group] = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return places


def _draw_graph(ax: Axes, weights: np.ndarray, places: np.ndarray, scale: float) -> None:
    """Agents and edges; an edge wider the more it weighs, with an arrow if it goes one way."""
    size = len(weights)
    off = np.where(np.eye(size, dtype=bool), 0, weights)
    either = np.argwhere(np.triu(np.maximum(off, off.T)))
    i, j = either[:: 1 + len(either) // 20_000].T
    strength = np.maximum(off[i, j], off[j, i]) / weights.max()
    start, end = places[i], places[j]
    # Chords bend inwards, or those of close agents would hide behind the agents between them.
    near = np.linalg.norm(start - end, axis=1) < 1.2 * 2 * np.sin(np.pi / max(size, 2))
    middle = (start + end) / 2 * np.where(near, 1.0, 0.6)[:, None]
    t = np.linspace(0, 1, 15)[:, None, None]
    curves = ((1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end).swapaxes(0, 1)
    many = min(1.0, 60 / max(len(i), 1))
    lines = LineCollection(
        list(curves),
        linewidths=scale * many**0.4 * (0.6 + 2.4 * strength),
        colors="#BBBBBB",
        alpha=many**0.5,
        zorder=0,
    )
    ax.add_collection(lines)
    if len(i) <= 400:
        for sender, receiver, curve in zip(j, i, curves[:, ::-1], strict=True):
            if off[receiver, sender] and off[sender, receiver]:
                continue
            tail, tip = curve[[8, 9]] if off[receiver, sender] else curve[[6, 5]]
            style = {"arrowstyle": "-|>", "color": "#777777", "mutation_scale": 11 * scale}
            ax.annotate("", tip, tail, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})
    inside = size <= 24
    area = 260 if inside else np.clip(2000 / size, 4, 50)
    ax.scatter(places[:, 0], places[:, 1], s=scale**2 * area, color=BLUE)
    for k in range(size) if size <= 60 else _some(size, 24):
        x, y = places[k] * (1 if inside else 1.12)
        ax.text(
            x,
            y,
            str(k),
            color="white" if inside else "#444444",
            ha="center",
            va="center_baseline",
            fontsize=(9 if inside else 6) * scale**0.5,
        )
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    ax.set_axis_off()


def partition(counts: dict[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Who holds what: the examples of each class that each agent holds.

    Args:
        counts: partition -> int [A, K]; the number of agents A may differ.
        class_names: K names.
    """
    columns = min(3, len(counts))
    rows = -(-len(counts) // columns)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.0 + 3.4 * columns, 0.4 + 2.8 * rows))
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
        largest = max(int(table.max()) for table in counts.values())
        for ax, (title, table) in zip(axes.flat, counts.items(), strict=False):
            agent, label = np.nonzero(table)
            area = table[agent, label] / largest * min(220.0, 2600.0 / max(table.shape))
            ax.scatter(agent, label, s=area, color=GREEN, linewidth=0)
            ax.set_title(title)
            ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
            ax.set_xlim(-0.6, len(table) - 0.4)
            if len(class_names) <= 20:
                ax.set_yticks(range(len(class_names)), labels=list(class_names))
        _close_grid(axes, len(counts), "agent")
        for ax in axes[:, 0]:
            ax.set_ylabel("class")
        figure.suptitle(
            f"Training examples held; the largest dot is {largest} examples", fontsize=9
        )
    return figure


def sheet(
    before: np.ndarray,
    after: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Images before and after augmentation, and the soft labels that go with the latter.

    Args:
        before: [N, H, W, C], uint8 or float in [0, 1].
        after: likewise.
        labels: [N, K].
        class_names: K names.
        title: of the figure.
    """
    count = len(before)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.05 * count + 0.6, 3.4))
        axes = figure.subplots(3, count, squeeze=False, height_ratios=(1, 1, 0.6))
        for column in range(count):
            for row, images in enumerate((before, after)):
                _image(axes[row, column], images[column])
            _label_bars(axes[2, column], labels[column], class_names)
        for row, name in enumerate(("image", "augmented", "label")):
            axes[row, 0].set_ylabel(name)
        figure.suptitle(title, fontsize=9)
    return figure


def sheets(before: np.ndarray, after: dict[str, np.ndarray]) -> Figure:
    """Images as they are, and a row of them under each augmentation.

    Args:
        before: [N, H, W, C], uint8 or float in [0, 1].
        after: augmentation -> the like.
    """
    rows = {"as they are": before, **after}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(0.62 * len(before) + 2.6, 0.62 * len(rows)))
        axes = figure.subplots(len(rows), len(before), squeeze=False)
        for row, (name, images) in zip(axes, rows.items(), strict=True):
            for ax, image in zip(row, images, strict=True):
                _image(ax, image)
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _image(ax: Axes, image: np.ndarray) -> None:
    shown = image if image.dtype == np.uint8 else np.clip(image, 0, 1)
    shown = shown[..., :3] if shown.shape[-1] >= 3 else shown[..., 0]
    ax.imshow(shown, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _label_bars(ax: Axes, label: np.ndarray, class_names: Sequence[str]) -> None:
    """The largest entries of a soft label: a bar each, with name and share written above it."""
    top = [k for k in np.argsort(-label, kind="stable")[:2] if label[k] > 0.005]
    for row, k in enumerate(top):
        ax.barh(row + 0.24, 1, color="#EEEEEE", height=0.22)
        ax.barh(row + 0.24, label[k], color=(BLUE, ORANGE)[row], height=0.22)
        ax.text(0, row + 0.06, class_names[k], va="bottom", ha="left", fontsize=7)
        ax.text(1, row + 0.06, f"{label[k]:.2f}", va="bottom", ha="right", fontsize=7)
    ax.set(xlim=(0, 1), ylim=(1.5, -0.4))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
