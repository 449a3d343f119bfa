"""Which axes of a leaf read units, like a kernel's inputs, and which bring units forth."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core

from mixlab import trees
from mixlab.align.inference.layout import (
    Atom,
    Fixed,
    Layout,
    Prod,
    Solver,
    Sum,
    Term,
    atoms,
    concat,
    prod,
)
from mixlab.align.inference.program import Op, Program, scan_counts, trace
from mixlab.align.inference.rules import interpret
from mixlab.align.symmetry import Symmetry
from mixlab.types import PyTree

Reads = dict[tuple[str, int], bool | None]
"""For a leaf's name and axis: True if it reads units, False if it brings them forth."""


def reads(symmetry: Symmetry, fn: Callable[..., Any], variables: PyTree, *inputs: PyTree) -> Reads:
    """For every axis of a leaf with units: whether the leaf reads them or brings them forth.

    Args:
        symmetry: the groups.
        fn: the function `fn(variables, *inputs)` that has the symmetry.
        variables: gives the structure.
        *inputs: one batch.

    Returns:
        By leaf and axis: True where the axis is contracted with a value that depends on the
        inputs, False where it passes into the result; None where both happen, or neither is seen.
    """
    program = trace(fn, variables, *inputs)
    solver = Solver()
    tags: list[tuple[Atom, tuple[str, int]]] = []

    def tagged(term: Term, place: tuple[str, int]) -> Term:
        match term:
            case Atom(size):
                tags.append((Atom(size, f"unit {len(tags)}"), place))
                return tags[-1][0]
            case Prod(parts):
                return prod([tagged(part, place) for part in parts])
            case Sum(parts):
                return concat([tagged(part, place) for part in parts])
        return Fixed(term.size)

    given: list[Layout | None] = [
        tuple(tagged(term, (name, axis)) for axis, term in enumerate(symmetry.layouts[name]))
        for name, leaf in trees.named_leaves(variables)
        if leaf is not None
    ]
    given += [None] * (len(program.inputs) - len(given))
    uses: dict[int | str, set[bool | None]] = defaultdict(set)
    for term, contracted in list(_uses(solver, program, given)):
        for atom in atoms(solver.resolve(term)):
            uses[atom.name].add(contracted)
    found: dict[tuple[str, int], set[bool | None]] = defaultdict(set)
    for tag, place in tags:
        term = solver.resolve(tag)
        found[place] |= (uses[term.name] if isinstance(term, Atom) else set()) or {None}
    return {place: roles.pop() if len(roles) == 1 else None for place, roles in found.items()}


def _uses(
    solver: Solver, program: Program, given: Sequence[Layout | None]
) -> Iterator[tuple[Term, bool | None]]:
    """The axes of what is computed from leaves alone, where it meets what depends on the inputs.

    Args:
        solver: of the tags in `given`.
        program: a function, or the body of a loop or branch.
        given: the layout of every argument, or None for one that depends on the inputs.

    Yields:
        An axis' term, and whether it is contracted there: None for an unknown use.
    """
    bound = program.depending(
        i for i, layout in zip(program.inputs, given, strict=True) if layout is None
    )
    alone = copy.copy(program)
    alone.ops = [op for op in program.ops if not bound.intersection(op.inputs)]
    arguments = [
        tuple(Fixed(size) for size in program.shapes[i]) if layout is None else layout
        for i, layout in zip(program.inputs, given, strict=True)
    ]
    values = interpret(solver, alone, arguments)
    for op in program.ops:
        if bound.intersection(op.inputs):
            operands = [None if i in bound else values[i] for i in op.inputs]
            yield from _meeting(solver, op, operands)
    for number in program.outputs:
        if number not in bound:
            yield from ((term, False) for term in values[number])


def _meeting(
    solver: Solver, op: Op, operands: Sequence[Layout | None]
) -> Iterator[tuple[Term, bool | None]]:
    """What an operation does with operands that are computed from leaves alone."""
    if op.name == "scan":
        consts, carried = scan_counts(op.params)
        start = consts + carried
        stacked = [None if layout is None else layout[1:] for layout in operands[start:]]
        body = Program(op.params["jaxpr"])
        yield from _uses(solver, body, [*operands[:consts], *[None] * carried, *stacked])
        operands = operands[consts:start]
    elif op.name == "cond":
        for branch in op.params["branches"]:
            yield from _uses(solver, Program(branch), operands[1:])
        return
    contracted: Sequence[Sequence[int]] = [()] * len(operands)
    if op.name == "dot_general":
        contracted = op.params["dimension_numbers"][0]
    elif op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        contracted = [numbers.lhs_spec[1:2], numbers.rhs_spec[1:2]]
    known = op.name == "scan" or not list(core.jaxprs_in_params(op.params))
    for layout, axes in zip(operands, contracted, strict=True):
        for axis, term in enumerate(layout or ()):
            yield term, (axis in axes) if known else None
