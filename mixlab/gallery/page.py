"""A page of pictures and letters, and how they look."""

import functools
import math
import os
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

SUFFIXES = (".png", ".pdf", ".svg")
"""The kinds of file that `save` writes."""

INK, FAINT, RULE = "#222222", "#777777", "#CCCCCC"
STYLE: Any = {"font.family": "sans-serif", "svg.hashsalt": "mixlab", "text.color": INK}
MONO = "monospace"

# Lengths are in sides of a picture, which `size` turns into inches.
GAP, _MARGIN, LINE = 0.09, 0.16, 0.095


class Page:
    """Pictures and letters at their places, y counting down; as large as what is put on it.

    Attributes:
        y: where what comes next begins.
    """

    def __init__(self, size: float):
        self.y = 0.0
        self._size = size
        self._axes: list[tuple[float, float, float, float, Callable[[Axes], None]]] = []
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def axes(
        self, x: float, y: float, width: float, height: float, paint: Callable[[Axes], None]
    ) -> None:
        """A place that `paint` fills."""
        self._axes.append((x, y, width, height, paint))

    def text(self, x: float, y: float, text: str, points: float = 8.0, **style: Any) -> None:
        """Letters on the line y, of so many points on pictures of 1.5 inches."""
        style = {"fontsize": self.points(points), "parse_math": False, **style}
        self._texts.append((x, y, text, style))

    def nothing(self, x: float) -> None:
        """In place of a picture."""
        self.text(x + 0.5, self.y + 0.52, "–", color=FAINT, ha="center")

    def points(self, points: float) -> float:
        """So many points on pictures of 1.5 inches, on those of this page."""
        return points * self._size / 1.5

    def figure(self, footer: str) -> Figure:
        """What has been put on the page."""
        width = max(x + w for x, _, w, _, _ in self._axes)
        if footer:
            lines = textwrap.wrap(footer, int(width / 0.033))
            self.y += GAP + LINE * len(lines)
            self.text(0, self.y, "\n".join(lines), 6.0, color=FAINT)
        width, height = width + 2 * _MARGIN, self.y + 2 * _MARGIN
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(width * self._size, height * self._size), dpi=200)
            for x, y, w, h, paint in self._axes:
                left, bottom = (x + _MARGIN) / width, 1 - (y + h + _MARGIN) / height
                ax = figure.add_axes((left, bottom, w / width, h / height))
                ax.set_axis_off()
                paint(ax)
            for x, y, text, style in self._texts:
                place = ((x + _MARGIN) / width, 1 - (y + _MARGIN) / height)
                figure.text(*place, text, **style)
        return figure

    def picture(
        self, x: float, y: float, image: np.ndarray, frame: str | None = None, side: float = 1.0
    ) -> None:
        """An image [H, W, C], or several at once [V, H, W, C], in a square."""
        paint = functools.partial(paint_image, image=image, frame=frame, width=self.points(2.25))
        self.axes(x, y, side, side, paint)


def paint_image(ax: Axes, image: np.ndarray, frame: str | None, width: float) -> None:
    """Draws an image [H, W, C], or several [V, H, W, C], with a frame of that colour and width."""
    image = contact_sheet(image) if image.ndim == 4 else image
    whole = image.dtype == np.uint8
    shown = image if whole else np.clip(image.astype(np.float32), 0, 1)
    shown = shown[..., :3] if shown.shape[-1] >= 3 else shown[..., 0]
    ax.imshow(shown, cmap="gray", vmin=0, vmax=255 if whole else 1)
    # A hair line where there is no frame: an image may be as white as the page.
    edge = (RULE, 0.2 * width) if frame is None else (frame, width)
    ax.add_patch(outline((0, 0), 1, 1, *edge, transform=ax.transAxes))


def outline(
    corner: tuple[float, float], width: float, height: float, color: str, line: float, **where: Any
) -> Rectangle:
    """The edge of a box; `line` is its width in points."""
    options = {"fill": False, "clip_on": False, "edgecolor": color, "linewidth": line, **where}
    return Rectangle(corner, width, height, **options)


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Several images [V, H, W, C] as one, in about as many rows as columns, white between them."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = max(1, width // 32)
    white = 255 if images.dtype == np.uint8 else 1
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    page = np.full(shape, white, images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def fill_all(ax: Axes, color: str) -> None:
    """Fills a place with one colour."""
    ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, facecolor=color, linewidth=0))


def dark(color: str) -> Any:
    """A colour in which small letters can be read."""
    return 0.7 * np.array(to_rgb(color))


def short(name: str, length: int) -> str:
    """A name of at most so many letters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def check_suffix(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, once it is known to end in one of `SUFFIXES`; raises a `ValueError` otherwise."""
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a picture is written to a file {', '.join(SUFFIXES)}, got {str(path)!r}")
    return path


def save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a figure as its suffix says, one of `SUFFIXES`; the same figure gives the same file.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    path = check_suffix(path)
    undated: dict[str, Any] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata=undated.get(path.suffix))
    return path
