"""Whole experiments in which agents fail, and what every strategy makes of it."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents, experiment, train
from tests.run_config import get_config

A = 6
STRATEGIES = {
    "data_parallel": "ring",
    "dimat": "ring",
    "gossip(align='once')": "ring",
    "dpsgd": "ring",
    "swarm": "ring",
    "cga": "ring",
    "sgp": "ring",
    "choco": "ring",
    "fedavg": "star",
}


@pytest.fixture(autouse=True)
def promotion():
    """What optax needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def prepared(strategy, faults, topology="ring", optimizer="sgd(0.05)", num_agents=A, epochs=1):
    config = get_config()
    config.augment = "identity"
    config.model = "mlp(hidden=(8,))"
    config.agents, config.backend = num_agents, "vmap"
    config.strategy, config.faults, config.topology = strategy, faults, topology
    config.optimizer = optimizer
    config.matching_examples = 20
    config.epochs_per_round = epochs
    config.pretrain_epochs, config.rounds = 0, 3
    config.batch_size = 1400 // num_agents // 2  # three steps an epoch
    return experiment.prepare(config)


def trained(made, steps, carry=None, start=0):
    """The carries after each of some steps, with rounds between them as training has them."""
    carry = made.init() if carry is None else carry
    per_round = made.feed.steps_per_epoch
    with contextlib.closing(made.feed.steps(start, start + steps)) as batches:
        for step in range(start, start + steps):
            if step and step % per_round == 0 and made.strategy.every == "round":
                carry = made.communicate(carry, step // per_round)
            carry = made.step(carry, next(batches), step)
    return carry


def held(made, tree):
    return made.parallel.get(tree)


@pytest.mark.parametrize(("strategy", "topology"), STRATEGIES.items())
def test_nothing_leaks_from_who_is_absent(strategy, topology):
    """An agent that would send infinity; and every message sent is received or lost."""
    faults = "absent(agents=[1]) | byzantine(agents=[1], attack='infinite') | lost(0.3) | late(0.3)"
    made = prepared(strategy, faults, topology)
    carry = trained(made, 5)
    variables = held(made, carry.state.variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    assert np.all(held(made, carry.state.failed_at) == -1)
    traffic = made.traffic(carry)
    sent, received = (
        np.sum(list(traffic[way].values())) for way in ("bytes_sent", "bytes_received")
    )
    if strategy == "data_parallel":  # its messages are sent again until they arrive
        assert sent == received > 0
    else:
        assert sent > received > 0


def test_an_agent_that_lies_or_is_absent_may_diverge_and_stops_nobody():
    faults = "byzantine(agents=[0, 1, 2], attack='infinite')"
    made = prepared("dpsgd(merge='median')", faults)
    carry = trained(made, 4)
    params = held(made, carry.state.variables)["params"]["Dense_0"]["kernel"]
    finite = np.isfinite(params).all(axis=(1, 2))
    assert not finite[1]  # who hears liars alone
    assert finite[3:].all()
    assert np.all(held(made, carry.state.failed_at) == -1)


def test_data_parallel_agents_that_return_take_what_the_others_hold():
    made = prepared("data_parallel", "absent(agents=[2], start=1, stop=2)")
    per_round = made.feed.steps_per_epoch

    def apart(carry):
        params = held(made, carry.state.variables)["params"]["Dense_0"]["kernel"]
        return np.abs(params - params[0]).max(axis=(1, 2))

    carry = trained(made, 2 * per_round)
    np.testing.assert_array_equal(apart(carry) > 0, np.arange(A) == 2)
    before = made.traffic(carry)["bytes_received"]["parameters"]
    carry = trained(made, 1, carry, 2 * per_round)
    np.testing.assert_array_equal(apart(carry), 0)
    received = np.subtract(made.traffic(carry)["bytes_received"]["parameters"], before)
    np.testing.assert_array_equal(received > 0, np.arange(A) == 2)


@pytest.mark.parametrize("align", ["once", "every"])
def test_who_hears_nobody_is_not_brought_into_their_order(align):
    made = prepared(f"gossip(align='{align}')", "lost(1.0)")
    carry = trained(made, 2)
    before = held(made, carry.state.variables)
    after = held(made, made.communicate(carry, 1).state.variables)
    jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])


@pytest.mark.parametrize(
    "strategy", ["dpsgd", "cdmsgd(momentum=0.0)", "ldsgd(local=5, mixing=2, momentum=0.0)"]
)
def test_what_is_shown_of_a_merge_is_what_the_next_step_mixes(strategy):
    """The optimizer stands still, so a step does nothing but mix."""
    made = prepared(strategy, "lost(0.5)", "sequence([complete, disconnected])", "sgd(0.0)")
    carry, mixed = made.init(), []
    per_round = made.feed.steps_per_epoch
    with contextlib.closing(made.feed.steps(0, 3 * per_round)) as batches:
        for step in range(3 * per_round):
            before = held(made, carry.state.variables)
            begins = step % per_round == 0
            shown = made.communicate(carry, step // per_round) if begins else None
            shown = held(made, shown.state.variables) if begins else None
            carry = made.step(carry, next(batches), step)
            if begins:
                after = held(made, carry.state.variables)
                jax.tree.map(
                    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                    shown,
                    after,
                )
                kernels = [tree["params"]["Dense_0"]["kernel"] for tree in (before, after)]
                mixed.append(not np.allclose(*kernels))
    assert any(mixed)
    assert not all(mixed)


def test_push_sum_keeps_its_mass_when_agents_are_late_and_absent():
    made = prepared("sgp", "late(0.3) | dropout(0.3) | lost(0.2)", "ring(directed=True)")
    carry = trained(made, 30)
    mass = held(made, carry.state.memory)
    np.testing.assert_allclose(mass.sum(), A, rtol=1e-5)
    assert mass.std() > 0.01


def test_lost_messages_are_sent_and_not_received():
    made = prepared("dpsgd", "lost(0.5)", epochs=20)
    traffic = made.traffic(trained(made, 40))
    assert traffic["messages"] == [80] * A
    arrived = np.divide(
        traffic["bytes_received"]["parameters"], traffic["bytes_sent"]["parameters"]
    )
    assert 0.3 < arrived.mean() < 0.7


def test_swarm_meets_on_the_edges_of_the_round():
    made = prepared("swarm", "none", "matchings(rounds=5)", epochs=20)
    assert sum(made.traffic(trained(made, 40))["messages"]) == 80  # two in every step


def test_liars_do_not_count_in_the_consensus():
    """The honest drifted apart a little, and have their units in different orders."""
    made = prepared("wa", "byzantine(agents=[1], attack='alie')")
    rng = np.random.default_rng(0)

    def drifted(x):
        x = np.repeat(x[:1], A, 0)
        noise = rng.normal(size=x.shape, scale=0.1 * x.std() + 0.01).astype(np.float32)
        noise[1] = np.nan
        return x + noise

    def distance(params):
        leaves = [np.delete(x, 1, 0).astype(float) for x in jax.tree.leaves(params)]
        apart = sum(np.square(x - x.mean(0)).sum() for x in leaves)
        return np.sqrt(apart / sum(np.square(x).sum() for x in leaves))

    variables = jax.tree.map(drifted, held(made, made.init().state.variables))
    aligned = distance(variables["params"])
    hidden, output = variables["params"]["Dense_0"], variables["params"]["head"]
    for i in range(A):
        order = rng.permutation(8)
        hidden["kernel"][i] = hidden["kernel"][i][:, order]
        hidden["bias"][i] = hidden["bias"][i][order]
        output["kernel"][i] = output["kernel"][i][order]
    found = made.consensus(made.parallel.put(variables), 0)
    assert distance(variables["params"]) > 2 * aligned
    np.testing.assert_allclose(found["plain_distance"], distance(variables["params"]), rtol=1e-5)
    np.testing.assert_allclose(found["consensus_distance"], aligned, rtol=1e-5)


def test_the_absent_do_not_count_in_the_consensus_of_their_rounds():
    made = prepared("wa", "absent(agents=[1], start=1, stop=2)")
    variables = held(made, made.init().state.variables)
    for leaf in jax.tree.leaves(variables):
        leaf[1] = np.nan
    found = [made.consensus(made.parallel.put(variables), r)["plain_distance"] for r in (0, 1, 2)]
    np.testing.assert_array_equal(np.isfinite(found), [False, True, False])


def test_a_run_in_which_a_fifth_fails_ends_with_every_checkpoint_and_tells(tmp_path):
    config = get_config()
    config.model, config.backend = "mlp(hidden=(8,))", "vmap"
    config.agents, config.batch_size, config.matching_examples = 5, 140, 20
    config.strategy, config.faults = "wa", "crash(0.2, at=1)"
    config.pretrain_epochs, config.rounds = 0, 3
    report = train.train(config, tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["round"] == 3
    saved = {int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").iterdir()}
    assert {r["step"] for r in records if r["phase"] == "local"} <= saved
    told = " ".join(report.read_text().split())
    assert "absent 2 of 15 times" in told
    assert "rounds 1 to 2: agent" in told


def test_cga_agents_that_are_not_asked_do_not_answer():
    """Agent 0 hears agent 1, which does not hear what it is asked."""
    topology = agents.complete(2)
    strategy = agents.cga(topology, momentum=0.0)
    weights = jnp.asarray([[0.5, 0.5], [0.0, 1.0]])
    x = jnp.asarray([[1.0, 2.0], [3.0, -1.0]])

    def gradient(variables, batch):
        return jax.tree.map(lambda a: a - batch, variables["params"])

    def step(axis, variables, batch):
        problem = agents.Problem(strategy.optimizer(optax.sgd(0.1)))
        opt_state = axis.each(problem.optimizer.init)(variables["params"])
        failed = jnp.full(2, -1)
        state = agents.AgentState(variables, opt_state, failed)
        grads = axis.each(gradient)(variables, batch)
        network = agents.Network(axis, weights, topology.adjacency, jax.random.key(0), jnp.int32(0))
        found = agents.Gradients(grads, None, batch, gradient)
        after = strategy.local_step(network, problem, state, found)
        return after.variables["params"], network.received()[0]

    where = agents.parallel(2, "vmap")
    batch = jnp.asarray([[0.0, 0.0], [10.0, 10.0]])
    run = where.compile(lambda axis, state, held, shared: step(axis, state, held))
    moved, counts = where.get(run(where.put({"params": x}), where.put(batch), {}))
    mixed = weights @ x
    alone = jnp.diag(weights)[:, None] * (x - batch)
    np.testing.assert_allclose(moved, mixed - 0.1 * alone, rtol=1e-5)
    np.testing.assert_array_equal(counts[:, 1], 0)  # no gradients are sent
