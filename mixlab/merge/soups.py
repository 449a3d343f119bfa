"""Soups: averages of those models that a score favours."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mixlab import trees
from mixlab.merge.averaging import average
from mixlab.types import PyTree


class Soup(NamedTuple):
    """What `greedy_soup` made.

    Attributes:
        params: the average of the picked models.
        score: of `params`.
        picks: indices of the models in it, in the order they were added.
        scores: of each model alone, in the order they were given.
    """

    params: PyTree
    score: float
    picks: list[int]
    scores: list[float]


def greedy_soup(
    models: Sequence[PyTree] | PyTree,
    score: Callable[[PyTree], float],
    *,
    base: PyTree | None = None,
) -> Soup:
    """Adds models to an average, the best first, each if the score does not fall.

    `score` is called at most twice a model. It is Python, so this is a function and no
    `MergeMethod`; the average of all models, the uniform soup, is `average()`.

    Args:
        models: a list (or plain tuple) of M pytrees, or one stacked pytree.
        score: `score(params)`, higher is better, on data that is held out; NaN counts as the
            lowest.
        base: where integer, bool and None leaves come from; by default the best model.

    Raises:
        ValueError: there is no model, or they do not match.

    Source: Wortsman et al. 2022, "Model soups", recipe 1.
    """
    each = list(models) if type(models) in (list, tuple) else trees.unstack(models)
    if not each:
        raise ValueError("models is an empty list; give at least one model")

    def rated(params: PyTree) -> float:
        value = float(score(params))
        return -math.inf if math.isnan(value) else value

    scores = [rated(model) for model in each]
    order = sorted(range(len(each)), key=lambda i: -scores[i])
    picks = [order[0]]
    soup, best = average()([each[order[0]]], base=base), scores[order[0]]
    for i in order[1:]:
        tried = average()([each[j] for j in [*picks, i]], base=base)
        if (value := rated(tried)) >= best:
            soup, best, picks = tried, value, [*picks, i]
    return Soup(soup, best, picks, scores)
