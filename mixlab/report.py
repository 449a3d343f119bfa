"""What a workdir shows of its runs: report.md, results.csv and figures, from the files alone."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mixlab import figures

COLUMNS = {
    "merged mean": "{:.1f}",
    "merged worst": "{:.1f}",
    "local mean": "{:.1f}",
    "local worst": "{:.1f}",
    "consensus": "{:.1f}",
    "plain average": "{:.1f}",
    "distance": "{:.3f}",
    "plain distance": "{:.3f}",
    "MB sent": "{:.1f}",
    "seconds": "{:.1f}",
}
"""What is measured of a run, and how a table shows it; the fields that differ stand before it."""

_LEGEND = """\
Accuracies are on the test set, in percent. *merged*: right after the last merge; *local*: after the
last local training; mean and worst over agents. *consensus*: the average of all agents after each
was aligned to agent 0, BatchNorm statistics re-estimated; *plain average*: the same without
aligning (agents aligned only pairwise live in different bases, where it is near chance).
*distance*: root mean square distance of the agents to that consensus, as a fraction of their norm;
*plain distance*: to the plain average. *MB sent*: by an agent, on average, in the whole run, from
the sizes of what it sends. *seconds*: training and merging, without compilation and evaluation.
Agents that average within each step are shown, under *merged*, as the average they would form next.
"""


class Run(NamedTuple):
    """One run of a workdir: its name, set-up and records."""

    name: str
    folder: Path
    setup: dict[str, Any]
    records: list[dict[str, Any]]


def write(workdir: str | Path) -> Path:
    """Writes `report.md`, `results.csv` and `figures/` of a workdir.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: the folder holds no runs with records.
    """
    workdir = Path(workdir)
    runs = _read(workdir)
    with open(workdir / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_differing(runs), *COLUMNS])
        writer.writerows([*_names(run, runs), *_row(run)] for run in runs)
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    shown = _figures(runs)
    for name, (figure, _) in shown.items():
        figure.savefig(folder / f"{name}.png")
    config = runs[0].setup["config"]
    lines = [
        f"# {workdir.resolve().name}",
        "",
        f"{runs[0].setup['topology']}; {config['model']} "
        f"({runs[0].setup['parameters']:,} parameters) on {config['data']}; augmentation "
        f"`{config['augment']}`; optimizer `{config['optimizer']}`, batch {config['batch_size']} "
        f"an agent; {config['pretrain_epochs']} epochs apart, then {config['rounds']} rounds of "
        f"{config['epochs_per_round']} epochs. Ran as {runs[0].setup['parallel']}.",
        "",
        table(runs),
        "",
        _LEGEND,
        *(f"## {title}\n\n![{title}](figures/{name}.png)\n" for name, (_, title) in shown.items()),
    ]
    path = workdir / "report.md"
    path.write_text("\n".join(lines))
    return path


def show(path: Path) -> None:
    """Prints the results of a report and where its files are."""
    path = path.resolve()
    workdir = path.parent
    print(f"\n{table(_read(workdir))}\n")
    print(
        "accuracies in percent; 'merged' right after the last merge, 'local' after the last local"
    )
    print("training; consensus = all agents aligned to one basis, then averaged; distance to it")
    print(f"\nreport       {path}")
    print(f"figures      {workdir / 'figures'}")
    print(f"metrics      {workdir / 'results.csv'}, {workdir / 'runs' / '*' / 'metrics.jsonl'}")
    print(f"checkpoints  {workdir / 'runs' / '*' / 'checkpoints'}")


def table(runs: list[Run]) -> str:
    """A Markdown table of the runs that is also readable as it stands."""
    fields = _differing(runs)
    cells = [[*fields, *COLUMNS]]
    for run in runs:
        shown = zip(COLUMNS.values(), _row(run), strict=True)
        cells.append(
            [*_names(run, runs), *("-" if v is None else form.format(v) for form, v in shown)]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = len(fields)
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


def _differing(runs: list[Run]) -> list[str]:
    """The fields of the config in which the runs differ, the strategy last; it is always named."""
    configs = [run.setup["config"] for run in runs]
    fields = [f for f in configs[0] if any(c[f] != configs[0][f] for c in configs)]
    return [*(f for f in fields if f != "strategy"), "strategy"]


def _names(run: Run, runs: list[Run]) -> list[str]:
    return [str(run.setup["config"][field]) for field in _differing(runs)]


def _read(workdir: Path) -> list[Run]:
    runs = []
    for metrics in (workdir / "runs").glob("*/metrics.jsonl"):
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        setup = json.loads((metrics.parent / "setup.json").read_text())
        if records:
            runs.append(Run(metrics.parent.name, metrics.parent, setup, records))
    if not runs:
        raise ValueError(f"{workdir} holds no runs with records; mixlab train --workdir makes them")
    return sorted(runs, key=lambda run: run.setup["number"])


def _row(run: Run) -> list[float | None]:
    """The values of `COLUMNS`."""
    local = [r for r in run.records if r["phase"] == "local"]
    merged = [r for r in run.records if r["phase"] == "merge"]
    last = run.records[-1]

    def percent(record: dict[str, Any] | None, reduce: Any) -> float | None:
        return None if record is None else 100 * float(reduce(record["test_accuracy"]))

    after_merge = merged[-1] if merged else None
    after_local = local[-1] if local else None
    return [
        percent(after_merge, np.mean),
        percent(after_merge, min),
        percent(after_local, np.mean),
        percent(after_local, min),
        100 * last["consensus_accuracy"],
        100 * last["plain_accuracy"],
        last["consensus_distance"],
        last["plain_distance"],
        float(np.mean(last["bytes_sent"])) / 1e6,
        sum(last["seconds"].get(kind, 0.0) for kind in ("train", "merge")),
    ]


def _figures(runs: list[Run]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure and title."""
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        strategy, rest = run.setup["config"]["strategy"], _title(run, runs)
        epoch = [r["epoch"] for r in run.records]
        panels[rest, strategy] = {
            "epoch": epoch,
            "agents": np.array([r["test_accuracy"] for r in run.records]),
            "consensus": [r["consensus_accuracy"] for r in run.records],
            "plain": [r["plain_accuracy"] for r in run.records],
            "rounds_from": run.setup["config"]["pretrain_epochs"],
        }
        groups.setdefault(rest, {})[strategy] = {
            "epoch": epoch,
            "aligned": [r["consensus_distance"] for r in run.records],
            "plain": [r["plain_distance"] for r in run.records],
        }
    first = runs[0]
    counts = {r.setup["config"]["partition"]: np.array(r.setup["partition"]) for r in runs}
    with np.load(first.folder / "sheet.npz") as arrays:
        before, after, labels = (arrays[name] for name in ("before", "image", "label"))
    names = first.setup["class_names"]
    augmentation = first.setup["config"]["augment"]
    return {
        "accuracy": (figures.accuracy(panels), "Accuracy of the agents and of their consensus"),
        "distance": (figures.distance(groups), "Distance to consensus"),
        "topology": (
            figures.topology(np.array(first.setup["weights"]), first.setup["topology"]),
            "Who talks to whom",
        ),
        "partition": (figures.partition(counts, names), "Who holds what"),
        "augmentation": (
            figures.sheet(before, after, labels, names, augmentation),
            "What the agents see",
        ),
    }


def _title(run: Run, runs: list[Run]) -> str:
    """The fields, other than the strategy, in which the runs differ: as a panel's title."""
    *fields, _ = _differing(runs)
    values = (run.setup["config"][field] for field in fields)
    return ", ".join(
        str(v) if f == "partition" else f"{f}={v}" for f, v in zip(fields, values, strict=True)
    )
