"""A run that is killed and started again ends where an uninterrupted one does, bit for bit."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from mixlab.checkpoint import Checkpoints
from mixlab.experiment import prepare
from tests.run_config import get_config

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "run_config.py"
NAME = "dimat"


def command(workdir, *overrides):
    return ["train", f"--config={CONFIG}", f"--workdir={workdir}", *overrides]


def run(*arguments, interrupted=None):
    module = ["tests.interrupted", *interrupted] if interrupted else ["mixlab"]
    return subprocess.run(
        [sys.executable, "-m", *module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def records(workdir):
    """The metrics without what the clock measured."""
    lines = (workdir / "runs" / NAME / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def like():
    with jax.numpy_dtype_promotion("standard"):
        experiment = prepare(get_config())
        return experiment.parallel.get(experiment.init())


def final_state(workdir, like):
    with Checkpoints(workdir / "runs" / NAME / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.restore(like)
    return step, state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    result = run(*command(workdir))
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.slow
def test_killed_anywhere_it_ends_the_same(finished, tmp_path, like):
    # Started over and over in one folder, each time killed at another point.
    for point, count in [("record", 1), ("step", 25), ("save", 1), ("recorded", 2), ("saved", 1)]:
        result = run(*command(tmp_path), interrupted=[point, str(count)])
        assert result.returncode == -signal.SIGKILL, (point, result.stdout, result.stderr)
    result = run(*command(tmp_path))
    assert result.returncode == 0, result.stderr
    assert records(tmp_path) == records(finished)
    (step, state), (wanted_step, wanted) = final_state(tmp_path, like), final_state(finished, like)
    assert step == wanted_step
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_sigterm_saves_and_a_later_start_goes_on(finished, tmp_path, like):
    result = run(*command(tmp_path), interrupted=["term", "30"])
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "stopped after step 30 of 48, all saved; run the same command again" in result.stdout
    assert final_state(tmp_path, like)[0] == 30
    assert run(*command(tmp_path)).returncode == 0
    assert records(tmp_path) == records(finished)


@pytest.mark.slow
def test_a_full_disk_is_told_and_costs_nothing(finished, tmp_path, like):
    wide = "--config.model=mlp(hidden=(256,))"
    result = run(*command(tmp_path, wide), interrupted=["full", "2"])
    assert result.returncode == 1
    told = result.stderr.rstrip().splitlines()[-1]  # orbax's threads may complain before it
    assert told.startswith("mixlab: could not save a checkpoint")
    assert told.endswith("the checkpoint of step 24 is whole")
    assert run(*command(tmp_path, wide)).returncode == 0


def test_a_finished_run_is_not_run_again(finished):
    before = (finished / "runs" / NAME / "metrics.jsonl").read_bytes()
    result = run(*command(finished))
    assert result.returncode == 0
    assert "done: test accuracy" in result.stdout
    assert (finished / "runs" / NAME / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_folder_is_refused(finished):
    result = run(*command(finished, "--config.agents=2"))
    assert result.returncode == 1
    assert "agents: 4 there, 2 now" in result.stderr


def test_where_it_runs_and_what_is_kept_may_change(finished):
    result = run(*command(finished, "--config.devices=2", "--config.keep_checkpoints=3"))
    assert result.returncode == 0, result.stderr
    assert "4 agents on 2 cpu devices" in result.stdout
    assert json.loads((finished / "config.json").read_text())["devices"] == 2
