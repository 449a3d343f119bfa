"""Agents brought into one order of their hidden units, within a program over the agent axis."""

from mixlab import align
from mixlab.agents.strategies.core import Problem
from mixlab.types import Array


def needs(problem: Problem) -> tuple[align.Symmetry, Array]:
    """The symmetry and the images of a problem.

    Raises:
        ValueError: it lacks one.
    """
    if problem.symmetry is None or problem.images is None:
        raise ValueError(
            "aligning agents needs the model's symmetry and images to compare activations on; "
            "give both in Problem(symmetry=..., images=...)"
        )
    return problem.symmetry, problem.images
