"""A traced function as one flat list of primitive operations, which can be read and evaluated."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mixlab.types import Array, PyTree

# Calls that compute what their body computes.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_vmap_call": "call",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclass(frozen=True)
class Op:
    """One application of a primitive to numbered values."""

    primitive: core.Primitive
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the outputs."""

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


Place = tuple[int, ...]
"""Where a value is: its number; or, in a scan's body, the number of the scan's first result, which
names the scan, and then the place in the body."""


class Program:
    """The operations that the results need, in order, nested calls inlined; values are numbered.

    Attributes:
        inputs: the numbers of the arguments.
        outputs: the numbers of the results.
        constants: the values that the function closes over, and literals.
        ops: the operations. Control flow (`cond`, `scan`, `while`) stays one operation.
        needed: the numbers of the values that the outputs are computed from.
        shapes: the shape of every value.
        float_bytes: the width of the narrowest floating array among the values.
    """

    def __init__(self, closed: core.ClosedJaxpr) -> None:
        self.ops: list[Op] = []
        self.constants: dict[int, Any] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.float_bytes = 8
        self.inputs = [self._declare(var) for var in closed.jaxpr.invars]
        self._dtypes = [var.aval.dtype for var in closed.jaxpr.invars]
        self.outputs = self._inline(closed.jaxpr, self._hold(closed.consts), self.inputs)
        self.needed = set(self.outputs)
        for op in reversed(self.ops):
            if self.needed.intersection(op.outputs):
                self.needed.update(op.inputs)
        self.ops = [op for op in self.ops if self.needed.intersection(op.outputs)]

    def evaluate(
        self, arguments: Sequence[Any], wanted: Sequence[Place], *, dtype: Any = None
    ) -> list[Array]:
        """Runs the program and returns the values at the places `wanted`.

        Args:
            arguments: one array for each of `inputs`.
            wanted: places of values; a value in a scan's body comes stacked over the iterations.
            dtype: computes all floating values in this precision instead of the traced ones, which
                the arguments must have too.

        Raises:
            ValueError: `dtype` is given for a program with control flow, whose bodies are traced
                for their own precision.
        """
        if dtype is not None and not self.is_straight:
            raise ValueError("a program with control flow runs in the precision it was traced in")
        values: dict[int, Any] = {i: _cast(value, dtype) for i, value in self.constants.items()}
        if dtype is not None:
            # Integers stay as wide as they were traced.
            arguments = [
                jnp.asarray(x, traced) if jnp.issubdtype(traced, jnp.integer) else x
                for x, traced in zip(arguments, self._dtypes, strict=True)
            ]
        values.update(zip(self.inputs, arguments, strict=True))
        inside: dict[int, list[Place]] = {}
        for place in wanted:
            if len(place) > 1:
                inside.setdefault(place[0], []).append(place[1:])
        tapped: dict[Place, Array] = {}
        for op in self.ops:
            if op.outputs[0] in inside:
                places = inside[op.outputs[0]]
                results, found = _scan(op, [values[i] for i in op.inputs], places)
                tapped.update({(op.outputs[0], *p): x for p, x in zip(places, found, strict=True)})
                values.update(zip(op.outputs, results, strict=True))
                continue
            operands = [values[i] for i in op.inputs]
            if dtype is not None and op.name == "reduce_precision":
                results = operands
            elif dtype is not None and op.name == "bitcast_convert_type":
                # Bits have the meaning that they had: random numbers are made from them.
                result = op.primitive.bind(*operands, **op.params)
                floating = jnp.issubdtype(result.dtype, jnp.floating)
                results = [result.astype(dtype) if floating else result]
            else:
                params = {name: _cast_dtype(value, dtype) for name, value in op.params.items()}
                result = op.primitive.bind(*operands, **params)
                results = result if op.primitive.multiple_results else [result]
            values.update(zip(op.outputs, results, strict=True))
        return [values[place[0]] if len(place) == 1 else tapped[place] for place in wanted]

    def depending(self, sources: Iterable[int]) -> set[int]:
        """The numbers of the values that are computed from `sources`, these included."""
        depending = set(sources)
        for op in self.ops:
            if depending.intersection(op.inputs):
                depending.update(op.outputs)
        return depending

    @property
    def is_straight(self) -> bool:
        """Whether there is no control flow left."""
        return not any(list(core.jaxprs_in_params(op.params)) for op in self.ops)

    def _new(self, shape: Sequence[int]) -> int:
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _declare(self, var: Any) -> int:
        if var.aval.shape and jnp.issubdtype(var.aval.dtype, jnp.floating):
            self.float_bytes = min(self.float_bytes, var.aval.dtype.itemsize)
        return self._new(var.aval.shape)

    def _hold(self, constants: Sequence[Any]) -> list[int]:
        numbers = [self._new(getattr(value, "shape", ())) for value in constants]
        self.constants.update(zip(numbers, map(_as_traced, constants), strict=True))
        return numbers

    def _inline(self, jaxpr: core.Jaxpr, consts: list[int], arguments: list[int]) -> list[int]:
        number = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True),
        )

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self._hold([atom.val])[0]
            return number[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if eqn.primitive.name in _INLINED:
                body = eqn.params[_INLINED[eqn.primitive.name]]
                closed = isinstance(body, core.ClosedJaxpr)
                inner = body.jaxpr if closed else body
                results = self._inline(inner, self._hold(body.consts) if closed else [], inputs)
            else:
                results = [self._declare(var) for var in eqn.outvars]
                shapes = tuple(self.shapes[i] for i in results)
                op = Op(eqn.primitive, eqn.params, tuple(inputs), tuple(results), shapes)
                self.ops.append(op)
            number.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def trace(fn: Callable[..., Any], *arguments: PyTree) -> Program:
    """Traces `fn(*arguments)`; the program's inputs are the leaves of the arguments in order.

    Raises:
        TypeError: `fn` is no function.
    """
    if not callable(fn):
        raise TypeError(f"fn is a function of (variables, *inputs) such as model.apply, got {fn!r}")
    return Program(jax.make_jaxpr(fn)(*arguments))


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "ft_in" in params:  # JAX 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _scan(op: Op, operands: list[Any], places: list[Place]) -> tuple[list[Any], list[Array]]:
    """Runs a scan; returns its results and values of its body, stacked over the iterations."""
    body = Program(op.params["jaxpr"])
    num_consts, num_carry = scan_counts(op.params)
    consts, stacked = operands[:num_consts], operands[num_consts + num_carry :]

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        wanted = [*((number,) for number in body.outputs), *places]
        values = body.evaluate([*consts, *carry, *slices], wanted)
        ends = num_carry, len(body.outputs)
        return values[: ends[0]], (values[ends[0] : ends[1]], values[ends[1] :])

    carry = operands[num_consts : num_consts + num_carry]
    kept, (results, found) = jax.lax.scan(
        step, carry, stacked, length=op.params["length"], reverse=op.params["reverse"]
    )
    return [*kept, *results], found


def _as_traced(value: Any) -> Any:
    """NumPy's wide integers as JAX reads them at the time of tracing."""
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
    return value


def _cast(value: Any, dtype: Any) -> Any:
    if dtype is None or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return value
    return np.asarray(value).astype(dtype)


def _cast_dtype(value: Any, dtype: Any) -> Any:
    named = isinstance(value, np.dtype) and jnp.issubdtype(value, jnp.floating)
    return np.dtype(dtype) if dtype is not None and named else value
