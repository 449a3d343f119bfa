"""The linear layers of a program: which leaves are their kernels and biases, and what are units."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mixlab import trees
from mixlab.align.inference.program import Op, Program
from mixlab.types import Array

_LINEAR = ("dot_general", "conv_general_dilated")


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A matrix product or convolution with a kernel, and a bias added right after.

    Attributes:
        kernel: the number of the kernel among the program's values.
        bias: likewise.
        units: numbers the units along their axes of the outputs; the other axes have size 1.
        unit_shape: the units' axes of the kernel as the operation sees it; the others have size 1.
        kernel_places: for every element of the kernel as the operation sees it, its place in the
            flattened leaf.
        bias_places: likewise of the bias, of the shape of `units`.
    """

    kernel: int
    bias: int
    units: np.ndarray
    unit_shape: tuple[int, ...]
    kernel_places: np.ndarray
    bias_places: np.ndarray

    @property
    def other_axes(self) -> tuple[int, ...]:
        """The axes of the outputs along which a unit has its values: examples, pixels."""
        return tuple(axis for axis, size in enumerate(self.units.shape) if size == 1)

    def fold(self, scale: Array, shift: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
        """The leaves with which every output is `scale * output + shift`.

        Args:
            scale: one entry a unit, of the shape of `units`.
            shift: likewise.
            kernel: the kernel's leaf.
            bias: the bias's leaf.

        Returns:
            The new leaves, with shapes and dtypes kept, computed in float32 or wider.
        """
        by_unit = _put_back(scale, self.units, self.unit_shape)
        seen = jnp.broadcast_to(by_unit, self.kernel_places.shape)
        factor = _put_back(seen, self.kernel_places, kernel.shape)
        gain, offset = (_put_back(x, self.bias_places, bias.shape) for x in (scale, shift))
        return _affine(kernel, factor, 0), _affine(bias, gain, offset)


def find_layers(program: Program, variables: Sequence[int]) -> dict[int, LinearLayer]:
    """The layers whose outputs can be scaled and shifted through their leaves.

    Left out are layers whose kernel or bias is used more than once, those that an output of the
    program is computed from without a further layer, and those inside control flow.

    Args:
        program: the traced function.
        variables: the numbers of the leaves; the program's other inputs are data.

    Returns:
        By the number of the sum of product and bias, in order.
    """
    uses = Counter([i for op in program.ops for i in op.inputs] + program.outputs)
    data = program.depending([i for i in program.inputs if i not in variables])
    final = _final(program, program.depending(variables) - data)
    # Of leaves and what merely reorders them: the leaf, and the places of the elements in it.
    views = {i: (i, _numbered(program.shapes[i])) for i in variables}
    # Products on the way to their bias: kernel, its places and unit axes, and the outputs' units.
    products: dict[int, tuple[int, np.ndarray, tuple[int, ...], np.ndarray]] = {}
    layers: dict[int, LinearLayer] = {}
    for op in program.ops:
        out = op.outputs[0]
        # What is used twice cannot be changed for one of its users.
        alone = [i for i in op.inputs if uses[i] == 1]
        if op.name in _LINEAR:
            for number in alone:
                if number in views and data.issuperset({*op.inputs} - {number}):
                    leaf, places = views[number]
                    axes = _unit_axes(op, op.inputs.index(number), places.ndim)
                    whole = math.prod(program.shapes[leaf]) == places.size == _squeezed(places).size
                    if axes and whole:
                        products[out] = leaf, places, *_units(op, axes, places.shape)
        elif op.name in ("add", "add_any"):
            for number, other in (op.inputs, op.inputs[::-1]):
                if number in products and other in views and uses[number] == uses[other] == 1:
                    kernel, kernel_places, unit_shape, units = products[number]
                    bias, bias_places = views[other]
                    units, bias_places = _squeezed(units), _squeezed(bias_places)
                    same = units.shape == bias_places.shape
                    if same and units.size == math.prod(program.shapes[bias]) and out not in final:
                        layers[out] = LinearLayer(
                            kernel, bias, units, unit_shape, kernel_places, bias_places
                        )
        elif alone and alone[0] in views:
            leaf, places = views[alone[0]]
            moved = _view(op, places)
            if moved is not None:
                views[out] = leaf, moved
        elif alone and alone[0] in products:
            kernel, kernel_places, unit_shape, units = products[alone[0]]
            moved = _view(op, units)
            if moved is not None and moved.size == units.size:
                products[out] = kernel, kernel_places, unit_shape, moved
    return layers


def hidden_layers(program: Program) -> list[str]:
    """The names of the control flow that has layers inside."""
    return sorted({op.name for op in program.ops if op.name not in _LINEAR and _is_layer(op)})


def _affine(leaf: Array, gain: Array, offset: Array | int) -> Array:
    dtype = trees.wide(leaf.dtype)
    moved = leaf.astype(dtype) * gain.astype(dtype) + jnp.asarray(offset, dtype)
    return moved.astype(leaf.dtype)


def _numbered(shape: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def _varies(places: np.ndarray) -> list[bool]:
    return [
        size > 1 and stride != 0 for size, stride in zip(places.shape, places.strides, strict=True)
    ]


def _squeezed(places: np.ndarray) -> np.ndarray:
    """Without the repetitions of a broadcast."""
    return places[tuple(slice(None if varies else 1) for varies in _varies(places))]


def _put_back(values: Array, places: np.ndarray, shape: Sequence[int]) -> Array:
    """The array of `shape` with `values` at their `places`, which are those of a strided view."""
    order = sorted(range(places.ndim), key=lambda axis: -places.strides[axis])
    return values.transpose(order).reshape(shape)


def _view(op: Op, places: np.ndarray) -> np.ndarray | None:
    """The places after an operation that only reorders or repeats elements; None for others."""
    shape = op.shapes[0]
    match op.name:
        case "convert_element_type" | "copy" | "copy_p":
            return places
        case "transpose":
            return places.transpose(op.params["permutation"])
        case "broadcast_in_dim":
            along = op.params["broadcast_dimensions"]
            others = [axis for axis in range(len(shape)) if axis not in along]
            return np.broadcast_to(np.expand_dims(places, others), shape)
        case "squeeze" | "reshape" if op.params.get("dimensions") is None or op.name == "squeeze":
            try:
                return places.reshape(shape, copy=False)
            except ValueError:  # axes that no longer have a stride of their own
                return None
    return None


def _unit_axes(op: Op, side: int, ndim: int) -> dict[int, int]:
    """The axes of operand number `side` that are axes of the result too, in order, with these."""
    if op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        if side != 1 or op.params["batch_group_count"] != 1:
            return {}
        return {numbers.rhs_spec[0]: numbers.out_spec[1]}
    contracted, batch = op.params["dimension_numbers"]
    kept = [axis for axis in range(ndim) if axis not in (*contracted[side], *batch[side])]
    start = len(op.shapes[0]) - len(kept) if side else len(batch[side])
    pairs = {axis: at for at, axis in enumerate(batch[side])}
    pairs |= {axis: start + at for at, axis in enumerate(kept)}
    return dict(sorted(pairs.items()))


def _units(
    op: Op, axes: dict[int, int], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape of the units along the kernel's axes, and their numbers along the result's."""
    unit_shape = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
    numbers = _numbered([shape[axis] for axis in axes])
    order = np.argsort(list(axes.values()))
    others = [axis for axis in range(len(op.shapes[0])) if axis not in axes.values()]
    numbers = np.expand_dims(numbers.transpose(order), others)
    return unit_shape, np.broadcast_to(numbers, op.shapes[0])


def _final(program: Program, learned: set[int]) -> set[int]:
    """The values that an output is computed from without a further layer."""
    final = set(program.outputs)
    for op in reversed(program.ops):
        if final.intersection(op.outputs) and not (_is_layer(op) and learned & {*op.inputs}):
            final.update(op.inputs)
    return final


def _is_layer(op: Op) -> bool:
    """Whether the operation is a product or convolution, or holds one inside."""

    def within(params: dict[str, Any]) -> bool:
        return any(
            eqn.primitive.name in _LINEAR or within(eqn.params)
            for body in core.jaxprs_in_params(params)
            for eqn in body.eqns
        )

    return op.name in _LINEAR or within(op.params)
