"""Plans of what goes wrong: who is absent, late or Byzantine, and which messages are lost.

    plan = faults.parse("dropout(p=0.2, rounds=2) | lost(p=0.1)", num_agents=8)
    now = plan.sample(key, time)

A plan is a pure function of a key and the time, so that a run can be repeated, resumed, and read
off again when it is over (`describe`). Plans are joined by `|`: an agent is awake if it is in all
of them, and late, lost or Byzantine if it is in one.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random, spec
from mixlab.agents import attacks
from mixlab.agents.network import Network
from mixlab.types import Array, ArrayLike, Key

_MOST_LINES = 20
_MOST_NAMES = 8


class Fault(NamedTuple):
    """What goes wrong at one time.

    Attributes:
        awake: bool [A], who takes part: the others neither train nor send nor receive, and keep
            what they have.
        late: bool [A], of whom the others see what it last sent on time.
        lost: bool [A, A], whether agent i does not receive from agent j; False on the diagonal.
        byzantine: bool [A], who sends, or trains on, something else than it should.
    """

    awake: Array
    late: Array
    lost: Array
    byzantine: Array


@dataclasses.dataclass(frozen=True)
class Faults:
    """A plan of faults, made by the functions of this module.

    Attributes:
        num_agents: A.
        parts: `(key, time) -> Fault`, each with what one kind of fault does.
        any_absent: whether agents may ever be absent; where False, `awake` is always True, and
            nothing need be compiled for it. The same holds for the next three.
        any_late: whether agents may be late.
        any_lost: whether messages may be lost.
        any_byzantine: whether there are Byzantine agents.
        attack: what they send, or None where they send what they should.
        data_attack: what they do to their batches, or None.
    """

    num_agents: int
    parts: tuple[Callable[[Key, Array], Fault], ...] = ()
    any_absent: bool = False
    any_late: bool = False
    any_lost: bool = False
    any_byzantine: bool = False
    attack: attacks.Attack | None = None
    data_attack: attacks.DataAttack | None = None

    def __bool__(self) -> bool:
        """Whether anything may go wrong."""
        return bool(self.parts)

    def __or__(self, other: "Faults") -> "Faults":
        """Both plans at once.

        Raises:
            ValueError: they are for different numbers of agents, or both have Byzantine agents.
        """
        if self.num_agents != other.num_agents:
            raise ValueError(
                f"plans for {self.num_agents} and for {other.num_agents} agents cannot be joined"
            )
        if self.any_byzantine and other.any_byzantine:
            raise ValueError("a plan has Byzantine agents of one kind: name byzantine(...) once")
        return Faults(
            self.num_agents,
            self.parts + other.parts,
            self.any_absent or other.any_absent,
            self.any_late or other.any_late,
            self.any_lost or other.any_lost,
            self.any_byzantine or other.any_byzantine,
            self.attack or other.attack,
            self.data_attack or other.data_attack,
        )

    def sample(self, key: Key, time: ArrayLike) -> Fault:
        """What goes wrong at a time.

        Args:
            key: the key of the run, the same at all times.
            time: int32, the round, counted from 0; may be traced. Before it nothing goes wrong.
        """
        time = jnp.asarray(time, jnp.int32)
        found = _fault(self.num_agents)
        for i, part in enumerate(self.parts):
            one = part(jax.random.fold_in(key, i), time)
            found = Fault(
                found.awake & one.awake,
                found.late | one.late,
                found.lost | one.lost,
                found.byzantine | one.byzantine,
            )
        begun, between_two = time >= 0, ~jnp.eye(self.num_agents, dtype=bool)
        return Fault(
            found.awake | ~begun,
            found.late & found.awake & begun,
            found.lost & between_two & begun,
            found.byzantine & begun,
        )

    def strike(
        self, network: Network, key: Key, time: ArrayLike, *, by_step: bool, push: bool
    ) -> Network:
        """A network as this plan leaves it: weights normalised anew over what arrives.

        Args:
            network: one in which all is well.
            key: as for `sample`.
            time: int32, the round; may be traced.
            by_step: whether agents communicate in every step of the round. Who is absent, late or
                Byzantine is the same in all of them; messages are lost anew in each.
            push: whether weights are those of push-sum, see `renormalise_columns`.
        """
        if not self:
            return network
        fault = self.sample(key, time)
        lost = self.sample(network.key, network.time).lost if by_step else fault.lost
        # Of push-sum, stale shares would make mass, and who only receives would gather it all: one
        # that is late exchanges nothing.
        apart = (fault.late | fault.late[:, None]) & push
        settle = renormalise_columns if push else renormalise
        addressed = (network.weights > 0) & fault.awake & fault.awake[:, None]
        return dataclasses.replace(
            network,
            weights=settle(network.weights, fault.awake, lost | apart),
            awake=fault.awake if self.any_absent else None,
            late=fault.late if self.any_late and not push else None,
            lost=lost & addressed & ~apart if self.any_lost else None,
            byzantine=fault.byzantine if self.any_byzantine else None,
            attack=self.attack,
        )

    def describe(
        self, key: Key, rounds: int, edges: ArrayLike | None = None, *, by_step: bool = False
    ) -> str:
        """Says what went wrong in rounds 0 to `rounds - 1`, for people.

        Args:
            key: as for `sample`.
            rounds: how many.
            edges: bool [A, A], whether agent i receives from agent j: the messages that could be
                lost. Default: between all pairs.
            by_step: whether agents communicate in every step of the rounds, and messages are lost
                anew in each. These are too many to be drawn again: they are not counted.

        Returns:
            a line on the whole, and one for every stretch of rounds with the same agents absent
            or late.
        """
        return _account(self, key, rounds, edges, by_step)


def none(num_agents: int) -> Faults:
    """Nothing goes wrong."""
    return Faults(num_agents)


def dropout(num_agents: int, p: float, *, rounds: int = 1) -> Faults:
    """Agents drop out at random and return later, with what they had.

    Args:
        num_agents: A.
        p: the probability that an agent is absent, drawn anew for every agent and block of rounds.
        rounds: the length of a block.

    Raises:
        ValueError: p is no probability, or the block has no rounds.
    """
    _check_probability(p, "dropout")
    if rounds < 1:
        raise ValueError(f"dropout lasts for at least 1 round, got rounds={rounds}")

    def part(key: Key, time: Array) -> Fault:
        absent = random.uniform(jax.random.fold_in(key, time // rounds), (num_agents,)) < p
        return _fault(num_agents)._replace(awake=~absent)

    return Faults(num_agents, (part,), any_absent=True)


def crash(
    num_agents: int, fraction: float = 0.2, *, at: int = 0, back: int | None = None
) -> Faults:
    """Some agents, chosen by the key, fail together.

    Args:
        num_agents: A.
        fraction: of the agents, in (0, 1]; rounded to the nearest number, and at least one.
        at: the first round without them.
        back: the first round in which they are there again. Default: never.

    Raises:
        ValueError: the fraction is out of range, or `back` is not after `at`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"crash takes a fraction in (0, 1], got {fraction}")
    _check_span(at, back, "crash", "at", "back")
    count = max(round(fraction * num_agents), 1)

    def part(key: Key, time: Array) -> Fault:
        absent = _some(key, num_agents, count) & _within(time, at, back)
        return _fault(num_agents)._replace(awake=~absent)

    return Faults(num_agents, (part,), any_absent=True)


def absent(
    num_agents: int, agents: Sequence[int], *, start: int = 0, stop: int | None = None
) -> Faults:
    """Given agents are absent from round `start` until before round `stop`, or for good.

    Raises:
        ValueError: there is no such agent, or `stop` is not after `start`.
    """
    who = _mask(num_agents, agents, "absent")
    _check_span(start, stop, "absent", "start", "stop")

    def part(key: Key, time: Array) -> Fault:
        return _fault(num_agents)._replace(awake=~(jnp.asarray(who) & _within(time, start, stop)))

    return Faults(num_agents, (part,), any_absent=True)


def late(num_agents: int, p: float) -> Faults:
    """Stragglers: in every round each agent is late with probability p.

    Raises:
        ValueError: p is no probability.
    """
    _check_probability(p, "late")

    def part(key: Key, time: Array) -> Fault:
        drawn = random.uniform(jax.random.fold_in(key, time), (num_agents,)) < p
        return _fault(num_agents)._replace(late=drawn)

    return Faults(num_agents, (part,), any_late=True)


def lost(num_agents: int, p: float, *, symmetric: bool = False) -> Faults:
    """Every message of every round is lost with probability p.

    Args:
        num_agents: A.
        p: the probability.
        symmetric: whether what fails is the link between two agents, in both directions at once,
            which keeps symmetric mixing matrices symmetric. Default: each message on its own.

    Raises:
        ValueError: p is no probability.
    """
    _check_probability(p, "lost")

    def part(key: Key, time: Array) -> Fault:
        shape = (num_agents, num_agents)
        drawn = random.uniform(jax.random.fold_in(key, time), shape) < p
        if symmetric:
            drawn = jnp.triu(drawn, 1)
            drawn = drawn | drawn.T
        return _fault(num_agents)._replace(lost=drawn)

    return Faults(num_agents, (part,), any_lost=True)


def byzantine(
    num_agents: int,
    count: int | None = None,
    *,
    agents: Sequence[int] | None = None,
    attack: str | attacks.Attack | attacks.DataAttack,
) -> Faults:
    """Some agents are Byzantine, the same ones in every round.

    Args:
        num_agents: A.
        count: how many, chosen by the key.
        agents: which, instead of `count`.
        attack: what they do, see `mixlab.agents.attacks`: `"alie"`, `"ipm(tau=0.1)"`, ...

    Raises:
        ValueError: the attack is unknown, not one of `count` and `agents` is given, there are
            not so many agents, or not these, or none is left that is honest.
    """
    if (count is None) == (agents is None):
        raise ValueError("byzantine takes either count= or agents=, one and not both")
    if count is not None and not 0 <= count <= num_agents:
        raise ValueError(f"byzantine takes a count of 0 to {num_agents} agents, got {count}")
    if count is not None and count != int(count):
        raise ValueError(f"byzantine takes a whole number of agents, got {count}")
    given = None if agents is None else _mask(num_agents, agents, "byzantine")
    if count == num_agents or (given is not None and given.all()):
        raise ValueError(f"byzantine(...) leaves none of {num_agents} agents honest; name fewer")
    made = attacks.parse(attack)

    def part(key: Key, time: Array) -> Fault:
        who = _some(key, num_agents, count or 0) if given is None else jnp.asarray(given)
        return _fault(num_agents)._replace(byzantine=who)

    return Faults(
        num_agents,
        (part,),
        any_byzantine=True,
        attack=made if isinstance(made, attacks.Attack) else None,
        data_attack=made if isinstance(made, attacks.DataAttack) else None,
    )


def renormalise(weights: Array, awake: Array, lost: Array) -> Array:
    """Mixing weights without what does not arrive; its weight goes to the receiver's own model.

    Rows still sum to one. A doubly stochastic matrix remains so if what is lost is symmetric. The
    row of an absent agent is that of the identity.

    Args:
        weights: [A, A], row i being what agent i receives.
        awake: bool [A].
        lost: bool [A, A], whether agent i does not receive from agent j.
    """
    itself = jnp.eye(len(awake), dtype=bool)
    arrived = jnp.where((awake & ~lost) | itself, weights, 0)
    kept = arrived + jnp.diag(jnp.sum(weights - arrived, axis=1))
    return jnp.where(awake[:, None], kept, itself.astype(weights.dtype))


def renormalise_columns(weights: Array, awake: Array, lost: Array) -> Array:
    """As `renormalise` for push-sum: a share that cannot be sent stays with its sender.

    Columns still sum to one, so that no mass is lost. A sender must learn what did not arrive.

    Args:
        weights: [A, A], column j being how agent j shares out what it has.
        awake: bool [A].
        lost: bool [A, A], whether agent i does not receive from agent j.
    """
    return renormalise(weights.T, awake, lost.T).T


FAULTS: dict[str, Callable[..., Faults]] = {
    make.__name__: make for make in (absent, byzantine, crash, dropout, late, lost, none)
}
"""Every kind of fault by its name."""


def parse(text: str | Faults, num_agents: int) -> Faults:
    """Builds a plan from text such as `"dropout(p=0.2) | byzantine(count=3, attack=alie())"`.

    Args:
        text: kinds of faults, joined by `|`; they are called without `num_agents`. An empty text
            is `none`. A plan passes through.
        num_agents: A.

    Raises:
        ValueError: an unknown name, or arguments out of range; the plan is for another number of
            agents.
        TypeError: an argument that a kind does not take.
    """
    if isinstance(text, Faults):
        return none(num_agents) | text
    if not text.strip():
        return none(num_agents)
    vocabulary = {name: functools.partial(make, num_agents) for name, make in FAULTS.items()}
    made = spec.parse(text, {**attacks.ATTACKS, **vocabulary}, combine=_together)
    return _together(made)


def _together(*plans: Faults) -> Faults:
    for plan in plans:
        if not isinstance(plan, Faults):
            raise ValueError(
                f"{plan.name} is an attack, not a kind of fault; give it to byzantine(attack=...)"
            )
    return functools.reduce(lambda a, b: a | b, plans)


def _fault(num_agents: int) -> Fault:
    """Nothing goes wrong."""
    nobody = jnp.zeros(num_agents, bool)
    return Fault(~nobody, nobody, jnp.zeros((num_agents, num_agents), bool), nobody)


def _some(key: Key, num_agents: int, count: int) -> Array:
    """Bools [A], `count` of them True."""
    return jnp.argsort(jnp.argsort(random.uniform(key, (num_agents,)))) < count


def _within(time: Array, start: int, stop: int | None) -> Array:
    return (time >= start) if stop is None else (time >= start) & (time < stop)


def _mask(num_agents: int, agents: Sequence[int], what: str) -> np.ndarray:
    if isinstance(agents, int):
        raise ValueError(f"{what} takes a list of agents, such as agents=[{agents}]; got {agents}")
    outside = [agent for agent in agents if not 0 <= agent < num_agents]
    if outside:
        raise ValueError(f"{what}: agents are 0 to {num_agents - 1}, got {outside}")
    return np.isin(np.arange(num_agents), np.asarray(agents, int))


def _check_probability(p: float, what: str) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{what} takes a probability p in [0, 1], got {p}")


def _check_span(start: int, stop: int | None, what: str, first: str, last: str) -> None:
    if stop is not None and stop <= start:
        raise ValueError(f"{what} needs {last} after {first}, got {first}={start}, {last}={stop}")


def _account(plan: Faults, key: Key, rounds: int, edges: ArrayLike | None, by_step: bool) -> str:
    if not plan or rounds < 1:
        return f"{rounds} rounds without faults"
    num_agents = plan.num_agents
    between = ~np.eye(num_agents, dtype=bool)
    if edges is not None:
        between &= np.asarray(edges, bool)

    def one(time: Array) -> tuple[Array, ...]:
        fault = plan.sample(key, time)
        sent = between & fault.awake & fault.awake[:, None]
        count, arrived = jnp.sum(sent), jnp.sum(sent & ~fault.lost)
        return ~fault.awake, fault.late, fault.byzantine, count, arrived

    # A round at a time: bools [A, A] of all rounds may not fit into memory.
    times = jnp.arange(rounds, dtype=jnp.int32)
    found = jax.jit(lambda times: jax.lax.map(one, times))(times)
    absent, late, bad, sent, arrived = map(np.asarray, found)
    whole = []
    if plan.any_byzantine:
        kinds = [attack.name for attack in (plan.attack, plan.data_attack) if attack]
        whole.append(f"{_names(bad[0])} Byzantine ({', '.join(kinds)})")
    turns = rounds * num_agents
    if plan.any_absent:
        whole.append(f"absent {absent.sum()} of {turns} times")
    if plan.any_late:
        whole.append(f"late {late.sum()} of {turns} times")
    if plan.any_lost and by_step:
        whole.append("messages lost anew in every step")
    elif plan.any_lost:
        whole.append(f"{(sent - arrived).sum()} of {sent.sum()} messages lost")
    lines = [f"faults in {rounds} rounds of {num_agents} agents: " + "; ".join(whole)]
    stretches = _stretches(np.concatenate([absent, late], axis=1))
    for start, stop in stretches[:_MOST_LINES]:
        what = [
            f"{_names(who[start])} {how}"
            for who, how in ((absent, "absent"), (late, "late"))
            if who[start].any()
        ]
        when = f"round {start}" if stop == start + 1 else f"rounds {start} to {stop - 1}"
        lines.append(f"{when}: {', '.join(what)}")
    if len(stretches) > _MOST_LINES:
        left = sum(stop - start for start, stop in stretches[_MOST_LINES:])
        lines.append(f"and {left} more rounds in which agents were absent or late")
    return "\n".join(lines)


def _stretches(rows: np.ndarray) -> list[tuple[int, int]]:
    """Where rows `[T, n]` of bools remain the same: `(start, stop)`, without all-False ones."""
    changes = np.flatnonzero(np.any(rows[1:] != rows[:-1], axis=1)) + 1
    bounds = [0, *changes.tolist(), len(rows)]
    spans = itertools.pairwise(bounds)
    return [(start, stop) for start, stop in spans if rows[start].any()]


def _names(who: np.ndarray) -> str:
    agents = np.flatnonzero(who)
    if len(agents) == 1:
        return f"agent {agents[0]}"
    listed = ", ".join(map(str, agents[:_MOST_NAMES]))
    more = f" and {len(agents) - _MOST_NAMES} others" if len(agents) > _MOST_NAMES else ""
    return f"agents {listed}{more}" if len(agents) else "no agent"
