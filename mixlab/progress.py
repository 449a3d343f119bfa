"""What a run tells while it runs: one live line on a terminal, JSON lines, TensorBoard events."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Self, TextIO

from mixlab import distributed


class LiveLine:
    """A line that is rewritten in place on a terminal, and printed now and then elsewhere.

    Args:
        out: where it is written, by default standard output.
    """

    def __init__(self, out: TextIO | None = None):
        self._out = out or sys.stdout  # looked up now: it may have been redirected since import
        self.live = self._out.isatty()
        self._every = 0.5 if self.live else 15.0
        self._shown = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.perf_counter() - self._shown >= self._every

    def write(self, text: str) -> None:
        """Replaces the line."""
        self._shown = time.perf_counter()
        if self.live:  # a line that wraps could not be rewritten in place
            text = f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}"
        self._out.write(text if self.live else f"{text}\n")
        self._out.flush()

    def done(self, text: str) -> None:
        """Replaces the line by one that stays."""
        self.write(text)
        if self.live:
            self._out.write("\n")
            self._out.flush()


class ProgressLine:
    """The line of a run.

    Args:
        prefix: begins the line.
        total: steps of the run.
        images_per_step: examples that all agents see in a step.
        out: where it is written, by default standard output.
    """

    def __init__(self, prefix: str, total: int, images_per_step: int, out: TextIO | None = None):
        self._prefix, self._total, self._images = prefix, total, images_per_step
        self._line = LiveLine(out)
        self._first: tuple[float, int] | None = None
        if self._line.live:
            self._line.write(f"{prefix}  compiling ...")

    def due(self, step: int) -> bool:
        """Whether it is time for the next `show`; ask after each step, before computing it."""
        # The rate counts from the first step that is done, when the programs have been compiled.
        self._first = self._first or (time.perf_counter(), step)
        return self._line.due()

    def show(self, step: int, accuracy: float) -> None:
        """Writes the line: step, images/s, training accuracy, time to go."""
        now = time.perf_counter()
        start, first = self._first or (now, step)
        rate = (step - first) / (now - start) if step > first else 0.0
        eta = duration((self._total - step) / rate) if rate else "--:--"
        self._line.write(
            f"{self._prefix}  step {step}/{self._total}  {rate * self._images:,.0f} images/s  "
            f"accuracy {accuracy:.3f}  ETA {eta}"
        )

    def done(self, text: str) -> None:
        """Replaces the line by a last one."""
        self._line.done(f"{self._prefix}  {text}")


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:34` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class MetricWriter:
    """Appends records to `metrics.jsonl`, and to TensorBoard event files where it is installed.

    With several processes, process 0 alone writes.

    Args:
        folder: of the run.
        keep_bytes: the file is cut to this length first; what a killed run wrote after its last
            checkpoint is thereby written once, not twice.
        step: of the run, from which it goes on; TensorBoard forgets what it saw of later ones.

    Raises:
        ValueError: the file is shorter than `keep_bytes`; records are missing.
    """

    def __init__(self, folder: Path, keep_bytes: int = 0, step: int = 0):
        self._file: Any = None
        self._events: Any = None
        if not distributed.is_first():
            return
        path = folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise ValueError(
                f"{path} has {size} bytes, but the checkpoint was saved when it had {keep_bytes}; "
                "put the file back, or start over in another folder"
            )
        self._file = open(path, "ab")  # noqa: SIM115, closed by __exit__
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)
        self._events = _event_writer(folder / "tensorboard", step)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it is on disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            for name, value in record.items():
                values = value if isinstance(value, list) else [value]
                if not all(isinstance(v, int | float) for v in values) or name == "step":
                    continue
                tag = f"{record['phase']}/{name}"
                self._events.add_scalar(tag, sum(values) / len(values), record["step"])

    @property
    def num_bytes(self) -> int:
        """The length of the file, 0 where nothing is written."""
        return self._file.tell() if self._file is not None else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
