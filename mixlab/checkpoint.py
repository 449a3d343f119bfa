"""Checkpoints of a run: asynchronous, atomic, checked, and kept to a number.

The arrays are written by orbax as host arrays with the agents' leading axis, so they can be
restored on any number of devices and processes. Beside them lies what the run needs to go on
(`meta`) and a checksum a leaf, which is how a damaged file is told from a good one.
"""

import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixlab import distributed, trees
from mixlab.types import PyTree


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def _checksums(tree: PyTree) -> dict[str, int]:
    return {
        name: zlib.crc32(np.ascontiguousarray(leaf).tobytes())
        for name, leaf in trees.named_leaves(tree)
        if leaf is not None
    }


def _alone() -> ocp.options.MultiprocessingOptions:
    """For what process 0 does by itself: otherwise orbax waits for the others."""
    return ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
    )


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own question whether SIGTERM has come.

    JAX answers one asker a process: all must ask at the same steps (`distributed.Termination`),
    and orbax asks in process 0 alone.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one folder.

    With several processes, all call each method alike; process 0 alone reads and writes. What goes
    wrong there is raised there, and as `distributed.FailedElsewhere` in the others.

    Args:
        folder: made if it is missing.
        keep: how many of the newest are kept, at least 2, so that one good one is left when the
            newest turns out to be damaged; None keeps all.
    """

    def __init__(self, folder: str | Path, keep: int | None = 2):
        if keep is not None and keep < 2:
            raise ValueError(f"keep={keep}: at least 2 checkpoints must be kept, see Checkpoints")
        self.folder = Path(folder).absolute()  # orbax refuses relative paths
        self._manager: Any = distributed.once(lambda: self._open(keep))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps for which a finished checkpoint exists, ascending; only process 0 sees them."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Begins to save; the write goes on in the background.

        Args:
            step: names the checkpoint; one of the same name is left as it is.
            state: a tree of NumPy arrays, not to be changed afterwards.
            meta: what JSON can hold.

        Raises:
            CheckpointError: this save or the one before failed, e.g. because the disk is full.
        """
        distributed.once(lambda: self._save(step, state, meta))

    def wait(self) -> None:
        """Waits until the save in progress is on disk.

        Raises:
            CheckpointError: it failed.
        """
        distributed.once(lambda: self._guard(self._manager.wait_until_finished))

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        A damaged one is reported as a warning and deleted, and the one before it is tried.

        Args:
            like: a tree of arrays or `jax.ShapeDtypeStruct`s of the structure to restore.

        Returns:
            `(step, state, meta)` with NumPy leaves, or None where there is no checkpoint.

        Raises:
            ValueError: a checkpoint is whole but of another structure.
            CheckpointError: there are checkpoints and all of them are damaged.
        """
        found = distributed.once(lambda: self._restore(like))
        told = distributed.share(found and (found[0], found[2]))
        if told is None:
            return None
        step, meta = told
        return step, distributed.share_arrays(found[1] if found else like), meta

    def _open(self, keep: int | None) -> _Manager:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, step_prefix="step", create=False, multiprocessing_options=_alone()
        )
        return _Manager(self.folder, options=options)

    def _save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({"meta": meta, "checksums": _checksums(state)}),
        )
        self._guard(lambda: self._manager.save(step, args=args))

    def _restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                state, meta = self._load(step, like)
            except _Mismatch as error:
                raise ValueError(f"the checkpoint of step {step} does not fit: {error}") from error
            except Exception as error:  # Whatever a damaged file makes orbax raise.
                warnings.warn(
                    f"the checkpoint of step {step} in {self.folder} is damaged "
                    f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
                    "trying the one before it",
                    stacklevel=4,
                )
                self._discard(step)
                continue
            return step, state, meta
        if steps:
            raise CheckpointError(
                f"all checkpoints in {self.folder} are damaged (steps {steps}); delete the folder "
                "to start this run afresh"
            )
        return None

    def _load(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        saved = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        checksums = saved["meta"]["checksums"]
        expected = {name for name, leaf in trees.named_leaves(like) if leaf is not None}
        if expected != set(checksums):
            raise _Mismatch(
                f"it lacks {sorted(expected - set(checksums))} and has "
                f"{sorted(set(checksums) - expected)} besides"
            )
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._manager.restore(step, args=args)["state"]
        state = jax.tree.map(np.asarray, state)
        for (name, leaf), wanted in zip(
            trees.named_leaves(state), (leaf for _, leaf in trees.named_leaves(like)), strict=True
        ):
            if leaf is not None and leaf.shape != wanted.shape:
                raise _Mismatch(f"{name} is {leaf.shape} there and {wanted.shape} here")
        wrong = [name for name, value in _checksums(state).items() if value != checksums[name]]
        if wrong:
            raise ValueError(f"the bytes of {', '.join(wrong)} are not those that were saved")
        return state, saved["meta"]["meta"]

    def _discard(self, step: int) -> None:
        shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)
        self._manager.reload()

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            whole = self.steps()
            rest = f"the checkpoint of step {whole[-1]} is whole" if whole else "there is none yet"
            raise CheckpointError(
                f"could not save a checkpoint in {self.folder}: {error}. Free some space or mend "
                f"the folder and run the same command again; {rest}"
            ) from error


def resize(tree: PyTree, num_agents: int) -> PyTree:
    """Another number of agents: the first ones are taken, and cloned in turn where they run out.

    Args:
        tree: leaves [A, ...]; None leaves survive.
        num_agents: A', at least 1.

    Returns:
        NumPy leaves [A', ...]; agent i is what agent i mod A was.

    Raises:
        ValueError: `num_agents` is less than 1, or the leaves have no common leading axis.
    """
    if num_agents < 1:
        raise ValueError(f"agents must be at least 1, got {num_agents}")
    rows = np.arange(num_agents) % trees.leading_size(tree)
    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)


def read_agents(path: str | Path, like: PyTree, num_agents: int) -> tuple[PyTree, str]:
    """The agents of another run, made as many as this one has.

    Args:
        path: the folder of a run, its `checkpoints`, or one of them.
        like: what to take of an agent's state, by field: a dictionary such as
            `{"variables": ..., "opt_state": ...}` of the structure that is wanted.
        num_agents: how many agents are wanted, see `resize`.

    Returns:
        `(agents, told)`: NumPy leaves [num_agents, ...] in the structure of `like`, and a sentence
        that says which agents were taken, cloned or dropped.

    Raises:
        ValueError: nothing there can be read, or it has other leaves or shapes.
    """
    found = distributed.once(lambda: _read_agents(path, like))
    before = distributed.share(found and trees.leading_size(found))
    wanted = jax.tree.map(lambda x: np.empty((num_agents, *x.shape[1:]), x.dtype), like)
    if found is not None:
        wanted = resize(found, num_agents)
    told = f"{before} agents of {path}"
    if num_agents > before:
        told += f"; {_range(before, num_agents, 'is a clone', 'are clones')} of them in turn"
    elif num_agents < before:
        told += f"; {_range(num_agents, before, 'is dropped', 'are dropped')}"
    return distributed.share_arrays(wanted), f"starts from the {told}"


def _range(start: int, stop: int, one: str, several: str) -> str:
    if stop - start == 1:
        return f"agent {start} {one}"
    return f"agents {start} to {stop - 1} {several}"


def _read_agents(path: str | Path, like: PyTree) -> PyTree:
    tree, is_run = _read(path)
    if not is_run:
        raise ValueError(f"{path} is a model, not a run; give the folder of a run")
    there = dict(trees.named_leaves({name: tree["state"].get(name) for name in like}))
    wanted = [(name, leaf) for name, leaf in trees.named_leaves(like) if leaf is not None]
    names = {name for name, _ in wanted}
    held = {name for name, leaf in there.items() if leaf is not None}
    if names != held:
        raise ValueError(
            f"the agents of {path} do not fit (is it the same model and optimizer? cdmsgd and cga "
            f"have momentum of their own): they lack {sorted(names - held)} and have "
            f"{sorted(held - names)} besides"
        )
    for name, leaf in wanted:
        if there[name].shape[1:] != leaf.shape[1:]:
            raise ValueError(
                f"the agents of {path} do not fit: {name} is {there[name].shape[1:]} there and "
                f"{leaf.shape[1:]} here"
            )
    return trees.map_named(lambda name, leaf: None if leaf is None else there[name], like)


def read_models(path: str | Path, *, mmap: bool = False) -> list[PyTree]:
    """The model of a file, or the agents of a run.

    Args:
        path: one of

            - an `.npz` file of arrays by name,
            - a `.safetensors` file,
            - a folder in Hugging Face style: with `model.safetensors`, or with
              `model.safetensors.index.json` and the shards that it names,
            - a folder that orbax's `StandardCheckpointer` wrote,
            - the folder of an orbax `CheckpointManager` that saved one unnamed item
              (`FOLDER/STEP/default`), of which the newest step is read, or one of its steps,
            - the folder of a run, its `checkpoints`, of which the newest is read, or one of them.
        mmap: whether safetensors are mapped, not read: an array then takes memory only while it is
            used. No one may write into these files meanwhile; replacing them does no harm.

    Returns:
        One model, with NumPy leaves in the dtypes of the file; of a run, the variables of each of
        its agents.

    Raises:
        ValueError: nothing there can be read; the message says what can.
    """
    tree, is_run = _read(path, mmap)
    return trees.unstack(tree["state"]["variables"]) if is_run else [tree]


SUFFIXES = (".safetensors", ".npz")
"""Those of the files that `write_model` writes."""


def write_model(path: str | Path, model: PyTree) -> None:
    """Writes a model to a file that `read_models` reads.

    The file is written under another name and renamed, so that `path` holds all of it or what it
    held before.

    Args:
        path: an `.npz` or `.safetensors` file; one that exists is replaced, and folders that are
            missing are made.
        model: arrays keep shape and dtype, and are named by their path, `"Dense_0/kernel"`. None
            leaves are left out.

    Raises:
        ValueError: another suffix; two leaves of one name; a dtype that the file cannot hold, and
            the message says which leaf has it.
        OSError: the file could not be written.
    """
    path = check_suffix(path)
    named = {name: leaf for name, leaf in trees.by_name(model).items() if leaf is not None}
    # safetensors would take the bytes of a transposed array for those of one in order.
    arrays: dict[str, Any] = {name: np.asarray(leaf, order="C") for name, leaf in named.items()}
    is_npz = path.suffix == ".npz"
    held = _NPZ_DTYPES if is_npz else set(_DTYPES.values())
    for name, array in arrays.items():
        if array.dtype.name not in held:
            other = "; .safetensors can" if array.dtype.name in _DTYPES.values() else ""
            raise ValueError(
                f"leaf {name!r} is {array.dtype}, which {path.suffix} cannot hold{other}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if is_npz:
            with open(unfinished, "wb") as file:
                np.savez(file, **arrays)
        else:
            save_file(arrays, unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:  # that of a full disk too
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_suffix(path: str | Path) -> Path:
    """The path of a file that `write_model` can write; a `ValueError` says which those are."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"a model is written to a {' or '.join(SUFFIXES)} file, not to {path}")
    return Path(path)


# By their names in the header of a safetensors file.
_DTYPES = {
    "BOOL": "bool",
    **{f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}
# NumPy writes a bfloat16 as two bytes of no kind, and `_read` knows them by that.
_NPZ_DTYPES = {x for x in _DTYPES.values() if not x.startswith("float8")} | {"complex128"}

_KNOWN = (
    "an .npz or .safetensors file, a folder with model.safetensors or its index, a checkpoint of "
    "orbax, or the folder of a run"
)


def _read(path: str | Path, mmap: bool = False) -> tuple[PyTree, bool]:
    """What a file or folder holds, and whether that is the state of a run."""
    path = Path(path).absolute()
    if not path.exists():
        raise ValueError(f"there is no {path}; give {_KNOWN}")
    if path.suffix == ".npz" and path.is_file():
        try:
            zipfile.ZipFile(path).close()  # or NumPy would offer to unpickle what is no archive
            with np.load(path, allow_pickle=False) as arrays:
                named = dict(arrays)
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} cannot be read as .npz ({error})") from error
        return {k: x.view(jnp.bfloat16) if x.dtype == "V2" else x for k, x in named.items()}, False
    if path.suffix == ".safetensors" and path.is_file():
        return _read_safetensors(path, mmap), False
    if not path.is_dir():
        raise ValueError(f"{path} is no model; give {_KNOWN}")
    if (path / "model.safetensors").is_file():
        return _read_safetensors(path / "model.safetensors", mmap), False
    if (path / "model.safetensors.index.json").is_file():
        return _read_shards(path / "model.safetensors.index.json", mmap), False
    if (path / "runs").is_dir():
        runs = ", ".join(sorted(p.name for p in (path / "runs").iterdir()))
        raise ValueError(f"{path} holds several runs; give one of {path / 'runs'}: {runs}")
    return _read_orbax(path)


def _read_safetensors(path: Path, mmap: bool) -> dict[str, np.ndarray]:
    # The package's own readers know no float8, and that for JAX makes 64 bits 32.
    try:
        with safe_open(path, framework="numpy"):  # checks the header and the file's length
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from error
    data = np.asarray(np.memmap(path, np.uint8, "r")) if mmap else np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    found = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} in {path} is {entry['dtype']}, which cannot be read")
        first, end = entry["data_offsets"]
        array = data[start + first : start + end].view(jnp.dtype(_DTYPES[entry["dtype"]]))
        found[name] = array.reshape(entry["shape"])
    return found


def _read_shards(index: Path, mmap: bool) -> dict[str, np.ndarray]:
    """The arrays of all the files that an index names, which lie beside it."""
    try:
        shard_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} has no 'weight_map' from arrays to files") from error
    shards = sorted(set(shard_of.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names shards that are not there: {', '.join(missing)}")
    found: dict[str, np.ndarray] = {}
    for name in shards:
        found.update(_read_safetensors(index.parent / name, mmap))
    absent = sorted(set(shard_of) - set(found))
    if absent:
        raise ValueError(f"the shards of {index} lack {', '.join(absent)}")
    return found


def _read_orbax(path: Path) -> tuple[PyTree, bool]:
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    steps = [p for p in path.iterdir() if _step(p) >= 0]
    if steps:
        path = max(steps, key=_step)
    item = next((p for p in (path / "state", path / "default") if p.is_dir()), path)
    is_run = item == path / "state"
    try:
        tree = ocp.StandardCheckpointer(multiprocessing_options=_alone()).restore(item)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{path} is no model; give {_KNOWN} ({error})") from error
    if is_run and "variables" not in (tree.get("state") or {}):
        raise ValueError(f"{path} is neither of a run nor one unnamed item; give {item}")
    return jax.tree.map(np.asarray, tree), is_run


def _step(path: Path) -> int:
    """Which step an orbax `CheckpointManager` saved in this folder, -1 if it is not one of them."""
    found = re.fullmatch(r"(?:.*_)?(\d+)", path.name)
    holds_item = (path / "state").is_dir() or (path / "default").is_dir()
    return int(found[1]) if found and holds_item else -1


class _Mismatch(Exception):
    """The checkpoint is whole, but of another structure."""
