"""Runs as a workdir holds them, and how they group."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


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


class Unfinished(NamedTuple):
    """A run that has not come to its end: its name, and its last record, None before the first."""

    name: str
    rounds: int
    last: dict[str, Any] | None

    def __str__(self) -> str:
        if self.last is None:
            return "nothing recorded yet"
        return f"round {self.last['round']} of {self.rounds} (epoch {self.last['epoch']:g})"


def is_last(record: dict[str, Any], rounds: int) -> bool:
    """Whether a run of so many rounds is at its end with this record."""
    return bool(record["phase"] == "local" and record["round"] == rounds)


def alone(runs: list[Run]) -> bool:
    """Whether all of it is ordinary training, of one agent."""
    return all(run.setup["config"]["agents"] == 1 for run in runs)


def differing(runs: list[Run]) -> list[str]:
    """The fields of the config in which the runs differ, the seed aside, the strategy last.

    The strategy is always named, but for one agent only where nothing else is.
    """
    configs = [run.setup["config"] for run in runs]
    fields = [f for f in configs[0] if any(c[f] != configs[0][f] for c in configs)]
    others = [f for f in fields if f not in ("seed", "strategy")]
    named = "strategy" in fields or not (alone(runs) and others)
    return [*others, *(["strategy"] if named else [])]


def seeds(runs: list[Run]) -> list[int]:
    """The seeds, where there are several."""
    seeds = sorted({run.setup["config"]["seed"] for run in runs})
    return seeds if len(seeds) > 1 else []


def groups(runs: list[Run]) -> list[list[Run]]:
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


def names(run: Run, runs: list[Run]) -> list[str]:
    """The values of the fields in which the runs differ."""
    return [value(run, field, runs) for field in differing(runs)]


def value(run: Run, field: str, runs: list[Run]) -> str:
    """The value of a field as shown; of augmentations what all begin with is left out."""
    said = str(run.setup["config"][field])
    if field == "augment" and (common := base(runs)):
        return said.removeprefix(common).removeprefix(" | ") or "base alone"
    return said


def base(runs: list[Run]) -> str:
    """The chain with which the augmentations of all runs begin."""
    texts = [run.setup["config"]["augment"] for run in runs]
    parts = texts[0].split(" | ")
    for count in range(len(parts), 0, -1):
        head = " | ".join(parts[:count])
        whole = head.count("(") == head.count(")")  # not cut within an argument
        if whole and all(f"{text} | ".startswith(f"{head} | ") for text in texts):
            return head
    return ""


def read(workdir: Path) -> tuple[list[Run], list[Failure], list[Unfinished]]:
    """The runs of a workdir in their order, those that failed, and those that are not finished.

    Unfinished runs are no part of the first, unless there are no others.

    Raises:
        ValueError: the folder holds no runs with records.
    """
    runs: list[Run] = []
    begun: list[Run] = []
    failures: list[Failure] = []
    unfinished: list[Unfinished] = []
    for folder in sorted((workdir / "runs").glob("*")):
        metrics, about = folder / "metrics.jsonl", folder / "setup.json"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        setup: dict[str, Any] = {"config": None, "byzantine": []}
        if about.exists():
            setup = json.loads(about.read_text())
        records = [_of_honest(record, setup["byzantine"]) for record in _whole(lines)]
        failed = folder / "failed.json"
        if failed.exists():
            reason = json.loads(failed.read_text())["reason"]
            step = records[-1]["step"] if records else None
            failures.append(Failure(folder.name, reason, step, setup["config"]))
        elif setup["config"] is not None:
            rounds = setup["config"]["rounds"]
            run = Run(folder.name, folder, setup, records)
            if records and is_last(records[-1], rounds):
                runs.append(run)
                continue
            unfinished.append(Unfinished(run.name, rounds, records[-1] if records else None))
            if records:
                begun.append(run)
    if not (runs or begun):
        raise ValueError(f"{workdir} holds no runs with records; mixlab train --workdir makes them")
    return sorted(runs or begun, key=lambda run: run.setup["number"]), failures, unfinished


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The records, without a last one that a killed run was writing."""
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise


def _of_honest(record: dict[str, Any], byzantine: list[int]) -> dict[str, Any]:
    """What was measured of the agents that are not Byzantine; what they sent stays."""
    return {
        name: np.delete(value, byzantine).tolist() if name.startswith(("test", "train")) else value
        for name, value in record.items()
    }


def megabytes(record: dict[str, Any]) -> float:
    """Sent by now, by an agent on average."""
    return sum(float(np.mean(sent)) for sent in record["bytes_sent"].values()) / 1e6


def seconds(record: dict[str, Any]) -> float:
    """Spent by now on training, matching and merging."""
    return sum(record["seconds"].get(kind, 0.0) for kind in ("local", "match", "merge"))


def after_merges(run: Run, runs: list[Run]) -> list[dict[str, Any]]:
    """The records right after merging; of what is not merged by rounds, those at the same steps.

    Where nothing at all merges by rounds, the last is that at the end of the run.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for record in run.records:  # a merge is recorded after the local training before it
        by_step[record["step"]] = record
    found = [by_step[step] for step in sorted(by_step)]
    merging = any(record["phase"] == "merge" for run in runs for record in run.records)
    return found[:-1] if merging and len(found) > 1 else found


def final(group: list[Run], runs: list[Run]) -> list[float]:
    """Accuracy in percent after the last merge, the mean of the agents, of each seed."""
    last = [after_merges(run, runs)[-1] for run in group]
    return [100 * float(np.mean(record["test_accuracy"])) for record in last]


def strategies(runs: list[Run]) -> list[str]:
    """The strategies of the runs, in their order."""
    return list(dict.fromkeys(run.setup["config"]["strategy"] for run in runs))


def fields_of_settings(runs: list[Run]) -> list[str]:
    """The fields that differ, without those that the strategy determines."""
    fields = [field for field in differing(runs) if field not in determined(runs)]
    return [field for field in fields if field != "strategy"]


def determined(runs: list[Run]) -> list[str]:
    """The fields that differ between strategies, but not among the runs of one."""
    found = []
    for field in differing(runs):
        pairs = {(run.setup["config"]["strategy"], str(run.setup["config"][field])) for run in runs}
        if field != "strategy" and len(pairs) == len(strategies(runs)) > 1:
            found.append(field)
    return found


def settings(runs: list[Run]) -> dict[tuple[str, ...], dict[str, list[Run]]]:
    """Setting -> strategy -> its runs, one a seed.

    A setting is the values of `fields_of_settings`. Isolated agents do not depend on the
    topology: run on one, they stand with every one.
    """
    fields = fields_of_settings(runs)
    order = {
        field: list(dict.fromkeys(value(run, field, runs) for run in runs)) for field in fields
    }
    found: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    isolated = []
    for group in groups(runs):
        values = [value(group[0], field, runs) for field in fields]
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


def is_large(runs: list[Run]) -> bool:
    """Whether there are several strategies in so many settings that a summary helps."""
    return len(strategies(runs)) > 1 and len(settings(runs)) > 2


def over_seeds(group: list[Run], name: str) -> np.ndarray:
    """What was recorded under `name`, [seeds, records, ...], NaN where it was not."""
    return np.array([[record.get(name, np.nan) for record in run.records] for run in group])


def epochs(group: list[Run]) -> np.ndarray:
    """The epochs at which the runs, all alike, were recorded."""
    return over_seeds(group, "epoch")[0]
