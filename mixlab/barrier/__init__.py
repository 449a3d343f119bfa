"""The barrier between networks trained apart, before and after their units are matched.

`mixlab barrier` runs it. For models of one's own see `mixlab.align.barrier`.
"""

from mixlab.barrier.job import default_config, run
from mixlab.barrier.matchings import MATCHINGS, Matching, Pair, parse_matching
from mixlab.barrier.tables import Result

__all__ = [
    "MATCHINGS",
    "Matching",
    "Pair",
    "Result",
    "default_config",
    "parse_matching",
    "run",
]
