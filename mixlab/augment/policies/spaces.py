"""The spaces that policies search: their ops, and what a strength means for each of them.

A `Space` is a table from the names of ops to rules that turn a strength and a direction into the
op's argument. It draws the random part of an op's argument, carries a decision out, and tells how
the geometric ops of a decision move the pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random
from mixlab.augment import ops
from mixlab.augment.core import size_of
from mixlab.augment.ops import google
from mixlab.augment.ops.blur import gaussian_blur
from mixlab.augment.ops.dispatch import run_each
from mixlab.augment.ops.geometric import Fill, check_sampling, rotation, warp
from mixlab.types import Array, ArrayLike, Key, Plan

Part = Callable[[float], Array]
"""`part(x)` is the share of x that the strength amounts to."""
Rule = Callable[[Part, Array, tuple[int, int]], Array]
"""`rule(part, sign, (height, width))` is the argument of an op."""

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
NOT_OF_RANDAUGMENT = ("desaturate", "gaussian_blur")
"""Ops of timm that only its other policies use."""
_OPS: dict[str, Callable[..., Array]] = {"desaturate": ops.color, "gaussian_blur": gaussian_blur}
_WITHOUT_ARGUMENT = ("autocontrast", "equalize", "invert")


@dataclasses.dataclass(frozen=True)
class Space:
    """Ops to draw from, how strong they are, and how their geometry is sampled.

    Attributes:
        rules: the argument of each op, by its name in `augment.ops`; three more are known:
            `identity`, `cutout`, a square with a random centre, and `desaturate`, which is `color`
            with the colour that is left.
        top: the strength that stands for the whole of the range; in the dialect `"torchvision"`
            strengths are the indices 0..top of bins, in others they may go beyond.
        dialect: whose conventions the geometric ops and contrast follow: `"pil"`, `"torchvision"`
            or `"google"`.
        interpolation: of the geometric ops; `"random"` draws bilinear or bicubic for each.
        fill: colour outside the image on the scale 0..255.
    """

    rules: Mapping[str, Rule]
    top: float
    dialect: str
    interpolation: str
    fill: Fill

    def sampled(self, interpolation: str | None, fill: Fill | None) -> "Space":
        """The space with another interpolation and fill; None leaves what it has.

        Raises:
            ValueError: the dialect has no such interpolation.
        """
        interpolation = self.interpolation if interpolation is None else interpolation
        if self.dialect == "google" and interpolation != "nearest":
            raise ValueError(f"the dialect 'google' has only 'nearest', got {interpolation!r}")
        if self.dialect == "torchvision" or interpolation not in ("nearest", "random"):
            check_sampling(interpolation, self.dialect)
        fill = self.fill if fill is None else fill
        return dataclasses.replace(self, interpolation=interpolation, fill=fill)

    def arguments(
        self, strength: ArrayLike, sign: ArrayLike, size: tuple[int, int]
    ) -> dict[str, Array]:
        """What each op is given: float32 of the shape of `strength` and `sign`, by name."""
        strength = jnp.asarray(strength, jnp.float32)
        sign = jnp.asarray(sign, jnp.float32)
        shape = jnp.broadcast_shapes(strength.shape, sign.shape)
        bins = jnp.clip(jnp.round(strength), 0.0, self.top).astype(jnp.int32)

        def part(largest: float) -> Array:
            if self.dialect == "torchvision":
                return jnp.asarray(_bins(largest, int(self.top)))[bins]
            # Multiplied first: whole strengths then give whole levels without an error.
            return strength * largest / float(self.top)

        return {
            name: jnp.broadcast_to(rule(part, sign, size), shape)
            for name, rule in self.rules.items()
        }

    def decide(self, key: Key, op: Array, strength: Array, size: tuple[int, int]) -> Plan:
        """Draws what is random about ops that are chosen already.

        Args:
            key: PRNG key.
            op: int32 of any shape, indices into the names of the space.
            strength: of the same shape.
            size: height and width of the images.

        Returns:
            `op` and `argument`, float32 of its shape; where the space needs them, `bicubic` (bool)
            and `center` (int32 [..., 2], row and column of cutout's centre).
        """
        sign_key, spline_key, center_key = jax.random.split(key, 3)
        sign = jnp.where(random.uniform(sign_key, op.shape) < 0.5, -1.0, 1.0)
        stacked = jnp.stack(list(self.arguments(strength, sign, size).values()), axis=-1)
        argument = jnp.take_along_axis(stacked, op[..., None], axis=-1)[..., 0]
        plan: Plan = {"op": op, "argument": argument}
        if self.interpolation == "random":
            plan["bicubic"] = random.uniform(spline_key, op.shape) < 0.5
        if "cutout" in self.rules:
            plan["center"] = jax.random.randint(
                center_key, (*op.shape, 2), 0, jnp.asarray(size, jnp.int32), jnp.int32
            )
        return plan

    def run(self, plan: Plan, image: Array) -> Array:
        """Carries a decision out.

        Args:
            plan: `op` [B, n], n ops in a row for each image, with what `decide` adds to it and
                `use` [B, n], which of them take part.
            image: [B, H, W, C] or [B, T, H, W, C].
        """
        op = jnp.asarray(plan["op"])
        given: dict[str, Array] = {"argument": jnp.asarray(plan["argument"], jnp.float32)}
        branches: list[Callable[[Array, dict[str, Array]], Array]] = [lambda image, given: image]
        code = np.zeros(len(self.rules), np.int32)
        by_matrix = np.array([self._by_matrix(name) for name in self.rules])
        for i, name in enumerate(self.rules):
            if name != "identity" and not by_matrix[i]:
                code[i] = len(branches)
                branches.append(self._single(name))
        branch = jnp.asarray(code)[op]
        if by_matrix.any():
            # One branch for all that an affine map describes: there is less to compile.
            kind = len(branches) + jnp.asarray(plan.get("bicubic", False)).astype(jnp.int32)
            branch = jnp.where(jnp.asarray(by_matrix)[op], kind, branch)
            branches.extend(self._affine())
            given["matrix"] = self.matrices(plan, size_of(image.shape))
        if "cutout" in self.rules:
            given["center"] = jnp.asarray(plan["center"])
        branch = jnp.where(jnp.asarray(plan.get("use", True)), branch, 0)
        return run_each(branches, image, branch, given)

    def move(self, plan: Plan, mask: Array) -> Array:
        """Moves a mask [B, H, W, M] as a decision moves the image, without interpolating."""
        matrices = self.matrices(plan, (mask.shape[1], mask.shape[2]))
        used = [name in GEOMETRIC for name in self.rules]
        active = jnp.asarray(used)[jnp.asarray(plan["op"])] & jnp.asarray(plan.get("use", True))

        def step(one: Array, matrix: Array, active: Array) -> Array:
            if self.dialect == "google":
                moved = google.affine(one, matrix, 0)
            else:
                moved = warp(one, matrix, "nearest", 0, self.dialect)
            return jnp.where(active, moved, one)

        for i in range(matrices.shape[1]):
            mask = jax.vmap(step)(mask, matrices[:, i], active[:, i])
        return mask

    def matrices(self, plan: Plan, size: tuple[int, int]) -> Array:
        """How the ops of a decision move the pixels.

        Returns:
            float32 [..., 2, 3] for `op` [...]: rows (a, b, c) so that a pixel of the result at
            (x, y) looks up a * x + b * y + c, in units in which (0, 0) is the outer corner of the
            first pixel. Ops that move nothing, or are not used, have the identity.
        """
        op, argument = jnp.asarray(plan["op"]), jnp.asarray(plan["argument"], jnp.float32)
        used = jnp.asarray(plan.get("use", True))
        matrix = jnp.broadcast_to(jnp.eye(2, 3, dtype=jnp.float32), (*op.shape, 2, 3))
        for i, name in enumerate(self.rules):
            if name in GEOMETRIC:
                moved = _matrix(name, argument, size, self.dialect)
                matrix = jnp.where(((op == i) & used)[..., None, None], moved, matrix)
        return matrix

    def _by_matrix(self, name: str) -> bool:
        """Whether an op shares the branch of the affine maps: nearest has faster ways."""
        return name in GEOMETRIC and (self.dialect == "google" or self.interpolation != "nearest")

    def _single(self, name: str) -> Callable[[Array, dict[str, Array]], Array]:
        """The branch of one op."""
        if name == "cutout":
            return lambda image, given: google.cutout(
                image, given["center"], given["argument"], self.fill
            )
        op: Callable[..., Array] = _OPS[name] if name in _OPS else getattr(ops, name)
        options: dict[str, Any] = {}
        if name in GEOMETRIC:
            options = {
                "interpolation": self.interpolation,
                "fill": self.fill,
                "dialect": self.dialect,
            }
        elif name == "contrast" and self.dialect == "google":
            options = {"dialect": "google"}
        if name in _WITHOUT_ARGUMENT:
            return lambda image, given: op(image)
        return lambda image, given: op(image, given["argument"], **options)

    def _affine(self) -> list[Callable[[Array, dict[str, Array]], Array]]:
        """The branches of the affine maps: one, or bilinear and bicubic."""
        if self.dialect == "google":
            return [lambda image, given: google.affine(image, given["matrix"], self.fill)]
        kinds = ("bilinear", "bicubic") if self.interpolation == "random" else (self.interpolation,)
        return [
            lambda image, given, kind=kind: warp(  # type: ignore[misc]
                image, given["matrix"], kind, self.fill, self.dialect
            )
            for kind in kinds
        ]


def _matrix(name: str, argument: Array, size: tuple[int, int], dialect: str) -> Array:
    """The affine map [..., 2, 3] of a geometric op, as in `Space.matrices`."""
    one, zero = jnp.ones_like(argument), jnp.zeros_like(argument)
    # Google's shears hold the centre of the first pixel, the others its corner.
    shift = -0.5 * argument if dialect == "google" else zero
    pixels = -jnp.trunc(argument) if dialect == "torchvision" else argument
    if name == "rotate":
        first, second = rotation(argument, size)
        entries = (*first, *second)
    else:
        entries = {
            "shear_x": (one, argument, shift, zero, one, zero),
            "shear_y": (one, zero, zero, argument, one, shift),
            "translate_x": (one, zero, pixels, zero, one, zero),
            "translate_y": (one, zero, zero, zero, one, pixels),
        }[name]
    return jnp.stack(entries, axis=-1).reshape(*argument.shape, 2, 3)


def _bins(largest: float, top: int) -> np.ndarray:
    """0..largest in top + 1 steps, float32, as `torch.linspace` counts them from both ends.

    Whole pixels depend on the rounding: 32 pixels at bin 15 of 30 are 15, not 16.
    """
    end = np.float32(largest)
    step = np.float64(end / np.float32(top))
    k = np.arange(top + 1)
    return np.where(k < (top + 1) // 2, step * k, end - step * (top - k)).astype(np.float32)


def _signed(largest: float) -> Rule:
    return lambda part, sign, size: sign * part(largest)


def _constant(part: Part, sign: Array, size: tuple[int, int]) -> Array:
    return 0.0 * sign


def torchvision_rules(
    *,
    shear: float = 0.3,
    rotate: float = 30.0,
    enhance: float = 0.9,
    bits: tuple[int, int] = (8, 4),
    reach: Callable[[int], float] = lambda length: 150.0 / 331.0 * length,
) -> dict[str, Rule]:
    """The ops of torchvision's policies; the defaults are RandAugment's and AutoAugment's.

    Args:
        shear: the strongest, in pixels a row.
        rotate: the strongest, in degrees.
        enhance: how far the factors of color, contrast, brightness and sharpness go from 1.
        bits: what posterize keeps at no and at full strength.
        reach: the longest translation of an image of that side, in pixels.
    """

    def factor(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        return 1.0 + sign * part(enhance)

    def pixels(axis: int) -> Rule:
        return lambda part, sign, size: sign * jnp.trunc(part(reach(size[axis])))

    return {
        "identity": _constant,
        "shear_x": _signed(shear),
        "shear_y": _signed(shear),
        "translate_x": pixels(1),
        "translate_y": pixels(0),
        "rotate": _signed(rotate),
        "brightness": factor,
        "color": factor,
        "contrast": factor,
        "sharpness": factor,
        "posterize": lambda part, sign, size: bits[0] - jnp.round(part(bits[0] - bits[1])),
        "solarize": lambda part, sign, size: 255.0 - part(255.0),
        "autocontrast": _constant,
        "equalize": _constant,
        "invert": _constant,
    }


def timm_rules(*, increasing: bool, bits: str) -> dict[str, Rule]:
    """The ops of timm's policies.

    Args:
        increasing: whether strength takes color, contrast, brightness, sharpness and solarize away
            from the image itself; if not, they have their mildest effect somewhere in the middle.
        bits: which of timm's rules posterize follows: `"decreasing"` (0 to 4 bits), `"increasing"`
            (4 to 0) or `"original"` (4 to 8).
    """

    def factor(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        return jnp.maximum(0.1, 1.0 + sign * part(0.9)) if increasing else 0.1 + part(1.8)

    def kept(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        step = jnp.floor(part(4.0))
        rules = {"decreasing": step, "increasing": 4.0 - step, "original": 4.0 + step}
        return jnp.clip(rules[bits], 0.0, 8.0)

    def threshold(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        level = jnp.minimum(jnp.floor(part(256.0)), 256.0)
        return 256.0 - level if increasing else level

    def pixels(axis: int) -> Rule:
        return lambda part, sign, size: sign * part(0.45) * size[axis]

    return {
        "autocontrast": _constant,
        "equalize": _constant,
        "invert": _constant,
        "rotate": _signed(30.0),
        "posterize": kept,
        "solarize": threshold,
        "solarize_add": lambda part, sign, size: jnp.minimum(jnp.floor(part(110.0)), 128.0),
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_x": _signed(0.3),
        "shear_y": _signed(0.3),
        "translate_x": pixels(1),
        "translate_y": pixels(0),
        "desaturate": lambda part, sign, size: jnp.clip(0.5 - part(0.5), 0.0, 1.0),
        "gaussian_blur": lambda part, sign, size: 0.1 + part(1.9),
    }


def google_rules(*, translate: float, cutout: float) -> dict[str, Rule]:
    """The ops of Google's policies: timm's decreasing ones, which came from there, and cutout.

    Args:
        translate: the longest translation, in pixels.
        cutout: the largest half side of the square, in pixels.
    """
    return {
        **without(timm_rules(increasing=False, bits="decreasing"), *NOT_OF_RANDAUGMENT),
        # Thresholds are 8-bit numbers there: 256, at full strength, is 0.
        "solarize": lambda part, sign, size: jnp.floor(part(256.0)) % 256.0,
        "solarize_add": lambda part, sign, size: jnp.floor(part(110.0)),
        "translate_x": _signed(translate),
        "translate_y": _signed(translate),
        "cutout": lambda part, sign, size: jnp.floor(part(cutout)),
    }


def without(rules: Mapping[str, Rule], *names: str) -> dict[str, Rule]:
    """The rules but for some."""
    return {name: rule for name, rule in rules.items() if name not in names}


def only(space: Space, *names: str) -> Space:
    """The space with some of its ops."""
    rules = {name: rule for name, rule in space.rules.items() if name in names}
    return dataclasses.replace(space, rules=rules)
