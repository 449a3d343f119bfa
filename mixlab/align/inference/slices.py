"""Axes that a program takes apart by slices, which would be fixed if each slice stood alone.

Gates `h[:, :n]`, `h[:, n:]` divide an axis as a split does. Fused queries, keys and values
`h.reshape(..., 3, heads, d)` are read one at a time, so that each may have units of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mixlab.align.inference.layout import Fixed, Layout, Solver, Wild, concat
from mixlab.align.inference.program import Op, Program


class Readers:
    """Which operations read each value of a program."""

    def __init__(self, program: Program) -> None:
        self._shapes = program.shapes
        self._readers: list[list[Op]] = [[] for _ in program.shapes]
        self._results = set(program.outputs)
        for op in program.ops:
            for number in set(op.inputs):
                self._readers[number].append(op)

    def divide(self, solver: Solver, number: int, layout: Layout) -> Layout:
        """Cuts the axes of a value that slices divide into equal segments, read one by one."""
        slices: dict[int, set[int]] = {}
        sizes: dict[int, set[int]] = {}
        for op in self._readers[number]:
            if op.name == "slice" and (segment := self._segment(op)) is not None:
                axis, start, stop = segment
                slices.setdefault(axis, set()).add(start)
                sizes.setdefault(axis, set()).add(stop - start)
        divided = list(layout)
        for axis, starts in slices.items():
            whole, size = layout[axis].size, min(sizes[axis])
            equal = len(sizes[axis]) == 1 and whole % size == 0
            rest = solver.resolve(layout[axis])
            if not equal or starts != set(range(0, whole, size)) or isinstance(rest, Wild):
                continue
            segments = []
            for _ in starts:
                head, rest = solver.cut(rest, size)
                segments.append(head)
            divided[axis] = concat(segments)
        return tuple(divided)

    def axis_apart(self, number: int) -> int | None:
        """The axis of a value of which all readers take single positions, transposed or not."""
        if number in self._results:
            return None
        axes: set[int | None] = set()
        for op in self._readers[number]:
            axis = None
            if op.name == "transpose":
                moved = self.axis_apart(op.outputs[0])
                axis = None if moved is None else op.params["permutation"][moved]
            elif op.name == "slice":
                segment = self._segment(op)
                axis = segment[0] if segment and segment[2] - segment[1] == 1 else None
            elif op.name == "unstack" or (op.name == "split" and set(op.params["sizes"]) == {1}):
                axis = op.params["axis"]
            axes.add(axis)
        return axes.pop() if len(axes) == 1 else None

    def _segment(self, op: Op) -> tuple[int, int, int] | None:
        """Axis, start and stop of a slice that takes consecutive positions of one axis, if any."""
        shape = self._shapes[op.inputs[0]]
        strides = op.params["strides"] or (1,) * len(shape)
        bounds = zip(op.params["start_indices"], op.params["limit_indices"], strides, strict=True)
        cut = [
            (axis, start, stop, stride)
            for axis, (start, stop, stride) in enumerate(bounds)
            if (start, stop, stride) != (0, shape[axis], 1)
        ]
        if len(cut) != 1:
            return None
        axis, start, stop, stride = cut[0]
        return (axis, start, stop) if stride == 1 and stop > start else None


@dataclass(frozen=True)
class Apart:
    """A value with a layout for each position of one axis, in which that axis has size one."""

    axis: int
    layouts: list[Layout]

    @classmethod
    def reshaped(cls, solver: Solver, layout: Layout, shape: Sequence[int], axis: int) -> "Apart":
        """Reshapes a value so that every position of `axis` has units of its own."""
        count, inner = shape[axis], tuple(shape[axis + 1 :])
        *outer, rest = solver.reshape(layout, (*shape[:axis], count * math.prod(inner)))
        layouts: list[Layout] = []
        for _ in range(count):
            segment, rest = solver.cut(rest, math.prod(inner))
            layouts.append((*outer, Fixed(1), *solver.reshape((segment,), inner)))
        return cls(axis, layouts)

    def read(self, op: Op) -> "Apart | list[Layout]":
        """What one of the operations that `Readers.axis_apart` admits makes of the value."""
        if op.name == "transpose":
            order = op.params["permutation"]
            moved = [tuple(layout[axis] for axis in order) for layout in self.layouts]
            return Apart(order.index(self.axis), moved)
        if op.name == "slice":
            return [self.layouts[op.params["start_indices"][self.axis]]]
        if op.name == "split":
            return self.layouts
        axis = self.axis
        return [(*layout[:axis], *layout[axis + 1 :]) for layout in self.layouts]
