"""Where agents run: one program over the agent axis, on one device or many.

A *program* is a function `program(axis, state, agents, shared)` written for a block of agents. It
sees the other agents only through `axis`, so the same program runs on every backend:

- `loop`: one device, agents unrolled one after the other;
- `vmap`: one device, agents vectorised;
- `pmap`: a block of agents on each device, itself run by `loop` or `vmap`.

With several processes (`mixlab.distributed`), pmap spans the devices of all of them. Each process
holds the blocks of its own devices and no others; only `Axis.gather` and `Parallel.get` see all.
What needs a number of all agents but no other number of a model, as a mean does, goes by columns
(`Axis.reduce`, `Axis.combine`): each device takes a share of the numbers, of all the agents.

This is the only module that names `jax.pmap`. pmap is in maintenance mode (JAX 0.8 changelog); a
port to `jax.shard_map` would replace `Parallel.compile`, `Parallel._gathered` and nothing else.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixlab import trees
from mixlab.types import Array, PyTree

BACKENDS = ("loop", "vmap", "pmap")
PER_DEVICE = ("auto", "loop", "vmap")
_DEVICES = "devices"  # pmap's axis name; every collective of this module reduces over it


class Axis(NamedTuple):
    """The agent axis, as a program for a block of k of the A agents sees it.

    Attributes:
        ids: int32 [k], which agents these are.
        each: `each(fn)(*trees)` maps `fn` over the leading axis k of the trees.
        gather: `gather(tree)` turns leaves [k, ...] of the block into [A, ...] of all agents.
        pick: `pick(tree, agent)` gives what one agent holds, without the agent axis; which one
            need not be known when the program is traced.
        fetch: `fetch(tree, sources)` gives every agent i of the block what the agents
            `sources[i]` hold. int [A, m], known when the program is traced: between devices only
            the blocks travel that somebody asks for.
        reduce: `reduce(fn, tree)` makes one of all agents: leaves [k, ...] become [...], the same
            on every device. `fn` maps [A, n] to [n], each column by itself.
        combine: `combine(fn, tree)` gives leaves [k, ...] again; `fn` maps [A, n] to [A, n], each
            column by itself.
    """

    ids: Array
    each: Callable[[Callable[..., Any]], Callable[..., Any]]
    gather: Callable[[PyTree], PyTree]
    pick: Callable[[PyTree, Array | int], PyTree]
    fetch: Callable[[PyTree, np.ndarray], "Fetched"]
    reduce: Callable[[Callable[[Array], Array], PyTree], PyTree]
    combine: Callable[[Callable[[Array], Array], PyTree], PyTree]


class Fetched(NamedTuple):
    """What the agents of a block have fetched from others.

    Attributes:
        pool: leaves [n, ...], all that came to the block.
        rows: int32 [k, m], where in the pool an agent of the block finds what it asked for.
    """

    pool: PyTree
    rows: Array

    def column(self, s: int) -> PyTree:
        """Leaves [k, ...]: the s-th thing that every agent of the block asked for."""
        return jax.tree.map(lambda x: x[self.rows[:, s]], self.pool)


Program = Callable[[Axis, Any, Any, Any], Any]


def whole_axis(ids: Array, each: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Axis:
    """The axis of a program whose block is all the agents."""

    def pick(tree: PyTree, agent: Array | int) -> PyTree:
        return jax.tree.map(lambda x: x[agent], tree)

    def reduce(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: fn(_flat(x)).reshape(x.shape[1:]), tree)

    def combine(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: fn(_flat(x)).reshape(x.shape), tree)

    choose = functools.partial(_choose, ids)
    return Axis(ids, each, lambda tree: tree, pick, choose, reduce, combine)


def each_of(per_device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How the agents of a device run: `each_of(per_device)(fn)` gives what `jax.vmap(fn)` does."""
    return _loop if loop_or_vmap(per_device) == "loop" else jax.vmap


def loop_or_vmap(per_device: str) -> str:
    """Which of the two `per_device` stands for: "auto" is "vmap" but on CPU.

    Raises:
        ValueError: an unknown name.
    """
    if per_device not in PER_DEVICE:
        raise ValueError(f"per_device must be auto, loop or vmap, got {per_device!r}")
    if per_device == "auto":
        return "loop" if jax.default_backend() == "cpu" else "vmap"
    return per_device


def _loop(fn: Callable[..., Any]) -> Callable[..., Any]:
    """As `jax.vmap(fn)`, but unrolled: no operation of `fn` is batched over agents.

    A convolution that is vmapped over its kernels becomes a grouped one, which XLA runs about
    ten times slower on CPU.
    """

    def mapped(*args: PyTree) -> PyTree:
        size = trees.leading_size(args)
        results = [fn(*jax.tree.map(lambda x: x[i], args)) for i in range(size)]  # noqa: B023
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return mapped


@dataclass(frozen=True)
class Parallel:
    """A backend for `num_agents` agents.

    Attributes:
        num_agents: A, at least 1.
        backend: "loop", "vmap" or "pmap" (see the module's docstring).
        per_device: how the agents of one device run, "loop" or "vmap"; only "pmap" has a choice.
        devices: the devices to use, equally many of each process; the agents are spread over them
            evenly, in order.
    """

    num_agents: int
    backend: str
    per_device: str
    devices: tuple[jax.Device, ...]

    @property
    def per_block(self) -> int:
        """Agents on one device."""
        return self.num_agents // len(self.devices)

    @functools.cached_property
    def local_devices(self) -> tuple[jax.Device, ...]:
        """Those devices that belong to this process."""
        return tuple(d for d in self.devices if d.process_index == jax.process_index())

    @property
    def local_agents(self) -> slice:
        """The agents whose blocks lie on this process's devices."""
        first = self.devices.index(self.local_devices[0]) * self.per_block
        return slice(first, first + len(self.local_devices) * self.per_block)

    def put(self, tree: PyTree) -> PyTree:
        """Lays host leaves [A, ...] out over the devices, as `compile`d programs take them.

        Every process gives all the agents and keeps its own.
        """
        sharding = NamedSharding(self._mesh, PartitionSpec(_DEVICES))
        return jax.tree.map(lambda x: jax.device_put(self._blocks(x), sharding), tree)

    def replicate(self, tree: PyTree) -> PyTree:
        """Copies a tree to every device once, for use as the `shared` argument of programs."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def get(self, tree: PyTree) -> PyTree:
        """Brings leaves back to the host as NumPy arrays [A, ...]: the inverse of `put`.

        Every process gets all the agents, so every process must ask.
        """
        if len(self.local_devices) == len(self.devices):
            return self.get_local(tree)
        # Leaf by leaf, so that no device holds more than one leaf of all the agents.
        return jax.tree.map(lambda x: np.array(self._gathered(x).addressable_data(0)[0]), tree)

    def get_local(self, tree: PyTree) -> PyTree:
        """As `get`, but only the `local_agents`; asks nothing of other processes."""
        # The copy matters: on CPU, NumPy would look at memory that the next step overwrites.
        count = len(self.local_devices) * self.per_block
        return jax.tree.map(
            lambda x: np.array(x).reshape(count, *x.shape[2:]), jax.device_get(tree)
        )

    def compile(self, program: Program, *, donate: bool = False) -> Callable[[Any, Any, Any], Any]:
        """Compiles a program.

        Args:
            program: `program(axis, state, agents, shared) -> result`; every leaf of `state`, of
                `agents` and of the result has the block's leading axis k.
            donate: whether the memory of `state` may be reused for the result.

        Returns:
            `run(state, agents, shared)`, the first two in the layout of `put`.
        """
        each = each_of(self.per_device)
        size = self.per_block

        def block(state: PyTree, agents: PyTree, shared: PyTree) -> PyTree:
            if self.backend == "pmap":
                first = jax.lax.axis_index(_DEVICES) * size
                ids = first + jnp.arange(size)
                pick, fetch = (functools.partial(fn, ids) for fn in (_pick, _fetch))
                axis = Axis(ids, each, _gather, pick, fetch, _reduce, _combine)
                return program(axis, state, agents, shared)
            axis = whole_axis(jnp.arange(size), each)
            state, agents = jax.tree.map(lambda x: x[0], (state, agents))
            return jax.tree.map(lambda x: x[None], program(axis, state, agents, shared))

        donated = (0,) if donate else ()
        if self.backend != "pmap":
            return jax.jit(block, donate_argnums=donated)
        # The state goes in a tuple because JAX 0.10 and 0.12 read in_axes=(0, 0, None) wrongly
        # whenever the three arguments happen to have three leaves in all.
        mapped = jax.pmap(
            lambda state, agents, shared: block(state[0], agents, shared),
            _DEVICES,
            in_axes=((0,), 0, None),
            devices=self.devices,
            donate_argnums=donated,
        )
        if self.devices[0].platform != "cpu":
            return lambda state, agents, shared: mapped((state,), agents, shared)
        # Forced CPU devices share one small thread pool. Were two programs with collectives in
        # flight, threads of both could wait for partners that never get a thread.
        return lambda state, agents, shared: jax.block_until_ready(mapped((state,), agents, shared))

    @property
    def _mesh(self) -> Mesh:
        # pmap takes and gives the blocks of one process, also when it runs on many.
        return Mesh(np.array(self.local_devices), (_DEVICES,))

    def _blocks(self, x: Any) -> np.ndarray | Array:
        array = x if isinstance(x, jax.Array) else np.asarray(x)
        blocks = (len(self.local_devices), self.per_block, *array.shape[1:])
        return array[self.local_agents].reshape(blocks)

    @functools.cached_property
    def _gathered(self) -> Callable[[Array], Array]:
        """Blocks [local devices, k, ...] -> on each of these devices [A, ...]."""
        return jax.pmap(_gather, _DEVICES, devices=self.devices)

    def __str__(self) -> str:
        kind = self.devices[0].platform
        if self.backend != "pmap" or self.num_agents == 1:
            agents = "1 agent" if self.num_agents == 1 else f"{self.num_agents} agents"
            return f"{agents} on 1 {kind} device ({self.backend})"
        inside = f" by {self.per_device}" if self.per_block > 1 else ""
        processes = len(self.devices) // len(self.local_devices)
        where = f" of {processes} processes" if processes > 1 else ""
        devices = (
            f"1 {kind} device" if len(self.devices) == 1 else f"{len(self.devices)} {kind} devices"
        )
        return (
            f"{self.num_agents} agents on {devices}{where} (pmap, "
            f"{self.per_block} a device{inside})"
        )


def _gather(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, _DEVICES, tiled=True), tree)


def _pick(ids: Array, tree: PyTree, agent: Array | int) -> PyTree:
    """`Axis.pick` between devices: a sum in which all others are zero."""
    here = ids == agent

    def leaf(x: Array) -> Array:
        own = jnp.where(jnp.any(here), x[jnp.argmax(here)], jnp.zeros((), x.dtype))
        number = own.astype(jnp.uint8) if own.dtype == bool else own
        return jax.lax.psum(number, _DEVICES).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def _reduce(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """`Axis.reduce` between devices."""

    def whole(x: Array) -> Array:
        return jax.lax.all_gather(fn(_to_columns(x)), _DEVICES, tiled=True)[: x.shape[1]]

    return _packed(whole, tree)


def _combine(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """`Axis.combine` between devices."""

    def rows(x: Array) -> Array:
        back = jax.lax.all_to_all(fn(_to_columns(x)), _DEVICES, 0, 1, tiled=True)
        return back[:, : x.shape[1]]

    return _packed(rows, tree)


def _to_columns(x: Array) -> Array:
    """This device's share of the columns, of all agents: [k, n] -> [A, n / D], zeros at the end."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % jax.lax.axis_size(_DEVICES))))
    return jax.lax.all_to_all(padded, _DEVICES, 1, 0, tiled=True)


def _packed(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """Applies `fn`, from [k, n] to [n] or [k, n], to all leaves [k, ...] of a dtype at once.

    Every message costs time beside that for its bytes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    of_dtype: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        of_dtype.setdefault(leaf.dtype, []).append(i)
    for places in of_dtype.values():
        flat = [_flat(leaves[i]) for i in places]
        ends = np.cumsum([x.shape[1] for x in flat])[:-1]
        parts = jnp.split(fn(jnp.concatenate(flat, axis=1)), ends, axis=-1)
        for i, part in zip(places, parts, strict=True):
            leaves[i] = part.reshape(*part.shape[:-1], *leaves[i].shape[1:])
    return jax.tree.unflatten(treedef, leaves)


def _flat(x: Array) -> Array:
    """Leaves [k, ...] -> [k, n]."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _choose(ids: Array, tree: PyTree, sources: np.ndarray) -> Fetched:
    """`Axis.fetch` from leaves [A, ...]."""
    return Fetched(tree, jnp.asarray(sources, jnp.int32)[ids])


def _fetch(ids: Array, tree: PyTree, sources: np.ndarray) -> Fetched:
    """`Axis.fetch` between devices: in each of a few rounds a block goes from one to another."""
    size = len(ids)
    number = len(sources) // size
    blocks = sources // size  # on which device each source is
    wanted = np.zeros((number, number), bool)
    wanted[np.repeat(np.arange(number), size)[:, None], blocks] = True
    np.fill_diagonal(wanted, False)
    rounds = exchange_rounds(wanted)
    if len(rounds) >= number - 1:
        return _choose(ids, _gather(tree), sources)
    # Which round brings the block of one device to another; its own is there before the first.
    brought = np.zeros((number, number), np.int32)
    for i, pairs in enumerate(rounds):
        for source, target in pairs:
            brought[target, source] = i + 1
    held = brought[np.repeat(np.arange(number), size)[:, None], blocks]

    def received(x: Array) -> Array:
        return jnp.concatenate([x, *(jax.lax.ppermute(x, _DEVICES, pairs) for pairs in rounds)])

    return _choose(ids, jax.tree.map(received, tree), size * held + sources % size)


def exchange_rounds(wanted: np.ndarray) -> list[list[tuple[int, int]]]:
    """Splits an exchange into rounds in which nobody sends, or receives, more than once.

    Args:
        wanted: bool [D, D]; row i tells from whom i has to receive.

    Returns:
        For each round the pairs (from, to). As many rounds as the largest number that anybody
        sends or receives where that number is the same for all, else a few more at most.
    """
    left, rounds = wanted.copy(), []
    while left.any():
        source = scipy.sparse.csgraph.maximum_bipartite_matching(
            scipy.sparse.csr_array(left), perm_type="column"
        )
        pairs = [(int(source[i]), i) for i in range(len(left)) if source[i] >= 0]
        left[[i for _, i in pairs], [j for j, _ in pairs]] = False
        rounds.append(pairs)
    return rounds


def parallel(
    num_agents: int,
    backend: str = "pmap",
    *,
    per_device: str = "auto",
    num_devices: int | None = None,
) -> Parallel:
    """Chooses the devices for `num_agents` agents.

    Args:
        num_agents: A >= 1.
        backend: "loop", "vmap" or "pmap".
        per_device: "loop", "vmap" or "auto": "vmap" on accelerators, "loop" on CPU, where a
            vmapped convolution is about ten times slower.
        num_devices: how many devices pmap uses, those of all processes together; by default the
            largest number of them that divides A, equally many of each process.

    Raises:
        ValueError: an unknown name, no agents, more devices than there are, or a number of
            agents that does not divide evenly over the devices, or over the processes.
    """
    if num_agents < 1:
        raise ValueError(f"agents must be at least 1, got {num_agents}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    inside = loop_or_vmap(per_device)
    processes = jax.process_count()
    if backend != "pmap":
        if per_device not in ("auto", backend):
            raise ValueError(
                f"per_device={per_device!r} is for backend 'pmap'; the backend is {backend!r}"
            )
        if processes > 1:
            raise ValueError(
                f"backend {backend!r} is for one process, and there are {processes}; use 'pmap'"
            )
        return Parallel(num_agents, backend, backend, (jax.local_devices()[0],))
    devices = jax.devices()
    each = min(Counter(d.process_index for d in devices).values())  # devices of a process
    if num_devices is None:
        if num_agents % processes:
            raise ValueError(
                f"{num_agents} agents cannot be spread evenly over {processes} processes; use a "
                f"multiple of {processes} agents, or {largest_divisor(num_agents, processes)} "
                "processes"
            )
        num_devices = processes * largest_divisor(num_agents // processes, each)
    if not 1 <= num_devices <= each * processes:
        raise ValueError(
            f"devices={num_devices} asked for, but there are {each * processes} "
            f"{devices[0].platform} devices; use at most that many"
        )
    if num_devices % processes:
        raise ValueError(
            f"devices={num_devices} is for all {processes} processes together, each with equally "
            f"many; use a multiple of {processes}"
        )
    if num_agents % num_devices:
        fits = largest_divisor(num_agents, num_devices)
        raise ValueError(
            f"{num_agents} agents cannot be spread evenly over {num_devices} devices; use a "
            f"multiple of {num_devices} agents, or devices={fits}"
        )
    chosen = [
        device
        for process in range(processes)
        for device in [d for d in devices if d.process_index == process][: num_devices // processes]
    ]
    return Parallel(num_agents, backend, inside, tuple(chosen))


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def force_cpu_devices(num_agents: int) -> int:
    """Splits the CPU into devices that all hold equally many agents, as many as may be.

    They are 8 at most, or one a core if there are more.

    Call it before JAX starts its backends: the environment is read once. It changes nothing
    where XLA_FLAGS already forces a number of devices.

    Returns:
        The number of CPU devices.

    Raises:
        ValueError: no agents.
    """
    if num_agents < 1:
        raise ValueError(f"agents must be at least 1, got {num_agents}")
    flag = "--xla_force_host_platform_device_count="
    flags = os.environ.get("XLA_FLAGS", "")
    if flag in flags:
        return int(flags.split(flag)[1].split()[0])
    count = largest_divisor(num_agents, max(8, os.cpu_count() or 1))
    os.environ["XLA_FLAGS"] = f"{flags} {flag}{count}".strip()
    os.environ.setdefault("PJRT_NPROC", str(4 * count))
    return count


def host_callbacks_are_safe(backend: Parallel) -> bool:
    """Whether a compiled program may call back to Python on this backend.

    A callback on CPU needs a free thread of the pool in which the devices themselves run; with as
    many forced devices as threads it would wait for ever (seen with JAX 0.10). `force_cpu_devices`
    sets PJRT_NPROC, the size of that pool, well above the number of devices.
    """
    if backend.devices[0].platform != "cpu":
        return False
    threads = int(os.environ.get("PJRT_NPROC", os.cpu_count() or 1))
    return backend.backend != "pmap" or threads >= 2 * len(backend.local_devices)
