"""Merging in the space of task vectors, `tau_m = theta_m - theta_base`.

Wherever there are `weights`, they may be given by pattern of leaf names, as in `average`. A
fraction that is traced is counted in float32, which may keep an entry more or less than the same
number given as it is (`stages.py`).
"""

from mixlab.merge import chains, core, patterns, stages
from mixlab.types import ArrayLike


def task_arithmetic(
    scale: ArrayLike = 0.3, weights: patterns.PerLeaf | None = None
) -> core.MergeMethod:
    """Adds the task vectors to the base, `theta_base + scale * sum_m w_m tau_m`.

    Args:
        scale: lambda, a number; may be traced.
        weights: `[M]`, not normalised; negative ones subtract what a model learned. Default: ones.
            Or such weights for each pattern of leaf names, as in `average`.

    Raises:
        ValueError: scale or a weight is not finite, there are not M weights, a leaf is without a
            pattern or a pattern without a leaf, or there is no base.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic", section 2.
    """
    core.check_number(scale, "scale")
    return chains.chain(stages.weigh(weights), stages.reduce("sum"), stages.rescale(scale))


def ties(
    density: ArrayLike = 0.2,
    scale: ArrayLike = 1.0,
    *,
    scope: str = "model",
    reduce: str = "mean",
    zero: str = "majority",
    weights: patterns.PerLeaf | None = None,
) -> core.MergeMethod:
    """TIES: trim each task vector, elect a sign for each entry, merge the values that agree.

    By default the rule of the authors' code. Other codes are other chains; mergekit's TIES is
    `chain(trim(density, scope="leaf", exact=True), weigh(weights), elect_sign(zero="positive"),
    reduce("mean"), rescale(scale))`.

    Args:
        density: fraction of each task vector to keep, in [0, 1]; may be traced.
        scale: lambda, a number; may be traced.
        scope: rank the magnitudes over the whole `"model"` or within each `"leaf"`.
        reduce: `"mean"` of the values that agree with the elected sign, their `"sum"`, or the one
            of `"max"` magnitude.
        zero: the sign of an entry whose sum is zero: that of the `"majority"` of all entries, or
            `"positive"`.
        weights: `[M]`; multiply the trimmed task vectors before the election, and count in the
            mean. Default: ones.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base.
        TypeError: a leaf is complex.

    Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models",
    algorithm 1.
    """
    core.check_number(scale, "scale")
    core.check_choice(reduce, "reduce", stages.REDUCTIONS)
    return chains.chain(
        stages.trim(density, scope=scope),
        stages.weigh(weights),
        stages.elect_sign(zero=zero),
        stages.reduce(reduce),
        stages.rescale(scale),
    )


def magmax(scale: ArrayLike = 0.6) -> core.MergeMethod:
    """MagMax: in every entry the task vector of largest magnitude, times `scale`.

    Args:
        scale: lambda, a number; may be traced.

    Raises:
        ValueError: scale is not finite, or there is no base.
        TypeError: a leaf is complex.

    Source: Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual
    Learning". Of equal magnitudes the later model's value wins, as in FusionBench.
    """
    core.check_number(scale, "scale")
    return chains.chain(stages.reduce("max"), stages.rescale(scale))


def dare(
    density: ArrayLike = 0.1,
    scale: ArrayLike = 1.0,
    *,
    rescale: str | None = "expectation",
    consensus: str = "linear",
    weights: patterns.PerLeaf | None = None,
    normalize: bool = False,
) -> core.MergeMethod:
    """DARE: drop entries of the task vectors at random, rescale the rest, merge.

    As published, and as in FusionBench. mergekit's `dare_linear` is `rescale="l1"`, its
    `dare_ties` that with `consensus="ties"`. To trim as well, as FusionBench's DARE with TIES
    does, write the chain: `drop(density) | trim(0.2) | elect_sign | reduce | rescale(scale)`.

    Args:
        density: fraction to keep, 1 minus the drop rate p of the paper, in [0, 1]; may be
            traced.
        scale: lambda, a number; may be traced.
        rescale: `"expectation"` (divide by the density), `"l1"` (restore the sum of magnitudes
            of each leaf) or None.
        consensus: `"linear"` adds the task vectors; `"ties"` first elects a sign for each entry,
            a plus where they sum to zero, and leaves out the values of the other sign.
        weights: `[M]`; multiply the task vectors before the election. Default: ones.
        normalize: divide the result by the sum of the weights, in the `"ties"` consensus by that
            of the models with a say in an entry.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base or
            no key.
        TypeError: a leaf is complex and has to elect a sign.

    Source: Yu et al. 2024, "Language Models are Super Mario: Absorbing Abilities from Homologous
    Models as a Free Lunch", section 3.2.
    """
    sparsify = stages.drop(density, rescale=rescale)
    return _sparse(sparsify, consensus, weights, normalize, scale)


def della(
    density: ArrayLike = 0.3,
    epsilon: ArrayLike = 0.15,
    scale: ArrayLike = 1.0,
    *,
    axis: int | None = None,
    rescale: str | None = "expectation",
    consensus: str = "ties",
    weights: patterns.PerLeaf | None = None,
    normalize: bool = True,
) -> core.MergeMethod:
    """DELLA: drop small entries more often than large ones, elect a sign, average.

    mergekit's `della` is `axis=1, rescale="l1"`; its `della_linear` has `consensus="linear",
    normalize=False` as well. The axis is that of PyTorch's kernels, `[out, in]`.

    Args:
        density: fraction to keep on average, in [0, 1]; may be traced.
        epsilon: half the spread of the probabilities to be kept (half the epsilon of the paper);
            may be traced.
        scale: lambda, a number; may be traced.
        axis: which entries of a leaf are ranked against each other; see `drop`.
        rescale: as in `dare`; `"expectation"` divides each entry by its own probability.
        consensus: `"linear"` or `"ties"`, as in `dare`.
        weights: `[M]`, as in `dare`.
        normalize: as in `dare`.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base or
            no key.
        TypeError: a leaf is complex and has to elect a sign.

    Source: Deep et al. 2024, "DELLA-Merging: Reducing Interference in Model Merging through
    Magnitude-Based Sampling", section 2.
    """
    sparsify = stages.drop(density, epsilon=epsilon, axis=axis, rescale=rescale)
    return _sparse(sparsify, consensus, weights, normalize, scale)


def breadcrumbs(
    density: ArrayLike = 0.2,
    gamma: ArrayLike = 0.01,
    scale: ArrayLike = 1.0,
    *,
    consensus: str = "linear",
    weights: patterns.PerLeaf | None = None,
    normalize: bool = False,
) -> core.MergeMethod:
    """Model Breadcrumbs: remove outliers and small entries of each leaf, then merge.

    Equals mergekit's `breadcrumbs` and, with `consensus="ties"`, its `breadcrumbs_ties`, but for
    small leaves, which mergekit resets to the base; see `band`.

    Args:
        density: fraction to keep, in [0, 1]; may be traced.
        gamma: fraction of outliers to remove, in [0, 1]; may be traced.
        scale: the alpha of the paper, a number; may be traced.
        consensus: `"linear"` or `"ties"`, as in `dare`.
        weights: `[M]`, as in `dare`.
        normalize: as in `dare`.

    Raises:
        ValueError: an argument is out of range, there are not M weights, or there is no base.
        TypeError: a leaf is complex and has to elect a sign.

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs: Scaling Multi-Task Model Merging with
    Sparse Masks", section 3.
    """
    return _sparse(stages.band(density, gamma), consensus, weights, normalize, scale)


def sce(select_topk: ArrayLike = 1.0, scale: ArrayLike = 1.0) -> core.MergeMethod:
    """SCE: select the entries in which the models differ, weigh by energy, erase minority signs.

    Equals mergekit's `sce`. One model, or equal ones, have no variance: of them less than all
    selects nothing, and the base comes back.

    Args:
        select_topk: fraction of each leaf's entries to keep, by variance over the models, in
            [0, 1]; may be traced.
        scale: lambda, a number; may be traced.

    Raises:
        ValueError: an argument is out of range, or there is no base.
        TypeError: a leaf is complex.

    Source: Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", section 3.3.
    """
    core.check_number(select_topk, "select_topk", 0.0, 1.0)
    core.check_number(scale, "scale")
    return chains.chain(stages.select(select_topk), stages.fuse(), stages.rescale(scale))


def _sparse(
    sparsify: chains.Stage,
    consensus: str,
    weights: patterns.PerLeaf | None,
    normalize: bool,
    scale: ArrayLike,
) -> core.MergeMethod:
    """What mergekit's sparse methods share: sparsify, find a consensus, normalise, rescale."""
    core.check_choice(consensus, "consensus", ("linear", "ties"))
    core.check_number(scale, "scale")
    if consensus == "linear":
        merged = [stages.weigh(weights, normalize=normalize), stages.reduce("sum")]
    else:
        elect = stages.elect_sign(zero="positive")
        merged = [stages.weigh(weights), elect, stages.reduce("mean" if normalize else "sum")]
    return chains.chain(sparsify, *merged, stages.rescale(scale))
