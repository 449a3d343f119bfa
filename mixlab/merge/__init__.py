"""Merge models: any pytrees of one structure.

Every method is a function of its hyper-parameters that returns a `MergeMethod`:

    merged = merge.ties(density=0.2)([model_a, model_b], base=base)
    merged = merge.parse("ties(density=0.2)")([model_a, model_b], base=base)

A method has two halves, `measure` (decide) and `combine` (apply, leaf by leaf). Methods on task
vectors are chains of stages: `merge.chain(merge.trim(0.2), merge.reduce("mean"))`. Integer, bool
and None leaves are copied from the base, never averaged; `merge.report` tells which. What is NaN in
one model comes out as NaN at its entry, save of robust methods (`core.py`). Against faulty
models, others can be mixed before they are merged: `merge.nnm(2) | merge.krum(2)`.

`emr` and `tall_masks` give a model for each that goes in, stacked along a leading axis M, and
`twin` merges by a router's weights. `merge.compress` keeps what they need of the M models, and
`merge.save_compressed` and `merge.load_compressed` keep that in a file.
"""

from typing import Any

from mixlab import spec
from mixlab.merge.adapters import apply_lora, extract_lora, merge_lora
from mixlab.merge.averaging import average, ema, interpolate, running_average, swa
from mixlab.merge.balancing import balance, pcb
from mixlab.merge.chains import Stage, TaskVectors, chain
from mixlab.merge.compression import (
    CompressedMasks,
    compress,
    compressed_sizes,
    load_compressed,
    save_compressed,
)
from mixlab.merge.core import MergeMethod
from mixlab.merge.curvature import diagonal_fisher, fisher
from mixlab.merge.flag_aggregator import flag
from mixlab.merge.masks import MaskedVector, MaskMethod, consensus, emr, tall_masks
from mixlab.merge.patterns import by_depth
from mixlab.merge.preaggregation import PreAggregation, arc, bucketing, clipping, nnm
from mixlab.merge.regression import grams, regmean, regmean_plus_plus
from mixlab.merge.reports import report, table
from mixlab.merge.robust import (
    bulyan,
    caf,
    centered_clipping,
    geometric_median,
    krum,
    mda,
    meamed,
    median,
    monna,
    multi_krum,
    phocas,
    smea,
    trimmed_mean,
)
from mixlab.merge.rules import reconcile
from mixlab.merge.selective import arcee_fusion, nearswap, ram, ram_plus, reinforce, threshold
from mixlab.merge.soups import greedy_soup
from mixlab.merge.spectral import iso_c, iso_cts, tsv
from mixlab.merge.spherical import karcher, multislerp, nuslerp, slerp
from mixlab.merge.stages import (
    band,
    drop,
    elect_sign,
    fuse,
    mask,
    reduce,
    rescale,
    select,
    trim,
    weigh,
)
from mixlab.merge.stock import model_stock
from mixlab.merge.task_vectors import (
    breadcrumbs,
    dare,
    della,
    magmax,
    sce,
    task_arithmetic,
    ties,
)
from mixlab.merge.twin import CompressedTwin, TwinMethod, twin

__all__ = [
    "METHODS",
    "PREAGGREGATIONS",
    "STAGES",
    "CompressedMasks",
    "CompressedTwin",
    "MaskMethod",
    "MaskedVector",
    "MergeMethod",
    "PreAggregation",
    "Stage",
    "TaskVectors",
    "TwinMethod",
    "apply_lora",
    "arc",
    "arcee_fusion",
    "average",
    "balance",
    "band",
    "breadcrumbs",
    "bucketing",
    "bulyan",
    "by_depth",
    "caf",
    "centered_clipping",
    "chain",
    "clipping",
    "compress",
    "compressed_sizes",
    "consensus",
    "dare",
    "della",
    "diagonal_fisher",
    "drop",
    "elect_sign",
    "ema",
    "emr",
    "extract_lora",
    "fisher",
    "flag",
    "fuse",
    "geometric_median",
    "grams",
    "greedy_soup",
    "interpolate",
    "iso_c",
    "iso_cts",
    "karcher",
    "krum",
    "load_compressed",
    "magmax",
    "mask",
    "mda",
    "meamed",
    "median",
    "merge_lora",
    "model_stock",
    "monna",
    "multi_krum",
    "multislerp",
    "nearswap",
    "nnm",
    "nuslerp",
    "parse",
    "pcb",
    "phocas",
    "ram",
    "ram_plus",
    "reconcile",
    "reduce",
    "regmean",
    "regmean_plus_plus",
    "reinforce",
    "report",
    "rescale",
    "running_average",
    "save_compressed",
    "sce",
    "select",
    "slerp",
    "smea",
    "swa",
    "table",
    "tall_masks",
    "task_arithmetic",
    "threshold",
    "ties",
    "trim",
    "trimmed_mean",
    "tsv",
    "twin",
    "weigh",
]

METHODS = {
    method.__name__: method
    for method in (
        arcee_fusion,
        average,
        breadcrumbs,
        bulyan,
        caf,
        centered_clipping,
        consensus,
        dare,
        della,
        ema,
        emr,
        fisher,
        flag,
        geometric_median,
        interpolate,
        iso_c,
        iso_cts,
        karcher,
        krum,
        magmax,
        mda,
        meamed,
        median,
        model_stock,
        monna,
        multi_krum,
        multislerp,
        nearswap,
        nuslerp,
        pcb,
        phocas,
        ram,
        ram_plus,
        regmean,
        sce,
        slerp,
        smea,
        swa,
        tall_masks,
        task_arithmetic,
        ties,
        trimmed_mean,
        tsv,
        twin,
    )
}
"""Every method by its name: what `parse` knows and what the tests run through."""

STAGES = {
    stage.__name__: stage
    for stage in (
        balance,
        band,
        drop,
        elect_sign,
        fuse,
        mask,
        reduce,
        reinforce,
        rescale,
        select,
        threshold,
        trim,
        weigh,
    )
}
"""Every stage by its name."""


PREAGGREGATIONS = {make.__name__: make for make in (arc, bucketing, clipping, nnm)}
"""Every pre-aggregation by its name."""


def parse(text: str | MergeMethod) -> MergeMethod:
    """The method that a text describes.

    Args:
        text: a method, `"ties(density=0.2)"`; a chain of stages,
            `"trim(0.2) | reduce('mean') | rescale(0.3)"`; one of these after pre-aggregations,
            `"nnm(2) | krum(2)"`. A `MergeMethod` passes through.

    Raises:
        ValueError: the text does not parse or names something unknown, or there is nothing after
            a pre-aggregation.
        TypeError: an argument that the method does not take; methods joined by `|`.
    """
    if isinstance(text, MergeMethod):
        return text
    made = _join(spec.parse(text, METHODS | STAGES | PREAGGREGATIONS, combine=_join))
    if isinstance(made, PreAggregation):
        raise ValueError(
            f"{text!r} makes no model yet: let a method follow, as in 'nnm(2) | krum(2)'"
        )
    return made


def _join(first: Any, *rest: Any) -> Any:
    """Pre-aggregations, and then the one method or the chain of stages."""
    if isinstance(first, PreAggregation):
        return first | _join(*rest) if rest else first
    return chain(first, *rest) if rest or isinstance(first, Stage) else first
