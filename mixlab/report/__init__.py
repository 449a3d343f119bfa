"""What a workdir shows of its runs: report.md, results.csv and figures, from the files alone."""

import csv
from pathlib import Path

from mixlab.report import drawing, records, tables, text
from mixlab.report.records import is_last
from mixlab.report.tables import COLUMNS, cell, markdown
from mixlab.report.text import count

__all__ = ["COLUMNS", "cell", "count", "is_last", "markdown", "show", "write"]


def write(workdir: str | Path) -> Path:
    """Writes `report.md`, `results.csv` and `figures/` of a workdir.

    Runs that failed are named with their reasons, and are no part of any mean. Nor are those that
    are not finished, unless none is: then they are shown, and it is said.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: the folder holds no runs with records.
    """
    workdir = Path(workdir)
    runs, failures, unfinished = records.read(workdir)
    fields = [*records.differing(runs), *(["seed"] if records.seeds(runs) else [])]
    with open(workdir / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        kinds = tables.kinds_sent(runs)
        writer.writerow([*fields, *COLUMNS, *tables.communication_columns(kinds)])
        for run in runs:
            values = (run.setup["config"][field] for field in fields)
            writer.writerow([*values, *tables.row(run), *tables.communication_row(run, kinds)])
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()  # of runs that were fewer
    shown = drawing.draw(runs, failures)
    for name, (figure, _) in shown.items():
        figure.savefig(folder / f"{name}.png")
    lines = [
        f"# {workdir.resolve().name}",
        "",
        text.about(runs),
        "",
        *(
            ["## Summary", "", tables.summary(runs), "", text.LEGEND_OF_SUMMARY]
            if records.is_large(runs)
            else []
        ),
        *(["## All runs", ""] if records.is_large(runs) else []),
        tables.table(runs),
        "",
        text.LEGEND_OF_ONE if records.alone(runs) else text.LEGEND,
        *([text.LEGEND_OF_ECE] if "ECE" in tables.columns(runs) else []),
        *text.notes(runs),
        "",
        *text.about_unfinished(unfinished, runs),
        *text.about_failures(failures),
        *text.about_faults(runs),
        *([] if records.alone(runs) else text.about_communication(runs)),
        *(f"## {title}\n\n![{title}](figures/{name}.png)\n" for name, (_, title) in shown.items()),
    ]
    path = workdir / "report.md"
    path.write_text("\n".join(lines))
    return path


def show(path: Path) -> None:
    """Prints the results of a report and where its files are."""
    path = path.resolve()
    workdir = path.parent
    runs, failures, unfinished = records.read(workdir)
    print(f"\n{tables.summary(runs) if records.is_large(runs) else tables.table(runs)}\n")
    if records.is_large(runs):
        print(text.LEGEND_OF_SUMMARY, end="")
    elif records.alone(runs):
        print("on the test set, in percent; ECE = expected calibration error")
    else:
        print(
            "accuracies in percent; 'merged' right after the last merge, 'local' after the last "
            "local\ntraining; consensus = all agents aligned to one basis, then averaged; distance "
            "to it"
        )
    for note in text.notes(runs):
        print(note)
    if failures or unfinished:
        print()
    for run in unfinished:
        print(f"NOT FINISHED  {run.name}: {run}")
    if unfinished:
        print(text.shown_unfinished(unfinished, runs))
    for failure in failures:
        print(f"FAILED  {failure.name}: {failure.reason}")
    print(f"\nreport       {path}")
    print(f"figures      {workdir / 'figures'}")
    print(f"metrics      {workdir / 'results.csv'}, {workdir / 'runs' / '*' / 'metrics.jsonl'}")
    print(f"checkpoints  {workdir / 'runs' / '*' / 'checkpoints'}")
