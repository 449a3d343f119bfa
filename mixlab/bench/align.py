"""How fast `mixlab.align` is, beside the codes of Git Re-Basin and DIMAT, and SciPy's assignment.

Both codes are repositories, not packages: what they do in a call is restated here, in JAX and in
PyTorch, and labelled so. ResNet-20 is DIMAT's; its BatchNorm has the parameters of the LayerNorm in
Git Re-Basin's, so that weight matching does the same work.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mixlab import align, models, trees
from mixlab.align.assignment import BACKENDS
from mixlab.bench import Options, PeerError, Report, Timing, import_peer, interleaved, timer
from mixlab.types import Array, PyTree

PACKAGES = ("jax", "numpy", "scipy", "optax", "torch")
NUM_MODELS, NUM_IMAGES, BATCH, SIDE = 5, 512, 32, 32
"""Of activation matching: models, and square images, which ours takes in batches."""
ORDERS = 6
"""Random orders that weight matching is averaged over."""
DIMAT_BATCH = 100
"""Images in a batch of the code restated, its default."""
DIMAT_SECONDS = 63.0
"""Processor time that DIMAT's own code took for a round of this case, recorded elsewhere."""
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
"""Units of the assignments."""

Axes = Mapping[str, Sequence[str | None]]
"""For each parameter the group of every axis, as a specification written by hand has it."""


def run(options: Options) -> Report:
    """Measures; on an accelerator ours alone, and the assignments."""
    left_out: dict[str, str] = {}
    on_cpu = jax.default_backend() == "cpu"
    tables = {
        "Weight matching, milliseconds": list(_weights(options, on_cpu)),
        f"Activation matching of {NUM_MODELS} ResNet-20 on {NUM_IMAGES} images, seconds": list(
            _activations(options, on_cpu, left_out)
        ),
        "Its parts": list(_parts(options, on_cpu)),
        "Assignment, milliseconds": list(_assignments(options, on_cpu)),
    }
    return Report(tables, left_out)


# ---------------------------------------------------------------- weight matching


def _weights(options: Options, on_cpu: bool) -> Iterator[dict[str, Any]]:
    for name, (module, x) in _networks().items():
        if not options.selects("weights", name, "git-re-basin, restated"):
            continue
        yield {"network": name} | _weight_row(module, x, options, on_cpu)


def _weight_row(module: Any, x: Array, options: Options, on_cpu: bool) -> dict[str, Any]:
    a, b = (jax.jit(module.init)(jax.random.key(i), x) for i in range(2))
    symmetry = align.infer_symmetry(module.apply, a, x, check=False)
    axes = _axes(symmetry)
    params_a, params_b = _named_params(a), _named_params(b)
    # How often groups are visited depends on the order, which either side draws.
    orders = [_order(symmetry, seed) for seed in range(ORDERS)]

    def ours() -> list[align.Permutations]:
        return [
            jax.block_until_ready(align.weight_matching(symmetry, a, b, order=order))
            for order in orders
        ]

    def theirs() -> list[tuple[align.Permutations, int]]:
        return [_git_rebasin(axes, params_a, params_b, order) for order in orders]

    def objective(found: Sequence[align.Permutations]) -> str:
        return f"{np.mean([_objective(symmetry, a, b, one) for one in found]):.4f}"

    calls = {"ours": ours} | ({"theirs": theirs} if on_cpu else {})
    timings = interleaved(calls, options.at_most(5), timer())
    own = timings["ours"]
    row = {
        "ours, ms": f"{1e3 * own.median / ORDERS:.3g}",
        "±, %": f"{100 * own.spread:.0f}",
        "ours, objective": objective(ours()),
    }
    if on_cpu:
        peer = timings["theirs"]
        found, assignments = zip(*theirs(), strict=True)
        row |= {
            "peer": "git-re-basin, restated",
            "assignments": f"{np.mean(assignments):.0f}",
            "peer, ms": f"{1e3 * peer.median / ORDERS:.3g}",
            "± %": f"{100 * peer.spread:.0f}",
            "peer, objective": objective(found),
            "peer / ours": f"{peer.median / own.median:.1f}",
        }
    return row


def _networks() -> dict[str, tuple[Any, Array]]:
    return {
        "ResNet-20": (models.ResNet(10), jnp.zeros((1, SIDE, SIDE, 3))),
        "MLP 784-512-512-512-10": (models.MLP(10, (512,) * 3), jnp.zeros((1, 28, 28, 1))),
    }


def _order(symmetry: align.Symmetry, seed: int) -> list[list[str]]:
    """A random order of the groups for each of the hundred sweeps that there may be."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(list(symmetry.groups)).tolist() for _ in range(100)]


def _axes(symmetry: align.Symmetry) -> Axes:
    """The symmetry of a network whose axes each carry one group at most, parameters alone."""
    return {
        name: [getattr(term, "name", None) for term in layout]
        for name, layout in symmetry.layouts.items()
        if name.startswith("params/")
    }


def _named_params(variables: Mapping[str, PyTree]) -> dict[str, Array]:
    return dict(trees.named_leaves({"params": variables["params"]}))


def _objective(symmetry: align.Symmetry, a: PyTree, b: PyTree, found: Mapping[str, Any]) -> float:
    """The inner product of the parameters, in float64."""
    moved = _named_params(symmetry.permute(found, b))
    return sum(
        float(np.vdot(np.asarray(x, np.float64), np.asarray(moved[name], np.float64)))
        for name, x in _named_params(a).items()
    )


def _git_rebasin(
    axes: Axes, a: Mapping[str, Array], b: Mapping[str, Array], order: Sequence[Sequence[str]]
) -> tuple[dict[str, Array], int]:
    """Coordinate descent in single JAX operations and SciPy's assignment.

    Returns:
        The permutations, and how many assignments were solved.

    Source: `weight_matching` of the code of Ainsworth et al. 2023 ("Git Re-Basin"), algorithm 1.
    """
    where: dict[str, list[tuple[str, int]]] = {}
    for leaf, groups in axes.items():
        for axis, group in enumerate(groups):
            if group is not None:
                where.setdefault(group, []).append((leaf, axis))
    found = {group: jnp.arange(a[at[0][0]].shape[at[0][1]]) for group, at in where.items()}

    def permuted_elsewhere(leaf: str, held: int) -> Array:
        x = b[leaf]
        for axis, group in enumerate(axes[leaf]):
            if group is not None and axis != held:
                x = jnp.take(x, found[group], axis=axis)
        return x

    calls = 0
    for sweep in order:
        progress = False
        for group in sweep:
            size = found[group].size
            scores = jnp.zeros((size, size))
            for leaf, axis in where[group]:
                x = jnp.reshape(jnp.moveaxis(a[leaf], axis, 0), (size, -1))
                y = jnp.reshape(jnp.moveaxis(permuted_elsewhere(leaf, axis), axis, 0), (size, -1))
                scores += x @ y.T
            _, best = scipy.optimize.linear_sum_assignment(np.asarray(scores), maximize=True)
            calls += 1
            before = jnp.vdot(scores, jnp.eye(size)[found[group]])
            after = jnp.vdot(scores, jnp.eye(size)[best])
            progress = progress or bool(after > before + 1e-12)
            found[group] = jnp.asarray(best)
        if not progress:
            break
    return found, calls


# ---------------------------------------------------------------- activation matching


@dataclasses.dataclass(frozen=True)
class _Merge:
    """Five models, the images, and what a merge of them needs, compiled.

    Attributes:
        symmetry: of the models.
        variables: the models.
        image: [NUM_IMAGES, SIDE, SIDE, 3].
        statistics: `statistics(variables, batch)`, the network in training mode.
    """

    symmetry: align.Symmetry
    variables: list[dict[str, PyTree]]
    image: Array
    statistics: Callable[[PyTree, Array], PyTree]

    @functools.cached_property
    def batches(self) -> list[Array]:
        """The images in batches."""
        return [self.image[i : i + BATCH] for i in range(0, len(self.image), BATCH)]

    def reestimated(self, variables: dict[str, PyTree]) -> dict[str, PyTree]:
        """A model with the BatchNorm statistics of the images."""
        momentum = models.BATCH_NORM_MOMENTUM
        return align.reestimate_batch_stats(
            self.statistics, variables, self.batches, momentum=momentum
        )

    def pairs(self, num_bases: int) -> list[tuple[int, int]]:
        """The pairs of models to compare, the lower number first."""
        pairs = itertools.combinations(range(len(self.variables)), 2)
        return [(i, j) for i, j in pairs if i < num_bases]

    def moments(self, variables: list[PyTree], num_bases: int) -> dict[tuple[int, int], Any]:
        """Of every pair, in both directions."""
        fn = self.symmetry.fn
        assert fn is not None
        found = align.activation_statistics(
            self.symmetry, fn, variables, self.batches, pairs=self.pairs(num_bases)
        )
        swapped = jax.jit(lambda m: {k: _swapped(x) for k, x in m.items()})
        return found | {(j, i): swapped(x) for (i, j), x in found.items() if j < num_bases}

    def matched(self, statistics: Mapping[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
        """The permutations of every pair."""
        return {pair: align.match_moments(found) for pair, found in statistics.items()}

    def averaged(
        self, variables: list[PyTree], found: Mapping[tuple[int, int], Any], num_bases: int
    ) -> list[PyTree]:
        """For each base the mean of all models, permuted into the base's order."""
        result = []
        for base in range(num_bases):
            aligned = [
                x if i == base else self.symmetry.permute(found[base, i], x)
                for i, x in enumerate(variables)
            ]
            result.append(_mean(aligned))
        return result

    def __call__(self, num_bases: int, with_batch_norm: bool) -> tuple[Any, list[PyTree]]:
        """Merges into the order of each of the first `num_bases` models."""
        variables = self.variables
        if with_batch_norm:
            variables = [self.reestimated(x) for x in variables]
        found = self.matched(self.moments(variables, num_bases))
        merged = self.averaged(variables, found, num_bases)
        if with_batch_norm:
            merged = [self.reestimated(x) for x in merged]
        return jax.block_until_ready((found, merged))


@jax.jit
def _mean(variables: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: sum(x) / len(x), *variables)


def _swapped(moments: align.Moments) -> align.Moments:
    """The moments of the pair the other way round."""
    return align.Moments(
        total=moments.total,
        mean_reference=moments.mean_other,
        mean_other=moments.mean_reference,
        squares_reference=moments.squares_other,
        squares_other=moments.squares_reference,
        products=jnp.swapaxes(moments.products, -1, -2),
    )


def _merge() -> _Merge:
    module = models.ResNet(10)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(NUM_IMAGES, SIDE, SIDE, 3)), "f4")
    init = jax.jit(module.init)
    variables = [init(jax.random.key(i), image[:1]) for i in range(NUM_MODELS)]

    def statistics(variables: PyTree, batch: Array) -> PyTree:
        return module.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    symmetry = align.infer_symmetry(module.apply, variables[0], image[:1], check=False)
    return _Merge(symmetry, variables, image, jax.jit(statistics))


def _activations(
    options: Options, on_cpu: bool, left_out: dict[str, str]
) -> Iterator[dict[str, Any]]:
    peer = "DIMAT, restated"
    merge: _Merge | None = None
    restated: dict[bool, Timing] = {}
    for num_bases, with_batch_norm in itertools.product((1, NUM_MODELS), (False, True)):
        what = "with BatchNorm" if with_batch_norm else "matching"
        if not options.selects("activations", what, f"{num_bases} bases", peer):
            continue
        merge = _merge() if merge is None else merge
        last: dict[str, Any] = {}
        run_ours = _kept(last, "ours", functools.partial(merge, num_bases, with_batch_norm))
        first = _once(run_ours)
        calls: dict[str, Callable[[], Any]] = {"ours": run_ours}
        if on_cpu and num_bases == 1:
            try:
                theirs = _dimat(import_peer("torch"), merge, with_batch_norm)
                calls[peer] = _kept(last, peer, theirs)
            except PeerError as error:
                left_out["torch"] = str(error)
        timings = interleaved(calls, options.at_most(3), timer())
        own = timings["ours"].median
        row = {
            "what": what,
            "merged models": num_bases,
            "ours, s": f"{own:.2f}",
            "±, %": f"{100 * timings['ours'].spread:.0f}",
            "first call, s": f"{first:.1f}",
        }
        if peer in timings:
            restated[with_batch_norm] = timings[peer]
            row["units matched alike, %"] = f"{100 * _same(last['ours'][0], last[peer]):.1f}"
        elif on_cpu:
            row["units matched alike, %"] = "-"
        if on_cpu:
            # The code restated does all of it again for the next base, so that one tells it all.
            peers = restated.get(with_batch_norm)
            seconds = num_bases * peers.median if peers else 0.0
            row |= {
                f"{peer}, s": f"{seconds:.2f}" if peers else "-",
                "± %": f"{100 * peers.spread:.0f}" if peers else "-",
                "restated / ours": f"{seconds / own:.1f}" if peers else "-",
                f"{DIMAT_SECONDS:.0f} s / ours": f"{DIMAT_SECONDS / own:.1f}",
            }
        yield row


def _kept(results: dict[str, Any], name: str, call: Callable[[], Any]) -> Callable[[], None]:
    """A call that keeps its result."""

    def kept() -> None:
        results[name] = call()

    return kept


def _once(call: Callable[[], Any]) -> float:
    clock = timer()
    start = clock()
    call()
    return clock() - start


def _same(ours: Mapping[tuple[int, int], Any], theirs: Sequence[Mapping[str, Any]]) -> float:
    """The share of units with the same partner on both sides."""
    same = [
        np.asarray(ours[0, i + 1][group]) == np.asarray(p)
        for i, found in enumerate(theirs)
        for group, p in found.items()
    ]
    return float(np.mean(np.concatenate(same)))


def _parts(options: Options, on_cpu: bool) -> Iterator[dict[str, Any]]:
    """What ours does for one base, part by part."""
    if not options.selects("activations", "parts"):
        return
    merge = _merge()
    run_activations = merge.symmetry.jitted_activations
    statistics = merge.moments(merge.variables, 1)
    found = merge.matched(statistics)

    def forward() -> None:
        for batch, variables in itertools.product(merge.batches, merge.variables):
            jax.block_until_ready(run_activations(variables, batch))

    calls: dict[str, Callable[[], Any]] = {
        "forward passes with all activations": forward,
        "the same with moments": lambda: jax.block_until_ready(merge.moments(merge.variables, 1)),
        "assignments": lambda: jax.block_until_ready(merge.matched(statistics)),
        "permuted models and their mean": lambda: jax.block_until_ready(
            merge.averaged(merge.variables, found, 1)
        ),
        "BatchNorm re-estimation of one model": lambda: jax.block_until_ready(
            merge.reestimated(merge.variables[0])
        ),
    }
    for name, timing in interleaved(calls, options.at_most(5), timer()).items():
        yield {
            "part": name,
            "ms": f"{1e3 * timing.median:.3g}",
            "±, %": f"{100 * timing.spread:.0f}",
        }


def _dimat(torch: Any, merge: _Merge, with_batch_norm: bool) -> Callable[[], list[dict[str, Any]]]:
    """One agent's merge of all models, in PyTorch on one thread.

    Each model's statistics are reset; every batch's features of all models are stacked and their
    whole covariance summed; the correlation's blocks give the permutations; the merged model's
    statistics are reset.

    Returns:
        A call that returns the permutations of the models other than the first.

    Source: the code of DIMAT (Saadati et al. 2024), which follows ZipIt's.
    """
    torch.set_num_threads(1)
    kinds = merge.symmetry.layouts
    states = [_torch_state(torch, x) for x in merge.variables]
    axes = {
        name: [getattr(term, "name", None) for term in _torch_order(layout)]
        for name, layout in kinds.items()
    }
    image = torch.from_numpy(np.array(merge.image.transpose(0, 3, 1, 2)))
    batches = torch.split(image, DIMAT_BATCH)

    def reset(state: dict[str, Any]) -> dict[str, Any]:
        state = {name: x.clone() for name, x in state.items()}
        for count, batch in enumerate(batches):
            _torch_resnet(torch, state, batch, {}, momentum=1.0 / (count + 1))
        return state

    def covariances(models_: list[dict[str, Any]]) -> dict[str, Any]:
        sums: dict[str, tuple[Any, Any]] = {}
        for batch in batches:
            taps: list[dict[str, Any]] = [{} for _ in models_]
            for state, tap in zip(models_, taps, strict=True):
                _torch_resnet(torch, state, batch, tap)
            for group in taps[0]:
                x = torch.cat([t[group].transpose(0, 1).flatten(1) for t in taps])
                mean = len(batch) * x.mean(dim=1)
                second = len(batch) * (x @ x.T) / x.shape[1]
                before = sums.get(group, (0, 0))
                sums[group] = before[0] + mean, before[1] + second
        result = {}
        for group, (mean, second) in sums.items():
            mean, second = mean / len(image), second / len(image)
            result[group] = torch.nan_to_num(second - torch.outer(mean, mean))
        return result

    def call() -> list[dict[str, Any]]:
        with torch.no_grad():
            prepared = [reset(state) for state in states] if with_batch_norm else states
            found: list[dict[str, Any]] = [{} for _ in states[1:]]
            for group, covariance in covariances(prepared).items():
                spread = torch.sqrt(torch.diag(covariance))
                scores = covariance / torch.clamp(torch.outer(spread, spread), min=1e-7)
                size = len(scores) // len(states)
                for i, permutations in enumerate(found):
                    block = scores[:size, (i + 1) * size : (i + 2) * size]
                    best = scipy.optimize.linear_sum_assignment(block.numpy(), maximize=True)[1]
                    permutations[group] = torch.from_numpy(best)
            merged = {name: x / len(states) for name, x in prepared[0].items()}
            for state, permutations in zip(prepared[1:], found, strict=True):
                for name, x in state.items():
                    for axis, held in enumerate(axes[name]):
                        if held is not None:
                            x = x.index_select(axis, permutations[held])
                    merged[name] += x / len(states)
            if with_batch_norm:
                reset(merged)
        return found

    return call


def _torch_order(axes: Sequence[Any]) -> list[Any]:
    """The axes of a kernel in PyTorch's order: outputs, inputs, then the window."""
    return [axes[-1], axes[-2], *axes[:-2]] if len(axes) > 1 else list(axes)


def _torch_state(torch: Any, variables: PyTree) -> dict[str, Any]:
    return {
        name: torch.from_numpy(np.array(np.transpose(x, _torch_order(range(x.ndim)))))
        for name, x in trees.named_leaves(variables)
    }


def _torch_resnet(
    torch: Any, state: dict[str, Any], x: Any, taps: dict[str, Any], momentum: float | None = None
) -> Any:
    """The residual network of `mixlab.models`; notes by group what the next layer is given.

    Args:
        torch: the library.
        state: the leaves by our names in PyTorch's order; its statistics change in training.
        x: [B, C, H, W].
        taps: filled with the activations [B, n, H, W] of every group.
        momentum: of BatchNorm in training mode, None for evaluation.
    """
    functional = torch.nn.functional

    def layer(prefix: str, index: int, x: Any, stride: int = 1) -> Any:
        kernel = state[f"params/{prefix}Conv_{index}/kernel"]
        norm = f"{prefix}BatchNorm_{index}"
        return functional.batch_norm(
            functional.conv2d(x, kernel, stride=stride, padding=1),
            state[f"batch_stats/{norm}/mean"],
            state[f"batch_stats/{norm}/var"],
            state[f"params/{norm}/scale"],
            state[f"params/{norm}/bias"],
            training=momentum is not None,
            momentum=momentum or 0.0,
        )

    x = functional.relu(layer("", 0, x))
    stream = "Conv_0"
    for number in itertools.count():
        prefix = f"Block_{number}/"
        if f"params/{prefix}Conv_0/kernel" not in state:
            break
        changes = f"params/{prefix}Conv_2/kernel" in state
        y = functional.relu(layer(prefix, 0, x, 2 if changes else 1))
        taps[f"{prefix}Conv_0"] = y
        y = layer(prefix, 1, y)
        if changes:
            stream = f"{prefix}Conv_1"
            x = layer(prefix, 2, x, 2)
        x = functional.relu(x + y)
        # The last sum of a stream stands for it.
        taps[stream] = x
    dense = state["params/head/kernel"], state["params/head/bias"]
    return functional.linear(x.mean((2, 3)), *dense)


# ---------------------------------------------------------------- assignment


def _assignments(options: Options, on_cpu: bool) -> Iterator[dict[str, Any]]:
    for kind, width in itertools.product(("planted", "random"), WIDTHS):
        if not options.selects("assignment", kind, width):
            continue
        scores = _scores(kind, width)
        solvers = {
            backend: jax.jit(functools.partial(align.assignment, backend=backend))
            for backend in BACKENDS
        }
        calls = {
            backend: functools.partial(lambda f, x: jax.block_until_ready(f(x)), solve, scores)
            for backend, solve in solvers.items()
        }
        timings = interleaved(calls, options.at_most(5), timer())
        yield {"scores": kind, "n": width} | {
            name: f"{1e3 * timing.median:.3g}" for name, timing in timings.items()
        }


def _scores(kind: str, width: int) -> Array:
    """Correlations of random features, or of such with a noisy copy of themselves, renumbered."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2 * width, width))
    if kind == "planted":
        y = x[:, rng.permutation(width)] + 0.5 * y
    return jnp.asarray(x.T @ y / len(x), jnp.float32)
