"""Runs `mixlab train` and dies at a chosen point: `python -m tests.interrupted POINT N ARGUMENTS`.

POINT is `record` (within the N-th record of metrics), `recorded` (right after it), `save` (the
N-th checkpoint has been handed to its background thread), `saved` (it is on disk) or `step`
(after N steps): the process kills itself there with SIGKILL. `term` sends SIGTERM after N steps;
`full` makes every file of more than 100 kB fail from the N-th checkpoint on, as a full disk does.
"""

import os
import resource
import signal
import sys

from mixlab import checkpoint, cli, progress, train


def main() -> None:
    point, count, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    calls = dict.fromkeys(("record", "save", "step"), 0)

    def reached(kind: str) -> bool:
        calls[kind] += 1
        return calls[kind] == count

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write, save, prepare = progress.MetricWriter.write, checkpoint.Checkpoints.save, train.prepare

    def writing(self, record):
        now = reached("record")
        if now and point == "record":
            self._file.write(b'{"step": 1, "phase": "loc')
            self._file.flush()
            die()
        write(self, record)
        if now and point == "recorded":
            die()

    def saving(self, *args):
        now = reached("save")
        if now and point == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(self, *args)
        if now and point == "saved":
            self.wait()
        if now and point in ("save", "saved"):
            die()

    def preparing(config):
        experiment = prepare(config)

        def step(*args):
            result = experiment.step(*args)
            if reached("step"):
                if point == "step":
                    die()
                if point == "term":
                    os.kill(os.getpid(), signal.SIGTERM)
            return result

        return experiment._replace(step=step)

    progress.MetricWriter.write, checkpoint.Checkpoints.save = writing, saving
    train.MetricWriter.write, train.Checkpoints.save, train.prepare = writing, saving, preparing
    sys.argv = ["mixlab", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
