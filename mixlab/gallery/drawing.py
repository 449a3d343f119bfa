"""Draws one augmentation in detail, or all of them on one sheet.

The colours tell whose a pixel or a share of the label is: blue the example's own, orange, green,
... its partners'.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mixlab import augment, data, trees
from mixlab.augment import Augmentation
from mixlab.augment.core import image_of
from mixlab.augment.policies.spaces import GEOMETRIC
from mixlab.data import embedded
from mixlab.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW
from mixlab.gallery.catalogue import METHODS, OPS, SHARES, Method
from mixlab.gallery.examples import examples
from mixlab.gallery.page import (
    FAINT,
    GAP,
    LINE,
    MONO,
    RULE,
    Page,
    dark,
    fill_all,
    outline,
    paint_image,
    short,
)
from mixlab.gallery.steps import Step, steps
from mixlab.types import Batch, Key, Plan

SEED = 381
"""Draws that show well on the photos; few of them find themselves as partner."""

_ROLES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
_LEGEND = (
    "Each method on the source at the head of its column, mixed with the one to the left (mosaic: "
    "with any three)."
)


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
    page = Page(size)
    for title, one in given.items():
        page.y += 2 * GAP if page.y else 0.0
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
        titles = [short(names[k], 20) for k in np.argmax(batch["label"], axis=1)]
    sources = [
        _Tile(title, {"image": image[None]})
        for title, image in zip(titles, batch["image"], strict=True)
    ]
    page = Page(size)
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


# One augmentation in detail.


def _section(
    page: Page,
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
    starts = np.cumsum([0.0, *(width + GAP for _, width in heads)]).tolist()

    for line in textwrap.wrap(title, int(starts[-1] / 0.058)):
        page.y += 0.1
        page.text(0, page.y, line, 10, family=MONO, weight="bold")
        page.y += 0.04
    page.y += 0.12
    for (head, _), x in zip(heads, starts, strict=False):
        page.text(x, page.y, head, 8, color=FAINT)
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
            at, top = next(x), page.y + 0.5 - 0.5 * LINE * max(1, len(lines[row]))
            for i, line in enumerate(lines[row] or ["–"]):
                page.text(at, top + (i + 0.8) * LINE, line, 8, family=MONO)
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
        page.y += 1 + GAP
    page.y -= GAP


def _result(page: Page, x: float, out: Batch, row: int) -> None:
    """What came out; of crops of two sizes the large ones above the small ones."""
    if "local" not in out:
        page.picture(x, page.y, out["image"][row])
        return
    gap = 0.025
    large = (1 - gap * (out["image"].shape[1] - 1)) / max(2, out["image"].shape[1])
    small = (1 - large - 2 * gap) / 2
    for images, top, side in ((out["image"][row], 0.0, large), (out["local"][row], large, small)):
        across = int((1 + gap) / (side + gap) + 0.01)
        for i, image in enumerate(images):
            left, down = (side + gap) * (i % across), (side + gap) * (i // across)
            page.picture(x + left, page.y + top + down + (gap if top else 0), image, side=side)


def _boxed(page: Page, x: float, image: np.ndarray, boxes: Sequence[np.ndarray]) -> None:
    """The source, with the boxes that a crop or an eraser drew."""
    line = page.points(2.25)

    def paint(ax: Axes) -> None:
        paint_image(ax, image, None, line)
        for top, left, bottom, right in boxes:
            ax.add_patch(outline((left - 0.5, top - 0.5), right - left, bottom - top, YELLOW, line))

    page.axes(x, page.y, 1, 1, paint)


def _mixed(
    page: Page, x: float, x_mask: float, image: np.ndarray, step: Step, colors: Iterator[str]
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


def _bars(page: Page, ax: Axes, shares: Sequence[Share]) -> None:
    """The shares of a label: a bar each, with name and share above it."""
    ax.set(xlim=(0, 1.1), ylim=(4, 0))
    for row, (name, share, color) in enumerate(shares):
        y = row + (4 - len(shares)) / 2
        ax.barh(y + 0.66, 1.1, color="#ECECEC", height=0.26)
        ax.barh(y + 0.66, 1.1 * share, color=color, height=0.26)
        size = page.points(8)
        ax.text(0, y + 0.42, short(name, 18), ha="left", fontsize=size, parse_math=False)
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

    def op(name: str, arguments: tuple[Any, ...], column: int) -> _Tile:
        if name in SHARES:
            side = {"translate_x": width, "translate_y": height}.get(name, min(height, width))
            arguments = tuple(max(1, round(share * side)) for share in arguments)
        options = {"interpolation": "bicubic"} if name in (*GEOMETRIC, "affine") else {}
        apply = getattr(augment.ops, name)
        out = jax.jit(lambda image: apply(image, *arguments, **options))(image[column])
        written = ", ".join(map(str, arguments)) if len(arguments) == 1 else "…"
        return _Tile(f"{name}({written})" if arguments else name, {"image": np.asarray(out)[None]})

    makers: dict[str, list[_Maker]] = {
        heading: [functools.partial(method, *entry) for entry in group.items()]
        for heading, group in METHODS.items()
    }
    for heading, group in OPS.items():
        makers[heading] = [functools.partial(op, *entry) for entry in group.items()]
    return makers


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


def _heading(page: Page, column: int, span: int, text: str) -> None:
    """A heading over some columns of the row that comes next."""
    x, end = column * (1 + GAP), (column + span) * (1 + GAP) - GAP
    page.text(x, page.y + 0.11, text, 11, weight="bold")

    def rule(ax: Axes) -> None:
        ax.axhline(0.5, color=RULE, linewidth=page.points(0.8))

    page.axes(x, page.y + 0.15, end - x, 0.02, rule)


def _row(page: Page, tiles: Sequence[_Tile], room: float = 0.32) -> None:
    """A row of tiles, with room for a heading above it, or at least for their names."""
    page.y += room
    for column, tile in enumerate(tiles):
        x, y = column * (1 + GAP), page.y + 1.03
        page.text(x, page.y - 0.035, tile.name, 8.5, family=MONO)
        _result(page, x, tile.out, 0)
        begin = 0.0
        for i, (name, share, color) in enumerate(tile.shares):
            page.axes(x + begin, y, share, 0.045, functools.partial(fill_all, color=color))
            begin += share
            where = (x + 0.52 * (i % 2), y + 0.13 + LINE * (i // 2))
            page.text(*where, f"{short(name, 10)} {share:.2f}", 7, color=dark(color))
    below = max((len(tile.shares) + 1) // 2 for tile in tiles)
    page.y += 1 + GAP + (0.06 + LINE * below if below else 0.0)
