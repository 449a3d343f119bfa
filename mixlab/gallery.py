"""Pictures of augmentations: one in detail, read from its plan, or all of them on one sheet.

`draw("cutmix | randaugment")` in a notebook, `mixlab gallery` on the command line. The colours tell
whose a pixel or a share of the label is: blue the example's own, orange, green, ... its partners'.
"""

import dataclasses
import functools
import math
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mixlab import augment, data, trees
from mixlab.augment import Augmentation
from mixlab.augment.core import image_of
from mixlab.augment.spaces import GEOMETRIC
from mixlab.data import embedded, folder
from mixlab.figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW
from mixlab.types import Batch, Key, Plan

SUFFIXES = (".png", ".pdf", ".svg")
"""The kinds of file that `save` writes."""
SEED = 381
"""Draws that show well on the photos; few of them find themselves as partner."""

_ROLES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
_INK, _FAINT, _RULE = "#222222", "#777777", "#CCCCCC"
_STYLE: Any = {"font.family": "sans-serif", "svg.hashsalt": "mixlab", "text.color": _INK}
_MONO = "monospace"
_LEGEND = (
    "Each method on the source at the head of its column, mixed with the one to the left (mosaic: "
    "with any three)."
)

_FACTOR, _PIXELS, _ANGLE = "× {:.2f}", "{:+.0f} px", "{:+.0f}°"
# How the argument of an op is written; where nothing is said, it has none.
_ARGUMENTS = {
    "brightness": _FACTOR,
    "color": _FACTOR,
    "contrast": _FACTOR,
    "cutout": "{:.0f} px",
    "desaturate": _FACTOR,
    "gaussian_blur": "σ {:.1f} px",
    "posterize": "{:.0f} bits",
    "rotate": _ANGLE,
    "sharpness": _FACTOR,
    "shear_x": "{:+.2f}",
    "shear_y": "{:+.2f}",
    "solarize": "≥ {:.0f}",
    "solarize_add": "{:+.0f}",
    "translate_x": _PIXELS,
    "translate_y": _PIXELS,
}

Method = Callable[[tuple[int, int]], Augmentation]
"""From height and width to an augmentation that shows well on images of that size."""


def _plain(name: str, **options: Any) -> Method:
    return lambda size: augment.CONSTRUCTORS[name](**options)


def _jigsaw(size: tuple[int, int]) -> Augmentation:
    rows, columns = (max(n for n in (1, 2, 3, 4) if length % n == 0) for length in size)
    return augment.jigsaw((rows, columns))


METHODS: dict[str, dict[str, Method]] = {
    "Mixing": {
        "mixup": _plain("mixup", alpha=8.0, pairing="roll"),
        "cutmix": _plain("cutmix", minmax=(0.4, 0.8), pairing="roll"),
        "resizemix": _plain("resizemix", scope=(0.4, 0.7), pairing="roll"),
        "fmix": _plain("fmix", alpha=8.0, pairing="roll"),
        "smoothmix": _plain("smoothmix", spread=(0.4, 0.5), pairing="roll"),
        "gridmix": _plain("gridmix", alpha=8.0, pairing="roll"),
        "mosaic": _plain("mosaic"),
    },
    "Erasing and shuffling": {
        "cutout": lambda size: augment.cutout(size=min(size) * 3 // 8),
        "random_erasing": _plain(
            "random_erasing", prob=1.0, area=(0.15, 1 / 3), value="pixel", noise=(0.5, 0.25)
        ),
        "jigsaw": _jigsaw,
    },
    "Crops, flips, views": {
        "random_crop": lambda size: augment.random_crop(padding=min(size) // 4),
        "random_flip": _plain("random_flip", p=1.0),
        "views": lambda size: augment.views(4, augment.randaugment()),
    },
    "Policies": {
        "randaugment": _plain("randaugment", magnitude=15),
        "trivialaugment": _plain("trivialaugment"),
        "autoaugment": _plain("autoaugment"),
        "augmix": _plain("augmix", severity=8),
        "three_augment": _plain("three_augment"),
        "timm": _plain("timm", text="rand-m9-p1-inc1"),
    },
}
"""What `sheet` shows of `augment.CONSTRUCTORS`, under its headings."""

NOT_SHOWN = ("chain", "identity", "label_smoothing", "normalize", "one_of", "sometimes", "to_float")
"""The constructors that change no picture by themselves."""

OPS: dict[str, tuple[float, ...]] = {
    "rotate": (25,),
    "shear_x": (0.3,),
    "shear_y": (0.3,),
    "translate_x": (0.25,),
    "translate_y": (0.25,),
    "brightness": (1.6,),
    "contrast": (1.8,),
    "color": (0.2,),
    "sharpness": (6,),
    "autocontrast": (),
    "equalize": (),
    "invert": (),
    "posterize": (2,),
    "solarize": (128,),
    "solarize_add": (80,),
}
"""The arguments that `sheet` gives to `augment.ops`; those of translations are shares of a side."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What one part of an augmentation did to one example, as its plan says.

    Attributes:
        partner: the examples mixed in, P rows of the batch.
        weight: [1 + P, H, W], of the own pixel and of each partner's; ones without partners.
        boxes: [n, 4], half-open (top, left, bottom, right), of a part that has no partners.
        ops: the ops of a policy that were applied, a line each.
    """

    partner: tuple[int, ...] = ()
    weight: np.ndarray = dataclasses.field(default_factory=lambda: np.ones((1, 1, 1)))
    boxes: Sequence[np.ndarray] = ()
    ops: tuple[str, ...] = ()


def steps(aug: Augmentation, plan: Plan, row: int, size: tuple[int, int]) -> list[Step]:
    """What an augmentation did to one example, part by part, the parts that were not used left out.

    Args:
        aug: made of any parts.
        plan: what it decided.
        row: which example of the batch.
        size: height and width of the images.
    """
    if not aug.parts:
        step = _step(aug, {name: leaf[row] for name, leaf in plan.items() if np.ndim(leaf)}, size)
        return [] if step is None else [step]
    chosen: Sequence[int] = range(len(aug.parts))
    if "choice" in plan:
        choice = np.ravel(plan["choice"])
        chosen = [int(choice[row % len(choice)])]
    return [step for i in chosen for step in steps(aug.parts[i], plan[str(i)], row, size)]


def _step(aug: Augmentation, plan: Plan, size: tuple[int, int]) -> Step | None:
    """The step of an augmentation without parts, from its plan for one example."""
    if np.ndim(plan.get("use", ())) == 0 and not plan["use"]:
        return None
    if aug.ops:
        return Step(ops=tuple(_op_lines(aug.ops, plan)))
    if "partner" not in plan:
        return Step(boxes=tuple(np.reshape(plan["box"], (-1, 4)))) if "box" in plan else Step()
    partner = tuple(int(p) for p in np.ravel(plan["partner"]))
    height, width = size
    if "corner" in plan:  # a window onto two by two tiles
        lower = np.arange(height)[:, None] >= height - plan["corner"][0]
        further = np.arange(width) >= width - plan["corner"][1]
        tile = 2 * lower + further
        return Step(partner, (tile == np.arange(4)[:, None, None]).astype(np.float64))
    if "mask" in plan:
        keep = np.asarray(plan["mask"], np.float64)
    elif "box" in plan:
        top, left, bottom, right = (int(v) for v in plan["box"])
        keep = np.ones(size)
        keep[top:bottom, left:right] = 0.0
    else:
        keep = np.full(size, float(plan["lam"]))
    return Step(partner, np.stack([keep, 1.0 - keep]))


def _op_lines(names: Sequence[str], plan: Plan) -> Iterator[str]:
    """The ops that were used with their arguments; of AugMix, chain by chain, with its weight."""
    chains = [np.atleast_2d(plan[name]) for name in ("op", "argument", "use")]
    for i, (ops, arguments, use) in enumerate(zip(*chains, strict=True)):
        share = f"{plan['weights'][i]:.2f}" if "weights" in plan else ""
        for op, argument in zip(ops[use], arguments[use], strict=True):
            name = names[op]
            written = _ARGUMENTS.get(name, "").format(float(argument)).replace("-", "−")
            yield f"{share:5}{name} {written}".rstrip() if share else f"{name} {written}".rstrip()
            share = " " if share else ""


def examples(
    name: str = "photos",
    split: str = "train",
    *,
    count: int = 8,
    seed: int = 0,
    image_size: int | None = None,
) -> data.Dataset:
    """A few examples of a data set to draw on, of as many classes as there are.

    Args:
        name: as `mixlab.data.load` takes it. A `folder:PATH` without class folders will do, too:
            each of its images is then a class, named after its file.
        split: likewise.
        count: how many examples.
        seed: which ones.
        image_size: side of the images; by default 256 for folders and the sets' own for others.

    Returns:
        At most `count` examples, in the order of their classes.

    Raises:
        ValueError: no such data, see `mixlab.data.load`.
    """
    found = _load(name, split, image_size)
    order = np.random.default_rng(seed).permutation(len(found))
    # How many of its class come before each: first one of every class, then a second one, ...
    labels = found.labels[order]
    by_class = np.argsort(labels, kind="stable")
    turn = np.empty(len(order), int)
    turn[by_class] = np.arange(len(order)) - np.searchsorted(labels[by_class], labels[by_class])
    chosen = order[np.argsort(turn, kind="stable")[:count]]
    return found.subset(chosen[np.lexsort((chosen, found.labels[chosen]))])


def _load(name: str, split: str, image_size: int | None) -> data.Dataset:
    if not name.startswith("folder:"):
        return data.load(name, split, image_size=image_size)
    side = image_size or 256
    path = pathlib.Path(name.removeprefix("folder:")).expanduser()
    if path.is_dir() and not any(entry.is_dir() for entry in path.glob("[!.]*")):
        images, labels, names = folder.single(str(path), (side, side))
        return data.Dataset(images, labels, len(names), name, split, names)
    return data.load(name, split, image_size=side)


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
    with mpl.rc_context(_STYLE):
        figure.savefig(path, metadata=undated.get(path.suffix))
    return path


def draw(
    aug: str | Augmentation | Mapping[str, str | Augmentation],
    batch: Batch | data.Dataset | None = None,
    *,
    class_names: Sequence[str] | None = None,
    rows: int = 4,
    seed: int = SEED,
    size: float = 1.5,
) -> Figure:
    """Draws what an augmentation does to the first examples of a batch, a row each.

    From left to right: the source; what was done to it, as far as the plan tells (the boxes that
    were cut out or erased, the ops of a policy, each partner with the mask of the mix); the result;
    the label. Partners are shown as they are in the batch that is given.

    Args:
        aug: an augmentation, or a text for `augment.parse`, or several by their titles.
        batch: a small data set, or `image` [B, H, W, C], uint8 or floating in [0, 1], with `label`,
            int [B] or soft [B, K], or without; by default the photos.
        class_names: K names; by default those of the data set, or the numbers of the classes.
        rows: how many examples.
        seed: the result is that of `aug(jax.random.key(seed), batch)`.
        size: side of a picture, in inches; all else goes with it.

    Raises:
        ValueError: a batch or a text that cannot be used.
    """
    batch, names, footer = _ready(batch, class_names)
    given = aug if isinstance(aug, Mapping) else {aug if isinstance(aug, str) else "": aug}
    page = _Page(size)
    for title, one in given.items():
        page.y += 2 * _GAP if page.y else 0.0
        _section(page, title, augment.parse(one), batch, names, rows, jax.random.key(seed))
    return page.figure(footer)


def sheet(
    batch: Batch | data.Dataset | None = None,
    *,
    class_names: Sequence[str] | None = None,
    seed: int = SEED,
    size: float = 1.5,
) -> Figure:
    """Draws every method once, on the source at the head of its column.

    The partner, where there is one, is the source to the left; a mosaic has any three.

    Args:
        batch: as in `draw`; the sheet has a column for each example.
        class_names: likewise.
        seed: of the draws; what a method draws does not depend on the others.
        size: as in `draw`.

    Raises:
        ValueError: a batch that cannot be used.
    """
    batch, names, footer = _ready(batch, class_names)
    columns = len(batch["image"])
    titles = [str(i) for i in range(columns)]
    if names is not None:
        titles = [_short(names[k], 20) for k in np.argmax(batch["label"], axis=1)]
    sources = [
        _Tile(title, {"image": image[None]})
        for title, image in zip(titles, batch["image"], strict=True)
    ]
    page = _Page(size)
    _heading(page, 0, columns, "Sources")
    _row(page, sources)
    for makers, headings in _flow(_makers(batch, names, seed), columns):
        for heading in headings:
            _heading(page, *heading)
        tiles = [make(column) for column, make in enumerate(makers)]
        _row(page, tiles, room=0.32 if headings else 0.14)
    return page.figure(f"{_LEGEND} {footer}")


def _ready(
    batch: Batch | data.Dataset | None, class_names: Sequence[str] | None
) -> tuple[Batch, Sequence[str] | None, str]:
    """The batch with a soft label if it has one, the names of its classes, and the small print."""
    batch = examples() if batch is None else batch
    footer = ""
    if isinstance(batch, data.Dataset):
        footer = embedded.PHOTO_CREDITS if batch.name == "photos" else ""
        class_names = batch.class_names if class_names is None else class_names
        batch = batch.batch(np.arange(len(batch)))
    image_of(batch)
    image = np.asarray(batch["image"])
    if batch.get("label") is None:
        return {"image": image}, None, footer
    label = np.asarray(batch["label"])
    if label.ndim == 1:
        classes = int(label.max()) + 1 if class_names is None else len(class_names)
        label = np.eye(classes, dtype=np.float32)[label]
    names = [str(k) for k in range(label.shape[1])] if class_names is None else class_names
    if len(names) != label.shape[1]:
        raise ValueError(f"{len(names)} class_names for labels of {label.shape[1]} classes")
    return {"image": image, "label": label}, names, footer


def _run(aug: Augmentation, key: Key, batch: Batch) -> tuple[Plan, Batch]:
    """The plan for a batch, and what it gives, as NumPy arrays."""

    @jax.jit
    def both(key: Key, batch: Batch) -> tuple[Plan, Batch]:
        plan = aug.sample(key, batch)
        return plan, aug.apply(plan, batch)

    return jax.tree.map(np.asarray, both(key, batch))


Share = tuple[str, float, str]
"""A class, its share of a label, and its colour."""


def _shares(label: np.ndarray, names: Sequence[str], roles: Mapping[int, str]) -> list[Share]:
    """The largest shares of a soft label [K], or of the mean of several [V, K]; four at most.

    The example's own comes first, then its partners'.
    """
    label = np.reshape(label, (-1, label.shape[-1])).astype(np.float64).mean(axis=0)
    top = [int(k) for k in np.argsort(-label, kind="stable")[:4] if label[k] > 0.005]
    top.sort(key=lambda k: [*roles, k].index(k))
    return [(names[k], float(label[k]), roles.get(k, GREY)) for k in top]


def _roles(label: np.ndarray, row: int, done: Sequence[Step]) -> dict[int, str]:
    """The colours of the classes of an example and of its partners, by their labels [B, K]."""
    members = [row, *(partner for step in done for partner in step.partner)]
    roles: dict[int, str] = {}
    for i, member in enumerate(members):
        roles.setdefault(int(np.argmax(label[member])), _ROLES[i % len(_ROLES)])
    return roles


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


# The page. All lengths are in sides of a picture, which `size` turns into inches.

_GAP, _MARGIN, _LINE = 0.09, 0.16, 0.095


class _Page:
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
        self.text(x + 0.5, self.y + 0.52, "–", color=_FAINT, ha="center")

    def points(self, points: float) -> float:
        """So many points on pictures of 1.5 inches, on those of this page."""
        return points * self._size / 1.5

    def figure(self, footer: str) -> Figure:
        """What has been put on the page."""
        width = max(x + w for x, _, w, _, _ in self._axes)
        if footer:
            lines = textwrap.wrap(footer, int(width / 0.033))
            self.y += _GAP + _LINE * len(lines)
            self.text(0, self.y, "\n".join(lines), 6.0, color=_FAINT)
        width, height = width + 2 * _MARGIN, self.y + 2 * _MARGIN
        with mpl.rc_context(_STYLE):
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
        paint = functools.partial(_paint, image=image, frame=frame, width=self.points(2.25))
        self.axes(x, y, side, side, paint)


def _paint(ax: Axes, image: np.ndarray, frame: str | None, width: float) -> None:
    image = _contact_sheet(image) if image.ndim == 4 else image
    whole = image.dtype == np.uint8
    shown = image if whole else np.clip(image.astype(np.float32), 0, 1)
    shown = shown[..., :3] if shown.shape[-1] >= 3 else shown[..., 0]
    ax.imshow(shown, cmap="gray", vmin=0, vmax=255 if whole else 1)
    # A hair line where there is no frame: an image may be as white as the page.
    outline = (_RULE, 0.2 * width) if frame is None else (frame, width)
    ax.add_patch(_outline((0, 0), 1, 1, *outline, transform=ax.transAxes))


def _outline(
    corner: tuple[float, float], width: float, height: float, color: str, line: float, **where: Any
) -> Rectangle:
    options = {"fill": False, "clip_on": False, "edgecolor": color, "linewidth": line, **where}
    return Rectangle(corner, width, height, **options)


def _contact_sheet(images: np.ndarray) -> np.ndarray:
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


# One augmentation in detail.


def _section(
    page: _Page,
    title: str,
    aug: Augmentation,
    batch: Batch,
    names: Sequence[str] | None,
    rows: int,
    key: Key,
) -> None:
    """The title, the heads of the columns, and a row for each of the first examples."""
    plan, out = _run(aug, key, batch)
    image = batch["image"]
    rows = min(rows, len(out["image"]))
    height, width = out["image"].shape[-3:-1]
    done = [steps(aug, plan, row, (height, width)) for row in range(rows)]
    mixes = [[step for step in part if step.partner] for part in done]
    boxes = [[box for step in part for box in step.boxes] for part in done]
    lines = [[line for step in part for line in step.ops] for part in done]

    heads = [("source", 1.0)]
    heads += [("box", 1.0)] if any(boxes) else []
    longest = max((len(line) for part in lines for line in part), default=0)
    heads += [("ops", max(0.7, 0.0465 * longest))] if any(lines) else []
    heads += [("partner", 1.0), ("mask", 1.0)] * max(map(len, mixes))
    heads += [("result", 1.0)]
    heads += [] if names is None else [("label", 1.1)]
    starts = np.cumsum([0.0, *(width + _GAP for _, width in heads)]).tolist()

    for line in textwrap.wrap(title, int(starts[-1] / 0.058)):
        page.y += 0.1
        page.text(0, page.y, line, 10, family=_MONO, weight="bold")
        page.y += 0.04
    page.y += 0.12
    for (head, _), x in zip(heads, starts, strict=False):
        page.text(x, page.y, head, 8, color=_FAINT)
    page.y += 0.04
    for row in range(rows):
        x = iter(starts)
        page.picture(next(x), page.y, image[row], BLUE if mixes[row] else None)
        if any(boxes):
            at = next(x)
            if boxes[row]:
                _boxed(page, at, image[row], boxes[row])
            else:
                page.nothing(at)
        if any(lines):
            at, top = next(x), page.y + 0.5 - 0.5 * _LINE * max(1, len(lines[row]))
            for i, line in enumerate(lines[row] or ["–"]):
                page.text(at, top + (i + 0.8) * _LINE, line, 8, family=_MONO)
        colors = iter(_ROLES[1:] * 8)
        for i in range(max(map(len, mixes))):
            pair = next(x), next(x)
            if i < len(mixes[row]):
                _mixed(page, *pair, image, mixes[row][i], colors)
            else:
                for at in pair:
                    page.nothing(at)
        _result(page, next(x), out, row)
        if names is not None:
            roles = _roles(batch["label"], row, done[row])
            shares = _shares(out["label"][row], names, roles)
            page.axes(next(x), page.y, 1.1, 1.0, functools.partial(_bars, page, shares=shares))
        page.y += 1 + _GAP
    page.y -= _GAP


def _result(page: _Page, x: float, out: Batch, row: int) -> None:
    """What came out; local crops, which are smaller, below the others."""
    if "local" not in out:
        page.picture(x, page.y, out["image"][row])
        return
    page.picture(x + 0.25, page.y, out["image"][row], side=0.5)
    page.picture(x + 0.25, page.y + 0.5, out["local"][row], side=0.5)


def _boxed(page: _Page, x: float, image: np.ndarray, boxes: Sequence[np.ndarray]) -> None:
    """The source, with the boxes that a crop or an eraser drew."""
    line = page.points(2.25)

    def paint(ax: Axes) -> None:
        _paint(ax, image, None, line)
        for top, left, bottom, right in boxes:
            ax.add_patch(
                _outline((left - 0.5, top - 0.5), right - left, bottom - top, YELLOW, line)
            )

    page.axes(x, page.y, 1, 1, paint)


def _mixed(
    page: _Page, x: float, x_mask: float, image: np.ndarray, step: Step, colors: Iterator[str]
) -> None:
    """The partners of a step, each with its colour, and the mask in these colours."""
    own = [next(colors) for _ in step.partner]
    across = math.ceil(math.sqrt(len(own)))
    side = (1 - 0.05 * (across - 1)) / across
    # The places that are left come first: in a mosaic the example itself stands there.
    places = range(across**2 - len(own), across**2)
    for i, partner, color in zip(places, step.partner, own, strict=True):
        left, top = (0.05 + side) * (i % across), (0.05 + side) * (i // across)
        page.picture(x + left, page.y + top, image[partner], color, side)
    palette = np.array([to_rgb(color) for color in (BLUE, *own)])
    mask = np.tensordot(step.weight, palette, axes=(0, 0))
    page.picture(x_mask, page.y, mask)
    if np.ptp(step.weight) < 1 and np.ptp(step.weight[0]) == 0:
        share = f"λ = {float(step.weight[0, 0, 0]):.2f}"
        page.text(x_mask + 0.5, page.y + 0.52, share, 9, color="white", ha="center", weight="bold")


def _fill(ax: Axes, color: str) -> None:
    ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, facecolor=color, linewidth=0))


def _dark(color: str) -> Any:
    """A colour in which small letters can be read."""
    return 0.7 * np.array(to_rgb(color))


def _bars(page: _Page, ax: Axes, shares: Sequence[Share]) -> None:
    """The shares of a label: a bar each, with name and share above it."""
    ax.set(xlim=(0, 1.1), ylim=(4, 0))
    for row, (name, share, color) in enumerate(shares):
        y = row + (4 - len(shares)) / 2
        ax.barh(y + 0.66, 1.1, color="#ECECEC", height=0.26)
        ax.barh(y + 0.66, 1.1 * share, color=color, height=0.26)
        size = page.points(8)
        ax.text(0, y + 0.42, _short(name, 18), ha="left", fontsize=size, parse_math=False)
        ax.text(1.1, y + 0.42, f"{share:.2f}", ha="right", fontsize=size)


# All of them on one sheet.


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A picture of the sheet, with its name above, and below the shares of a label that mixes."""

    name: str
    out: Batch
    shares: Sequence[Share] = ()


_Maker = Callable[[int], _Tile]
"""Makes the tile of a column."""


def _makers(batch: Batch, names: Sequence[str] | None, seed: int) -> dict[str, list[_Maker]]:
    """What makes the tiles under each heading."""
    image = batch["image"]
    height, width = image.shape[1:3]

    def method(name: str, make: Method, column: int) -> _Tile:
        aug = make((height, width))
        plan, out = _run(aug, trees.name_key(jax.random.key(seed), name), batch)
        tile = _Tile(name, {k: v[column : column + 1] for k, v in out.items()})
        if names is None:
            return tile
        done = steps(aug, plan, column, (height, width))
        roles = _roles(batch["label"], column, done)
        shares = _shares(out["label"][column], names, roles)
        return dataclasses.replace(tile, shares=shares) if len(shares) > 1 else tile

    def op(name: str, arguments: tuple[float, ...], column: int) -> _Tile:
        if name.startswith("translate"):
            arguments = tuple(round(x * (width if name[-1] == "x" else height)) for x in arguments)
        options = {"interpolation": "bicubic"} if name in GEOMETRIC else {}
        apply = getattr(augment.ops, name)
        out = jax.jit(lambda image: apply(image, *arguments, **options))(image[column])
        written = f"({', '.join(map(str, arguments))})" if arguments else ""
        return _Tile(name + written, {"image": np.asarray(out)[None]})

    makers: dict[str, list[_Maker]] = {
        heading: [functools.partial(method, name, make) for name, make in group.items()]
        for heading, group in METHODS.items()
    }
    return {**makers, "Single ops": [functools.partial(op, *entry) for entry in OPS.items()]}


def _flow(
    groups: Mapping[str, Sequence[_Maker]], columns: int
) -> list[tuple[list[_Maker], list[tuple[int, int, str]]]]:
    """The rows of the sheet: what stands in each, and its headings with their place and span.

    A group goes on in the row where it fits whole; else it starts a new one.
    """
    rows: list[tuple[list[_Maker], list[tuple[int, int, str]]]] = []
    for heading, makers in groups.items():
        fits = bool(rows) and len(rows[-1][0]) + len(makers) <= columns
        for start in range(0, len(makers), columns):
            chunk = makers[start : start + columns]
            if not fits:
                rows.append(([], []))
            if start == 0:
                rows[-1][1].append((len(rows[-1][0]), len(chunk), heading))
            rows[-1][0].extend(chunk)
    return rows


def _heading(page: _Page, column: int, span: int, text: str) -> None:
    """A heading over some columns of the row that comes next."""
    x, end = column * (1 + _GAP), (column + span) * (1 + _GAP) - _GAP
    page.text(x, page.y + 0.11, text, 11, weight="bold")

    def rule(ax: Axes) -> None:
        ax.axhline(0.5, color=_RULE, linewidth=page.points(0.8))

    page.axes(x, page.y + 0.15, end - x, 0.02, rule)


def _row(page: _Page, tiles: Sequence[_Tile], room: float = 0.32) -> None:
    """A row of tiles, with room for a heading above it, or at least for their names."""
    page.y += room
    for column, tile in enumerate(tiles):
        x, y = column * (1 + _GAP), page.y + 1.03
        page.text(x, page.y - 0.035, tile.name, 8.5, family=_MONO)
        _result(page, x, tile.out, 0)
        begin = 0.0
        for i, (name, share, color) in enumerate(tile.shares):
            page.axes(x + begin, y, share, 0.045, functools.partial(_fill, color=color))
            begin += share
            where = (x + 0.52 * (i % 2), y + 0.13 + _LINE * (i // 2))
            page.text(*where, f"{_short(name, 10)} {share:.2f}", 7, color=_dark(color))
    below = max((len(tile.shares) + 1) // 2 for tile in tiles)
    page.y += 1 + _GAP + (0.06 + _LINE * below if below else 0.0)
