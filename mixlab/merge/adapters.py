"""Low-rank adapters (LoRA): extracting them from models, applying and merging them.

Leaves lie as in Flax, `[in, out]`. The adapter of a leaf is a pair of factors, `A [in, rank]` and
`B [rank, out]`, and adds `A @ B` to it: an input passes through A first, as `x @ A @ B`. In
PyTorch's `[out, in]` the same pair is transposed: `B.T @ A.T`.

An adapter of a model is a plain dict by leaf name, `{"Dense_0/kernel": {"A": ..., "B": ...},
"Dense_0/bias": {"delta": ...}}`; it can be saved like any other tree.

To merge adapters by any method of this package, apply each to the base and merge the models.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mixlab import trees
from mixlab.merge import core, patterns, spectral
from mixlab.types import Array, ArrayLike, PyTree

Adapter = dict[str, dict[str, Array]]


def extract_lora(
    model: PyTree,
    base: PyTree,
    rank: int,
    *,
    sv_epsilon: float = 0.0,
    exclude: str | Sequence[str] = (),
    fold: bool = False,
    rest: str = "keep",
) -> Adapter:
    """The adapter of a rank that is nearest to what a model learned beyond its base.

    A matrix `theta - theta_base = U S V^T` becomes `A = U sqrt(S)` and `B = sqrt(S) V^T`, cut to
    the `min(rank, #{s > sv_epsilon})` largest singular values; with `sv_epsilon=0` to the
    `min(rank, in, out)` largest, also where some are zero. The error, in the Frobenius norm, is
    that of the values that are cut away, and no adapter of that rank has a smaller one. These
    are mergekit's rules; its A and B belong to `[out, in]` and are `A.T` and `B.T`.

    Args:
        model: any pytree.
        base: the model that it was fine-tuned from, of the same structure.
        rank: largest rank of a leaf, at least 1.
        sv_epsilon: singular values up to it are cut away too. Above 0, ranks depend on values,
            so that it does not run under `jit`.
        exclude: a pattern of leaf names, or several (`patterns.spread`); matrices that match one
            are not factored.
        fold: factor leaves of higher rank, such as convolution kernels `[H, W, in, out]`, too,
            as matrices `[H * W * in, out]`.
        rest: of the floating leaves that are not factored (biases, norms, embeddings that are
            excluded, ...) `"keep"` the whole difference, as `{"delta": ...}`, or `"drop"` it. Other
            leaves, integers and None, are not part of an adapter.

    Returns:
        By leaf name, `{"A", "B"}` or `{"delta"}`, in the dtypes of the model.

    Raises:
        ValueError: an argument is out of range, or model and base do not match.
        TypeError: a leaf is complex.

    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1;
    Eckart and Young 1936 for the optimum.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    core.check_number(sv_epsilon, "sv_epsilon", low=0.0)
    core.check_choice(rest, "rest", ("keep", "drop"))
    is_excluded = patterns.any_of(exclude)
    opened = core.open_models([model], base)
    bases = core.with_base(opened, "extract_lora")
    dtypes = {name: spec.dtype for name, spec in opened.specs.items() if spec is not None}

    def factor(name: str, stacked: Array) -> dict[str, Array]:
        core.check_real(name, stacked.dtype, "extract_lora")
        delta = stacked[0] - bases.read(name)
        if spectral.is_matrix(name, delta.shape, is_excluded, fold):
            matrix = delta.reshape(-1, delta.shape[-1])
            a, b = _factors(matrix, min(rank, *matrix.shape), sv_epsilon)
            parts = {"A": a, "B": b}
        else:
            parts = {"delta": delta} if rest == "keep" else {}
        return {part: value.astype(dtypes[name]) for part, value in parts.items()}

    return {name: parts for name, parts in opened.leaves.each(factor).items() if parts}


def apply_lora(base: PyTree, adapter: Adapter, scale: ArrayLike = 1.0) -> PyTree:
    """Adds an adapter to a model: `theta + scale * A @ B`, or `theta + scale * delta`.

    Args:
        base: any pytree. Leaves that the adapter does not name are returned as they are.
        adapter: by leaf name, as `extract_lora` and `merge_lora` return it.
        scale: for adapters that were trained with them, `alpha / rank`; may be traced.

    Returns:
        A tree like `base`, in its dtypes; computed in float32 or wider.

    Raises:
        ValueError: the adapter names a leaf that is no floating leaf of the base, or whose shape
            differs, or has other parts than A and B, or delta; scale is not finite.
    """
    core.check_number(scale, "scale")
    opened = core.open_models([base])
    strange = sorted(adapter.keys() - opened.leaves.specs.keys())
    if strange:
        raise ValueError(
            f"the adapter has leaves that are no floating leaves of the base: {strange}; "
            f"the base has {sorted(opened.leaves.specs)}"
        )

    def add(name: str, stacked: Array) -> Array:
        leaf = stacked[0]
        if name not in adapter:
            return leaf
        if adapter[name].keys() not in ({"A", "B"}, {"delta"}):
            raise ValueError(
                f"the adapter of leaf {name!r} must hold A and B, or delta, got "
                f"{sorted(adapter[name])}"
            )
        parts = {part: value.astype(leaf.dtype) for part, value in adapter[name].items()}
        delta = parts["delta"] if "delta" in parts else spectral.matmul(parts["A"], parts["B"])
        rows = int(np.prod(leaf.shape[:-1]))
        if delta.shape != leaf.shape and delta.shape != (rows, *leaf.shape[-1:]):
            raise ValueError(
                f"the adapter of leaf {name!r} has shape {list(delta.shape)}, but the leaf "
                f"{list(leaf.shape)}"
            )
        return leaf + jnp.asarray(scale).astype(leaf.dtype) * delta.reshape(leaf.shape)

    return opened.write(opened.leaves.map(add).read)


def merge_lora(
    adapters: Sequence[Adapter], weights: ArrayLike | None = None, rank: int | None = None
) -> Adapter:
    """The weighted sum of adapters, exactly: `sum_m w_m A_m @ B_m`, never of A and B on their own.

    The factors are put side by side, `A = [w_1 A_1, w_2 A_2, ...]` and `B = [B_1; B_2; ...]`, so
    that the rank is the sum of ranks; averaging the As and the Bs would add products of the A
    of one model with the B of another. With `rank=` the sum is then compressed to the nearest
    adapter of that rank, without ever forming the matrix.

    Args:
        adapters: at least one; they need not have the same leaves, or ranks.
        weights: `[M]`, not normalised; negative ones subtract; may be traced. Default: ones, which
            adds the adapters as task arithmetic adds task vectors.
        rank: largest rank of a leaf; None keeps the sum as it is.

    Returns:
        An adapter with every leaf that one of them has.

    Raises:
        ValueError: no adapters, not M weights, one not finite, `rank` below 1, or a leaf that is
            factored in some adapters only or of different shapes; the message names the leaf.

    Source: Hu et al. 2022 for the adapter; the sum is task arithmetic, Ilharco et al. 2023.
    """
    if not adapters:
        raise ValueError("adapters is empty; give at least one")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    core.check_weights(weights, signed=True)
    shares = core.per_model(weights, len(adapters))

    def merge(name: str) -> dict[str, Array]:
        having = [
            (share, adapter[name])
            for share, adapter in zip(shares, adapters, strict=True)
            if name in adapter
        ]
        shapes = {_outline(parts) for _, parts in having}
        if len(shapes) > 1:
            raise ValueError(
                f"leaf {name!r} is not alike in all adapters that have it: "
                f"{', '.join(sorted(shapes))}"
            )
        dtypes = {part: value.dtype for part, value in having[0][1].items()}
        wide = [
            (share, {part: value.astype(trees.wide(value.dtype)) for part, value in parts.items()})
            for share, parts in having
        ]
        if "delta" in dtypes:
            deltas = jnp.stack([parts["delta"] for _, parts in wide])
            merged = {"delta": core.weighted_sum(jnp.stack([w for w, _ in wide]), deltas)}
        else:
            a = jnp.concatenate([w.astype(p["A"].dtype) * p["A"] for w, p in wide], axis=1)
            b = jnp.concatenate([p["B"] for _, p in wide])
            if rank is not None and rank < len(b):
                a, b = _compress(a, b, rank)
            merged = {"A": a, "B": b}
        return {part: value.astype(dtypes[part]) for part, value in merged.items()}

    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    return {name: merge(name) for name in names}


def _outline(parts: dict[str, Array]) -> str:
    """What the parts of a leaf must have in common to be added."""
    if "delta" in parts:
        return f"a difference of shape {list(parts['delta'].shape)}"
    return f"factors of shape {[parts['A'].shape[0], parts['B'].shape[1]]}"


def _compress(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The nearest factors of at most `rank` to the product of `a [m, r]` and `b [r, n]`."""
    left, upper = jnp.linalg.qr(a)
    right, lower = jnp.linalg.qr(b.T)
    middle = spectral.matmul(upper, lower.T)
    a, b = _factors(middle, min(rank, *middle.shape))
    return spectral.matmul(left, a), spectral.matmul(b, right.T)


def _factors(matrix: Array, rank: int, sv_epsilon: float = 0.0) -> tuple[Array, Array]:
    """`U sqrt(S)` and `sqrt(S) V^T` of the largest singular values above `sv_epsilon`."""
    u, s, vt = spectral.svd(matrix, rank)
    kept = int(jnp.sum(s > sv_epsilon)) if sv_epsilon > 0 else rank
    # The root of zero has an infinite gradient.
    root = jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0)[:kept]
    return u[:, :kept] * root, root[:, None] * vt[:kept]
