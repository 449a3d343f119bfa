"""The figures of a report."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mixlab import figures, spec
from mixlab.report import records

_PANELS = 6
"""Settings that a figure shows; more of them are spread over several figures."""


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


def draw(runs: list[records.Run], failures: list[records.Failure]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure and title."""
    shown = _figures_of_one(runs) if records.alone(runs) else _figures_of_many(runs, failures)
    if "augment" in records.differing(runs):
        points = {
            _label(group[0], runs): {
                name: records.over_seeds(group, f"test_{name}")[:, -1].mean(axis=1)
                for name in ("accuracy", "ece")
            }
            for group in records.groups(runs)
        }
        shown["calibration"] = (figures.calibration(points), "Accuracy against calibration error")
    shown["augmentation"] = (_sheet(runs), "What the agents see")
    return shown


def _sheet(runs: list[records.Run]) -> Figure:
    """Training images before and after the augmentation, or each of them, of the first seed."""
    sheets: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        with np.load(run.folder / "sheet.npz") as arrays:
            sheets.setdefault(records.value(run, "augment", runs), dict(arrays))
    first = next(iter(sheets.values()))
    if len(sheets) > 1:
        return figures.sheets(first["before"], {name: s["image"] for name, s in sheets.items()})
    setup = runs[0].setup
    labels, names, augmentation = first["label"], setup["class_names"], setup["config"]["augment"]
    return figures.sheet(first["before"], first["image"], labels, names, augmentation)


def _figures_of_one(runs: list[records.Run]) -> dict[str, tuple[Figure, str]]:
    curves = {
        _label(group[0], runs): {
            "epoch": records.epochs(group),
            "accuracy": records.over_seeds(group, "test_accuracy")[..., 0],
        }
        for group in records.groups(runs)
    }
    return {"accuracy": (figures.learning(curves), "Accuracy over epochs")}


def _figures_of_many(
    runs: list[records.Run], failures: list[records.Failure]
) -> dict[str, tuple[Figure, str]]:
    settings = records.settings(runs)
    styles = figures.styles(records.strategies(runs))
    shown: dict[str, tuple[Figure, str]] = {}
    if records.is_large(runs):
        shown["summary"] = (_summary_figure(runs, failures), "Accuracy of each strategy")
    fields, pages = records.fields_of_settings(runs), _pages(list(settings))
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
        suffix = f"-{number}-{spec.slug(title)}".rstrip("-") if len(pages) > 1 else ""
        for name, (figure, text) in _figures_of_page(rows, runs, styles).items():
            shown[name + suffix] = (figure, text + about)
    topologies = {run.setup["topology"]: run.setup["weights"] for run in runs}
    for text, weights in topologies.items():
        name = (
            "topology" if len(topologies) == 1 else f"topology-{spec.slug(text.partition(',')[0])}"
        )
        figure = figures.topology(np.array(weights), text)
        shown[name] = (figure, "Who talks to whom")
    counts: dict[str, np.ndarray] = {}
    several = "agents" in records.differing(runs)
    for run in runs:
        config = run.setup["config"]
        label = f"{config['agents']} agents, " if several else ""
        counts.setdefault(label + config["partition"], np.array(run.setup["partition"]))
    names = runs[0].setup["class_names"]
    shown["partition"] = (figures.partition(counts, names), "Who holds what")
    return shown


def _figures_of_page(
    rows: dict[str, dict[str, list[records.Run]]],
    runs: list[records.Run],
    styles: dict[str, dict[str, Any]],
) -> dict[str, tuple[Figure, str]]:
    """Those of a few settings; `rows` is setting -> strategy -> runs."""
    curves: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    distances: dict[str, dict[str, dict[str, Any]]] = {}
    for row, by_strategy in rows.items():
        for strategy in filter(by_strategy.get, styles):
            group = by_strategy[strategy]
            config = group[0].setup["config"]
            after = [run._replace(records=records.after_merges(run, runs)) for run in group]
            start, length = config["pretrain_epochs"], config["epochs_per_round"]
            curves.setdefault(row, {})[strategy] = {
                "rounds": np.maximum(0, records.epochs(after) - start) / length,
                "MB": np.mean(
                    [[records.megabytes(r) for r in run.records] for run in after], axis=0
                ),
                "seconds": np.mean(
                    [[records.seconds(r) for r in run.records] for run in after], axis=0
                ),
                "accuracy": records.over_seeds(after, "test_accuracy").mean(axis=2),
            }
            panels[row, strategy] = {
                "epoch": records.epochs(group),
                "agents": np.concatenate(records.over_seeds(group, "test_accuracy"), axis=1),
                "consensus": records.over_seeds(group, "consensus_accuracy").mean(axis=0),
                "plain": records.over_seeds(group, "plain_accuracy").mean(axis=0),
                "rounds_from": start,
            }
            distances.setdefault(row, {})[strategy] = {
                "epoch": records.epochs(group),
                "aligned": records.over_seeds(group, "consensus_distance").mean(axis=0),
                "plain": records.over_seeds(group, "plain_distance").mean(axis=0),
            }
    return {
        "curves": (figures.curves(curves, styles), "Accuracy against rounds, bytes and seconds"),
        "accuracy": (figures.accuracy(panels), "Accuracy of the agents and of their consensus"),
        "distance": (figures.distance(distances, styles), "Distance to consensus"),
    }


def _summary_figure(runs: list[records.Run], failures: list[records.Failure]) -> Figure:
    settings, fields = records.settings(runs), records.fields_of_settings(runs)
    found = {
        (strategy, setting): np.array(records.final(group, runs))
        for setting, by_strategy in settings.items()
        for strategy, group in by_strategy.items()
    }
    failed: dict[tuple[str, tuple[str, ...]], int] = {}
    for failure in failures:
        if failure.config is not None:
            setting = tuple(str(failure.config[field]) for field in fields)
            place = failure.config["strategy"], setting
            failed[place] = failed.get(place, 0) + 1
    strategies = list(
        dict.fromkeys([*records.strategies(runs), *(strategy for strategy, _ in failed)])
    )
    outer = fields[:-1]  # the last is named below its values
    labels = {
        setting: (*(_title([pair]) for pair in zip(outer, setting, strict=False)), setting[-1])
        for setting in settings
    }
    return figures.summary(found, failed, strategies, labels, fields[-1])


def _label(run: records.Run, runs: list[records.Run]) -> str:
    """The values of the fields in which the runs differ, as the title of a panel."""
    return _title(zip(records.differing(runs), records.names(run, runs), strict=True))


def _title(values: Iterable[tuple[str, str]]) -> str:
    """Fields and values; those that speak for themselves without the field."""
    plain = ("augment", "partition", "strategy", "topology")
    return ", ".join(value if field in plain else f"{field}={value}" for field, value in values)
