"""What an augmentation did to an example, read from its plan."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mixlab.augment import Augmentation
from mixlab.types import Plan

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
