"""Policies that draw image ops and their strength: RandAugment in its dialects."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.augment import ops
from mixlab.augment.core import Augmentation, check_probability, image_of
from mixlab.augment.dispatch import run_each
from mixlab.augment.geometric import Fill, check_sampling
from mixlab.spec import nearest
from mixlab.types import Array, ArrayLike, Batch, Key, Plan

Part = Callable[[float], Array]
"""`part(x)` is the share of x that the magnitude amounts to."""


class _Op(NamedTuple):
    """An op of a policy: its name, what it does, and how strength and sign become its argument."""

    name: str
    run: Callable[[Array, Array], Array]
    argument: Callable[[Part, Array, tuple[int, int]], Array] = lambda part, sign, size: 0.0 * sign


def _signed(largest: float) -> Callable[[Part, Array, tuple[int, int]], Array]:
    return lambda part, sign, size: sign * part(largest)


def _geometric(
    interpolation: str, fill: Fill, dialect: str
) -> dict[str, Callable[[Array, Array], Array]]:
    def run(name: str) -> Callable[[Array, Array], Array]:
        op = getattr(ops, name)
        return lambda image, argument: op(
            image, argument, interpolation=interpolation, fill=fill, dialect=dialect
        )

    return {
        name: run(name) for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    }


def _identity(image: Array, argument: Array) -> Array:
    del argument
    return image


def _torchvision(interpolation: str, fill: Fill) -> tuple[_Op, ...]:
    geometric = _geometric(interpolation, fill, "torchvision")

    def factor(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        del size
        return 1.0 + sign * part(0.9)

    def pixels(axis: int) -> Callable[[Part, Array, tuple[int, int]], Array]:
        return lambda part, sign, size: sign * jnp.trunc(part(150.0 / 331.0 * size[axis]))

    return (
        _Op("identity", _identity),
        _Op("shear_x", geometric["shear_x"], _signed(0.3)),
        _Op("shear_y", geometric["shear_y"], _signed(0.3)),
        _Op("translate_x", geometric["translate_x"], pixels(1)),
        _Op("translate_y", geometric["translate_y"], pixels(0)),
        _Op("rotate", geometric["rotate"], _signed(30.0)),
        _Op("brightness", ops.brightness, factor),
        _Op("color", ops.color, factor),
        _Op("contrast", ops.contrast, factor),
        _Op("sharpness", ops.sharpness, factor),
        _Op("posterize", ops.posterize, lambda part, sign, size: 8.0 - jnp.round(part(4.0))),
        _Op("solarize", ops.solarize, lambda part, sign, size: 255.0 - part(255.0)),
        _Op("autocontrast", lambda image, argument: ops.autocontrast(image)),
        _Op("equalize", lambda image, argument: ops.equalize(image)),
    )


def _timm(interpolation: str, fill: Fill, increasing: bool) -> tuple[_Op, ...]:
    geometric = _geometric(interpolation, fill, "pil")

    def factor(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        del size
        return jnp.maximum(0.1, 1.0 + sign * part(0.9)) if increasing else 0.1 + part(1.8)

    def bits(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        del sign, size
        kept = jnp.floor(part(4.0))
        return 4.0 - kept if increasing else kept

    def threshold(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        del sign, size
        level = jnp.minimum(jnp.floor(part(256.0)), 256.0)
        return 256.0 - level if increasing else level

    def pixels(axis: int) -> Callable[[Part, Array, tuple[int, int]], Array]:
        return lambda part, sign, size: sign * part(0.45) * size[axis]

    def addition(part: Part, sign: Array, size: tuple[int, int]) -> Array:
        del sign, size
        return jnp.minimum(jnp.floor(part(110.0)), 128.0)

    return (
        _Op("autocontrast", lambda image, argument: ops.autocontrast(image)),
        _Op("equalize", lambda image, argument: ops.equalize(image)),
        _Op("invert", lambda image, argument: ops.invert(image)),
        _Op("rotate", geometric["rotate"], _signed(30.0)),
        _Op("posterize", ops.posterize, bits),
        _Op("solarize", ops.solarize, threshold),
        _Op("solarize_add", ops.solarize_add, addition),
        _Op("color", ops.color, factor),
        _Op("contrast", ops.contrast, factor),
        _Op("brightness", ops.brightness, factor),
        _Op("sharpness", ops.sharpness, factor),
        _Op("shear_x", geometric["shear_x"], _signed(0.3)),
        _Op("shear_y", geometric["shear_y"], _signed(0.3)),
        _Op("translate_x", geometric["translate_x"], pixels(1)),
        _Op("translate_y", geometric["translate_y"], pixels(0)),
    )


class _Dialect(NamedTuple):
    build: Callable[[str, Fill], tuple[_Op, ...]]
    top: int
    """The magnitude of full strength: the last of 31 bins, or timm's level 10."""
    prob: float
    interpolation: str
    fill: Fill


_DIALECTS = {
    "torchvision": _Dialect(_torchvision, 30, 1.0, "nearest", 0),
    "timm": _Dialect(lambda i, f: _timm(i, f, False), 10, 0.5, "bilinear", 128),
    "timm_increasing": _Dialect(lambda i, f: _timm(i, f, True), 10, 0.5, "bilinear", 128),
}


def _dialect(name: str) -> _Dialect:
    if name not in _DIALECTS:
        raise ValueError(f"unknown RandAugment dialect {name!r}; {nearest(str(name), _DIALECTS)}")
    return _DIALECTS[name]


def randaugment_arguments(
    dialect: str, magnitude: ArrayLike, sign: ArrayLike, size: tuple[int, int]
) -> dict[str, Array]:
    """What each op of a dialect is given at a magnitude: its table of magnitudes.

    Args:
        dialect: `"torchvision"`, `"timm"` or `"timm_increasing"`.
        magnitude: any shape, in 0..30 (torchvision's bins) or 0..10 (timm).
        sign: 1 or -1, of the same shape; ops without direction do not use it.
        size: height and width of the images.

    Returns:
        The argument of each op by its name in `augment.ops`, in the order of the dialect: float32,
        factors, degrees, pixels, bits or levels; 0 for ops without argument.

    Raises:
        ValueError: the dialect is unknown.
    """
    chosen = _dialect(dialect)
    magnitude = jnp.asarray(magnitude, jnp.float32)
    sign = jnp.asarray(sign, jnp.float32)

    def part(largest: float) -> Array:
        # Multiplied first: whole magnitudes then give whole levels without an error.
        return magnitude * largest / float(chosen.top)

    return {
        op.name: jnp.broadcast_to(op.argument(part, sign, size), magnitude.shape)
        for op in chosen.build(chosen.interpolation, chosen.fill)
    }


def randaugment(
    num_ops: int = 2,
    magnitude: float = 9,
    *,
    dialect: str = "torchvision",
    magnitude_std: float = 0.0,
    prob: float | None = None,
    interpolation: str | None = None,
    fill: Fill | None = None,
    per_batch: bool = False,
) -> Augmentation:
    """RandAugment: a few random ops of one common strength.

    Each op is drawn uniformly, with replacement, its direction by a fair coin. The single ops equal
    those of the dialect, see `augment.ops`; the tables of strength are `randaugment_arguments`.

    | dialect | ops | magnitude | per op | interpolation | fill |
    |---|---|---|---|---|---|
    | `torchvision` | 14, identity among them | bin 0..30 | always | nearest | 0 |
    | `timm` | 15, invert and solarize_add among them | 0..10 | probability 1/2 | bilinear | 128 |
    | `timm_increasing` | the same, stronger with the magnitude | 0..10 | 1/2 | bilinear | 128 |

    timm draws bilinear or bicubic by a coin at every op; here one of them is used throughout.

    Args:
        num_ops: ops one after the other.
        magnitude: strength on the scale of the dialect.
        dialect: whose ops and tables: see above.
        magnitude_std: standard deviation of a normal law around `magnitude` from which every op's
            strength is drawn, clipped to 0..10 (timm's `mstd`); only for the timm dialects.
        prob: probability of each op; None takes the dialect's.
        interpolation: of the geometric ops, `"nearest"`, `"bilinear"` or, for timm, `"bicubic"`;
            None takes the dialect's.
        fill: colour outside the image on the scale 0..255, one number or one a channel; None takes
            the dialect's.
        per_batch: the same ops for the whole batch instead of one draw an example.

    Returns:
        An augmentation of images [B, H, W, C] with the plan `op` int32 [B, num_ops], an index into
        `randaugment_arguments(dialect, ...)`; `argument` float32 [B, num_ops], what the op is
        given, with its sign; `use` bool [B, num_ops].

    Raises:
        ValueError: an argument is out of its range or unknown to the dialect.

    Source: Cubuk et al., "RandAugment", 2020, section 3; torchvision v2 `RandAugment`, timm
    `rand_augment_transform`.
    """
    chosen = _dialect(dialect)
    if num_ops < 1 or num_ops != int(num_ops):
        raise ValueError(f"num_ops is a whole number of at least 1, got {num_ops}")
    if not 0 <= magnitude <= chosen.top:
        raise ValueError(
            f"magnitude lies in 0..{chosen.top} in the dialect {dialect!r}, got {magnitude}"
        )
    if not 0.0 <= magnitude_std < np.inf:
        raise ValueError(f"magnitude_std must be finite and >= 0, got {magnitude_std}")
    if dialect == "torchvision" and (magnitude_std or magnitude != int(magnitude)):
        raise ValueError(
            "the dialect 'torchvision' takes a whole magnitude without spread, got "
            f"magnitude={magnitude}, magnitude_std={magnitude_std}; the timm dialects take both"
        )
    prob = chosen.prob if prob is None else prob
    check_probability("prob", prob)
    interpolation = chosen.interpolation if interpolation is None else interpolation
    check_sampling(interpolation, "torchvision" if dialect == "torchvision" else "pil")
    table = chosen.build(interpolation, chosen.fill if fill is None else fill)
    branches = [_identity, *(op.run for op in table)]

    def sample(key: Key, batch: Batch) -> Plan:
        image = image_of(batch)
        shape = (1 if per_batch else image.shape[0], num_ops)
        op_key, sign_key, use_key, level_key = jax.random.split(key, 4)
        op = jax.random.randint(op_key, shape, 0, len(table), jnp.int32)
        sign = jnp.where(jax.random.uniform(sign_key, shape) < 0.5, -1.0, 1.0)
        level = jnp.full(shape, magnitude, jnp.float32)
        if magnitude_std > 0.0:
            spread = magnitude_std * jax.random.normal(level_key, shape, jnp.float32)
            level = jnp.clip(level + spread, 0.0, float(chosen.top))
        size = (image.shape[1], image.shape[2])
        arguments = randaugment_arguments(dialect, level, sign, size)
        stacked = jnp.stack(list(arguments.values()), axis=-1)
        plan = {
            "op": op,
            "argument": jnp.take_along_axis(stacked, op[..., None], axis=-1)[..., 0],
            "use": jax.random.uniform(use_key, shape) < prob,
        }
        full = (image.shape[0], num_ops)
        return {name: jnp.broadcast_to(x, full) for name, x in plan.items()}

    def apply(plan: Plan, batch: Batch) -> Batch:
        image = image_of(batch)
        op, argument = jnp.asarray(plan["op"]), jnp.asarray(plan["argument"], jnp.float32)
        branch = jnp.where(jnp.asarray(plan.get("use", True)), op + 1, 0)
        return {**batch, "image": run_each(branches, image, branch, argument)}

    return Augmentation(sample, apply)
