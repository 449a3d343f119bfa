"""Runs experiments: steps, rounds, records, checkpoints, one after another.

A run trains A agents, each on its own part of the training data. Time is counted in steps that
all agents make together: first `pretrain_epochs` of local training, then `rounds` rounds, each of
which merges (where the strategy merges by rounds) and trains for `epochs_per_round`. Ordinary
training is one agent with the strategy "none". A sweep runs every combination of some fields and
puts them in one report. What a config's fields mean is in `mixlab.experiment`.
"""

import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mixlab import distributed, report, spec
from mixlab.checkpoint import Checkpoints, read_agents
from mixlab.experiment import Carry, Experiment, check, prepare
from mixlab.experiment import default_config as default_config  # that of `train`
from mixlab.experiment.config import check_partitions as check_partitions  # that of `sweep`, too
from mixlab.progress import MetricWriter, ProgressLine
from mixlab.types import PyTree

# How often a step is timed, for what communication takes of it.
_REPEATS = 5


class Diverged(FloatingPointError):
    """The loss of an agent is no longer a finite number."""


class Stopped(Exception):
    """The process was asked to end; the run has been saved.

    Args:
        message: how far it came.
        number: of the signal that asked.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number


def train(config: ConfigDict, workdir: str | Path) -> Path:
    """Runs an experiment, or goes on with it where it was left, and writes the report.

    Args:
        config: as `default_config`, with any fields changed.
        workdir: made if it is missing. Running the same config again in the same folder resumes;
            final parameters and metrics are those of an uninterrupted run.

    Returns:
        The path of the report.

    Raises:
        ValueError: a field cannot be used, the folder holds another config, or another process
            was started with one.
        TypeError: a field gives an argument that what it names does not take.
        ModuleNotFoundError: the data set needs the extra `data`.
        Diverged: a loss became NaN or infinite; the last good checkpoint is kept.
        Stopped: SIGTERM arrived, in any process, or Ctrl-C, if there is one process; the state has
            been saved.
        KeyboardInterrupt: Ctrl-C came twice; older checkpoints are kept.
        distributed.FailedElsewhere: process 0 failed.
        checkpoint.CheckpointError: saving failed, e.g. because the disk is full.
    """
    workdir = Path(workdir).absolute()
    _check_alike(config)
    runs = variants(config)
    check_partitions(runs)
    distributed.once(lambda: claim(workdir, config))
    with termination() as terminated:
        for name in runs:
            run_variant(runs, name, workdir, terminated)
    distributed.once(lambda: report.write(workdir))
    return workdir / "report.md"


def run_variant(
    runs: dict[str, ConfigDict], name: str, workdir: Path, terminated: Callable[[], int]
) -> None:
    """Runs one of the `variants` in `workdir`, or goes on with it; see `train`.

    Why a run failed is written to `failed.json`, beside its records.

    Args:
        runs: all of them; the number of this one among them orders the report.
        name: which.
        workdir: claimed before.
        terminated: whether to save and stop, see `termination`.
    """
    number, variant = list(runs).index(name) + 1, runs[name]
    folder = workdir / "runs" / name
    first = distributed.is_first()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
    try:
        experiment = prepare(variant)
        if number == 1:
            several = f"{experiment.strategy.topology}\n" if variant.agents > 1 else ""
            print(f"{several}{experiment.parallel}\nin {workdir}", flush=True)
        setup = {"number": number, "config": variant.to_dict(), **experiment.about}
        if first:
            write_json(folder / "setup.json", setup)
            np.savez(folder / "sheet.npz", allow_pickle=False, **experiment.sheet)
        _run(variant, experiment, folder, f"[{number}/{len(runs)}] {name}", terminated)
    except Stopped:
        raise
    except Exception as error:
        if first:
            write_json(folder / "failed.json", {"reason": f"{type(error).__name__}: {error}"})
        raise


def _run(
    config: ConfigDict,
    experiment: Experiment,
    folder: Path,
    title: str,
    terminated: Callable[[], int],
) -> None:
    """Trains the agents in `folder`, from its newest checkpoint if it has one."""
    parallel, strategy = experiment.parallel, experiment.strategy

    # Durations, in steps.
    epoch = experiment.feed.steps_per_epoch
    pretrain, length = config.pretrain_epochs * epoch, config.epochs_per_round * epoch
    total = pretrain + config.rounds * length

    def begins_round(step: int) -> bool:
        return step >= pretrain and (step - pretrain) % length == 0 and step < total

    def ends_phase(step: int) -> bool:
        return step == total or begins_round(step)

    def is_checkpoint(step: int) -> bool:
        every = config.checkpoint_every_steps
        return ends_phase(step) or bool(every and step % every == 0)

    keep = config.keep_checkpoints or (None if experiment.about["faults"] else 2)
    carry = experiment.init()
    like = parallel.get(carry)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep))
        start = 0
        meta: dict[str, Any] = {"metrics_bytes": 0, "seconds": {}}
        if (found := checkpoints.restore(like)) is not None:
            start, restored, meta = found
            carry = parallel.put(restored)
        elif config.start_from:
            wanted = {name: getattr(like.state, name) for name in ("variables", "opt_state")}
            taken, told = read_agents(config.start_from, wanted, config.agents)
            print(f"{title}  {told}", flush=True)
            carry = experiment.adopt(carry, parallel.put(taken))
        metrics = stack.enter_context(MetricWriter(folder, meta["metrics_bytes"], start))
        clock = _Clock(meta["seconds"])
        line = ProgressLine(title, total, config.agents * config.batch_size)

        def check_finite(carry: Carry) -> None:
            _check_finite(parallel.get(carry.state.failed_at), checkpoints.steps())

        def save(step: int, carry: Carry) -> None:
            check_finite(carry)
            held = parallel.get(carry)
            with clock("save"):
                meta = {"metrics_bytes": metrics.num_bytes, "seconds": clock.seconds}
                checkpoints.save(step, held, meta)

        def record(step: int, phase: str, carry: Carry) -> None:
            trained = {}
            if phase == "local":
                totals = parallel.get(carry.totals)
                steps = np.maximum(totals["steps"], 1)
                trained = {
                    f"train_{name}": (totals[name] / steps).tolist()
                    for name in ("loss", "accuracy")
                }
            with clock("evaluate"):
                tested = experiment.test(carry.state.variables)
                number = (step - pretrain - (phase == "local")) // length  # of the round
                agreement = experiment.consensus(carry.state.variables, number)
            metrics.write(
                {
                    "step": step,
                    "phase": phase,
                    "round": max(0, (step - pretrain) // length + (phase == "merge")),
                    "epoch": step / epoch,
                    **trained,
                    "test_loss": tested["loss"].tolist(),
                    "test_accuracy": tested["accuracy"].tolist(),
                    "test_confidence": tested["confidence"].tolist(),
                    "test_ece": tested["ece"].tolist(),
                    **agreement,
                    **experiment.traffic(carry),
                    "seconds": {name: round(s, 3) for name, s in clock.seconds.items()},
                }
            )

        match_seconds, communicated = 0.0, False
        share: float | None = None  # of a step, what communication within it takes
        first = 0 if strategy.every == "always" else pretrain
        batches = stack.enter_context(closing(experiment.feed.steps(start, total)))
        for step in range(start, total):
            if begins_round(step) and strategy.every in ("round", "step"):
                number = (step - pretrain) // length
                # What mixes within steps is only looked at: nothing is sent for it.
                communicates = strategy.every == "round"
                if not communicated:  # the first call compiles, and would not be timed
                    with clock("compile"):
                        jax.block_until_ready(experiment.communicate(carry, number))
                with clock("merge" if communicates else "evaluate"):
                    merged = jax.block_until_ready(experiment.communicate(carry, number))
                if experiment.match is not None and not (strategy.match_once and number):
                    match_seconds = match_seconds or _timed(experiment.match, carry, number)
                    clock.move(min(match_seconds, clock.last), "merge", "match")
                if communicates:
                    carry = merged
                communicated = True
                record(step, "merge", carry._replace(state=merged.state))
            if share is None and experiment.alone is not None and step >= first:
                with clock("compile"):
                    beyond = _share(experiment, carry, step)
                # Where agents communicate between steps only, it is arithmetic of their own.
                share = 0.0 if strategy.every == "round" else beyond
            with clock("local"):
                carry = experiment.step(carry, next(batches), step)
            if share:
                clock.move(share * clock.last, "local", "merge")
            if line.due(step + 1):  # other processes find other times due: nothing is exchanged
                totals = parallel.get_local(carry.totals)
                if jax.process_count() == 1:
                    check_finite(carry)
                steps = np.maximum(totals["steps"], 1)
                line.show(step + 1, float(np.mean(totals["accuracy"] / steps)))
            if ends_phase(step + 1):
                with clock("local"):
                    jax.block_until_ready(carry)
                if share:
                    clock.move(share * clock.last, "local", "merge")
                check_finite(carry)
                record(step + 1, "local", carry)
                carry = carry._replace(totals=jax.tree.map(jnp.zeros_like, carry.totals))
            stop = terminated()
            if stop or is_checkpoint(step + 1):
                save(step + 1, carry)
            if stop:
                checkpoints.wait()
                raise Stopped(f"{title}: stopped after step {step + 1} of {total}, all saved", stop)
        checkpoints.wait()
        line.done(distributed.once(lambda: _last_words(folder / "metrics.jsonl")) or "done")


def _timed(fn: Callable[..., PyTree], *args: Any) -> float:
    """Seconds that a compiled program takes, the first call left out."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def _share(experiment: Experiment, carry: Carry, step: int) -> float:
    """Which fraction of a step's time is beyond training by oneself, of a few from `step` on."""
    assert experiment.alone is not None
    steps = experiment.step, experiment.alone
    seconds = [0.0, 0.0]
    with closing(experiment.feed.steps(step, step + 1)) as batches:
        batch = next(batches)
    for repeat in range(_REPEATS + 1):
        for i, run in enumerate(steps):
            own = jax.block_until_ready(jax.tree.map(jnp.copy, carry))  # steps reuse its memory
            start = time.perf_counter()
            jax.block_until_ready(run(own, batch, step + repeat))
            if repeat:  # the first calls compile
                seconds[i] += time.perf_counter() - start
    whole, alone = seconds
    return max(0.0, 1 - alone / whole)


class _Clock:
    """Adds up the seconds of each kind of work; the first step, and test, count as compiling."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = dict(seconds)
        self.last = 0.0
        self._seen = {"compile", "merge", "save"}

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        name = kind if kind in self._seen else "compile"
        self.last = elapsed if kind in self._seen else 0.0
        self._seen.add(kind)
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def move(self, seconds: float, kind: str, part: str) -> None:
        """Books some of the seconds of one kind of work under a part of it."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) - seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def _check_finite(failed_at: np.ndarray, saved: list[int]) -> None:
    bad = np.flatnonzero(failed_at >= 0)
    if not len(bad):
        return
    agent = bad[np.argmin(failed_at[bad])]
    kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "nothing was saved before"
    raise Diverged(
        f"the loss of agent {agent} became NaN or infinite at step {failed_at[agent]} "
        f"({_some(bad)} affected by now); {kept}. Lower the learning rate, or clip the "
        "gradients: --config.optimizer='clip_by_global_norm(1.0) | adam(1e-3)'"
    )


def _some(agents: np.ndarray) -> str:
    named = ", ".join(map(str, agents[:8]))
    more = f" and {len(agents) - 8} others" if len(agents) > 8 else ""
    return f"agents {named}{more}"


def variants(config: ConfigDict) -> dict[str, ConfigDict]:
    """Every combination of the sweep's values, by a name made of the values.

    Those that `sweep_skip` describes are left out: it lists dicts of field -> value or tuple of
    values, and a combination is left out if it agrees with all fields of one of them.

    Raises:
        ValueError: a swept field is unknown or has no values, `sweep_skip` names a field that is
            not swept or leaves nothing, two runs would have the same name, or a field of one
            cannot be used.
        TypeError: a field gives an argument that what it names does not take.
    """
    sweep: dict[str, tuple[Any, ...]] = {
        field: tuple(values) for field, values in config.sweep.items()
    }
    for field, values in sweep.items():
        if field not in config or field == "sweep":
            raise ValueError(f"sweep.{field} is not a field; {spec.nearest(field, config)}")
        if not values:
            raise ValueError(f"sweep.{field} has no values")
    skips = [dict(skip) for skip in config.sweep_skip]
    for field in {field for skip in skips for field in skip} - set(sweep):
        raise ValueError(f"sweep_skip names {field!r}, which is not swept; swept: {list(sweep)}")
    found: dict[str, ConfigDict] = {}
    for combination in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, combination, strict=True))
        if any(all(_agrees(chosen[k], wanted) for k, wanted in skip.items()) for skip in skips):
            continue
        variant = config.copy_and_resolve_references()
        variant.sweep = ConfigDict()
        variant.sweep_skip = ()
        for field, value in chosen.items():
            variant[field] = value
        name = "-".join(spec.slug(value) for value in combination) or spec.slug(config.strategy)
        if name in found:
            raise ValueError(f"two runs of the sweep would both be called {name!r}")
        found[name] = variant
        try:
            check(variant)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}" if chosen else str(error)) from error
    if not found:
        raise ValueError("sweep_skip leaves no run")
    return found


def _agrees(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple) else value == wanted


FREE = (
    "checkpoint_every_steps",
    "data_dir",
    "devices",
    "download",
    "keep_checkpoints",
    "memory_bytes",
    "per_device",
)
"""Fields that say where a run is made and what is kept of it, not what comes out."""


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes the config into the folder, or checks that it goes on with what ran there.

    What is `FREE` may change from start to start, and so may the values that are swept: runs are
    named by them, so that those there stay and others are added. A config that could not be run
    has left nothing, so the mended one may take its place.

    Raises:
        ValueError: the folder holds runs of another config.
    """
    path = workdir / "config.json"
    mine = _plain(config)
    runs = list((workdir / "runs").glob("*"))
    if path.exists() and any(_has_begun(run) for run in runs):
        other = json.loads(path.read_text())
        free = {*FREE}
        if {*mine["sweep"]} == {*other["sweep"]}:
            free |= {"sweep", "sweep_skip"}
        if lines := _differences(other, mine, free, "now"):
            raise ValueError(
                f"{workdir} holds a run of another config:{lines}\n"
                "Use another --workdir, or the same config to go on with that run."
            )
    for run in runs:
        if (run / "failed.json").exists() and not _has_begun(run):
            shutil.rmtree(run)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


def _check_alike(config: ConfigDict) -> None:
    """Refuses processes of several configs, whose collectives would wait for ever or mix up.

    Raises:
        ValueError: in all processes; those that differ from process 0 say in what.
    """
    mine = _plain(config)
    lines = _differences(distributed.share(mine), mine, {"data_dir", "download"}, "here")
    if others := distributed.where(bool(lines)):
        raise ValueError(
            f"process {', '.join(map(str, others))} was started with another config than process 0"
            + (f":{lines}" if lines else ", and says in what they differ")
        )


def _plain(config: ConfigDict) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain


def _differences(other: dict[str, Any], mine: dict[str, Any], but: set[str], here: str) -> str:
    """A line for each field that differs."""
    fields = (k for k in {*mine, *other} if mine.get(k, "absent") != other.get(k, "absent"))
    return "".join(
        f"\n  {k}: {other.get(k, 'absent')!r} there, {mine.get(k, 'absent')!r} {here}"
        for k in sorted({*fields} - but)
    )


def _has_begun(run: Path) -> bool:
    """Whether a run has left something to go on with."""
    metrics = run / "metrics.jsonl"
    recorded = metrics.exists() and metrics.stat().st_size > 0
    return recorded or any((run / "checkpoints").glob("step_*"))


def write_json(path: Path, content: Any) -> None:
    """Writes whole or not at all, whenever the process is killed."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


@contextmanager
def termination() -> Iterator[Callable[[], int]]:
    """Gives a function that tells which signal to end has arrived, 0 before one has.

    Of several processes that is SIGTERM in any of them; of one, SIGTERM or Ctrl-C (SIGINT). Whoever
    presses that once more, or after SIGTERM, interrupts as usual.
    """
    arrived: list[int] = []
    if jax.process_count() > 1:
        yield distributed.Termination()
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may set handlers
        return
    interrupt = signal.getsignal(signal.SIGINT)

    def arrive(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if callable(interrupt):
            signal.signal(signal.SIGINT, interrupt)
        if number == signal.SIGINT:  # not printed: that may be what the signal interrupts
            os.write(2, b"\nsaving, then stopping; Ctrl-C again stops at once, without saving\n")

    before = signal.signal(signal.SIGTERM, arrive)
    if callable(interrupt):  # in the background of a shell it is ignored, and stays so
        signal.signal(signal.SIGINT, arrive)
    try:
        yield lambda: arrived[0] if arrived else 0
    finally:
        signal.signal(signal.SIGTERM, before)
        if callable(interrupt):
            signal.signal(signal.SIGINT, interrupt)


def _last_words(metrics: Path) -> str:
    last = json.loads(metrics.read_text().splitlines()[-1])
    accuracy, error = last["test_accuracy"], last["test_ece"]
    if len(accuracy) == 1:
        return f"done: test accuracy {accuracy[0]:.3f}, calibration error {error[0]:.3f}"
    return (
        f"done: test accuracy mean {np.mean(accuracy):.3f}, worst {min(accuracy):.3f}, "
        f"consensus {last['consensus_accuracy']:.3f}"
    )
