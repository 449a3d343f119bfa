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
from mixlab.align.inference.layout import Atom, Prod, Sum, atoms, label, paths, take, walk
from mixlab.align.symmetry import Permutations, Symmetry
from mixlab.align.wreath import match_family
from mixlab.random import check_key
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
        TypeError: the key is none.
        KeyError: `leaves`, `order` or `init` names something unknown.

    Source: Ainsworth et al. 2023 ("Git Re-Basin"), section 3.2 and algorithm 1, generalised to
    groups that occur as factors or segments of an axis, on several axes of one leaf, or vary.
    """
    if key is not None:
        check_key(key)
    if key is not None and order is not None:
        raise ValueError("give either key, to draw the visiting order, or order, to replay one")
    if restarts is not None and (restarts < 1 or key is None):
        raise ValueError(f"restarts={restarts} must be at least 1, and needs key= to draw orders")
    trees.check_same_structure(reference, other, what="the two models")
    chosen = _weights(symmetry, reference, leaves), _weights(symmetry, other, leaves)
    concrete = is_concrete((chosen, init or {}, key))
    on_host = concrete and backend in (None, "scipy") and jax.default_backend() == "cpu"
    start = symmetry.checked({} if init is None else init)
    if order is not None and (unknown := set().union(*order) - symmetry.groups.keys()):
        raise KeyError(f"order names {sorted(unknown)}; the groups are {[*symmetry.groups]}")
    problem = _Problem.of(symmetry, tuple(chosen[0]))
    size = sum(np.size(x) for x in chosen[0].values())
    runs = restarts or (_RESTARTS if key is not None and size <= _SMALL else 1)
    keys = None if key is None else jax.random.split(key, runs)
    if on_host:
        start = {name: np.asarray(p) for name, p in start.items()}
        pair = _Pair(problem, *chosen)
        tried = [
            _descend(pair, start, sweeps)
            for sweeps in _sweeps(problem, keys, order, max_iterations)
        ]
        found = tried[0]
        if runs > 1:
            found = max(tried, key=functools.partial(_objective, problem, *chosen))
        host = {name: found[name].astype(np.int32) for name in symmetry.groups}
        return cast(Permutations, jax.device_put(host))
    start = {name: jnp.asarray(p) for name, p in start.items()}
    visits = None
    if order is not None:
        visits = jnp.asarray([[problem.number[name] for name in sweep] for sweep in order])
        max_iterations = min(max_iterations, len(order))
    return _compiled(problem, *chosen, start, keys, visits, max_iterations, backend)


_Others = tuple[str, ...]
"""The groups on a leaf besides the one that is looked at."""


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

        self.number = {name: i for i, family in enumerate(self.families) for name in family}
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
        self.blocks = [self._blocks(i) for i in range(len(self.families))]

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

    def _blocks(self, i: int) -> dict[_Others, list[tuple[str, list[int]]]] | None:
        """The leaves of a plain group, by the other groups on them; None of other families.

        A group is plain if it has leaves, each of which has one axis for it, and neither products,
        segments, nor groups that vary. With a leaf goes the order of its axes: fixed ones, others,
        its own.
        """
        (name, *more), leaves = self.families[i], self.touched[i]
        terms = [term for leaf in leaves for term in self.layouts[leaf]]
        varies = any(isinstance(t, Prod | Sum) or (isinstance(t, Atom) and t.over) for t in terms)
        if more or varies or not self.linear[i]:
            return None
        blocks: dict[_Others, list[tuple[str, list[int]]]] = {}
        for leaf in leaves:
            names = [str(t.name) if isinstance(t, Atom) else "" for t in self.layouts[leaf]]
            order = sorted(range(len(names)), key=lambda axis: (names[axis] == name, names[axis]))
            others = tuple(names[axis] for axis in order[:-1] if names[axis])
            blocks.setdefault(others, []).append((leaf, order))
        return blocks or None

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


class _Pair:
    """Two models on the host, and what their scores are made of, kept from run to run."""

    def __init__(self, problem: _Problem, ours: Any, theirs: Any) -> None:
        self.problem, self.ours, self.theirs = problem, ours, theirs
        self._sides: dict[int, dict[str, Any]] = {}
        self._blocks: dict[int, dict[_Others, tuple[Any, Any]]] = {}

    def scores(self, i: int, permutations: Any) -> dict[str, Any]:
        """The scores of a family, the units of both models in their present order."""
        if i not in self._sides:
            self._sides[i] = self.problem.sides(i, self.ours, np)
        current = self.problem.permuted(i, self.theirs, permutations, np)
        scores = self.problem.scores(self._sides[i], self.problem.sides(i, current, np), np)
        return {name: x.astype(np.float64) for name, x in scores.items()}

    def blocks(self, i: int) -> dict[_Others, tuple[Any, Any]]:
        """The blocks of a plain group in both models, [S, *others, n]."""
        if i not in self._blocks:
            (name,), sizes = self.problem.families[i], self.problem.symmetry.groups

            def block(tree: Any, others: _Others, leaves: list[tuple[str, list[int]]]) -> Any:
                shape = (-1, *(sizes[other] for other in others), sizes[name])
                return np.concatenate(
                    [tree[leaf].transpose(order).reshape(shape) for leaf, order in leaves]
                )

            self._blocks[i] = {
                others: (block(self.ours, others, leaves), block(self.theirs, others, leaves))
                for others, leaves in (self.problem.blocks[i] or {}).items()
            }
        return self._blocks[i]


def _descend(pair: _Pair, start: Any, sweeps: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Coordinate descent on the host."""
    problem = pair.problem
    permutations = dict(start)
    # A family whose neighbours have not moved since its last visit would gain nothing.
    stale = set(range(len(problem.families)))
    # Of plain groups what each block scores, until another group on it moves.
    known: list[dict[_Others, Any]] = [{} for _ in problem.families]

    def improved(i: int) -> bool:
        relative, gain = match_family(pair.scores(i, permutations), problem.families[i], _solve, np)
        found = problem.moved(i, relative, permutations, np)
        if not problem.linear[i]:
            # Where the score is not linear in the permutation: look before leaping.
            before, after = (problem.permuted(i, pair.theirs, p, np) for p in (permutations, found))
            gain = min(gain, sum(np.vdot(pair.ours[k], x - before[k]) for k, x in after.items()))
        if gain > 1e-12:
            permutations.update(found)
        return bool(gain > 1e-12)

    def improved_plain(i: int) -> bool:
        # The group's own units stay in the order they came in, so that scores outlive its moves.
        (name,) = problem.families[i]
        for others, (mine, block) in pair.blocks(i).items():
            if others not in known[i]:
                for axis, other in enumerate(others, 1):
                    block = block.take(permutations[other], axis)
                n = mine.shape[-1]
                known[i][others] = mine.reshape(-1, n).T @ block.reshape(-1, n)
        scores = sum(known[i].values()).astype(np.float64)
        units, found = scipy.optimize.linear_sum_assignment(scores, maximize=True)
        better = scores[units, found].sum() - scores[units, permutations[name]].sum() > 1e-12
        if better:
            permutations[name] = found
        return bool(better)

    def improve(i: int) -> bool:
        if i not in stale:
            return False
        stale.discard(i)
        if not (improved if problem.blocks[i] is None else improved_plain)(i):
            return False
        stale.update(problem.neighbours[i])
        for j in problem.neighbours[i]:
            kept = known[j].items()
            known[j] = {k: x for k, x in kept if problem.families[i].keys().isdisjoint(k)}
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
        return [([problem.number[name] for name in sweep] for sweep in order[:max_iterations])]
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


@functools.lru_cache(maxsize=64)
def _names(structure: Any) -> list[str]:
    numbers = jax.tree.unflatten(structure, range(structure.num_leaves))
    return [name for name, _ in trees.named_leaves(numbers)]


@functools.lru_cache(maxsize=64)
def _computed_in(dtype: Any) -> Any:
    """The dtype that values count in; None where they do not."""
    return trees.wide(dtype) if jnp.issubdtype(dtype, jnp.inexact) else None


def _weights(symmetry: Symmetry, variables: PyTree, leaves: Sequence[str] | None) -> dict[str, Any]:
    """The leaves that count, in float32 or wider; on the host if they are there."""
    values, structure = jax.tree.flatten(variables, is_leaf=lambda x: x is None)
    named = dict(zip(_names(structure), values, strict=True))
    for name, shape in symmetry.leaf_shapes.items():
        if name not in named or np.shape(named[name]) != shape:
            found = np.shape(named[name]) if name in named else "none"
            raise ValueError(f"the symmetry has leaf {name!r} of shape {shape}, the model {found}")
    if leaves is None:
        params = [name for name in symmetry.layouts if name.startswith("params/")]
        leaves = params or list(symmetry.layouts)
    for name in leaves:
        if name not in symmetry.layouts:
            raise KeyError(f"no leaf {name!r}; {nearest(name, symmetry.layouts)}")
    on_host = jax.default_backend() == "cpu" and is_concrete([named[name] for name in leaves])
    chosen: dict[str, Any] = {}
    for name in leaves:
        dtype = _computed_in(named[name].dtype)
        if dtype is not None:
            value = np.asarray(named[name]) if on_host else named[name]
            chosen[name] = value if value.dtype == dtype else value.astype(dtype)
    # One look at all of them costs less than one at each of many small ones.
    every = [x.ravel() for x in chosen.values()] if on_host else []
    if every and not np.isfinite(np.concatenate(every)).all():
        name = next(name for name, x in chosen.items() if not np.isfinite(x).all())
        raise ValueError(f"leaf {name!r} contains NaN or infinity")
    return chosen
