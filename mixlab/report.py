"""What a workdir shows of its runs: report.md, results.csv and figures, from the files alone."""

import csv
import json
from collections.abc import Sequence
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
    "confidence": "{:.1f}",
    "ECE": "{:.2f}",
    "consensus": "{:.1f}",
    "consensus ECE": "{:.2f}",
    "plain average": "{:.1f}",
    "distance": "{:.3f}",
    "plain distance": "{:.3f}",
    "MB sent": "{:.1f}",
    "seconds": "{:.1f}",
}
"""What is measured of a run, and how a table shows it; the fields that differ stand before it.

`results.csv` has all of it, a table what says something: see `_columns`.
"""

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

_LEGEND_OF_ONE = """\
Accuracy is on the test set after the last epoch, in percent. *seconds*: training, without
compilation and evaluation.
"""

_LEGEND_OF_ECE = """\
*confidence*: the mean of the largest probability; above the accuracy where a model is too sure of
itself, below where it is not sure enough. *ECE*: expected calibration error, how far the two lie
apart: the mean over examples of the gap in their bin of confidence (15 bins of equal width).
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
    fields = [*_differing(runs), *(["seed"] if _seeds(runs) else [])]
    with open(workdir / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *COLUMNS])
        for run in runs:
            writer.writerow([*(run.setup["config"][field] for field in fields), *_row(run)])
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    shown = _figures(runs)
    for name, (figure, _) in shown.items():
        figure.savefig(folder / f"{name}.png")
    lines = [
        f"# {workdir.resolve().name}",
        "",
        _about(runs),
        "",
        table(runs),
        "",
        _LEGEND_OF_ONE if _alone(runs) else _LEGEND,
        *([_LEGEND_OF_ECE] if "ECE" in _columns(runs) else []),
        *_notes(runs),
        "",
        *(f"## {title}\n\n![{title}](figures/{name}.png)\n" for name, (_, title) in shown.items()),
    ]
    path = workdir / "report.md"
    path.write_text("\n".join(lines))
    return path


def show(path: Path) -> None:
    """Prints the results of a report and where its files are."""
    path = path.resolve()
    workdir = path.parent
    runs = _read(workdir)
    print(f"\n{table(runs)}\n")
    if _alone(runs):
        print("on the test set, in percent; ECE = expected calibration error")
    else:
        print(
            "accuracies in percent; 'merged' right after the last merge, 'local' after the last "
            "local\ntraining; consensus = all agents aligned to one basis, then averaged; distance "
            "to it"
        )
    for note in _notes(runs):
        print(note)
    print(f"\nreport       {path}")
    print(f"figures      {workdir / 'figures'}")
    print(f"metrics      {workdir / 'results.csv'}, {workdir / 'runs' / '*' / 'metrics.jsonl'}")
    print(f"checkpoints  {workdir / 'runs' / '*' / 'checkpoints'}")


def table(runs: list[Run]) -> str:
    """A Markdown table of the runs that is also readable as it stands.

    Runs that differ in the seed alone share a row: mean ± sample standard deviation.
    """
    fields, columns = _differing(runs), _columns(runs)
    cells = [[*fields, *columns.values()]]
    for group in _groups(runs):
        values = dict(zip(COLUMNS, zip(*map(_row, group), strict=True), strict=True))
        cells.append(
            [*_names(group[0], runs), *(cell(values[name], COLUMNS[name]) for name in columns)]
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


def _columns(runs: list[Run]) -> dict[str, str]:
    """The columns that say something of these runs, each with its heading.

    One agent has no others to merge, agree or talk with. Calibration is shown where models or
    augmentations are compared rather than ways to communicate.
    """
    if _alone(runs):
        shown = ("confidence", "ECE", "seconds")
        return {"local mean": "accuracy", **{name: name for name in shown}}
    left_out = () if "augment" in _differing(runs) else ("confidence", "ECE", "consensus ECE")
    return {name: name for name in COLUMNS if name not in left_out}


def _alone(runs: list[Run]) -> bool:
    """Whether all of it is ordinary training, of one agent."""
    return all(run.setup["config"]["agents"] == 1 for run in runs)


def _differing(runs: list[Run]) -> list[str]:
    """The fields of the config in which the runs differ, the seed aside, the strategy last.

    The strategy is always named, but for one agent only where nothing else is.
    """
    configs = [run.setup["config"] for run in runs]
    fields = [f for f in configs[0] if any(c[f] != configs[0][f] for c in configs)]
    others = [f for f in fields if f not in ("seed", "strategy")]
    named = "strategy" in fields or not (_alone(runs) and others)
    return [*others, *(["strategy"] if named else [])]


def _seeds(runs: list[Run]) -> list[int]:
    """The seeds, where there are several."""
    seeds = sorted({run.setup["config"]["seed"] for run in runs})
    return seeds if len(seeds) > 1 else []


def _groups(runs: list[Run]) -> list[list[Run]]:
    """The runs, those together that differ in nothing but the seed, as far as all have come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps({**run.setup["config"], "seed": None}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    together = []
    for group in groups.values():
        count = min(len(run.records) for run in group)
        together.append([run._replace(records=run.records[:count]) for run in group])
    return together


def _names(run: Run, runs: list[Run]) -> list[str]:
    """The values of the fields in which the runs differ."""
    return [_value(run, field, runs) for field in _differing(runs)]


def _value(run: Run, field: str, runs: list[Run]) -> str:
    value = str(run.setup["config"][field])
    if field == "augment" and (base := _base(runs)):
        return value.removeprefix(base).removeprefix(" | ") or "base alone"
    return value


def _base(runs: list[Run]) -> str:
    """The chain with which the augmentations of all runs begin."""
    texts = [run.setup["config"]["augment"] for run in runs]
    parts = texts[0].split(" | ")
    for count in range(len(parts), 0, -1):
        head = " | ".join(parts[:count])
        whole = head.count("(") == head.count(")")  # not cut within an argument
        if whole and all(f"{text} | ".startswith(f"{head} | ") for text in texts):
            return head
    return ""


def _notes(runs: list[Run]) -> list[str]:
    """What a reader of this table has to know besides."""
    notes = []
    if "augment" in _differing(runs) and (base := _base(runs)):
        notes.append(f"Each augmentation follows the base `{base}`.")
    if seeds := _seeds(runs):
        notes.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
    return notes


def _about(runs: list[Run]) -> str:
    """The set-up in a sentence."""
    setup = runs[0].setup
    config = setup["config"]
    compared = "augment" in _differing(runs)
    augmentation = "" if compared else f"; augmentation `{config['augment']}`"
    splits = config["train_split"], config["test_split"]
    some = "" if splits == ("train", "test") else " ({}, {})".format(*splits)
    model = f"{config['model']} ({setup['parameters']:,} parameters) on {config['data']}{some}"
    optimizer = f"optimizer `{config['optimizer']}`, batch {config['batch_size']}"
    if _alone(runs):
        epochs = config["pretrain_epochs"] + config["rounds"] * config["epochs_per_round"]
        return (
            f"{model}{augmentation}; {optimizer}; {epochs} epochs of {setup['steps_per_epoch']} "
            f"steps. Ran as {setup['parallel']}."
        )
    return (
        f"{setup['topology']}; {model}{augmentation}; {optimizer} an agent; "
        f"{config['pretrain_epochs']} epochs apart, then {config['rounds']} rounds of "
        f"{config['epochs_per_round']} epochs. Ran as {setup['parallel']}."
    )


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
        float(np.mean(last["bytes_sent"])) / 1e6,
        sum(last["seconds"].get(kind, 0.0) for kind in ("train", "merge")),
    ]


def _figures(runs: list[Run]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure and title."""
    shown = _figures_of_one(runs) if _alone(runs) else _figures_of_many(runs)
    if "augment" in _differing(runs):
        points = {
            _label(group[0], runs): {
                name: _over_seeds(group, f"test_{name}")[:, -1].mean(axis=1)
                for name in ("accuracy", "ece")
            }
            for group in _groups(runs)
        }
        shown["calibration"] = (figures.calibration(points), "Accuracy against calibration error")
    shown["augmentation"] = (_sheet(runs), "What the agents see")
    return shown


def _sheet(runs: list[Run]) -> Figure:
    """Training images before and after the augmentation, or each of them, of the first seed."""
    sheets: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        with np.load(run.folder / "sheet.npz") as arrays:
            sheets.setdefault(_value(run, "augment", runs), dict(arrays))
    first = next(iter(sheets.values()))
    if len(sheets) > 1:
        return figures.sheets(first["before"], {name: s["image"] for name, s in sheets.items()})
    setup = runs[0].setup
    labels, names, augmentation = first["label"], setup["class_names"], setup["config"]["augment"]
    return figures.sheet(first["before"], first["image"], labels, names, augmentation)


def _figures_of_one(runs: list[Run]) -> dict[str, tuple[Figure, str]]:
    curves = {
        _label(group[0], runs): {
            "epoch": _epochs(group),
            "accuracy": _over_seeds(group, "test_accuracy")[..., 0],
        }
        for group in _groups(runs)
    }
    return {"accuracy": (figures.learning(curves), "Accuracy over epochs")}


def _figures_of_many(runs: list[Run]) -> dict[str, tuple[Figure, str]]:
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for group in _groups(runs):
        config = group[0].setup["config"]
        strategy, rest = config["strategy"], _label(group[0], runs, but="strategy")
        agents = _over_seeds(group, "test_accuracy")
        panels[rest, strategy] = {
            "epoch": _epochs(group),
            "agents": np.concatenate(agents, axis=1),
            "consensus": _over_seeds(group, "consensus_accuracy").mean(axis=0),
            "plain": _over_seeds(group, "plain_accuracy").mean(axis=0),
            "rounds_from": config["pretrain_epochs"],
        }
        groups.setdefault(rest, {})[strategy] = {
            "epoch": _epochs(group),
            "aligned": _over_seeds(group, "consensus_distance").mean(axis=0),
            "plain": _over_seeds(group, "plain_distance").mean(axis=0),
        }
    first = runs[0].setup
    counts = {r.setup["config"]["partition"]: np.array(r.setup["partition"]) for r in runs}
    return {
        "accuracy": (figures.accuracy(panels), "Accuracy of the agents and of their consensus"),
        "distance": (figures.distance(groups), "Distance to consensus"),
        "topology": (
            figures.topology(np.array(first["weights"]), first["topology"]),
            "Who talks to whom",
        ),
        "partition": (figures.partition(counts, first["class_names"]), "Who holds what"),
    }


def _over_seeds(group: list[Run], name: str) -> np.ndarray:
    """What was recorded under `name`, [seeds, records, ...], NaN where it was not."""
    return np.array([[record.get(name, np.nan) for record in run.records] for run in group])


def _epochs(group: list[Run]) -> np.ndarray:
    return _over_seeds(group, "epoch")[0]


def _label(run: Run, runs: list[Run], but: str = "") -> str:
    """The values of the fields in which the runs differ, as the title of a panel."""
    return ", ".join(
        value if field in ("augment", "partition", "strategy") else f"{field}={value}"
        for field, value in zip(_differing(runs), _names(run, runs), strict=True)
        if field != but
    )
