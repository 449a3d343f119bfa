"""Of agents: who talks to whom, who holds what."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mixlab.figures.style import BLUE, GREEN, STYLE, close_grid


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
    with mpl.rc_context({**STYLE, "axes.grid": False}):
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
    with mpl.rc_context({**STYLE, "axes.grid": False}):
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
        close_grid(axes, len(counts), "agent")
        for ax in axes[:, 0]:
            ax.set_ylabel("class")
        figure.suptitle(
            f"Training examples held; the largest dot is {largest} examples", fontsize=9
        )
    return figure
