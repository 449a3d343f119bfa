"""Activations after a merge: their statistics, which averaging weights spoils, are set right."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.align.assignment import is_concrete
from mixlab.align.inference.linear import LinearLayer, find_layers, hidden_layers
from mixlab.align.inference.program import Program, trace
from mixlab.types import Array, PyTree


def reestimate_batch_stats(
    fn: Callable[[Any, Any], PyTree],
    variables: Mapping[str, PyTree],
    batches: Iterable[Any],
    *,
    momentum: float = 0.0,
    collection: str = "batch_stats",
) -> dict[str, PyTree]:
    """Replaces the running statistics by their average over `batches`, every batch alike.

    This is what BatchNorm with a cumulative average computes. Whether the variance of a batch is
    the biased one (Flax) or the unbiased one (PyTorch) is the layer's own choice and is kept.

    Args:
        fn: `fn(variables, batch)` runs the network in training mode and returns the collection as
            the batch left it; compile it first.
        variables: holds the running statistics under `collection`.
        batches: what `fn` takes, one after the other.
        momentum: the factor in [0, 1) with which the layers keep the old statistics, in Flax
            `BatchNorm.momentum` (by default 0.99 there): they then return
            `momentum * old + (1 - momentum) * batch`, which is undone here.
        collection: the key of the statistics.

    Returns:
        The variables as a dict, with the collection replaced; dtypes are kept, averages are
        computed in float32 or wider.

    Raises:
        KeyError: `variables` has no such collection.
        ValueError: no batches, momentum outside [0, 1), or `fn` returns another structure.

    Source: `reset_bn` of DIMAT (Saadati et al. 2024) and of REPAIR (Jordan et al. 2023, section 4).
    """
    if collection not in variables:
        raise KeyError(f"no collection {collection!r} among {sorted(variables)}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    old = variables[collection]
    # From zeros the old statistics drop out exactly, whatever the momentum.
    blank = {**variables, collection: jax.tree.map(jnp.zeros_like, old)}
    average: PyTree = None
    count = 0
    for batch in batches:
        seen = fn(blank, batch)
        trees.check_same_structure(old, seen, what=f"the {collection!r} before and after fn")
        seen = jax.tree.map(lambda x: x.astype(trees.wide(x.dtype)) / (1 - momentum), seen)
        count += 1
        weight = 1 / count
        average = (
            seen
            if average is None
            else jax.tree.map(lambda a, x: a + (x - a) * weight, average, seen)  # noqa: B023
        )
    if not count:
        raise ValueError("no batches: statistics need at least one")
    return {**variables, collection: jax.tree.map(lambda x, a: a.astype(x.dtype), old, average)}


class _Seen(NamedTuple):
    """Moments of a layer's outputs: one entry a unit along the units' axes, 1 along the others.

    `total` is the number of values a unit had, `squares` sums squared deviations from the mean.
    """

    total: Array
    mean: Array
    squares: Array


def repair(
    fn: Callable[[Any, Any], PyTree],
    merged: PyTree,
    models: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | Array | None = None,
) -> PyTree:
    """Gives every hidden unit of a merged model the mean and deviation that its parents have.

    Averaging weights makes the activations of the average vary less than those of its parents,
    the more so the deeper they lie. Each linear layer is rescaled and shifted unit by unit, so
    that the mean and the standard deviation of its outputs over the data become the weighted
    averages of the parents'. That is folded into kernel and bias: the result is an ordinary model.

    Layers are found in the program of `fn`: matrix products and convolutions of a leaf with a
    bias, another leaf, added right after. Left alone are layers that an output of `fn` is
    computed from without a further layer (the last one, as in the paper), layers without bias,
    layers whose leaves are used more than once, and, with a warning, layers inside control flow
    (`scan`, `cond`, `while`). Where BatchNorm follows a layer without bias,
    `reestimate_batch_stats` is the REPAIR.

    One pass a batch corrects each layer before the next one sees its outputs. With several
    batches the corrections follow the moments of all batches so far, of parents and model alike.
    One batch is exact; with several the first layers are, and the deeper ones nearly, since their
    inputs were corrected by what was known at the time; draw the batches at random, for batches
    sorted by class are no samples of each other. Works under `jit`.

    Args:
        fn: `fn(variables, batch)` runs the network in evaluation mode. It is compiled once for
            each shape of the batches: pass one function object, not a new lambda every time.
        merged: the variables of the merged model, a mixture of (permuted) `models`.
        models: the parents' variables, aligned with each other.
        batches: what `fn` takes, one after the other; read once.
        weights: [M], the share of each parent, which sum to 1: `(1 - t, t)` on the line between
            two models. Equal by default.

    Returns:
        The variables with kernels and biases replaced; structure and dtypes are kept, moments are
        computed in float32 or wider. A unit whose output does not vary keeps its scale.

    Raises:
        ValueError: no models, no batches, trees that do not match, weights of another number or
            sum, no layer that can be repaired, or outputs of a layer that are not finite (not
            looked at under a transformation).

    Source: Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair", section 4.
    """
    if not models:
        raise ValueError("no models: REPAIR needs the parents of the merged model")
    for number, model in enumerate(models):
        trees.check_same_structure(merged, model, what=f"the merged model and model {number}")
    share = jnp.full(len(models), 1 / len(models)) if weights is None else jnp.asarray(weights)
    if share.shape != (len(models),):
        raise ValueError(f"{len(models)} models need as many weights, got shape {share.shape}")
    if is_concrete(share) and abs(float(share.sum()) - 1) > 1e-3:
        raise ValueError(f"the weights must sum to 1, got {np.asarray(share).tolist()}")
    repaired: PyTree = None
    parents: list[dict[str, _Seen]] = []
    seen: dict[str, _Seen] = {}
    for batch in batches:
        now = [_measure(fn, model, batch) for model in models]
        if parents:
            parents = [_pool(before, after) for before, after in zip(parents, now, strict=True)]
        else:
            parents = now
            seen = jax.tree.map(jnp.zeros_like, now[0])
        repaired, seen = _correct(fn, merged, batch, parents, share, seen)
    if not parents:
        raise ValueError("no batches: statistics need at least one")
    if is_concrete(seen):
        for name in seen:
            moments = [held[name] for held in (*parents, seen)]
            if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(moments)):
                raise ValueError(
                    f"the outputs of the layer of {name!r} contain NaN or infinity: check the "
                    "batches and the parameters of all models"
                )
    return repaired


@functools.partial(jax.jit, static_argnums=0)
def _measure(fn: Callable[..., Any], variables: PyTree, batch: Any) -> dict[str, _Seen]:
    """The moments of every layer's outputs on one batch, by the name of the kernel."""
    program, names, layers = _layers(fn, variables, batch)
    values = program.evaluate(jax.tree.leaves((variables, batch)), [(i,) for i in layers])
    return {
        names[layer.kernel]: _moments(layer, value)
        for layer, value in zip(layers.values(), values, strict=True)
    }


@functools.partial(jax.jit, static_argnums=0)
def _correct(
    fn: Callable[..., Any],
    variables: PyTree,
    batch: Any,
    parents: list[dict[str, _Seen]],
    share: Array,
    seen: dict[str, _Seen],
) -> tuple[PyTree, dict[str, _Seen]]:
    """One pass that corrects every layer as it is met; the corrected variables, the moments."""
    program, names, layers = _layers(fn, variables, batch)
    hidden = hidden_layers(program)
    if hidden:
        warnings.warn(
            f"repair leaves the layers inside {', '.join(hidden)} as they are: it can correct "
            "only those outside control flow",
            stacklevel=2,
        )
    leaves, treedef = jax.tree.flatten(variables)
    corrected = dict(zip(program.inputs, leaves, strict=False))
    met: dict[str, _Seen] = {}

    def correct(number: int, output: Array) -> Array:
        layer = layers[number]
        name = names[layer.kernel]
        met[name] = _pool(seen[name], _moments(layer, output))
        scale, shift = _correction(met[name], [parent[name] for parent in parents], share)
        corrected[layer.kernel], corrected[layer.bias] = layer.fold(
            scale, shift, corrected[layer.kernel], corrected[layer.bias]
        )
        return (scale * output.astype(scale.dtype) + shift).astype(output.dtype)

    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.inputs, jax.tree.leaves((variables, batch)), strict=True))
    for op in program.ops:
        result = op.primitive.bind(*(values[i] for i in op.inputs), **op.params)
        results = result if op.primitive.multiple_results else [result]
        if op.outputs[0] in layers:
            results = [correct(op.outputs[0], results[0])]
        values.update(zip(op.outputs, results, strict=True))
    kept = [corrected[number] for number in program.inputs[: len(leaves)]]
    return jax.tree.unflatten(treedef, kept), met


def _layers(
    fn: Callable[..., Any], variables: PyTree, batch: Any
) -> tuple[Program, dict[int, str], dict[int, LinearLayer]]:
    """The traced function, the names of the variables' leaves by number, and the layers."""
    program = trace(fn, variables, batch)
    named = [name for name, leaf in trees.named_leaves(variables) if leaf is not None]
    names = dict(zip(program.inputs, named, strict=False))
    layers = find_layers(program, list(names))
    if not layers:
        inside = hidden_layers(program)
        raise ValueError(
            "nothing to repair: before the last layer, fn has no matrix product or convolution "
            "with a kernel and a bias right after it that are leaves of the variables, each used "
            + (f"once, outside {', '.join(inside)}" if inside else "once")
            + ". Where BatchNorm follows layers without bias, use reestimate_batch_stats"
        )
    return program, names, layers


def _moments(layer: LinearLayer, outputs: Array) -> _Seen:
    outputs = outputs.astype(trees.wide(outputs.dtype))
    mean = jnp.mean(outputs, axis=layer.other_axes, keepdims=True)
    squares = jnp.sum(jnp.square(outputs - mean), axis=layer.other_axes, keepdims=True)
    return _Seen(jnp.asarray(outputs.size / mean.size, mean.dtype), mean, squares)


def _correction(merged: _Seen, parents: Sequence[_Seen], share: Array) -> tuple[Array, Array]:
    """The scale and the shift that give the merged units their parents' mean and deviation."""
    share = share.astype(merged.mean.dtype)
    mean = sum(s * parent.mean for s, parent in zip(share, parents, strict=True))
    deviation = sum(s * _deviation(parent) for s, parent in zip(share, parents, strict=True))
    own = _deviation(merged)
    # The deviation of a constant is not quite 0 once its mean is rounded.
    varies = own > 1e-6 * jnp.abs(merged.mean)
    scale = jnp.where(varies, deviation / jnp.where(varies, own, 1), 1)
    return scale, mean - scale * merged.mean


def _deviation(seen: _Seen) -> Array:
    return jnp.sqrt(seen.squares / seen.total)


@jax.jit
def _pool(first: Any, second: Any) -> Any:
    """The moments of the values of both, layer by layer: see `merge_moments`."""

    def pool(a: _Seen, b: _Seen) -> _Seen:
        total = a.total + b.total
        step = b.mean - a.mean
        part = b.total / total
        squares = a.squares + b.squares + a.total * part * jnp.square(step)
        return _Seen(total, a.mean + part * step, squares)

    return jax.tree.map(pool, first, second, is_leaf=lambda x: isinstance(x, _Seen))
