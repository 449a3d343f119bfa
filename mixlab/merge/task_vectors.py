"""Merging in the space of task vectors, `tau_m = theta_m - theta_base`."""

from mixlab.merge import core, stages
from mixlab.types import ArrayLike


def task_arithmetic(scale: ArrayLike = 0.3, weights: ArrayLike | None = None) -> core.MergeMethod:
    """Adds the task vectors to the base, `theta_base + scale * sum_m w_m tau_m`.

    Args:
        scale: lambda, a number; may be traced.
        weights: `[M]`, not normalised; negative ones subtract what a model learned. Default: ones.

    Raises:
        ValueError: scale or a weight is not finite, there are not M weights, or there is no base.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic", section 2.
    """
    core.check_finite(scale, "scale")
    return stages.chain(stages.weigh(weights), stages.reduce("sum"), stages.rescale(scale))


def ties(
    density: ArrayLike = 0.2,
    scale: ArrayLike = 1.0,
    *,
    scope: str = "model",
    reduce: str = "mean",
    weights: ArrayLike | None = None,
) -> core.MergeMethod:
    """TIES: trim each task vector, elect a sign for each entry, merge the values that agree.

    By default the rule of the authors' code. Other codes are other chains; mergekit's TIES is
    `chain(trim(density, scope="leaf", exact=True), weigh(weights), elect_sign(zero="positive"),
    reduce("mean"), rescale(scale))`.

    Args:
        density: fraction of each task vector to keep, in (0, 1]; may be traced.
        scale: lambda, a number; may be traced.
        scope: rank the magnitudes over the whole `"model"` or within each `"leaf"`.
        reduce: `"mean"` of the values that agree with the elected sign, their `"sum"`, or the one
            of `"max"` magnitude.
        weights: `[M]`; multiply the trimmed task vectors before the election, and count in the
            mean. Default: ones.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base.
        TypeError: a leaf is complex.

    Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models",
    algorithm 1.
    """
    core.check_finite(scale, "scale")
    return stages.chain(
        stages.trim(density, scope=scope),
        stages.weigh(weights),
        stages.elect_sign(),
        stages.reduce(reduce),
        stages.rescale(scale),
    )
