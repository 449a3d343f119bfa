"""Weight matching: the units of two models matched by their parameters alone."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mixlab import trees
from mixlab.align.assignment import assignment, is_concrete
from mixlab.align.inference.layout import Prod, Sum, atoms, label, paths, take, walk
from mixlab.align.symmetry import Permutations, Symmetry
from mixlab.align.wreath import match_family
from mixlab.spec import nearest
from mixlab.types import Array, Key, PyTree

# Of models with at most so many parameters that count, so many visiting orders are tried.
_SMALL, _RESTARTS = 20_000, 10


def weight_matching(
    symmetry: Symmetry,
    reference: PyTree,
    other: PyTree,
    *,
    key: Key | None = None,
    order: Sequence[Sequence[str]] | None = None,
    init: Mapping[str, Any] | None = None,
    restarts: int | None = None,
    max_iterations: int = 100,
    leaves: Sequence[str] | None = None,
    backend: str | None = None,
) -> Permutations:
    """Matches the units of two models by their weights: coordinate descent over the groups.

    One group at a time, all others held, the permutation is chosen that maximises the inner
    product of the two models' parameters; sweeps repeat until one brings no gain. Groups that
    vary over others are decided together with them. On a CPU arrays are matched on the host in
    NumPy, whose small matrix products need no compilation; under `jit` or `vmap`, and on
    accelerators, it is one compiled program. Many models at once:
    `jax.vmap(lambda other: weight_matching(symmetry, reference, other))(stacked)`.

    Args:
        symmetry: the groups.
        reference: variables of the model that keeps its order.
        other: variables of the model to permute.
        key: draws the order in which each sweep visits the groups; without it every sweep takes
            the order of `symmetry.groups`.
        order: the groups' names in visiting order, one row a sweep, to replay a run; there are
            then at most so many sweeps. A group stands for its family.
        init: the permutations to start from, by default the identity.
        restarts: how many visiting orders to draw from `key`; the result with the largest inner
            product is kept. By default 10 for models of at most 20,000 parameters that count, whose
            runs are short and end far apart, and 1 for others.
        max_iterations: the largest number of sweeps.
        leaves: names of the leaves that count in the inner product; by default those under
            `"params"` if there are any, else all floating leaves.
        backend: of the compiled program, see `assignment`.

    Returns:
        int32 [n] by group, or `symmetry.shape(group)`: unit j of the reference goes with unit
        `p[j]` of the other.

    Raises:
        ValueError: trees that do not match the symmetry or each other, values that are not
            finite (if they can be looked at), both `key` and `order`, or restarts below 1 or
            without a key.
        KeyError: `leaves`, `order` or `init` names something unknown.

    Source: Ainsworth et al. 2023 ("Git Re-Basin"), section 3.2 and algorithm 1, generalised to
    groups that occur as factors or segments of an axis, on several axes of one leaf, or vary.
    """
    if key is not None and order is not None:
        raise ValueError("give either key, to draw the visiting order, or order, to replay one")
    if restarts is not None and (restarts < 1 or key is None):
        raise ValueError(f"restarts={restarts} must be at least 1, and needs key= to draw orders")
    trees.check_same_structure(reference, other, what="the two models")
    concrete = is_concrete((reference, other, init or {}, key))
    on_host = concrete and backend in (None, "scipy") and jax.default_backend() == "cpu"
    start = symmetry.checked({} if init is None else init)
    if order is not None:
        for sweep in order:
            if unknown := set(sweep) - set(symmetry.groups):
                raise KeyError(
                    f"order names {sorted(unknown)}; the groups are {[*symmetry.groups]}"
                )
    chosen = _weights(symmetry, reference, leaves), _weights(symmetry, other, leaves)
    problem = _Problem.of(symmetry, tuple(chosen[0]))
    size = sum(np.size(x) for x in chosen[0].values())
    runs = restarts or (_RESTARTS if key is not None and size <= _SMALL else 1)
    keys = None if key is None else jax.random.split(key, runs)
    if on_host:
        ours, theirs = ({name: np.asarray(x) for name, x in tree.items()} for tree in chosen)
        start = {name: np.asarray(p) for name, p in start.items()}
        sides: dict[int, dict[str, Any]] = {}
        tried = [
            _descend(problem, ours, theirs, start, sweeps, sides)
            for sweeps in _sweeps(problem, keys, order, max_iterations)
        ]
        found = tried[0]
        if runs > 1:
            found = max(tried, key=functools.partial(_objective, problem, ours, theirs))
        host = {name: found[name].astype(np.int32) for name in symmetry.groups}
        return cast(Permutations, jax.device_put(host))
    start = {name: jnp.asarray(p) for name, p in start.items()}
    visits = None
    if order is not None:
        visits = jnp.asarray([[problem.number(name) for name in sweep] for sweep in order])
        max_iterations = min(max_iterations, len(order))
    return _compiled(problem, *chosen, start, keys, visits, max_iterations, backend)


class _Part(NamedTuple):
    """An occurrence of a group in a leaf: where it is, and its axes in order, `[*loops, S, U]`."""

    leaf: str
    owner: str
    steps: tuple[Any, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


class _Problem:
    """What coordinate descent needs to know of a symmetry; leaves are those that count."""

    def __init__(self, symmetry: Symmetry, leaves: tuple[str, ...]) -> None:
        self.symmetry = symmetry
        self.layouts = {leaf: symmetry.layouts[leaf] for leaf in leaves}
        self.families = symmetry.families
        present = {
            leaf: {atom.name for term in layout for atom in atoms(term)}
            for leaf, layout in self.layouts.items()
        }
        self.touched = [
            [leaf for leaf in leaves if present[leaf] & set(family)] for family in self.families
        ]
        # A leaf scores for the innermost member that acts on it. If that is not one, or acts on
        # several axes, the score is not linear in the permutation.
        self.owners: list[dict[str, str]] = []
        self.linear: list[bool] = []
        for family, touched in zip(self.families, self.touched, strict=True):
            owners = {}
            for leaf in touched:
                members = [name for name in family if name in present[leaf]]
                parents = {family[name].parent for name in members}
                innermost = [name for name in members if name not in parents]
                if len(innermost) == 1:
                    owners[leaf] = innermost[0]
            self.owners.append(owners)
            self.linear.append(
                len(owners) == len(touched)
                and all(self._times(leaf, name) <= 1 for leaf in touched for name in family)
            )

        # Those whose scores change when a family moves: itself only where it is not linear.
        self.neighbours = [
            {
                j
                for j, others in enumerate(self.touched)
                if set(others) & set(touched) and (j != i or not self.linear[i])
            }
            for i, touched in enumerate(self.touched)
        ]

        self.plans = [self._plan(i) for i in range(len(self.families))]
        # Of families of one group that no product or segment holds: the axes it is on.
        self.axes = [self._axes(i) for i in range(len(self.families))]

    @classmethod
    def of(cls, symmetry: Symmetry, leaves: tuple[str, ...]) -> "_Problem":
        """The problem of these leaves, made once."""
        known = symmetry.problems
        if leaves not in known:
            known[leaves] = cls(symmetry, leaves)
        return known[leaves]

    def _times(self, leaf: str, group: str) -> int:
        """How many axes of a leaf carry a group."""
        return sum(any(atom.name == group for atom in atoms(term)) for term in self.layouts[leaf])

    def number(self, group: str) -> int:
        """The number of the family that a group belongs to."""
        return next(i for i, family in enumerate(self.families) if group in family)

    def _plan(self, i: int) -> list[_Part]:
        """How the units of a family are read from each leaf that scores for it."""
        plan: list[_Part] = []
        for leaf, owner in self.owners[i].items():
            loops = len(self.families[i][owner].loops)
            for steps, apart, axis in paths(self.layouts[leaf], owner):
                at = {label(term): i for i, term in enumerate(apart)}
                over = [at[name] for name in self.symmetry.over[owner]]
                leading, units = over[:loops], [*over[loops:], axis]
                pooled = [a for a in range(len(apart)) if a not in (*leading, *units)]
                order = (*leading, *pooled, *units)
                size = int(np.prod([apart[a].size for a in units]))
                shape = (*(apart[a].size for a in leading), -1, size)
                plan.append(_Part(leaf, owner, steps, order, shape))
        return plan

    def _axes(self, i: int) -> list[tuple[str, int]] | None:
        (name, *others), leaves = self.families[i], self.touched[i]
        terms = [term for leaf in leaves for term in self.layouts[leaf]]
        if others or self.symmetry.over[name] or any(isinstance(t, Prod | Sum) for t in terms):
            return None
        return [
            (leaf, axis)
            for leaf in leaves
            for axis, term in enumerate(self.layouts[leaf])
            if label(term) == name
        ]

    def sides(self, i: int, tree: Any, xp: Any) -> dict[str, Any]:
        """The units of each member of a family, its leaves beside each other, [*loops, S, U]."""
        found: dict[str, list[Any]] = {}
        for leaf, owner, steps, order, shape in self.plans[i]:
            units = walk(tree[leaf], steps).transpose(order).reshape(shape)
            found.setdefault(owner, []).append(units)
        return {owner: xp.concatenate(parts, axis=-2) for owner, parts in found.items()}

    def scores(self, ours: Any, current: Any, xp: Any) -> dict[str, Any]:
        """Inner products of the slices that belong to the units of each member, [*loops, U, U]."""
        return {name: xp.matmul(xp.swapaxes(x, -1, -2), current[name]) for name, x in ours.items()}

    def permuted(self, i: int, theirs: Any, permutations: Any, xp: Any) -> dict[str, Any]:
        """The leaves that a family acts on, of the other model, permuted."""
        return {
            leaf: take(theirs[leaf], self.layouts[leaf], permutations, xp)
            for leaf in self.touched[i]
        }

    def moved(self, i: int, relative: Any, permutations: Any, xp: Any) -> dict[str, Any]:
        """The permutations after those of a family were permuted by `relative`."""
        family = self.families[i]
        full = {name: relative.get(name, xp.arange(family[name].sizes[-1])) for name in family}
        return {
            **permutations,
            **{
                name: take(permutations[name], self.symmetry.layout_of_group(name), full, xp)
                for name in family
            },
        }


def _solve(scores: Any) -> Any:
    flat = scores.reshape(-1, *scores.shape[-2:])
    solved = [scipy.optimize.linear_sum_assignment(one, maximize=True)[1] for one in flat]
    return np.asarray(solved, np.int32).reshape(scores.shape[:-1])


def _descend(
    problem: _Problem,
    ours: Any,
    theirs: Any,
    start: Any,
    sweeps: Iterable[Sequence[int]],
    sides: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Coordinate descent on the host; `sides` keeps the reference's units from run to run."""
    permutations = dict(start)
    moved = {name: p for name, p in start.items() if np.any(p != np.arange(p.shape[-1]))}
    current = {leaf: take(x, problem.layouts[leaf], moved, np) for leaf, x in theirs.items()}

    # A family whose neighbours have not moved since its last visit would gain nothing.
    stale = set(range(len(problem.families)))

    def improve(i: int) -> bool:
        if i not in stale:
            return False
        stale.discard(i)
        if i not in sides:
            sides[i] = problem.sides(i, ours, np)
        scores = problem.scores(sides[i], problem.sides(i, current, np), np)
        scores = {name: x.astype(np.float64) for name, x in scores.items()}
        relative, gain = match_family(scores, problem.families[i], _solve, np)
        if gain <= 1e-12:
            return False
        axes = problem.axes[i]
        if axes is None or not problem.linear[i]:
            leaves = {
                leaf: take(current[leaf], problem.layouts[leaf], relative, np)
                for leaf in problem.touched[i]
            }
        else:
            (step,) = relative.values()
            leaves = {leaf: current[leaf].take(step, axis=axis) for leaf, axis in axes}
        # Where the score is not linear in the permutation: look before leaping.
        gains = (np.vdot(ours[k], x - current[k]) for k, x in leaves.items())
        if not problem.linear[i] and sum(gains) <= 1e-12:
            return False
        permutations.update(problem.moved(i, relative, permutations, np))
        current.update(leaves)
        stale.update(problem.neighbours[i])
        return True

    for sweep in sweeps:
        if not any([improve(i) for i in sweep]):
            break
    return permutations


def _objective(problem: _Problem, ours: Any, theirs: Any, permutations: Any) -> float:
    return sum(
        float(np.vdot(x, take(theirs[leaf], problem.layouts[leaf], permutations, np)))
        for leaf, x in ours.items()
    )


def _sweeps(
    problem: _Problem,
    keys: Array | None,
    order: Sequence[Sequence[str]] | None,
    max_iterations: int,
) -> list[Iterable[Sequence[int]]]:
    """For each run its sweeps, the families in visiting order."""
    count = len(problem.families)
    if order is not None:
        return [[[problem.number(name) for name in sweep] for sweep in order[:max_iterations]]]
    if keys is not None:
        return np.asarray(_visits(keys, max_iterations, count)).tolist()
    return [[range(count)] * max_iterations]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _visits(keys: Array, sweeps: int, count: int) -> Array:
    """The families in the order of each sweep of each run, int [runs, sweeps, count]."""

    def visits(key: Key) -> Array:
        drawn = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(sweeps))
        return jax.vmap(lambda one: jax.random.permutation(one, count))(drawn)

    return jax.vmap(visits)(keys)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _compiled(
    problem: _Problem,
    ours: dict[str, Array],
    theirs: dict[str, Array],
    start: Permutations,
    keys: Array | None,
    order: Array | None,
    max_iterations: int,
    backend: str | None,
) -> Permutations:
    """Coordinate descent as one program: sweeps in a loop, the families as branches of a switch."""
    if keys is not None:
        runs = _visits(keys, max_iterations, len(problem.families))
    else:
        runs = jnp.arange(len(problem.families))[None, None] if order is None else order[None]
    count = len(problem.families)
    solve = functools.partial(assignment, backend=backend)

    def improve(i: int, state: tuple[Permutations, Array]) -> tuple[Permutations, Array]:
        permutations, progress = state
        current = problem.permuted(i, theirs, permutations, jnp)
        scores = problem.scores(problem.sides(i, ours, jnp), problem.sides(i, current, jnp), jnp)
        relative, gain = match_family(scores, problem.families[i], solve, jnp)
        chosen = problem.moved(i, relative, permutations, jnp)
        if not problem.linear[i]:
            leaves = problem.permuted(i, theirs, chosen, jnp)
            gain = sum(jnp.vdot(ours[k], x - current[k]) for k, x in leaves.items())
        better = gain > 1e-12
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), chosen, permutations)
        return kept, progress | better

    branches = [functools.partial(improve, i) for i in range(count)]

    def run(visits: Array) -> tuple[Permutations, Array]:
        def sweep(state: tuple[Array, Permutations, Array]) -> tuple[Array, Permutations, Array]:
            iteration, permutations, _ = state
            visited = visits[iteration % visits.shape[0]]
            permutations, progress = jax.lax.fori_loop(
                0,
                visits.shape[1],
                lambda step, inner: jax.lax.switch(visited[step], branches, inner),
                (permutations, jnp.asarray(False)),
            )
            return iteration + 1, permutations, progress

        _, permutations, _ = jax.lax.while_loop(
            lambda state: (state[0] < max_iterations) & state[2],
            sweep,
            (jnp.asarray(0), start, jnp.asarray(count > 0)),
        )
        moved = {leaf: take(x, problem.layouts[leaf], permutations) for leaf, x in theirs.items()}
        objective = sum(jnp.vdot(ours[leaf], x) for leaf, x in moved.items())
        return permutations, jnp.asarray(objective)

    tried, objectives = jax.lax.map(run, runs)
    best = jnp.argmax(objectives)
    return {name: p[best] for name, p in tried.items()}


def _weights(symmetry: Symmetry, variables: PyTree, leaves: Sequence[str] | None) -> dict[str, Any]:
    """The leaves that count, in float32 or wider; on the host if they are there."""
    named = dict(trees.named_leaves(variables))
    for name, shape in symmetry.leaf_shapes.items():
        if name not in named or np.shape(named[name]) != shape:
            found = np.shape(named[name]) if name in named else "none"
            raise ValueError(f"the symmetry has leaf {name!r} of shape {shape}, the model {found}")
    if leaves is None:
        params = [name for name in symmetry.layouts if name.startswith("params/")]
        leaves = params or list(symmetry.layouts)
    result: dict[str, Any] = {}
    for name in leaves:
        if name not in symmetry.layouts:
            raise KeyError(f"no leaf {name!r}; {nearest(name, symmetry.layouts)}")
        value = named[name]
        if jnp.issubdtype(value.dtype, jnp.inexact):
            if jax.default_backend() == "cpu" and is_concrete(value):
                value = np.asarray(value)
                if not np.isfinite(value).all():
                    raise ValueError(f"leaf {name!r} contains NaN or infinity")
            wide = trees.wide(value.dtype)
            result[name] = value if value.dtype == wide else value.astype(wide)
    return result
