"""What is found between networks, and the table that shows it."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mixlab import report
from mixlab.align import Barrier


class Result(NamedTuple):
    """The line between two networks after one matching.

    Attributes:
        matching: its text.
        seeds: of the two networks.
        repaired: whether the points between them were.
        line: the "loss" and the "accuracy" on the test set.
    """

    matching: str
    seeds: tuple[int, int]
    repaired: bool
    line: Barrier


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """A line for each matching, pair, and point, as it is and repaired."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["matching", "reference", "other", "repaired", "t", "loss", "accuracy"])
        for result in results:
            t, values = result.line.t, result.line.values
            for point in zip(t, values["loss"], values["accuracy"], strict=True):
                own = (result.matching, *result.seeds, int(result.repaired))
                writer.writerow([*own, *map(float, point)])


_LEGEND = """\
*accuracy* (in percent) and *loss*: of the average of the two networks, on the test set.
*barrier*: how much worse than its ends, weighted as at that point, the line between them is at the
worst of {points} points. *repaired*: {repair}.
{pairs}.
"""
_REPAIRS = {
    True: "with BatchNorm's statistics estimated anew at every point",
    False: "with REPAIR at every point",
}


def page(config: ConfigDict, title: str, results: Sequence[Result], batch_norm: bool) -> str:
    """`report.md`.

    Args:
        config: of the experiment.
        title: of the page.
        results: of all pairs.
        batch_norm: whether the networks have it.
    """
    ends = [result.line.values["accuracy"][[0, -1]] for result in results]
    lines = [
        f"# {title}",
        "",
        f"Pairs of {config.model} on {config.data}: {config.epochs} epochs, `{config.optimizer}`, "
        f"batch {config.batch_size}. A network by itself: {100 * np.mean(ends):.1f} %.",
        "",
        _table(results),
        "",
        _LEGEND.format(
            pairs=(
                "One pair"
                if len(config.seeds) == 2
                else f"Mean ± sample standard deviation over {len(config.seeds) // 2} pairs"
            ),
            points=config.points,
            repair=_REPAIRS[batch_norm],
        ),
        f"## Networks {config.seeds[0]} and {config.seeds[1]}",
        "",
        "![Loss and accuracy along the line after each matching](barriers.png)",
        "",
        "Repaired:",
        "",
        "![Loss and accuracy along the repaired line](barriers_repaired.png)",
        "",
    ]
    return "\n".join(lines)


def _table(results: Sequence[Result]) -> str:
    """One row a matching; of accuracy and loss the midpoint and the barrier, plain and repaired."""
    kinds = [(metric, repaired) for metric in ("accuracy", "loss") for repaired in (False, True)]
    header = ["matching"]
    for metric, repaired in kinds:
        header += [f"repaired {metric}" if repaired else metric, "barrier"]
    rows = [header]
    for matching in dict.fromkeys(result.matching for result in results):
        row = [matching]
        for metric, repaired in kinds:
            own = [r.line for r in results if (r.matching, r.repaired) == (matching, repaired)]
            scale, form = (100, "{:.1f}") if metric == "accuracy" else (1, "{:.2f}")
            midpoints = [scale * line.values[metric][len(line.t) // 2] for line in own]
            row.append(report.cell(midpoints, form))
            row.append(report.cell([scale * line.barrier[metric] for line in own], form))
        rows.append(row)
    return report.markdown(rows, left=1)
