"""Layouts: which hidden permutations act on an axis, as terms over atoms, and their unification.

An axis of a value carries a *term*. An `Atom` is an unknown permutation of its positions; `Fixed`
positions carry meaning, so that only the identity acts; along a `Wild` axis the value is constant,
so that every permutation leaves it as it is. `Prod` is a row-major product of axes (what a reshape
makes), `Sum` lays segments one after another (what a concatenation makes).

A `Solver` collects equations between terms. Every step replaces an atom by something that admits
fewer permutations, all of them valid, so the order of the equations never endangers validity.
"""

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Fixed:
    """Positions that carry meaning: only the identity acts.

    A name says that permutations of other axes may vary over it: the iterations of a loop.
    """

    size: int
    name: str | None = None


@dataclass(frozen=True)
class Wild:
    """An axis along which the value is constant: every permutation leaves it unchanged."""

    size: int


@dataclass(frozen=True)
class Atom:
    """A permutation of `size` positions: a number while solving, a group's name afterwards.

    It may vary over other axes of the same leaf, whose names are in `over`: the iterations of a
    loop, or another group, counted in its permuted order.
    """

    size: int
    name: int | str
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prod:
    """A row-major product of axes; build it with `prod`."""

    parts: tuple["Term", ...]

    @property
    def size(self) -> int:
        """The product of the sizes of the parts."""
        return int(np.prod([part.size for part in self.parts]))


@dataclass(frozen=True)
class Sum:
    """Segments laid one after another; build it with `concat`."""

    parts: tuple["Term", ...]

    @property
    def size(self) -> int:
        """The sum of the sizes of the parts."""
        return sum(part.size for part in self.parts)


Term = Fixed | Wild | Atom | Prod | Sum
Layout = tuple[Term, ...]
"""One term an axis."""

# A product with a fixed outer factor is a sum of that many equal segments. Beyond this many
# segments the axis becomes fixed instead: no network lays out its units so.
_MAX_SEGMENTS = 64


def _is_plain(term: Term | None) -> bool:
    return isinstance(term, Fixed) and term.name is None


def prod(parts: Sequence[Term]) -> Term:
    """The row-major product: flattened, without factors of size one, neighbours merged."""
    merged: list[Term] = []
    for part in parts:
        for factor in part.parts if isinstance(part, Prod) else (part,):
            if factor.size == 1:
                continue
            last = merged[-1] if merged else None
            if _is_plain(factor) and _is_plain(last):
                merged[-1] = Fixed(merged[-1].size * factor.size)
            elif isinstance(factor, Wild) and isinstance(last, Wild):
                merged[-1] = Wild(last.size * factor.size)
            else:
                merged.append(factor)
    if not merged:
        return Fixed(1)
    return merged[0] if len(merged) == 1 else Prod(tuple(merged))


def concat(parts: Sequence[Term]) -> Term:
    """The segments in order: flattened, without empty ones, neighbouring fixed ones merged.

    Neighbouring wild segments stay apart, since each may hold a constant of its own.
    """
    merged: list[Term] = []
    for part in parts:
        for segment in part.parts if isinstance(part, Sum) else (part,):
            if segment.size == 0:
                continue
            segment = Fixed(1) if segment.size == 1 else segment
            last = merged[-1] if merged else None
            if isinstance(segment, Fixed) and isinstance(last, Fixed):
                merged[-1] = Fixed(last.size + segment.size)
            else:
                merged.append(segment)
    if not merged:
        return Fixed(0)
    return merged[0] if len(merged) == 1 else Sum(tuple(merged))


def atoms(term: Term) -> Iterator[Atom]:
    """The atoms in `term`, from left to right, repeated ones included."""
    if isinstance(term, Atom):
        yield term
    elif isinstance(term, Prod | Sum):
        for part in term.parts:
            yield from atoms(part)


def rename(
    term: Term,
    names: Mapping[int | str, str],
    loops: Mapping[int | str, str] = types.MappingProxyType({}),
    over: Mapping[str, tuple[str, ...]] = types.MappingProxyType({}),
) -> Term:
    """Gives the atoms of a solved term their names; atoms without one become fixed.

    Args:
        term: a solved term.
        names: the names of groups, by atom.
        loops: the names of loops, by atom.
        over: for each group what its permutation varies over.
    """
    match term:
        case Atom(size, name) if name in names:
            return Atom(size, names[name], over.get(names[name], ()))
        case Atom(size, name):
            return Fixed(size, loops.get(name))
        case Prod(parts):
            return prod([rename(part, names, loops, over) for part in parts])
        case Sum(parts):
            return concat([rename(part, names, loops, over) for part in parts])
    return term


def companions(layout: Layout, name: int | str) -> Iterator[list[int | str | None]]:
    """For every occurrence of an atom, the names of the other axes and factors beside it.

    An occurrence inside a segment is beside the factors of its own segment, not of others.
    """

    def inside(term: Term) -> Iterator[list[int | str | None]]:
        match term:
            case Atom():
                if term.name == name:
                    yield []
            case Prod(parts):
                for i, part in enumerate(parts):
                    for found in inside(part):
                        yield found + beside([*parts[:i], *parts[i + 1 :]])
            case Sum(parts):
                for part in parts:
                    yield from inside(part)

    def beside(terms: Sequence[Term]) -> list[int | str | None]:
        return [label(f) for t in terms for f in (t.parts if isinstance(t, Prod) else (t,))]

    for axis, term in enumerate(layout):
        for found in inside(term):
            yield found + beside([*layout[:axis], *layout[axis + 1 :]])


def label(term: Term) -> int | str | None:
    """The name of a lone atom or of a loop, which other atoms may vary over; else None."""
    return term.name if isinstance(term, Atom | Fixed) else None


def index(
    term: Term,
    permutations: Mapping[Any, Any],
    xp: Any = jnp,
    beside: Sequence[int | str | None] = (),
) -> Any:
    """The positions that permuted positions are taken from: `permuted[j] = original[index[j]]`.

    Args:
        term: a solved term.
        permutations: an integer array [n], or [*over, n], by atom; the identity where absent.
        xp: the array module to compute with, `jax.numpy` or `numpy`.
        beside: the labels of the axes beside this one.

    Returns:
        int32 [*beside, size], where an axis that nothing varies over has length one.
    """
    ones = (1,) * len(beside)
    match term:
        case Atom(size, name, over):
            given = permutations[name] if name in permutations else np.arange(size)
            p = xp.asarray(given).astype(np.int32)
            if p.ndim == 1:
                return p.reshape(*ones, size)
            order = [over.index(other) for other in beside if other in over]
            sizes = [p.shape[over.index(other)] if other in over else 1 for other in beside]
            return p.transpose(*order, len(over)).reshape(*sizes, size)
        case Prod(parts):
            sizes = [part.size for part in parts]
            rows: Any = 0
            for i, part in enumerate(parts):
                others = [label(other) for other in (*parts[:i], *parts[i + 1 :])]
                found = index(part, permutations, xp, (*beside, *others))
                stride = int(np.prod(sizes[i + 1 :]))
                rows = rows + xp.moveaxis(found, -1, len(beside) + i) * stride
            return rows.reshape(*rows.shape[: len(beside)], term.size)
        case Sum(parts):
            offsets = np.cumsum([0, *(part.size for part in parts[:-1])]).tolist()
            found = [
                index(part, permutations, xp, beside) + start
                for part, start in zip(parts, offsets, strict=True)
            ]
            outer = np.broadcast_shapes(*(segment.shape[:-1] for segment in found))
            found = [xp.broadcast_to(part, (*outer, part.shape[-1])) for part in found]
            return xp.concatenate(found, axis=-1)
    return xp.arange(term.size, dtype=np.int32).reshape(*ones, term.size)


def take(value: Any, layout: Layout, permutations: Mapping[Any, Any], xp: Any = jnp) -> Any:
    """Permutes an array by its layout: along each axis `permuted[j] = original[index[j]]`.

    What a permutation varies over is permuted first, so that it counts in the new order. Axes on
    which none of `permutations` acts are left alone.
    """
    shape, apart, axes = _axes_in_order(layout)
    if len(apart) != len(shape):
        value = value.reshape([term.size for term in apart])
    for axis, beside, names in axes:
        if not any(name in permutations for name in names):
            continue
        term = apart[axis]
        if isinstance(term, Atom) and not term.over:
            value = xp.take(value, permutations[term.name], axis=axis)
            continue
        where = index(term, permutations, xp, beside)
        if where.size == term.size:
            value = xp.take(value, where.reshape(-1), axis=axis)
        else:
            value = xp.take_along_axis(value, xp.moveaxis(where, -1, axis), axis=axis)
    return value.reshape(shape)


_Axis = tuple[int, tuple[int | str | None, ...], tuple[int | str, ...]]


@functools.lru_cache(maxsize=4096)
def _axes_in_order(layout: Layout) -> tuple[tuple[int, ...], Layout, tuple[_Axis, ...]]:
    """The shape; the layout, products apart where permutations vary; the axes to permute.

    Of each axis its number, the labels of the others, and the names of its atoms.
    """
    shape, apart = tuple(term.size for term in layout), layout
    if any(atom.over for term in layout for atom in atoms(term)):
        apart = tuple(f for t in layout for f in (t.parts if isinstance(t, Prod) else (t,)))
    labels = tuple(label(term) for term in apart)
    order = sorted(range(len(apart)), key=lambda axis: _depth(apart, apart[axis]))
    axes = [
        (axis, (*labels[:axis], *labels[axis + 1 :]), tuple(a.name for a in atoms(apart[axis])))
        for axis in order
    ]
    return shape, apart, tuple(axis for axis in axes if axis[2])


def _depth(layout: Layout, term: Term) -> int:
    """How many permutations have to be applied before those of `term`, one upon the other."""
    over = {atom.name: atom.over for t in layout for atom in atoms(t)}

    def depth(name: int | str) -> int:
        return 1 + max((depth(other) for other in over[name]), default=0) if name in over else 0

    return max((depth(atom.name) for atom in atoms(term)), default=0)


def occurrences(value: Any, layout: Layout, name: int | str) -> Iterator[tuple[Any, Layout, int]]:
    """Every occurrence of an atom in an array, as `(array, its layout, axis)`.

    Products are reshaped apart and sums sliced apart, so that the axis is the atom's alone, and
    what it varies over are axes too.
    """
    for steps, apart, axis in paths(layout, name):
        yield walk(value, steps), apart, axis


def walk(value: Any, steps: tuple[Any, ...]) -> Any:
    """Takes the reshapes and slices of `paths`."""
    for step in steps:
        if step[0] == "cut":
            _, axis, start, stop = step
            value = value[(slice(None),) * axis + (slice(start, stop),)]
        else:
            value = value.reshape(step)
    return value


@functools.lru_cache(maxsize=4096)
def paths(
    layout: Layout, name: int | str, done: tuple[Any, ...] = ()
) -> tuple[tuple[tuple[Any, ...], Layout, int], ...]:
    """The reshapes and slices that lead to each occurrence, its layout then, and its axis."""
    for axis, term in enumerate(layout):
        before, after = layout[:axis], layout[axis + 1 :]
        if isinstance(term, Prod):
            apart = (*before, *term.parts, *after)
            return paths(apart, name, (*done, tuple(t.size for t in apart)))
        if isinstance(term, Sum) and any(atom.name == name for atom in atoms(term)):
            found: list[Any] = []
            start = 0
            for part in term.parts:
                piece = (*done, ("cut", axis, start, start + part.size))
                found += paths((*before, part, *after), name, piece)
                start += part.size
            return tuple(found)
    return tuple(
        (done, layout, axis)
        for axis, term in enumerate(layout)
        if isinstance(term, Atom) and term.name == name
    )


def rows(value: Any, axes: Sequence[int], leading: Sequence[int] = ()) -> Any:
    """Moves axes first and others last, and pools the rest: `[*leading, S, *axes]`."""
    pooled = [a for a in range(value.ndim) if a not in (*axes, *leading)]
    ends = [value.shape[a] for a in leading], [value.shape[a] for a in axes]
    size = int(np.prod([value.shape[a] for a in pooled]))
    return value.transpose([*leading, *pooled, *axes]).reshape([*ends[0], size, *ends[1]])


class Solver:
    """Equations between terms, solved by refining atoms (union-find with bound terms)."""

    def __init__(self) -> None:
        self._bound: dict[int | str, Term] = {}
        self._count = 0
        self.loops: set[int | str] = set()
        self.seen: list[tuple[Any, list[Layout], list[Layout], tuple[Term, ...]]] = []
        self.around: tuple[Term, ...] = ()
        self.bodies: dict[int, tuple[Any, list[Layout]]] = {}
        self.loops_of: dict[int, Term] = {}
        self.notes: list[str] = []

    def fresh(self, size: int) -> Term:
        """A new unknown permutation of `size` positions."""
        if size <= 1:
            return Fixed(size)
        self._count += 1
        return Atom(size, self._count)

    def loop(self, size: int) -> Term:
        """The iterations of a loop: fixed, but with an identity that permutations may vary over."""
        term = self.fresh(size)
        if isinstance(term, Atom):
            self.loops.add(term.name)
        return term

    def resolve(self, term: Term) -> Term:
        """`term` with everything that is known put in place of its atoms."""
        match term:
            case Atom(_, name) if name in self._bound:
                self._bound[name] = self.resolve(self._bound[name])
                return self._bound[name]
            case Prod(parts):
                return prod([self.resolve(part) for part in parts])
            case Sum(parts):
                return concat([self.resolve(part) for part in parts])
        return term

    def fix(self, term: Term) -> Term:
        """Leaves only the identity on every atom of `term`."""
        for atom in list(atoms(self.resolve(term))):
            if atom.name not in self.loops:
                self._bound[atom.name] = Fixed(atom.size)
        return Fixed(term.size)

    def unify(self, x: Term, y: Term) -> Term:
        """Makes two terms equal and returns the layout of a value that combines both."""
        x, y = self.resolve(x), self.resolve(y)
        if x.size != y.size:
            raise AssertionError(f"layouts of different sizes: {x} and {y}")
        if x == y or isinstance(y, Wild):
            return x
        if isinstance(x, Wild):
            return y
        if isinstance(x, Fixed) or isinstance(y, Fixed):
            self.fix(x)
            return self.fix(y)
        if isinstance(x, Atom):
            return self._bind(x, y)
        if isinstance(y, Atom):
            return self._bind(y, x)
        if isinstance(x, Prod) and isinstance(y, Prod):
            return self._unify_products(x, y)
        if isinstance(x, Sum) and isinstance(y, Sum):
            return self._unify_sums(x, y)
        product, segments = (x, y) if isinstance(x, Prod) else (y, x)
        assert isinstance(product, Prod)
        unrolled = self._unroll(product)
        if unrolled is None:
            self.fix(segments)
            return self.fix(product)
        return self.unify(unrolled, segments)

    def factor(self, term: Term, outer: int) -> tuple[Term, Term]:
        """Cuts an axis of `outer * inner` positions into a product of an outer and inner term."""
        term = self.resolve(term)
        inner = term.size // outer
        if outer == 1:
            return Fixed(1), term
        if inner == 1:
            return term, Fixed(1)
        match term:
            case Wild():
                return Wild(outer), Wild(inner)
            case Atom() if term.name not in self.loops:
                halves = self.fresh(outer), self.fresh(inner)
                self._bound[term.name] = prod(halves)
                return halves
            case Prod(parts):
                taken: list[Term] = []
                left, need = list(parts), outer
                while need > 1:
                    part = self.resolve(left.pop(0))
                    if isinstance(part, Prod):
                        left[:0] = part.parts
                    elif need % part.size == 0:
                        taken.append(part)
                        need //= part.size
                    elif part.size % need == 0:
                        head, tail = self.factor(part, need)
                        taken.append(head)
                        left.insert(0, tail)
                        need = 1
                    else:
                        break
                if need == 1:
                    return prod(taken), prod(left)
            case Sum() if outer <= _MAX_SEGMENTS:
                # Rows of a matrix laid side by side: the same permutation must act on each.
                segment, rest = self.cut(term, inner)
                while rest.size:
                    head, rest = self.cut(rest, inner)
                    segment = self.unify(segment, head)
                return Fixed(outer), segment
        self.fix(term)
        return Fixed(outer), Fixed(inner)

    def cut(self, term: Term, at: int) -> tuple[Term, Term]:
        """Cuts an axis into the segments before and after position `at`."""
        term = self.resolve(term)
        if at == 0:
            return Fixed(0), term
        if at == term.size:
            return term, Fixed(0)
        match term:
            case Wild(size):
                return Wild(at), Wild(size - at)
            case Atom(size, name) if name not in self.loops:
                halves = self.fresh(at), self.fresh(size - at)
                self._bound[name] = concat(halves)
                return halves
            case Sum(parts):
                before: list[Term] = []
                after = list(parts)
                while at >= after[0].size:
                    before.append(after.pop(0))
                    at -= before[-1].size
                head, tail = self.cut(after[0], at)
                return concat([*before, head]), concat([tail, *after[1:]])
            case Prod(parts):
                inner = prod(parts[1:])
                if at % inner.size == 0:
                    head, tail = self.cut(parts[0], at // inner.size)
                    return prod([head, inner]), prod([tail, inner])
                unrolled = self._unroll(term)
                if unrolled is not None:
                    return self.cut(unrolled, at)
        self.fix(term)
        return Fixed(at), Fixed(term.size - at)

    def reshape(self, layout: Layout, shape: Sequence[int]) -> Layout:
        """Writes all axes as one row-major product and cuts it again at the sizes of `shape`."""
        if 0 in shape:
            for term in layout:
                self.fix(term)
            return tuple(Fixed(size) for size in shape)
        rest = prod(layout)
        cut: list[Term] = []
        for size in shape:
            head, rest = self.factor(rest, size)
            cut.append(head)
        return tuple(cut)

    def _bind(self, atom: Atom, term: Term) -> Term:
        if atom.name in self.loops:
            if not isinstance(term, Atom):
                return self.fix(term)
            atom, term = (atom, term) if term.name in self.loops else (term, atom)
        term = self._materialise(term)
        self._bound[atom.name] = term
        return term

    def _materialise(self, term: Term) -> Term:
        # Where the other side is constant, the atom stays free to permute.
        match term:
            case Wild(size):
                return self.fresh(size)
            case Prod(parts):
                return prod([self._materialise(part) for part in parts])
            case Sum(parts):
                return concat([self._materialise(part) for part in parts])
        return term

    def _unroll(self, term: Prod) -> Term | None:
        """A product as a sum of copies of its inner factors; the outer factor becomes fixed."""
        outer, inner = self.resolve(term.parts[0]), prod(term.parts[1:])
        if isinstance(outer, Sum):
            return concat([prod([part, inner]) for part in outer.parts])
        if outer.size > _MAX_SEGMENTS:
            return None
        self.fix(outer)
        return concat([inner] * outer.size)

    def _unify_products(self, x: Prod, y: Prod) -> Term:
        done: list[Term] = []
        a: Term = x
        b: Term = y
        while a.size > 1:
            a, b = self.resolve(a), self.resolve(b)
            sizes = [(t.parts[0] if isinstance(t, Prod) else t).size for t in (a, b)]
            outer = min(sizes)
            if outer == a.size:
                done.append(self.unify(a, b))
                break
            if max(sizes) % outer:
                # No common refinement, such as 2 x 3 against 3 x 2.
                self.fix(a)
                done.append(self.fix(b))
                break
            (a_head, a), (b_head, b) = self.factor(a, outer), self.factor(b, outer)
            done.append(self.unify(a_head, b_head))
        return prod([self.resolve(part) for part in done])

    def _unify_sums(self, x: Sum, y: Sum) -> Term:
        done: list[Term] = []
        a: Term = x
        b: Term = y
        while a.size:
            a, b = self.resolve(a), self.resolve(b)
            at = min((t.parts[0] if isinstance(t, Sum) else t).size for t in (a, b))
            (a_head, a), (b_head, b) = self.cut(a, at), self.cut(b, at)
            done.append(self.unify(a_head, b_head))
        return concat([self.resolve(part) for part in done])


@functools.lru_cache(maxsize=256)
def describe(term: Term) -> str:
    """A short text for tables: `conv`, `·`, `[36 x conv]`, `[gate + gate]`."""
    match term:
        case Atom(_, name):
            return str(name)
        case Prod(parts):
            return "[" + " x ".join(describe(part) for part in parts) + "]"
        case Sum(parts):
            return "[" + " + ".join(describe(part) for part in parts) + "]"
    return str(term.size)
