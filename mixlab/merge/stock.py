"""Model stock: how far to go from the base to the average, from the angle between the models."""

import jax.numpy as jnp
import numpy as np

from mixlab.merge import core
from mixlab.types import Array, Key, Plan, PyTree


def model_stock(
    *,
    angle: str = "cosine",
    filter_wise: bool = False,
    out_last: bool = False,
    clip: bool = False,
) -> core.MergeMethod:
    """The point between base and average that is nearest to the centre of the models.

    `theta_base + t * mean_m tau_m` with `t = M c / (1 + (M - 1) c)`, leaf by leaf, where `c` is
    the cosine of the angle between two task vectors. The paper has one angle for all pairs; here
    it is averaged. Task vectors at right angles give the base, parallel ones their average, and
    so does one model alone. Obtuse angles give a negative `t` and, near `c = -1 / (M - 1)` where
    the task vectors cancel, one without bound; at that point, to within rounding, and beyond it
    (which an averaged angle can reach), `t` is 0 instead. `clip=True` keeps `t` in [0, 1]. The
    default otherwise equals mergekit's `model_stock`.

    The plan holds `c` and `t` of each leaf.

    Args:
        angle: what is averaged over the pairs: the `"cosine"` (mergekit) or the `"angle"`
            (FusionBench).
        filter_wise: each row, along the last axis, has a `t` of its own (mergekit, whose rows in
            PyTorch's `[out, in]` are what one output reads); rank-0 and rank-1 leaves have one.
        out_last: with `filter_wise`, the filters are those of Flax's kernels `[..., in, out]`:
            one `t` for each index of the last axis.
        clip: keep `t` in [0, 1], between the base and the average.

    Raises:
        ValueError: an unknown choice, `out_last` without `filter_wise`, or there is no base.
        TypeError: a leaf is complex.

    Source: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models",
    equation 4 and appendix.
    """
    core.check_choice(angle, "angle", ("cosine", "angle"))
    if out_last and not filter_wise:
        raise ValueError("out_last=True says what a filter is: give filter_wise=True with it")

    def measure(models: PyTree, base: PyTree | None = None, key: Key | None = None) -> Plan:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, "model_stock")

        def decide(name: str, stacked: Array) -> Plan:
            core.check_real(name, stacked.dtype, "model_stock")
            taus = stacked - bases.read(name)
            *rows, size = taus.shape[1:] if taus.ndim > 1 else (1,)
            if not filter_wise or not rows:
                vectors, many = taus.reshape(len(taus), 1, -1), ()
            else:
                vectors = taus.reshape(len(taus), int(np.prod(rows)), size)
                many = (*rows, 1)
            if many and out_last:
                vectors, many = jnp.swapaxes(vectors, 1, 2), (size,)
            c = _mean_cosine(vectors, angle).reshape(many)
            num_models = len(taus)
            bound = 1 + (num_models - 1) * c
            is_bounded = bound > 16 * float(jnp.finfo(c.dtype).eps)
            t = jnp.where(is_bounded, num_models * c / jnp.where(is_bounded, bound, 1), 0)
            return {"cosine": c, "t": jnp.clip(t, 0, 1) if clip else t}

        return {"leaves": opened.leaves.each(decide)}

    def combine(plan: Plan, models: PyTree, base: PyTree | None = None) -> PyTree:
        opened = core.open_models(models, base)
        bases = core.with_base(opened, "model_stock")

        def merge(name: str, stacked: Array) -> Array:
            origin = bases.read(name)
            return origin + plan["leaves"][name]["t"] * jnp.mean(stacked - origin, axis=0)

        return opened.write(opened.leaves.map(merge).read)

    return core.MergeMethod(measure, combine)


def _mean_cosine(vectors: Array, angle: str) -> Array:
    """The mean over the pairs of M models, `[M, F, n]` to `[F]`; 1 for one model."""
    num_models = len(vectors)
    if num_models == 1:
        return jnp.ones(vectors.shape[1], vectors.dtype)
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    # A task vector of zeros is at right angles to all others; the root of zero has no gradient.
    is_long = squares > 0
    units = jnp.where(is_long, vectors * jnp.where(is_long, squares, 1) ** -0.5, 0)
    products = jnp.einsum("ifn,jfn->ijf", units, units, precision="highest")
    cosines = jnp.clip(products[np.triu_indices(num_models, 1)], -1, 1)
    if angle == "cosine":
        return jnp.mean(cosines, axis=0)
    # arccos has no gradient at 0 and 180 degrees; there the angle is taken as given.
    is_inside = jnp.abs(cosines) < 1
    angles = jnp.arccos(jnp.where(is_inside, cosines, 0))
    flat = jnp.where(cosines > 0, 0, jnp.pi).astype(angles.dtype)
    return jnp.cos(jnp.mean(jnp.where(is_inside, angles, flat), axis=0))
