"""Several processes that run one program together: how they meet, agree and share.

Every process runs the same program on the same data and holds a part of the agents (see
`mixlab.agents.parallel`). Process 0 alone reads and writes the run's folder and speaks; the
others need no disk in common with it.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixlab.types import PyTree

Result = TypeVar("Result")

SHUTDOWN_SECONDS = 60
"""How long a process that has come to its end waits for the others to end."""


PATIENCE_SECONDS = 15.0
"""After how long a process says that it still waits for the others to start."""


class FailedElsewhere(Exception):
    """Process 0 failed, and has said why."""


def initialize() -> None:
    """Joins the processes that the environment speaks of; without it there is one, as ever.

    Call it before JAX starts its backends. `MIXLAB_PROCESSES` is their number, `MIXLAB_PROCESS`
    which of them this is, from 0, and `MIXLAB_COORDINATOR` the `host:port` at which process 0 is
    found. With `MIXLAB_PROCESSES=auto` JAX asks the cluster: a TPU pod, SLURM, Open MPI.

    Raises:
        ValueError: a variable is missing, or is no such number; there is no cluster.
        OSError: another program uses the port.
    """
    processes = os.environ.get("MIXLAB_PROCESSES", "1")
    if processes == "1":
        return
    if processes == "auto":
        try:
            with _patience("this process waits"):
                jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)
        except ValueError as error:
            raise ValueError(
                f"MIXLAB_PROCESSES=auto, but JAX finds no cluster that it knows ({error}); give "
                "their number, MIXLAB_PROCESS and MIXLAB_COORDINATOR"
            ) from error
    else:
        process, address = (
            os.environ.get(f"MIXLAB_{name}", "") for name in ("PROCESS", "COORDINATOR")
        )
        _, colon, port = address.rpartition(":")
        if not (processes.isdecimal() and process.isdecimal() and colon and port.isdecimal()):
            raise ValueError(
                f"MIXLAB_PROCESSES={processes!r}, MIXLAB_PROCESS={process!r}, "
                f"MIXLAB_COORDINATOR={address!r}: expected a number of processes (or auto), which "
                "of them this is, and host:port of process 0; bash launch/processes.sh sets them"
            )
        if not int(process) < int(processes):
            raise ValueError(f"MIXLAB_PROCESS={process}: of {processes} the last is one less")
        if int(process) == 0:
            _check_free(int(port))
        with _patience(f"process {process} of {processes} waits at {address}"):
            jax.distributed.initialize(
                address, int(processes), int(process), shutdown_timeout_seconds=SHUTDOWN_SECONDS
            )
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives


@contextmanager
def _patience(who: str) -> Iterator[None]:
    """Says for whom JAX waits, if it does: after five silent minutes it would abort the process."""
    told = f"mixlab: {who} for the others; have all been started, with the same host:port?"
    timer = threading.Timer(PATIENCE_SECONDS, print, (told,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_free(port: int) -> None:
    """Refuses a port that is in use, with which JAX would crash and not say why."""
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        raise OSError(
            f"process 0 cannot listen on port {port} of MIXLAB_COORDINATOR ({error}); give another"
        ) from error


def leave(status: int) -> NoReturn:
    """Ends this process after a failure, without waiting for others, which may wait for it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_first() -> bool:
    """Whether this is process 0, the one that reads, writes and speaks."""
    return jax.process_index() == 0


def once(action: Callable[[], Result]) -> Result | None:
    """Lets process 0 alone act, while the others wait.

    Returns:
        What `action` gives; None in the other processes.

    Raises:
        Exception: what `action` raises, in process 0.
        FailedElsewhere: in the others, if it raised.
    """
    if jax.process_count() == 1:
        return action()
    result = error = None
    if is_first():
        try:
            result = action()
        except Exception as caught:
            error = caught
    if share(error is not None):
        raise error or FailedElsewhere()
    return result


def share(value: Any) -> Any:
    """What JSON can hold, as process 0 has it; the others' `value` does not matter."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    sent = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    return json.loads(sent.astype(np.uint8).tobytes())


def where(flag: bool) -> list[int]:
    """The processes in which `flag` is true; all of them ask."""
    if jax.process_count() == 1:
        return [0] if flag else []
    return np.flatnonzero(multihost_utils.process_allgather(np.array(flag))).tolist()


def share_arrays(tree: PyTree) -> PyTree:
    """NumPy leaves as process 0 has them, bit for bit; the others' give shapes and dtypes."""
    if jax.process_count() == 1:
        return tree

    def one(leaf: Any) -> np.ndarray:
        # As bytes, because a broadcast is a sum of one process's numbers and zeros, which would
        # lose the sign of -0. One leaf after the other, so that devices hold no more than one.
        content = np.zeros(math.prod(leaf.shape) * leaf.dtype.itemsize, np.uint8)
        if is_first():
            content = np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8)
        sent = multihost_utils.broadcast_one_to_all(content).astype(np.uint8)
        return np.frombuffer(sent.tobytes(), leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(one, tree)


class Termination:
    """SIGTERM once any process was asked to end by it, else 0; told to all at the same step.

    JAX's coordination service carries the word, so asking costs no exchange between devices. Its
    handler of the signal stands from `initialize` on; nobody else may set one.
    """

    def __init__(self) -> None:
        self._asked, self._agreed = 0, False

    def __call__(self) -> int:
        """Ask equally often in every process."""
        self._asked += 1
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._asked)
        return signal.SIGTERM if self._agreed else 0
