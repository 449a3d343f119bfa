"""Methods that decide entry by entry whose change of the base to take over."""

import jax
import jax.numpy as jnp

from mixlab.merge import chains, core, stages
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree

_KL_FLOOR = 1e-8


def arcee_fusion() -> core.MergeMethod:
    """Arcee fusion: takes over the most important changes of one model, leaf by leaf.

    The importance of an entry is `|theta - theta_base| KL(softmax theta || softmax theta_base)`,
    the divergence being of the row (last axis) that it lies in. An entry is taken over where its
    importance reaches `median + 1.5 (q3 - q1)` of its leaf; the quartiles are the entries at
    `int(q (n - 1))` of the n sorted ones. These are mergekit's rules, except that mergekit
    estimates the quartiles of leaves above a million entries from a random sample: here they are
    exact. A scalar is a row of one, whose divergence is zero: it is taken over.

    The plan holds each leaf's threshold, as a scalar. Merges one model into its `base=`; without
    a base, the second of two models into the first.

    Raises:
        ValueError: there are not two models, the base among them.
        TypeError: a leaf is complex.

    Source: Arcee AI 2024, "Arcee Fusion", as in mergekit.
    """

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        pairs = _pair(core.open_models(models, base), "arcee_fusion")

        def threshold(name: str, pair: tuple[Array, Array]) -> Array:
            scores = jnp.sort(_importance(*pair)[0], axis=None)
            if not scores.size:
                return jnp.zeros((), scores.dtype)
            q1, median, q3 = (scores[int(q * (scores.size - 1))] for q in (0.25, 0.5, 0.75))
            return median + 1.5 * (q3 - q1)

        return {"threshold": pairs.each(threshold)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, pair: tuple[Array, Array]) -> Array:
            origin, changed = pair
            limit = plan["threshold"][name].astype(origin.dtype)
            importance, lost = _importance(origin, changed)
            merged = jnp.where(importance >= limit, changed, origin)
            return jnp.where(lost, jnp.nan, merged)

        opened = core.open_models(models, base)
        return opened.write(_pair(opened, "arcee_fusion").map(merge).read)

    return core.MergeMethod(measure, combine)


def nearswap(t: ArrayLike) -> core.MergeMethod:
    """Nearswap: moves towards another model where the two are near.

    An entry moves the share `min(1, t / |theta - theta_base|)` of its way, that is by `t` at
    most: to the other model where the two differ by `t` or less.

    The plan holds `t`. Merges one model into its `base=`; without a base, the second of two
    models into the first.

    Args:
        t: how near is near, above 0; may be traced.

    Raises:
        ValueError: `t` is not positive and finite, or there are not two models, the base among
            them.
        TypeError: a leaf is complex.

    Source: alchemonaut 2024, "QuartetAnemoi-70B-t0.0001"; mergekit's rule.
    """
    core.check_number(t, "t", 0.0)
    if not isinstance(t, jax.core.Tracer) and t == 0:
        raise ValueError("t is the distance that counts as near and must be above 0, got 0")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        _pair(core.open_models(models, base), "nearswap")
        return {"t": jnp.asarray(t, float)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        def merge(name: str, pair: tuple[Array, Array]) -> Array:
            origin, other = pair
            near = plan["t"].astype(origin.dtype)
            distance = jnp.abs(origin - other)
            share = jnp.where(distance > near, near / jnp.where(distance > near, distance, 1), 1)
            return share * other + (1 - share) * origin

        opened = core.open_models(models, base)
        return opened.write(_pair(opened, "nearswap").map(merge).read)

    return core.MergeMethod(measure, combine)


def ram(epsilon: ArrayLike = 1e-5) -> core.MergeMethod:
    """RAM: averages an entry over the models that changed it, and only over those.

    The chain `threshold(epsilon) | reduce("mean")`: reinforcement learning changes few entries,
    and what a single model changed is taken over whole instead of divided by M. mergekit's `ram`.

    Args:
        epsilon: changes up to this magnitude do not count; not negative, may be traced.

    Raises:
        ValueError: epsilon is negative or not finite, or there is no base.
        TypeError: a leaf is complex.

    Source: Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models" (RAM).
    """
    return chains.chain(threshold(epsilon), stages.reduce("mean"))


def ram_plus(
    r: ArrayLike = 0.1,
    alpha: ArrayLike = 0.2,
    epsilon: ArrayLike = 1e-5,
    *,
    scope: str = "model",
) -> core.MergeMethod:
    """RAM+: RAM that amplifies what only one model changed, the more the more it shares.

    The chain `threshold(epsilon) | reinforce(r, alpha, scope=scope) | reduce("mean")`.
    `scope="leaf"` is mergekit's `ramplus_tl`.

    Args:
        r: strength of the amplification; may be traced.
        alpha: the largest ratio of shared to unique changes that counts, not negative; may be
            traced.
        epsilon: changes up to this magnitude do not count; not negative, may be traced.
        scope: count over the whole `"model"` or within each `"leaf"`.

    Raises:
        ValueError: a number is out of range, the scope is unknown, or there is no base.
        TypeError: a leaf is complex.

    Source: Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models" (RAM).
    """
    return chains.chain(threshold(epsilon), reinforce(r, alpha, scope=scope), stages.reduce("mean"))


def threshold(epsilon: ArrayLike) -> chains.Stage:
    """Sets the entries whose magnitude does not exceed `epsilon` to zero.

    Args:
        epsilon: not negative; may be traced.

    Raises:
        ValueError: epsilon is negative or not finite.
        TypeError: a leaf is complex.
    """
    core.check_number(epsilon, "epsilon", 0.0)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        return {"epsilon": jnp.asarray(epsilon, float)}

    def apply(plan: Plan, name: str, taus: chains.TaskVectors) -> chains.TaskVectors:
        values = taus.values
        core.check_real(name, values.dtype, "threshold")
        keep = jnp.abs(values) > plan["epsilon"].astype(values.dtype)
        return taus._replace(values=jnp.where(keep, values, 0))

    return chains.Stage("threshold", measure, apply)


def reinforce(r: ArrayLike, alpha: ArrayLike = 0.2, *, scope: str = "model") -> chains.Stage:
    """Amplifies the entries that only one task vector has, by how much it shares elsewhere.

    An entry is shared where two or more task vectors are not zero, and unique where one is. The
    unique entries of a task vector are multiplied by `1 + r min(alpha, shared / unique)`, the
    ratio being that of its numbers of such entries.

    Args:
        r: strength; may be traced.
        alpha: the largest ratio that counts, not negative; may be traced.
        scope: count over the whole `"model"` or within each `"leaf"`.

    Raises:
        ValueError: a number is out of range, or the scope unknown.

    Source: Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models" (RAM).
    """
    core.check_number(r, "r")
    core.check_number(alpha, "alpha", 0.0)
    core.check_choice(scope, "scope", ("model", "leaf"))

    def counts(name: str, taus: chains.TaskVectors) -> Array:
        says = taus.values.reshape(len(taus.values), -1) != 0
        owners = jnp.sum(says, axis=0)
        kinds = (says & (owners > 1), says & (owners == 1))
        return jnp.stack([jnp.sum(kind, axis=1) for kind in kinds]).astype(jnp.uint32)

    def measure(leaves: core.Leaves, key: Key | None) -> Plan:
        def factors(part: core.Leaves) -> Array:
            shared, unique = part.total(counts, jnp.zeros((2, leaves.num_models), jnp.uint32))
            # Without unique entries the ratio multiplies nothing.
            ratio = shared.astype(float) / jnp.maximum(unique, 1).astype(float)
            return 1 + jnp.asarray(r, float) * jnp.minimum(ratio, jnp.asarray(alpha, float))

        if scope == "model":
            return {"factors": factors(leaves)}
        return {"factors": {name: factors(leaves.only(name)) for name in leaves.specs}}

    def apply(plan: Plan, name: str, taus: chains.TaskVectors) -> chains.TaskVectors:
        factors = plan["factors"] if scope == "model" else plan["factors"][name]
        unique = jnp.sum(taus.values != 0, axis=0) == 1
        scaled = taus.values * core.along_models(factors, taus.values)
        return taus._replace(values=jnp.where(unique, scaled, taus.values))

    return chains.Stage("reinforce", measure, apply)


def _pair(opened: core.Models, what: str) -> core.Leaves:
    """Leaves that read as (the model that is changed, the model that it takes from)."""
    expected = 2 if opened.base is None else 1
    if opened.leaves.num_models != expected:
        raise ValueError(
            f"{what} merges one model into its base: give one model and base=, or two models of "
            f"which the first is the base; got {opened.leaves.num_models} models "
            f"{'without' if opened.base is None else 'and'} base="
        )

    def pair(name: str, stacked: Array) -> tuple[Array, Array]:
        core.check_real(name, stacked.dtype, what)
        return (stacked[0] if opened.base is None else opened.base.read(name)), stacked[-1]

    return opened.leaves.map(pair)


def _importance(origin: Array, changed: Array) -> tuple[Array, Array]:
    """How important changes are, and where one of the two is NaN."""
    stacked, origin, lost = core.without_nan(changed[None], origin)
    changed = stacked[0]
    if not origin.size:
        return origin, lost
    rows = (x.reshape(x.shape or (1,)) for x in (changed, origin))
    p, q = (jax.nn.softmax(x, axis=-1) + _KL_FLOOR for x in rows)
    divergence = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True)
    shape = (*origin.shape[:-1], *[1] * (origin.ndim > 0))
    return jnp.abs(changed - origin) * divergence.reshape(shape), lost
