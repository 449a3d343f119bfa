"""The strategies: the same on every backend, and the algebra of each."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents, merge
from mixlab.agents import strategies
from tests.agents import tasks
from tests.reference import decentral

STRATEGIES = ("data_parallel", "wa", "dimat(opt_state='permute')")


# ---------------------------------------------------------------- backends


def short_run(strategy, topology, problem, gradients, axis, state, batches):
    """`init`, a local step for each batch, and one communication: the state before and after."""

    weights = topology.mixing_matrix(strategy.rule)

    def step(carry, batch):
        state, time = carry
        key = jax.random.fold_in(jax.random.key(7), time)
        net = tasks.network(axis, topology, weights, key=key, time=time)
        grads, stats = axis.each(gradients)(state.variables, batch)
        found = agents.Gradients(grads, stats, batch, lambda v, b: gradients(v, b)[0])
        return (strategy.local_step(net, problem, state, found), time + 1), None

    by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
    start = strategy.init(axis, problem, state), jnp.int32(0)
    (state, _), _ = jax.lax.scan(step, start, by_step)
    net = tasks.network(axis, topology, weights)
    return state, strategy.communicate(net, problem, state)


@functools.cache
def mlp_run(text, num_agents, backend, num_devices=None):
    topology = agents.star(num_agents)
    strategy, problem = agents.parse(text, topology), tasks.mlp_problem()
    return tasks.over(
        agents.parallel(num_agents, backend, num_devices=num_devices),
        functools.partial(short_run, strategy, topology, problem, tasks.mlp_gradients),
        tasks.start(tasks.mlps(num_agents), problem.optimizer, num_agents),
        tasks.batches(num_agents, (tasks.FEATURES,), steps=2),
    )


@pytest.mark.parametrize("layout", [(2, "loop"), (8, "pmap", 8), (8, "pmap", 4)], ids=str)
@pytest.mark.parametrize("text", STRATEGIES)
def test_every_backend_gives_the_same(text, layout):
    """Of these, pmap on four devices runs its two agents each by `loop`."""
    found, expected = mlp_run(text, *layout), mlp_run(text, layout[0], "vmap")
    tasks.assert_trees(found, expected, rtol=1e-4, atol=1e-5)


def pull(variables, batch):
    """The gradient of half the squared distance to the batch; statistics are the parameters."""
    params = variables["params"]
    return jax.tree.map(lambda x, c: x - c, params, batch), {"mean": 2 * params["w"][0]}


def vector_run(text, backend, num_devices=None):
    topology = agents.star(4)
    strategy = agents.parse(text, topology)
    problem = agents.Problem(strategy.optimizer(optax.sgd(0.1)))
    batches = [vectors(4, seed)["params"] for seed in (1, 2)]
    return tasks.over(
        agents.parallel(4, backend, num_devices=num_devices),
        functools.partial(short_run, strategy, topology, problem, pull),
        tasks.start(vectors(4), problem.optimizer, 4),
        jax.tree.map(lambda *x: np.stack(x, axis=1), *batches),
    )


@pytest.mark.parametrize(
    "text",
    [
        "dpsgd(order='adapt_then_combine', merge='median')",
        "ldsgd(local=1, mixing=1)",
        "swarm",
        "cga",
        "sgp",
        "gradient_tracking",
        "choco('random_k(0.5)')",
        "fedprox(fraction=0.5)",
        "diloco",
    ],
)
def test_every_backend_gives_the_same_vectors(text):
    """Two agents run by `loop` on each of two devices, and four run by `vmap` on one."""
    found, expected = vector_run(text, "pmap", 2), vector_run(text, "vmap")
    tasks.assert_trees(found, expected, rtol=1e-4, atol=1e-5)


def test_every_backend_gives_the_same_with_batch_norm():
    """Two agents run by `loop` on each of two devices, and four run by `vmap` on one."""
    topology = agents.ring(4)
    problem, variables = tasks.cnn_problem()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x + 0.3 * rng.random((4, *x.shape), np.float32), variables)
    run = functools.partial(
        short_run, agents.dimat(topology), topology, problem, tasks.cnn_gradients
    )
    found, expected = (
        tasks.over(
            where,
            run,
            tasks.start(variables, problem.optimizer, 4),
            tasks.batches(4, (4, 4, 1), 2),
        )
        for where in (agents.parallel(4, num_devices=2), agents.parallel(4, "vmap"))
    )
    tasks.assert_trees(found, expected, rtol=1e-4, atol=1e-5)
    state, merged = expected
    for a, b in zip(*map(jax.tree.leaves, (state.variables, merged.variables)), strict=True):
        assert not np.allclose(a, b)


# ---------------------------------------------------------------- algebra of averaging

TOPOLOGIES = {
    "ring": agents.ring(6),
    "star": agents.star(6),
    "exponential": agents.exponential(6),
    "torus": agents.torus(6),
    "erdos_renyi": agents.erdos_renyi(6, 0.5),
}
PLAIN = agents.Problem(optimizer=optax.sgd(0.1))


def vectors(num_agents, seed=0):
    """A tiny model with BatchNorm statistics, which need be no model's: only leaves are mixed."""
    rng = np.random.default_rng(seed)
    variables = {
        "params": {"w": rng.normal(size=(num_agents, 2, 3)), "b": rng.normal(size=(num_agents,))},
        "batch_stats": {"mean": rng.normal(size=(num_agents, 3))},
    }
    return jax.tree.map(np.float32, variables)


@functools.cache
def compiled(name, num_agents):
    """`local_step` and `communicate` of a strategy on vectors, compiled once for all matrices."""
    topology = agents.complete(num_agents)
    strategy = agents.parse(name, topology)
    where = agents.parallel(num_agents, "vmap")
    calls = []

    def step(axis, state, held, weights):
        calls.append("step")
        found = agents.Gradients(*held, {}, lambda variables, batch: variables["params"])
        return strategy.local_step(tasks.network(axis, topology, weights), PLAIN, state, found)

    def communicate(axis, state, held, weights):
        calls.append("communicate")
        return strategy.communicate(tasks.network(axis, topology, weights), PLAIN, state)

    programs = {"step": where.compile(step), "communicate": where.compile(communicate)}

    def run(kind, state, weights, *held):
        args = where.put(state), where.put(held), where.replicate(np.float32(weights))
        return where.get(programs[kind](*args))

    return run, calls


def test_wa_is_the_weighted_mean_and_keeps_the_mean():
    run, calls = compiled("wa", 6)
    variables = vectors(6)
    state = tasks.start(variables, PLAIN.optimizer, 6)._replace(failed_at=np.arange(6))
    for name, topology in TOPOLOGIES.items():
        assert topology.doubly_stochastic
        found = run("communicate", state, topology.weights)
        expected = jax.tree.map(
            lambda x, w=topology.weights: np.float32(decentral.mix(w, x)), variables
        )
        tasks.assert_trees(found.variables, expected)
        for a, b in zip(*map(jax.tree.leaves, (found.variables, variables)), strict=True):
            np.testing.assert_allclose(a.mean(0), b.mean(0), atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(found.failed_at, np.arange(6))
    # The matrix is an argument: another one costs no compilation.
    assert calls.count("communicate") == 1


@pytest.mark.parametrize("name", ["wa", "dpsgd"])
def test_the_identity_mixes_nothing_and_the_complete_graph_everything(name):
    run, _ = compiled(name, 6)
    state = tasks.start(vectors(6), PLAIN.optimizer, 6)
    tasks.assert_trees(run("communicate", state, np.eye(6)), state, rtol=0, atol=0)
    found = run("communicate", state, np.full((6, 6), 1 / 6))
    for a, b in zip(*map(jax.tree.leaves, (found.variables, state.variables)), strict=True):
        np.testing.assert_allclose(a, np.broadcast_to(b.mean(0), b.shape), rtol=1e-5, atol=1e-6)


def test_dpsgd_combines_then_adapts():
    run, calls = compiled("dpsgd", 6)
    state = tasks.start(vectors(6), PLAIN.optimizer, 6)
    gradients, stats = vectors(6, 1)["params"], vectors(6, 2)["batch_stats"]
    for topology in TOPOLOGIES.values():
        w = topology.weights
        found = run("step", state, w, gradients, stats)
        expected = {
            "params": jax.tree.map(
                lambda x, g, w=w: np.float32(decentral.cdsgd_step(w, x, g, 0.1)),
                state.variables["params"],
                gradients,
            ),
            # The statistics of the step just made are mixed, not those from before it.
            "batch_stats": jax.tree.map(lambda x, w=w: np.float32(decentral.mix(w, x)), stats),
        }
        tasks.assert_trees(found.variables, expected)
        # The mean of all agents makes the step of plain SGD on the mean gradient.
        before, after = state.variables["params"]["w"], found.variables["params"]["w"]
        step = -0.1 * gradients["w"].mean(0)
        np.testing.assert_allclose(after.mean(0) - before.mean(0), step, atol=1e-6)
    assert calls.count("step") == 1


def test_sgp_weighs_statistics_as_it_does_parameters():
    topology = agents.from_matrix([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.4, 0.3, 0.3]])
    strategy, push = agents.sgp(topology), topology.mixing_matrix("push")
    assert np.ptp(push.sum(1)) > 0.1
    start = tasks.start(vectors(3), PLAIN.optimizer, 3)
    centers = np.stack([vectors(3, seed)["params"]["w"] for seed in (1, 2, 3)], axis=1)
    batches = {"w": centers, "b": np.zeros((3, 3), np.float32)}
    run = functools.partial(short_run, strategy, topology, PLAIN, pull)
    found, _ = tasks.over(3, run, start, batches)
    x, weight = start.variables["params"]["w"], np.ones((3, 1))
    for step in range(3):
        share = x * weight[..., None] - 0.1 * (x - centers[:, step])
        stats = push @ (2 * x[:, 0] * weight)
        weight = push @ weight
        x, stats = np.tensordot(push, share, 1) / weight[..., None], stats / weight
    np.testing.assert_allclose(found.memory, weight[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.variables["params"]["w"], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.variables["batch_stats"]["mean"], stats, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "wa", "dimat"])
def test_rounds_are_local_training_between_merges(name):
    run, _ = compiled(name, 6)
    state = tasks.start(vectors(6), PLAIN.optimizer, 6)
    gradients, stats = vectors(6, 1)["params"], vectors(6, 2)["batch_stats"]
    found = run("step", state, np.full((6, 6), 1 / 6), gradients, stats)
    stepped = jax.tree.map(
        lambda x, g: x - np.float32(0.1) * g, state.variables["params"], gradients
    )
    tasks.assert_trees(found.variables, {"params": stepped, "batch_stats": stats})
    if name == "none":
        tasks.assert_trees(run("communicate", found, np.full((6, 6), 1 / 6)), found, 0, 0)


def test_when_strategies_communicate():
    by_round = {"wa", "gossip", "dimat", "fedavg", "fedprox", "fedavgm", "fedadam", "diloco"}
    for name in strategies.STRATEGIES:
        every = agents.parse(name, agents.complete(4)).every
        otherwise = {"none": "never", "data_parallel": "always"}.get(name, "step")
        assert every == ("round" if name in by_round else otherwise), name


def test_data_parallel_averages_gradients_and_statistics():
    run, _ = compiled("data_parallel", 6)
    state = tasks.start(vectors(6), PLAIN.optimizer, 6)
    gradients, stats = vectors(6, 1)["params"], vectors(6, 2)["batch_stats"]
    found = run("step", state, np.eye(6), gradients, stats).variables
    for name, x in state.variables["params"].items():
        step = np.float32(0.1) * gradients[name].mean(0)
        np.testing.assert_allclose(found["params"][name], x - step, atol=1e-6)
    expected = np.broadcast_to(stats["mean"].mean(0), (6, 3))
    np.testing.assert_allclose(found["batch_stats"]["mean"], expected, atol=1e-6)


def test_data_parallel_is_one_model_on_the_mean_gradient():
    num_agents, steps = 4, 3
    problem = tasks.mlp_problem(tasks.adam())
    topology = agents.disconnected(num_agents)
    strategy = agents.parse("data_parallel", topology)
    batches = tasks.batches(num_agents, (tasks.FEATURES,), steps)
    state = tasks.start(tasks.mlps(num_agents), problem.optimizer, num_agents)
    found, communicated = tasks.over(
        num_agents,
        functools.partial(short_run, strategy, topology, problem, tasks.mlp_gradients),
        state,
        batches,
    )

    @jax.jit
    def train(params, opt_state, batch):
        gradients, _ = tasks.mlp_gradients({"params": params}, batch)
        updates, opt_state = problem.optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = tasks.agent((state.variables["params"], state.opt_state), 0)
    for step in range(steps):
        # Equal batches: the mean of the agents' gradients is that of all their examples.
        batch = jax.tree.map(lambda x: x[:, step].reshape(-1, *x.shape[3:]), batches)  # noqa: B023
        params, opt_state = train(params, opt_state, batch)
    for i in range(num_agents):
        tasks.assert_trees(tasks.agent(found.variables["params"], i), params, 1e-4, 1e-6)
        tasks.assert_trees(tasks.agent(found.opt_state, i), opt_state, 1e-4, 1e-6)
        tasks.assert_trees(tasks.agent(found, i), tasks.agent(found, 0), 0, 0)
    tasks.assert_trees(communicated, found, 0, 0)


def test_a_gradient_at_what_an_agent_held_before_does_not_count():
    """Agent 2 returns, one step behind the others, and agent 3 is absent."""
    state = tasks.start(vectors(4), PLAIN.optimizer, 4)
    state = state._replace(
        variables=jax.tree.map(lambda x: x[[0, 0, 2, 3]], state.variables),
        memory=np.int32([2, 2, 1, 2]),
    )
    grads, stats = vectors(4, 1)["params"], vectors(4, 2)["batch_stats"]
    topology = agents.ring(4)
    strategy = agents.data_parallel(topology)

    def step(axis, state, grads, stats):
        found = agents.Gradients(grads, stats, {}, lambda variables, batch: variables["params"])
        net = tasks.network(axis, topology, awake=jnp.arange(4) < 3)
        return strategy.local_step(net, PLAIN, state, found)

    found = tasks.over(4, step, state, grads, stats)
    for i in range(3):
        for name, x in state.variables["params"].items():
            expected = x[0] - 0.1 * grads[name][:2].mean(0)
            np.testing.assert_allclose(found.variables["params"][name][i], expected, atol=1e-6)
        mean = found.variables["batch_stats"]["mean"][i]
        np.testing.assert_allclose(mean, stats["mean"][:2].mean(0), atol=1e-6)
    np.testing.assert_array_equal(found.memory[:3], [3, 3, 3])


def test_data_parallel_starts_from_agent_0_optimizer_state_included():
    """Some optimizers keep a copy of the parameters, which has to be the same everywhere too."""

    optimizer = optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1)
    state = tasks.start(vectors(3), optimizer, 3)
    strategy = agents.data_parallel(agents.ring(3))
    problem = agents.Problem(optimizer)
    found = tasks.over(3, lambda axis, state: strategy.init(axis, problem, state), state)
    for i in range(3):
        tasks.assert_trees(tasks.agent(found[:2], i), tasks.agent(state[:2], 0), 0, 0)


@pytest.mark.parametrize("opt_state", ["keep", "reset", "permute"])
def test_wa_and_the_optimizer_state(opt_state):
    optimizer = tasks.adam()
    state = tasks.start(vectors(4), optimizer, 4)
    adam, rest = state.opt_state
    adam = adam._replace(
        count=np.arange(4, dtype=np.int32), mu=vectors(4, 1)["params"], nu=vectors(4, 2)["params"]
    )
    state = state._replace(opt_state=(adam, rest))
    topology = agents.ring(4)
    strategy = agents.wa(topology, opt_state=opt_state)
    problem = agents.Problem(optimizer=optimizer)
    found = tasks.over(
        4,
        lambda axis, state: strategy.communicate(tasks.network(axis, topology), problem, state),
        state,
    )
    mixed = jax.tree.map(
        lambda x: np.float32(decentral.mix(topology.weights, x)), (adam.mu, adam.nu)
    )
    expected = {
        "keep": (adam, rest),
        "reset": jax.tree.map(np.zeros_like, (adam, rest)),
        "permute": (adam._replace(mu=mixed[0], nu=mixed[1]), rest),
    }[opt_state]
    tasks.assert_trees(found.opt_state, expected)


# ---------------------------------------------------------------- leaves


@pytest.mark.parametrize("backend", ["vmap", "pmap"])
@pytest.mark.parametrize("topology", [agents.complete(8), agents.ring(16)], ids=str)
def test_what_a_broken_agent_holds_reaches_those_alone_who_weigh_it(backend, topology):
    """The sums of a dense graph and of a sparse one."""
    count = topology.num_agents
    weights = np.array(topology.mixing_matrix())
    weights[:, 2] = 0  # nobody listens to agent 2, who holds infinity, but agent 3
    weights[3, 2] = 0.1
    held = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    held[2, 1] = np.inf

    def mixed(axis, state, nothing):
        return tasks.network(axis, topology, weights).mix(state)

    found = tasks.over(agents.parallel(count, backend), mixed, held, {})
    expected = weights @ np.where(np.isinf(held), 0, held)
    assert not np.isfinite(found[3, 1])
    others = np.delete(np.arange(count), [2, 3])
    np.testing.assert_allclose(found[others], expected[others], rtol=1e-5)


def test_mix_keeps_integers_and_none_and_computes_narrow_floats_in_float32():
    topology = agents.ring(4)
    weights = topology.weights
    tree = {
        "int": np.arange(8, dtype=np.int32).reshape(4, 2),
        "bool": np.array([True, False, True, True]),
        "none": None,
        "scalar": np.float32([1, 2, 3, 4]),
        "half": jnp.asarray([[1.0], [2.0], [256.0], [3.0]], jnp.bfloat16),
    }
    found = tasks.over(4, lambda axis, tree: tasks.network(axis, topology).mix(tree), tree)
    for name in ("int", "bool"):
        np.testing.assert_array_equal(found[name], tree[name])
        assert found[name].dtype == tree[name].dtype
    assert found["none"] is None
    np.testing.assert_allclose(found["scalar"], weights @ tree["scalar"], rtol=1e-6)
    assert found["half"].dtype == jnp.bfloat16
    wide = np.float32(weights) @ np.asarray(tree["half"], np.float32)
    np.testing.assert_array_equal(found["half"], np.asarray(wide, jnp.bfloat16))


def test_the_mix_of_a_stack_has_no_leak_through_zero_weights():
    held = np.float32([1, np.inf, 3, 4])
    found = np.asarray(agents.mix(np.eye(4), held))
    np.testing.assert_array_equal(found[[0, 2, 3]], held[[0, 2, 3]])
    assert not np.isfinite(found[1])


def test_a_rule_among_some_takes_the_others_for_their_median():
    held = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    awake = np.array([True, False, True, True, False, True])

    def median(axis, tree, awake):
        net = tasks.network(axis, agents.ring(6), awake=awake)
        return net.mean(tree, method=merge.median())

    found = tasks.over(6, median, held, shared=(awake,))
    np.testing.assert_allclose(found[0], np.median(held[awake], axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "topology", "says"),
    [
        ("wa(merge='fisher')", agents.ring(5), "fisher.*cannot merge agents.*fishers="),
        ("dimat(merge='emr')", agents.ring(5), "makes several models"),
        ("dimat(merge='krum(1)')", agents.ring(5), "neighbourhoods of 3, as ring has: krum"),
        ("wa(merge='krum(1)')", agents.star(6), "neighbourhoods of 2, as star has: krum"),
        ("dpsgd(merge='slerp(0.5)')", agents.complete(3), "of 3, as complete has: .*two models"),
        ("wa(merge='median')", agents.matchings(6), "changes with time"),
        ("dpsgd(merge='median')", agents.one_peer_exponential(8), "changes with time"),
        ("dpsgd", agents.star(5, weights="uniform"), "dpsgd needs doubly stochastic"),
        ("cga", agents.star(5, weights="uniform"), "cga needs doubly stochastic"),
    ],
)
def test_what_a_strategy_cannot_work_with_is_refused(text, topology, says):
    with pytest.raises(ValueError, match=says):
        agents.parse(text, topology)
    agents.parse("dpsgd(biased=True)", topology)


def test_variances_and_moments_stay_in_the_range_of_those_that_are_merged():
    topology, axis = agents.complete(4), tasks.axis(4)
    strategy = agents.parse("wa(merge='dare(density=0.5)', opt_state='permute')", topology)
    problem = agents.Problem(tasks.adam())
    rng = np.random.default_rng(0)
    variables = {
        "params": {"w": rng.normal(size=(4, 40)).astype(np.float32)},
        "batch_stats": {"var": rng.random((4, 40)).astype(np.float32)},
    }
    state = tasks.start(variables, problem.optimizer, 4)
    random = functools.partial(jax.tree.map, lambda x: np.abs(rng.normal(size=x.shape)))
    state = state._replace(opt_state=jax.tree.map(np.float32, random(state.opt_state)))
    state = jax.tree.map(jnp.asarray, state)
    found = strategy.communicate(tasks.network(axis, topology), problem, state)
    before = variables["batch_stats"]["var"]
    assert np.all(found.variables["batch_stats"]["var"] >= before.min(axis=0))
    for leaf, old in zip(
        jax.tree.leaves(found.opt_state), jax.tree.leaves(state.opt_state), strict=True
    ):
        assert np.all(leaf >= old.min(axis=0))
    assert np.any(found.variables["params"]["w"] > variables["params"]["w"].max(axis=0))


# ---------------------------------------------------------------- bytes

# Parameters: 2*3 + 1 = 7 floats, statistics: 3; so an agent's variables take 40 bytes.
TO_NEIGHBOURS = {
    # Two neighbours each.
    "ring": (agents.ring(5), [80, 80, 80, 80, 80]),
    # The hub tells all four others, they tell it.
    "star": (agents.star(5), [160, 40, 40, 40, 40]),
    # Agent i receives from i + 1, i + 2 and i + 4, so each is heard by three.
    "exponential": (agents.exponential(5), [120, 120, 120, 120, 120]),
    # Row: receives. Agent 0 is heard by 1 and 2; nobody hears 2, though it hears both.
    "directed": (
        agents.from_matrix([[1, 0, 0], [0.5, 0.5, 0], [0.4, 0.3, 0.3]], connected=False),
        [80, 40, 0],
    ),
    # Nobody weighs itself, which is no message either way.
    "swap": (agents.from_matrix([[0, 1], [1, 0]]), [40, 40]),
    "alone": (agents.disconnected(2), [0, 0]),
}


def traffic(text, topology, *, communicate=False, opt_state=(), **network):
    """Bytes that a step or a communication counts as sent and received: `{kind: [A, 2]}`."""
    num_agents = topology.num_agents
    axis, strategy = tasks.axis(num_agents), agents.parse(text, topology)
    problem = agents.Problem(strategy.optimizer(optax.sgd(0.1)))
    start = tasks.start(vectors(num_agents), problem.optimizer, num_agents)
    start = start._replace(opt_state=opt_state or start.opt_state)
    messages = []

    @jax.jit  # which leaves out all but the counting
    def counts(state):
        state = strategy.init(axis, problem, state)
        net = tasks.network(axis, topology, topology.mixing_matrix(strategy.rule), **network)
        if communicate:
            strategy.communicate(net, problem, state)
        else:
            batch = state.variables["params"]
            grads, stats = axis.each(pull)(state.variables, batch)
            found = agents.Gradients(grads, stats, batch, lambda v, b: pull(v, b)[0])
            strategy.local_step(net, problem, state, found)
        messages.extend(net.messages)
        return net.received()[0]

    found = np.asarray(counts(start)).swapaxes(0, 1)
    total = {}
    for message, count in zip(messages, found, strict=True):
        total[message.kind] = total.get(message.kind, 0) + count * message.num_bytes
    return total


@pytest.mark.parametrize("graph", TO_NEIGHBOURS)
def test_bytes_are_those_of_the_models_sent(graph):
    topology, expected = TO_NEIGHBOURS[graph]
    for name, communicate in (("wa", True), ("dpsgd(biased=True)", False)):
        found = traffic(name, topology, communicate=communicate)
        sent = {kind: amount[:, 0].tolist() for kind, amount in found.items()}
        assert sent == {
            "parameters": [0.7 * x for x in expected],
            "statistics": [0.3 * x for x in expected],
        }
        assert all(amount[:, 0].sum() == amount[:, 1].sum() for amount in found.values())


# An agent's parameters are 28 bytes, its statistics 12; in a ring it has two neighbours.
PER_STEP = {
    "none": {},
    "wa": {},
    "data_parallel": {"gradients": 2 * 4 / 5 * 28, "statistics": 2 * 4 / 5 * 12},
    "cdmsgd": {"parameters": 56, "statistics": 24},
    "cga": {"parameters": 56, "gradients": 56, "statistics": 24},
    # The weight of push-sum is one float more.
    "sgp": {"parameters": 64, "statistics": 24},
    "gradient_tracking": {"parameters": 56, "gradients": 56, "statistics": 24},
    # Four of seven floats, and a bit for each of the seven.
    "choco('top_k(0.5)')": {"parameters": 2 * 17, "statistics": 24},
    "ldsgd(local=1, mixing=1)": {"parameters": 0, "statistics": 0},
}


@pytest.mark.parametrize("text", PER_STEP)
def test_bytes_of_a_step(text):
    found = traffic(text, agents.ring(5))
    assert set(found) == set(PER_STEP[text])
    for kind, expected in PER_STEP[text].items():
        np.testing.assert_allclose(found[kind], np.full((5, 2), expected), err_msg=kind)


def test_bytes_of_those_who_meet_or_serve():
    found = traffic("swarm(pairs=[[1, 2]])", agents.ring(5))
    np.testing.assert_array_equal(found["parameters"][:, 0], [0, 28, 28, 0, 0])
    found = traffic("ldsgd(local=1, mixing=1)", agents.ring(5), time=jnp.int32(1))
    np.testing.assert_array_equal(found["statistics"], np.full((5, 2), 24))
    # Clients send to the hub, which sends back.
    found = traffic("fedavg", agents.star(5), communicate=True)
    np.testing.assert_array_equal(found["parameters"], [[112, 112]] + [[28, 28]] * 4)
    np.testing.assert_array_equal(found["statistics"], [[48, 48]] + [[12, 12]] * 4)


def test_a_download_goes_over_the_edges_from_the_server():
    """Agent 3 does not hear the server, which does not hear agent 1."""
    graph = agents.star(5)
    lost = np.zeros((5, 5), bool)
    lost[3, 0] = lost[0, 1] = True
    net = tasks.network(tasks.axis(5), graph, np.where(lost, 0, graph.weights), lost=lost)
    net.download({"w": jnp.zeros(7)}, jnp.arange(5) != 2)
    assert [message.num_bytes for message in net.messages] == [28]
    sent, received = np.asarray(net.received()[0])[:, 0].T
    np.testing.assert_array_equal(sent, [3, 0, 0, 0, 0])
    np.testing.assert_array_equal(received, [0, 1, 0, 0, 1])


def test_bytes_count_narrow_leaves_as_narrow():
    tree = {"w": jnp.zeros((4, 10), jnp.bfloat16), "count": jnp.zeros(4, jnp.int32)}
    net = tasks.network(tasks.axis(4), agents.ring(4))
    net.mix(tree)
    assert [message.num_bytes for message in net.messages] == [20]


def test_moments_that_are_mixed_are_sent_too():
    moments = {"mu": jnp.zeros((4, 10)), "nu": jnp.zeros((4, 10)), "count": jnp.zeros(4, jnp.int32)}
    for choice, expected in (("keep", 56), ("permute", 56 + 160)):
        text = f"wa(opt_state={choice!r})"
        found = traffic(text, agents.ring(4), communicate=True, opt_state=moments)
        np.testing.assert_array_equal(found["parameters"], np.full((4, 2), expected))


# ---------------------------------------------------------------- errors


def test_what_cannot_be_built_is_refused():
    topology = agents.ring(4)
    with pytest.raises(ValueError, match=r"unknown name 'dimatt'.*did you mean 'dimat'"):
        agents.parse("dimatt", topology)
    with pytest.raises(TypeError, match=r"statistics.*it takes .*statistic='correlation'"):
        agents.parse("dimat(statistics='correlation')", topology)
    for text in ("wa(opt_state='permutate')", "dimat(opt_state='permutate')"):
        with pytest.raises(ValueError, match=r"opt_state='permutate'.*did you mean 'permute'"):
            agents.parse(text, topology)
    with pytest.raises(ValueError, match=r"order='adapt'.*adapt_then_combine"):
        agents.parse("dpsgd(order='adapt')", topology)
    with pytest.raises(ValueError, match=r"local >= 0 and mixing >= 1.*got 1 and 0"):
        agents.ldsgd(topology, local=1, mixing=0)
    with pytest.raises(ValueError, match=r"two different agents of the 4, got \[\[0, 4\]\]"):
        agents.swarm(topology, pairs=[[0, 4]])
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
        agents.cdmsgd(topology, momentum=1)
    directed = agents.ring(4, directed=True)
    with pytest.raises(ValueError, match=r"cga needs neighbours that answer.*undirected"):
        agents.cga(directed)
    with pytest.raises(ValueError, match=r"choco needs the same neighbours .* over 3 rounds"):
        agents.choco(agents.one_peer_exponential(8))
    with pytest.raises(ValueError, match=r"swarm needs edges that go both ways"):
        agents.swarm(directed)
    with pytest.raises(ValueError, match=r"projection='gem'.*dimat"):
        agents.cga(topology, projection="gem")
    strategy = agents.dpsgd(topology)
    assert agents.parse(strategy, topology) is strategy


@pytest.mark.parametrize("name", sorted(strategies.STRATEGIES))
def test_a_strategy_takes_a_topology(name):
    make = strategies.STRATEGIES[name]
    for wrong in (4, "ring", None, np.eye(4)):
        said = rf"{name} takes a topology such as agents.ring\(8\), got {re.escape(repr(wrong))}"
        with pytest.raises(TypeError, match=said):
            make(wrong)
        with pytest.raises(TypeError, match=said):
            make(topology=wrong)
    assert make(topology=agents.complete(4)).name == name
    with pytest.raises(TypeError, match=rf"{name}\(\) missing .*'topology'"):
        make()


def test_mix_says_what_it_takes():
    held = np.zeros((3, 2), np.float32)
    nested = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    np.testing.assert_array_equal(agents.mix(nested, held), held)
    with pytest.raises(ValueError, match=r"topology.mixing_matrix\(\); got a Topology"):
        agents.mix(agents.ring(3), held)
    with pytest.raises(ValueError, match=r"A = 3, .* got \(2, 2\)"):
        agents.mix(np.eye(2), held)
