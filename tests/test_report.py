"""Reports of workdirs that no run has filled: what they show is known."""

import csv
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from mixlab import agents, report
from mixlab.experiment import default_config

AGENTS = 4
SHARDS = "shards(classes_per_agent=2)"


def record(step, phase, round, accuracy, sent, received):
    return {
        "step": step,
        "phase": phase,
        "round": round,
        "epoch": step / 10,
        "test_accuracy": [accuracy, accuracy, accuracy, accuracy],
        "test_confidence": [0.9] * AGENTS,
        "test_ece": [0.1] * AGENTS,
        "consensus_accuracy": accuracy,
        "plain_accuracy": accuracy / 2,
        "consensus_distance": 0.1,
        "plain_distance": 0.2,
        "bytes_sent": {kind: [n * 1e6 for n in values] for kind, values in sent.items()},
        "bytes_received": {kind: [n * 1e6 for n in values] for kind, values in received.items()},
        "messages": [2 * round] * AGENTS,
        "seconds": {"local": 2.0 * step, "match": 0.5, "merge": 0.25, "compile": 9.0},
    }


def write_run(
    workdir, number, accuracy, failed=None, recorded=5, byzantine=(), happened="", **fields
):
    """Two rounds of two epochs after one epoch apart; the last merge reaches `accuracy`."""
    folder = workdir / "runs" / f"{number:02d}"
    folder.mkdir(parents=True)
    config = default_config()
    config.update({"agents": AGENTS, "pretrain_epochs": 1, "rounds": 2, "epochs_per_round": 2})
    config.update(fields)
    topology = agents.topology.parse(config.topology, AGENTS)
    setup = {
        "number": number,
        "config": config.to_dict(),
        "topology": str(topology),
        "weights": np.asarray(topology.weights).tolist(),
        "faults": happened,
        "byzantine": list(byzantine),
        "partition": [[20, 5]] * AGENTS,
        "class_names": ["a", "b"],
        "parallel": "4 agents",
        "parameters": 100,
        "steps_per_epoch": 10,
    }
    (folder / "setup.json").write_text(json.dumps(setup))
    images = np.zeros((2, 4, 4, 1), np.uint8)
    np.savez(folder / "sheet.npz", before=images, image=images, label=np.eye(2)[:2])
    merging = config.strategy != "none"
    sent = {"parameters": [1, 2, 3, 2], "activations": [4, 4, 4, 4]} if merging else {}
    received = {"parameters": [2, 2, 2, 0], "activations": [4, 4, 4, 0]} if merging else {}
    lines = [
        record(10, "local", 0, 0.1, {}, {}),
        *([record(10, "merge", 1, 0.2, sent, received)] if merging else []),
        record(30, "local", 1, accuracy if not merging else 0.3, sent, received),
        *([record(30, "merge", 2, accuracy, sent, received)] if merging else []),
        record(50, "local", 2, 0.99, sent, received),
    ]
    if failed:
        (folder / "failed.json").write_text(json.dumps({"reason": failed}))
        lines = lines[:1]
    lines = lines[:recorded]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not drawn, which takes longest."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path: path.touch())


def tables(text):
    """The tables of a Markdown text, each a list of rows of cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line[1:-1].split(" | ")])
        elif not line.startswith("|") and found[-1]:
            found.append([])
    return [rows for rows in found if rows]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Isolated agents, once; averaging and DIMAT on two topologies, two partitions, two seeds."""
    workdir = tmp_path_factory.mktemp("large")
    number = 0
    for skew, partition in enumerate(("iid", SHARDS)):
        for strategy in ("none", "wa", "dimat"):
            for topology in ("ring", "complete")[: 1 if strategy == "none" else 2]:
                for seed in (0, 1):
                    number += 1
                    accuracy = (
                        0.5 - 0.2 * skew + 0.1 * seed + 0.05 * len(strategy) * (topology == "ring")
                    )
                    diverges = (strategy, topology, skew) == ("wa", "complete", 1)
                    write_run(
                        workdir,
                        number,
                        accuracy,
                        failed="Diverged: too\nfast" if diverges else None,
                        partition=partition,
                        strategy=strategy,
                        topology=topology,
                        seed=seed,
                    )
    return report.write(workdir)


def test_the_summary_compares_strategies_right_after_the_last_merge(large):
    summary, *_ = tables(large.read_text())
    assert summary == [
        ["partition", "topology", "none", "wa", "dimat"],
        # Isolated agents ran on the ring only, and stand beside what was run elsewhere.
        ["iid", "ring", "75.0 ± 7.1", "65.0 ± 7.1", "80.0 ± 7.1"],
        ["iid", "complete", "75.0 ± 7.1", "55.0 ± 7.1", "55.0 ± 7.1"],
        [SHARDS, "ring", "55.0 ± 7.1", "45.0 ± 7.1", "60.0 ± 7.1"],
        [SHARDS, "complete", "55.0 ± 7.1", "-", "35.0 ± 7.1"],
    ]
    for name in ("summary", "curves", "accuracy", "distance", "partition"):
        assert f"figures/{name}.png" in large.read_text()
        assert (large.parent / "figures" / f"{name}.png").stat().st_size > 10_000


def test_runs_that_failed_are_named_and_in_no_mean(large, capsys):
    text = large.read_text()
    *_, failures, _ = tables(text)
    assert failures == [
        ["run", "after step", "reason"],
        ["15", "10", "Diverged: too fast"],
        ["16", "10", "Diverged: too fast"],
    ]
    with open(large.parent / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == 18
    report.show(large)
    assert "FAILED  15: Diverged: too" in capsys.readouterr().out


def test_runs_that_are_not_finished_are_named_and_in_no_mean(undrawn, tmp_path, capsys):
    write_run(tmp_path, 1, 0.5, strategy="wa", seed=0)
    write_run(tmp_path, 2, 0.7, strategy="wa", seed=1)
    folder = write_run(tmp_path, 3, 0.9, strategy="wa", seed=2, recorded=4)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "phase": "loc')  # killed while it wrote
    write_run(tmp_path, 4, 0.9, strategy="wa", seed=3, recorded=0)
    path = report.write(tmp_path)
    (head, row), *_ = tables(path.read_text())
    assert dict(zip(head, row, strict=True))["merged mean"] == "60.0 ± 14.1"
    assert "- 03: round 2 of 2 (epoch 3)\n- 04: nothing recorded yet" in path.read_text()
    assert "over seeds 0, 1." in path.read_text()
    report.show(path)
    assert "NOT FINISHED  03: round 2 of 2 (epoch 3)" in capsys.readouterr().out


def test_a_report_of_runs_none_of_which_is_finished_shows_them_and_says_so(
    undrawn, tmp_path, capsys
):
    write_run(tmp_path, 1, 0.5, strategy="wa", recorded=3)
    path = report.write(tmp_path)
    (head, row), *_ = tables(path.read_text())
    assert dict(zip(head, row, strict=True))["merged mean"] == "20.0"
    assert "No run is finished: what is shown is what they have reached." in path.read_text()
    report.show(path)
    assert "No run is finished" in capsys.readouterr().out


def test_communication_is_told_by_kind(large):
    *_, rows = tables(large.read_text())
    head, isolated, averaging, *_ = rows
    costs = dict(zip(head, averaging, strict=True))
    assert costs["parameters sent"] == "2.00 ± 0.00"
    assert costs["parameters received"] == "1.50 ± 0.00"  # a message was lost
    assert costs["activations sent"] == "4.00 ± 0.00"
    assert costs["most sent"] == "7.00 ± 0.00"
    assert costs["messages"] == "4 ± 0"
    assert costs["local"] == "100.00 ± 0.00"
    assert "gradients sent" not in head
    assert dict(zip(head, isolated, strict=True))["parameters sent"] == "-"
    with open(large.parent / "results.csv") as file:
        row = list(csv.DictReader(file))[2]
    assert (row["MB sent"], row["seconds"], row["activations sent"]) == ("6.0", "100.75", "4.0")
    assert "gradients sent" not in row


def test_what_a_strategy_determines_is_no_setting(undrawn, tmp_path):
    for number, (strategy, optimizer) in enumerate([("wa", "adam(1e-3)"), ("dimat", "sgd(0.1)")]):
        write_run(tmp_path, number, 0.5, strategy=strategy, optimizer=optimizer)
    text = report.write(tmp_path).read_text()
    assert "The optimizer: `adam(1e-3)` of wa; `sgd(0.1)` of dimat." in text
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        *("accuracy", "augmentation", "curves", "distance", "partition", "topology")
    }


def test_byzantine_agents_are_left_out_and_faults_told(undrawn, tmp_path):
    faults = "byzantine(agents=[1], attack='alie')"
    folder = write_run(
        tmp_path, 1, 0.5, byzantine=[1], happened="agent 1 Byzantine\nround 0: bad", faults=faults
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["test_accuracy"] = [0.8, 0.0, 0.8, 0.5]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = report.write(tmp_path).read_text()
    table, *_ = tables(text)
    row = dict(zip(*table, strict=True))
    assert (row["local mean"], row["local worst"]) == ("70.0", "50.0")
    assert f"- `{faults}`: agent 1 Byzantine; round 0: bad" in text


def test_many_settings_are_spread_over_figures(undrawn, tmp_path):
    for number in range(8):
        write_run(tmp_path, number, 0.5, strategy="wa", batch_size=10 + number)
    report.write(tmp_path)
    names = {path.stem for path in (tmp_path / "figures").glob("curves*")}
    assert names == {"curves-1", "curves-2"}
