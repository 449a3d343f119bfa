"""Matchings by name: what a config may compare."""

from collections.abc import Callable
from typing import NamedTuple

from mixlab import align, spec
from mixlab.align import Permutations
from mixlab.barrier.setting import Setting
from mixlab.types import Key, PyTree


class Pair(NamedTuple):
    """Two networks to match.

    Attributes:
        setting: their function and data.
        reference: variables of the network that keeps its order.
        other: those of the network to permute.
        key: for what is drawn.
    """

    setting: Setting
    reference: PyTree
    other: PyTree
    key: Key


Matching = Callable[[Pair], Permutations]
"""Brings the other network's units into the reference's order."""


def none() -> Matching:
    """The networks as they are."""
    return lambda pair: pair.setting.symmetry.identity()


def weight_matching(max_iterations: int = 100) -> Matching:
    """See `align.weight_matching`."""
    return lambda pair: align.weight_matching(
        pair.setting.symmetry,
        pair.reference,
        pair.other,
        key=pair.key,
        max_iterations=max_iterations,
    )


def activation_matching(statistic: str = "correlation") -> Matching:
    """See `align.activation_matching`."""
    return lambda pair: align.activation_matching(
        pair.setting.symmetry,
        pair.setting.fn,
        pair.reference,
        pair.other,
        pair.setting.examples["image"],
        statistic=statistic,
    )


def straight_through(
    epochs: int = 10, learning_rate: float = 1e-2, momentum: float = 0.9
) -> Matching:
    """See `align.straight_through`; a step a batch of the matching examples, `epochs` times."""
    return lambda pair: align.straight_through(
        pair.setting.symmetry,
        pair.setting.loss,
        pair.reference,
        pair.other,
        pair.setting.batches(epochs),
        key=pair.key,
        learning_rate=learning_rate,
        momentum=momentum,
    )


def sinkhorn_matching(
    data: bool = True,
    point: str = "midpoint",
    steps: int = 200,
    learning_rate: float = 0.1,
    temperature: float = 1.0,
) -> Matching:
    """See `align.sinkhorn_matching`; without data the distance of the weights is lowered."""
    return lambda pair: align.sinkhorn_matching(
        pair.setting.symmetry,
        pair.setting.loss if data else None,
        pair.reference,
        pair.other,
        pair.setting.batches() if data else None,
        key=pair.key,
        steps=steps,
        learning_rate=learning_rate,
        temperature=temperature,
        point=point,
    )


MATCHINGS = {
    matching.__name__: matching
    for matching in (
        none,
        weight_matching,
        activation_matching,
        straight_through,
        sinkhorn_matching,
    )
}
"""What `config.matchings` may name."""


def parse_matching(text: str) -> Matching:
    """The matching that a text describes, such as `"activation_matching('second_moment')"`.

    Raises:
        ValueError: the text does not parse, or names something unknown.
        TypeError: an argument that the matching does not take.
    """
    return spec.parse(text, MATCHINGS)
