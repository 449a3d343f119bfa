"""What is found of merged experts, and the tables that show it."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mixlab import report

Group = tuple[int, ...]
"""The numbers of the experts that are merged, which are those of their tasks."""


class Result(NamedTuple):
    """What one method reached with one seed.

    Attributes:
        method: its text, or what else was tested.
        seed: of all that is random.
        group: the tasks whose experts were merged, `[T]`.
        accuracy: on the test examples of these tasks, `[T]`.
        scaled: the same of `base + scale * (merged - base)`; None where nothing was merged.
        scale: the one of the family's scales that does best on the validation examples.
    """

    method: str
    seed: int
    group: Group
    accuracy: np.ndarray
    scaled: np.ndarray | None = None
    scale: float | None = None


def write_csv(path: Path, tasks: Sequence[str], results: Sequence[Result]) -> None:
    """A line for each method and seed as it is, and one scaled, with the accuracy on each task."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "scale", *tasks])
        for result in results:
            lines: list[tuple[Any, np.ndarray]] = [("", result.accuracy)]
            if result.scaled is not None:
                lines.append((result.scale, result.scaled))
            for scale, accuracy in lines:
                by_task = dict(zip(result.group, accuracy.tolist(), strict=True))
                row = [by_task.get(i, "") for i in range(len(tasks))]
                writer.writerow([result.method, result.seed, scale, *row])


_LEGEND = """\
Test accuracy in percent: *average* over the tasks, and of the *worst* of them; {over}.
A task's accuracy is among its own classes. *scaled*: what
the merge adds to the base is multiplied by the one of {scales}
that is best for the average on held-out training examples; *scale* is its mean over the seeds.
"""


def page(config: ConfigDict, title: str, merged: list[Result], paired: list[Result]) -> str:
    """`report.md`."""
    listed = ", ".join(f"`{task}`" for task in config.tasks)
    lines = [
        f"# {title}",
        "",
        f"{config.model} on {config.data}: {config.pretrain_steps} steps on "
        f"`{config.pretrain_task}`, then {config.tune_steps} on each of {listed}; "
        f"`{config.optimizer}`, batch {config.batch_size}.",
        "",
        _table(merged),
        "",
        _LEGEND.format(over=_over(config.seeds), scales=", ".join(map(str, config.scales))),
        *(["## Pairs of experts", "", _table(paired), ""] if paired else []),
        "## The plane of three experts",
        "",
        "![Test loss in the plane of three experts](landscape.png)",
        "",
    ]
    return "\n".join(lines)


_COLUMNS: dict[str, Callable[[Result], float | None]] = {
    "average": lambda result: _percent(np.mean, result.accuracy),
    "worst": lambda result: _percent(np.min, result.accuracy),
    "scaled average": lambda result: _percent(np.mean, result.scaled),
    "scaled worst": lambda result: _percent(np.min, result.scaled),
    "scale": lambda result: result.scale,
}


def _over(seeds: Sequence[int]) -> str:
    listed = ", ".join(map(str, seeds))
    return (
        f"seed {listed}"
        if len(seeds) == 1
        else (f"mean ± sample\nstandard deviation over seeds {listed}")
    )


def _table(results: list[Result]) -> str:
    """One row a method: means and deviations over seeds, of the means over groups."""
    rows = [["method", *_COLUMNS]]
    for method in dict.fromkeys(result.method for result in results):
        by_seed: dict[int, list[Result]] = {}
        for result in results:
            if result.method == method:
                by_seed.setdefault(result.seed, []).append(result)
        cells = [_cell(by_seed.values(), column) for column in _COLUMNS.values()]
        rows.append([method, *cells])
    return report.markdown(rows, left=1)


def _cell(by_seed: Iterable[list[Result]], column: Callable[[Result], float | None]) -> str:
    values = ([column(result) for result in groups] for groups in by_seed)
    known = [[value for value in own if value is not None] for own in values]
    return report.cell([float(np.mean(own)) if own else None for own in known], "{:.1f}")


def _percent(reduce: Callable[[np.ndarray], Any], accuracy: np.ndarray | None) -> float | None:
    return None if accuracy is None else 100 * float(reduce(accuracy))
