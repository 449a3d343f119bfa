"""The tables of a report."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mixlab.report import records

COLUMNS = {
    "merged mean": "{:.1f}",
    "merged worst": "{:.1f}",
    "local mean": "{:.1f}",
    "local worst": "{:.1f}",
    "confidence": "{:.1f}",
    "ECE": "{:.2f}",
    "consensus": "{:.1f}",
    "consensus ECE": "{:.2f}",
    "plain average": "{:.1f}",
    "distance": "{:.3f}",
    "plain distance": "{:.3f}",
    "MB sent": "{:.1f}",
    "seconds": "{:.2f}",
}
"""What is measured of a run, and how a table shows it; the fields that differ stand before it.

`results.csv` has all of it, a table what says something: see `columns`.
"""


def table(runs: list[records.Run]) -> str:
    """A Markdown table of the runs that is also readable as it stands.

    Runs that differ in the seed alone share a row: mean ± sample standard deviation.
    """
    return _table(runs, columns(runs), COLUMNS, row)


def communication(runs: list[records.Run]) -> str:
    """A Markdown table of what communication cost the runs."""
    kinds = kinds_sent(runs)
    forms = communication_columns(kinds)
    row = functools.partial(communication_row, kinds=kinds)
    return _table(runs, {name: name for name in forms}, forms, row)


def summary(runs: list[records.Run]) -> str:
    """A Markdown table of accuracies: a row a setting, a column a strategy."""
    settings, strategies = records.settings(runs), records.strategies(runs)
    fields = records.fields_of_settings(runs)
    cells = [[*fields, *strategies]]
    for values, by_strategy in settings.items():
        found = [records.final(by_strategy.get(strategy, []), runs) for strategy in strategies]
        cells.append([*values, *(cell(list(f), "{:.1f}") for f in found)])
    return markdown(cells, left=len(fields))


def _table(
    runs: list[records.Run],
    columns: dict[str, str],
    forms: dict[str, str],
    row: Callable[[records.Run], list[float | None]],
) -> str:
    fields = records.differing(runs)
    cells = [[*fields, *columns.values()]]
    for group in records.groups(runs):
        values = dict(zip(forms, zip(*map(row, group), strict=True), strict=True))
        cells.append(
            [*records.names(group[0], runs), *(cell(values[name], forms[name]) for name in columns)]
        )
    return markdown(cells, left=len(fields))


def markdown(cells: list[list[str]], *, left: int) -> str:
    """A Markdown table whose first row is the header and whose first `left` columns are text."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        " | ".join(
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = "|".join(
        "-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def cell(values: Sequence[float | None], form: str) -> str:
    """Mean ± sample standard deviation of what is known, `-` where nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(np.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {form.format(np.std(known, ddof=1))}"


def columns(runs: list[records.Run]) -> dict[str, str]:
    """The columns that say something of these runs, each with its heading.

    One agent has no others to merge, agree or talk with. Calibration is shown where models or
    augmentations are compared rather than ways to communicate.
    """
    if records.alone(runs):
        shown = ("confidence", "ECE", "seconds")
        return {"local mean": "accuracy", **{name: name for name in shown}}
    left_out = (
        () if "augment" in records.differing(runs) else ("confidence", "ECE", "consensus ECE")
    )
    return {name: name for name in COLUMNS if name not in left_out}


def row(run: records.Run) -> list[float | None]:
    """The values of `COLUMNS`."""
    local = [r for r in run.records if r["phase"] == "local"]
    merged = [r for r in run.records if r["phase"] == "merge"]
    last = run.records[-1]

    def percent(records: list[dict[str, Any]], name: str, reduce: Any = np.mean) -> float | None:
        if not records or name not in records[-1]:
            return None
        return 100 * float(reduce(records[-1][name]))

    return [
        percent(merged, "test_accuracy"),
        percent(merged, "test_accuracy", min),
        percent(local, "test_accuracy"),
        percent(local, "test_accuracy", min),
        percent(local, "test_confidence"),
        percent(local, "test_ece"),
        percent(run.records, "consensus_accuracy"),
        percent(run.records, "consensus_ece"),
        percent(run.records, "plain_accuracy"),
        last.get("consensus_distance"),
        last.get("plain_distance"),
        records.megabytes(last),
        records.seconds(last),
    ]


def kinds_sent(runs: list[records.Run]) -> list[str]:
    """What agents sent one another in any run, in the order in which runs tell of it."""
    return list(dict.fromkeys(kind for run in runs for kind in run.records[-1]["bytes_sent"]))


def communication_columns(kinds: list[str]) -> dict[str, str]:
    """What communication cost, by the kinds that were sent, and how a table shows it."""
    return {
        "rounds": "{:.0f}",
        "messages": "{:.0f}",
        **{f"{kind} {way}": "{:.2f}" for kind in kinds for way in ("sent", "received")},
        "most sent": "{:.2f}",
        "local": "{:.2f}",
        "match": "{:.2f}",
        "merge": "{:.2f}",
    }


def communication_row(run: records.Run, kinds: list[str]) -> list[float | None]:
    """The values of `communication_columns`."""
    last = run.records[-1]
    sent, received = last["bytes_sent"], last["bytes_received"]
    return [
        last["round"],
        float(np.mean(last["messages"])),
        *(
            float(np.mean(way[kind])) / 1e6 if kind in way else None
            for kind in kinds
            for way in (sent, received)
        ),
        float(np.max(np.sum(list(sent.values()), axis=0))) / 1e6,
        *(last["seconds"].get(kind) for kind in ("local", "match", "merge")),
    ]
