"""The figures of reports. Each function draws one and returns it; nothing is shown or saved."""

from mixlab.figures.agents import partition, topology
from mixlab.figures.images import sheet, sheets
from mixlab.figures.models import agreement, barriers, landscape, symmetry
from mixlab.figures.runs import accuracy, calibration, curves, distance, learning, styles, summary

__all__ = [
    "accuracy",
    "agreement",
    "barriers",
    "calibration",
    "curves",
    "distance",
    "landscape",
    "learning",
    "partition",
    "sheet",
    "sheets",
    "styles",
    "summary",
    "symmetry",
    "topology",
]
