"""`mixlab sweep`: a process a run, whatever becomes of some of them."""

import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from mixlab import cli, sweep, train
from mixlab.sweep import is_finished
from tests.sweep_config import get_config

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "sweep_config.py"
GOOD = ["adam_1e_2-none", "adam_1e_2-wa"]
BAD = "sgd_1e30-none"


# Tests that run in the background of a shell ignore Ctrl-C, and so would what they start.
MIXLAB = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mixlab.cli import main
main()
"""


def start(workdir):
    command = ["sweep", f"--config={CONFIG}", f"--workdir={workdir}", "--jobs=2"]
    return subprocess.Popen(
        [sys.executable, "-c", MIXLAB, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_combinations_are_left_out_that_agree_with_a_skip():
    assert list(train.variants(get_config())) == [*GOOD, BAD]
    config = get_config()
    config.sweep_skip = ({"topology": "ring"},)
    with pytest.raises(ValueError, match="'topology', which is not swept"):
        train.variants(config)
    config.sweep_skip = ({"strategy": ("none", "wa")},)
    with pytest.raises(ValueError, match="leaves no run"):
        train.variants(config)


def test_the_command_line_sweeps_any_field_and_overrides_what_is_swept():
    config = get_config()
    config.strategy = "dimat"
    cli._set_sweep(config, {"seed": "(0, 1)", "optimizer": "['adam(1e-2)']"}, {"strategy", "seed"})
    assert config.sweep.to_dict() == {
        "optimizer": ("adam(1e-2)",),
        "strategy": ("dimat",),
        "seed": (0, 1),
    }
    for field, values, says in (
        ("seeds", "(0,)", "sweep.seeds: no such field; did you mean 'seed'"),
        ("seed", "3", "sweep.seed takes values such as"),
        ("topology", "(ring,)", "sweep.topology takes values such as"),
    ):
        with pytest.raises(ValueError, match=says):
            cli._set_sweep(config, {field: values}, set())


def test_a_field_that_the_file_does_not_sweep_is_swept_from_the_command_line():
    code = (
        "import sys; from mixlab import cli; "
        "print(cli._parse('sweep', sys.argv[1:])[0].sweep.to_dict())"
    )
    arguments = ["--config.sweep.seed=(0, 1)", "--config.strategy=dimat", "--workdir=x"]
    found = subprocess.run(
        [sys.executable, "-c", code, f"--config={CONFIG}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "'seed': (0, 1)" in found
    assert "'strategy': ('dimat',)" in found


@pytest.mark.filterwarnings("ignore:the load_module")  # of the reader of config files
@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("agentz=3", "the config has no field 'agentz'; did you mean 'agents'"),
        ("lr=0.1", "the config has no field 'lr'; known: agents, augment"),
        ("sweep_skips=1", "the config has no field 'sweep_skips'; did you mean 'sweep_skip'"),
        ("model.width=3", "model has no fields of its own; give the whole of it: --config.model="),
        ("agents=two", "invalid literal for int"),
    ],
)
def test_what_is_wrong_with_a_field_on_the_command_line_is_told_in_a_line(
    field, says, monkeypatch, capsys
):
    given = [f"--config={CONFIG}", "--workdir=x", f"--config.{field}"]
    monkeypatch.setattr("sys.argv", ["mixlab", "sweep", *given])
    with pytest.raises(SystemExit) as stopped:
        cli._parse("sweep", given)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


OWN = """
import numpy as np

from mixlab import agents, augment
from tests.sweep_config import get_config as theirs

augment.CONSTRUCTORS["mine"] = augment.identity
agents.topology.TOPOLOGIES["both"] = lambda n: agents.from_edges(n, [(0, 1)])
agents.partition.PARTITIONS["halves"] = lambda labels, num_agents, seed, *, first=0.5: np.split(
    np.arange(len(labels)), [int(first * len(labels))]
)


def get_config(variant="few"):
    if variant != "few":
        raise ValueError(f"variant {variant!r} is unknown; known: few")
    config = theirs()
    config.update(augment="mine", pretrain_epochs=0, rounds=1)
    config.update(topology="both", partition="halves(first=0.25)")
    config.sweep.optimizer = ("adam(1e-2)",)
    config.sweep.strategy = ("wa",)
    return config
"""


def test_runs_know_what_the_config_file_registers(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    command = ["sweep", f"--config={tmp_path / 'own.py'}:few", f"--workdir={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "mixlab", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "[1/1]" in ended.stdout
    assert "FAILED" not in ended.stdout


def test_what_is_wrong_in_a_config_file_is_told_in_a_line(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    code = (
        "import sys; from mixlab import cli\n"
        "for config in sys.argv[1:]:\n"
        "    try: cli._parse('sweep', ['--workdir=x', f'--config={config}'])\n"
        "    except SystemExit as ended: assert ended.code == 2"
    )
    configs = [f"{tmp_path / 'own.py'}:many", str(tmp_path / "lost.py")]
    says = subprocess.run(
        [sys.executable, "-c", code, *configs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "ValueError: variant 'many' is unknown; known: few" in says
    assert f'(File "{configs[0][:-5]}", line 16, in get_config)' in says
    assert "Traceback" not in says
    assert "\nmixlab: cannot read the config: " in says
    assert says.endswith(f"No such file or directory: '{configs[1]}'\n")


@pytest.mark.parametrize(
    ("names", "says"), [("a", "1 run failed: a"), ("ab", "2 runs failed: a, b")]
)
def test_runs_that_failed_are_counted(names, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        cli.flags, "DEFINE_integer", lambda *_, **__: types.SimpleNamespace(value=1)
    )
    monkeypatch.setattr(cli, "_parse", lambda command, arguments: (get_config(), str(tmp_path)))
    monkeypatch.setattr(cli.config_flags, "get_config_filename", lambda flag: "config.py")
    monkeypatch.setattr(sweep, "sweep", lambda *_, **__: (tmp_path, dict.fromkeys(names, "")))
    monkeypatch.setattr(sweep.report, "show", lambda path: None)
    with pytest.raises(SystemExit) as ended:
        cli._sweep([])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"\nmixlab: {says}\n"


def test_a_sweep_whose_agents_cannot_hold_the_data_does_not_begin(tmp_path):
    config = get_config()
    config.sweep.partition = ("iid", "shards")
    with pytest.raises(ValueError, match="-shards-none: 2 agents of 2 classes each cannot hold"):
        sweep.sweep(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_stopped_and_has_saved_is_not_marked_as_failed(tmp_path):
    assert "stopped by SIGTERM, and saved" in sweep._failure(tmp_path, 128 + signal.SIGTERM)
    assert not list(tmp_path.iterdir())
    assert "ended by SIGKILL" in sweep._failure(tmp_path, -signal.SIGKILL)
    assert (tmp_path / "failed.json").exists()
    assert not sweep._failure(tmp_path, 0)


@pytest.mark.slow
def test_a_sweep_is_interrupted_resumed_and_outlives_a_run_that_diverges(tmp_path):
    process = start(tmp_path)
    while not list(tmp_path.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, f"{out}\n{err}"
    assert "saving adam_1e_2-" in out
    assert "run the same command again to go on" in out
    assert not list(tmp_path.glob("runs/*/failed.json"))

    process = start(tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.strip() == f"mixlab: 1 run failed: {BAD}"
    assert f"{BAD}  FAILED: Diverged: the loss of agent" in out
    assert "[3/3]" in out
    assert BAD in (tmp_path / "report.md").read_text()
    for name, config in train.variants(get_config()).items():
        assert is_finished(tmp_path / "runs" / name, config) == (name in GOOD)
    newest = tmp_path / "runs" / GOOD[0] / "checkpoints" / "step_92"
    newest.rename(newest.with_name("lost"))
    assert not is_finished(tmp_path / "runs" / GOOD[0], train.variants(get_config())[GOOD[0]])
