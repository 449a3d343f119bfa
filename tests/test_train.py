"""Whole runs of the main job, small: what they write, and that it means what it says."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixlab import report, train
from tests.run_config import get_config


@pytest.fixture(autouse=True)
def _as_users_run():
    # optax's Adam itself relies on standard promotion.
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(workdir, **fields):
    config = get_config()
    with config.unlocked():
        config.update(fields)
    path = train.train(config, workdir)
    return {folder.name: records(folder) for folder in (path.parent / "runs").iterdir()}


def records(folder: pathlib.Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        workdir = tmp_path_factory.mktemp("sweep")
        config = get_config()
        config.sweep.strategy = ("none", "wa(opt_state='permute')", "dpsgd", "dimat")
        train.train(config, workdir)
    return workdir


@pytest.mark.slow
def test_a_sweep_learns_and_reports(sweep):
    runs = {folder.name: records(folder) for folder in (sweep / "runs").iterdir()}
    assert set(runs) == {"none", "wa_opt_state_permute", "dpsgd", "dimat"}
    for name, lines in runs.items():
        phases = [line["phase"] for line in lines]
        expected = ["local"] + (["local"] if name == "none" else ["merge", "local"]) * 2
        assert phases == expected
        assert [line["step"] for line in lines if line["phase"] == "local"] == [24, 36, 48]
        first, last = lines[0], lines[-1]
        assert np.mean(last["train_loss"]) < np.mean(first["train_loss"])
        assert np.mean(last["test_accuracy"]) > 0.3  # chance is 0.1
        assert len(last["test_accuracy"]) == 4
    # All strategies begin with the same local training.
    starts = [without_clock(lines)[0] for lines in runs.values()]
    for start in starts[1:]:
        assert start["test_accuracy"] == starts[0]["test_accuracy"]
    # And what they send differs as it should: per step, per round, never.
    sent = {name: lines[-1]["bytes_sent"][0] for name, lines in runs.items()}
    one = sent["dimat"] / 2
    assert sent == {
        "none": 0,
        "wa_opt_state_permute": 6 * one,  # two Adam moments go with each parameter
        "dimat": 2 * one,
        "dpsgd": 24 * one,
    }
    parameters = json.loads((sweep / "runs" / "dimat" / "setup.json").read_text())["parameters"]
    assert one == 2 * 4 * parameters  # two neighbours on a ring, float32


@pytest.mark.slow
def test_the_report_holds_table_and_figures(sweep):
    text = (sweep / "report.md").read_text()
    with open(sweep / "results.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["strategy", *report.COLUMNS]
    assert [row[0] for row in rows[1:]] == ["none", "wa(opt_state='permute')", "dpsgd", "dimat"]
    last = records(sweep / "runs" / "dimat")[-1]
    by_name = dict(zip(rows[0], rows[4], strict=True))
    assert float(by_name["local mean"]) == pytest.approx(100 * np.mean(last["test_accuracy"]))
    assert float(by_name["local worst"]) == pytest.approx(100 * min(last["test_accuracy"]))
    assert rows[1][1] == ""  # isolated agents never merge
    for figure in ("accuracy", "distance", "topology", "partition", "augmentation"):
        assert f"figures/{figure}.png" in text
        assert (sweep / "figures" / f"{figure}.png").stat().st_size > 10_000
    assert list((sweep / "runs" / "dimat" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_backends_and_streaming_agree(tmp_path):
    short = {"pretrain_epochs": 1, "rounds": 1, "augment": "mixup(alpha=1.0)"}
    found = {
        "pmap": run(tmp_path / "a", **short),
        "streamed": run(tmp_path / "b", **short, memory_bytes=0),
        "vmap": run(tmp_path / "c", **short, backend="vmap"),
        "loop, kept on two devices": run(tmp_path / "d", **short, devices=2),
    }
    reference = found["pmap"]["dimat"]
    for name, runs in found.items():
        for line, expected in zip(runs["dimat"], reference, strict=True):
            for field in ("train_loss", "test_loss", "test_accuracy", "consensus_distance"):
                np.testing.assert_allclose(
                    line[field], expected[field], rtol=2e-3, err_msg=f"{name} {field}"
                )


@pytest.mark.slow
def test_a_batchnorm_network_and_one_agent(tmp_path):
    lines = run(
        tmp_path,
        model="cnn",
        agents=1,
        strategy="none",
        augment="identity",
        rounds=1,
        pretrain_epochs=0,
        batch_size=128,
        optimizer="clip_by_global_norm(1.0) | sgd(cosine_decay_schedule(0.1, 12), momentum=0.9)",
    )["none"]
    assert [line["phase"] for line in lines] == ["local"]
    assert lines[-1]["step"] == 12
    # After so few steps the running statistics lag behind; re-estimated they fit the weights.
    assert lines[-1]["consensus_accuracy"] > 0.6


def test_a_diverging_run_names_step_and_agent_and_keeps_its_checkpoint(tmp_path):
    schedule = "sgd(piecewise_constant_schedule(0.05, {13: 1e30}))"
    with pytest.raises(train.Diverged, match=r"loss of agent \d became NaN or infinite at step 1"):
        run(tmp_path, pretrain_epochs=1, rounds=1, optimizer=schedule, strategy="none")
    assert [p.name for p in (tmp_path / "runs/none/checkpoints").iterdir()] == ["step_12"]


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"model": "mlp(hiden=(3,))"}, TypeError, "hidden"),
        ({"optimizer": "adamm(1e-3)"}, ValueError, "did you mean 'adam'"),
        ({"strategy": "dimatt"}, ValueError, "did you mean 'dimat'"),
        ({"topology": "rings"}, ValueError, "did you mean 'ring'"),
        ({"partition": "shard(2)"}, ValueError, "did you mean 'shards'"),
        ({"augment": "mixap()"}, ValueError, "did you mean 'mixup'"),
        ({"agents": 8, "devices": 3}, ValueError, "multiple of 3 agents"),
        ({"agents": 4000}, ValueError, "4000"),
        ({"backend": "xmap"}, ValueError, "loop, vmap, pmap"),
        ({"epochs_per_round": 0}, ValueError, "epochs_per_round"),
        ({"rounds": 0, "pretrain_epochs": 0}, ValueError, "not both 0"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"keep_checkpoints": 1}, ValueError, "at least 2"),
        ({"sweep": ConfigDict({"agent": (1,)})}, ValueError, "did you mean 'agents'"),
        ({"sweep": ConfigDict({"agents": ()})}, ValueError, "has no values"),
    ],
)
def test_what_cannot_be_run_says_why(tmp_path, fields, error, says):
    with pytest.raises(error, match=says):
        run(tmp_path, **fields)


def test_a_config_that_could_not_run_does_not_hold_the_folder(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'mlp'"):
        run(tmp_path, model="mpl")
    short = {"pretrain_epochs": 1, "rounds": 0, "strategy": "none", "augment": "identity"}
    assert len(run(tmp_path, model="mlp(hidden=(8,))", **short)["none"]) == 1
    with pytest.raises(ValueError, match=r"model: .* there"):  # but one that has run does
        run(tmp_path, model="mlp(hidden=(9,))", **short)


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no runs"):
        report.write(tmp_path)
