"""Merging weighted by curvature: what a model is sure of counts more."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random, trees
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
    entry is the plain weighted mean. Where one is negative or not finite, which no Fisher is, it
    is an error; under `jit`, where values are not known, such an entry is NaN.

    Args:
        weights: `[M]`, not negative, not all zero; only their ratios matter. Default: equal.
        floor: the least a Fisher can be, at least 0.
        normalize: divide `c_m` by the norm of the model's whole Fisher, taken before the floor.
        floor_mode: `"max"` raises every Fisher to the floor; `"first"` that of the first model
            only, so that it wins where no model is sure (the official code's
            `favor_target_model`); `"add"` adds the floor to every Fisher, and 1e-6 to its norm
            (FusionBench).

    Raises:
        ValueError: an argument is out of range, the Fishers are missing, do not match the models
            or are negative or not finite, or `normalize` meets one that is zero everywhere.
        TypeError: a leaf is complex.

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 3;
    floor and normalisation are those of the authors' code.
    """
    core.check_weights(weights, signed=False)
    core.check_number(floor, "floor", 0.0)
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
        core.check_entries(
            given, leaves.specs, _is_square, "the Fisher", "be finite and at least 0"
        )
        coefficients = core.per_model(weights, leaves.num_models)
        if normalize:

            def squares(name: str, fisher: Array) -> Array:
                each = range(leaves.num_models)
                return jnp.stack([jnp.sum(jnp.square(fisher[m])) for m in each]).astype(float)

            norms = jnp.sqrt(given.total(squares, jnp.zeros(leaves.num_models, float)))
            if not isinstance(norms, jax.core.Tracer) and not jnp.all(norms > 0):
                zero = [i for i, norm in enumerate(norms.tolist()) if not norm > 0]
                raise ValueError(
                    f"the Fishers of models {zero} are zero everywhere and cannot be normalized; "
                    "measure them again or leave out the models"
                )
            if floor_mode == "add":
                norms = norms + 1e-6
            coefficients = coefficients / jnp.where(norms == 0, 1, norms)
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
                known = jnp.where(_is_square(information[m]), information[m], jnp.nan)
                share = coefficient * raised(m, known)
                plain = plain + coefficient * stacked[m]
                above, below = above + share * stacked[m], below + share
            return jnp.where(below == 0, plain, above / jnp.where(below == 0, 1, below))

        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def diagonal_fisher(
    log_probs_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    inputs: Any,
    *,
    labels: str | ArrayLike = "exact",
    key: Key | None = None,
    at_once: int = 32,
) -> PyTree:
    """The diagonal of a classifier's Fisher information.

    `F = mean_x E_y (d log p(y | x) / d theta)^2`, with a gradient of its own for every example,
    so that it does not depend on how the examples come in batches. The loop over the examples
    runs on the host, since convolutions inside of a compiled loop are slow on CPUs: call it as
    it is, as under `jit` the loop is unrolled.

    Args:
        log_probs_fn: `(params, inputs [B, ...]) -> log p [B, K]`; it is called with B = 1, and
            compiles once as long as the same function is given.
        params: the model; only its floating leaves are differentiated.
        inputs: an array `[N, ...]`, or a tree of such arrays, N at least 1; or an iterator of
            them, e.g. `iter(loader)`, for data that do not fit in memory.
        labels: whose expectation is taken. `"exact"`: over all K classes under the model's own
            `p(y | x)`; `"sampled"`: one class an example, drawn from it (needs `key`);
            `"empirical"`: the given labels, which is not the Fisher: what is given, or what the
            iterator yields, is then a pair `(inputs, labels [N])`. An integer array `[N]` is
            short for `"empirical"` with these labels.
        key: a PRNG key for `"sampled"`.
        at_once: how many gradients are computed at a time and held in memory, at least 1.

    Returns:
        A tree like `params`, in float32 or wider; leaves that are not floating are zeros, and
        None stays None.

    Raises:
        ValueError: an unknown mode, no key to sample with, labels that are not `[N]` or name no
            class, no inputs.
        TypeError: labels that are not integers or missing, a complex leaf, a key that is none.

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", section 3.1;
    Kunstner et al. 2019, "Limitations of the empirical Fisher", on the third mode.
    """
    if not isinstance(labels, str):
        inputs, labels = (inputs, labels), "empirical"
    core.check_choice(labels, "labels", ("exact", "sampled", "empirical"))
    core.check_number(at_once, "at_once", 1)
    if labels == "sampled" and key is None:
        raise ValueError('labels="sampled" draws a class for each input: give a key=')
    if key is not None:
        random.check_key(key)
    total = {}
    for name, leaf in trees.named_leaves(params):
        if trees.is_inexact(leaf):
            core.check_real(name, jnp.result_type(leaf), "diagonal_fisher")
            total[name] = jnp.zeros(jnp.shape(leaf), trees.wide(jnp.result_type(leaf)))
    num_seen = 0
    for batch in inputs if isinstance(inputs, Iterator) else (inputs,):
        if labels == "empirical" and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise TypeError(
                'labels="empirical" takes pairs (inputs, labels [N]), got a '
                f"{type(batch).__name__} without labels; give them with the inputs, or as labels="
            )
        x, given = batch if labels == "empirical" else (batch, None)
        num_inputs = trees.leading_size(x)
        if num_inputs == 0:
            continue
        x = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), x)
        one = jax.tree.map(lambda leaf: leaf[:1], x)
        shape = jax.eval_shape(log_probs_fn, params, one).shape
        if len(shape) != 2:
            raise ValueError(f"log_probs_fn must return log p of shape [B, K], got {shape}")
        given = None if given is None else _check_labels(given, num_inputs, shape[1])
        classes = np.arange(shape[1] if labels == "exact" else 1)[:at_once]
        size = min(at_once // len(classes), num_inputs)
        for start in range(0, num_inputs, size):
            # What is beyond the end is the last example again, and does not count.
            rows = start + np.arange(size)
            at = np.minimum(rows, num_inputs - 1)
            part = jax.tree.map(lambda leaf: leaf[at], x)  # noqa: B023
            examples = (
                part,
                num_seen + rows,
                rows < num_inputs,
                None if given is None else given[at],
            )
            for low in range(0, shape[1] if labels == "exact" else 1, len(classes)):
                total = _add_squares(
                    log_probs_fn, labels, params, total, examples, low + classes, key
                )
        num_seen += num_inputs
    if num_seen == 0:
        raise ValueError("inputs must be [N, ...] with N at least 1, got N = 0")

    def leaf_of(name: str, leaf: Array | None) -> Array | None:
        if name in total:
            return total[name] / num_seen
        return None if leaf is None else jnp.zeros_like(leaf)

    return trees.map_named(leaf_of, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_squares(
    log_probs_fn: Callable[[PyTree, Any], Array],
    labels: str,
    params: PyTree,
    total: dict[str, Array],
    examples: tuple[PyTree, Array, Array, Array | None],
    classes: Array,
    key: Key | None,
) -> dict[str, Array]:
    """Adds the squared gradients of some examples, and of some classes where labels are exact."""
    named = dict(trees.named_leaves(params))
    moving = {name: named[name] for name in total}

    def squares(x: PyTree, i: Array, counts: Array, given: Array | None) -> dict[str, Array]:
        def log_probs(moving: dict[str, Array]) -> Array:
            whole = trees.map_named(lambda name, leaf: moving.get(name, leaf), params)
            return log_probs_fn(whole, jax.tree.map(lambda leaf: leaf[None], x))[0]

        values, pull = jax.vjp(log_probs, moving)
        if labels == "exact":
            # A class beyond the last one has no cotangent and adds nothing.
            votes, weights = classes, jnp.exp(values).at[classes].get(mode="clip")
        else:
            drawn = given
            if labels == "sampled":
                assert key is not None
                drawn = jax.random.categorical(jax.random.fold_in(key, i), values)
            votes, weights = jnp.asarray(drawn)[None], jnp.ones(1, values.dtype)
        weights = weights * counts.astype(values.dtype)
        (gradients,) = jax.vmap(pull)(jax.nn.one_hot(votes, len(values), dtype=values.dtype))

        def add_up(name: str) -> Array:
            square = jnp.square(gradients[name].astype(total[name].dtype))
            return jnp.tensordot(weights.astype(square.dtype), square, 1, precision="highest")

        return {name: add_up(name) for name in total}

    added = jax.vmap(squares)(*examples)
    return {name: so_far + jnp.sum(added[name], axis=0) for name, so_far in total.items()}


def _check_labels(labels: ArrayLike, num_inputs: int, num_classes: int) -> Any:
    array = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if array.shape != (num_inputs,):
        raise ValueError(f"labels must be one for each of {num_inputs} inputs, got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {array.dtype}")
    core.check_finite(array, "labels", 0, num_classes - 1)
    return array


def _is_square(information: Array) -> Array:
    return (information >= 0) & (information < jnp.inf)


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
