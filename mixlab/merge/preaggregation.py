"""Models mixed with one another before they are merged, so that faulty ones weigh less.

    merge.nnm(2) | merge.krum(2)
    merge.parse("clipping(radius=2.0) | nnm(2) | trimmed_mean(2)")

A pre-aggregation makes M' models of M: each is the base plus a weighted sum of the task vectors.
What follows it after `|` merges these in the place of those.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.merge import core, geometry
from mixlab.merge.robust import check_enough, check_faulty, check_positive
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


@dataclass(frozen=True)
class PreAggregation:
    """A way to mix models before they are merged.

    Attributes:
        measure: `(task vectors, key) -> weights [M', M]`; maps and adds over leaves.
    """

    measure: Callable[[core.Leaves, Key | None], Array]

    def __call__(
        self, models: PyTree, *, base: PyTree | None = None, key: Key | None = None
    ) -> list[PyTree]:
        """Mixes.

        Args:
            models: a list of M pytrees, or one stacked along a leading axis M.
            base: where the task vectors start from; by default from zero, as gradients do.
            key: a PRNG key, where it draws.

        Returns:
            M' models: structure, shapes and dtypes of one model.

        Raises:
            ValueError: the models or the base do not match; the message names the leaf.
        """
        taus = geometry.task_vectors(core.open_models(models, base))
        return _mixed(self.measure(taus, key), models, base)

    def __or__(self, then: Any) -> Any:
        """This, and then another pre-aggregation, or a method that merges what comes out.

        The plan of the method that results holds the `mixing` weights and the `method`'s plan. Its
        `measure` holds the mixed models in memory.
        """
        if isinstance(then, PreAggregation):
            return PreAggregation(lambda taus, key: self._followed(then, taus, key))
        if not isinstance(then, core.MergeMethod):
            return NotImplemented

        def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
            own_key, method_key = _split(key)
            taus = geometry.task_vectors(core.open_models(models, base))
            weights = self.measure(taus, own_key)
            plan = then.measure(_mixed(weights, models, base), base, method_key)
            return {"mixing": weights, "method": plan}

        def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
            return then.combine(plan["method"], _mixed(plan["mixing"], models, base), base)

        return core.MergeMethod(measure, combine)

    def _followed(self, then: "PreAggregation", taus: core.Leaves, key: Key | None) -> Array:
        own_key, then_key = _split(key)
        first = self.measure(taus, own_key)
        second = then.measure(_mix(first, taus), then_key)
        return jnp.matmul(second, first, precision="highest")


def nnm(num_byzantine: int) -> PreAggregation:
    """Nearest neighbour mixing: every model becomes the mean of the n - f nearest to it.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large.

    Source: Allouah et al. 2023, "Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity", algorithm 2.
    """
    check_faulty(num_byzantine)

    def measure(taus: core.Leaves, key: Key | None) -> Array:
        check_enough(taus.num_models, num_byzantine, "nnm", 2, 1)
        distances = geometry.squared_distances(taus)
        return geometry.nearest_weights(distances, taus.num_models - num_byzantine)

    return PreAggregation(measure)


def clipping(radius: ArrayLike = 2.0) -> PreAggregation:
    """Shortens every task vector that is longer than `radius` to that length.

    Args:
        radius: above 0; may be traced.

    Raises:
        ValueError: the radius is out of range.

    Source: the static clipping of ByzFL, whose default radius this is.
    """
    check_positive(radius, "radius")

    def measure(taus: core.Leaves, key: Key | None) -> Array:
        squares = _squares(taus)
        return jnp.diag(_factors(squares, jnp.square(jnp.asarray(radius, squares.dtype))))

    return PreAggregation(measure)


def arc(num_byzantine: int) -> PreAggregation:
    """Adaptive robust clipping: shortens the longest task vectors to the length of the next one.

    The longest are `floor(2 f (n - f) / n)` of the n.

    Args:
        num_byzantine: f, how many models may be faulty; n >= 2f + 1.

    Raises:
        ValueError: f is not an integer of at least 0; at the merge: it is too large.

    Source: Allouah et al. 2025, "Adaptive Gradient Clipping for Robust Federated Learning",
    algorithm 2.
    """
    check_faulty(num_byzantine)

    def measure(taus: core.Leaves, key: Key | None) -> Array:
        num_models = taus.num_models
        check_enough(num_models, num_byzantine, "arc", 2, 1)
        longest = 2 * num_byzantine * (num_models - num_byzantine) // num_models
        squares = _squares(taus)
        return jnp.diag(_factors(squares, jnp.sort(squares)[num_models - longest - 1]))

    return PreAggregation(measure)


def bucketing(size: int = 2) -> PreAggregation:
    """Means of buckets of `size` models, drawn at random without replacement; the last may be less.

    Of the ceil(n / size) means no more are faulty than of the n models. Needs a key.

    Args:
        size: at least 1.

    Raises:
        ValueError: the size is below 1; at the merge: there is no key.

    Source: Karimireddy et al. 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing", algorithm 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")

    def measure(taus: core.Leaves, key: Key | None) -> Array:
        if key is None:
            raise ValueError(
                "bucketing is random: give the merge a key=, such as jax.random.key(0)"
            )
        num_models = taus.num_models
        bucket = np.arange(num_models) // size
        shares = np.equal.outer(np.arange(bucket[-1] + 1), bucket)
        weights = jnp.asarray(shares / shares.sum(axis=1, keepdims=True), float)
        return weights[:, jax.random.permutation(key, num_models)]

    return PreAggregation(measure)


def _mix(weights: Array, taus: core.Leaves) -> core.Leaves:
    """Weighted sums `[M', ...]` of task vectors, by rows of weights `[M', M]`."""
    mixed = taus.map(lambda _, x: jax.vmap(geometry.mixture, (0, None))(weights, x))
    return core.Leaves(mixed.specs, len(weights), mixed.read)


def _mixed(weights: Array, models: PyTree, base: PyTree | None) -> list[PyTree]:
    opened = core.open_models(models, base)
    mixed = _mix(weights, geometry.task_vectors(opened))

    def leaf(name: str) -> Array:
        return (
            mixed.read(name) if opened.base is None else opened.base.read(name) + mixed.read(name)
        )

    stacked = opened.write(leaf, several=len(weights))
    return [jax.tree.map(lambda x: x[i], stacked) for i in range(len(weights))]  # noqa: B023


def _squares(taus: core.Leaves) -> Array:
    """The squared lengths `[M]`; infinite where one is not finite."""

    def leaf(name: str, stacked: Array) -> Array:
        flat = jnp.abs(stacked.reshape(taus.num_models, -1))
        return jnp.sum(jnp.square(flat), axis=1).astype(float)

    total = taus.total(leaf, jnp.zeros(taus.num_models, float))
    return jnp.where(jnp.isfinite(total), total, jnp.inf)


def _factors(squares: Array, limit: Array) -> Array:
    """What shortens vectors of squared lengths `[M]` to the square root of `limit`, if longer."""
    # The larger of the two, and never zero, nor its square root: so that zero vectors have a
    # gradient.
    larger = jnp.maximum(squares, limit)
    ratio = limit / jnp.where(larger > 0, larger, 1)
    shortens = ratio > 0
    return jnp.where(shortens, jnp.sqrt(jnp.where(shortens, ratio, 1)), 0)


def _split(key: Key | None) -> tuple[Key | None, Key | None]:
    if key is None:
        return None, None
    first, second = jax.random.split(key)
    return first, second
