"""Several processes end where one does, bit for bit: the same devices make the same programs."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mixlab import agents, distributed, train
from mixlab.checkpoint import read_models
from tests import mixing, processes, run_config

ROOT = pathlib.Path(__file__).parents[1]
RUN = "dimat"


def launch(number, *arguments, module="tests.processes"):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MIXLAB_")}
    result = subprocess.run(
        ["bash", "launch/processes.sh", str(number), *map(str, arguments)],
        cwd=ROOT,
        env={
            **clean,
            "MIXLAB": f"{sys.executable} -m {module}",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // number}",
            "PJRT_NPROC": "16",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def end(workdir):
    """The final variables, and the records without what the clock measured."""
    lines = (workdir / "runs" / RUN / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["seconds"]
    return read_models(workdir / "runs" / RUN), records


def interrupted(workdir, to):
    """A copy of a run that lost its newest checkpoint."""
    shutil.copytree(workdir, to)
    newest = max((to / "runs" / RUN / "checkpoints").glob("step_*"), key=lambda p: p.name)
    shutil.rmtree(newest)
    return to


@pytest.mark.slow
def test_one_two_and_four_processes_end_the_same_and_go_on_for_each_other(tmp_path, monkeypatch):
    one, two, four, stopped = (tmp_path / name for name in ("1", "2", "4", "stopped"))
    monkeypatch.setattr(processes.train.report, "write", lambda workdir: workdir)
    with jax.numpy_dtype_promotion("standard"):
        processes.run(str(one))
        launch(4, four)
        of_one = interrupted(one, tmp_path / "of one")
        of_four = interrupted(four, tmp_path / "of four")
        told = launch(2, two, of_one, of_four, f"{stopped}:9")
        assert told.count("4 agents on 4 cpu devices of 2 processes (pmap, 1 a device)") == 4
        # The other process stopped at the step as well, or would hang.
        assert "stopped after step" in told
        processes.run(str(stopped))
    models_wanted, records_wanted = end(one)
    assert records_wanted[-1]["step"] == 36
    for workdir in (two, four, of_one, of_four, stopped):
        models, records = end(workdir)
        assert records == records_wanted, workdir
        jax.tree.map(np.testing.assert_array_equal, models, models_wanted)


def test_models_go_from_process_to_process(tmp_path):
    launch(2, tmp_path / "found.npz", module="tests.mixing")
    found, wanted = np.load(tmp_path / "found.npz"), mixing.mixed()
    models = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    matrices = {
        "ring": agents.ring(12).mixing_matrix(),
        "complete": agents.complete(12).mixing_matrix(),
        "mean": np.full((12, 12), 1 / 12),
    }
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(found["taken"], mixing.taken(str(tmp_path / "run")))
    for name, matrix in matrices.items():
        np.testing.assert_allclose(wanted[name], matrix @ models, rtol=1e-5, atol=1e-6)
    median = np.broadcast_to(np.median(models, axis=0), models.shape)
    np.testing.assert_allclose(wanted["median"], median, rtol=1e-6)


@pytest.mark.parametrize(
    "environment",
    [
        {"PROCESSES": "two", "PROCESS": "0", "COORDINATOR": "localhost:1"},
        {"PROCESSES": "2", "COORDINATOR": "localhost:1"},
        {"PROCESSES": "2", "PROCESS": "2", "COORDINATOR": "localhost:1"},
        {"PROCESSES": "2", "PROCESS": "0", "COORDINATOR": "localhost"},
        {"PROCESSES": "2", "PROCESS": "0", "COORDINATOR": "localhost:port"},
    ],
)
def test_an_environment_that_names_no_processes_is_told(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(f"MIXLAB_{name}", value)
    with pytest.raises(ValueError, match="MIXLAB_PROCESS"):
        distributed.initialize()


def test_a_port_in_use_is_told(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MIXLAB_PROCESSES", "2")
        monkeypatch.setenv("MIXLAB_PROCESS", "0")
        monkeypatch.setenv("MIXLAB_COORDINATOR", f"localhost:{port}")
        with pytest.raises(OSError, match=f"cannot listen on port {port} .*give another"):
            distributed.initialize()


def test_no_cluster_is_told(monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("MIXLAB_PROCESSES", "auto")
    with pytest.raises(ValueError, match="auto, but JAX finds no cluster"):
        distributed.initialize()


def test_who_waits_for_others_says_so(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.1))
    monkeypatch.setenv("MIXLAB_PROCESSES", "2")
    monkeypatch.setenv("MIXLAB_PROCESS", "1")
    monkeypatch.setenv("MIXLAB_COORDINATOR", "somewhere:1234")
    distributed.initialize()
    assert "process 1 of 2 waits at somewhere:1234" in capsys.readouterr().err


def test_processes_of_several_configs_are_refused(tmp_path, monkeypatch):
    first = run_config.get_config()
    monkeypatch.setattr(distributed, "share", lambda value: {**value, "strategy": "wa"})
    monkeypatch.setattr(distributed, "where", lambda flag: [1] if flag else [])
    with pytest.raises(ValueError, match=r"process 1 .*:\n  strategy: 'wa' there, 'dimat' here$"):
        train.train(first, tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_process_is_the_first_and_shares_with_itself():
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.is_first()
    assert distributed.once(lambda: 3) == 3
    assert distributed.share({"a": [1]}) == {"a": [1]}
    assert distributed.where(True) == [0]
    assert distributed.where(False) == []
