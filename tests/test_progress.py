import io
import json
import os
import struct
import sys
import types

import pytest

from mixlab import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets; it starts at 100 s."""
    clock = types.SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    return clock


# ---------------------------------------------------------------- the line


def test_a_terminal_has_one_line_rewritten(clock):
    out = Terminal()
    line = progress.ProgressLine("[1/2] wa", 100, 40, out)
    assert out.getvalue() == "\r\x1b[K[1/2] wa  compiling ..."
    out.truncate(0), out.seek(0)

    # 10 s of compiling in the first step, which do not count; then two steps a second.
    clock.now = 110.0
    assert line.due(1)
    clock.now = 115.0
    assert line.due(11)
    line.show(11, 0.51249)
    expected = "[1/2] wa  step 11/100  80 images/s  accuracy 0.512  ETA 0:44"
    assert out.getvalue() == f"\r\x1b[K{expected}"
    assert "\n" not in out.getvalue()

    # Half a second between two writes.
    clock.now = 115.4
    assert not line.due(12)
    clock.now = 115.5
    assert line.due(12)

    out.truncate(0), out.seek(0)
    line.done("done")
    assert out.getvalue() == "\r\x1b[K[1/2] wa  done\n"


def test_a_plain_stream_gets_whole_lines_now_and_then(clock):
    out = io.StringIO()
    line = progress.ProgressLine("run", 10_000, 1000, out)
    clock.now = 105.0
    assert not line.due(1)
    clock.now = 114.9
    assert not line.due(20)
    clock.now = 115.0
    assert line.due(21)
    line.show(21, 0.25)
    clock.now = 129.9
    assert not line.due(200)
    clock.now = 130.0
    assert line.due(301)
    line.show(301, 1.0)
    line.done("done")
    assert out.getvalue().splitlines() == [
        # 20 steps in 10 s, 9,979 to go; then 300 in 25 s, 9,699 to go.
        "run  step 21/10000  2,000 images/s  accuracy 0.250  ETA 1:23:10",
        "run  step 301/10000  12,000 images/s  accuracy 1.000  ETA 13:28",
        "run  done",
    ]


def test_without_a_rate_there_is_no_time_to_go(clock):
    """After the first step, nothing has been measured yet; and a resumed run starts late."""
    out = io.StringIO()
    line = progress.ProgressLine("run", 100, 10, out)
    clock.now = 200.0
    assert line.due(51)
    line.show(51, 0.5)
    clock.now = 220.0
    assert line.due(61)
    line.show(61, 0.5)
    assert out.getvalue().splitlines() == [
        "run  step 51/100  0 images/s  accuracy 0.500  ETA --:--",
        # 10 steps in 20 s, not 61 in 120.
        "run  step 61/100  5 images/s  accuracy 0.500  ETA 1:18",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (3661, "1:01:01"),
        (90061, "25:01:01"),
    ],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_standard_output_is_the_one_of_the_moment(capsys):
    progress.ProgressLine("run", 10, 1).done("done")
    assert capsys.readouterr().out == "run  done\n"


# ---------------------------------------------------------------- records

RECORDS = [
    {"step": 10, "phase": "merge", "round": 1, "test_accuracy": [0.5, 0.75], "seconds": {"a": 1.0}},
    {"step": 20, "phase": "local", "round": 1, "test_accuracy": [0.25, 0.75], "note": "text"},
]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_are_on_disk_at_once_and_a_resumed_run_writes_none_twice(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(progress.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with progress.MetricWriter(tmp_path) as writer:
        assert writer.num_bytes == 0
        writer.write(RECORDS[0])
        saved = writer.num_bytes
        assert synced == [saved]
        assert saved == os.path.getsize(tmp_path / "metrics.jsonl")
        writer.write(RECORDS[1])
        assert lines(tmp_path) == RECORDS
    # Killed in the middle of a third record.
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3')
    with progress.MetricWriter(tmp_path, keep_bytes=saved) as writer:
        assert lines(tmp_path) == RECORDS[:1]
        assert writer.num_bytes == saved
        writer.write({**RECORDS[1], "note": "again"})
    assert lines(tmp_path) == [RECORDS[0], {**RECORDS[1], "note": "again"}]
    # A run that starts anew keeps nothing.
    with progress.MetricWriter(tmp_path):
        assert lines(tmp_path) == []


def test_missing_records_are_an_error(tmp_path):
    """Rather than a file with a hole of zeros."""
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 0 bytes.*had 7; put the file back"):
        progress.MetricWriter(tmp_path, keep_bytes=7)
    assert not (tmp_path / "metrics.jsonl").exists()


def events(folder):
    """The scalars of all event files: (tag, step, value), in the order written."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.out.*")):
        content = path.read_bytes()
        while content:
            # A record: length, its checksum, content, its checksum.
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard_gets_the_numbers_and_the_means_over_agents(tmp_path):
    pytest.importorskip("tensorboardX")
    with progress.MetricWriter(tmp_path) as writer:
        for record in RECORDS:
            writer.write(record)
    assert events(tmp_path / "tensorboard") == [
        ("merge/round", 10, 1.0),
        ("merge/test_accuracy", 10, 0.625),
        ("local/round", 20, 1.0),
        ("local/test_accuracy", 20, 0.5),
    ]


def test_without_tensorboard_there_are_only_json_lines(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # makes the import fail
    with progress.MetricWriter(tmp_path) as writer:
        for record in RECORDS:
            writer.write(record)
    assert lines(tmp_path) == RECORDS
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
