"""What a workdir shows of its runs: report.md, results.csv and figures, from the files alone."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
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
    "seconds": "{:.2f}",
}
"""What is measured of a run, and how a table shows it; the fields that differ stand before it.

`results.csv` has all of it, a table what says something: see `_columns`.
"""

KINDS = ("parameters", "statistics", "gradients", "data", "activations")
"""What agents send one another."""

COMMUNICATION = {
    "rounds": "{:.0f}",
    "messages": "{:.0f}",
    **{f"{kind} {way}": "{:.2f}" for kind in KINDS for way in ("sent", "received")},
    "most sent": "{:.2f}",
    "local": "{:.2f}",
    "match": "{:.2f}",
    "merge": "{:.2f}",
}
"""What communication cost a run, and how a table shows it."""

_LEGEND = """\
Accuracies are on the test set, in percent. *merged*: right after the last merge; *local*: after the
last local training; mean and worst over agents. *consensus*: the average of all agents after each
was aligned to agent 0, BatchNorm statistics re-estimated; *plain average*: the same without
aligning (agents aligned only pairwise live in different bases, where it is near chance).
*distance*: root mean square distance of the agents to that consensus, as a fraction of their norm;
*plain distance*: to the plain average. *MB sent*: by an agent, on average, in the whole run.
*seconds*: training, matching and merging, without compilation and evaluation.
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


_LEGEND_OF_COMMUNICATION = """\
An agent's share on average, in the whole run. *messages*: sent; *sent* and *received*: megabytes
(10^6 bytes) by kind; *most sent*: by the agent that sends most; *local*, *match*, *merge*: seconds
of all agents together, without compilation. Runs that were made at the same time
(`mixlab sweep --jobs`) have slowed one another.
"""

_LEGEND_OF_SUMMARY = """\
Test accuracy in percent, the mean of the agents, right after the last merge; of agents that never
merge, at the same time.
"""

_PANELS = 6
"""Settings that a figure shows; more of them are spread over several figures."""


class Run(NamedTuple):
    """One run of a workdir: its name, set-up and records."""

    name: str
    folder: Path
    setup: dict[str, Any]
    records: list[dict[str, Any]]


class Failure(NamedTuple):
    """A run that ended before its time: its name, why, after which step, and its config.

    The last two are None where it failed before they were known.
    """

    name: str
    reason: str
    step: int | None
    config: dict[str, Any] | None


def write(workdir: str | Path) -> Path:
    """Writes `report.md`, `results.csv` and `figures/` of a workdir.

    Runs that failed are named with their reasons, and are no part of any mean.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: the folder holds no runs with records.
    """
    workdir = Path(workdir)
    runs, failures = _read(workdir)
    fields = [*_differing(runs), *(["seed"] if _seeds(runs) else [])]
    with open(workdir / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *COLUMNS, *COMMUNICATION])
        for run in runs:
            values = (run.setup["config"][field] for field in fields)
            writer.writerow([*values, *_row(run), *_communication(run)])
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()  # of runs that were fewer
    shown = _figures(runs, failures)
    for name, (figure, _) in shown.items():
        figure.savefig(folder / f"{name}.png")
    lines = [
        f"# {workdir.resolve().name}",
        "",
        _about(runs),
        "",
        *(["## Summary", "", summary(runs), "", _LEGEND_OF_SUMMARY] if _is_large(runs) else []),
        *(["## All runs", ""] if _is_large(runs) else []),
        table(runs),
        "",
        _LEGEND_OF_ONE if _alone(runs) else _LEGEND,
        *([_LEGEND_OF_ECE] if "ECE" in _columns(runs) else []),
        *_notes(runs),
        "",
        *_about_failures(failures),
        *_about_faults(runs),
        *([] if _alone(runs) else _about_communication(runs)),
        *(f"## {title}\n\n![{title}](figures/{name}.png)\n" for name, (_, title) in shown.items()),
    ]
    path = workdir / "report.md"
    path.write_text("\n".join(lines))
    return path


def show(path: Path) -> None:
    """Prints the results of a report and where its files are."""
    path = path.resolve()
    workdir = path.parent
    runs, failures = _read(workdir)
    print(f"\n{summary(runs) if _is_large(runs) else table(runs)}\n")
    if _is_large(runs):
        print(_LEGEND_OF_SUMMARY, end="")
    elif _alone(runs):
        print("on the test set, in percent; ECE = expected calibration error")
    else:
        print(
            "accuracies in percent; 'merged' right after the last merge, 'local' after the last "
            "local\ntraining; consensus = all agents aligned to one basis, then averaged; distance "
            "to it"
        )
    for note in _notes(runs):
        print(note)
    if failures:
        print()
    for failure in failures:
        print(f"FAILED  {failure.name}: {failure.reason}")
    print(f"\nreport       {path}")
    print(f"figures      {workdir / 'figures'}")
    print(f"metrics      {workdir / 'results.csv'}, {workdir / 'runs' / '*' / 'metrics.jsonl'}")
    print(f"checkpoints  {workdir / 'runs' / '*' / 'checkpoints'}")


def table(runs: list[Run]) -> str:
    """A Markdown table of the runs that is also readable as it stands.

    Runs that differ in the seed alone share a row: mean ± sample standard deviation.
    """
    return _table(runs, _columns(runs), COLUMNS, _row)


def communication(runs: list[Run]) -> str:
    """A Markdown table of what communication cost the runs, of the kinds that were sent."""
    used = [k for k in KINDS if any(k in run.records[-1]["bytes_sent"] for run in runs)]
    left_out = [f"{k} {way}" for k in KINDS if k not in used for way in ("sent", "received")]
    columns = {name: name for name in COMMUNICATION if name not in left_out}
    return _table(runs, columns, COMMUNICATION, _communication)


def summary(runs: list[Run]) -> str:
    """A Markdown table of accuracies: a row a setting, a column a strategy."""
    settings, strategies = _settings(runs), _strategies(runs)
    fields = _fields_of_settings(runs)
    cells = [[*fields, *strategies]]
    for values, by_strategy in settings.items():
        found = [_final(by_strategy.get(strategy, []), runs) for strategy in strategies]
        cells.append([*values, *(cell(list(f), "{:.1f}") for f in found)])
    return markdown(cells, left=len(fields))


def _table(
    runs: list[Run],
    columns: dict[str, str],
    forms: dict[str, str],
    row: Callable[[Run], list[float | None]],
) -> str:
    fields = _differing(runs)
    cells = [[*fields, *columns.values()]]
    for group in _groups(runs):
        values = dict(zip(forms, zip(*map(row, group), strict=True), strict=True))
        cells.append(
            [*_names(group[0], runs), *(cell(values[name], forms[name]) for name in columns)]
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
    for field in _determined(runs):
        used: dict[str, list[str]] = {}
        for run in runs:
            config = run.setup["config"]
            used.setdefault(str(config[field]), []).append(config["strategy"])
        each = (f"`{value}` of {', '.join(dict.fromkeys(s))}" for value, s in used.items())
        notes.append(f"The {field}: {'; '.join(each)}.")
    if seeds := _seeds(runs):
        notes.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
    return notes


def _about_failures(failures: list[Failure]) -> list[str]:
    if not failures:
        return []
    cells = [["run", "after step", "reason"]]
    for failure in failures:
        step = "-" if failure.step is None else str(failure.step)
        cells.append([failure.name, step, " ".join(failure.reason.split())])
    return ["## Runs that failed", "", markdown(cells, left=3), ""]


def _about_faults(runs: list[Run]) -> list[str]:
    """What happened to the agents, told once for the runs to which the same happened."""
    told: dict[str, Run] = {}
    for run in runs:
        if run.setup["faults"]:
            told.setdefault(run.setup["faults"], run)
    if not told:
        return []
    several = bool(_seeds(runs))
    lines = []
    for text, run in told.items():
        config = run.setup["config"]
        seed = f", seed {config['seed']}" if several else ""
        lines.append(f"- `{config['faults']}`{seed}: {'; '.join(text.splitlines())}")
    if any(run.setup["byzantine"] for run in runs):
        lines += ["", "Accuracies are those of the agents that are not Byzantine."]
    if any(" absent" in text for text in told):
        lines += ["", "Agents that are absent count, in means and worst, with what they had."]
    lines += ["", "Rounds are counted from 0 here, as in plans of faults."]
    return ["## Faults", "", *lines, ""]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _about_communication(runs: list[Run]) -> list[str]:
    return ["## Communication", "", communication(runs), "", _LEGEND_OF_COMMUNICATION]


def _about(runs: list[Run]) -> str:
    """The set-up in a sentence."""
    setup = runs[0].setup
    config = setup["config"]
    compared = "augment" in _differing(runs)
    augmentation = "" if compared else f"; augmentation `{config['augment']}`"
    splits = config["train_split"], config["test_split"]
    some = "" if splits == ("train", "test") else " ({}, {})".format(*splits)
    model = f"{config['model']} ({setup['parameters']:,} parameters) on {config['data']}{some}"
    common = "" if "optimizer" in _differing(runs) else f"optimizer `{config['optimizer']}`, "
    optimizer = f"{common}batch {config['batch_size']}"
    if _alone(runs):
        epochs = config["pretrain_epochs"] + config["rounds"] * config["epochs_per_round"]
        return (
            f"{model}{augmentation}; {optimizer}; {epochs} epochs of {setup['steps_per_epoch']} "
            f"steps. Ran as {setup['parallel']}."
        )
    differing = _differing(runs)
    topology = "" if {"agents", "topology"} & {*differing} else f"{setup['topology']}; "
    ran = "" if "agents" in differing else f" Ran as {setup['parallel']}."
    if config.get("start_from") and "start_from" not in differing:
        ran = f" Began with the agents of `{config['start_from']}`.{ran}"
    return (
        f"{topology}{model}{augmentation}; {optimizer} an agent; "
        f"{_count(config['pretrain_epochs'], 'epoch')} apart, then "
        f"{_count(config['rounds'], 'round')} of "
        f"{_count(config['epochs_per_round'], 'epoch')}.{ran}"
    )


def _read(workdir: Path) -> tuple[list[Run], list[Failure]]:
    runs, failures = [], []
    for folder in sorted((workdir / "runs").glob("*")):
        metrics, about = folder / "metrics.jsonl", folder / "setup.json"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        setup: dict[str, Any] = {"config": None, "byzantine": []}
        if about.exists():
            setup = json.loads(about.read_text())
        records = [_of_honest(json.loads(line), setup["byzantine"]) for line in lines]
        failed = folder / "failed.json"
        if failed.exists():
            reason = json.loads(failed.read_text())["reason"]
            step = records[-1]["step"] if records else None
            failures.append(Failure(folder.name, reason, step, setup["config"]))
        elif records:
            runs.append(Run(folder.name, folder, setup, records))
    if not runs:
        raise ValueError(f"{workdir} holds no runs with records; mixlab train --workdir makes them")
    return sorted(runs, key=lambda run: run.setup["number"]), failures


def _of_honest(record: dict[str, Any], byzantine: list[int]) -> dict[str, Any]:
    """What was measured of the agents that are not Byzantine; what they sent stays."""
    return {
        name: np.delete(value, byzantine).tolist() if name.startswith(("test", "train")) else value
        for name, value in record.items()
    }


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
        _megabytes(last),
        _seconds(last),
    ]


def _communication(run: Run) -> list[float | None]:
    """The values of `COMMUNICATION`."""
    last = run.records[-1]
    sent, received = last["bytes_sent"], last["bytes_received"]
    return [
        last["round"],
        float(np.mean(last["messages"])),
        *(
            float(np.mean(way[kind])) / 1e6 if kind in way else None
            for kind in KINDS
            for way in (sent, received)
        ),
        float(np.max(np.sum(list(sent.values()), axis=0))) / 1e6,
        *(last["seconds"].get(kind, 0.0) for kind in ("local", "match", "merge")),
    ]


def _megabytes(record: dict[str, Any]) -> float:
    """Sent by now, by an agent on average."""
    return sum(float(np.mean(sent)) for sent in record["bytes_sent"].values()) / 1e6


def _seconds(record: dict[str, Any]) -> float:
    return sum(record["seconds"].get(kind, 0.0) for kind in ("local", "match", "merge"))


def _after_merges(run: Run, runs: list[Run]) -> list[dict[str, Any]]:
    """The records right after merging; of what is not merged by rounds, those at the same steps.

    Where nothing at all merges by rounds, the last is that at the end of the run.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for record in run.records:  # a merge is recorded after the local training before it
        by_step[record["step"]] = record
    found = [by_step[step] for step in sorted(by_step)]
    merging = any(record["phase"] == "merge" for run in runs for record in run.records)
    return found[:-1] if merging and len(found) > 1 else found


def _final(group: list[Run], runs: list[Run]) -> list[float]:
    """Accuracy in percent after the last merge, the mean of the agents, of each seed."""
    last = [_after_merges(run, runs)[-1] for run in group]
    return [100 * float(np.mean(record["test_accuracy"])) for record in last]


def _strategies(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.setup["config"]["strategy"] for run in runs))


def _fields_of_settings(runs: list[Run]) -> list[str]:
    """The fields that differ, without those that the strategy determines."""
    fields = [field for field in _differing(runs) if field not in _determined(runs)]
    return [field for field in fields if field != "strategy"]


def _determined(runs: list[Run]) -> list[str]:
    """The fields that differ between strategies, but not among the runs of one."""
    found = []
    for field in _differing(runs):
        pairs = {(run.setup["config"]["strategy"], str(run.setup["config"][field])) for run in runs}
        if field != "strategy" and len(pairs) == len(_strategies(runs)) > 1:
            found.append(field)
    return found


def _settings(runs: list[Run]) -> dict[tuple[str, ...], dict[str, list[Run]]]:
    """Setting -> strategy -> its runs, one a seed.

    A setting is the values of `_fields_of_settings`. Isolated agents do not depend on the
    topology: run on one, they stand with every one.
    """
    fields = _fields_of_settings(runs)
    order = {
        field: list(dict.fromkeys(_value(run, field, runs) for run in runs)) for field in fields
    }
    found: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    isolated = []
    for group in _groups(runs):
        values = [_value(group[0], field, runs) for field in fields]
        strategy = group[0].setup["config"]["strategy"]
        found.setdefault(tuple(values), {})[strategy] = group
        if strategy == "none" and "topology" in fields:
            isolated.append((values, group))
    for values, group in isolated:
        for topology in order["topology"]:
            place = fields.index("topology")
            setting = (*values[:place], topology, *values[place + 1 :])
            if setting in found:
                found[setting].setdefault("none", group)
    ranks = {s: [order[f].index(v) for f, v in zip(fields, s, strict=True)] for s in found}
    return {setting: found[setting] for setting in sorted(found, key=lambda s: ranks[s])}


def _is_large(runs: list[Run]) -> bool:
    """Whether there are several strategies in so many settings that a summary helps."""
    return len(_strategies(runs)) > 1 and len(_settings(runs)) > 2


def _pages(settings: list[tuple[str, ...]], depth: int = 0) -> list[list[tuple[str, ...]]]:
    """Settings that share a figure: those with equal first values, as many as are legible."""
    if len(settings) <= _PANELS:
        return [settings]
    if depth + 1 >= len(settings[0]):
        return [settings[i : i + _PANELS] for i in range(0, len(settings), _PANELS)]
    pages: dict[str, list[tuple[str, ...]]] = {}
    for setting in settings:
        pages.setdefault(setting[depth], []).append(setting)
    return [page for part in pages.values() for page in _pages(part, depth + 1)]


def _figures(runs: list[Run], failures: list[Failure]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure and title."""
    shown = _figures_of_one(runs) if _alone(runs) else _figures_of_many(runs, failures)
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


def _figures_of_many(runs: list[Run], failures: list[Failure]) -> dict[str, tuple[Figure, str]]:
    settings = _settings(runs)
    styles = figures.styles(_strategies(runs))
    shown: dict[str, tuple[Figure, str]] = {}
    if _is_large(runs):
        shown["summary"] = (_summary_figure(runs, failures), "Accuracy of each strategy")
    fields, pages = _fields_of_settings(runs), _pages(list(settings))
    for number, page in enumerate(pages, 1):
        # What all settings of a page share is in its name and title, the rest in the panels'.
        named = [list(zip(fields, setting, strict=True)) for setting in page]
        constant = set.intersection(*(set(pairs) for pairs in named))
        shared = {field for field, _ in constant} if len(pages) > 1 else set()
        title = _title(pair for pair in named[0] if pair[0] in shared)
        rows = {
            _title(pair for pair in pairs if pair[0] not in shared): settings[setting]
            for pairs, setting in zip(named, page, strict=True)
        }
        about = f": {title}" if title else ""
        suffix = f"-{number}-{_slug(title)}".rstrip("-") if len(pages) > 1 else ""
        for name, (figure, text) in _figures_of_page(rows, runs, styles).items():
            shown[name + suffix] = (figure, text + about)
    topologies = {run.setup["topology"]: run.setup["weights"] for run in runs}
    for text, weights in topologies.items():
        name = "topology" if len(topologies) == 1 else f"topology-{_slug(text.partition(',')[0])}"
        figure = figures.topology(np.array(weights), text)
        shown[name] = (figure, "Who talks to whom")
    counts: dict[str, np.ndarray] = {}
    several = "agents" in _differing(runs)
    for run in runs:
        config = run.setup["config"]
        label = f"{config['agents']} agents, " if several else ""
        counts.setdefault(label + config["partition"], np.array(run.setup["partition"]))
    names = runs[0].setup["class_names"]
    shown["partition"] = (figures.partition(counts, names), "Who holds what")
    return shown


def _figures_of_page(
    rows: dict[str, dict[str, list[Run]]], runs: list[Run], styles: dict[str, dict[str, Any]]
) -> dict[str, tuple[Figure, str]]:
    """Those of a few settings; `rows` is setting -> strategy -> runs."""
    curves: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    distances: dict[str, dict[str, dict[str, Any]]] = {}
    for row, by_strategy in rows.items():
        for strategy in filter(by_strategy.get, styles):
            group = by_strategy[strategy]
            config = group[0].setup["config"]
            after = [run._replace(records=_after_merges(run, runs)) for run in group]
            start, length = config["pretrain_epochs"], config["epochs_per_round"]
            curves.setdefault(row, {})[strategy] = {
                "rounds": np.maximum(0, _epochs(after) - start) / length,
                "MB": np.mean([[_megabytes(r) for r in run.records] for run in after], axis=0),
                "seconds": np.mean([[_seconds(r) for r in run.records] for run in after], axis=0),
                "accuracy": _over_seeds(after, "test_accuracy").mean(axis=2),
            }
            panels[row, strategy] = {
                "epoch": _epochs(group),
                "agents": np.concatenate(_over_seeds(group, "test_accuracy"), axis=1),
                "consensus": _over_seeds(group, "consensus_accuracy").mean(axis=0),
                "plain": _over_seeds(group, "plain_accuracy").mean(axis=0),
                "rounds_from": start,
            }
            distances.setdefault(row, {})[strategy] = {
                "epoch": _epochs(group),
                "aligned": _over_seeds(group, "consensus_distance").mean(axis=0),
                "plain": _over_seeds(group, "plain_distance").mean(axis=0),
            }
    return {
        "curves": (figures.curves(curves, styles), "Accuracy against rounds, bytes and seconds"),
        "accuracy": (figures.accuracy(panels), "Accuracy of the agents and of their consensus"),
        "distance": (figures.distance(distances, styles), "Distance to consensus"),
    }


def _summary_figure(runs: list[Run], failures: list[Failure]) -> Figure:
    settings, fields = _settings(runs), _fields_of_settings(runs)
    found = {
        (strategy, setting): np.array(_final(group, runs))
        for setting, by_strategy in settings.items()
        for strategy, group in by_strategy.items()
    }
    failed: dict[tuple[str, tuple[str, ...]], int] = {}
    for failure in failures:
        if failure.config is not None:
            setting = tuple(str(failure.config[field]) for field in fields)
            place = failure.config["strategy"], setting
            failed[place] = failed.get(place, 0) + 1
    strategies = list(dict.fromkeys([*_strategies(runs), *(strategy for strategy, _ in failed)]))
    labels = {
        setting: tuple(_title([pair]) for pair in zip(fields, setting, strict=True))
        for setting in settings
    }
    return figures.summary(found, failed, strategies, labels)


def _over_seeds(group: list[Run], name: str) -> np.ndarray:
    """What was recorded under `name`, [seeds, records, ...], NaN where it was not."""
    return np.array([[record.get(name, np.nan) for record in run.records] for run in group])


def _epochs(group: list[Run]) -> np.ndarray:
    return _over_seeds(group, "epoch")[0]


def _label(run: Run, runs: list[Run]) -> str:
    """The values of the fields in which the runs differ, as the title of a panel."""
    return _title(zip(_differing(runs), _names(run, runs), strict=True))


def _title(values: Iterable[tuple[str, str]]) -> str:
    """Fields and values; those that speak for themselves without the field."""
    plain = ("augment", "partition", "strategy", "topology")
    return ", ".join(value if field in plain else f"{field}={value}" for field, value in values)


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() or c in "._" else " " for c in text).split())
