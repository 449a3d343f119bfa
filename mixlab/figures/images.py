"""Of images, as they are and augmented."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixlab.figures.style import BLUE, ORANGE, STYLE


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
    with mpl.rc_context({**STYLE, "axes.grid": False}):
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
    with mpl.rc_context(STYLE):
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
