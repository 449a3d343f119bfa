"""Patterns of leaf names, and numbers by leaf: one for all, or one for each pattern."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mixlab.types import ArrayLike

PerLeaf = ArrayLike | Mapping[str, ArrayLike]
"""A value for all leaves, or `{pattern: value}` as `spread` reads it."""


def spread(value: Any, names: Iterable[str], fn: Callable[[Any], Any]) -> Any:
    """`fn(value)`, or for `{pattern: value}` a dict of `fn` of each leaf's value.

    Patterns are shell-style (`fnmatch`, minding case): `*` matches anything, `/` too, so
    `"encoder/*"` is all of the encoder and `"*/bias"` every bias. A leaf takes the first pattern
    that it matches, so special ones come before general ones.

    Args:
        value: one value, or a mapping from patterns to values.
        names: the names of the leaves.
        fn: makes of a value what the plan keeps.

    Raises:
        ValueError: a leaf matches no pattern, or a pattern is no leaf's first match.
    """
    if not isinstance(value, Mapping):
        return fn(value)
    first = {name: next((p for p in value if fnmatch.fnmatchcase(name, p)), None) for name in names}
    if missed := [name for name, pattern in first.items() if pattern is None]:
        raise ValueError(
            f"no pattern of {list(value)} matches the leaves {missed}; end with '*' for the rest"
        )
    if idle := [pattern for pattern in value if pattern not in first.values()]:
        raise ValueError(
            f"the patterns {idle} decide for no leaf: they match none of {list(first)}, or an "
            "earlier pattern matches first"
        )
    made = {pattern: fn(each) for pattern, each in value.items()}
    return {name: made[pattern] for name, pattern in first.items() if pattern is not None}


def any_of(patterns: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a name matches one of some patterns, or the one, as `spread` reads them.

    Raises:
        ValueError: a pattern is no text.
    """
    many = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if strange := [pattern for pattern in many if not isinstance(pattern, str)]:
        raise ValueError(f"patterns are texts such as '*/bias', got {strange}")
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in many)


def at(planned: Any, name: str) -> Any:
    """What `spread` made for the leaf `name`."""
    return planned[name] if isinstance(planned, Mapping) else planned


def values(value: Any) -> list[Any]:
    """The values that are given, whether by pattern or for all, to be checked one by one."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def by_depth(values: ArrayLike, layers: Sequence[str]) -> dict[str, ArrayLike]:
    """Values that change piecewise linearly from the first layer to the last.

    `average(by_depth([[1, 0], [0, 1]], [f"Block_{i}/*" for i in range(12)]) | {"*": [1, 1]})`
    moves from the first model to the second on the way through the blocks.

    Args:
        values: `[K]` numbers or `[K, M]` weights, at K points evenly spaced over the layers, the
            first on the first layer and the last on the last.
        layers: a pattern for each layer, in order.

    Returns:
        The value of each pattern, to be joined with those of other leaves.

    Raises:
        ValueError: there are no values.

    Source: the gradients of mergekit's recipes.
    """
    points = np.asarray(values, np.float64)
    if points.ndim == 0 or len(points) == 0:
        raise ValueError(f"values must be [K] or [K, M] with K at least 1, got {values!r}")
    places = np.linspace(0, len(points) - 1, len(layers))
    low = np.minimum(places.astype(int), max(len(points) - 2, 0))
    high = np.minimum(low + 1, len(points) - 1)
    part = (places - low).reshape(-1, *[1] * (points.ndim - 1))
    return dict(zip(layers, (1 - part) * points[low] + part * points[high], strict=True))
