"""The protocol on a clock that the calls themselves move, the tables, and what can go wrong."""

import dataclasses
import json
import os
import sys

import jax
import numpy as np
import pytest

from mixlab import align, bench, cli, models
from mixlab.bench import align as bench_align
from mixlab.bench import augment
from mixlab.bench import merge as bench_merge


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        seconds = iter(seconds)

        def call():
            self.calls.append(name)
            self.now += next(seconds)

        return call


def test_the_sides_take_turns_and_short_calls_are_repeated():
    clock = Clock()
    # Two calls to warm up: the second, of 0.5 s, is repeated four times in a measurement of 2 s.
    short = [9.0, 0.5, *4 * [0.25], *4 * [0.5], *4 * [1.0]]
    calls = {"short": clock.work("short", short), "long": clock.work("long", [8.0, 3.0, 3, 4, 9])}
    timings = bench.interleaved(calls, bench.Options(rounds=3, seconds=2.0), clock)
    assert timings["short"] == bench.Timing((0.25, 0.5, 1.0))
    assert timings["long"].median == 4.0
    assert timings["long"].spread == pytest.approx((6.5 - 3.5) / 2 / 4.0)
    assert clock.calls[4:] == 3 * [*4 * ["short"], "long"]


def test_a_report_in_markdown():
    rows = [{"op": "a | b", "ms": "12.5"}, {"op": "c", "ms": "3"}]
    report = bench.Report({"Times": rows, "Empty": []}, {"timm": "not installed"})
    assert report.text() == (
        "Times\n\n| op     |   ms |\n| ------ | ---: |\n| a \\| b | 12.5 |\n| c      |    3 |\n\n"
        "Not measured:\n\n- timm: not installed\n"
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "not installed; pip install"),
        ("import nowhere_to_be_found", "fails: ModuleNotFoundError: No module named 'nowhere"),
        ("raise RuntimeError('operator nms does not exist\\nat line 3')", "nms does not exist$"),
    ],
)
def test_a_peer_that_cannot_be_imported_says_why_in_one_line(source, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / "a_peer.py").write_text(source)
    with pytest.raises(bench.PeerError, match=words):
        bench.import_peer("a_peer")


def peer(name, package, call):
    return augment.Peer(name, package, "batch", lambda image, label: call)


def test_peers_that_are_missing_or_fail_are_left_out(monkeypatch):
    def fails():
        raise ValueError("bits must be between 1 and 8\nbecause")

    peers = [
        peer("numpy", "numpy", lambda: None),
        peer("broken", "numpy", fails),
        peer("missing", "no_such_package", lambda: None),
    ]
    monkeypatch.setattr(augment, "_cases", lambda: [("mixup()", "float32", peers)])
    monkeypatch.setattr(augment, "SIZES", ((2, 4),))
    options = bench.Options(
        rounds=1, seconds=0.0, select="mixup.* 2x4x4x3 float32 (numpy|broken|missing)"
    )
    report = augment.run(options)
    (row,) = report.tables["Against peers, milliseconds a batch"]
    assert (row["op"], row["peer"], row["batch"]) == ("mixup()", "numpy", "2x4x4x3 float32")
    assert report.tables["First call"] == []
    assert report.left_out == {
        "broken, 2x4x4x3 float32": "ValueError: bits must be between 1 and 8",
        "no_such_package": "not installed; pip install 'mixlab[bench]' has the peers",
    }


def test_the_fmix_restated_mixes_pixel_by_pixel():
    image = np.stack([np.zeros((8, 8, 3), np.float32), np.ones((8, 8, 3), np.float32)])
    for per_example in (True, False):
        mixed = augment._fmix(per_example)(image, np.arange(2))()
        assert mixed.shape == (2, 3, 8, 8)
        assert set(np.unique(mixed)) <= {0.0, 1.0}


def test_the_process_starts_anew_on_one_core(monkeypatch):
    started, cores = [], []
    monkeypatch.delenv("MIXLAB_BENCH_SETTLED", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, given: cores.append(given))
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    bench.settle(["augment", "--quick"])
    ((program, command, environment),) = started
    assert cores == [{5}]
    assert program == sys.executable
    assert command[1:] == ["-m", "mixlab", "bench", "augment", "--quick"]
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) > 2**32
    monkeypatch.setenv("MIXLAB_BENCH_SETTLED", environment["MIXLAB_BENCH_SETTLED"])
    bench.settle([])
    assert len(started) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["augmen"], "unknown benchmark 'augmen'; did you mean 'augment'"),
        (["augment", "--filter", "("], "'(' is no regular expression"),
        (["augment", "--filter", "no such case"], "selects no case"),
        (["augment", "--fast"], "unrecognized arguments: --fast"),
        ([], "the following arguments are required: name"),
    ],
)
def test_errors_of_usage(arguments, words, monkeypatch, capsys):
    monkeypatch.setenv("MIXLAB_BENCH_SETTLED", "1")
    monkeypatch.setattr(sys, "argv", ["mixlab", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_the_command_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MIXLAB_BENCH_SETTLED", "1")
    report = bench.Report({"Times": [{"op": "mixup", "ms": "1"}]}, {})
    monkeypatch.setattr(augment, "run", lambda options: report)
    paths = tmp_path / "table.md", tmp_path / "figures.json"
    bench.main(["augment", "--quick", "--out", str(paths[0]), "--json", str(paths[1])])
    assert paths[0].read_text() == capsys.readouterr().out
    figures = json.loads(paths[1].read_text())
    assert figures["tables"] == {"Times": [{"op": "mixup", "ms": "1"}]}
    assert "jax" in figures["machine"]


def test_numpy_merges_what_we_merge(monkeypatch):
    monkeypatch.setattr(bench_merge, "NUM_ENTRIES", 4000)
    compared = 0
    for case in bench_merge._cases():
        inputs = bench_merge._inputs(case)
        peers = [peer for peer in case.peers if peer.package == "numpy"]
        merged = bench_merge._ours(case.method, *inputs)() if peers else {}
        for peer in peers:
            theirs = bench_merge._theirs(peer, *inputs)()
            for name, leaf in merged.items():
                np.testing.assert_allclose(theirs[name], leaf, rtol=2e-5, atol=2e-7)
            compared += 1
    assert compared == 5


def test_a_merge_is_timed_and_a_missing_peer_left_out(monkeypatch):
    case = bench_merge._cases()[0]
    missing = bench_merge.Peer("missing", "no_such_package", bench_merge._average)
    monkeypatch.setattr(bench_merge, "NUM_ENTRIES", 4000)
    monkeypatch.setattr(
        bench_merge, "_cases", lambda: [dataclasses.replace(case, peers=[case.peers[0], missing])]
    )
    options = bench.Options(rounds=1, seconds=0.0, select="^average")
    report = bench_merge.run(options)
    (row,) = report.tables["Milliseconds a merge"]
    assert (row["method"], row["peer"]) == ("average()", "NumPy, sums in place")
    assert report.left_out == {
        "no_such_package": "not installed; pip install 'mixlab[bench]' has the peers"
    }


def small_networks():
    return {"MLP": (models.MLP(3, (6, 5)), np.zeros((1, 4, 4, 1), np.float32))}


def test_weight_matching_is_timed_and_the_code_restated_finds_the_same(monkeypatch):
    monkeypatch.setattr(bench_align, "_networks", small_networks)
    report = bench_align.run(bench.Options(rounds=1, seconds=0.0, select="^weights"))
    (row,) = report.tables["Weight matching, milliseconds"]
    assert row["network"] == "MLP"
    assert row["ours, objective"] == row["peer, objective"]
    assert float(row["ours, objective"]) > 1
    assert int(row["assignments"]) % 2 == 0  # whole sweeps over two groups
    assert not any(rows for title, rows in report.tables.items() if "Weight" not in title)


def test_every_model_is_merged_in_its_own_order():
    module = models.MLP(3, (6, 5))
    image = np.random.default_rng(0).normal(size=(40, 4, 4, 1)).astype(np.float32)
    variables = [jax.jit(module.init)(jax.random.key(i), image[:1]) for i in range(3)]
    symmetry = align.infer_symmetry(module.apply, variables[0], image[:1], check=False)
    merge = bench_align._Merge(symmetry, variables, image, lambda variables, batch: {})
    found, merged = merge(2, False)
    assert sorted(found) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    for i in (0, 2):
        expected = align.activation_matching(
            symmetry, module.apply, variables[1], variables[i], image
        )
        jax.tree.map(np.testing.assert_array_equal, found[1, i], expected)
    kernels = [
        symmetry.permute(found[1, i], x)["params"]["Dense_0"]["kernel"]
        if i != 1
        else x["params"]["Dense_0"]["kernel"]
        for i, x in enumerate(variables)
    ]
    np.testing.assert_allclose(
        merged[1]["params"]["Dense_0"]["kernel"], np.mean(kernels, axis=0), rtol=1e-5, atol=1e-7
    )


def test_assignments_are_timed_with_every_backend(monkeypatch):
    monkeypatch.setattr(bench_align, "WIDTHS", (4,))
    options = bench.Options(rounds=1, seconds=0.0, select="assignment planted")
    (row,) = bench_align.run(options).tables["Assignment, milliseconds"]
    assert list(row) == ["scores", "n", "scipy", "optax", "jax"]
