"""Merging weighted by curvature: what a model is sure of counts more."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mixlab import trees
from mixlab.merge import core
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


def fisher(
    weights: ArrayLike | None = None,
    floor: float = 1e-6,
    normalize: bool = False,
    *,
    floor_mode: str = "max",
) -> core.MergeMethod:
    """The mean of the models weighted by their Fisher information, entry by entry.

    `theta = sum_m c_m F_m theta_m / sum_m c_m F_m`. The method takes one more input,
    `fishers=`: a list of trees like the models, or one stacked tree, of diagonal Fishers, e.g.
    from `diagonal_fisher`. The plan holds the coefficients `c [M]` and the Fishers as they were
    given, so it takes no memory of its own. Where all Fishers are zero and the floor is too, an
    entry is the plain weighted mean.

    Args:
        weights: `[M]`, not negative, not all zero; only their ratios matter. Default: equal.
        floor: the least a Fisher can be, at least 0.
        normalize: divide `c_m` by the norm of the model's whole Fisher, taken before the floor.
        floor_mode: `"max"` raises every Fisher to the floor; `"first"` that of the first model
            only, so that it wins where no model is sure (the official code's
            `favor_target_model`); `"add"` adds the floor to every Fisher, and 1e-6 to its norm
            (FusionBench).

    Raises:
        ValueError: an argument is out of range, the Fishers are missing or do not match the
            models, or `normalize` meets a Fisher that is zero everywhere.
        TypeError: a leaf is complex.

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 3;
    floor and normalisation are those of the authors' code.
    """
    core.check_weights(weights, signed=False)
    core.check_finite(floor, "floor", 0.0)
    core.check_choice(floor_mode, "floor_mode", ("max", "first", "add"))

    def measure(
        models: PyTree,
        base: PyTree | None = None,
        key: Key | None = None,
        *,
        fishers: PyTree | None = None,
    ) -> Plan:
        leaves = core.open_models(models, base).leaves
        if fishers is None:
            raise ValueError("fisher needs the models' diagonal Fishers; give them as fishers=")
        given = _open_fishers(fishers, leaves)
        coefficients = core.per_model(weights, leaves.num_models)
        if normalize:

            def squares(name: str, fisher: Array) -> Array:
                each = range(leaves.num_models)
                return jnp.stack([jnp.sum(jnp.square(fisher[m])) for m in each]).astype(float)

            norms = jnp.sqrt(given.total(squares, jnp.zeros(leaves.num_models, float)))
            if not isinstance(norms, jax.core.Tracer) and not jnp.all(norms > 0):
                zero = [i for i, norm in enumerate(norms.tolist()) if not norm > 0]
                raise ValueError(
                    f"the Fishers of models {zero} are zero everywhere or not finite and cannot "
                    "be normalized; measure them again or leave out the models"
                )
            if floor_mode == "add":
                norms = norms + 1e-6
            coefficients = coefficients / jnp.where(norms > 0, norms, 1)
        return {"coefficients": coefficients, "fishers": fishers}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened = core.open_models(models, base)
        given = _open_fishers(plan["fishers"], opened.leaves)
        coefficients = plan["coefficients"] / jnp.sum(plan["coefficients"])

        def raised(m: int, information: Array) -> Array:
            if floor_mode == "add":
                return information + floor
            return jnp.maximum(information, floor) if floor_mode == "max" or m == 0 else information

        def merge(name: str, stacked: Array) -> Array:
            core.check_real(name, stacked.dtype, "fisher")
            information = given.read(name)
            # Model by model, so that under jit one loop reads every leaf once and stacks nothing.
            plain, above, below = jnp.zeros((3, *stacked.shape[1:]), stacked.dtype)
            for m in range(opened.leaves.num_models):
                coefficient = coefficients[m].astype(stacked.dtype)
                share = coefficient * raised(m, information[m])
                plain = plain + coefficient * stacked[m]
                above, below = above + share * stacked[m], below + share
            return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), plain)

        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def diagonal_fisher(
    log_probs_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    inputs: PyTree,
    *,
    labels: str | ArrayLike = "exact",
    key: Key | None = None,
) -> PyTree:
    """The diagonal of a classifier's Fisher information.

    `F = mean_x E_y (d log p(y | x) / d theta)^2`, example by example, so that it does not depend
    on any batching. One gradient is held at a time, whatever the number of examples and classes.

    Args:
        log_probs_fn: `(params, inputs [B, ...]) -> log p [B, K]`; it is called with B = 1.
        params: the model; only its floating leaves are differentiated.
        inputs: an array `[N, ...]`, or a tree of such arrays, N at least 1.
        labels: whose expectation is taken. `"exact"`: over all K classes under the model's own
            `p(y | x)`; `"sampled"`: one class an example, drawn from it (needs `key`); an integer
            array `[N]`: the given labels (the "empirical" Fisher, which is not the Fisher).
        key: a PRNG key for `"sampled"`.

    Returns:
        A tree like `params`, in float32 or wider; leaves that are not floating are zeros, and
        None stays None.

    Raises:
        ValueError: an unknown mode, no key to sample with, labels that are not `[N]`, no inputs.
        TypeError: labels that are not integers, a complex leaf.

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 3.1;
    Kunstner et al. 2019, "Limitations of the empirical Fisher", on the third mode.
    """
    num_inputs = trees.leading_size(inputs)
    if num_inputs == 0:
        raise ValueError("inputs must be [N, ...] with N at least 1, got N = 0")
    inputs = jax.tree.map(jnp.asarray, inputs)
    named = trees.named_leaves(params)
    moving = {name: jnp.asarray(leaf) for name, leaf in named if trees.is_inexact(leaf)}
    for name, leaf in moving.items():
        core.check_real(name, leaf.dtype, "diagonal_fisher")

    def log_probs(moving: dict[str, Array], i: ArrayLike) -> Array:
        whole = trees.map_named(lambda name, leaf: moving.get(name, leaf), params)
        return log_probs_fn(whole, jax.tree.map(lambda x: x[i][None], inputs))[0]

    shape = jax.eval_shape(log_probs, moving, 0).shape
    if len(shape) != 1:
        raise ValueError(f"log_probs_fn must return log p of shape [B, K], got {(1, *shape)}")
    classes_of = _votes(labels, key, num_inputs, shape[0])

    def add_example(total: dict[str, Array], i: Array) -> tuple[dict[str, Array], None]:
        values, pull = jax.vjp(lambda moving: log_probs(moving, i), moving)

        def add_class(total: dict[str, Array], vote: tuple[Array, Array]) -> Any:
            label, weight = vote
            (gradient,) = pull(jax.nn.one_hot(label, shape[0], dtype=values.dtype))

            def add(name: str, so_far: Array) -> Array:
                wide = gradient[name].astype(so_far.dtype)
                return so_far + jnp.square(wide) * weight.astype(so_far.dtype)

            return {name: add(name, so_far) for name, so_far in total.items()}, None

        return jax.lax.scan(add_class, total, classes_of(i, values))

    zeros = {name: jnp.zeros(x.shape, core.wide(x.dtype)) for name, x in moving.items()}
    total, _ = jax.lax.scan(add_example, zeros, jnp.arange(num_inputs))

    def leaf_of(name: str, leaf: Array | None) -> Array | None:
        if name in total:
            return total[name] / num_inputs
        return None if leaf is None else jnp.zeros_like(leaf)

    return trees.map_named(leaf_of, params)


def _votes(
    labels: str | ArrayLike, key: Key | None, num_inputs: int, num_classes: int
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """`(i, log p [K]) -> (classes, weights)`: over which classes the i-th expectation goes."""
    if not isinstance(labels, str):
        given = jnp.asarray(labels)
        if given.shape != (num_inputs,):
            raise ValueError(
                f"labels must be one for each of {num_inputs} inputs, got {given.shape}"
            )
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise TypeError(f"labels must be integers, got {given.dtype}")
        core.check_finite(given, "labels", 0, num_classes - 1)
        return lambda i, values: (given[i][None], jnp.ones(1, values.dtype))
    core.check_choice(labels, "labels", ("exact", "sampled"))
    if labels == "exact":
        return lambda i, values: (jnp.arange(num_classes), jnp.exp(values))
    if key is None:
        raise ValueError('labels="sampled" draws a class for each input: give a key=')

    def sample(i: Array, values: Array) -> tuple[Array, Array]:
        drawn = jax.random.categorical(jax.random.fold_in(key, i), values)
        return drawn[None], jnp.ones(1, values.dtype)

    return sample


def _open_fishers(fishers: PyTree, leaves: core.Leaves) -> core.Leaves:
    """The Fishers as `[M, ...]` in the models' compute dtype, checked against the models."""
    opened = core.open_models(fishers).leaves
    if opened.num_models != leaves.num_models:
        raise ValueError(
            f"fishers must be one tree for each of the {leaves.num_models} models, "
            f"got {opened.num_models}"
        )
    for name, spec in leaves.specs.items():
        found = opened.specs.get(name)
        if found is None or found.shape != spec.shape:
            raise ValueError(
                f"fishers need a floating leaf {name!r} of shape {list(spec.shape)}, "
                f"got {'none' if found is None else list(found.shape)}"
            )
    return opened.map(lambda name, x: x.astype(leaves.specs[name].dtype))
