"""From a traced function to the layouts of its leaves, the groups' names, and their activations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlab.align.inference.layout import Atom, Fixed, Layout, Prod, Solver, Sum, Wild, atoms
from mixlab.align.inference.program import Op, Place, Program, scan_counts, trace
from mixlab.align.inference.rules import interpret
from mixlab.align.inference.variation import variations
from mixlab.trees import named_leaves
from mixlab.types import PyTree

_VIEWS = {"reshape", "transpose", "convert_element_type", "broadcast_in_dim", "squeeze", "copy"}
_AVERAGES = {"reduce_sum", "reduce_window_sum", *_VIEWS}


@dataclass(frozen=True)
class Inference:
    """What tracing `fn(variables, *inputs)` tells.

    Attributes:
        leaves: the name and layout of every leaf of the variables that is an array.
        homes: for each free atom the name of the leaf that first brings it forth, in the order
            in which the function meets them.
        over: for each free atom the loops and other atoms that its permutation may vary over.
        taps: for each free atom the place and layout of the value to look at when matching
            activations; atoms that no value depending on the inputs carries are absent.
        values: the layout of every value of the program.
        notes: what was left fixed for want of knowledge.
    """

    program: Program
    leaves: tuple[tuple[str, Layout], ...]
    homes: dict[int | str, str]
    over: dict[int | str, tuple[int | str, ...]]
    taps: dict[int | str, "Tap"]
    values: list[Layout]
    notes: tuple[str, ...]


def infer(fn: Callable[..., Any], variables: PyTree, inputs: Sequence[PyTree]) -> Inference:
    """Traces `fn(variables, *inputs)` and solves for the layouts of the leaves of `variables`.

    Raises:
        ValueError: nothing that the function returns depends on the variables.
    """
    names = [name for name, leaf in named_leaves(variables) if leaf is not None]
    program = trace(fn, variables, *inputs)
    solver = Solver()
    leaves = program.inputs[: len(names)]
    free = [tuple(solver.fresh(size) for size in program.shapes[i]) for i in leaves]
    given = program.inputs[len(names) :]
    fixed = [tuple(Fixed(size) for size in program.shapes[i]) for i in given]
    values = interpret(solver, program, [*free, *fixed])

    needed = program.needed
    unused = [name for name, i in zip(names, leaves, strict=True) if i not in needed]
    if len(unused) == len(names):
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"nothing that the function returns depends on its variables ({listed}): "
            "pass a function fn(variables, *inputs) that computes its output from them"
        )
    for name, i in zip(names, leaves, strict=True):
        if i not in needed and program.shapes[i]:
            solver.notes.append(f"leaf {name!r} does not influence the output: its axes are fixed")
    unused_numbers = [i for i in leaves if i not in needed]
    for i in [*program.outputs, *unused_numbers]:
        for term in values[i]:
            solver.fix(term)

    # Once more, now that all is known, to see every operation with its final layouts.
    solver.seen.clear()
    values = interpret(solver, program, [values[i] for i in program.inputs])
    values = [tuple(solver.resolve(term) for term in layout) for layout in values]
    named = tuple((name, values[i]) for name, i in zip(names, leaves, strict=True))
    homes = _homes(program, values, dict(zip(leaves, names, strict=True)), solver)
    over = variations(solver, [layout for _, layout in named], list(homes))
    taps = _taps(program, values, program.depending(given), over, solver)
    return Inference(
        program=program,
        leaves=named,
        homes=homes,
        over=over,
        taps={atom: tap for atom, (_, tap) in taps.items()},
        values=values,
        notes=tuple(solver.notes),
    )


def _names_in(layout: Layout) -> list[int | str]:
    return [atom.name for term in layout for atom in atoms(term)]


def _homes(
    program: Program, values: list[Layout], leaves: dict[int, str], solver: Solver
) -> dict[int | str, str]:
    """For each atom the leaf whose product brings it forth; else the first leaf that carries it."""
    homes = _brought_forth(program, values, leaves, solver)
    for number, name in leaves.items():
        for atom in _names_in(values[number]):
            homes.setdefault(atom, name)
    return {atom: home for atom, home in homes.items() if atom not in solver.loops}


def _brought_forth(
    program: Program, values: list[Layout], leaves: dict[int, str], solver: Solver
) -> dict[int | str, str]:
    homes: dict[int | str, str] = {}
    origin = {number: number for number in leaves}
    for op in program.ops:
        if op.name in _VIEWS and op.inputs[0] in origin:
            origin[op.outputs[0]] = origin[op.inputs[0]]
        if op.name in ("dot_general", "conv_general_dilated", "gather"):
            brought = set(_names_in(values[op.outputs[0]]))
            for number in (origin[i] for i in op.inputs if i in origin):
                for atom in _names_in(values[number]):
                    if atom in brought:
                        homes.setdefault(atom, leaves[number])
        if op.name == "scan":
            body, layouts = solver.bodies[id(op)]
            pairs = zip(body.inputs, op.inputs, strict=True)
            inside = {inner: leaves[origin[outer]] for inner, outer in pairs if outer in origin}
            solved = [tuple(solver.resolve(term) for term in layout) for layout in layouts]
            for atom, home in _brought_forth(body, solved, inside, solver).items():
                homes.setdefault(atom, home)
    return homes


def _contracted(op: Op, values: list[Layout]) -> Iterator[tuple[int, int | str]]:
    """The values that the operation contracts, with the atoms on their contracted axes."""
    axes: list[tuple[int, Sequence[int]]] = []
    if op.name == "dot_general":
        contracted, _ = op.params["dimension_numbers"]
        axes = list(zip(op.inputs, contracted, strict=True))
    elif op.name == "conv_general_dilated":
        axes = [(op.inputs[0], op.params["dimension_numbers"].lhs_spec[1:2])]
    for number, along in axes:
        for atom in _names_in(tuple(values[number][axis] for axis in along)):
            yield number, atom


Tap = tuple[Place, Layout]
_Rank = tuple[bool, bool, tuple[int, ...]]


def _taps(
    program: Program,
    values: list[Layout],
    carried: set[int],
    over: Mapping[int | str, tuple[int | str, ...]],
    solver: Solver,
) -> dict[int | str, tuple[_Rank, Tap]]:
    """For each atom the last value that a later layer contracts over it.

    That is a value after its activation function, and of a residual stream the last sum. A value
    whose rows no other atom permutes is preferred: its rows mean the same in two models. Values
    of a scan's body are taken over all iterations.
    """
    best: dict[int | str, tuple[_Rank, int]] = {}
    nested: dict[int | str, tuple[_Rank, Tap]] = {}

    def offer(number: int, atom: int | str, is_contracted: bool, time: int) -> None:
        alone = _alone(values[number], atom, over.get(atom, ()))
        rank = (is_contracted, alone, (time,))
        if number in carried and (atom not in best or rank > best[atom][0]):
            best[atom] = rank, number

    producer: dict[int, Op] = {}
    for time, op in enumerate(program.ops):
        for number, atom in _contracted(op, values):
            offer(number, atom, True, time)
        for number in op.outputs:
            producer[number] = op
            for atom in _names_in(values[number]):
                offer(number, atom, False, time)
        if op.name == "scan":
            for atom, (inner, (place, layout)) in _scan_taps(op, carried, over, solver):
                rank = inner[0], inner[1], (time, *inner[2])
                if atom not in nested or rank > nested[atom][0]:
                    nested[atom] = rank, ((op.outputs[0], *place), layout)
    found = dict(nested)
    for atom, (rank, number) in best.items():
        if atom not in over or (atom in nested and nested[atom][0] > rank):
            continue
        number = _before_pooling(number, atom, producer, values, carried)
        found[atom] = rank, ((number,), values[number])
    return found


def _scan_taps(
    op: Op,
    carried: set[int],
    over: Mapping[int | str, tuple[int | str, ...]],
    solver: Solver,
) -> Iterator[tuple[int | str, tuple[_Rank, Tap]]]:
    body, layouts = solver.bodies[id(op)]
    values = [tuple(solver.resolve(term) for term in layout) for layout in layouts]
    num_consts, num_carry = scan_counts(op.params)
    results = [None] * num_consts + list(op.outputs[:num_carry])
    results += [None] * (len(body.inputs) - len(results))
    sources = [
        inner
        for inner, outer, result in zip(body.inputs, op.inputs, results, strict=True)
        if outer in carried or result in carried
    ]
    loop = solver.resolve(solver.loops_of[id(op)])
    inside = _taps(body, values, body.depending(sources), over, solver)
    for atom, (rank, (place, layout)) in inside.items():
        yield atom, (rank, (place, (loop, *layout)))


def _alone(layout: Layout, atom: int | str, over: Sequence[int | str]) -> bool:
    """Whether no other atom acts on the axes along which the statistics of `atom` are pooled."""
    carrying = [term for term in layout if atom in _names_in((term,))]
    segments = [
        segment
        for term in carrying
        for segment in (term.parts if isinstance(term, Sum) else (term,))
        if atom in _names_in((segment,))
    ]
    others = tuple(term for term in layout if term not in carrying)
    return (
        len(carrying) == 1
        and set(_names_in(others)) <= set(over)
        and all(set(_names_in((s,))) <= {atom, *over} for s in segments)
        and all(_names_in((segment,)).count(atom) == 1 for segment in segments)
    )


def _before_pooling(
    number: int,
    atom: int | str,
    producer: Mapping[int, Op],
    values: list[Layout],
    carried: set[int],
) -> int:
    """Steps back over averages, so that statistics see every position rather than their mean."""
    while number in producer:
        op = producer[number]
        source = op.inputs[0]
        scaled = op.name in ("div", "mul") and not any(
            map(len, map(values.__getitem__, op.inputs[1:]))
        )
        if not (op.name in _AVERAGES or scaled):
            break
        if source not in carried or atom not in _names_in(values[source]):
            break
        number = source
    return number


def group_names(inference: Inference, variables: PyTree) -> dict[int | str, str]:
    """Readable names: the module that brings a group forth, `Conv_0` for `params/Conv_0/kernel`.

    Where several groups come from one module they are told apart by the leaf, `mlp/w1`, and where
    they come from one leaf by their order in it, `query.0`, `query.1`.
    """
    collections = isinstance(variables, Mapping) and "params" in variables

    def leaf_of(home: str) -> str:
        return home.removeprefix("params/") if collections else home

    def module_of(home: str) -> str:
        return leaf_of(home).rpartition("/")[0] or leaf_of(home)

    homes = inference.homes
    modules = [module_of(home) for home in homes.values()]
    leaves = list(homes.values())
    names: dict[int | str, str] = {}
    for atom, home in homes.items():
        if modules.count(module_of(home)) == 1:
            names[atom] = module_of(home)
        elif leaves.count(home) == 1:
            names[atom] = leaf_of(home)
        else:
            siblings = [other for other, leaf in homes.items() if leaf == home]
            only = set(leaves[i] for i, m in enumerate(modules) if m == module_of(home)) == {home}
            base = module_of(home) if only else leaf_of(home)
            names[atom] = f"{base}.{siblings.index(atom)}"
    return names


def loop_names(inference: Inference, groups: Mapping[int | str, str]) -> dict[int | str, str]:
    """Names for the loops that groups vary over: the module whose leaves are stacked along them."""
    loops = list(dict.fromkeys(o for over in inference.over.values() for o in over))
    names: dict[int | str, str] = {}
    for loop in (loop for loop in loops if loop not in groups):
        stacked = [
            leaf.split("/") for leaf, layout in inference.leaves if loop in _names_in(layout)
        ]
        common = [same[0] for same in zip(*stacked, strict=False) if len(set(same)) == 1]
        base = name = "/".join(part for part in common if part != "params") or "layers"
        while name in names.values() or name in groups.values():
            name = f"{base}.{len(names)}"
        names[loop] = name
    return names


def match_names(inference: Inference, layouts: Mapping[str, Layout]) -> dict[int | str, str]:
    """Which group of the symmetry `layouts` each atom of the inference is.

    Raises:
        ValueError: a leaf has a group where the function that was traced admits none.
    """
    names: dict[int | str, str] = {}

    def walk(leaf: str, axis: int, found: Any, known: Any) -> None:
        if isinstance(known, Fixed | Wild) or found == known:
            return
        if (
            isinstance(found, Atom)
            and isinstance(known, Atom)
            and names.setdefault(found.name, str(known.name)) == known.name
            # A permutation that varies is admitted only where the function lets it vary.
            and len(known.over) <= len(inference.over.get(found.name, ()))
        ):
            return
        if (
            isinstance(found, Prod | Sum)
            and type(found) is type(known)
            and len(found.parts) == len(known.parts)
        ):
            for part, other in zip(found.parts, known.parts, strict=True):
                walk(leaf, axis, part, other)
        else:
            raise ValueError(
                f"axis {axis} of leaf {leaf!r} belongs to group "
                f"{', '.join(sorted({str(a.name) for a in atoms(known)}))}, but the function "
                "given does not admit this permutation; give the function that the symmetry was "
                "inferred from, or correct the specification"
            )

    for leaf, layout in inference.leaves:
        for axis, (found, known) in enumerate(zip(layout, layouts[leaf], strict=True)):
            walk(leaf, axis, found, known)
    return names


def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of every array leaf, by name."""
    return {name: np.shape(leaf) for name, leaf in named_leaves(tree) if leaf is not None}
