"""The permutation symmetries of a network: found from its program, proved, and applied.

Hidden units of a network can be renumbered without changing what it computes (Ainsworth et al.
2023, "Git Re-Basin", section 2). `infer_symmetry` reads from the traced function which axes of
which leaves have to be renumbered together.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.align.inference.infer import (
    Inference,
    group_names,
    infer,
    loop_names,
    match_names,
    shapes,
)
from mixlab.align.inference.layout import (
    Atom,
    Fixed,
    Layout,
    atoms,
    describe,
    index,
    label,
    occurrences,
    prod,
    rename,
    rows,
    take,
)
from mixlab.align.inference.program import Program, trace
from mixlab.align.wreath import Member, families
from mixlab.random import check_key
from mixlab.spec import nearest
from mixlab.types import Array, Key, PyTree

Permutations = dict[str, Any]
"""For each group an integer array (or numpy array): `permuted[j] = original[p[j]]`.

[n], or [*over, n] where the permutation varies over loops or other groups (`Symmetry.shape`); an
array [n] is then used for all of them.
"""

# Relative to the largest output: what renumbering the order of sums may change.
_TOLERANCES = {8: 1e-9, 4: 1e-3, 2: 1e-1}


@dataclass(frozen=True, eq=False)
class Symmetry:
    """Groups of axes that may be permuted together without changing a function.

    Printed, it is a table of groups and leaves; `mixlab.figures.symmetry` draws it.

    Attributes:
        groups: the size of each group, by name.
        layouts: for each leaf of the variables, by name, a term an axis that says which groups
            act on it and how.
        over: for each group the names of what its permutation may vary over: loops, such as the
            layers of a scan, and other groups, such as the heads of an attention.
        loops: the length of each loop in `over`, by name.
        notes: axes left fixed for want of knowledge, such as unknown primitives.
        fn: the function `fn(variables, *inputs)`, or None for a specification without one.
        variables: the variables that the symmetry was inferred from; `check` starts from them.
        inputs: the inputs that the function was traced with.
    """

    groups: dict[str, int]
    layouts: dict[str, Layout]
    over: dict[str, tuple[str, ...]] = field(default_factory=dict)
    loops: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fn: Callable[..., Any] | None = field(default=None, repr=False)
    variables: PyTree = field(default=None, repr=False)
    inputs: tuple[PyTree, ...] = field(default=(), repr=False)

    @classmethod
    def from_axes(
        cls,
        axes: Mapping[str, Sequence[str | None]],
        variables: PyTree,
        fn: Callable[..., Any] | None = None,
        *inputs: PyTree,
    ) -> "Symmetry":
        """A specification written by hand, proved at once where the function is given.

        Args:
            axes: for every array leaf of `variables`, by name, its group or None for each axis.
            variables: gives the shapes.
            fn: the function `fn(variables, *inputs)` that the symmetry is about.
            *inputs: example inputs of `fn`.

        Raises:
            KeyError: `axes` lacks a leaf, or names one that does not exist.
            ValueError: an entry has the wrong number of axes, a group has several sizes, or the
                function's output changes under the permutations that the specification allows.
        """
        sizes = shapes(variables)
        missing = [name for name, shape in sizes.items() if shape and name not in axes]
        if missing:
            raise KeyError(
                f"the specification lacks {missing}: give every leaf a group or None for each "
                "axis, batch statistics included"
            )
        groups: dict[str, int] = {}
        layouts: dict[str, Layout] = {name: () for name in sizes}
        for name, entry in axes.items():
            if name not in sizes:
                raise KeyError(f"no leaf {name!r} in the variables; {nearest(name, sizes)}")
            if len(entry) != len(sizes[name]):
                raise ValueError(
                    f"{name!r} has shape {sizes[name]}, but the specification gives {len(entry)} "
                    f"entries {tuple(entry)}: give a group or None for each axis"
                )
            for group, size in zip(entry, sizes[name], strict=True):
                if group is not None and groups.setdefault(group, size) != size:
                    raise ValueError(
                        f"group {group!r} has {groups[group]} units, but an axis of {name!r} "
                        f"that the specification gives to it has {size}"
                    )
            layouts[name] = tuple(
                Fixed(size) if group is None else Atom(size, group)
                for group, size in zip(entry, sizes[name], strict=True)
            )
        symmetry = cls(
            groups, layouts, dict.fromkeys(groups, ()), fn=fn, variables=variables, inputs=inputs
        )
        if fn is not None:
            symmetry.check(jax.random.key(0))
        return symmetry

    @functools.cached_property
    def families(self) -> list[dict[str, Member]]:
        """The groups, those together whose permutations vary over one another."""
        return families(self.over, self.groups, self.loops)

    @functools.cached_property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the variables."""
        return {name: tuple(term.size for term in layout) for name, layout in self.layouts.items()}

    @functools.cached_property
    def problems(self) -> dict[Any, Any]:
        """What weight matching has worked out, by the leaves that count."""
        return {}

    def shape(self, group: str) -> tuple[int, ...]:
        """The shape of a group's permutations: its size, after those of what it varies over."""
        sizes = {**self.loops, **self.groups}
        return (*(sizes[name] for name in self.over[group]), self.groups[group])

    def identity(self) -> Permutations:
        """The permutations that change nothing."""
        return {name: jnp.asarray(p) for name, p in self._host_identity().items()}

    def random(self, key: Key) -> Permutations:
        """Draws a uniformly random permutation for every group, and all that it varies over.

        Raises:
            TypeError: the key is none.
        """
        check_key(key)
        return {
            name: jax.random.permutation(
                trees.name_key(key, name), jnp.asarray(p), axis=-1, independent=p.ndim > 1
            )
            for name, p in self._host_identity().items()
        }

    def compose(self, second: Mapping[str, Any], first: Mapping[str, Any]) -> Permutations:
        """The permutations that act like `first` and then `second`.

        `permute(compose(second, first), x)` is `permute(second, permute(first, x))`.
        """
        first, second = self.checked(first), self.checked(second)
        xp = np if is_host((first, second)) else jnp
        return {
            name: take(first[name], self.layout_of_group(name), second, xp) for name in self.groups
        }

    def inverse(self, permutations: Mapping[str, Any]) -> Permutations:
        """The permutations that undo `permutations`."""
        permutations = self.checked(permutations)
        xp = np if is_host(permutations) else jnp
        inverse: Permutations = {}
        # What a group varies over is undone first, for the inverse counts in that order.
        for name in sorted(self.groups, key=lambda name: len(self.over[name])):
            undone = xp.argsort(permutations[name], axis=-1).astype(np.int32)
            if undone.ndim > 1:
                outer = (*self.layout_of_group(name)[:-1], Fixed(self.groups[name]))
                undone = take(undone, outer, inverse, xp)
            inverse[name] = undone
        return {name: inverse[name] for name in self.groups}

    def units(self, group: str, permutations: Mapping[str, Any]) -> Array:
        """A group's permutation of all its units: those of every group that it varies over.

        Returns:
            int32 [*loops, U]; for a group that varies over nothing its permutation.
        """
        *outer, unit = self.layout_of_group(group)
        full = self.checked(permutations)
        loops = [label(term) for term in outer if isinstance(term, Fixed)]
        term = prod([*(term for term in outer if not isinstance(term, Fixed)), unit])
        found = index(term, full, jnp, loops)
        return jnp.broadcast_to(found, (*(self.loops[str(loop)] for loop in loops), term.size))

    def layout_of_group(self, group: str) -> Layout:
        """The layout of a group's own permutations, which are permuted like any leaf."""
        outer = [
            Atom(self.groups[name], name, self.over[name])
            if name in self.groups
            else Fixed(self.loops[name], name)
            for name in self.over[group]
        ]
        return (*outer, Atom(self.groups[group], group, self.over[group]))

    def permute(self, permutations: Mapping[str, Any], tree: PyTree) -> PyTree:
        """Renumbers the units: `permuted[j] = original[p[j]]` along every axis of a group.

        Args:
            permutations: an integer array [n] or `shape(group)` for each group, possibly traced,
                or a list; a group that is absent keeps its order.
            tree: the variables, their `"params"` alone, or any tree that holds copies of them
                under the same names: gradients, moving averages, optimizer states (the moments
                follow their weights), a whole train state. Arrays with at most one element and
                None pass through.

        Returns:
            A tree of the same structure, shapes and dtypes.

        Raises:
            KeyError: `permutations` names an unknown group.
            ValueError: a permutation has the wrong shape, or a leaf of `tree` mirrors no leaf of
                the variables; a NumPy array or list is no permutation. Of an array on a device
                this is not checked, which would wait for the device: units may then be lost unseen.
        """
        full = self.checked(permutations)
        moving: dict[str, Any] = {}

        def collect(name: str, leaf: Any, layout: Layout) -> Any:
            if any(atom.name in permutations for term in layout for atom in atoms(term)):
                moving[name] = leaf
            return leaf

        self._map(tree, collect)
        moved = self._move(full, moving)
        return trees.map_named(lambda name, leaf: moved.get(name, leaf), tree)

    @functools.cached_property
    def _move(self) -> Callable[[Permutations, dict[str, Any]], dict[str, Array]]:
        """Permutes named leaves in one compiled program."""

        def move(permutations: Permutations, leaves: dict[str, Any]) -> dict[str, Array]:
            return {
                name: take(leaf, self._layout_of(name, leaf.shape), permutations, jnp)
                for name, leaf in leaves.items()
            }

        return jax.jit(move)

    def activations(self, variables: PyTree, *inputs: PyTree) -> dict[str, Array]:
        """The activations of every group, one column a unit.

        For each group it takes the last value that a later layer contracts over the group: values
        after the activation function, before average pooling; for a residual stream the last sum.
        The batch size may differ from the one that the symmetry was inferred with.

        Returns:
            Arrays [S, n] by group; S counts the positions of all other axes (examples, pixels).
            Where the permutation varies, [*loops, S, *groups, n]: over loops and over groups. A
            group whose units never meet the inputs is absent, and so is one that others vary
            over: theirs tell it apart.

        Raises:
            ValueError: the symmetry has no function, or the function does not have the symmetry.
        """
        if self.fn is None:
            raise ValueError(
                "this symmetry was specified without a function: give `from_axes` the function "
                "and its inputs, or hand it to `activation_matching`"
            )
        return activations(self, self.fn, variables, *inputs)

    @functools.cached_property
    def jitted_activations(self) -> Callable[..., dict[str, Array]]:
        """`activations`, compiled once for each shape of the inputs."""
        return jax.jit(self.activations)

    def check(self, key: Key) -> float:
        """Proves numerically that the function is unchanged under random permutations.

        The variables are perturbed first, so that zeros and ones from an initialisation cannot
        hide a mistake, and every group is permuted at once. Computes in float64 where the
        function can, with a tolerance of 1e-9 relative to the largest output; where it fixes its
        own precision, 1e-3 for float32 and 1e-1 for 16 bits.

        Returns:
            The largest difference of an output, relative to the largest output.

        Raises:
            ValueError: an output changed; the message names the groups and leaves at fault. Or
                the symmetry has no function, or the function gives NaN.
            TypeError: the key is none.
        """
        check_key(key)
        if self.fn is None:
            raise ValueError(
                "a symmetry without a function cannot be checked: give one to from_axes"
            )
        run, dtype, tolerance = self._prover()
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))
        with contextlib.nullcontext() if dtype is None else jax.enable_x64(True):
            return self._deviation(run, dtype, tolerance, rng)

    def _prover(self) -> tuple[Callable[..., Any], Any, float]:
        """The function in the highest precision it can be had in, and that one's tolerance."""
        fn = self.fn
        assert fn is not None

        def evaluator(program: Program, dtype: Any) -> Callable[..., Any]:
            def run(*arguments: PyTree) -> list[Array]:
                leaves = jax.tree.leaves(arguments)
                wanted = [(number,) for number in program.outputs]
                return program.evaluate(leaves, wanted, dtype=dtype)

            return run

        # A function that mixes in constants of its own precision would not promote them.
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            try:
                program = trace(fn, *self._abstract(np.float64))
                if program.float_bytes == 8:
                    return evaluator(program, None), np.float64, _TOLERANCES[8]
            except (TypeError, ValueError):
                # The function insists on a precision that does not mix with float64.
                pass
        program = trace(fn, *self._abstract(None))
        if not program.is_straight:
            return fn, None, _TOLERANCES[program.float_bytes]
        return evaluator(program, np.float64), np.float64, _TOLERANCES[8]

    def _abstract(self, dtype: Any) -> tuple[PyTree, ...]:
        """Shapes of the variables and inputs, floating ones in `dtype`."""

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            own = jnp.result_type(leaf)
            wide = dtype if dtype and jnp.issubdtype(own, jnp.floating) else own
            return jax.ShapeDtypeStruct(np.shape(leaf), wide)

        return jax.tree.map(shape, (self.variables, *self.inputs))

    def _example(self, rng: np.random.Generator, dtype: Any) -> tuple[PyTree, ...]:
        # On the host: one small compilation an array would cost more than the whole proof.
        variables = trees.map_named(lambda _, x: _perturbed(x, dtype, rng), self.variables)
        inputs = trees.map_named(lambda _, x: _on_host(x, dtype, rng), self.inputs)
        return (variables, *inputs)

    def _deviation(
        self, run: Callable[..., Any], dtype: Any, tolerance: float, rng: np.random.Generator
    ) -> float:
        variables, *inputs = self._example(rng, dtype)
        compiled = jax.jit(run)
        expected = jax.tree.leaves(compiled(variables, *inputs))

        def deviation(names: Sequence[str]) -> float:
            chosen = {**self._host_identity(), **{name: permutations[name] for name in names}}
            permuted = self._map(variables, lambda _, leaf, layout: take(leaf, layout, chosen, np))
            found = jax.tree.leaves(compiled(permuted, *inputs))
            return _relative_difference(expected, found)

        permutations = {name: rng.permuted(p, axis=-1) for name, p in self._host_identity().items()}
        worst = deviation(list(self.groups))
        if np.isnan(worst):
            raise ValueError(
                "the function returns NaN for the inputs given, which proves nothing: give inputs "
                "that it is defined for"
            )
        if worst > tolerance:
            alone = {name: deviation([name]) for name in self.groups}
            guilty = {name: d for name, d in alone.items() if d > tolerance} or alone
            listed = "; ".join(
                f"{name} (deviation {d:.1e}; leaves {', '.join(self.leaves_of(name))})"
                for name, d in guilty.items()
            )
            raise ValueError(
                f"the function is not invariant: permuting changes its output by {worst:.1e} of "
                f"its largest value, where {tolerance:.0e} is allowed. At fault: {listed}"
            )
        return worst

    def leaves_of(self, group: str) -> list[str]:
        """The names of the leaves that a group acts on."""
        return [
            leaf
            for leaf, layout in self.layouts.items()
            if any(atom.name == group for term in layout for atom in atoms(term))
        ]

    def __str__(self) -> str:
        """A table of the groups and, leaf by leaf, of the axes they act on."""
        total = sum(self.groups.values())
        lines = [f"{len(self.groups)} groups of permutable units, {total} units"]
        width = max(map(len, self.groups), default=0)
        lines += [
            f"  {name:<{width}}  {size:>5}  {len(self.leaves_of(name))} leaves{self._varies(name)}"
            for name, size in self.groups.items()
        ]
        width = max(map(len, self.layouts), default=0)
        lines.append("axes of the leaves (a number is a fixed axis)")
        lines += [
            f"  {leaf:<{width}}  ({', '.join(describe(term) for term in layout)})"
            for leaf, layout in self.layouts.items()
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _varies(self, group: str) -> str:
        over = self.over[group]
        return f", one for each of {' x '.join(over)}" if over else ""

    def _map(self, tree: PyTree, fn: Callable[[str, Any, Layout], Any]) -> PyTree:
        """Maps `fn(name, leaf, layout)` over the leaves that have anything to permute."""
        return trees.map_named(
            lambda name, leaf: (
                leaf
                if leaf is None or np.size(leaf) <= 1
                else fn(name, leaf, self._layout_of(name, np.shape(leaf)))
            ),
            tree,
        )

    def _host_identity(self) -> dict[str, np.ndarray]:
        return {
            name: np.broadcast_to(np.arange(size, dtype=np.int32), self.shape(name))
            for name, size in self.groups.items()
        }

    def checked(self, permutations: Mapping[str, Any]) -> Permutations:
        """Permutations of all groups, in full shape; the identity where none is given.

        Raises:
            KeyError: an unknown group.
            ValueError: a wrong shape or dtype, or, in a NumPy array or list, no permutation.
        """
        permutations = {
            name: p if hasattr(p, "dtype") else np.asarray(p) for name, p in permutations.items()
        }
        for name, p in permutations.items():
            if name not in self.groups:
                raise KeyError(f"no group {name!r}; {nearest(name, self.groups)}")
            size, shape = self.groups[name], self.shape(name)
            if np.shape(p) not in ((size,), shape) or not jnp.issubdtype(p.dtype, jnp.integer):
                raise ValueError(
                    f"the permutation of group {name!r} must be an integer array of shape "
                    f"{' or '.join(map(str, dict.fromkeys([(size,), shape])))}, "
                    f"got {p.dtype}{list(np.shape(p))}"
                )
            # Arrays on a device are not fetched for this.
            if isinstance(p, np.ndarray) and np.any(np.sort(p, axis=-1) != np.arange(size)):
                raise ValueError(
                    f"the array of group {name!r} is not a permutation of 0..{size - 1}"
                )
        xp = np if is_host(permutations) else jnp
        given = {name: xp.broadcast_to(p, self.shape(name)) for name, p in permutations.items()}
        return {**self._host_identity(), **given}

    def _layout_of(self, name: str, shape: tuple[int, ...]) -> Layout:
        """The layout of the variables' leaf that a leaf called `name` of another tree mirrors."""
        parts = name.split("/")
        for start in range(len(parts)):
            for candidate in ("/".join(parts[start:]), "/".join(["params", *parts[start:]])):
                layout = self.layouts.get(candidate)
                if layout is not None and tuple(term.size for term in layout) == shape:
                    return layout
        for known in self.layouts:
            # The copy of a single collection other than "params", such as batch statistics.
            _, _, rest = known.partition("/")
            if rest and (name == rest or name.endswith("/" + rest)):
                layout = self.layouts[known]
                if tuple(term.size for term in layout) == shape:
                    return layout
        for candidate in (name, f"params/{name}"):
            if candidate in self.layouts:
                own = tuple(term.size for term in self.layouts[candidate])
                raise ValueError(
                    f"leaf {name!r} has shape {shape}, but the symmetry was inferred from one of "
                    f"shape {own}: give variables of the same network, or infer its own symmetry"
                )
        raise ValueError(
            f"leaf {name!r} of shape {shape} mirrors no leaf of the variables by name and shape; "
            f"{nearest(name, self.layouts)}"
        )


def infer_symmetry(
    fn: Callable[..., Any],
    variables: PyTree,
    *inputs: PyTree,
    check: bool = True,
    key: Key | None = None,
) -> Symmetry:
    """Finds which axes of which leaves of `variables` may be permuted together.

    Traces `fn(variables, *inputs)` and reads from each primitive which permutations it commutes
    with. What is not understood stays fixed and is named in `notes`: fewer permutations, never a
    wrong one. Trace a network in evaluation mode; statistics that it returns count as outputs.

    Args:
        fn: a function of the variables (any pytree of arrays) and the inputs. Its outputs must
            not change, element for element.
        variables: parameters and, where there are any, batch statistics.
        *inputs: example inputs; a small batch will do. Shapes (`jax.ShapeDtypeStruct`) are
            accepted for the variables and the inputs; `check` then draws random values.
        check: proves the result with random permutations (`Symmetry.check`).
        key: for the check; by default `jax.random.key(0)`.

    Returns:
        The symmetry.

    Raises:
        ValueError: nothing that the function returns depends on the variables; or the check found
            a permutation that changes the output, which is a defect of the inference.
        TypeError: `fn` is no function, or the key is none.
    """
    inference = infer(fn, variables, inputs)
    names = group_names(inference, variables)
    sizes = {
        atom.name: atom.size
        for _, layout in inference.leaves
        for term in layout
        for atom in atoms(term)
    }
    loops = loop_names(inference, names)
    over = {
        name: tuple(names.get(o) or loops[o] for o in inference.over[atom])
        for atom, name in names.items()
    }
    symmetry = Symmetry(
        groups={name: sizes[atom] for atom, name in names.items()},
        layouts={
            leaf: tuple(rename(t, names, loops, over) for t in layout)
            for leaf, layout in inference.leaves
        },
        over=over,
        loops={name: sizes[atom] for atom, name in loops.items()},
        notes=inference.notes,
        fn=fn,
        variables=variables,
        inputs=inputs,
    )
    if check:
        symmetry.check(jax.random.key(0) if key is None else key)
    return symmetry


def activations(
    symmetry: Symmetry, fn: Callable[..., Any], variables: PyTree, *inputs: PyTree
) -> dict[str, Array]:
    """The activations of every group of `symmetry` while `fn` runs: see the method."""
    inference: Inference = infer(fn, variables, inputs)
    names = match_names(inference, symmetry.layouts)
    loops = loop_names(inference, names)
    taps = {name: inference.taps[a] for a, name in names.items() if a in inference.taps}
    leaves = jax.tree.leaves((variables, *inputs))
    values = inference.program.evaluate(leaves, [place for place, _ in taps.values()])
    result: dict[str, Array] = {}
    for (name, (_, unnamed)), value in zip(taps.items(), values, strict=True):
        layout = tuple(rename(term, names, loops, symmetry.over) for term in unnamed)
        outer = [other for other in symmetry.over[name] if other in symmetry.groups]
        leading = len(symmetry.over[name]) - len(outer)
        found: list[Array] = []
        for array, apart, axis in occurrences(value, layout, name):
            at = {label(term): i for i, term in enumerate(apart)}
            if all(other in at for other in symmetry.over[name]):
                units = [*(at[other] for other in outer), axis]
                found.append(rows(array, units, [at[o] for o in symmetry.over[name][:leading]]))
        if found:
            result[name] = jnp.concatenate(found, axis=leading)
    inner = {other for name in result for other in symmetry.over[name]}
    return {name: result[name] for name in symmetry.groups if name in result and name not in inner}


def is_host(tree: PyTree) -> bool:
    """Whether all leaves are NumPy arrays, on which the host computes."""
    return all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))


def _on_host(leaf: Any, dtype: Any, rng: np.random.Generator) -> Any:
    """The leaf on the host, floating ones in `dtype`; random values for an abstract one."""
    if leaf is None or jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        # Positive, because the leaf may be a variance.
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = rng.uniform(0.1, 1.0, leaf.shape) if floating else np.zeros(leaf.shape)
        leaf = values.astype(leaf.dtype)
    leaf = np.asarray(leaf)
    return leaf.astype(dtype) if dtype and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _perturbed(leaf: Any, dtype: Any, rng: np.random.Generator) -> Any:
    """Adds positive noise of a third of the leaf's scale, so that variances stay positive."""
    leaf = _on_host(leaf, dtype, rng)
    if leaf is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
        return leaf
    scale = np.sqrt(np.mean(np.square(leaf, dtype=np.float64))) or 1.0
    return leaf + (rng.uniform(size=leaf.shape) * scale / 3).astype(leaf.dtype)


def _relative_difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest difference, relative to the largest value of all outputs."""
    pairs = [
        [np.asarray(x).astype(np.float64).reshape(-1) for x in pair]
        for pair in zip(expected, found, strict=True)
    ]
    a, b = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    # The floor is for outputs that cancel to nothing but rounding.
    return float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(a), initial=0.0), 1e-3))
