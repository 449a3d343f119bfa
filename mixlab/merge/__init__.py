"""Merge models: any pytrees of one structure.

Every method is a function of its hyper-parameters that returns a `MergeMethod`:

    merged = merge.ties(density=0.2)([model_a, model_b], base=base)
    merged = merge.parse("ties(density=0.2)")([model_a, model_b], base=base)

A method has two halves, `measure` (decide) and `combine` (apply, leaf by leaf). Methods on task
vectors are chains of stages: `merge.chain(merge.trim(0.2), merge.reduce("mean"))`. Integer, bool
and None leaves are copied from the base, never averaged; `merge.report` tells which.
"""

from mixlab import spec
from mixlab.merge.averaging import average, interpolate
from mixlab.merge.core import MergeMethod
from mixlab.merge.curvature import diagonal_fisher, fisher
from mixlab.merge.reports import report, table
from mixlab.merge.spherical import slerp
from mixlab.merge.stages import (
    Stage,
    TaskVectors,
    band,
    chain,
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
from mixlab.merge.task_vectors import (
    breadcrumbs,
    dare,
    della,
    magmax,
    sce,
    task_arithmetic,
    ties,
)

__all__ = [
    "METHODS",
    "STAGES",
    "MergeMethod",
    "Stage",
    "TaskVectors",
    "average",
    "band",
    "breadcrumbs",
    "chain",
    "dare",
    "della",
    "diagonal_fisher",
    "drop",
    "elect_sign",
    "fisher",
    "fuse",
    "interpolate",
    "magmax",
    "mask",
    "parse",
    "reduce",
    "report",
    "rescale",
    "sce",
    "select",
    "slerp",
    "table",
    "task_arithmetic",
    "ties",
    "trim",
    "weigh",
]

METHODS = {
    method.__name__: method
    for method in (
        average,
        breadcrumbs,
        dare,
        della,
        fisher,
        interpolate,
        magmax,
        sce,
        slerp,
        task_arithmetic,
        ties,
    )
}
"""Every method by its name: what `parse` knows and what the tests run through."""

STAGES = {
    stage.__name__: stage
    for stage in (band, drop, elect_sign, fuse, mask, reduce, rescale, select, trim, weigh)
}
"""Every stage by its name."""


def parse(text: str | MergeMethod) -> MergeMethod:
    """The method that a text describes.

    Args:
        text: a method, `"ties(density=0.2)"`, or a chain of stages,
            `"trim(0.2) | reduce('mean') | rescale(0.3)"`; a `MergeMethod` passes through.

    Raises:
        ValueError: the text does not parse or names something unknown.
        TypeError: an argument that the method does not take; methods joined by `|`.
    """
    if isinstance(text, MergeMethod):
        return text
    made = spec.parse(text, METHODS | STAGES, combine=chain)
    return chain(made) if isinstance(made, Stage) else made
