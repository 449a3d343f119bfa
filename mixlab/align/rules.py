"""How each primitive passes layouts from its operands to its results.

A rule names the permutations that a primitive commutes with. A primitive without a rule, and an
axis that a primitive treats by position, becomes fixed: fewer permutations, never a wrong one.
"""

from collections.abc import Callable, Sequence

from mixlab.align.layout import Atom, Fixed, Layout, Solver, Sum, Term, Wild, concat, prod
from mixlab.align.program import Op, Program, scan_counts

Rule = Callable[[Solver, Op, list[Layout]], list[Layout]]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives `names`."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def interpret(
    solver: Solver, program: Program, arguments: Sequence[Layout], loops: tuple[Term, ...] = ()
) -> list[Layout]:
    """Runs `program` on layouts and returns the layout of every value of the program.

    Primitives that have no rule are named in `solver.notes`; every operation, those of the bodies
    of control flow too, is appended to `solver.seen` with the loops around it.
    """
    layouts: list[Layout] = [tuple(Fixed(size) for size in shape) for shape in program.shapes]
    for number, layout in zip(program.inputs, arguments, strict=True):
        layouts[number] = layout
    outer, solver.around = solver.around, (*solver.around, *loops)
    for op in program.ops:
        given = [layouts[i] for i in op.inputs]
        results = _RULES.get(op.name, _unknown)(solver, op, given)
        solver.seen.append((op, given, results, solver.around))
        for number, layout in zip(op.outputs, results, strict=True):
            layouts[number] = layout
    solver.around = outer
    return layouts


def _fix(solver: Solver, *layouts: Layout) -> None:
    for layout in layouts:
        for term in layout:
            solver.fix(term)


def _fixed(shape: Sequence[int]) -> Layout:
    return tuple(Fixed(size) for size in shape)


def _unknown(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    _fix(solver, *layouts)
    if any(layouts) or any(op.shapes):
        note = f"primitive {op.name!r} has no rule: every axis of its operands and results is fixed"
        if note not in solver.notes:
            solver.notes.append(note)
    return [_fixed(shape) for shape in op.shapes]


def _common(solver: Solver, layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Unifies axis by axis; scalars and axes of size one are constant along the others' axes."""
    common: list[Term] = []
    for axis, size in enumerate(shape):
        terms = [layout[axis] for layout in layouts if layout and layout[axis].size == size]
        term: Term = Wild(size)
        for other in terms:
            term = solver.unify(term, other)
        common.append(term)
    return tuple(common)


# fmt: off
_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "nextafter", "not", "or", "polygamma", "population_count", "pow", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "zeta", "name",
)
# fmt: on


@rule(*_ELEMENTWISE)
def _elementwise(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return [_common(solver, layouts, op.shapes[0])]


@rule("optimization_barrier", "device_put", "sharding_constraint")
def _identity(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return layouts


@rule("broadcast_in_dim")
def _broadcast_in_dim(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    result: list[Term] = [Wild(size) for size in op.shapes[0]]
    for term, axis in zip(layouts[0], op.params["broadcast_dimensions"], strict=True):
        if term.size == op.shapes[0][axis]:
            result[axis] = term
    return [tuple(result)]


@rule("squeeze", "reshape", "expand_dims")
def _reshape(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    if op.params.get("dimensions") is not None and op.name == "reshape":
        return _unknown(solver, op, layouts)
    return [solver.reshape(layouts[0], op.shapes[0])]


@rule("transpose")
def _transpose(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return [tuple(layouts[0][axis] for axis in op.params["permutation"])]


@rule("dot_general")
def _dot_general(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    left, right = layouts
    (left_contracted, right_contracted), (left_batch, right_batch) = op.params["dimension_numbers"]
    for i, j in zip(left_contracted, right_contracted, strict=True):
        solver.unify(left[i], right[j])
    batch = [solver.unify(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    left_free = [t for i, t in enumerate(left) if i not in (*left_contracted, *left_batch)]
    right_free = [t for j, t in enumerate(right) if j not in (*right_contracted, *right_batch)]
    return [(*batch, *left_free, *right_free)]


@rule("conv_general_dilated")
def _conv(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    if op.params["batch_group_count"] > 1:
        return _unknown(solver, op, layouts)
    image, kernel = layouts
    numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    _fix(solver, tuple(image[axis] for axis in numbers.lhs_spec[2:]))
    _fix(solver, tuple(kernel[axis] for axis in numbers.rhs_spec[2:]))
    group, within = solver.factor(image[numbers.lhs_spec[1]], groups)
    kernel_group, out = solver.factor(kernel[numbers.rhs_spec[0]], groups)
    solver.unify(within, kernel[numbers.rhs_spec[1]])
    result = list(_fixed(op.shapes[0]))
    result[numbers.out_spec[0]] = image[numbers.lhs_spec[0]]
    result[numbers.out_spec[1]] = prod([solver.unify(group, kernel_group), out])
    return [tuple(result)]


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
@rule("reduce_xor")
def _reduce(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return [tuple(t for axis, t in enumerate(layouts[0]) if axis not in op.params["axes"])]


@rule("argmax", "argmin")
def _arg_reduce(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    _fix(solver, tuple(layouts[0][axis] for axis in op.params["axes"]))
    return _reduce(solver, op, layouts)


def _fix_axes(solver: Solver, op: Op, layouts: list[Layout], axes: Sequence[int]) -> list[Layout]:
    """All operands of one shape; `axes` are treated by position, the others elementwise."""
    common = list(_common(solver, layouts, [term.size for term in layouts[0]]))
    for axis in axes:
        _fix(solver, tuple(layout[axis] for layout in layouts))
        common[axis] = Fixed(common[axis].size)
    return [tuple(common)] * len(op.outputs)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return _fix_axes(solver, op, layouts, [op.params["axis"]])


@rule("sort")
def _sort(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return _fix_axes(solver, op, layouts, [op.params["dimension"]])


@rule("rev")
def _rev(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return _fix_axes(solver, op, layouts, op.params["dimensions"])


@rule("top_k")
def _top_k(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    axis = op.params.get("axis", -1) % len(layouts[0])
    layout = _fix_axes(solver, op, layouts, [axis])[0]
    kept = (*layout[:axis], Fixed(op.shapes[0][axis]), *layout[axis + 1 :])
    return [kept] * len(op.outputs)


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    result = list(layouts[0])
    for axis, size in enumerate(op.shapes[0]):
        geometry = (
            op.params["window_dimensions"][axis],
            op.params["window_strides"][axis],
            op.params["base_dilation"][axis],
            tuple(op.params["padding"][axis]),
        )
        if geometry != (1, 1, 1, (0, 0)):
            solver.fix(result[axis])
            result[axis] = Fixed(size)
    return [tuple(result)]


@rule("concatenate")
def _concatenate(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    axis = op.params["dimension"]
    segments = concat([layout[axis] for layout in layouts])
    shape = [1 if a == axis else size for a, size in enumerate(op.shapes[0])]
    others = [(*layout[:axis], Fixed(1), *layout[axis + 1 :]) for layout in layouts]
    common = _common(solver, others, shape)
    return [(*common[:axis], segments, *common[axis + 1 :])]


@rule("split")
def _split(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    axis, rest = op.params["axis"], layouts[0][op.params["axis"]]
    results: list[Layout] = []
    for size in op.params["sizes"]:
        head, rest = solver.cut(rest, int(size))
        results.append((*layouts[0][:axis], head, *layouts[0][axis + 1 :]))
    return results


@rule("unstack")
def _unstack(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    layout, axis = layouts[0], op.params["axis"]
    solver.fix(layout[axis])
    return [(*layout[:axis], *layout[axis + 1 :])] * len(op.shapes)


def _at_borders(solver: Solver, term: Term, start: int, stop: int) -> Term | None:
    """The segments from `start` to `stop`, where the term is a sum with borders there."""
    term = solver.resolve(term)
    if isinstance(term, Wild):
        return Wild(stop - start)
    if not isinstance(term, Sum):
        return None
    borders = [0]
    for part in term.parts:
        borders.append(borders[-1] + part.size)
    if start not in borders or stop not in borders:
        return None
    return concat(term.parts[borders.index(start) : borders.index(stop)])


@rule("slice")
def _slice(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    strides = op.params["strides"] or (1,) * len(layouts[0])
    bounds = zip(op.params["start_indices"], op.params["limit_indices"], strides, strict=True)
    result: list[Term] = []
    for axis, (start, stop, stride) in enumerate(bounds):
        term = layouts[0][axis]
        if (start, stop, stride) != (0, term.size, 1):
            kept = _at_borders(solver, term, start, stop) if stride == 1 else None
            if kept is None:
                solver.fix(term)
                kept = Fixed(op.shapes[0][axis])
            term = kept
        result.append(term)
    return [tuple(result)]


@rule("pad")
def _pad(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    result: list[Term] = []
    for term, size, (low, high, interior) in zip(
        layouts[0], op.shapes[0], op.params["padding_config"], strict=True
    ):
        if low < 0 or high < 0 or interior:
            solver.fix(term)
            result.append(Fixed(size))
        else:
            # The padding value is a scalar, so the new positions are all alike.
            result.append(concat([Wild(low), term, Wild(high)]))
    return [tuple(result)]


@rule("tile")
def _tile(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    repeats = zip(layouts[0], op.params["reps"], strict=True)
    return [tuple(prod([Wild(times), term]) for term, times in repeats)]


@rule("iota")
def _iota(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    along = op.params["dimension"]
    shape = enumerate(op.shapes[0])
    return [tuple(Fixed(size) if axis == along else Wild(size) for axis, size in shape)]


def _window(solver: Solver, layout: Layout, sizes: Sequence[int]) -> Layout:
    """Axes that are taken whole keep their term; the others are taken by position."""
    result: list[Term] = []
    for term, size in zip(layout, sizes, strict=True):
        if term.size != size:
            solver.fix(term)
        result.append(term if term.size == size else Fixed(size))
    return tuple(result)


@rule("dynamic_slice")
def _dynamic_slice(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return [_window(solver, layouts[0], op.params["slice_sizes"])]


@rule("dynamic_update_slice")
def _dynamic_update_slice(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    result: list[Term] = []
    for term, update in zip(layouts[0], layouts[1], strict=True):
        if term.size == update.size:
            result.append(solver.unify(term, update))
        else:
            solver.fix(update)
            result.append(solver.fix(term))
    return [tuple(result)]


@rule("gather")
def _gather(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    operand, indices = layouts
    numbers = op.params["dimension_numbers"]
    paired = numbers.operand_batching_dims
    if paired:
        return _unknown(solver, op, layouts)
    solver.fix(indices[-1])
    window = _window(solver, operand, op.params["slice_sizes"])
    kept = iter([t for a, t in enumerate(window) if a not in numbers.collapsed_slice_dims])
    batch = iter(indices[:-1])
    axes = range(len(op.shapes[0]))
    return [tuple(next(kept if axis in numbers.offset_dims else batch) for axis in axes)]


@rule("cond")
def _cond(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    results = []
    for branch in op.params["branches"]:
        program = Program(branch)
        values = interpret(solver, program, layouts[1:])
        results.append([values[i] for i in program.outputs])
    return [
        _common(solver, alternatives, shape)
        for alternatives, shape in zip(zip(*results, strict=True), op.shapes, strict=True)
    ]


def _carried(solver: Solver, layouts: Sequence[Layout]) -> list[Layout]:
    """Layouts for loop variables: constant axes need not stay constant after one iteration."""
    return [
        tuple(solver.unify(solver.fresh(term.size), term) for term in layout) for layout in layouts
    ]


@rule("scan")
def _scan(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    num_consts, num_carry = scan_counts(op.params)
    consts = layouts[:num_consts]
    carry = _carried(solver, layouts[num_consts : num_consts + num_carry])
    stacked = layouts[num_consts + num_carry :]
    loop = solver.loop(op.params["length"])
    for layout in stacked:
        # What was fixed before, such as the steps of an input, has no identity to share.
        if isinstance(solver.resolve(layout[0]), Atom):
            solver.unify(layout[0], loop)
        else:
            solver.fix(layout[0])
    program = Program(op.params["jaxpr"])
    inner = [*consts, *carry, *(layout[1:] for layout in stacked)]
    values = interpret(solver, program, inner, loops=(loop,))
    solver.bodies[id(op)] = program, values
    solver.loops_of[id(op)] = loop
    results = [values[i] for i in program.outputs]
    for before, after in zip(carry, results[:num_carry], strict=True):
        _common(solver, [before, after], [term.size for term in before])
    return [*carry, *((loop, *layout) for layout in results[num_carry:])]


@rule("while")
def _while(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    num_cond, num_body = op.params["cond_nconsts"], op.params["body_nconsts"]
    carry = _carried(solver, layouts[num_cond + num_body :])
    interpret(solver, Program(op.params["cond_jaxpr"]), [*layouts[:num_cond], *carry])
    program = Program(op.params["body_jaxpr"])
    values = interpret(solver, program, [*layouts[num_cond : num_cond + num_body], *carry])
    for before, number in zip(carry, program.outputs, strict=True):
        _common(solver, [before, values[number]], [term.size for term in before])
    return carry
