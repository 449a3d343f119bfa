"""Measures mixlab against other libraries: the protocol that all benchmarks share.

Both sides run in one process, pinned to one core, with the same settings of malloc: on a CPU the
page faults of fresh buffers cost more than most ops, and whoever keeps freed memory wins. They take
turns, so that what else the machine does falls on both, and medians are compared. Unless an
accelerator does the work, time is the processor time of the process, which on one core is what a
clock on the wall would show if nothing else ran.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from mixlab.spec import nearest

BENCHMARKS = ("agents", "align", "augment", "merge")
"""What `mixlab bench` can run: a module of this package with `run(options) -> Report`."""

_SETTLED = "MIXLAB_BENCH_SETTLED"
_ENVIRONMENT = {
    _SETTLED: "1",
    "OMP_NUM_THREADS": "1",
    # Freed memory stays in the process, for the next buffer of either side.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "1",
    "KERAS_BACKEND": "jax",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        rounds: how often each side is measured.
        seconds: the least that one measurement lasts; shorter calls are repeated within it.
        select: pattern of the cases to run, searched for in what a benchmark calls them, such as
            `"op batch peer"`.
    """

    rounds: int = 21
    seconds: float = 0.02
    select: str = ""

    def selects(self, *words: object) -> bool:
        """Whether a case of this description is to be run."""
        return re.search(self.select, " ".join(map(str, words))) is not None

    def at_most(self, rounds: int) -> "Options":
        """The same with no more rounds, for what takes long."""
        return dataclasses.replace(self, rounds=min(self.rounds, rounds))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, in each of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range that holds the middle half of the rounds, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2.0 / self.median


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a benchmark.

    Attributes:
        tables: rows by the title of their table; the rows of a table have the same columns.
        left_out: peers that were not measured, with the reason.
    """

    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    left_out: Mapping[str, str]

    def text(self) -> str:
        """The report in Markdown."""
        parts = [f"{title}\n\n{table(rows)}" for title, rows in self.tables.items() if rows]
        if self.left_out:
            reasons = "".join(f"\n- {name}: {why}" for name, why in self.left_out.items())
            parts.append(f"Not measured:\n{reasons}")
        return "\n\n".join(parts) + "\n"


class PeerError(Exception):
    """A peer that cannot be measured; the message says why in one line."""


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    options: Options,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Times calls in turns.

    Every call is warmed up by two runs, the second of which decides how often it is repeated within
    a measurement. Then all are measured once, in their order, `options.rounds` times.

    Args:
        calls: functions that return when their work is done.
        options: rounds, and seconds of a measurement.
        clock: seconds.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(options.seconds / max(_measure(call, 1, clock), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            seconds[name].append(_measure(call, repeats[name], clock))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def timer() -> Callable[[], float]:
    """The clock to measure by: of the processor on a CPU, which others share, else of the day."""
    import jax  # not before `settle`

    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def milliseconds(seconds: float) -> str:
    """Three digits of them, or all before the point."""
    return f"{1e3 * seconds:.3g}" if seconds < 1.0 else f"{1e3 * seconds:.0f}"


def _measure(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def import_peer(name: str) -> ModuleType:
    """Imports a package that is measured against.

    Raises:
        PeerError: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise PeerError(f"its import fails: {one_line(error)}") from error
        raise PeerError("not installed; pip install 'mixlab[bench]' has the peers") from error
    except Exception as error:  # packages that do not fit each other fail in many ways
        raise PeerError(f"its import fails: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: the columns of the first row, numbers to the right."""
    columns = list(rows[0])
    cells = [[str(row[column]).replace("|", r"\|") for column in columns] for row in rows]
    widths = [max(len(c), 3, *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    right = [all(re.fullmatch(r"[\d.]+", row[i]) for row in cells) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(texts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if flush else "-" * width
        for width, flush in zip(widths, right, strict=True)
    ]
    return "\n".join(line(texts) for texts in (columns, rule, *cells))


def machine(packages: Sequence[str]) -> dict[str, str]:
    """The machine, the date, and the versions of those packages that are installed."""
    cpu = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    found = {"cpu": cpu[1] if cpu else platform.processor() or platform.machine()}
    found["cores"] = f"1 of {os.cpu_count()}"
    found["date"] = datetime.date.today().isoformat()
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def settle(arguments: Sequence[str]) -> None:
    """Starts this process anew on one core, with the malloc settings, unless that was done."""
    if os.environ.get(_SETTLED):
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    command = [sys.executable, "-m", "mixlab", "bench", *arguments]
    os.execve(sys.executable, command, {**os.environ, **_ENVIRONMENT})


def main(arguments: Sequence[str]) -> None:
    """The command `mixlab bench`: measures, prints, and writes what was asked for.

    Raises:
        ValueError: the benchmark is unknown, or `--filter` is no pattern or selects nothing.
    """
    parser = argparse.ArgumentParser(prog="mixlab bench", description="Measures against peers.")
    parser.add_argument("name", help=f"the benchmark: {', '.join(BENCHMARKS)}")
    parser.add_argument("--filter", default="", help="run the cases that match this pattern")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--json", type=pathlib.Path, help="write all figures to this file")
    parser.add_argument("--out", type=pathlib.Path, help="write the report to this file too")
    given = parser.parse_args(arguments)
    if given.name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {given.name!r}; {nearest(given.name, BENCHMARKS)}")
    try:
        re.compile(given.filter)
    except re.error as error:
        raise ValueError(f"--filter {given.filter!r} is no regular expression: {error}") from error
    settle(arguments)
    options = Options(select=given.filter)
    if given.quick:
        options = dataclasses.replace(options, rounds=5, seconds=0.002)
    module = importlib.import_module(f"mixlab.bench.{given.name}")
    report = module.run(options)
    if not any(report.tables.values()) and not report.left_out:
        raise ValueError(f"--filter {given.filter!r} selects no case")
    found = machine(module.PACKAGES)
    versions = ", ".join(f"{name} {value}" for name, value in found.items())
    text = f"`mixlab bench {shlex.join(arguments)}`\n\n{versions}\n\n{report.text()}"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text)
    if given.json is not None:
        result = {"machine": found, **dataclasses.asdict(report)}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
