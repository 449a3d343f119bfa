"""The command `mixlab`; `USAGE` lists what it does."""

import argparse
import ast
import contextlib
import fnmatch
import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mixlab import agents, distributed, spec, trees
from mixlab.types import PyTree

USAGE = """\
usage: mixlab COMMAND ...

  mixlab train --config FILE --workdir DIR [--config.FIELD=VALUE ...]
      Runs the experiment of a config file, or goes on with it where it was left.
      For example: mixlab train --config configs/quickstart.py --workdir runs/quickstart
                   --config.agents=16 --config.augment='cutmix(alpha=1.0)'
  mixlab sweep --config FILE --workdir DIR [--jobs N] [--config.FIELD=VALUE ...]
      The same with a process for each run of the config's sweep, N at once (1); a run that fails
      does not end the others, and is told of at the end.
      For example: mixlab sweep --config configs/dimat/mnist5k.py --workdir runs/mnist5k --jobs 2
  mixlab experts --config FILE --workdir DIR [--config.FIELD=VALUE ...]
      Fine-tunes a network for several tasks, merges it by every method and tests the merges.
      For example: mixlab experts --config configs/experts.py --workdir runs/experts
                   --config.methods="('average', 'ties(density=0.1)')"
  mixlab barrier --config FILE --workdir DIR [--config.FIELD=VALUE ...]
      Trains networks apart, matches their units by every method and measures the barrier between.
      For example: mixlab barrier --config configs/align.py --workdir runs/align
                   --config.model='mlp(hidden=(2048, 2048))'
  mixlab report DIR
      Writes the report of a workdir again: report.md, results.csv, figures.
  mixlab diff MODEL [MODEL ...] [--base MODEL] [--merged MODEL] [--figure FILE] [--json FILE]
      Tells leaf by leaf how far models moved from their base and where they agree. A MODEL is an
      .npz or .safetensors file, a folder in Hugging Face style (sharded or not), a checkpoint of
      orbax or the folder of its CheckpointManager (of which the newest), or a run's folder, with
      one model an agent.
      For example: mixlab diff runs/quickstart/runs/iid-wa --figure agreement.png
  mixlab merge METHOD MODEL [MODEL ...] --out FILE [--base MODEL] [--on-mismatch HOW] [--report]
      Merges such models into one, by a method as it is written in Python, and writes it to an .npz
      or .safetensors file.
      For example: mixlab merge "ties(density=0.2)" one.safetensors two.safetensors
                   --base base.safetensors --out merged.safetensors
      The methods and the other options: mixlab merge --help
  mixlab gallery [AUGMENTATION ...] [--data NAME] [--out FILE]
      Draws all augmentations on one sheet, or those that are given in detail.
      For example: mixlab gallery "cutmix(alpha=1.0)" "randaugment | mixup" --data folder:photos
      The other options: mixlab gallery --help
  mixlab bench agents|align|augment|merge [--quick] [--filter PATTERN] [--out FILE] [--json FILE]
      Measures mixlab beside other libraries: those of the extra [bench] that are installed.
"""

_SWEEP = re.compile(r"--?config\.sweep\.(?P<field>\w+)=(?P<values>.*)", re.DOTALL)
_FIELD = re.compile(r"--?config\.(?P<field>\w+)(=|$)")
_OVERRIDE = re.compile(r"--?config\.(?P<path>[\w.]+)(=.*)?", re.DOTALL)

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; made if missing.")


def main() -> None:
    """Entry point; the exit status is 0, 1 after an error of the run, 2 after one of usage.

    Of what a signal stops it is 128 and its number: 143 for SIGTERM, 130 for Ctrl-C; of several
    processes that stop together, saved, it is 0.
    """
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "train": _train,
        "sweep": _sweep,
        "experts": _experts,
        "barrier": _barrier,
        "report": _report,
        "diff": _diff,
        "merge": _merge,
        "gallery": _gallery,
        "bench": _bench,
    }
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] not in commands:
        _fail(f"unknown command {arguments[0]!r}; {spec.nearest(arguments[0], commands)}", 2)
    commands[arguments[0]](arguments[1:])


def _train(arguments: Sequence[str]) -> None:
    config, workdir = _parse("train", arguments)
    from mixlab import report, train

    with _job(workdir):
        agents.force_cpu_devices(config.agents)  # before JAX starts
        distributed.initialize()
        path = train.train(config, workdir)
    if distributed.is_first():
        report.show(path)


def _sweep(arguments: Sequence[str]) -> None:
    jobs = flags.DEFINE_integer("jobs", 1, "Runs at once.", lower_bound=1)
    config, workdir = _parse("sweep", arguments)

    from mixlab import report, sweep

    with _job(workdir):
        file, _, _ = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
        path, failures = sweep.sweep(config, workdir, jobs.value, source=file)
    report.show(path)
    if failures:
        _fail(f"{report.count(len(failures), 'run')} failed: {', '.join(failures)}", 1)


def _experts(arguments: Sequence[str]) -> None:
    config, workdir = _parse("experts", arguments)

    from mixlab import experts

    with _job(workdir):
        path = experts.run(config, workdir)
    print(f"\n{path.read_text()}\nreport       {path}")


def _barrier(arguments: Sequence[str]) -> None:
    config, workdir = _parse("barrier", arguments)

    from mixlab import barrier

    with _job(workdir):
        path = barrier.run(config, workdir)
    print(f"\n{path.read_text()}\nreport       {path}")


@contextlib.contextmanager
def _job(workdir: str) -> Iterator[None]:
    """Runs what trains; says in a line why it ended, if it did not come to its end."""
    from mixlab import train
    from mixlab.checkpoint import CheckpointError

    # The runs of a sweep, and a run that is resumed, compile much the same programs.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, ".jax_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    # What fails is told below, once; orbax logs whole tracebacks of its threads besides.
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    except train.Stopped as stopped:
        print(f"\n{stopped}; run the same command again to go on", flush=True)
        # Launchers of several processes end the others when one has failed: none has.
        sys.exit(0 if jax.distributed.is_initialized() else 128 + stopped.number)
    except distributed.FailedElsewhere:
        distributed.leave(1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on from what is saved", 130)
    except (train.Diverged, CheckpointError) as error:
        _fail(str(error), 1)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        _fail(f"{type(error).__name__}: {error}", 1)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        # At its end JAX would wait a minute for the others, which may wait for this process.
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason, *_ = str(error).splitlines()
            _fail(
                f"{reason}\nA process has ended, or is out of reach: see what others said "
                "last. Run the same command again to go on from what is saved",
                1,
            )
        traceback.print_exc()
        distributed.leave(1)


def _usage(command: str) -> str:
    """What `USAGE` says of a command."""
    _, name, rest = USAGE.partition(f"  mixlab {command} ")
    said, *_ = rest.split("\n  mixlab ")
    return f"usage:\n{name}{said.rstrip()}\n"


def _fields(default_config: Callable[[], ConfigDict]) -> str:
    """The fields of a config, their defaults, and what its source says beside them."""
    beside = re.compile(r"^    config\.(\w+) = .*  # (.+)$", re.MULTILINE)
    said = dict(beside.findall(inspect.getsource(default_config)))
    lines = [
        f"  {name} = {value!r}" + (f"  # {said[name]}" if name in said else "")
        for name, value in default_config().to_dict().items()
    ]
    return "\n".join(["Fields of the config, with their defaults:", *lines, ""])


def _parse(command: str, arguments: Sequence[str]) -> tuple[ConfigDict, str]:
    """The config and the workdir that the command line asks for."""
    if {"-h", "--help"} & set(arguments):
        from mixlab import barrier, experts, train

        configs = {"experts": experts.default_config, "barrier": barrier.default_config}
        print(f"{_usage(command)}\n{_fields(configs.get(command, train.default_config))}", end="")
        sys.exit(0)
    sweeps = [_SWEEP.fullmatch(argument) for argument in arguments]
    swept = {m["field"]: m["values"] for m in sweeps if m}
    arguments = [a for a, m in zip(arguments, sweeps, strict=True) if not m]
    # config_flags looks for overrides there, whatever it is given, and knows no new fields.
    sys.argv = [argument for argument in sys.argv if not _SWEEP.fullmatch(argument)]
    given = {m["field"] for m in map(_FIELD.match, arguments) if m}
    try:
        rest = flags.FLAGS([f"mixlab {command}", *arguments])[1:]
        if rest:
            _fail(f"unexpected arguments {rest}; the options: mixlab {command} --help", 2)
        config, workdir = _CONFIG.value, _WORKDIR.value
        if config is not None:
            with config.unlocked():
                _set_sweep(config, swept, given)
            config.lock()  # a file that could not be read says so at the first use
    except (AttributeError, KeyError):
        told = _wrong_field(command, arguments)
        if not told:
            raise  # of the config file itself
        _fail(told, 2)
    except (flags.Error, TypeError, ValueError) as error:
        _fail(_brief(_wrong_field(command, arguments) or str(error)), 2)
    except OSError as error:
        _fail(f"cannot read the config: {str(error).splitlines()[-1].strip()}", 2)
    if config is None or workdir is None:
        _fail(f"--config and --workdir must be given\n\n{_usage(command)}", 2)
    return config, os.path.abspath(workdir)


def _wrong_field(command: str, arguments: Sequence[str]) -> str:
    """Which override names no field of the config, and what the fields are; empty if none does."""
    paths = [m["path"] for m in map(_OVERRIDE.fullmatch, arguments) if m]
    sys.argv = [argument for argument in sys.argv if not _OVERRIDE.match(argument)]
    try:
        flags.FLAGS([f"mixlab {command}", *(a for a in arguments if not _OVERRIDE.match(a))])
        config = _CONFIG.value
    except Exception:
        return ""  # the file itself is at fault
    for path in paths:
        node, names = config, path.split(".")
        for depth, name in enumerate(names):
            above = ".".join(names[:depth])
            if not isinstance(node, ConfigDict):
                return f"{above} has no fields of its own; give the whole of it: --config.{above}="
            if name not in node:
                field = f"{above}.{name}" if above else name
                return f"the config has no field {field!r}; {spec.nearest(name, node)}"
            node = node[name]
    return ""


def _brief(message: str) -> str:
    """What went wrong in a config file, and where, of a message that holds a traceback."""
    before, found, _ = message.partition(": Error whilst parsing config file:")
    if not found:
        return message
    lines = message.strip().splitlines()
    *_, where = (line.strip() for line in lines if line.startswith('  File "'))
    return f"{before}: {lines[-1]} ({where})"


def _set_sweep(config: ConfigDict, swept: dict[str, str], given: set[str]) -> None:
    """Takes over `--config.sweep.FIELD=(...)`, and `--config.FIELD=` of fields that are swept."""
    known = [field for field in config if not field.startswith("sweep")]
    for field, text in swept.items():
        if field not in known or "sweep" not in config:
            raise ValueError(f"sweep.{field}: no such field; {spec.nearest(field, known)}")
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values = None
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"sweep.{field} takes values such as \"('a', 'b')\", got {text}")
        config.sweep[field] = tuple(values)
    for field in given - {*swept}:
        if field in config.get("sweep", {}):
            config.sweep[field] = (config[field],)


def _report(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(_usage("report"), end="")
        sys.exit(0)
    if len(arguments) != 1:
        _fail(f"usage: mixlab report DIR, got {list(arguments)}", 2)
    from mixlab import report

    try:
        report.show(report.write(arguments[0]))
    except (ValueError, OSError) as error:
        _fail(str(error), 1)


def _diff(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mixlab diff", description="Compares models, leaf by leaf.")
    add = parser.add_argument
    add("models", nargs="+", help=_MODELS)
    add("--base", help="the model that they were fine-tuned from")
    add("--merged", help="what became of them")
    add("--leaves", default="*", help="only leaves of this name, e.g. 'params/*' (*)")
    add("--on-mismatch", default="error", help="error, base, fill or overlap (error)")
    add("--figure", help="draws the agreement by leaf, or layer, to a .png, .pdf or .svg file")
    add("--json", help="writes all figures to this file")
    given = parser.parse_args(arguments)

    from mixlab import figures, merge

    def read_one(path: str | None) -> PyTree | None:
        return None if path is None else _only(_read_one(path), given.leaves)

    try:
        models = [_only(model, given.leaves) for path in given.models for model in _read(path)]
        matched = merge.reconcile(models, read_one(given.base), given.on_mismatch)
        report = merge.report(
            matched.models,
            base=matched.base,
            merged=read_one(given.merged),
            notes=matched.notes,
        )
        print(merge.table(report))
        if given.json:
            with open(given.json, "w") as file:
                json.dump(report, file, indent=1)
            print(f"\nwrote {given.json}")
        if given.figure:
            figures.agreement(report).savefig(given.figure)
            print(f"\nwrote {given.figure}")
    except (ValueError, TypeError, ImportError, OSError) as error:
        _fail(str(error), 1)


def _only(model: PyTree, pattern: str) -> dict[str, Any]:
    """The leaves whose names match, by name."""
    kept = {name: x for name, x in trees.named_leaves(model) if fnmatch.fnmatch(name, pattern)}
    if not kept:
        names = [name for name, _ in trees.named_leaves(model)]
        raise ValueError(f"no leaf matches {pattern!r}; there are {', '.join(names[:8])} ...")
    return kept


_MODELS = (
    ".npz or .safetensors files, folders in Hugging Face style, checkpoints of orbax or folders of "
    "its CheckpointManager, or runs (one model an agent)"
)


def _read(path: str) -> list[dict[str, Any]]:
    """The models that a file or folder holds, as leaves by name; files are mapped, not read."""
    from mixlab import checkpoint

    return [trees.by_name(model) for model in checkpoint.read_models(path, mmap=True)]


def _read_one(path: str) -> dict[str, Any]:
    """The one model of a file or folder."""
    model, *others = _read(path)
    if others:
        raise ValueError(f"{path} holds {len(others) + 1} agents, but one model is wanted")
    return model


_NOT_FROM_FILES = {
    "emr": "makes a model for each task, not one. In Python merge.compress(merge.emr(), models, "
    "base=base) makes what merge.save_compressed keeps in a file",
    "fisher": "needs the models' diagonal Fishers, which come from data. In Python give those that "
    "merge.diagonal_fisher makes: merge.fisher()(models, fishers=[...])",
    "regmean": "needs the Gram matrices of the models' inputs, which come from data. In Python "
    "give those that merge.grams makes: merge.regmean()(models, grams=[...])",
    "tall_masks": "makes a model for each task, not one. In Python merge.compress("
    "merge.tall_masks(), models, base=base) makes what merge.save_compressed keeps in a file",
    "twin": "needs the weights of a router. In Python give them: "
    "merge.twin()(models, base=base, router_weights=[...])",
}
"""Why `mixlab merge` does not have some methods, and what to do."""


def _merge(arguments: Sequence[str]) -> None:
    from mixlab import checkpoint, merge

    methods = sorted(merge.METHODS.keys() - _NOT_FROM_FILES.keys())
    parser = argparse.ArgumentParser(
        "mixlab merge",
        description="Merges models into one, which is written to a file.",
        epilog=f"Methods: {', '.join(methods)}. Or stages of a method on task vectors, joined by "
        f"'|', one of them reduce: {', '.join(merge.STAGES)}. Before a method, joined by '|': "
        f"{', '.join(merge.PREAGGREGATIONS)}. Their arguments: help(mixlab.merge.ties) in Python.",
    )
    add = parser.add_argument
    add("method", metavar="METHOD", help="as it is written in Python, e.g. 'ties(density=0.2)'")
    add("models", metavar="MODEL", nargs="+", help=_MODELS)
    add("--out", metavar="FILE", required=True, help=".safetensors or .npz; its folder is made")
    add("--force", action="store_true", help="replaces the file if it exists")
    add("--base", metavar="MODEL", help="what they were fine-tuned from; many methods need it")
    add("--seed", type=int, default=0, help="of methods that draw (0)")
    add(
        "--on-mismatch",
        default="error",
        choices=("error", "base", "fill", "overlap"),
        help="what becomes of a leaf that a model lacks or has in another shape: an error (the "
        "default); the base's is copied; it counts as the base's there; it is merged in the part "
        "that all have. Without --base, the first model stands for it",
    )
    add("--report", action="store_true", help="tells leaf by leaf what was merged")
    given = parser.parse_intermixed_args(arguments)
    try:
        _check_from_files(given.method, methods)
        method = merge.parse(given.method)
        if checkpoint.check_suffix(given.out).exists() and not given.force:
            raise ValueError(f"{given.out} exists; give another --out, or --force to replace it")
    except (ValueError, TypeError) as error:
        _fail(str(error), 2)

    start = time.perf_counter()
    sources: list[str] = []
    models: list[dict[str, Any]] = []
    try:
        for path in given.models:
            first = len(models)
            models += _read(path)
            last = len(models) - 1
            sources.append(f"{first}: {path}" if first == last else f"{first} to {last}: {path}")
        base = None if given.base is None else _read_one(given.base)
        every = [*models, *([] if base is None else [base])]
        # JAX makes 64 bits 32 unless it is told not to.
        is_double = any(x.dtype in (float, complex) for x in jax.tree.leaves(every))
        with jax.enable_x64(True) if is_double else contextlib.nullcontext():
            matched = merge.reconcile(models, base, given.on_mismatch)
            key = jax.random.key(given.seed)
            found = method(matched.models, base=matched.base, key=key)
            merged = matched.restore(found, None)
            if given.report:
                report = merge.report(
                    matched.models, base=matched.base, merged=found, notes=matched.notes
                )
                print(merge.table(report))
            checkpoint.write_model(given.out, merged)
    except (ValueError, TypeError, OSError) as error:
        _fail("\n".join([str(error), *_hints(str(error), sources)]), 1)
    if not given.report:
        for name, note in matched.notes.items():
            print(f"{name}  {note}")
    for hint in _hints("".join(matched.notes.values()), sources):
        print(f"({hint})")
    leaves = jax.tree.leaves(merged)
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    print(
        f"merged {count} by {given.method} in {time.perf_counter() - start:.1f} s: "
        f"{len(leaves)} leaves, {sum(x.size for x in leaves):,} parameters\n"
        f"wrote {given.out}"
    )


def _hints(said: str, sources: Sequence[str]) -> list[str]:
    """What a message of the library, which speaks to Python, means at the command line."""
    hints = []
    if "base=" in said:
        hints.append("base= is --base MODEL here")
    if "must have the same structure" in said or "must agree in shape" in said:
        hints.append("--on-mismatch base, fill or overlap says what becomes of such leaves")
    if re.search(r"\bmodels? \[?\d", said):
        hints.append(f"the models are {', '.join(sources)}")
    return hints


def _check_from_files(text: str, methods: list[str]) -> None:
    """Raises a `ValueError` that says what to do if a method needs more than files hold."""
    with contextlib.suppress(SyntaxError):  # of which `merge.parse` speaks
        for node in ast.walk(ast.parse(text.strip(), mode="eval")):
            if isinstance(node, ast.Name) and node.id in _NOT_FROM_FILES:
                raise ValueError(
                    f"{node.id} {_NOT_FROM_FILES[node.id]}; checkpoint.read_models reads the "
                    f"models.\nThis command merges by {', '.join(methods)}"
                )


def _gallery(arguments: Sequence[str]) -> None:
    from mixlab import augment, gallery

    parser = argparse.ArgumentParser("mixlab gallery", description="Draws augmentations.")
    add = parser.add_argument
    add("augmentations", nargs="*", help="drawn in detail; without any, all methods on one sheet")
    add("--data", default="photos", help="a data set, or folder:PATH (eight photos)")
    add("--split", default="train", help="of the data (train)")
    add("--count", type=_positive(int), help="rows in detail (4), columns of the sheet (8)")
    add("--image-size", type=_positive(int), help="resizes the images (folders: 256)")
    add("--size", type=_positive(float), default=1.5, help="inches a picture (1.5)")
    add("--seed", type=int, default=gallery.SEED, help=f"of all draws ({gallery.SEED})")
    add("--out", default="gallery.png", help="a .png, .pdf or .svg file (gallery.png)")
    given = parser.parse_args(arguments)
    try:
        gallery.check_suffix(given.out)
        augs = {text: augment.parse(text) for text in given.augmentations}
    except (ValueError, TypeError) as error:
        _fail(str(error), 2)
    # Every program runs once: compiling it well takes longer than running it as it is.
    jax.config.update("jax_disable_most_optimizations", True)
    count = given.count or (4 if augs else 8)
    try:
        batch = gallery.examples(
            given.data,
            given.split,
            # More than are drawn, so that there are partners to choose from.
            count=max(8, count) if augs else count,
            seed=given.seed,
            image_size=given.image_size,
        )
        if augs:
            figure = gallery.draw(augs, batch, rows=count, seed=given.seed, size=given.size)
        else:
            figure = gallery.sheet(batch, seed=given.seed, size=given.size)
        print(f"wrote {gallery.save(figure, given.out)}")
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        _fail(str(error), 1)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Reads a positive number of a kind."""

    def positive(text: str) -> float:
        if not 0 < (number := kind(text)) < float("inf"):
            raise ValueError(text)
        return number

    positive.__name__ = f"positive {kind.__name__}"  # argparse shows it
    return positive


def _bench(arguments: Sequence[str]) -> None:
    from mixlab import bench

    try:
        bench.main(arguments)
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> NoReturn:
    if sys.exc_info()[0] is not None and os.environ.get("MIXLAB_TRACEBACK"):
        traceback.print_exc()
    print(f"\nmixlab: {message}", file=sys.stderr)
    distributed.leave(status)
