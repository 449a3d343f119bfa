"""Which permutations may vary: over the layers of a loop, or over the heads of an attention.

A permutation of the axis `d` of a leaf `[h, d]` may differ from one position of `h` to the next
if the program never brings together what belongs to different positions: every value that the
permutation touches carries `h` beside `d`, and whatever sums over `d` keeps or pairs `h`. The
groups then form a wreath product.
"""

from collections.abc import Iterable, Sequence

from mixlab.align.inference.layout import Atom, Layout, Solver, Term, atoms, companions
from mixlab.align.inference.program import Op, scan_counts

Name = int | str
Seen = tuple[Op, list[Layout], list[Layout], frozenset[Name]]
"""An operation, the layouts of its operands and results, and the loops that it lies in."""


def variations(
    solver: Solver, leaves: Iterable[Layout], groups: Sequence[Name]
) -> dict[Name, tuple[Name, ...]]:
    """For each atom of `groups` the loops and other atoms that its permutation may vary over.

    Args:
        solver: has interpreted the whole program.
        leaves: the solved layouts of the variables.
        groups: the free atoms.

    Returns:
        Loops first. Atoms among them form a chain, each varying over those before it.
    """
    leaves = list(leaves)
    seen = [_solved(solver, *record) for record in solver.seen]
    loops = [name for name in solver.loops if solver.resolve(Atom(2, name)) == Atom(2, name)]

    def may_vary(name: Name, index: Name) -> bool:
        return all(_beside(layout, name, index) for layout in leaves) and all(
            _keeps_apart(record, name, index) for record in seen
        )

    allowed: dict[Name, list[Name]] = {
        name: [index for index in (*loops, *groups) if index != name and may_vary(name, index)]
        for name in groups
    }
    over: dict[Name, tuple[Name, ...]] = dict.fromkeys(groups, ())
    for index in groups:
        # The first of two that may vary over each other is the index; outer indices come first.
        for name in groups:
            if index in allowed[name] and name not in _above(over, index):
                over[name] = (*over[name], index)
    for name in groups:
        chain: list[Name] = []
        for index in sorted(over[name], key=lambda other: len(over[other])):
            inner, outer = ([o for o in loops if o in allowed[a]] for a in (name, index))
            if inner[: len(outer)] == outer and all(other in over[index] for other in chain):
                chain.append(index)
        over[name] = tuple(chain)
    return {
        name: (*(loop for loop in loops if loop in allowed[name]), *over[name]) for name in groups
    }


def _above(over: dict[Name, tuple[Name, ...]], name: Name) -> set[Name]:
    """Everything that `name` varies over, directly or not."""
    found: set[Name] = set()
    for other in over.get(name, ()):
        found |= {other} | _above(over, other)
    return found


def _solved(
    solver: Solver, op: Op, given: list[Layout], results: list[Layout], around: tuple[Term, ...]
) -> Seen:
    def solved(layouts: list[Layout]) -> list[Layout]:
        return [tuple(solver.resolve(term) for term in layout) for layout in layouts]

    loops = [solver.resolve(loop) for loop in around]
    names = frozenset(loop.name for loop in loops if isinstance(loop, Atom))
    return op, solved(given), solved(results), names


def _carries(layout: Sequence[Term], name: Name) -> bool:
    return any(atom.name == name for term in layout for atom in atoms(term))


def _beside(layout: Layout, name: Name, index: Name) -> bool:
    """Whether every occurrence of an atom has the index exactly once beside it."""
    return all(found.count(index) == 1 for found in companions(layout, name))


def _keeps_apart(record: Seen, name: Name, index: Name) -> bool:
    op, given, results, around = record
    if not any(_carries(layout, name) for layout in (*given, *results)):
        return True
    if op.name == "scan" and not _scan_keeps_apart(op, given, results, name, index):
        return False
    if index in around:
        # The index is the iteration that the operation belongs to.
        return True
    if not all(_beside(layout, name, index) for layout in (*given, *results)):
        return False
    if op.name == "dot_general":
        return _pairs_index(op, given, name, index)
    if op.name == "ragged_dot_general":
        return False
    if op.name == "conv_general_dilated":
        feature = given[0][op.params["dimension_numbers"].lhs_spec[1]]
        return not _carries([feature], name) or _beside((feature,), name, index)
    return True


def _pairs_index(op: Op, given: list[Layout], name: Name, index: Name) -> bool:
    """Whether a product that sums over the atom, or pairs it, also sums over or pairs the index."""
    (left_contracted, right_contracted), (left_batch, right_batch) = op.params["dimension_numbers"]
    left = [given[0][axis] for axis in (*left_contracted, *left_batch)]
    right = [given[1][axis] for axis in (*right_contracted, *right_batch)]
    if not _carries(left, name):
        return True
    return any(
        _carries([x], index) and _carries([y], index) for x, y in zip(left, right, strict=True)
    )


def _scan_keeps_apart(
    op: Op, given: list[Layout], results: list[Layout], name: Name, index: Name
) -> bool:
    """Where the index counts this loop's iterations, only what is stacked over it may vary."""
    consts, carry = scan_counts(op.params)
    stacked = [*given[consts + carry :], *results[carry:]]
    if not any(layout and _carries(layout[:1], index) for layout in stacked):
        return True
    whole = [*given[: consts + carry], *results[:carry]]
    return not any(_carries(layout, name) for layout in whole) and all(
        isinstance(layout[0], Atom) and layout[0].name == index
        for layout in stacked
        if _carries(layout, name)
    )
