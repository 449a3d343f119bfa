"""How fast `mixlab.merge` is, and in how much memory, beside NumPy, PyTorch, and merging codes.

The models are lists of dicts of arrays. FusionBench, mergekit and the code of TIES's authors are
hard to install beside each other: what they do in a call is restated here, and labelled so.
"""

import ctypes
import dataclasses
import functools
import gc
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import merge
from mixlab.bench import Options, PeerError, Report, import_peer, interleaved, milliseconds, timer

PACKAGES = ("jax", "numpy", "torch")
NUM_MODELS = 8
NUM_LEAVES = 8
NUM_ENTRIES = 25_000_000
"""Entries of a model, in leaves of one size."""
_SCALE, _DENSITY = 0.3, 0.2

Tree = dict[str, Any]
Call = Callable[[], Any]
Build = Callable[[Any, list[Tree], Tree, list[Tree]], Call]
"""`build(library, models, base, fishers) -> call`, of arrays of the library."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: what the table calls it.
        package: what must be installed: `"numpy"` or `"torch"`.
        build: makes the call that is timed; the call returns the merged model.
    """

    name: str
    package: str
    build: Build


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and those it is measured against.

    Attributes:
        method: as `merge.parse` reads it.
        peers: measured in turns with ours.
        num_models: how many it merges.
        passes: how many arrays of the size of a model have to be read and written at least.
        rounds: the most rounds that the patience is for.
    """

    method: str
    peers: Sequence[Peer]
    num_models: int
    passes: int
    rounds: int = 21


def run(options: Options) -> Report:
    """Measures time and memory; on an accelerator ours alone, as a share of the bandwidth."""
    left_out: dict[str, str] = {}
    on_cpu = jax.default_backend() == "cpu"
    tables = {
        "Milliseconds a merge": list(_times(options, on_cpu, left_out)),
        "Peak memory of a merge with its result, beyond its inputs": list(_memory(options))
        if on_cpu
        else [],
    }
    return Report(tables, left_out)


def _times(options: Options, on_cpu: bool, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    bandwidth = functools.cache(lambda: _copy_bandwidth(options, on_cpu))
    for case in _cases():
        chosen = [peer for peer in case.peers if options.selects(case.method, peer.name)]
        if not chosen:
            continue
        inputs = _inputs(case)
        calls = {case.method: _ours(case.method, *inputs)}
        for peer in chosen if on_cpu else ():
            try:
                calls[peer.name] = _theirs(peer, *inputs)
            except PeerError as error:
                left_out[peer.package] = str(error)
        timings = interleaved(calls, options.at_most(case.rounds), timer())
        own = timings.pop(case.method)
        moved = case.passes * NUM_ENTRIES * 4 / own.median
        ours = {
            "method": case.method,
            "models": case.num_models,
            "ours, ms": milliseconds(own.median),
            "±, %": f"{100 * own.spread:.0f}",
            "of the copy's bandwidth, %": f"{100 * moved / bandwidth():.0f}",
        }
        if not on_cpu:
            yield ours
        for name, timing in timings.items():
            yield ours | {
                "peer": name,
                "peer, ms": milliseconds(timing.median),
                "± %": f"{100 * timing.spread:.0f}",
                "peer / ours": f"{timing.median / own.median:.2f}",
            }


def _copy_bandwidth(options: Options, on_cpu: bool) -> float:
    """Bytes a second, read and written."""
    if on_cpu:
        source, target = np.ones(NUM_ENTRIES, np.float32), np.zeros(NUM_ENTRIES, np.float32)
        call: Call = lambda: np.copyto(target, source)  # noqa: E731
    else:
        x, negative = jnp.ones(NUM_ENTRIES, jnp.float32), jax.jit(jnp.negative)
        call = lambda: jax.block_until_ready(negative(x))  # noqa: E731
    return 2 * 4 * NUM_ENTRIES / interleaved({"": call}, options, timer())[""].median


def _inputs(case: Case) -> tuple[list[Tree], Tree, list[Tree]]:
    """Models near to a base, the base, and positive Fishers where they are needed, in NumPy."""
    rng = np.random.default_rng(0)

    def tree(scale: float) -> Tree:
        size = NUM_ENTRIES // NUM_LEAVES
        draw = rng.standard_normal
        return {f"{i}": scale * draw(size, np.float32) for i in range(NUM_LEAVES)}

    base = tree(0.05)
    models = [{k: base[k] + x for k, x in tree(0.01).items()} for _ in range(case.num_models)]
    num_fishers = case.num_models if case.method.startswith("fisher") else 0
    return models, base, [{k: x * x for k, x in tree(1.0).items()} for _ in range(num_fishers)]


def _ours(
    text: str, models: list[Tree], base: Tree, fishers: list[Tree], in_place: bool = True
) -> Call:
    method = merge.parse(text)
    inputs = {"fishers": fishers} if fishers else {}
    models, base, inputs = jax.tree.map(jnp.asarray, (models, base, inputs))
    keys = itertools.cycle(list(jax.random.split(jax.random.key(0), 16)))

    # The last result may be given back, so that the next one is written into its memory.
    @functools.partial(jax.jit, donate_argnums=0 if in_place else (), keep_unused=True)
    def merged(out: Tree, models: list[Tree], base: Tree, key: Any, inputs: Any) -> Any:
        return method(models, base=base, key=key, **inputs)

    last = jax.tree.map(jnp.zeros_like, base if in_place else {})

    def call() -> Tree:
        nonlocal last
        result = jax.block_until_ready(merged(last, models, base, next(keys), inputs))
        if in_place:
            last = result
        return result

    return call


def _theirs(peer: Peer, models: list[Tree], base: Tree, fishers: list[Tree]) -> Call:
    library: Any = import_peer(peer.package)
    if peer.package == "torch":
        library.set_num_threads(1)
        models, base, fishers = jax.tree.map(library.from_numpy, (models, base, fishers))
    return peer.build(library, models, base, fishers)


def _cases() -> list[Case]:
    dare = f"dare({_DENSITY})"
    ties = f"ties({_DENSITY})"
    return [
        Case(
            "average()",
            [
                Peer("NumPy, sums in place", "numpy", _average),
                Peer("PyTorch, sums in place", "torch", _average),
                Peer("FusionBench, restated", "torch", _average_of_dicts),
                Peer("mergekit linear, restated", "torch", _linear_mergekit),
            ],
            NUM_MODELS,
            NUM_MODELS + 1,
        ),
        Case(
            f"task_arithmetic({_SCALE})",
            [
                Peer("NumPy", "numpy", _task_arithmetic),
                Peer("PyTorch", "torch", _task_arithmetic),
                Peer("mergekit, restated", "torch", _task_arithmetic_mergekit),
            ],
            NUM_MODELS,
            NUM_MODELS + 2,
        ),
        Case(ties, [Peer("NumPy partition", "numpy", _ties_numpy)], NUM_MODELS, NUM_MODELS + 2, 5),
        Case(
            ties,
            [Peer("authors' code, restated", "torch", _ties_authors)],
            NUM_MODELS,
            NUM_MODELS + 2,
            3,
        ),
        Case(
            dare,
            [
                Peer("PyTorch", "torch", _dare),
                Peer("mergekit, restated", "torch", _dare_mergekit),
            ],
            NUM_MODELS,
            NUM_MODELS + 2,
            5,
        ),
        Case(
            "slerp(0.4)",
            [
                Peer("PyTorch", "torch", _slerp),
                Peer("mergekit, restated", "numpy", _slerp),
            ],
            2,
            3,
        ),
        Case(
            "fisher()",
            [Peer("PyTorch", "torch", _fisher), Peer("NumPy", "numpy", _fisher)],
            NUM_MODELS,
            2 * NUM_MODELS + 1,
        ),
    ]


def _leaf_by_leaf(merge_leaf: Callable[..., Any]) -> Build:
    """A call that merges one leaf after the other: `merge_leaf(library, models, base, fishers)`."""

    def build(library: Any, models: list[Tree], base: Tree, fishers: list[Tree]) -> Call:
        def call() -> Tree:
            return {
                name: merge_leaf(
                    library, [m[name] for m in models], base[name], [f[name] for f in fishers]
                )
                for name in base
            }

        return call

    return build


@_leaf_by_leaf
def _average(library: Any, models: Any, base: Any, fishers: Any) -> Any:
    total = models[0] + models[1]
    for x in models[2:]:
        total += x
    total /= len(models)
    return total


def _average_of_dicts(library: Any, models: Any, base: Any, fishers: Any) -> Call:
    """A running sum of whole state dicts, then a division, as FusionBench's simple average."""

    def call() -> Tree:
        total = {name: x.clone() for name, x in models[0].items()}
        for model in models[1:]:
            total = {name: x + model[name] for name, x in total.items()}
        return {name: x / len(models) for name, x in total.items()}

    return call


def _weighted_mergekit(torch: Any, tensors: Any) -> tuple[Any, Any]:
    stacked = torch.stack(tensors, dim=0)
    weights = torch.ones(len(tensors)).reshape(-1, *[1] * (stacked.dim() - 1))
    return (weights * stacked).sum(dim=0), weights.sum()


@_leaf_by_leaf
def _linear_mergekit(torch: Any, models: Any, base: Any, fishers: Any) -> Any:
    total, weight = _weighted_mergekit(torch, models)
    return total / weight


@_leaf_by_leaf
def _task_arithmetic(library: Any, models: Any, base: Any, fishers: Any) -> Any:
    total = models[0] - base
    for x in models[1:]:
        total += x - base
    return base + _SCALE * total


@_leaf_by_leaf
def _task_arithmetic_mergekit(torch: Any, models: Any, base: Any, fishers: Any) -> Any:
    return base + _SCALE * _weighted_mergekit(torch, [x - base for x in models])[0]


def _ties_numpy(library: Any, models: Any, base: Any, fishers: Any) -> Call:
    """The thresholds by `numpy.partition` of a whole model, the rest leaf by leaf."""

    def call() -> Tree:
        limits = []
        for model in models:
            magnitudes = np.concatenate([np.abs(model[k] - base[k]).ravel() for k in base])
            k = magnitudes.size - int(magnitudes.size * _DENSITY)
            limits.append(np.partition(magnitudes, k - 1)[k - 1])
        merged = {}
        for name, at in base.items():
            taus = []
            for model, limit in zip(models, limits, strict=True):
                tau = model[name] - at
                tau[np.abs(tau) < limit] = 0
                taus.append(tau)
            positive = functools.reduce(np.add, taus) >= 0
            total, count = np.zeros_like(at), np.zeros_like(at)
            for tau in taus:
                agrees = np.where(positive, tau > 0, tau < 0)
                total += tau * agrees
                count += agrees
            merged[name] = at + total / np.maximum(count, 1)
        return merged

    return call


def _ties_authors(torch: Any, models: Any, base: Any, fishers: Any) -> Call:
    """All task vectors in one matrix, `kthvalue` along its rows, as the authors' code does it."""

    def call() -> Tree:
        start = torch.cat([x.reshape(-1) for x in base.values()])
        rows = [torch.cat([x.reshape(-1) for x in model.values()]) for model in models]
        taus = torch.vstack(rows) - start
        size = taus.shape[1]
        limits, _ = taus.abs().kthvalue(size - int(size * _DENSITY), dim=1, keepdim=True)
        taus = taus * (taus.abs() >= limits)
        sign = torch.sign(taus.sum(dim=0))
        sign[sign == 0] = torch.sign(sign.sum())
        agreed = torch.where(sign > 0, taus > 0, taus < 0) * taus
        count = (agreed != 0).sum(dim=0).float()
        flat = start + agreed.sum(dim=0) / torch.clamp(count, min=1)
        parts = torch.split(flat, [x.numel() for x in base.values()])
        return {name: x.reshape(base[name].shape) for name, x in zip(base, parts, strict=True)}

    return call


@_leaf_by_leaf
def _dare(torch: Any, models: Any, base: Any, fishers: Any) -> Any:
    total = torch.zeros_like(base)
    for x in models:
        total += (x - base) * torch.empty_like(base).bernoulli_(_DENSITY) / _DENSITY
    return base + total


@_leaf_by_leaf
def _dare_mergekit(torch: Any, models: Any, base: Any, fishers: Any) -> Any:
    """A mask drawn from a tensor of probabilities, and the sum of magnitudes restored."""

    def sparse(tau: Any) -> Any:
        kept = tau * torch.bernoulli(torch.full_like(tau, _DENSITY))
        return kept * (tau.abs().sum() / kept.abs().sum())

    return base + _weighted_mergekit(torch, [sparse(x - base) for x in models])[0]


@_leaf_by_leaf
def _slerp(library: Any, models: Any, base: Any, fishers: Any) -> Any:
    """Unit vectors, their angle, and the sum along the arc; mergekit does it in NumPy."""
    a, b = models
    unit_a, unit_b = a / library.linalg.norm(a), b / library.linalg.norm(b)
    cosine = float((unit_a * unit_b).sum())
    if abs(cosine) > 0.9995:
        return 0.6 * a + 0.4 * b
    omega = float(np.arccos(cosine))
    first, second = (float(np.sin(share * omega) / np.sin(omega)) for share in (0.6, 0.4))
    return first * a + second * b


@_leaf_by_leaf
def _fisher(library: Any, models: Any, base: Any, fishers: Any) -> Any:
    total, weight = library.zeros_like(base), library.zeros_like(base)
    for x, fisher in zip(models, fishers, strict=True):
        information = fisher.clip(1e-6)
        total += information * x
        weight += information
    return total / weight


def _memory(options: Options) -> Iterator[dict[str, Any]]:
    """What a process takes at most while it merges, beyond the models: of TIES, all sides."""
    # Freed memory must go back to the system, or it would not show what a call needs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    sides = [(case.method, "ours") for case in _cases()]
    sides += [(c.method, peer.name) for c in _cases() for peer in c.peers if "ties" in c.method]
    for method, side in dict.fromkeys(sides):
        if not options.selects("memory", method, side):
            continue
        code = f"from mixlab.bench import merge; merge.print_peak({method!r}, {side!r})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            continue  # a peer that is not installed; the times say so
        peak = float(done.stdout)
        yield {
            "method": method,
            "side": side,
            "MB": f"{peak / 1e6:.0f}",
            "in outputs": f"{peak / (4 * NUM_ENTRIES):.1f}",
        }


def print_peak(method: str, side: str) -> None:
    """Prints the bytes that a merge and its result take beyond its inputs, in a fresh process."""
    cases = [case for case in _cases() if case.method == method]
    inputs = _inputs(cases[0])
    if side == "ours":
        call = _ours(method, *inputs, in_place=False)
        call()  # compiles
    else:
        (peer,) = (peer for case in cases for peer in case.peers if peer.name == side)
        call = _theirs(peer, *inputs)
    del inputs
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call left would serve the second
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    call()
    print(_resident("VmHWM") - before)


def _resident(what: str) -> int:
    """Bytes, as Linux counts them."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{what}:\s*(\d+) kB", status)[0])
