"""How fast agents train and mix: beside as many single agents, and beside a loop in PyTorch.

What a step costs against the number of agents, and a round against agents, neighbours and
parameters.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixlab import agents, align, merge, models, trees
from mixlab.agents.parallel import exchange_rounds, host_callbacks_are_safe
from mixlab.agents.strategies.alignment import share_pairs
from mixlab.bench import Options, PeerError, Report, import_peer, interleaved, timer
from mixlab.types import PyTree

PACKAGES = ("jax", "numpy", "flax", "optax", "torch")
NUM_AGENTS, BATCH = 8, 32
"""Of the training step."""
CROWDS = (1, 10, 100, 1000)
"""Numbers of small agents on one device."""
CROWDS_OF_RESNETS = (1, 8, 64)
"""The same on an accelerator; a CPU would take minutes for a step."""
MATCHING_IMAGES = 256


def run(options: Options) -> Report:
    """Measures; the loop in PyTorch on a CPU alone."""
    agents.force_cpu_devices(NUM_AGENTS)  # before JAX starts
    left_out: dict[str, str] = {}
    tables = {
        f"A training step of {NUM_AGENTS} agents, milliseconds": list(_steps(options, left_out)),
        "Many agents on one device, a training step and a mixing, milliseconds": list(
            _crowds(options)
        ),
        "A DIMAT round, milliseconds": list(_rounds(options)),
        "Temporary memory of a round on each of 8 devices, megabytes": list(
            _memory(options, left_out)
        ),
    }
    return Report(tables, left_out)


def _networks() -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {
        "MLP 784-256-256-256-10": (models.MLP(10, (256,) * 3), (28, 28, 1)),
        "ResNet-20": (models.ResNet(10), (32, 32, 3)),
    }


# ---------------------------------------------------------------- training steps


class _Training:
    """Agents that train by themselves: their state, their batches and the compiled step."""

    def __init__(self, module: Any, shape: tuple[int, ...], where: agents.Parallel):
        optimizer = optax.sgd(0.1, momentum=0.9)
        one = jnp.zeros((1, *shape))
        count = where.num_agents

        def init(axis: agents.Axis, ids: Any, held: PyTree, shared: PyTree) -> PyTree:
            def first(agent: Any) -> PyTree:
                variables = module.init(jax.random.fold_in(shared, agent), one)
                return variables, optimizer.init(variables["params"])

            return axis.each(first)(ids)

        def step(axis: agents.Axis, state: PyTree, batch: PyTree, shared: PyTree) -> PyTree:
            def single(variables: PyTree, opt_state: PyTree, batch: PyTree) -> PyTree:
                def loss_fn(params: PyTree) -> Any:
                    logits, changed = module.apply(
                        {**variables, "params": params},
                        batch["image"],
                        train=True,
                        mutable=["batch_stats"],
                    )
                    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
                    return losses.mean(), changed

                grads, changed = jax.grad(loss_fn, has_aux=True)(variables["params"])
                updates, opt_state = optimizer.update(grads, opt_state)
                params = optax.apply_updates(variables["params"], updates)
                return {**variables, **changed, "params": params}, opt_state

            return axis.each(single)(*state, batch)

        rng = np.random.default_rng(0)
        key = where.replicate(jax.random.key(0))
        self._state = where.compile(init)(where.put(np.arange(count)), {}, key)
        self._batch = where.put(
            {
                "image": rng.random((count, BATCH, *shape), np.float32),
                "label": rng.integers(0, 10, (count, BATCH)),
            }
        )
        self._step = where.compile(step, donate=True)

    def __call__(self) -> None:
        self._state = jax.block_until_ready(self._step(self._state, self._batch, {}))


def _steps(options: Options, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    on_cpu = jax.default_backend() == "cpu"
    for name, (module, shape) in _networks().items():
        if not options.selects("steps", name):
            continue
        small = name.startswith("MLP")
        backends = ("pmap", "vmap", "loop") if small or not on_cpu else ("pmap",)
        calls: dict[str, Callable[[], Any]] = {
            backend: _Training(module, shape, agents.parallel(NUM_AGENTS, backend))
            for backend in backends
        }
        calls["one agent"] = _Training(module, shape, agents.parallel(1))
        if on_cpu:
            try:
                calls["PyTorch"] = _torch_loop(name, shape)
            except PeerError as error:
                left_out["PyTorch"] = str(error)
        timings = interleaved(calls, options.at_most(7), timer())
        single = timings["one agent"].median
        for backend in backends:
            median = timings[backend].median
            row = {
                "network": name,
                "backend": backend,
                "ms": f"{1e3 * median:.3g}",
                "±, %": f"{100 * timings[backend].spread:.0f}",
                "one agent, ms": f"{1e3 * single:.3g}",
                f"{NUM_AGENTS} x one / ours": f"{NUM_AGENTS * single / median:.2f}",
            }
            if "PyTorch" in timings:
                peer = timings["PyTorch"].median
                row |= {
                    "PyTorch, ms": f"{1e3 * peer:.3g}",
                    "PyTorch / ours": f"{peer / median:.2f}",
                }
            yield row


def _torch_loop(name: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """The agents one after the other, channels last, as one would write it in PyTorch."""
    torch = import_peer("torch")
    torch.set_num_threads(1)
    nn = torch.nn

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.norms = nn.ModuleList([nn.BatchNorm2d(outputs) for _ in range(2)])
            self.shortcut = (
                nn.Identity()
                if inputs == outputs
                else nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
                )
            )

        def forward(self, x: Any) -> Any:
            y = self.norms[0](self.first(x)).relu()
            return (self.norms[1](self.second(y)) + self.shortcut(x)).relu()

    def network() -> Any:
        if name.startswith("MLP"):
            sizes = (int(np.prod(shape)), 256, 256, 256)
            layers: list[Any] = [nn.Flatten()]
            for inputs, outputs in itertools.pairwise(sizes):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(256, 10))
        blocks = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        width = 16
        for stage, outputs in enumerate((16, 32, 64)):
            for i in range(3):
                blocks.append(Block(width, outputs, 2 if stage and not i else 1))
                width = outputs
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    generator = torch.Generator().manual_seed(0)
    trained = []
    for _ in range(NUM_AGENTS):
        model = network().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        images = torch.rand((BATCH, shape[2], *shape[:2]), generator=generator)
        labels = torch.randint(0, 10, (BATCH,), generator=generator)
        images = images.contiguous(memory_format=torch.channels_last)
        trained.append((model, optimizer, images, labels))

    def step() -> None:
        for model, optimizer, images, labels in trained:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return step


# ---------------------------------------------------------------- many agents


def _crowds(options: Options) -> Iterator[dict[str, Any]]:
    small = "MLP 784-32-10", models.MLP(10, (32,)), (28, 28, 1)
    yield from _crowds_of(*small, CROWDS, options)
    if jax.default_backend() != "cpu":
        large = _networks()["ResNet-20"]
        yield from _crowds_of("ResNet-20", *large, CROWDS_OF_RESNETS, options)


def _crowds_of(
    name: str, module: Any, shape: tuple[int, ...], counts: tuple[int, ...], options: Options
) -> Iterator[dict[str, Any]]:
    alone = None
    for count in counts:
        if not options.selects("crowds", name, count):
            continue
        where = agents.parallel(count, "vmap")
        variables = jax.jit(jax.vmap(lambda key: module.init(key, jnp.zeros((1, *shape)))))(
            jax.random.split(jax.random.key(0), count)
        )
        calls: dict[str, Callable[[], Any]] = {"step": _Training(module, shape, where)}
        for topology in (agents.ring(count), agents.complete(count)):
            calls[topology.name] = _mixing(where, topology, variables)
        timings = interleaved(calls, options.at_most(5), timer())
        step = timings["step"].median
        if count == 1:
            alone = step
        yield {
            "network": name,
            "agents": count,
            "parameters": trees.num_bytes(variables) // 4 // count,
            "step": f"{1e3 * step:.3g}",
            "step an agent": f"{1e3 * step / count:.3g}",
            "agents x one / ours": f"{count * alone / step:.2f}" if alone else "",
            "mixing, ring": f"{1e3 * timings['ring'].median:.3g}",
            "mixing, complete": f"{1e3 * timings['complete'].median:.3g}",
        }


def _mixing(
    where: agents.Parallel, topology: agents.Topology, variables: PyTree
) -> Callable[[], Any]:
    strategy = agents.wa(topology)
    problem = agents.Problem(optax.sgd(0.1))
    return _called(*_round(where, topology, strategy, problem, variables, {}))


def _called(run: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(run(*given))


def _round(
    where: agents.Parallel,
    topology: agents.Topology,
    strategy: agents.Strategy,
    problem: agents.Problem,
    variables: PyTree,
    images: Any,
) -> tuple[Any, ...]:
    """The program of a round, and what it is called with."""
    count = where.num_agents

    def program(axis: agents.Axis, state: PyTree, held: PyTree, shared: PyTree) -> PyTree:
        network = agents.Network(
            axis, shared["weights"], topology.adjacency, jax.random.key(0), jnp.int32(0)
        )
        here = problem._replace(images=shared["images"])
        return strategy.communicate(network, here, state).variables

    state = agents.AgentState(variables, (), jnp.full(count, -1, jnp.int32))
    placed = where.put(state)
    shared = where.replicate(
        {"weights": np.asarray(topology.mixing_matrix(), np.float32), "images": images}
    )
    return where.compile(program), placed, {}, shared


# ---------------------------------------------------------------- rounds


def _rounds(options: Options) -> Iterator[dict[str, Any]]:
    """A whole round in one program against its forward passes alone, one an agent."""
    for name, (module, shape) in _networks().items():
        images = jax.random.uniform(jax.random.key(1), (MATCHING_IMAGES, *shape))
        one = jax.jit(module.init)(jax.random.key(0), images[:1])
        symmetry = align.infer_symmetry(module.apply, one, images[:2], check=False)
        for topology in (agents.ring(4), agents.ring(NUM_AGENTS), agents.complete(NUM_AGENTS)):
            count = topology.num_agents
            if not options.selects("rounds", name, topology.name, count):
                continue
            where = agents.parallel(count)
            keys = jax.random.split(jax.random.key(0), count)
            variables = trees.stack([jax.jit(module.init)(key, images[:1]) for key in keys])
            problem = agents.Problem(
                optax.sgd(0.1),
                symmetry,
                assignment="scipy" if host_callbacks_are_safe(where) else "jax",
            )

            def passes(axis: agents.Axis, state: PyTree, held: PyTree, shared: PyTree) -> PyTree:
                return axis.each(lambda v: symmetry.activations(v, shared))(state)  # noqa: B023

            placed, replicated = where.put(variables), where.replicate(images)
            forward = where.compile(passes)
            calls = {
                "round": _called(
                    *_round(where, topology, agents.dimat(topology), problem, variables, images)
                ),
                "passes": lambda: jax.block_until_ready(
                    forward(placed, {}, replicated)  # noqa: B023
                ),
                "mixing": _mixing(where, topology, variables),
            }
            timings = interleaved(calls, options.at_most(3), timer())
            whole, forward_only = timings["round"].median, timings["passes"].median
            yield {
                "network": name,
                "topology": topology.name,
                "agents": count,
                "round": f"{1e3 * whole:.3g}",
                "±, %": f"{100 * timings['round'].spread:.0f}",
                "forward passes": f"{1e3 * forward_only:.3g}",
                "plain mixing": f"{1e3 * timings['mixing'].median:.3g}",
                "round / passes": f"{whole / forward_only:.2f}",
            }


# ---------------------------------------------------------------- memory


def _memory(options: Options, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What XLA sets aside beside the agents themselves, and what launch/SCALING.md predicts."""
    name, (module, shape) = next(iter(_networks().items()))
    images = jnp.zeros((MATCHING_IMAGES, *shape))
    one = jax.jit(module.init)(jax.random.key(0), images[:1])
    symmetry = align.infer_symmetry(module.apply, one, images[:2], check=False)
    model = trees.num_bytes(one)
    units = jax.eval_shape(symmetry.activations, one, images)
    activations = sum(4 * x.size for x in jax.tree.leaves(units))
    moments = sum(4 * n**2 for n in symmetry.groups.values())
    topologies = (
        agents.ring(NUM_AGENTS),
        agents.ring(32),
        agents.torus(32),
        agents.complete(NUM_AGENTS),
        agents.complete(32),
    )
    rounds_of = itertools.product((agents.wa, agents.dimat), topologies)
    # What is of all agents does not look at the graph.
    of_all = itertools.product((_mean_of_all, _median_of_all, _consensus), topologies[:2])
    for strategy, topology in itertools.chain(rounds_of, of_all):
        count, degree = topology.num_agents, int(topology.adjacency.sum(axis=1).max())
        own = strategy(topology)
        if not options.selects("memory", own.name, topology.name, count):
            continue
        where = agents.parallel(count)
        problem = agents.Problem(optax.sgd(0.1), symmetry, assignment="jax")
        run, *given = _round(where, topology, own, problem, trees.stack([one] * count), images)
        compiled = jax.jit(lambda *given: run(*given)).lower(*given).compile()  # noqa: B023
        analysis = compiled.memory_analysis()
        if analysis is None:
            left_out["memory"] = "this backend does not analyse its programs"
            return
        found = analysis.temp_size_in_bytes
        held = where.per_block
        blocks = topology.adjacency.reshape(count // held, held, count // held, held).any((1, 3))
        rounds = exchange_rounds(blocks & ~np.eye(count // held, dtype=bool))
        if own.name in ("mean", "median"):
            predicted = 3 * held * model
        elif own.name == "consensus":
            predicted = held * (3 * model + activations) + activations
        elif own.name == "dimat":
            does = share_pairs(topology.adjacency)
            to_match = does.reshape(blocks.shape[0], held, -1, held).any((1, 3))
            asked = exchange_rounds(to_match & ~np.eye(len(blocks), dtype=bool))
            models, views = (
                held * (1 + min(len(some), len(blocks) - 1)) for some in (rounds, asked)
            )
            predicted = models * model + views * activations
            predicted += held * (degree * model + does.sum(axis=1).max() * moments)
        elif degree + 1 <= count / 4:
            predicted = held * (1 + len(rounds)) * model
        else:
            predicted = 4 * held * model
        yield {
            "network": name,
            "strategy": own.name,
            "topology": topology.name,
            "agents": count,
            "found": f"{found / 1e6:.1f}",
            "predicted": f"{predicted / 1e6:.1f}",
            "found / predicted": f"{found / predicted:.2f}",
        }


def _mean_of_all(
    topology: agents.Topology, name: str = "mean", method: merge.MergeMethod | None = None
) -> agents.Strategy:
    """Everyone becomes the mean of all agents, whatever the graph."""

    def communicate(
        network: agents.Network, problem: agents.Problem, state: agents.AgentState
    ) -> agents.AgentState:
        found = network.mean(state.variables, "parameters", method=method)
        return state._replace(variables=found)

    return agents.wa(topology)._replace(name=name, communicate=communicate)


def _median_of_all(topology: agents.Topology) -> agents.Strategy:
    """Everyone becomes the median of all agents, entry by entry."""
    return _mean_of_all(topology, "median", merge.median())


def _consensus(topology: agents.Topology) -> agents.Strategy:
    """Everyone becomes what an evaluation makes of all agents."""

    def communicate(
        network: agents.Network, problem: agents.Problem, state: agents.AgentState
    ) -> agents.AgentState:
        found = agents.consensus(network.axis, problem, state.variables)
        return state._replace(variables=(found.plain, found.aligned))

    return agents.wa(topology)._replace(name="consensus", communicate=communicate)
