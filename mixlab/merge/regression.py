"""Merging by regression: the linear layer that answers most like those it is made of."""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixlab import trees
from mixlab.merge import core
from mixlab.merge.averaging import average
from mixlab.types import Array, ArrayLike, Key, Plan, PyTree


def regmean(
    off_diagonal: ArrayLike = 1.0, weights: ArrayLike | None = None, *, ridge: float = 0.0
) -> core.MergeMethod:
    """Every kernel is the least-squares fit to what the models' kernels answer to their inputs.

    `W = (sum_m c_m G_m)^+ sum_m c_m G_m W_m`, with the Gram matrices `G_m = X_m^T X_m / rows` of
    the inputs, whose entries off the diagonal are first multiplied by `off_diagonal`. In
    directions that no model's inputs have, where any W fits, it is the weighted mean. Leaves
    without a Gram matrix, biases among them, are the weighted mean.

    The method takes one more input, `grams=`: a list of trees, or one stacked tree, from `grams`
    or made by hand. Under the name of a kernel `[..., out]` stands a matrix `[in, in]`: the
    kernel's leading axes, flattened, are `in`, and the others are outputs, so that kernels
    `[H, W, I, O]` of convolutions take `[H*W*I, H*W*I]`, in that order. Other leaves are None or
    missing. The plan holds the coefficients `c [M]` and the Gram matrices as they were given.

    Equals FusionBench's `regmean` where the sum of the Gram matrices can be inverted.

    Args:
        off_diagonal: the factor of the entries off the diagonal, in [0, 1]: 1 is the plain
            regression, 0 weighs every input by itself (the paper's alpha, often 0.9).
        weights: `[M]`, not negative, not all zero; only their ratios matter. Default: equal.
        ridge: added to the diagonal of every `G_m`, as a share of its mean diagonal, at least 0;
            it draws the result to the mean where the inputs say little.

    Raises:
        ValueError: an argument is out of range, the Gram matrices are missing, are not one for
            each model, are not square of the size of a kernel's inputs, are not symmetric or not
            finite (outside of `jit`), or name no leaf.
        TypeError: a leaf with a Gram matrix is complex.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models",
    section 3.
    """
    core.check_number(off_diagonal, "off_diagonal", 0.0, 1.0)
    core.check_weights(weights, signed=False)
    core.check_number(ridge, "ridge", 0.0)

    def measure(
        models: PyTree,
        base: PyTree | None = None,
        key: Key | None = None,
        *,
        grams: PyTree | None = None,
    ) -> Plan:
        leaves = core.open_models(models, base).leaves
        if grams is None:
            raise ValueError(
                "regmean needs the Gram matrices of the models' inputs; give them as grams=, "
                "e.g. from merge.grams"
            )
        given = _open_grams(grams, leaves)
        for name in given.specs:
            if name not in leaves.specs:
                raise ValueError(
                    f"grams have a matrix for {name!r}, which is no floating leaf of the models: "
                    f"{', '.join(leaves.specs)}"
                )
        must = "be finite and symmetric"
        core.check_entries(given, given.specs, _is_gram, "the Gram matrix", must)
        coefficients = core.per_model(weights, leaves.num_models)
        return {"coefficients": coefficients / jnp.sum(coefficients), "grams": grams}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened = core.open_models(models, base)
        given = _open_grams(plan["grams"], opened.leaves)

        def merge(name: str, stacked: Array) -> Array:
            mean = core.weighted_sum(plan["coefficients"], stacked)
            if name not in given.specs:
                return mean
            core.check_real(name, stacked.dtype, "regmean")
            gram = given.read(name)
            gram = gram * core.along_models(plan["coefficients"], gram)
            eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
            gram = gram * (eye + (1 - eye) * jnp.asarray(off_diagonal, gram.dtype))
            level = jnp.trace(gram, axis1=1, axis2=2) / max(len(eye), 1)
            gram = gram + ridge * level[:, None, None] * eye
            # About the mean: what is to be solved is small, and zero where the models agree.
            apart = (stacked - mean).reshape(*gram.shape[:2], -1)
            right = jnp.einsum("mij,mjk->ik", gram, apart, precision="highest")
            return mean + _solve(jnp.sum(gram, axis=0), right).reshape(mean.shape)

        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def grams(
    apply_fn: Callable[[PyTree, Any], Any],
    variables: PyTree,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
) -> PyTree:
    """Gram matrices of what comes into the linear layers of a Flax Linen model, as it is.

        given = [merge.grams(model.apply, v, data) for v, data in zip(models, batches)]
        merged = merge.regmean()(models, grams=given)

    Seen are `nn.Dense`, `nn.DenseGeneral` without batch axes (so also the projections of
    attention) and `nn.Conv` in any number of axes, with any strides, padding and dilation, whose
    kernels are leaves of `variables`. Not seen, and None in the result, are grouped and masked
    convolutions, subclasses, and layers inside of `nn.scan`, `nn.vmap`, `nn.remat` or `nn.jit`. A
    layer that is called several times adds up its calls. Memory is that of one batch and of the
    matrices. For a model that is not Linen, make the matrices by hand: see `regmean`.

    Args:
        apply_fn: `(variables, batch) -> anything`, not jitted, e.g. `model.apply`; it compiles
            once for every shape of batch, as long as the same function is given.
        variables: what the function takes first, one model; only its parameters are seen.
        batches: what the function takes second, one after the other, at least one.
        layers: which layers are wanted: names of leaves of `variables`, or of what they lie in,
            e.g. `"params/Dense_0"`. Default: all.

    Returns:
        A tree like `variables` that holds `X^T X / rows` [in, in] for every kernel seen, float32
        or wider, and None for the other leaves. A row is what one output is computed from, e.g.
        the patch [H*W*I] of a convolution.

    Raises:
        ValueError: there is no batch, no layer was seen, or not one of `layers`.
        TypeError: a kernel is complex.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models",
    section 3.
    """
    wanted = ("",) if layers is None else tuple(layers)
    totals: dict[str, Any] = {}
    for batch in batches:
        for name, found in _jitted_gram_sums(apply_fn, wanted, variables, batch).items():
            totals[name] = jax.tree.map(jnp.add, totals[name], found) if name in totals else found
    for layer in wanted:
        if not any(_within(name, layer) for name in totals):
            raise ValueError(
                f"no linear layer {repr(layer) if layer else 'at all'} was seen, of those that "
                f"were asked for {sorted(totals) or 'none'}; give at least one batch, names as in "
                "variables, and a function that is not jitted and runs nn.Dense, nn.DenseGeneral "
                "or nn.Conv with kernels that are leaves of variables"
            )

    def mean(name: str, leaf: Any) -> Array | None:
        return totals[name][0] / totals[name][1] if name in totals else None

    return trees.map_named(mean, variables)


def regmean_plus_plus(
    apply_fn: Callable[[PyTree, Any], Any],
    models: Sequence[PyTree],
    batches: Sequence[Iterable[Any]],
    *,
    layers: Sequence[str] | None = None,
    off_diagonal: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    ridge: float = 0.0,
) -> PyTree:
    """RegMean whose later layers are fitted to what the merged earlier layers give.

    Layer after layer: the Gram matrices of a layer are those of the inputs that it gets where the
    earlier layers are already merged; `regmean` merges it with them. All leaves that are not
    merged so are the weighted mean from the start. It runs the models once for every layer.

    Equals FusionBench's `regmean_plusplus` with the blocks of a transformer as `layers`: inside of
    a block the linear layers get what the model's own block gives.

    Args:
        apply_fn: as for `grams`.
        models: M trees of variables of one structure.
        batches: for each model its batches, as for `grams`; they are gone through once for every
            layer, so a list or a loader and not an iterator.
        layers: what is merged at a time, in order: names of kernels, or of what they lie in.
            Default: every linear layer that `grams` sees by itself, in the order they run.
        off_diagonal: as for `regmean`.
        weights: likewise.
        ridge: likewise.

    Returns:
        The merged variables.

    Raises:
        ValueError: as for `grams` and `regmean`; batches are an iterator or not M.

    Source: Nguyen et al. 2025, "RegMean++: Enhancing Effectiveness and Generalization of
    Regression Mean for Model Merging".
    """
    if len(batches) != len(models):
        raise ValueError(f"give batches for each of the {len(models)} models, got {len(batches)}")
    if any(iter(each) is each for each in batches):
        raise ValueError("batches are gone through once for every layer: give lists, not iterators")
    method = jax.jit(regmean(off_diagonal, weights, ridge=ridge))
    merged = average(weights)(models)
    if layers is None:
        layers = []
        jax.eval_shape(
            lambda *args: layers.extend(_gram_sums(apply_fn, ("",), *args)),
            merged,
            next(iter(batches[0])),
        )
    named = [dict(trees.named_leaves(model)) for model in models]
    for i, layer in enumerate(layers):
        rest = layers[i:]

        def at_layer(name: str, mean: Any, own: Any) -> Any:
            return own if any(_within(name, other) for other in rest) else mean  # noqa: B023

        given = []
        for model, its_batches in zip(models, batches, strict=True):
            variables = trees.map_named(at_layer, merged, model)
            found = grams(apply_fn, variables, its_batches, layers=[layer])
            given.append(dict(trees.named_leaves(found)))
        done = {
            name: method([leaves[name] for leaves in named], grams=[found[name] for found in given])
            for name, gram in given[0].items()
            if gram is not None
        }
        merged = trees.map_named(lambda name, mean: done.get(name, mean), merged)  # noqa: B023
    return merged


def _gram_sums(
    apply_fn: Callable[[PyTree, Any], Any],
    layers: tuple[str, ...],
    variables: PyTree,
    batch: Any,
) -> dict[str, tuple[Array, Array]]:
    """By kernel, in the order in which the layers run: the sum of `x^T x`, the count of rows."""
    from flax import linen as nn

    # A kernel is known by being the very leaf that was given. Inside of a lifted transformation
    # it is another one, and its inputs could not leave the transformation.
    names = {id(leaf): name for name, leaf in trees.named_leaves(variables)}
    linear = (nn.Dense, nn.DenseGeneral, nn.Conv)
    sums: dict[str, Any] = {}

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or type(module) not in linear:
            return output
        kernel = module.get_variable("params", "kernel")
        name = names.get(id(kernel))
        if name is None or not any(_within(name, layer) for layer in layers):
            return output
        core.check_real(name, kernel.dtype, "grams")
        rows = _rows(module, kernel, args[0] if args else kwargs["inputs"])
        if rows is not None:
            rows = rows.astype(trees.wide(kernel.dtype))
            gram = jnp.matmul(rows.T, rows, precision="highest")
            so_far, count = sums.get(name, (0.0, 0.0))
            sums[name] = (so_far + gram, count + len(rows))
        return output

    with nn.intercept_methods(interceptor):
        apply_fn(variables, batch)
    return sums


_jitted_gram_sums = jax.jit(_gram_sums, static_argnums=(0, 1))


def _rows(module: Any, kernel: Array, x: Array) -> Array | None:
    """The inputs of a linear layer as `[rows, in]`, or None where it is none."""
    from flax import linen as nn

    if type(module) is nn.Dense:
        return x.reshape(-1, x.shape[-1])
    if type(module) is nn.DenseGeneral and not module.batch_dims:
        axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
        last = jnp.moveaxis(x, axes, range(-len(axes), 0))
        return last.reshape(-1, math.prod(last.shape[-len(axes) :]))
    if type(module) is nn.Conv and module.feature_group_count == 1 and module.mask is None:
        # The same convolution, whose outputs are the entries of its patch.
        size = math.prod(kernel.shape[:-1])
        eye = jnp.eye(size, dtype=kernel.dtype).reshape(*kernel.shape[:-1], size)
        same = module.clone(parent=None, features=size, use_bias=False, precision="highest")
        patches: Any = same.apply({"params": {"kernel": eye}}, x)
        return patches.reshape(-1, size)
    return None


def _within(name: str, layer: str) -> bool:
    """Whether the leaf `name` is `layer` or lies in it; all leaves lie in `""`."""
    return not layer or name == layer or name.startswith(layer + "/")


def _open_grams(grams: PyTree, leaves: core.Leaves) -> core.Leaves:
    """The matrices as `[M, in, in]` in the models' compute dtype, checked against the models."""
    opened = core.open_models(grams)
    if opened.leaves.num_models != leaves.num_models:
        raise ValueError(
            f"grams must be one tree for each of the {leaves.num_models} models, "
            f"got {opened.leaves.num_models}"
        )
    for name, gram in opened.specs.items():
        if gram is None or name not in leaves.specs:
            continue
        shape = leaves.specs[name].shape
        sizes = list(itertools.accumulate(shape, operator.mul))
        if name not in opened.leaves.specs or gram.shape not in [(n, n) for n in sizes]:
            raise ValueError(
                f"the Gram matrix of leaf {name!r} of shape {list(shape)} must be floating "
                f"and [n, n] with n one of {sizes}, got {gram.dtype}{list(gram.shape)}"
            )
    return opened.leaves.map(lambda name, x: x.astype(leaves.specs[name].dtype))


def _is_gram(gram: Array) -> Array:
    """Which entries of `[M, in, in]` are finite and, but for rounding, as on the other side."""
    largest = jnp.max(jnp.abs(gram), axis=(1, 2), keepdims=True, initial=0)
    return jnp.isfinite(gram) & ~(jnp.abs(gram - gram.mT.conj()) > 0.01 * largest)


def _solve(gram: Array, right: Array) -> Array:
    """`gram^+ right`, which is zero where `gram [n, n]` is zero, and never NaN.

    By the Cholesky factor where it is sure, which is much quicker, and else by eigenvalues, of
    which those that are rounding are left out.
    """
    if not right.size:
        return right
    # Inputs of very different sizes cost no digits once the diagonal is one.
    size = jnp.diagonal(gram)
    used = size > 0
    scale = jnp.where(used, jax.lax.rsqrt(jnp.where(used, size, 1)), 0)
    gram = gram * scale[:, None] * scale + jnp.diag(jnp.where(used, 0, 1).astype(gram.dtype))
    right = right * scale[:, None]
    tiny = len(gram) * jnp.finfo(gram.dtype).eps

    def times(x: Array) -> Array:
        return jnp.matmul(gram, x, precision="highest")

    def solve(_: Callable[[Array], Array], right: Array) -> Array:
        factor = jnp.linalg.cholesky(gram)

        def by_factor() -> Array:
            return jax.scipy.linalg.cho_solve((factor, True), right)

        def by_eigenvalues() -> Array:
            values, vectors = jnp.linalg.eigh(gram)
            kept = values > tiny * values[-1]
            shares = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)[:, None]
            along = jnp.matmul(vectors.T, right, precision="highest")
            return jnp.matmul(vectors, shares * along, precision="highest")

        sure = jnp.min(jnp.diagonal(factor)) ** 2 > tiny  # not so where the factor is NaN
        return jax.lax.cond(sure, by_factor, by_eigenvalues)

    # Differentiated as the solution of an equation, since eigenvectors of equal eigenvalues have
    # no derivative.
    return jax.lax.custom_linear_solve(times, right, solve, symmetric=True) * scale[:, None]
