"""Federated rounds: what the server makes of the clients' models, and who takes part."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents, trees
from tests.agents import tasks

A, STAR = 5, agents.star(5)


def clients(seed):
    """Models after local training, leaves [A, ...]."""
    rng = np.random.default_rng(seed)
    tree = {
        "params": {"w": rng.normal(size=(A, 2, 3))},
        "batch_stats": {"mean": rng.random((A, 2))},
    }
    return jax.tree.map(np.float32, tree)


class Run:
    """A strategy on a star, one compiled program for the end of a round."""

    def __init__(self, text, topology=STAR, examples=None):
        self.strategy = agents.parse(text, topology)
        self.problem = agents.Problem(tasks.adam(), examples=examples)
        self.axis, self.topology = tasks.axis(A), topology
        start = tasks.start(clients(0), self.problem.optimizer, A)
        self.state = self.strategy.init(self.axis, self.problem, start)

        @jax.jit
        def communicate(state, weights):
            net = tasks.network(self.axis, topology, weights)
            return self.strategy.communicate(net, self.problem, state), net.received()[0]

        self.program = communicate

    def round(self, variables, weights=STAR.weights, awake=None):
        """The state after the clients got to `variables` and met; absent ones stay as they are."""
        state = self.state._replace(
            variables=variables,
            opt_state=jax.tree.map(lambda x: jnp.ones_like(x), self.state.opt_state),
        )
        after, self.counts = self.program(state, np.float32(weights))
        if awake is not None:
            after = trees.where(jnp.asarray(awake), after, self.state)
        self.state = after
        return jax.tree.map(np.asarray, after)


# What a server makes of a round's mean change d: `(memory, d) -> (memory, step)`.


def plain(memory, d):
    return memory, d


def heavy(memory, d):
    memory = 0.9 * memory + d
    return memory, 0.5 * memory


def nesterov(memory, d):
    memory = 0.9 * memory + d
    return memory, 0.7 * (d + 0.9 * memory)


def adam(memory, d):
    m, v = (0, 1e-6) if np.isscalar(memory) else memory
    m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d**2
    return (m, v), 0.1 * m / (np.sqrt(v) + 1e-3)


@pytest.mark.parametrize(
    ("strategy", "weighted"),
    [
        ("fedavg", True),
        ("fedavg(weighted=False)", False),
        ("fedavgm(momentum=0.0)", True),
        ("fedprox", False),
        ("fedprox(weighted=True)", True),
    ],
)
def test_clients_count_by_their_examples_where_the_method_says_so(strategy, weighted):
    examples = np.float32([1, 2, 3, 4, 50])
    awake = np.array([True, True, False, True, True])
    weights = agents.faults.renormalise(jnp.float32(STAR.weights), awake, jnp.zeros((A, A), bool))
    found = Run(strategy, examples=jnp.array(examples)).round(clients(1), weights, awake)
    share = np.where(awake, examples if weighted else 1, 0)
    for name, leaves in (("params", "w"), ("batch_stats", "mean")):
        models = clients(1)[name][leaves]
        expected = np.einsum("a,a...->...", share / share.sum(), models)
        np.testing.assert_allclose(found.variables[name][leaves][0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("fedavg", plain),
        ("fedavgm(learning_rate=0.5)", heavy),
        ("fedadam(learning_rate=0.1)", adam),
        ("diloco", nesterov),
    ],
)
def test_the_server_steps_along_the_mean_change(text, server):
    run = Run(text)
    held = {name: tree for name, tree in clients(0).items()}
    x, mean = held["params"]["w"][0].astype(float), held["batch_stats"]["mean"][0]
    memory = 0.0
    for seed in (1, 2, 3):
        trained = clients(seed)
        memory, step = server(memory, trained["params"]["w"].mean(0) - x)
        x, mean = x + step, trained["batch_stats"]["mean"].mean(0)
        found = run.round(trained)
        for i in range(A):
            np.testing.assert_allclose(found.variables["params"]["w"][i], x, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.variables["batch_stats"]["mean"][i], mean, rtol=1e-5)
    # The clients' own optimizers begin anew, but for DiLoCo.
    kept = jax.tree.leaves(found.opt_state)[0]
    assert (kept == (1 if text == "diloco" else 0)).all()


def test_absent_clients_are_left_out_until_they_have_the_model():
    run = Run("fedavg")
    awake = np.array([True, True, False, True, True])
    net = agents.faults.renormalise(jnp.float32(STAR.weights), awake, jnp.zeros((A, A), bool))
    first, second, third = clients(1), clients(2), clients(3)
    found = run.round(first, net, awake).variables["params"]["w"]
    expected = first["params"]["w"][awake].mean(0)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    np.testing.assert_array_equal(found[2], clients(0)["params"]["w"][0])  # as it was
    # Back again, it began this round from the old model: left out, but it gets the new one.
    found = run.round(second).variables["params"]["w"]
    np.testing.assert_allclose(found[2], second["params"]["w"][awake].mean(0), atol=1e-6)
    found = run.round(third).variables["params"]["w"]
    np.testing.assert_allclose(found[2], third["params"]["w"].mean(0), atol=1e-6)
    # Without its server nobody learns anything.
    awake = np.arange(A) > 0
    net = agents.faults.renormalise(jnp.float32(STAR.weights), awake, jnp.zeros((A, A), bool))
    alone = run.round(first, net, awake).variables["params"]["w"]
    np.testing.assert_array_equal(alone[1:], first["params"]["w"][1:])


def test_a_fraction_of_the_clients_trains_and_counts():
    run = Run("fedavg(fraction=0.4, seed=3)")
    chosen, counts = [], []
    for seed in (1, 2, 3):
        before = run.state.variables["params"]["w"]
        grads = jax.tree.map(jnp.ones_like, run.state.variables["params"])
        stats = run.state.variables["batch_stats"]
        found = agents.Gradients(grads, stats, {}, lambda variables, batch: variables["params"])
        net = tasks.network(run.axis, STAR)
        trained = run.strategy.local_step(net, run.problem, run.state, found)
        moved = np.asarray((trained.variables["params"]["w"] != before).any(axis=(1, 2)))
        assert moved.sum() == 2
        chosen.append(moved)
        models = clients(seed)["params"]["w"]
        found = run.round(clients(seed)).variables["params"]["w"]
        np.testing.assert_allclose(found, np.stack([models[moved].mean(0)] * A), atol=1e-6)
        counts.append(np.asarray(run.counts))
    assert len({tuple(moved) for moved in chosen}) > 1
    # They send what they made of the model, and those of the next round receive it; both are
    # messages of parameters and of statistics, and agent 0 needs none to reach itself.
    for now, after, count in zip(chosen, chosen[1:], counts, strict=False):
        up, down = count[1:, :2], count[1:, 2:]
        np.testing.assert_array_equal(up[..., 0], np.stack([now[1:]] * 2, 1))
        np.testing.assert_array_equal(down[..., 1], np.stack([after[1:]] * 2, 1))
        np.testing.assert_array_equal(count[0, 2:, 0], [after[1:].sum()] * 2)


def test_fedprox_draws_back_to_the_server():
    strategy = agents.fedprox(STAR, mu=0.5)
    problem, axis = agents.Problem(optax.sgd(0.1)), tasks.axis(A)
    state = strategy.init(axis, problem, tasks.start(clients(0), problem.optimizer, A))
    anchor = np.asarray(state.variables["params"]["w"])
    moved = state._replace(variables=clients(1))
    zero = jax.tree.map(jnp.zeros_like, moved.variables["params"])
    stats = moved.variables["batch_stats"]
    found = agents.Gradients(zero, stats, {}, lambda variables, batch: zero)
    x = clients(1)["params"]["w"]
    found = strategy.local_step(tasks.network(axis, STAR), problem, moved, found)
    expected = x - 0.1 * 0.5 * (x - anchor)
    np.testing.assert_allclose(found.variables["params"]["w"], expected, atol=1e-6)


def test_a_robust_server_survives_a_client_out_of_its_mind():
    trained = clients(1)
    trained["params"]["w"][3] = 1e6
    found = Run("fedavg(merge='median')").round(trained).variables["params"]["w"]
    np.testing.assert_allclose(found[0], np.median(trained["params"]["w"], axis=0), atol=1e-5)


def test_a_late_client_is_not_added_again():
    """A server at 5 has heard of clients at -1 and 1; then one of them is late, round by round."""
    topology, axis = agents.star(2), tasks.axis(2)
    strategy, problem = agents.fedavg(topology), agents.Problem(optax.sgd(0.1))
    at = {"params": {"w": np.float32([[-1.0], [1.0]])}}
    state = strategy.init(axis, problem, tasks.start(at, problem.optimizer, 2))
    server = jax.tree.map(lambda x: jnp.full_like(x, 5.0), state.memory.variables)
    state = state._replace(memory=state.memory._replace(variables=server))

    @jax.jit
    def communicate(state, late, outbox):
        net = tasks.network(axis, topology, late=late, outbox=outbox)
        return strategy.communicate(net, problem, state), net.received()[1]

    outbox, late = None, np.array([False, False])
    for _ in range(4):
        state, outbox = communicate(state._replace(variables=at), late, outbox)
        np.testing.assert_allclose(state.memory.variables["params"]["w"], 0, atol=1e-6)
        late = np.array([False, True])


def test_rules_do_not_count_clients_that_take_no_part():
    trained = clients(1)
    run = Run("fedavg(merge='median', fraction=0.5)")
    before = np.asarray(run.state.variables["params"]["w"][0])
    drew = [run.round(trained).variables["params"]["w"][0] for _ in range(2)]
    assert np.abs(drew[0] - before).max() > 0.1
    assert any(
        np.allclose(drew[0], np.median(trained["params"]["w"][list(who)], axis=0), atol=1e-5)
        for who in itertools.combinations(range(A), round(0.5 * A))
    )


def test_what_cannot_be_federated_is_refused():
    for text in ("fedavg", "fedprox", "fedavgm", "fedadam", "diloco"):
        agents.parse(text, agents.complete(4))
        with pytest.raises(ValueError, match=rf"{text} needs agent 0 joined.*ring.*star or a comp"):
            agents.parse(text, agents.ring(4))
    for arguments, message in (
        ("fraction=0", r"fraction.*\(0, 1\], got 0"),
        ("opt_state='permute'", r"opt_state='permute'.*keep"),
    ):
        with pytest.raises(ValueError, match=message):
            agents.parse(f"fedavg({arguments})", STAR)
    with pytest.raises(ValueError, match=r"mu must be at least 0, got -1"):
        agents.fedprox(STAR, mu=-1)
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\), got 1.0 and 1"):
        agents.fedavgm(STAR, momentum=1)
    with pytest.raises(ValueError, match=r"eps > 0, got 0.01, 0.9, 0.99 and 0"):
        agents.fedadam(STAR, eps=0)
