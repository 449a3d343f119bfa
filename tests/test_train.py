"""Whole runs of the main job, small: what they write, and that it means what it says."""

import contextlib
import csv
import functools
import io
import json
import pathlib
import shutil
import signal
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mixlab import cli, experiment, report, train
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
    sent = {name: lines[-1]["bytes_sent"].get("parameters", [0])[0] for name, lines in runs.items()}
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
    cost = "rounds, messages, parameters sent, parameters received, most sent, local, match, merge"
    assert rows[0] == ["strategy", *report.COLUMNS, *cost.split(", ")]
    assert [row[0] for row in rows[1:]] == ["none", "wa(opt_state='permute')", "dpsgd", "dimat"]
    last = records(sweep / "runs" / "dimat")[-1]
    by_name = dict(zip(rows[0], rows[4], strict=True))
    assert float(by_name["local mean"]) == pytest.approx(100 * np.mean(last["test_accuracy"]))
    assert float(by_name["local worst"]) == pytest.approx(100 * min(last["test_accuracy"]))
    assert rows[1][1] == ""  # isolated agents never merge
    for figure in ("accuracy", "curves", "distance", "topology", "partition", "augmentation"):
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
            trained = ("train_loss",) if expected["phase"] == "local" else ()
            assert ("train_loss" in line) == bool(trained)  # a merge trains nobody
            for field in (*trained, "test_loss", "test_accuracy", "consensus_distance"):
                np.testing.assert_allclose(
                    line[field], expected[field], rtol=2e-3, err_msg=f"{name} {field}"
                )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Ordinary training, of one network with BatchNorm."""
    config = get_config()
    config.model = "cnn"
    config.agents, config.strategy = 1, "none"
    config.pretrain_epochs, config.rounds = 0, 3
    config.batch_size = 128
    config.optimizer = (
        "clip_by_global_norm(1.0) | sgd(cosine_decay_schedule(0.1, 36), momentum=0.9)"
    )
    workdir = tmp_path_factory.mktemp("alone")
    with jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(io.StringIO()) as out:
        train.train(config, workdir)
    return workdir, out.getvalue()


@pytest.mark.slow
def test_one_agent_is_told_of_as_ordinary_training(alone):
    workdir, told = alone
    lines = records(workdir / "runs" / "none")
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("local", 12 * n) for n in (1, 2, 3)
    ]
    last = lines[-1]
    assert last["test_accuracy"][0] > 0.6
    assert 0 < last["test_ece"][0] < 0.5
    assert not [name for name in last if name.startswith(("consensus", "plain"))]
    scores = f"{last['test_accuracy'][0]:.3f}, calibration error {last['test_ece'][0]:.3f}"
    assert told.splitlines()[0] == "1 agent on 1 cpu device (pmap)"
    assert told.splitlines()[-1].endswith(f"done: test accuracy {scores}")
    text = (workdir / "report.md").read_text()
    assert rows_of(text)[0] == ["strategy", "accuracy", "confidence", "ECE", "seconds"]
    assert "merge" not in text
    assert {path.stem for path in (workdir / "figures").iterdir()} == {"accuracy", "augmentation"}


def copies(workdir, variants):
    """Runs that were not run: others under other configs and with other test accuracies."""
    for number, (source, fields, accuracy) in enumerate(variants):
        folder = workdir / "runs" / str(number)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints"))
        setup = json.loads((folder / "setup.json").read_text())
        setup["number"] = number
        setup["config"] |= fields
        (folder / "setup.json").write_text(json.dumps(setup))
        lines = records(folder)
        lines[-1]["test_accuracy"] = accuracy
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return report.write(workdir).read_text()


def rows_of(text):
    """The cells of the first table in a report."""
    first = text[text.index("\n| ") :].split("\n\n")[0]
    return [
        [cell.strip() for cell in line[1:-1].split(" | ")]
        for line in first.splitlines()
        if line.startswith("| ")
    ]


@pytest.mark.slow
def test_seeds_share_a_row_and_augmentations_their_base(alone, tmp_path):
    base = "random_crop(padding=1) | random_flip"
    mixed = f"{base} | one_of(mixup(0.8), cutmix(1.0))"
    variants = [
        *(({"augment": base, "seed": seed}, [x]) for seed, x in enumerate((0.5, 0.6, 0.76))),
        *(({"augment": mixed, "seed": seed}, [x]) for seed, x in enumerate((0.8, 0.9))),
        ({"augment": f"{base} | mixup | cutout(4)", "seed": 0}, [0.25]),
    ]
    run = alone[0] / "runs" / "none"
    text = copies(tmp_path, [(run, *variant) for variant in variants])
    assert [row[:2] for row in rows_of(text)] == [
        ["augment", "accuracy"],
        ["base alone", "62.0 ± 13.1"],  # statistics.stdev([50, 60, 76]) == 13.11...
        ["one_of(mixup(0.8), cutmix(1.0))", "85.0 ± 7.1"],
        [r"mixup \| cutout(4)", "25.0"],
    ]
    assert f"Each augmentation follows the base `{base}`." in text
    assert "over seeds 0, 1, 2" in text
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["augment"], int(r["seed"]), float(r["local mean"])) for r in rows] == [
        (fields["augment"], fields["seed"], pytest.approx(100 * accuracy[0]))
        for fields, accuracy in variants
    ]
    for figure in ("accuracy", "calibration", "augmentation"):
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_seeds_of_several_agents_share_a_row_beside_one_agent(sweep, alone, tmp_path):
    dimat = sweep / "runs" / "dimat"
    variants = [
        (dimat, {"seed": 0}, [0.2, 0.4, 0.6, 0.8]),
        (dimat, {"seed": 1}, [0.6, 0.7, 0.8, 0.9]),
        (alone[0] / "runs" / "none", {}, [0.9]),
    ]
    head, several, one = rows_of(copies(tmp_path, variants))
    several, one = (dict(zip(head, row, strict=True)) for row in (several, one))
    assert several["local mean"] == "62.5 ± 17.7"
    assert several["local worst"] == "40.0 ± 28.3"
    assert several["MB sent"].endswith("± 0.0")
    assert (one["local mean"], one["consensus"], one["distance"]) == ("90.0", "-", "-")
    assert "ECE" not in head  # ways to communicate are compared here


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
        ({"batch_size": 1000}, ValueError, "batch_size=1000 is more than any agent has"),
        ({"keep_checkpoints": 1}, ValueError, "keep_checkpoints must be at least 2, got 1"),
        ({"agents": 0}, ValueError, "agents must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"matching_examples": -5}, ValueError, "matching_examples must be at least 1"),
        ({"eval_batch_size": 0}, ValueError, "eval_batch_size must be at least 1"),
        ({"optimizer": "0.1"}, ValueError, "'0.1' is a literal, no call"),
        ({"model": "mlp(hidden=32)"}, ValueError, r"widths above 0, such as \(256, 256\); got 32"),
        ({"faults": "byzantine(4, attack='alie')"}, ValueError, "none of 4 agents honest"),
        (
            {"sweep": ConfigDict({"strategy": ("none", "dimat(matching='weight')")})},
            ValueError,
            "dimat_matching_weight: unknown matching 'weight'; did you mean 'weights'",
        ),
        ({"sweep": ConfigDict({"agent": (1,)})}, ValueError, "did you mean 'agents'"),
        ({"pretrain_epoch": 5}, ValueError, "no field 'pretrain_epoch': did you mean 'pretrain_ep"),
        ({"stratgy": "wa", "sweep": ConfigDict({"stratgy": ("wa",)})}, ValueError, "'strategy'"),
        ({"sweep": ConfigDict({"agents": ()})}, ValueError, "has no values"),
        (
            {"sweep": ConfigDict({"agents": (5, 4), "partition": ("iid", "shards")})},
            ValueError,
            "4-shards: 4 agents of 2 classes each cannot hold 10 classes",
        ),
    ],
)
def test_what_cannot_be_run_says_why(tmp_path, fields, error, says):
    with pytest.raises(error, match=says):
        run(tmp_path, **fields)
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))  # nothing has run before it was found


def test_a_config_that_could_not_run_does_not_hold_the_folder(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'mlp'"):
        run(tmp_path, model="mpl")
    short = {"pretrain_epochs": 1, "rounds": 0, "strategy": "none", "augment": "identity"}
    assert len(run(tmp_path, model="mlp(hidden=(8,))", **short)["none"]) == 1
    with pytest.raises(ValueError, match=r"model: .* there"):  # but one that has run does
        run(tmp_path, model="mlp(hidden=(9,))", **short)


def test_a_folder_takes_more_values_of_a_sweep_and_no_other_config(tmp_path):
    config = get_config()
    config.sweep.seed, config.sweep.strategy = (0, 1), ("dimat", "wa(typo=1)")
    train.claim(tmp_path, config)
    for name in ("0-dimat", "1-wa_typo_1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "0-dimat" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "runs" / "1-wa_typo_1" / "failed.json").write_text("{}")

    config.sweep.seed, config.sweep.strategy, config.devices = (0, 1, 2), ("dimat", "wa"), 1
    train.claim(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["sweep"]["seed"] == [0, 1, 2]
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["0-dimat"]

    config.rounds = 7
    with pytest.raises(ValueError, match="rounds: 2 there, 7 now") as raised:
        train.claim(tmp_path, config)
    assert "sweep" not in str(raised.value)
    config.rounds = 2
    del config.sweep["seed"]  # runs would be named otherwise
    with pytest.raises(ValueError, match="sweep: "):
        train.claim(tmp_path, config)


def test_the_first_interrupt_saves_and_the_second_interrupts_as_usual(capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    term = signal.getsignal(signal.SIGTERM)
    try:
        for first in (signal.SIGINT, signal.SIGTERM):
            with train.termination() as terminated:
                assert not terminated()
                signal.raise_signal(first)
                assert terminated() == first
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.getsignal(signal.SIGTERM) == term
        assert "saving, then stopping" in capfd.readouterr().err
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        with train.termination() as terminated:
            signal.raise_signal(signal.SIGINT)
            assert not terminated()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train", "  keep_checkpoints = None  # by default 2; all where agents fail\n"),
        ("sweep", "  batch_size = 50  # of each agent\n"),
        ("experts", "  tune_steps = 200  # of each expert; training on all"),
        ("barrier", "  epochs = 10\n"),
        ("report", "report.md, results.csv, figures.\n"),
    ],
)
def test_the_help_of_a_command_is_its_own_and_lists_its_fields(command, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mixlab", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage:\n  mixlab {command} ")
    assert says in told
    assert "mixlab gallery" not in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_status_of_a_stopped_run_names_the_signal(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as ended, cli._job(str(tmp_path)):
        raise train.Stopped("stopped, all saved", number)
    assert ended.value.code == 128 + number
    assert "stopped, all saved; run the same command again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (jax.errors.JaxRuntimeError("Gloo: timed out\nand more"), "Gloo: timed out\nA process has"),
        (AssertionError("odd"), "AssertionError: odd"),
    ],
)
def test_a_process_that_fails_leaves_at_once(error, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(cli.distributed, "leave", sys.exit)  # in truth without what JAX does then
    with pytest.raises(SystemExit) as ended, cli._job(str(tmp_path)):
        raise error
    assert ended.value.code == 1
    assert says in capsys.readouterr().err


def test_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 10)).astype(np.float32) * rng.uniform(0, 12, (40, 1))
    logits[0] = 1000 * np.eye(10)[3]  # a confidence of 1 belongs to the last bin
    labels = np.where(rng.random(40) < 0.6, logits.argmax(1), rng.integers(10, size=40))

    # Guo et al. 2017, s. 2, example by example.
    probability = np.exp(np.float64(logits) - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    expected = 0.0
    for m in range(1, 16):
        inside = [i for i in range(40) if (m - 1) / 15 < confidence[i] <= m / 15]
        if inside:
            distance = abs(np.mean(right[inside]) - np.mean(confidence[inside]))
            expected += len(inside) / 40 * distance

    # Two batches, the second of which is padded.
    network = types.SimpleNamespace(apply=lambda variables, images: images)
    padded = np.concatenate([logits[25:], logits[:10]])
    batches = [
        {"image": jnp.array(logits[:25]), "label": jnp.array(labels[:25])},
        {"image": jnp.array(padded), "label": jnp.array([*labels[25:], *[-1] * 10])},
    ]
    sums = [experiment.tally(network, {}, batch) for batch in batches]
    scores = experiment.scores({k: np.array(sum(s[k] for s in sums))[None] for k in sums[0]})
    assert scores["ece"] == pytest.approx(expected, rel=1e-5)
    assert 0.05 < expected < 0.5
    assert scores["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(right.mean(), rel=1e-6)


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no runs"):
        report.write(tmp_path)


@pytest.mark.parametrize("given", [None, "mine"])
def test_programs_are_kept_with_the_runs_or_where_the_user_says(given, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if given:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)  # as jax does when it is imported
        with cli._job(str(tmp_path)):
            assert jax.config.jax_compilation_cache_dir == (given or str(tmp_path / ".jax_cache"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_what_communication_takes_of_a_step_is_what_it_takes_beyond_one_without(monkeypatch):
    now = [0.0]

    def taking(seconds):
        def run(carry, batch, step):
            now[0] += seconds
            carry["x"].delete()  # as a step does that reuses its memory
            return {}

        return run

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    feed = types.SimpleNamespace(steps=lambda start, stop: (step for step in range(start, stop)))
    carry = {"x": jnp.ones(3)}
    for whole, alone, share in ((4.0, 3.0, 0.25), (1.0, 1.5, 0.0)):
        made = types.SimpleNamespace(feed=feed, step=taking(whole), alone=taking(alone))
        assert train._share(made, carry, 7) == share
    assert carry["x"].sum() == 3


@pytest.mark.parametrize(
    ("strategy", "epochs"),
    [("dpsgd", [1]), ("data_parallel", [0]), ("wa", []), ("fedavg", []), ("fedprox", [1])],
)
def test_steps_of_a_strategy_are_timed_where_they_begin(strategy, epochs, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(train, "_share", lambda made, carry, step: timed.append(step) or 0.5)
    config = get_config()
    config.update(strategy=strategy, agents=2, pretrain_epochs=1, rounds=1, batch_size=256)
    train.train(config, tmp_path)
    steps = json.loads((tmp_path / "runs" / strategy / "setup.json").read_text())["steps_per_epoch"]
    assert timed == [steps * epoch for epoch in epochs]
    lines = (tmp_path / "runs" / strategy / "metrics.jsonl").read_text().splitlines()
    seconds = json.loads(lines[-1])["seconds"]
    if epochs and strategy != "fedprox":  # whose steps do not communicate
        assert 0 < seconds["merge"] <= seconds["local"] * 1.01 + 0.002


@functools.cache
def begun(strategy):
    """What a strategy remembers at first, the agents before the first round, and a step later."""
    config = get_config()
    config.update(strategy=strategy, backend="vmap", pretrain_epochs=1, optimizer="sgd(0.1)")
    config.update(topology="star", same_init=True, augment="identity", batch_size=256)
    made = experiment.prepare(config)
    carry, steps = made.init(), made.feed.steps_per_epoch
    memory = made.parallel.get(carry.state.memory)
    with contextlib.closing(made.feed.steps(0, steps + 1)) as batches:
        for step in range(steps):
            carry = made.step(carry, next(batches), step)
        before = made.parallel.get(carry.state)
        carry = made.step(carry, next(batches), steps)
    return memory, before, made.parallel.get(carry.state)


@pytest.mark.parametrize(
    "strategy",
    [
        "dpsgd",
        "cga(momentum=0.0)",
        "swarm(momentum=0.0)",
        "sgp",
        "gradient_tracking",
        "choco",
        "fedprox(mu=5.0)",
        "fedavg(fraction=0.5)",
    ],
)
def test_before_the_first_round_all_strategies_train_alike(strategy):
    """By themselves, and what a strategy remembers is as it was: nothing was sent yet."""
    memory, before, after = begun(strategy)
    _, expected, later = begun("none")
    chex.assert_trees_all_equal(before.variables, expected.variables)
    chex.assert_trees_all_equal(before.memory, memory)
    same = jax.tree.map(np.array_equal, after.variables, later.variables)
    assert not all(jax.tree.leaves(same))
