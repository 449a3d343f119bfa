"""Of runs: accuracy, distances, what communication buys, calibration."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mixlab.figures.style import (
    BLUE,
    CYCLE,
    RED,
    SKY,
    STYLE,
    close_grid,
    legend_below,
    mean_and_deviation,
)


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
    with mpl.rc_context(STYLE):
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
            line[0].set_ylabel(
                "\n".join([*_wrapped(row), "test accuracy, %"]), fontsize=8, linespacing=1.4
            )
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
    with mpl.rc_context(STYLE):
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
        close_grid(axes, len(groups), "epoch")
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
        legend_below(figure, handles, 2 * columns)
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
    with mpl.rc_context(STYLE):
        logarithmic = {unit for unit in ("MB", "seconds") if _is_wide(rows, unit)}
        figure = Figure(figsize=(10.5, 0.9 + 2.4 * len(rows)))
        axes = figure.subplots(len(rows), 3, sharex="col", sharey="row", squeeze=False)
        for (title, by_strategy), line in zip(rows.items(), axes, strict=True):
            for name, run in by_strategy.items():
                mean, spread = mean_and_deviation(100 * run["accuracy"])
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
        legend_below(figure, handles, 5)
    return figure


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
    field: str,
) -> Figure:
    """Accuracy of each strategy (row) in each setting (column), the best of a column in bold.

    Colours compare within a column: from its worst, light, to its best, dark.

    Args:
        values: (strategy, setting) -> accuracies [S] in percent, of S seeds.
        failed: (strategy, setting) -> how many of its runs failed.
        strategies: rows.
        settings: columns, each with its labels; columns that are equal but in the last label
            stand together.
        field: what the last labels are values of.
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
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        size = max(4.8, 0.5 + names + 0.66 * len(columns)), 1.7 + 0.4 * len(strategies)
        figure = Figure(figsize=size)
        ax = figure.subplots()
        ax.imshow(np.ma.masked_invalid(shade), cmap="Blues", vmin=-0.1, vmax=2.2, aspect="auto")
        for row, strategy in enumerate(strategies):
            for column, setting in enumerate(columns):
                found = values.get((strategy, setting), np.empty(0))
                lost = failed.get((strategy, setting), 0)
                _, spread = mean_and_deviation(found) if len(found) else (0, 0)
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
        last = [settings[setting][-1] for setting in columns]
        ax.set_xticks(range(len(columns)), labels=last, rotation=40, ha="right")
        ax.set_xlabel(field)
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
        measured = "test accuracy after the last merge, %, mean of the agents"
        figure.suptitle(f"{measured}; shades compare within a column", fontsize=9)
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
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(4.5, 0.6 + 2.2 * columns), 1.0 + 1.7 * rows))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, (title, curve) in zip(axes.flat, curves.items(), strict=False):
            for other in curves.values():
                if other is not curve:
                    mean = 100 * other["accuracy"].mean(axis=0)
                    ax.plot(other["epoch"], mean, color="#DADADA", linewidth=0.8)
            mean, spread = mean_and_deviation(100 * curve["accuracy"])
            band = mean - spread, mean + spread
            ax.fill_between(curve["epoch"], *band, color=SKY, alpha=0.4, linewidth=0)
            ax.plot(curve["epoch"], mean, color=BLUE, linewidth=1.6, marker=".", markersize=4)
            ax.set_title(title, fontsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        close_grid(axes, len(curves), "epoch")
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


def calibration(points: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Accuracy against expected calibration error: mean over seeds, bars of one deviation.

    Lower right is better. Dotted lines go through the first method.

    Args:
        points: by name; each holds `accuracy` [S] and `ece` [S] in [0, 1], of S seeds.
    """
    with mpl.rc_context({**STYLE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(7.5, 4.2))
        ax = figure.subplots()
        for number, (name, point) in enumerate(points.items()):
            accuracy, across = mean_and_deviation(100 * point["accuracy"])
            error, along = mean_and_deviation(100 * point["ece"])
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
