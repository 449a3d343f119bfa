"""Assignments within assignments: groups whose permutations vary over those of other groups.

Heads of an attention are matched among themselves, and the dimensions inside a head with those of
the head that it is matched with. Both are decided at once: a pair of heads scores what the best
matching of its insides scores (a wreath product of permutations, and still an exact optimum).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Member:
    """A group of a family.

    Attributes:
        loops: the sizes of the loops that its permutation varies over.
        sizes: those of the groups that it varies over, from the outside in, and its own.
        parent: the innermost group that it varies over; None for the root.
    """

    loops: tuple[int, ...]
    sizes: tuple[int, ...]
    parent: str | None


def families(
    over: Mapping[str, Sequence[str]], groups: Mapping[str, int], loops: Mapping[str, int]
) -> list[dict[str, Member]]:
    """Groups that have to be decided together: a root, and all that vary over it, parents first."""
    members: dict[str, Member] = {}
    for name in sorted(groups, key=lambda name: len(over[name])):
        outer = [other for other in over[name] if other in groups]
        members[name] = Member(
            tuple(loops[other] for other in over[name] if other in loops),
            tuple(groups[other] for other in (*outer, name)),
            outer[-1] if outer else None,
        )
    found: dict[str, dict[str, Member]] = {name: {} for name in groups}
    for name, member in members.items():
        root = name
        while (parent := members[root].parent) is not None:
            root = parent
        found[root][name] = member
    return [family for family in found.values() if family]


def match_family(
    scores: Mapping[str, Any],
    family: Mapping[str, Member],
    solve: Callable[[Any], Any],
    xp: Any,
) -> tuple[dict[str, Any], Any]:
    """The permutations of a family that score highest, and by how much they beat the identity.

    Args:
        scores: for each member [*loops, U, U], U being all its units: those of every position of
            what it varies over, one after the other. A member without scores decides by those
            of the members that vary over it.
        family: the members, parents first.
        solve: the assignment, [..., n, n] -> int [..., n].
        xp: `numpy` or `jax.numpy`.

    Returns:
        int32 [*loops, *outer, n] by member, and the gain, a number.
    """
    paired: dict[str, Any] = {}
    found: dict[str, Any] = {}
    gain: Any = 0.0
    for name, member in family.items():
        if name in scores:
            gain = gain - xp.sum(xp.trace(scores[name], axis1=-2, axis2=-1))
            paired[name] = _pair(scores[name], member, xp)
    for name in reversed(list(family)):
        member = family[name]
        if name not in paired:
            continue
        p = solve(paired[name])
        found[name] = p
        value = xp.sum(xp.take_along_axis(paired[name], p[..., None], axis=-1)[..., 0], axis=-1)
        if member.parent is None:
            gain = gain + xp.sum(value)
        else:
            # Loops that the parent does not vary over are summed.
            shared = len(family[member.parent].loops)
            value = xp.sum(value, axis=tuple(range(shared, len(member.loops))))
            paired[member.parent] = paired.get(member.parent, 0.0) + value
    chosen: dict[str, Any] = {}
    for name, p in ((name, found[name]) for name in family if name in found):
        chosen[name] = _select(p, name, family, chosen, xp)
    return chosen, gain


def _pair(scores: Any, member: Member, xp: Any) -> Any:
    """[*loops, U, U] as [*loops, i, i', ..., n, n']: each axis beside its counterpart."""
    first, count = len(member.loops), len(member.sizes)
    apart = scores.reshape(*member.loops, *member.sizes, *member.sizes)
    order = [axis for i in range(count) for axis in (first + i, first + count + i)]
    return xp.transpose(apart, (*range(first), *order))


def _select(
    p: Any, name: str, family: Mapping[str, Member], chosen: Mapping[str, Any], xp: Any
) -> Any:
    """Of the permutations for all pairs of outer positions those of the pairs that were chosen."""
    outer: list[str] = []
    above = family[name].parent
    while above is not None:
        outer.insert(0, above)
        above = family[above].parent
    first = len(family[name].loops)
    for depth, other in enumerate(outer):
        axis = first + depth + 1
        where = chosen[other]
        skipped = first - len(family[other].loops)
        at = where.reshape(
            *family[other].loops, *(1,) * skipped, *family[other].sizes, *(1,) * (p.ndim - axis)
        )
        p = xp.take_along_axis(p, at, axis=axis)
        p = p.reshape(*p.shape[:axis], *p.shape[axis + 1 :])
    return p.astype(np.int32)
