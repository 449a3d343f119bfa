"""`mixlab diff` and `mixlab merge` on every kind of file that they read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from mixlab import checkpoint, cli, figures, merge
from tests.merge.test_battery import ROWS, Row


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


def read(path):
    return checkpoint.read_models(path)[0]


def refused(arguments, capsys):
    """The exit status of `mixlab merge`, and what it says."""
    with pytest.raises(SystemExit) as stopped:
        cli._merge([str(argument) for argument in arguments])
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["ties(density=0.5)", "average(weights=[0.7, 0.3])", "trim(0.5) | reduce('mean')"]
)
@pytest.mark.parametrize("out", ["merged.npz", "made/merged.safetensors"])
def test_files_and_runs_are_merged_as_in_python(files, capsys, monkeypatch, method, out):
    _, one, two = MODELS
    for names, models in ((["two", "one.safetensors"], [two, one]), (["run"], [one, two])):
        expected = merge.parse(method)(models, base=MODELS[0])
        paths = [str(files / name) for name in names]
        # Options may stand between the models.
        given = [method, paths[0], "--base", str(files / "base.npz"), *paths[1:], "--force"]
        monkeypatch.setattr("sys.argv", ["mixlab", "merge", *given, "--out", str(files / out)])
        cli.main()
        found = read(files / out)
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            np.testing.assert_array_equal(found[name], leaf)
        shown = capsys.readouterr().out
        assert f"merged 2 models by {method} in " in shown
        assert f" s: 2 leaves, 15 parameters\nwrote {files / out}\n" in shown


@pytest.mark.parametrize("doubles", [False, True])
def test_other_kinds_of_leaves_come_out_as_they_went_in(tmp_path, capsys, doubles):
    for i, name in enumerate(("one", "two")):
        leaves = {
            "model.norm.weight": np.full(3, 1 + 2 * i, jnp.bfloat16),
            "bn.num_batches_tracked": np.int64(2**40 + i),
        }
        if doubles:
            leaves["double"] = np.full(2, 1 + i * 1e-12)
        checkpoint.write_model(tmp_path / f"{name}.safetensors", leaves)
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("one", "two", "out")]
    cli._merge(["average", *paths[:2], "--out", paths[2], "--report"])
    found = read(paths[2])
    assert found["model.norm.weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["model.norm.weight"], np.full(3, 2, jnp.bfloat16))
    assert found["bn.num_batches_tracked"] == 2**40
    if doubles:
        np.testing.assert_array_equal(found["double"], np.full(2, (1 + (1 + 1e-12)) / 2))
    shown = capsys.readouterr().out
    assert "merged norm" in shown
    assert "bn.num_batches_tracked  copied, though the models differ in it" in shown
    assert not jax.config.jax_enable_x64


def test_the_seed_of_methods_that_draw(files):
    found = []
    for i, seed in enumerate(([], ["--seed", "0"], ["--seed", "1"])):
        out = files / f"{i}.npz"
        given = ["dare(0.5)", files / "run", "--base", files / "base.npz", "--out", out, *seed]
        cli._merge([str(argument) for argument in given])
        found.append(read(out)["layer/kernel"])
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_errors_of_usage_come_before_anything_is_read(tmp_path, capsys):
    there = tmp_path / "there.npz"
    there.write_text("precious")
    for method, out, message in (
        ("avrage", "out.npz", "did you mean 'average'?"),
        ("average(weight=[1, 2])", "out.npz", "it takes (weights=None, normalize=True)"),
        ("trim(0.2", "out.npz", "'(' was never closed"),
        ("nnm(1)", "out.npz", "makes no model yet"),
        ("average", "out.pt", "a .safetensors or .npz file, not to"),
        ("average", "there.npz", "there.npz exists; give another --out, or --force"),
        ("nnm(1) | emr", "out.npz", "emr makes a model for each task, not one. In Python merge."),
        ("fisher(floor=0.0)", "out.npz", "fishers=[...]); checkpoint.read_models reads the models"),
    ):
        status, said = refused([method, "none.npz", "--out", tmp_path / out], capsys)
        assert (status, message in said) == (2, True), said
    assert refused(["average", "none.npz"], capsys)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]
    assert there.read_text() == "precious"


def test_what_cannot_be_merged_is_an_error_in_words_of_the_command_line(files, capsys):
    checkpoint.write_model(files / "less.npz", {"layer/bias": MODELS[0]["layer/bias"]})
    one, less, out = files / "one.safetensors", files / "less.npz", files / "out.npz"
    before = sorted(files.iterdir())
    for arguments, messages in (
        (["ties", one, files / "run"], ["as base=\nbase= is --base MODEL here"]),
        (["average", one, files / "none.npz"], ["there is no"]),
        (["krum(1)", one], ["at least 5 models, got n = 1"]),
        (["ties", one, "--base", files / "run"], ["2 agents, but one model is wanted"]),
        (
            ["average", files / "run", less],
            [
                "models 0 and 2 must have the same structure; only in the first: ['layer/kernel']",
                "--on-mismatch base, fill or overlap says what becomes of such leaves",
                f"the models are 0 to 1: {files / 'run'}, 2: {less}",
            ],
        ),
    ):
        status, said = refused([*arguments, "--out", out], capsys)
        assert status == 1
        assert all(message in said for message in messages), said
    assert sorted(files.iterdir()) == before


def test_what_became_of_leaves_that_do_not_match_is_told(files, capsys):
    checkpoint.write_model(files / "less.npz", {"layer/bias": MODELS[2]["layer/bias"]})
    paths = [str(files / name) for name in ("one.safetensors", "less.npz", "out.npz")]
    cli._merge(["average", *paths[:2], "--out", paths[2], "--on-mismatch", "base"])
    found, expected = read(paths[2]), merge.average()(MODELS[1:])
    np.testing.assert_array_equal(found["layer/kernel"], MODELS[1]["layer/kernel"])
    np.testing.assert_array_equal(found["layer/bias"], expected["layer/bias"])
    shown = capsys.readouterr().out
    assert "layer/kernel  copied: models [1] lack it or differ in shape" in shown
    assert f"(the models are 0: {paths[0]}, 1: {paths[1]})" in shown


def test_every_method_is_offered_that_needs_no_more_than_files_hold(capsys):
    unlike = {name for name, r in ROWS.items() if r.per_model or r.inputs is not Row("").inputs}
    assert cli._NOT_FROM_FILES.keys() == unlike
    with pytest.raises(SystemExit) as stopped:
        cli._merge(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Methods: {', '.join(sorted(ROWS.keys() - unlike))}. Or stages" in shown
