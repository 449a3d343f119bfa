"""How each primitive passes layouts from its operands to its results.

A rule names the permutations that a primitive commutes with. A primitive without a rule, and an
axis that a primitive treats by position, becomes fixed: fewer permutations, never a wrong one.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence

from mixlab.align.inference.layout import (
    Atom,
    Fixed,
    Layout,
    Prod,
    Solver,
    Sum,
    Term,
    Wild,
    concat,
    prod,
)
from mixlab.align.inference.program import Op, Program, scan_counts
from mixlab.align.inference.slices import Apart, Readers

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
    of control flow too, is appended to `solver.seen` with the loops around it. A value that is
    only read one position of an axis at a time has a layout for each position; it is listed as
    fixed.
    """
    layouts: list[Layout] = [tuple(Fixed(size) for size in shape) for shape in program.shapes]
    readers = Readers(program)
    apart: dict[int, Apart] = {}
    for number, layout in zip(program.inputs, arguments, strict=True):
        layouts[number] = readers.divide(solver, number, layout)
    outer, solver.around = solver.around, (*solver.around, *loops)
    for op in program.ops:
        given = [layouts[i] for i in op.inputs]
        axis = readers.axis_apart(op.outputs[0]) if op.name == "reshape" else None
        results: Apart | list[Layout]
        if axis is not None:
            results = Apart.reshaped(solver, given[0], op.shapes[0], axis)
        elif op.inputs and op.inputs[0] in apart:
            results = apart[op.inputs[0]].read(op)
        else:
            results = _RULES.get(op.name, _unknown)(solver, op, given)
        if isinstance(results, Apart):
            apart[op.outputs[0]] = results
            solver.seen.append((op, given, results.layouts, solver.around))
        else:
            solver.seen.append((op, given, results, solver.around))
            for number, layout in zip(op.outputs, results, strict=True):
                layouts[number] = readers.divide(solver, number, layout)
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
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a",
    "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p",
    "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "ne", "neg", "nextafter", "not", "or",
    "polygamma", "population_count", "pow", "real", "reduce_precision",
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left",
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


# fmt: off
_RANDOM = (
    "empty", "iota_2x32_shape", "philox2x32", "philox4x32", "random_bits", "random_clone",
    "random_fold_in", "random_gamma", "random_seed", "random_split", "random_unwrap", "random_wrap",
    "rng_bit_generator", "rng_uniform", "threefry2x32", "threefry4x32",
)
# fmt: on


@rule(*_RANDOM)
def _random(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    """Random numbers belong to their positions."""
    _fix(solver, *layouts)
    return [_fixed(shape) for shape in op.shapes]


@rule("bitcast_convert_type")
def _bitcast(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    # Wide elements become an axis of narrow ones, or the reverse.
    rank = len(op.shapes[0])
    _fix(solver, layouts[0][rank:])
    return [(*layouts[0][:rank], *_fixed(op.shapes[0][len(layouts[0]) :]))]


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


@rule("ragged_dot_general")
def _ragged_dot_general(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    # Consecutive rows along the ragged axes belong to a group; each group has its own matrix.
    left, right, sizes = layouts
    numbers = op.params["ragged_dot_dimension_numbers"]
    _fix(solver, sizes, tuple(left[axis] for axis in numbers.lhs_ragged_dimensions))
    _fix(solver, tuple(right[axis] for axis in numbers.rhs_group_dimensions))
    (contracted, right_contracted), (batch, right_batch) = numbers.dot_dimension_numbers
    for i, j in zip(contracted, right_contracted, strict=True):
        solver.unify(left[i], right[j])
    both = [solver.unify(left[i], right[j]) for i, j in zip(batch, right_batch, strict=True)]
    bound = (*right_contracted, *right_batch, *numbers.rhs_group_dimensions)
    left_free = [t for i, t in enumerate(left) if i not in (*contracted, *batch)]
    right_free = [t for j, t in enumerate(right) if j not in bound]
    result = (*both, *left_free, *right_free)
    # Where the contracted axis is ragged, the groups lie along a new first axis.
    return [(*_fixed(op.shapes[0][: len(op.shapes[0]) - len(result)]), *result)]


@rule("conv_general_dilated")
def _conv(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    image, kernel = layouts
    numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    _fix(solver, tuple(image[axis] for axis in numbers.lhs_spec[2:]))
    _fix(solver, tuple(kernel[axis] for axis in numbers.rhs_spec[2:]))
    batch, features = (image[axis] for axis in numbers.lhs_spec[:2])
    if op.params["batch_group_count"] > 1:
        # The examples are in groups instead of the input channels.
        groups = op.params["batch_group_count"]
        group, batch = solver.factor(batch, groups)
    else:
        group, features = solver.factor(features, groups)
    kernel_group, out = solver.factor(kernel[numbers.rhs_spec[0]], groups)
    solver.unify(features, kernel[numbers.rhs_spec[1]])
    result = list(_fixed(op.shapes[0]))
    result[numbers.out_spec[0]] = batch
    result[numbers.out_spec[1]] = prod([solver.unify(group, kernel_group), out])
    return [tuple(result)]


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
@rule("reduce_xor")
def _reduce(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    return [tuple(t for axis, t in enumerate(layouts[0]) if axis not in op.params["axes"])]


@rule("reduce")
def _general_reduce(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    # The function may be one that depends on the order; the initial values are scalars.
    axes = op.params["dimensions"]
    common = _fix_axes(solver, op, layouts[: len(op.outputs)], axes)
    return [tuple(t for axis, t in enumerate(layout) if axis not in axes) for layout in common]


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


@rule("top_k", "approx_top_k")
def _top_k(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    name = "axis" if op.name == "top_k" else "reduction_dimension"
    axis = op.params.get(name, -1) % len(layouts[0])
    layout = _fix_axes(solver, op, layouts, [axis])[0]
    kept = (*layout[:axis], Fixed(op.shapes[0][axis]), *layout[axis + 1 :])
    return [kept] * len(op.outputs)


def _windows(op: Op, layout: Layout) -> list[int]:
    """The axes along which a window sees anything but one element after another."""
    plain = {"window_dimensions": 1, "window_strides": 1, "padding": (0, 0), "base_dilation": 1}
    return [
        axis
        for axis in range(len(layout))
        if any(op.params[name][axis] != value for name, value in plain.items() if name in op.params)
    ]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
@rule("select_and_gather_add")
def _reduce_window(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    if op.name == "reduce_window":  # the initial values follow, scalars
        layouts = layouts[: len(op.outputs)]
    windows = _windows(op, layouts[0])
    common = _fix_axes(solver, op, layouts, windows)
    shape = op.shapes[0]
    return [
        tuple(Fixed(shape[axis]) if axis in windows else term for axis, term in enumerate(layout))
        for layout in common
    ]


@rule("select_and_scatter_add")
def _select_and_scatter_add(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    source, operand = layouts
    windows = _windows(op, operand)
    for layout in layouts:
        _fix(solver, tuple(layout[axis] for axis in windows))
    return [
        tuple(
            Fixed(operand[axis].size) if axis in windows else solver.unify(source[axis], term)
            for axis, term in enumerate(operand)
        )
    ]


@rule("concatenate")
def _concatenate(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    axis = op.params["dimension"]
    segments = concat([layout[axis] for layout in layouts])
    shape = [1 if a == axis else size for a, size in enumerate(op.shapes[0])]
    others = [(*layout[:axis], Fixed(1), *layout[axis + 1 :]) for layout in layouts]
    common = _common(solver, others, shape)
    return [(*common[:axis], segments, *common[axis + 1 :])]


@rule("stack")
def _stack(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    axis = op.params["axis"]
    common = _common(solver, layouts, [term.size for term in layouts[0]])
    return [(*common[:axis], Fixed(len(layouts)), *common[axis:])]


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


def _has_border(term: Term, at: int) -> bool:
    """Whether a solved term can be cut at a position without cutting a group in two."""
    match term:
        case Atom(size):
            return at in (0, size)
        case Sum(parts):
            ends = list(itertools.accumulate((part.size for part in parts), initial=0))
            part = bisect.bisect_right(ends, at) - 1
            return at == ends[-1] or _has_border(parts[part], at - ends[part])
        case Prod(parts):
            inner = prod(parts[1:])
            row, within = divmod(at, inner.size)
            if within:
                return isinstance(parts[0], Fixed) and _has_border(inner, within)
            return _has_border(parts[0], row)
    return True


@rule("slice")
def _slice(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    strides = op.params["strides"] or (1,) * len(layouts[0])
    bounds = zip(op.params["start_indices"], op.params["limit_indices"], strides, strict=True)
    result: list[Term] = []
    for axis, (start, stop, stride) in enumerate(bounds):
        term = layouts[0][axis]
        if (start, stop, stride) != (0, term.size, 1):
            known = solver.resolve(term)
            if stride == 1 and _has_border(known, start) and _has_border(known, stop):
                term, _ = solver.cut(solver.cut(known, start)[1], stop - start)
            else:
                solver.fix(known)
                term = Fixed(op.shapes[0][axis])
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
    solver.fix(indices[-1])
    paired = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    alone = [axis for axis in range(len(operand)) if axis not in paired.values()]
    sizes = [op.params["slice_sizes"][axis] for axis in alone]
    window = _window(solver, tuple(operand[axis] for axis in alone), sizes)
    dropped = numbers.collapsed_slice_dims
    kept = iter([t for axis, t in zip(alone, window, strict=True) if axis not in dropped])
    batch = iter(
        [
            solver.unify(operand[paired[axis]], term) if axis in paired else term
            for axis, term in enumerate(indices[:-1])
        ]
    )
    axes = range(len(op.shapes[0]))
    return [tuple(next(kept if axis in numbers.offset_dims else batch) for axis in axes)]


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(solver: Solver, op: Op, layouts: list[Layout]) -> list[Layout]:
    operand, indices, updates = layouts
    numbers = op.params["dimension_numbers"]
    solver.fix(indices[-1])
    result = list(operand)
    paired = dict(
        zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    scattered = [a for a in range(len(updates)) if a not in numbers.update_window_dims]
    for axis, number in enumerate(scattered):
        both = solver.unify(indices[axis], updates[number])
        if axis in paired:
            result[paired[axis]] = solver.unify(operand[paired[axis]], both)
        elif op.name == "scatter":
            # Of two updates at one place the later one may win.
            _fix(solver, (both,))
    outside = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = iter(numbers.update_window_dims)
    for axis, term in enumerate(operand):
        update = Fixed(1) if axis in outside else updates[next(window)]
        if axis in paired.values():
            continue
        if update.size == term.size:
            result[axis] = solver.unify(term, update)
        else:
            solver.fix(update)
            result[axis] = solver.fix(term)
    return [tuple(result)]


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
