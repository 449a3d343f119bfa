"""Pictures of augmentations: one in detail, read from its plan, or all of them on one sheet.

`draw("cutmix | randaugment")` in a notebook, `mixlab gallery` on the command line.
"""

from mixlab.gallery.catalogue import METHODS, NOT_SHOWN, OPS
from mixlab.gallery.drawing import SEED, draw, sheet
from mixlab.gallery.examples import examples
from mixlab.gallery.page import SUFFIXES, check_suffix, save
from mixlab.gallery.steps import Step, steps

__all__ = [
    "METHODS",
    "NOT_SHOWN",
    "OPS",
    "SEED",
    "SUFFIXES",
    "Step",
    "check_suffix",
    "draw",
    "examples",
    "save",
    "sheet",
    "steps",
]
