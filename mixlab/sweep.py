"""Runs the combinations of a sweep in processes of their own, several at once.

`mixlab.train` runs them one after another in one process, which an error ends. Here each has a
process, so that one that fails costs no other, and small runs share the cores of a machine. A
workdir is the same for both, and either goes on with what the other has left.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from mixlab import agents, report, train
from mixlab.progress import LiveLine, duration

PATIENCE = 60.0
"""Seconds that runs have to save themselves when the sweep is asked to stop."""

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Statuses with which a run's process ends that a signal has stopped, saved."""


class Worker(NamedTuple):
    """A run in progress: its process, and when that began, in seconds of `time.monotonic`."""

    process: subprocess.Popen[bytes]
    began: float


def sweep(
    config: ConfigDict, workdir: str | Path, jobs: int = 1, *, source: str | Path | None = None
) -> tuple[Path, dict[str, str]]:
    """Runs what the config's sweep asks for and is not finished, and reports on all of it.

    What a run prints is kept in its folder, `log.txt`. Runs that failed before are tried again.

    Args:
        config: as `default_config`, with any fields changed.
        workdir: made if it is missing, and filled as `mixlab.train.train` does.
        jobs: how many runs there are at once. On a CPU, as many as it has cores may pay; runs on
            an accelerator have to share its memory.
        source: a Python file that every run's process loads first, for the models, augmentations
            and methods that it registers: as a rule the config's own.

    Returns:
        The path of the report, and why runs failed, by name.

    Raises:
        ValueError: a field of the sweep cannot be used, the folder holds another config, or all
            runs failed.
        TypeError: a field gives an argument that what it names does not take.
        ModuleNotFoundError: a data set needs the extra `data`.
        train.Stopped: SIGTERM or Ctrl-C arrived; the runs in progress have been saved.
        KeyboardInterrupt: Ctrl-C came twice; the runs in progress have been killed, and keep what
            they had saved.
    """
    workdir = Path(workdir).absolute()
    variants = train.variants(config)
    folders = {name: workdir / "runs" / name for name in variants}
    left = [name for name in variants if not is_finished(folders[name], variants[name])]
    train.check_partitions({name: variants[name] for name in left})
    train.claim(workdir, config)
    count, done = len(variants), len(variants) - len(left)
    print(
        f"{report.count(count, 'run')}, {done} of them finished; {jobs} at once\nin {workdir}",
        flush=True,
    )
    line = LiveLine()
    failures: dict[str, str] = {}
    lengths: list[float] = []
    with train.termination() as terminated, _workers() as running:
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                running[name] = _start(workdir, name, source)
            time.sleep(0.1)
            if number := terminated():
                to_go = report.count(len(running) + len(left), "run")
                raise train.Stopped(f"stopped with {to_go} to go", number)
            ended = [name for name in running if running[name].process.poll() is not None]
            for name in ended:
                worker = running.pop(name)
                done += 1
                lengths.append(time.monotonic() - worker.began)
                reason = _failure(folders[name], worker.process.returncode)
                if reason:
                    failures[name] = reason
                line.done(f"[{done}/{count}] {name}  {_ending(folders[name], reason)}")
            if line.due():
                line.write(_progress(count, done, len(failures), running, lengths, jobs))
    if len(failures) == count:
        raise ValueError(f"every run failed, the first with {next(iter(failures.values()))}")
    return report.write(workdir), failures


def is_finished(folder: Path, config: ConfigDict) -> bool:
    """Whether the run in `folder` has come to its end: its last record and checkpoint are there."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or (folder / "failed.json").exists():
        return False
    lines = metrics.read_text().splitlines()
    try:
        last = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):  # none, or one that a killed run was writing
        return False
    at_end = report.is_last(last, config.rounds)
    return at_end and (folder / "checkpoints" / f"step_{last['step']}").exists()


def _start(workdir: Path, name: str, source: str | Path | None) -> Worker:
    """Starts `_work` in a process that has its own log and ends with this one."""
    folder = workdir / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [] if source is None else [os.path.abspath(source)]
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mixlab.sweep", str(workdir), name, *arguments],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**cache, **os.environ},
            start_new_session=True,  # Ctrl-C is for this process, which tells the others
        )
    return Worker(process, time.monotonic())


@contextlib.contextmanager
def _workers() -> Iterator[dict[str, Worker]]:
    """Holds the runs in progress; those that are left at the end save themselves and stop."""
    running: dict[str, Worker] = {}
    try:
        yield running
    finally:
        for worker in running.values():
            worker.process.terminate()
        deadline = time.monotonic() + PATIENCE
        try:
            if running:
                print(f"\nsaving {', '.join(running)} ...", flush=True)
            for worker in running.values():
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(running)
        except KeyboardInterrupt:
            _kill(running)
            raise


def _kill(running: dict[str, Worker]) -> None:
    for worker in running.values():
        worker.process.kill()


def _failure(folder: Path, status: int) -> str:
    """Why a run failed that ended with this status; empty if it did not.

    One that was itself told to stop, and has saved, is not marked as failed in its folder.
    """
    if status in STOPPED:
        return (
            f"stopped by {signal.Signals(status - 128).name}, and saved; see {folder / 'log.txt'}"
        )
    path = folder / "failed.json"
    if status and not path.exists():
        ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        train.write_json(path, {"reason": f"ended by {ended}; see {folder / 'log.txt'}"})
    return str(json.loads(path.read_text())["reason"]) if status else ""


def _ending(folder: Path, reason: str) -> str:
    if reason:
        return f"FAILED: {reason}"
    return (folder / "log.txt").read_text().splitlines()[-1].partition("  ")[2]


def _progress(
    count: int,
    done: int,
    failed: int,
    running: dict[str, Worker],
    lengths: list[float],
    jobs: int,
) -> str:
    now = time.monotonic()
    ages = {name: now - worker.began for name, worker in running.items()}
    to_go = "--:--"
    if lengths:
        mean = sum(lengths) / len(lengths)
        work = mean * (count - done) - sum(min(age, mean) for age in ages.values())
        to_go = duration(work / jobs)
    failures = f" ({failed} failed)" if failed else ""
    names = ", ".join(f"{name} {duration(age)}" for name, age in ages.items())
    left = count - done - len(running)
    return f"{done} done{failures}, {left} to come  ETA {to_go}  running: {names}"


def _work(workdir: Path, name: str, source: str | None = None) -> None:
    """What the process of a run does."""

    def follow() -> None:
        os.read(0, 1)  # returns when the sweep's process has ended
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    if source is not None:
        _load(source)
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    runs = train.variants(config)
    agents.force_cpu_devices(runs[name].agents)  # before JAX starts
    logging.set_verbosity(logging.FATAL)  # orbax logs tracebacks of its threads
    with train.termination() as terminated:
        try:
            train.run_variant(runs, name, workdir, terminated)
        except train.Stopped as stopped:
            print(f"\n{stopped}", flush=True)
            sys.exit(128 + stopped.number)


def _load(source: str) -> None:
    """Runs a Python file as a module, for what it registers."""
    found = importlib.util.spec_from_file_location("config", source)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses, as those of Flax, look their module up
    found.loader.exec_module(module)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), *sys.argv[2:])
