"""Plans of faults: what they draw, how they join, and that mixing stays a mixing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.agents import Network, faults, topology
from mixlab.agents.parallel import whole_axis

A = 10
KEY = jax.random.key(0)


def over(plan, rounds):
    """The faults of all rounds, stacked."""
    times = jnp.arange(rounds, dtype=jnp.int32)
    return jax.jit(jax.vmap(lambda time: plan.sample(KEY, time)))(times)


def test_every_kind_does_what_it_says():
    plan = faults.parse(
        "dropout(p=0.3, rounds=2) | late(p=0.2) | lost(p=0.1, symmetric=True)"
        " | byzantine(count=3, attack=ipm(tau=0.5))",
        A,
    )
    found = over(plan, 200)
    awake, late, lost, bad = map(np.asarray, found)
    np.testing.assert_array_equal(awake[::2], awake[1::2])
    assert np.any(awake[1:-1:2] != awake[2::2])
    assert abs(awake.mean() - 0.7) < 0.05
    assert abs(late[awake].mean() - 0.2) < 0.04
    assert not late[~awake].any()
    np.testing.assert_array_equal(lost, lost.swapaxes(1, 2))
    assert abs(lost.mean() - 0.1 * (A - 1) / A) < 0.02
    assert not lost[:, np.arange(A), np.arange(A)].any()
    assert np.all(bad == bad[0])
    assert bad[0].sum() == 3
    assert plan.attack.name == "ipm"
    assert plan.data_attack is None
    assert plan.any_absent
    assert plan.any_late
    assert plan.any_lost
    assert plan.any_byzantine

    one_way = np.asarray(over(faults.lost(A, 0.3), 50).lost)
    assert abs((one_way & one_way.swapaxes(1, 2)).mean() / one_way.mean() - 0.3) < 0.05


def test_a_plan_strikes_a_network_from_round_0_on():
    graph = topology.complete(4)
    plan = faults.parse(
        "absent(agents=(1,)) | lost(p=0.5) | byzantine(agents=(2,), attack=alie)", 4
    )
    axis = whole_axis(jnp.arange(4), jax.vmap)
    well = Network(axis, jnp.asarray(graph.weights), graph.adjacency, KEY, jnp.int32(5))

    before = plan.strike(well, KEY, -1, by_step=False, push=False)
    np.testing.assert_array_equal(before.weights, graph.weights)
    assert np.all(before.taking_part())
    hit = plan.strike(well, KEY, 0, by_step=False, push=False)
    np.testing.assert_array_equal(hit.taking_part(), [True, False, False, True])
    np.testing.assert_array_equal(hit.weights[1], np.eye(4)[1])
    np.testing.assert_allclose(hit.weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(hit.weights[hit.lost], 0)
    assert not hit.lost[1].any()  # who is absent is sent nothing
    assert not hit.lost[:, 1].any()
    assert hit.late is None
    pushed = plan.strike(well, KEY, 0, by_step=False, push=True)
    np.testing.assert_allclose(pushed.weights.sum(0), 1, rtol=1e-6)
    by_step = [
        plan.strike(dataclasses.replace(well, time=time), KEY, 0, by_step=True, push=False).lost
        for time in (1, 2, 3)
    ]
    assert not np.array_equal(by_step[0], by_step[1]) or not np.array_equal(by_step[1], by_step[2])
    held = hit.keep_absent(jnp.zeros((4, 2)), jnp.ones((4, 2)))
    np.testing.assert_array_equal(held[:, 0], [1, 0, 1, 1])


def test_of_who_was_absent_and_is_late_others_see_what_it_last_sent():
    """Agent 1 is absent after it sent once, agent 2 before it ever did."""
    axis, graph = whole_axis(jnp.arange(3), jax.vmap), topology.complete(3)
    awake = np.array([[True, True, False], [True, False, False], [True, True, True]])
    late = np.array([[False] * 3, [False] * 3, [False, True, True]])
    outbox = None
    for time in range(3):
        net = Network(
            axis,
            jnp.asarray(graph.weights),
            graph.adjacency,
            KEY,
            jnp.int32(time),
            awake=jnp.asarray(awake[time]),
            late=jnp.asarray(late[time]),
            outbox=outbox,
        )
        shown = net.select(jnp.arange(3) + 10 * time, jnp.arange(3))
        outbox = net.received()[1]
    np.testing.assert_array_equal(shown, [20, 1, 22])


def test_those_who_fail_are_the_same_until_they_return():
    awake = np.asarray(over(faults.crash(A, 0.2, at=3, back=6), 8).awake)
    assert awake[:3].all()
    assert awake[6:].all()
    assert np.all(awake[3:6] == awake[3])
    assert awake[3].sum() == A - 2
    awake = np.asarray(over(faults.parse("absent(agents=(0, 3), start=2)", A), 5).awake)
    assert awake[:2].all()
    np.testing.assert_array_equal(np.flatnonzero(~awake[4]), [0, 3])
    np.testing.assert_array_equal(np.flatnonzero(~awake[2]), [0, 3])


def test_without_faults_there_is_nothing_to_compile():
    plan = faults.parse("", A)
    assert not plan
    assert not (plan.any_absent)
    assert not (plan.any_late)
    assert not (plan.any_lost)
    awake, late, lost, bad = plan.sample(KEY, 0)
    assert awake.all()
    assert not (late.any())
    assert not (lost.any())
    assert not (bad.any())
    plan = faults.byzantine(A, agents=(1,), attack="label_flip")
    assert plan.any_byzantine
    assert plan.attack is None
    assert plan.data_attack.name == "label_flip"


def test_mixing_without_what_does_not_arrive():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.dirichlet(np.ones(A), size=A), jnp.float32)
    symmetric = jnp.full((A, A), 1 / A, jnp.float32)
    plan = faults.parse("dropout(0.3) | lost(0.3)", A)
    link = faults.parse("dropout(0.3) | lost(0.3, symmetric=True)", A)
    fault, both_ways = plan.sample(KEY, 1), link.sample(KEY, 1)
    awake, lost = fault.awake, np.asarray(fault.lost)
    gone = np.asarray(lost | ~awake | ~awake[:, None]) & ~np.eye(A, dtype=bool)
    assert 1 < (~awake).sum() < A - 1

    rows = np.asarray(faults.renormalise(weights, awake, fault.lost))
    columns = np.asarray(faults.renormalise_columns(weights.T, awake, fault.lost))
    doubly = np.asarray(faults.renormalise(symmetric, both_ways.awake, both_ways.lost))
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(columns.sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(doubly.sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_array_equal(rows[~awake], np.eye(A)[~awake])
    np.testing.assert_array_equal(columns[:, ~awake], np.eye(A)[:, ~awake])
    assert not rows[gone].any()
    assert not columns[gone].any()
    kept = ~gone & ~np.eye(A, dtype=bool)
    np.testing.assert_array_equal(rows[kept], np.asarray(weights)[kept])
    np.testing.assert_array_equal(columns[kept], np.asarray(weights.T)[kept])
    nothing = faults.none(A).sample(KEY, 0)
    np.testing.assert_array_equal(faults.renormalise(weights, nothing.awake, nothing.lost), weights)


def test_an_account_for_people():
    plan = faults.parse(
        "absent(agents=(1, 4), start=3, stop=5) | absent(agents=(2,), start=7)"
        " | lost(p=1.0) | byzantine(agents=(0,), attack=mimic())",
        A,
    )
    ring = np.roll(np.eye(A), 1, axis=1) + np.roll(np.eye(A), -1, axis=1)
    assert plan.describe(KEY, 8, ring).splitlines() == [
        "faults in 8 rounds of 10 agents: agent 0 Byzantine (mimic); absent 5 of 80 times; "
        "140 of 140 messages lost",
        "rounds 3 to 4: agents 1, 4 absent",
        "round 7: agent 2 absent",
    ]
    assert faults.none(A).describe(KEY, 5) == "5 rounds without faults"
    many = faults.dropout(100, 0.5).describe(KEY, 50).splitlines()
    assert "others absent" in many[1]
    assert many[-1] == "and 30 more rounds in which agents were absent or late"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropot(0.1)", "did you mean 'dropout'"),
        ("dropout(p=2)", r"dropout takes a probability p in \[0, 1\], got 2"),
        ("dropout(0.1, rounds=0)", "at least 1 round"),
        ("crash(fraction=0.2, at=3, back=3)", "crash needs back after at, got at=3, back=3"),
        ("absent(agents=(0, 10))", r"absent: agents are 0 to 9, got \[10\]"),
        ("byzantine(count=11, attack='alie')", "a count of 0 to 10 agents, got 11"),
        ("byzantine(1.5, attack='alie')", "a whole number of agents, got 1.5"),
        ("absent(1)", r"absent takes a list of agents, such as agents=\[1\]"),
        ("byzantine(attack='alie')", "either count= or agents="),
        ("byzantine(count=1, attack='alei')", "did you mean 'alie'"),
        ("late(0.1) | alie()", "alie is an attack, not a kind of fault"),
        ("byzantine(1, attack='ipm') | byzantine(1, attack='alie')", "once"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        faults.parse(text, A)


def test_plans_for_other_numbers_of_agents():
    with pytest.raises(ValueError, match="for 4 and for 5 agents"):
        faults.parse(faults.late(5, 0.1), 4)
