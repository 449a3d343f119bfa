"""What agents do with each other within one step or one round.

A strategy sees the other agents only through a `Network`: it broadcasts, mixes, merges and
averages. Here faults act (an agent that is late, a message that is tampered with), and here every
message is counted, so that no strategy has to know of either.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.agents.parallel import Axis, Fetched
from mixlab.merge import MergeMethod, average
from mixlab.types import Array, ArrayLike, Key, PyTree

# Neighbours are gathered one by one where they are at most this fraction of all agents.
_SPARSE = 1 / 4


class Message(NamedTuple):
    """A kind of message that a program sends.

    Attributes:
        kind: "parameters", "statistics" (of BatchNorm), "gradients", or another name, under which
            reports show it.
        num_bytes: of one message, from one agent to one other.
    """

    kind: str
    num_bytes: float


@dataclasses.dataclass
class Network:
    """The agents' network during one step or round; made anew for each.

    Attributes:
        axis: the agent axis of the program.
        weights: [A, A], row i the weights of what agent i receives, absences and losses taken
            into account.
        adjacency: bool [A, A], static: from whom agent i may ever receive; the diagonal is False.
        key: the same for all agents, another in every step and round.
        time: int32, how many steps, or rounds, of communication were made before.
        awake: bool [A], who takes part; None where all do.
        late: bool [A], who is late: the others see what it last sent on time. None where nobody
            can be.
        lost: bool [A, A], whether what agent i should receive of agent j was sent and is lost;
            its weight is zero. None where nothing can be.
        byzantine: bool [A], whose messages `attack` replaces.
        attack: `attack(key, messages, byzantine) -> messages`, leaves [A, ...]; None where all are
            honest.
        outbox: what was last sent on time, message by message, leaves [k, ...], each with whether
            there is any; None before the first message, and where nobody can be late.
    """

    axis: Axis
    weights: Array
    adjacency: np.ndarray
    key: Key
    time: Array
    awake: Array | None = None
    late: Array | None = None
    lost: Array | None = None
    byzantine: Array | None = None
    attack: Callable[[Key, PyTree, Array], PyTree] | None = None
    outbox: tuple[PyTree, ...] | None = None

    def __post_init__(self) -> None:
        # What follows is filled while the program is traced, in the order of sending.
        self.messages: list[Message] = []
        self._counts: list[Array] = []
        self._sent: list[PyTree] = []

    @property
    def num_agents(self) -> int:
        """A."""
        return len(self.adjacency)

    def taking_part(self) -> Array:
        """Bool [k]: who of the block is awake and honest."""
        part = jnp.ones(self.axis.ids.shape, bool)
        if self.awake is not None:
            part &= self.awake[self.axis.ids]
        return part if self.byzantine is None else part & ~self.byzantine[self.axis.ids]

    def keep_absent(self, old: PyTree, new: PyTree) -> PyTree:
        """`new`, but of absent agents `old`; leaves [k, ...]."""
        if self.awake is None:
            return new
        here = self.awake[self.axis.ids]
        return trees.where(here, new, old)

    def received(self) -> tuple[Array, tuple[PyTree, ...]]:
        """What this step or round left: int32 [k, messages, 2] sent and received, the outbox."""
        none = jnp.zeros((*self.axis.ids.shape, 0, 2), jnp.int32)
        counts = jnp.stack(self._counts, axis=1) if self._counts else none
        return counts, tuple(self._sent)

    def weighted(self, weights: Array, sent: Array) -> "Network":
        """The same network with other weights; what it sends is counted here too.

        Args:
            weights: [A, A].
            sent: bool, [A, A] or less, which of the messages are sent at all: of these some
                may be lost.
        """
        other = copy.copy(self)
        other.weights = weights
        if self.lost is not None:
            other.lost = self.lost & sent
        return other

    def download(self, tree: PyTree, receivers: Array, kind: str = "parameters") -> PyTree:
        """Gives everyone what agent 0, an honest server and never late, holds.

        Args:
            tree: as agent 0 holds it, without the agent axis; known to all blocks.
            receivers: bool [A], to whom it is sent.
            kind: see `Message`.

        Returns:
            Leaves [k, ...], every agent's the same.
        """
        receivers = receivers.at[0].set(False)
        into = receivers & (self.weights[:, 0] > 0)
        out = into if self.lost is None else into | (receivers & self.lost[:, 0])
        into = into.astype(jnp.int32)
        out = jnp.zeros_like(into).at[0].set(jnp.sum(out))
        same = self.axis.each(lambda agent: tree)(self.axis.ids)
        self._count(kind, _size(same), out, into)
        return same

    def broadcast(
        self, tree: PyTree, kind: str = "parameters", *, num_bytes: float | None = None
    ) -> Fetched:
        """Sends what an agent holds to all who weigh it; gives what arrives.

        Args:
            tree: leaves [k, ...] of the block.
            kind: see `Message`.
            num_bytes: the size of an agent's message; by default that of its floating leaves.

        Returns:
            In the order of `neighbour_slots`: of an agent that is late what it sent last, of a
            Byzantine one its forged message. First comes what an agent itself shows to the others;
            use its own value for itself.
        """
        slots, _ = neighbour_slots(self.adjacency)
        self._count_broadcast(tree, kind, num_bytes)
        if self.attack is None:
            return self.axis.fetch(self._as_sent(tree), slots)
        everyone = self.exchange(self._as_sent(tree))
        return Fetched(everyone, jnp.asarray(slots)[self.axis.ids])

    def select(self, tree: PyTree, agents: Array, kind: str = "parameters") -> PyTree:
        """As `broadcast`, but gives everybody what arrives of some, leaves [n, ...].

        Args:
            tree: leaves [k, ...] of the block.
            agents: int [n]; who they are need not be known when the program is traced.
            kind: see `Message`.
        """
        self._count_broadcast(tree, kind, None)
        sent = self._as_sent(tree)
        if self.attack is None:
            return trees.stack([self.axis.pick(sent, agent) for agent in agents])
        return jax.tree.map(lambda x: x[agents], self.exchange(sent))

    def exchange(self, tree: PyTree) -> PyTree:
        """What everyone sees of a tree, also of agents that are late; not counted, see `count`.

        Unlike `broadcast` it may be called within a branch of the program.

        Args:
            tree: leaves [k, ...] of the block.

        Returns:
            Leaves [A, ...]: of a Byzantine agent its forged message.
        """
        everyone = self.axis.gather(tree)
        if self.attack is None or self.byzantine is None:
            return everyone
        key = jax.random.fold_in(self.key, len(self.messages))
        return self.attack(key, everyone, self.byzantine)

    def count(self, tree: PyTree, kind: str, sent: Array, received: Array) -> None:
        """Counts messages that `exchange` stands for.

        Args:
            tree: what an agent sends, leaves [k, ...] of the block.
            kind: see `Message`.
            sent: int32 [A], to how many others each agent sends.
            received: int32 [A], from how many each receives.
        """
        self._count(kind, _size(tree), sent, received)

    def mix(
        self,
        tree: PyTree,
        kind: str = "parameters",
        *,
        num_bytes: float | None = None,
    ) -> PyTree:
        """Gives agent i the sum over j of `weights[i, j]` times what arrives from agent j.

        Computed in float32 where leaves are narrower; integer leaves stay the agent's own.

        Args:
            tree: leaves [k, ...] of the block.
            kind: see `Message`.
            num_bytes: see `broadcast`.
        """
        slots, _ = neighbour_slots(self.adjacency)
        # An attack looks at all messages.
        if slots.shape[1] <= _SPARSE * self.num_agents and self.attack is None:
            return self.mix_arrived(tree, self.broadcast(tree, kind, num_bytes=num_bytes))
        self._count_broadcast(tree, kind, num_bytes)
        sent = self._as_sent(tree)
        elsewhere = jnp.where(jnp.eye(self.num_agents, dtype=bool), 0, self.weights)
        if self.attack is None:
            sums = self.axis.combine(functools.partial(_weighted, elsewhere), sent)
        else:
            everyone = self.exchange(sent)
            sums = jax.tree.map(functools.partial(_weighted, elsewhere[self.axis.ids]), everyone)

        def from_everyone(x: Array, rest: Array) -> Array:
            return (self._own_share(x) + rest).astype(x.dtype) if trees.is_inexact(x) else x

        return jax.tree.map(from_everyone, tree, sums)

    def mix_arrived(self, tree: PyTree, arrived: Fetched) -> PyTree:
        """As `mix`, of what has been sent already.

        Args:
            tree: leaves [k, ...] of the block.
            arrived: what `broadcast` gave of it.
        """
        ids, (slots, valid) = self.axis.ids, neighbour_slots(self.adjacency)
        rows = self.weights[ids]

        def mixed(x: Array, *others: Array) -> Array:
            if not trees.is_inexact(x):
                return x
            total = self._own_share(x)
            for s, other in enumerate(others, 1):
                j = jnp.asarray(slots)[ids, s]
                weight = jnp.where(jnp.asarray(valid)[ids, s], rows[jnp.arange(len(ids)), j], 0)
                part = trees.along(weight.astype(total.dtype), x) * other.astype(total.dtype)
                # Zero times infinity is NaN; see `_weighted`.
                total += jnp.where(trees.along(weight > 0, x), part, 0)
            return total.astype(x.dtype)

        others = (arrived.column(s) for s in range(1, slots.shape[1]))
        return jax.tree.map(mixed, tree, *others)

    def _own_share(self, x: Array) -> Array:
        """A floating leaf [k, ...] times each agent's weight of itself, in float32 or wider."""
        ids, wide = self.axis.ids, trees.wide(x.dtype)
        return trees.along(self.weights[ids, ids].astype(wide), x) * x.astype(wide)

    def merge(self, own: PyTree, arrived: Fetched, method: MergeMethod) -> PyTree:
        """Merges every agent's neighbourhood, itself first, then its neighbours ascending.

        Robust rules need as many models as they were made for: what does not arrive is replaced
        by the agent's own. Methods that need a base get the agent's own model as such.

        Args:
            own: leaves [k, ...] of the block.
            arrived: what `broadcast` gave.
            method: any method of `mixlab.merge` that makes one model.
        """
        return self.merge_neighbourhood(own, self.neighbourhood(own, arrived), method)

    def silent(self) -> Array:
        """Bool [k, slots]: from whom nothing arrives; never the first slot, which is oneself."""
        slots, valid = neighbour_slots(self.adjacency)
        ids = self.axis.ids
        weights = jnp.take_along_axis(self.weights[ids], jnp.asarray(slots)[ids], axis=1)
        heard = (weights > 0) & jnp.asarray(valid)[ids]
        return ~heard.at[:, 0].set(True)

    def neighbourhood(self, own: PyTree, arrived: Fetched) -> PyTree:
        """Every agent's own model, then what arrived from its neighbours, or else its own again.

        Args:
            own: leaves [k, ...] of the block.
            arrived: what `broadcast` gave.

        Returns:
            Leaves [k, slots, ...], see `neighbour_slots`.
        """

        def one(row: Array, silent: Array, mine: PyTree) -> PyTree:
            own_instead = silent.at[0].set(True)
            return jax.tree.map(
                lambda x, all_: jnp.where(trees.along(own_instead, all_[row]), x[None], all_[row]),
                mine,
                arrived.pool,
            )

        return self.axis.each(one)(arrived.rows, self.silent(), own)

    def merge_neighbourhood(
        self, own: PyTree, models: PyTree, method: MergeMethod | None
    ) -> PyTree:
        """Merges what `neighbourhood` gives, as it is or aligned.

        Args:
            own: leaves [k, ...] of the block; gives integer leaves and the base.
            models: leaves [k, slots, ...]. What stands under "batch_stats" or "moments" leaves the
                range of what is merged by no method: variances do not become negative.
            method: see `merge`; None is the mean weighted by the row of the mixing matrix.
        """
        _, valid = neighbour_slots(self.adjacency)
        sizes = sorted({int(count) for count in valid.sum(axis=1)})
        which = np.searchsorted(sizes, valid.sum(axis=1))

        def weighted(
            agent: Array, row: Array, silent: Array, mine: PyTree, models: PyTree
        ) -> PyTree:
            weights = jnp.where(silent, 0, self.weights[agent][row])
            return average(weights=weights)(models, base=mine)

        def merged_by(rule: MergeMethod, agent: Array, mine: PyTree, models: PyTree) -> PyTree:
            key = jax.random.fold_in(self.key, agent)

            def merged(size: int, models: PyTree) -> PyTree:
                present = jax.tree.map(lambda x: x[:size], models)
                return _in_range(rule(present, base=mine, key=key), present)

            if len(sizes) == 1:
                return merged(sizes[0], models)
            branches = [functools.partial(merged, size) for size in sizes]
            return jax.lax.switch(jnp.asarray(which)[agent], branches, models)

        each, ids = self.axis.each, self.axis.ids
        if method is None:
            slots = jnp.asarray(neighbour_slots(self.adjacency)[0])[ids]
            return each(weighted)(ids, slots, self.silent(), own, models)
        return each(functools.partial(merged_by, method))(ids, own, models)

    def mean(
        self,
        tree: PyTree,
        kind: str = "gradients",
        *,
        method: MergeMethod | None = None,
        among: Array | None = None,
    ) -> PyTree:
        """The mean over all agents that are awake, whatever the graph; the same for everyone.

        Bytes are those of a ring all-reduce, 2 (A - 1) / A times the tree (Patarasuk and Yuan,
        2009), also where some are absent; a `method` needs all the messages, so each agent sends
        its own to all others. What is lost of either is sent again, uncounted: nobody can go on
        without.

        Args:
            tree: leaves [k, ...] of the block.
            kind: see `Message`.
            method: merge by this instead of the mean; in the place of those that are left out
                stands, entry by entry, the median of the others.
            among: bool [A], who counts, of those that are awake; all by default.

        Returns:
            Leaves [k, ...], every agent's the same.
        """
        count, size = self.num_agents, _size(tree)
        awake = jnp.ones(count, bool) if self.awake is None else self.awake
        each = awake.astype(jnp.int32)
        if method is None:
            self._count(kind, 2 * (count - 1) / count * size, each, each)
        else:
            others = each * (jnp.sum(each) - 1)
            self._count(kind, size, others, others)
        sent = self._as_sent(tree)
        merged = self._merge_all(sent, awake if among is None else awake & among, method)
        return self.axis.each(lambda agent: merged)(self.axis.ids)

    def upload(
        self,
        variables: PyTree,
        senders: Array,
        center: PyTree,
        *,
        method: MergeMethod | None = None,
        weights: Array | None = None,
    ) -> PyTree:
        """The mean change that senders deliver to agent 0, a server; the same on all devices.

        What travels are models. The server takes its own off them, so that one that is late pulls
        back to where it was, and is not added a second time.

        Args:
            variables: leaves [k, ...] of the block, by collection.
            senders: bool [A], who sends; the server, which is one of the agents, may be of them.
                What does not arrive does not count.
            center: what the server holds, without the agent axis.
            method: as for `mean`.
            weights: [A], positive, of the agents in the mean; equal by default.

        Returns:
            Leaves without the agent axis.
        """
        heard = senders & (self.weights[0] > 0).at[0].set(True)
        out = heard if self.lost is None else heard | (senders & self.lost[0])
        out = out.at[0].set(False).astype(jnp.int32)
        into = jnp.zeros_like(out).at[0].set(jnp.sum(heard.at[0].set(False)))
        for name, value in variables.items():
            self._count(kind_of(name), _size(value), out, into)
        changes = jax.tree.map(
            lambda x, y: x - y if trees.is_inexact(x) else x, self._as_sent(variables), center
        )
        return self._merge_all(changes, heard, method, weights)

    def _merge_all(
        self,
        sent: PyTree,
        chosen: Array,
        method: MergeMethod | None,
        weights: Array | None = None,
    ) -> PyTree:
        """The mean of what those `chosen`, bool [A], sent; or merged, the others as a median."""

        def present(x: Array) -> Array:
            return jnp.where(trees.along(chosen, x), x, jnp.zeros((), x.dtype))

        def mean(x: Array) -> Array:
            if not trees.is_inexact(x):
                return x[0]
            wide = trees.wide(x.dtype)
            share = jnp.where(chosen, 1 if weights is None else weights, 0).astype(wide)
            total = jnp.sum(trees.along(share, x) * present(x).astype(wide), axis=0)
            whole = jnp.sum(share)
            return (total / jnp.where(whole > 0, whole, 1)).astype(x.dtype)

        def fill(x: Array) -> Array:
            """Rules take a fixed number of models: the median of the others moves none of them."""
            ordered = jnp.sort(jnp.where(trees.along(chosen, x), x, jnp.inf), axis=0)
            count = jnp.maximum(jnp.sum(chosen), 1)
            middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
            return jnp.where(trees.along(chosen, x), x, middle.astype(x.dtype))

        def filled(x: Array) -> Array:
            if not trees.is_inexact(x):
                return x
            return jax.lax.cond(jnp.all(chosen), lambda x: x, fill, x)

        def merged(models: PyTree) -> PyTree:
            assert method is not None
            base = jax.tree.map(lambda x: jnp.zeros_like(x[0]), models)
            return method(jax.tree.map(filled, models), base=base, key=self.key)

        if self.attack is None and (method is None or method.entrywise):
            return self.axis.reduce(mean if method is None else merged, sent)
        everyone = self.exchange(sent)
        return jax.tree.map(mean, everyone) if method is None else merged(everyone)

    def _count(self, kind: str, num_bytes: float, sent: Array, received: Array) -> None:
        ids = self.axis.ids
        self.messages.append(Message(kind, float(num_bytes)))
        self._counts.append(jnp.stack([sent[ids], received[ids]], axis=1))

    def _count_broadcast(self, tree: PyTree, kind: str, num_bytes: float | None) -> None:
        heard = (self.weights > 0) & ~jnp.eye(self.num_agents, dtype=bool)
        sent = heard if self.lost is None else heard | self.lost
        out, into = sent.sum(0, dtype=jnp.int32), heard.sum(1, dtype=jnp.int32)
        self._count(kind, _size(tree) if num_bytes is None else num_bytes, out, into)

    def _as_sent(self, tree: PyTree) -> PyTree:
        """What agents sent last of a tree, leaves [k, ...]: older values where they are late."""
        if self.late is not None:
            ids = self.axis.ids
            absent = jnp.zeros(ids.shape, bool) if self.awake is None else ~self.awake[ids]
            sent = ~absent
            if self.outbox is not None:
                before, any_before = self.outbox[len(self._sent)]
                old = (self.late[ids] | absent) & any_before
                tree = trees.where(old, before, tree)
                sent |= any_before
            self._sent.append((tree, sent))
        return tree


def mix(matrix: ArrayLike, stacked: PyTree) -> PyTree:
    """Gives agent i the sum over j of `matrix[i, j]` times the leaves of agent j.

    Args:
        matrix: [A, A], e.g. `ring(8).mixing_matrix()`.
        stacked: leaves [A, ...]. Narrow floats are summed in float32; integer, bool and None
            leaves stay as they are.

    Returns:
        As `stacked`, dtypes kept.

    Raises:
        ValueError: the matrix is not [A, A] for the leaves' A.
    """
    size = trees.leading_size(stacked)
    shape = np.shape(matrix)
    if shape != (size, size):
        given = shape if shape else f"a {type(matrix).__name__}"
        raise ValueError(
            f"the matrix must be [A, A] with A = {size}, the leading axis of the leaves, such as "
            f"topology.mixing_matrix(); got {given}"
        )

    def leaf(x: Array) -> Array:
        if not trees.is_inexact(x):
            return x
        return _weighted(jnp.asarray(matrix), jnp.asarray(x)).astype(x.dtype)

    return jax.tree.map(leaf, stacked)


def kind_of(collection: str) -> str:
    """The kind of message, see `Message`, that carries a collection of variables."""
    return "parameters" if collection == "params" else "statistics"


def neighbour_slots(adjacency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The neighbourhoods as a table.

    Returns:
        `(slots, valid)`, int32 and bool [A, 1 + largest degree]: row i lists agent i, then the
        agents it receives from, ascending; where there are fewer it repeats i, and `valid` is
        False.
    """
    rows = [[i, *np.flatnonzero(row)] for i, row in enumerate(adjacency)]
    width = max(map(len, rows))
    slots = np.array([row + [row[0]] * (width - len(row)) for row in rows], np.int32)
    valid = np.array([[s < len(row) for s in range(width)] for row in rows])
    return slots, valid


def _weighted(rows: Array, arrived: Array) -> Array:
    """The sums of what arrived, [A, ...], by rows of weights [k, A]: [k, ...], float32 or wider.

    Zero times infinity is NaN: what an agent that diverged, or lies, sends must reach those alone
    who weigh it, who get NaN.
    """
    if not trees.is_inexact(arrived):
        return jnp.zeros((len(rows), *arrived.shape[1:]), arrived.dtype)
    arrived = arrived.astype(trees.wide(arrived.dtype))
    rows = rows.astype(arrived.dtype)

    def sums(weights: Array, values: Array) -> Array:
        return jnp.tensordot(weights, values, axes=1, precision=jax.lax.Precision.HIGHEST)

    def guarded(broken: Array) -> Array:
        hit = sums((rows != 0).astype(jnp.float32), broken.astype(jnp.float32)) > 0
        return jnp.where(hit, jnp.nan, sums(rows, jnp.where(broken, 0, arrived)))

    broken = ~jnp.isfinite(arrived)
    return jax.lax.cond(jnp.any(broken), guarded, lambda broken: sums(rows, arrived), broken)


def _in_range(merged: PyTree, models: PyTree) -> PyTree:
    """`merged`, with statistics and moments clipped to the range of the models', [M, ...]."""

    def leaf(path: tuple[Any, ...], x: Array, several: Array) -> Array:
        under = {str(getattr(key, "key", "")) for key in path[:2]}
        if not (under & {"batch_stats", "moments"} and trees.is_inexact(x)):
            return x
        return jnp.clip(x, jnp.nanmin(several, axis=0), jnp.nanmax(several, axis=0))

    return jax.tree_util.tree_map_with_path(leaf, merged, models)


def _size(tree: PyTree) -> float:
    """Bytes of one agent's floating leaves, of leaves [k, ...]."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)]
    return trees.num_bytes(floating) / trees.leading_size(tree) if floating else 0.0
