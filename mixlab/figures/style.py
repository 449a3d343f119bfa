"""What all figures share: colours, lines, legends.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart.
"""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY = (
    "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #9A9A9A".split()  # noqa: SIM905
)
CYCLE = (GREY, ORANGE, GREEN, BLUE, PINK, RED, SKY, "#000000")

STYLE: Any = {
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


def close_grid(axes: np.ndarray, count: int, label: str) -> None:
    """Hides what is left of a grid of panels after `count`; labels the lowest of each column."""
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    columns = axes.shape[1]
    for column in range(columns):
        ax = axes.flat[:count][column::columns][-1]
        ax.set_xlabel(label)
        ax.tick_params(labelbottom=True)


def legend_below(figure: Figure, handles: list[mpl.lines.Line2D], columns: int) -> None:
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


def mean_and_deviation(values: np.ndarray) -> tuple[Any, Any]:
    """Mean and sample standard deviation over the leading axis; 0 for a single value."""
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(axis=0), spread
