"""`mixlab diff` on every kind of file that it reads."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from mixlab import checkpoint, cli, figures, merge


def model(seed):
    rng = np.random.default_rng(seed)
    shapes = {"layer/kernel": (4, 3), "layer/bias": (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


MODELS = [model(seed) for seed in range(3)]


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "base.npz", **MODELS[0])
    save_file(MODELS[1], tmp_path / "one.safetensors")
    tree = {"layer": {k.removeprefix("layer/"): x for k, x in MODELS[2].items()}}
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "two", tree)
    # A run of two agents, as `mixlab train` leaves it.
    agents = {k: np.stack([m[f"layer/{k}"] for m in MODELS[1:]]) for k in ("kernel", "bias")}
    run = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
    with run:
        agents = {"variables": {"layer": agents}, "step": np.zeros(2)}
        run.save(3, {"state": agents, "totals": {}}, {})
        run.wait()
    return tmp_path


def test_files_and_runs(files, capsys):
    expected = merge.report(MODELS[1:], base=MODELS[0])
    base = ["--base", str(files / "base.npz")]
    for given in (["one.safetensors", "two"], ["run"]):
        out = files / "out.json"
        cli._diff([*(str(files / name) for name in given), *base, "--json", str(out)])
        assert json.loads(out.read_text()) == expected
        assert merge.table(expected) in capsys.readouterr().out


def test_a_merged_model_and_a_figure(files, capsys):
    np.savez(files / "merged.npz", **merge.average()(MODELS[1:]))
    arguments = [str(files / name) for name in ("one.safetensors", "two", "--merged", "merged.npz")]
    arguments[2] = "--merged"
    figure = files / "agreement.png"
    cli._diff([*arguments, "--leaves", "*/kernel", "--figure", str(figure)])
    shown = capsys.readouterr().out
    assert "merged norm" in shown
    assert "bias" not in shown
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_errors_say_what_can_be_read(files, capsys):
    np.savez(files / "odd.npz", other=np.ones(2))
    for arguments, message in (
        (["none.npz"], "there is no"),
        (["one.safetensors", "--leaves", "x*"], "no leaf matches 'x*'; there are layer/bias"),
        (["one.safetensors", "odd.npz"], "only in the second: ['other']"),
        (["one.safetensors", "--base", "run"], "2 agents, but one model is wanted"),
        (["run/checkpoints/step_3/meta"], "is no model; give an .npz"),
    ):
        paths = [a if a.startswith("-") or "*" in a else str(files / a) for a in arguments]
        with pytest.raises(SystemExit) as stopped:
            cli._diff(paths)
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
    (files / "runs" / "a").mkdir(parents=True)
    with pytest.raises(SystemExit):
        cli._diff([str(files)])
    assert "holds several runs" in capsys.readouterr().err


def test_many_leaves_are_drawn_as_layers():
    names = [f"block{i:02}/{part}" for i in range(30) for part in ("bias", "kernel")]
    many = [{name: np.full(3, m + i, np.float32) for i, name in enumerate(names)} for m in (1, 2)]
    figure = figures.agreement(merge.report(many))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"block{i:02}" for i in range(30)]
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.agreement(merge.report([{"n": 1}, {"n": 2}]))
