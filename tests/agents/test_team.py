"""Strategies in a loop of one's own: what a `Team` does, against what the methods are by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixlab import agents
from tests.agents import tasks

KEY = jax.random.key(5)
A = 4


def stacked(seed=0):
    return jax.tree.map(jnp.asarray, tasks.mlps(A, seed))


def plain(strategy):
    return agents.Team(strategy, agents.Problem(optax.sgd(0.1)), "vmap")


def kernels(tree):
    return np.asarray(tree["params"]["Dense_1"]["kernel"], np.float64)


def shuffled():
    """One MLP, its hidden units in another order for every agent: leaves [A, ...]."""
    symmetry, one = tasks.mlp_symmetry(), tasks.agent(stacked(), 0)
    shuffle = jax.jit(jax.vmap(lambda key: symmetry.permute(symmetry.random(key), one)))
    return shuffle(jax.random.split(jax.random.key(1), A))


@pytest.mark.parametrize("name", agents.strategies.STRATEGIES)
def test_every_strategy_keeps_the_form_of_its_state(name):
    """So that its methods can be called again and again, and scanned over."""
    team = agents.Team(
        agents.parse(name, agents.complete(A)), tasks.mlp_problem(tasks.adam()), "vmap"
    )
    batch = jax.tree.map(lambda x: x[:, 0], tasks.batches(A, (tasks.FEATURES,), 1))

    def of(variables, batch):
        return tasks.mlp_gradients(variables, batch)[0]

    def step(key, state):
        grads = jax.vmap(of)(state.variables, batch)
        return team.step(key, state, agents.Gradients(grads, batch=batch, of=of), 3)

    state = jax.eval_shape(team.begin, stacked())
    assert jax.eval_shape(step, KEY, state) == state
    assert jax.eval_shape(team.communicate, KEY, state, 3) == state


def test_rounds_of_averaging_follow_the_time():
    topology = agents.one_peer_exponential(A)
    team, variables = plain(agents.wa(topology)), stacked()
    communicate = jax.jit(team.communicate)
    state, expected = team.begin(variables), kernels(variables)
    for t in range(4):
        state = communicate(KEY, state, t)
        expected = np.einsum("ij,jkl->ikl", topology.rounds[t % topology.period], expected)
        np.testing.assert_allclose(kernels(state.variables), expected, rtol=1e-5, atol=1e-6)
    assert (state.failed_at == -1).all()


def test_steps_have_the_momentum_that_the_strategy_adds():
    topology = agents.ring(A)
    team, variables = plain(agents.cdmsgd(topology, momentum=0.9)), stacked()
    step = jax.jit(team.step)
    state, x, v = team.begin(variables), kernels(variables), 0.0
    for t in range(3):
        grads = stacked(seed=10 + t)
        state = step(KEY, state, agents.Gradients(grads["params"]), t)
        v = 0.9 * v + kernels(grads)
        x = np.einsum("ij,jkl->ikl", topology.weights, x) - 0.1 * (kernels(grads) + 0.9 * v)
        np.testing.assert_allclose(kernels(state.variables), x, rtol=1e-5, atol=1e-5)


def test_what_is_random_depends_on_key_and_time():
    team = plain(agents.swarm(agents.complete(A)))
    state, none = team.begin(stacked()), jax.tree.map(jnp.zeros_like, stacked()["params"])
    step = jax.jit(team.step)

    def pair(key, t):
        moved = kernels(step(key, state, agents.Gradients(none), t).variables) != kernels(stacked())
        return tuple(np.flatnonzero(moved.any(axis=(1, 2))))

    pairs = [pair(KEY, t) for t in range(8)]
    assert all(len(found) == 2 for found in pairs)
    assert len(set(pairs)) > 1
    assert pairs == [pair(KEY, t) for t in range(8)]
    assert pairs != [pair(jax.random.key(6), t) for t in range(8)]


@pytest.mark.parametrize(
    "strategy", [agents.dimat(agents.ring(A)), agents.gossip(agents.ring(A), align="once")]
)
def test_agents_that_are_one_but_for_the_order_of_units_stay_it(strategy):
    team = agents.Team(strategy, tasks.mlp_problem(), "vmap")
    variables = shuffled()
    state = jax.jit(team.communicate)(KEY, team.begin(variables))
    images = team.problem.images
    outputs = jax.jit(jax.vmap(tasks.mlp, (0, None)))(state.variables, images)
    expected = tasks.mlp(tasks.agent(variables, 0), images)
    np.testing.assert_allclose(outputs, jnp.broadcast_to(expected, outputs.shape), atol=1e-5)
    found = jax.jit(team.consensus)(variables)
    assert found.plain_distance > 0.5
    assert found.aligned_distance < 1e-5
    np.testing.assert_allclose(tasks.mlp(found.aligned, images), expected, atol=1e-5)


def test_where_the_agents_lie_changes_nothing():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:A]), ("agents",))
    lying = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("agents"))
    team = agents.Team(agents.dimat(agents.ring(A)), tasks.mlp_problem(), per_device="vmap")
    here = team.begin(stacked())
    there = jax.device_put(here, lying)
    communicate = jax.jit(team.communicate)
    spread = communicate(KEY, there).variables
    tasks.assert_trees(communicate(KEY, here).variables, spread)
    assert len(kernel_devices(spread)) == A


def kernel_devices(variables):
    return variables["params"]["Dense_1"]["kernel"].sharding.device_set


def test_loop_and_vmap_agree_with_batch_norm():
    problem, one = tasks.cnn_problem()
    init = jax.jit(jax.vmap(lambda key: tasks.CNN.init(key, problem.images[:1])))
    variables = init(jax.random.split(jax.random.key(2), 3))
    batch = tasks.agent(jax.tree.map(lambda x: x[:, 0], tasks.batches(3, (4, 4, 1), 1)), slice(3))
    grads, stats = jax.jit(jax.vmap(tasks.cnn_gradients))(variables, batch)
    found = []
    for per_device in ("loop", "vmap"):
        team = agents.Team(agents.wa(agents.complete(3)), problem, per_device)

        def run(variables, grads, stats, team=team):
            state = team.step(KEY, team.begin(variables), agents.Gradients(grads, stats))
            return state, team.communicate(KEY, state)

        trained, merged = jax.jit(run)(variables, grads, stats)
        tasks.assert_trees(trained.variables["batch_stats"], stats)
        found.append(merged.variables)
    tasks.assert_trees(*found)
    assert jax.tree.structure(found[0]) == jax.tree.structure(one)


def test_cross_gradients_need_their_function():
    team, variables = plain(agents.cga(agents.ring(A))), stacked()
    batch = jax.tree.map(lambda x: x[:, 0], tasks.batches(A, (tasks.FEATURES,), 1))
    grads, _ = jax.jit(jax.vmap(tasks.mlp_gradients))(variables, batch)
    with pytest.raises(ValueError, match=r"cga takes gradients .*Gradients\(batch=..., of=...\)"):
        team.step(KEY, team.begin(variables), agents.Gradients(grads))
    gradients = agents.Gradients(
        grads, batch=batch, of=lambda variables, batch: tasks.mlp_gradients(variables, batch)[0]
    )
    state = jax.jit(lambda state: team.step(KEY, state, gradients))(team.begin(variables))
    assert np.isfinite(kernels(state.variables)).all()


def test_errors():
    team = plain(agents.wa(agents.ring(A)))
    with pytest.raises(ValueError, match=r"variables \{'params': ...\}"):
        team.begin(stacked()["params"])
    with pytest.raises(ValueError, match=r"Dense_0/bias has the shape \(7,\), .* the 4 agents"):
        team.begin(tasks.agent(stacked(), 0))
    with pytest.raises(ValueError, match="per_device must be auto, loop or vmap, got 'pmap'"):
        agents.Team(agents.wa(agents.ring(A)), agents.Problem(optax.sgd(0.1)), "pmap")
    aligning = plain(agents.dimat(agents.ring(A)))
    with pytest.raises(ValueError, match=r"Problem\(symmetry=..., images=...\)"):
        aligning.communicate(KEY, aligning.begin(stacked()))
