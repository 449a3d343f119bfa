"""Finds the permutation symmetries of a network, and matches the hidden units of two of them."""

from mixlab.align.activations import (
    Centred,
    Moments,
    activation_matching,
    activation_statistics,
    centre,
    correlation,
    covariance,
    cross_moments,
    dead_units,
    match_activations,
    match_models,
    match_moments,
    matching_report,
    merge_moments,
    moments,
    second_moment,
)
from mixlab.align.assignment import assignment
from mixlab.align.barrier import Barrier, barrier
from mixlab.align.repair import reestimate_batch_stats, repair
from mixlab.align.sinkhorn import sinkhorn, sinkhorn_matching
from mixlab.align.straight_through import straight_through
from mixlab.align.symmetry import Permutations, Symmetry, infer_symmetry
from mixlab.align.universe import activation_universe, match_universe, weight_universe
from mixlab.align.weights import weight_matching
from mixlab.align.zipping import (
    Zipped,
    optimal_zip_units,
    zip_models,
    zip_models_partially,
    zip_units,
)

__all__ = [
    "Barrier",
    "Centred",
    "Moments",
    "Permutations",
    "Symmetry",
    "Zipped",
    "activation_matching",
    "activation_statistics",
    "activation_universe",
    "assignment",
    "barrier",
    "centre",
    "correlation",
    "covariance",
    "cross_moments",
    "dead_units",
    "infer_symmetry",
    "match_activations",
    "match_models",
    "match_moments",
    "match_universe",
    "matching_report",
    "merge_moments",
    "moments",
    "optimal_zip_units",
    "reestimate_batch_stats",
    "repair",
    "second_moment",
    "sinkhorn",
    "sinkhorn_matching",
    "straight_through",
    "weight_matching",
    "weight_universe",
    "zip_models",
    "zip_models_partially",
    "zip_units",
]
