"""Who holds which examples.

A partition is a list of sorted int64 arrays, one an agent, disjoint and together all indices of the
data; every agent holds at least one example. The same arguments give the same partition.
"""

import inspect
import random
from collections.abc import Callable

import numpy as np

from mixlab import spec

Partition = list[np.ndarray]


def iid(
    labels: np.ndarray, num_agents: int, seed: int | None = 0, *, stratified: bool = False
) -> Partition:
    """Every agent holds a random share; the sizes differ by at most one.

    Args:
        labels: int [N].
        num_agents: A, at most N.
        seed: non-negative; `None` deals out the examples in the order of the data.
        stratified: deal out class by class, so that every agent's share of each class is the same
            to within one example. With `seed=None` this is DIMAT's IID partition.

    Raises:
        ValueError: more agents than examples, or labels that are no vector of ints.
    """
    labels = _checked(labels, num_agents)
    order = (
        np.arange(len(labels))
        if seed is None
        else np.random.default_rng(seed).permutation(len(labels))
    )
    if not stratified:
        return _sorted(np.array_split(order, num_agents))
    parts: list[list[np.ndarray]] = [[] for _ in range(num_agents)]
    first = 0  # The agent at which a class begins its round, so that remainders even out.
    for k in np.unique(labels):
        own = order[labels[order] == k]
        for i, block in enumerate(np.array_split(own, num_agents)):
            parts[(first + i) % num_agents].append(block)
        first = (first + len(own)) % num_agents
    return _sorted([np.concatenate(blocks) for blocks in parts])


def by_class(labels: np.ndarray, num_agents: int, seed: int | None = 0) -> Partition:
    """Each class goes whole to one agent: class c to agent c modulo A.

    With more agents than classes K, agent r holds a share of class r modulo K, and those who share
    a class split it evenly. This is the non-IID partition of DIMAT (Saadati et al. 2024).

    Args:
        labels: int [N].
        num_agents: A, at most N.
        seed: draws who gets which examples of a shared class; `None` gives consecutive blocks, as
            DIMAT does.

    Raises:
        ValueError: a class has fewer examples than agents that share it, or bad labels.
    """
    labels = _checked(labels, num_agents)
    classes = np.unique(labels)
    # More than one agent where the step, the number of classes, is below the number of agents.
    holders = [np.arange(i % num_agents, num_agents, len(classes)) for i in range(len(classes))]
    return _deal(labels, classes, holders, num_agents, seed)


def shards(
    labels: np.ndarray, num_agents: int, seed: int | None = 0, *, classes_per_agent: int = 2
) -> Partition:
    """Every agent holds examples of exactly k classes.

    Label skew in the manner of McMahan et al. 2017 (s. 3), but with exactly k classes: agent after
    agent takes k of the classes that the fewest have taken so far, ties at random, and those who
    share a class split it evenly.

    Args:
        labels: int [N].
        num_agents: A, at most N.
        seed: non-negative; `None` breaks ties and splits classes in the order of the data.
        classes_per_agent: k, at most the number of classes K; A k must be at least K.

    Raises:
        ValueError: k is out of range, a class would be left to nobody, a class has fewer examples
            than agents that share it, or bad labels.
    """
    labels = _checked(labels, num_agents)
    classes = np.unique(labels)
    k = classes_per_agent
    if not 1 <= k <= len(classes):
        raise ValueError(
            f"classes_per_agent must be in [1, {len(classes)}], the number of classes, got {k}"
        )
    if num_agents * k < len(classes):
        raise ValueError(
            f"{num_agents} agents of {k} classes each cannot hold {len(classes)} classes; give at "
            f"least classes_per_agent={-(-len(classes) // num_agents)}"
        )
    tie = np.zeros if seed is None else np.random.default_rng(seed).random
    held = np.zeros((num_agents, len(classes)), bool)
    for r in range(num_agents):
        fewest = np.lexsort((tie(len(classes)), held.sum(axis=0)))[:k]
        held[r, fewest] = True
    holders = [np.flatnonzero(column) for column in held.T]
    return _deal(labels, classes, holders, num_agents, seed)


def arcs(
    labels: np.ndarray, num_agents: int, seed: int = 0, *, arcs_per_agent: int = 2
) -> Partition:
    """Every agent holds a few arcs of the data sorted by label and closed to a circle.

    Agent after agent cuts its arcs, each from a random point of what is left. An arc may hold more
    than one class, so agents differ in how many they have. With a number of examples that the
    arcs divide, this is decentralizepy's k-shard partition.

    Args:
        labels: int [N].
        num_agents: A.
        seed: non-negative.
        arcs_per_agent: arcs a piece; A times as many are at most N.

    Raises:
        ValueError: more arcs than examples, or bad labels.
    """
    labels = _checked(labels, num_agents)
    total = num_agents * arcs_per_agent
    if not 1 <= total <= len(labels):
        raise ValueError(
            f"{num_agents} agents with arcs_per_agent={arcs_per_agent} need between 1 and "
            f"{len(labels)} arcs, the number of examples"
        )
    draw = random.Random(seed)
    left = np.argsort(labels, kind="stable")
    pieces = []
    for i in range(total):
        length = len(labels) // total + (i < len(labels) % total)
        start = draw.randint(0, len(left) - 1)
        pieces.append(np.take(left, range(start, start + length), mode="wrap"))
        left = left[~np.isin(left, pieces[-1])]
    each = range(0, total, arcs_per_agent)
    return _sorted([np.concatenate(pieces[i : i + arcs_per_agent]) for i in each])


def dirichlet(
    labels: np.ndarray,
    num_agents: int,
    seed: int = 0,
    *,
    alpha: float = 0.5,
    min_examples: int = 1,
    balanced: bool = False,
) -> Partition:
    """Each class is split among the agents in proportions drawn from Dirichlet(alpha).

    Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks", s. 4.
    Drawn anew until every agent has `min_examples`. With `balanced` and `min_examples` equal to the
    number of classes it gives decentralizepy's Dirichlet partition, draw for draw.

    Args:
        labels: int [N].
        num_agents: A, at most N.
        seed: non-negative.
        alpha: above 0; small is skewed (at 0.1 most agents hold few classes), large is even.
        min_examples: the fewest that an agent may hold, at least 1.
        balanced: agents that hold N / A examples or more get nothing of the classes that follow.

    Raises:
        ValueError: alpha or `min_examples` is out of range, a thousand draws left some agent with
            too few examples, or bad labels.
    """
    labels = _checked(labels, num_agents)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number above 0, got {alpha}")
    if not 1 <= min_examples <= len(labels) // num_agents:
        raise ValueError(
            f"min_examples must be in [1, {len(labels) // num_agents}] for {len(labels)} examples "
            f"and {num_agents} agents, got {min_examples}"
        )
    draw = np.random.default_rng(seed)
    for _ in range(1000):
        parts = _dirichlet_once(labels, num_agents, draw, alpha, balanced)
        if parts is not None and min(map(len, parts)) >= min_examples:
            return _sorted(parts)
    raise ValueError(
        f"none of 1000 Dirichlet draws with alpha={alpha} gave each of {num_agents} agents "
        f"min_examples={min_examples} or more; raise alpha, lower min_examples, or use fewer agents"
    )


def _dirichlet_once(
    labels: np.ndarray, num_agents: int, draw: np.random.Generator, alpha: float, balanced: bool
) -> Partition | None:
    """One draw; None where a class fell whole to agents that may hold no more."""
    parts = [np.empty(0, np.int64) for _ in range(num_agents)]
    for k in np.unique(labels):
        own = np.flatnonzero(labels == k)
        draw.shuffle(own)
        proportions = draw.dirichlet(np.full(num_agents, alpha))
        if balanced:
            sizes = np.array([len(part) for part in parts])
            proportions = proportions * (sizes < len(labels) / num_agents)
        total = proportions.sum()
        if total == 0:
            return None
        cuts = (np.cumsum(proportions / total) * len(own)).astype(int)[:-1]
        blocks = np.split(own, cuts)
        parts = [np.concatenate(pair) for pair in zip(parts, blocks, strict=True)]
    return parts


def counts(parts: Partition, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many examples of each class each agent holds: int64 [A, num_classes]."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


PARTITIONS: dict[str, Callable[..., Partition]] = {
    fn.__name__: fn for fn in (arcs, by_class, dirichlet, iid, shards)
}
"""Every partition by its name: `fn(labels, num_agents, seed, *, its options)`."""


def parse(text: str) -> Callable[[np.ndarray, int, int], Partition]:
    """The partition that `text` describes, as a function of `(labels, num_agents, seed)`.

    Args:
        text: one of `PARTITIONS` with its options: `"iid"`, `"shards(classes_per_agent=2)"`,
            `"dirichlet(alpha=0.1)"`.

    Raises:
        ValueError: the text names no partition or does not parse; of the function, also that it
            dealt to another number of agents.
        TypeError: the function takes no such option.
    """
    return spec.parse(text, {name: _with_options(fn) for name, fn in PARTITIONS.items()})


def _with_options(fn: Callable[..., Partition]) -> Callable[..., Callable[..., Partition]]:
    """Takes the keyword options of `fn` now and the data later."""

    def bind(**options: object) -> Callable[..., Partition]:
        def deal(labels: np.ndarray, num_agents: int, seed: int | None) -> Partition:
            parts = fn(labels, num_agents, seed, **options)
            if len(parts) != num_agents:
                raise ValueError(
                    f"{fn.__name__} dealt to {len(parts)} agents, there are {num_agents}"
                )
            return parts

        return deal

    own = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    bind.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return bind


def _checked(labels: np.ndarray, num_agents: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be ints [N], got {labels.dtype} {list(labels.shape)}")
    if not 1 <= num_agents <= len(labels):
        raise ValueError(
            f"{len(labels)} examples can be shared by 1 to {len(labels)} agents, got "
            f"num_agents={num_agents}"
        )
    return labels


def _deal(
    labels: np.ndarray,
    classes: np.ndarray,
    holders: list[np.ndarray],
    num_agents: int,
    seed: int | None,
) -> Partition:
    """Splits each class evenly among its holders."""
    order = (
        np.arange(len(labels))
        if seed is None
        else np.random.default_rng(seed).permutation(len(labels))
    )
    parts: list[list[np.ndarray]] = [[] for _ in range(num_agents)]
    for k, agents in zip(classes, holders, strict=True):
        own = order[labels[order] == k]
        if len(own) < len(agents):
            raise ValueError(
                f"class {k} has {len(own)} examples for {len(agents)} agents that share it; use "
                f"fewer agents or another partition"
            )
        for agent, block in zip(agents, np.array_split(own, len(agents)), strict=True):
            parts[agent].append(block)
    return _sorted([np.concatenate(blocks) for blocks in parts])


def _sorted(parts: Partition) -> Partition:
    return [np.sort(part) for part in parts]
