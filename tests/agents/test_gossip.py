"""Agents brought into one order of their units, and then averaged as they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import agents
from tests.agents import tasks
from tests.agents.test_dimat import adam_state, copies, logits, permutations, permute

PATH = agents.from_edges(4, [(0, 1), (1, 2), (2, 3)])  # the last agent is three edges away
ALL = np.ones(4, bool)


@functools.cache
def compiled(topology, backend="vmap", **options):
    """A round of gossip: the state, and the numbers of messages that were sent and received."""
    where = agents.parallel(topology.num_agents, backend)
    strategy = agents.gossip(topology, **options)
    problem = tasks.mlp_problem(tasks.adam())

    def program(axis, state, held, shared):
        weights, awake = shared
        network = tasks.network(axis, topology, weights, awake=awake)
        return strategy.communicate(network, problem, state), network.received()[0]

    run = where.compile(program)

    def call(state, awake=ALL, weights=topology.weights):
        if not isinstance(state.memory, np.ndarray):
            state = state._replace(memory=np.zeros(topology.num_agents, bool))
        shared = where.replicate((np.float32(weights), awake))
        return where.get(run(where.put(state), (), shared))

    return call


def planted():
    """Permuted copies of one model in the middle of training, moments and all."""
    state = adam_state(copies(4), 4)
    same = jax.tree.map(lambda x: np.repeat(x[:1], 4, 0), state.opt_state)
    return state._replace(opt_state=permute(same, permutations(4)))


def first(tree):
    return jax.tree.map(lambda x: np.repeat(x[:1], len(x), 0), tree)


@pytest.mark.parametrize("options", [{}, {"align": "universe"}, {"matching": "weights"}], ids=str)
def test_planted_permutations_are_undone(options):
    state = planted()
    found, counts = compiled(PATH, **{"align": "once", **options})(state)
    tasks.assert_trees(found.variables, first(state.variables))
    tasks.assert_trees(found.opt_state, first(state.opt_state))
    mean = jax.tree.map(lambda x: x.mean(0, keepdims=True), found.variables)
    np.testing.assert_allclose(logits(mean), logits(state.variables)[:1], atol=1e-5)
    assert found.memory.all()
    # Once along every edge of the tree, or from everyone to all but the root; then to neighbours.
    tree, neighbours = ([1, 1, 1, 0], [0, 1, 1, 1]), ([1, 2, 2, 1], [1, 2, 2, 1])
    if "align" in options:
        tree = ([3, 2, 2, 2], [0, 3, 3, 3])
    np.testing.assert_array_equal(counts.transpose(1, 2, 0), [tree, neighbours])


def test_agents_in_order_are_not_aligned_again():
    state = planted()._replace(memory=ALL)
    found, counts = compiled(PATH, align="once")(state)
    plain, _ = compiled(PATH)(state)
    tasks.assert_trees(found.variables, plain.variables)
    np.testing.assert_array_equal(counts[:, 0], np.zeros((4, 2)))
    again, counts = compiled(PATH, align="every")(state._replace(memory=()))
    tasks.assert_trees(again.variables, first(state.variables))
    assert counts[:, 0].sum() == 6


def test_who_was_absent_is_aligned_when_it_returns():
    """Without agent 1 nobody reaches agents 2 and 3, who wait for it in their own order."""
    run, state = compiled(PATH, align="once"), planted()
    awake = np.array([True, False, True, True])
    found, _ = run(state, awake, np.eye(4))
    np.testing.assert_array_equal(found.memory, [True, False, False, False])
    tasks.assert_trees(found.variables, state.variables)
    # Agent 0, whose order it is, may be absent when the others return.
    found, _ = run(found, ALL, np.eye(4))
    np.testing.assert_array_equal(found.memory, ALL)
    tasks.assert_trees(found.variables, first(state.variables))
    late = state._replace(memory=np.array([True, True, False, False]))
    late = late._replace(variables=jax.tree.map(lambda x: x[[0, 0, 2, 3]], state.variables))
    found, counts = run(late, np.array([False, True, True, True]), np.eye(4))
    tasks.assert_trees(found.variables, first(state.variables))
    np.testing.assert_array_equal(counts[:, 0], [[0, 0], [1, 0], [1, 1], [0, 1]])


def test_match_gives_the_permutations_alone():
    variables, ring = copies(3), agents.ring(3)
    state = tasks.start(variables, tasks.adam(), 3)
    problem = tasks.mlp_problem(tasks.adam())

    def both(axis, state):
        network = tasks.network(axis, ring)
        every = agents.gossip(ring, align="every")
        return every.match(network, problem, state), agents.dimat(ring).match(
            network, problem, state
        )

    to_first, to_own = tasks.over(3, both, state)
    for i in range(3):
        found = tasks.mlp_symmetry().permute(tasks.agent(to_first, i), tasks.agent(variables, i))
        tasks.assert_trees(found, tasks.agent(variables, 0))
        for slot, j in enumerate(ring.neighbours(i)):
            perms = jax.tree.map(lambda p, i=i, slot=slot: p[i, slot], to_own)
            found = tasks.mlp_symmetry().permute(perms, tasks.agent(variables, j))
            tasks.assert_trees(found, tasks.agent(variables, i))


def test_each_part_of_a_graph_has_an_order_of_its_own():
    parts = agents.from_edges(4, [(0, 1), (2, 3)], connected=False)
    state = planted()
    found, _ = compiled(parts, align="once")(state)
    expected = jax.tree.map(lambda x: x[[0, 0, 2, 2]], state.variables)
    tasks.assert_trees(found.variables, expected)


def agreement(variables):
    """The sum of the correlations of equally numbered units over all pairs of agents."""
    total, x = 0.0, np.asarray(tasks.mlp_problem().images, np.float64)
    layers = [np.repeat(x[None], 4, 0)]
    for name in ("Dense_0", "Dense_1"):
        own = variables["params"][name]
        layers.append(np.tanh(layers[-1] @ own["kernel"] + own["bias"][:, None]))
        z = layers[-1] - layers[-1].mean(1, keepdims=True)
        z /= z.std(1, keepdims=True)
        total += (np.square(z.sum(0)).sum() - np.square(z).sum()) / (2 * len(x))
    return total


def test_a_universe_agrees_at_least_as_well_as_the_tree():
    state = adam_state(tasks.mlps(4), 4)
    found = {
        align: compiled(PATH, align=align)(state, weights=np.eye(4))[0].variables
        for align in ("once", "universe")
    }
    for variables in found.values():
        np.testing.assert_allclose(logits(variables), logits(state.variables), atol=1e-5)
    before, once, universe = map(agreement, (state.variables, found["once"], found["universe"]))
    assert before + 1 < once < universe - 0.1


def test_a_universe_by_correlation_does_not_see_scales():
    """Units of unequal scale, so small that tanh is the identity; the next layer makes up for it.

    Only correlations tell that a large unit is the copy of a small one.
    """
    scales = np.exp(np.random.default_rng(0).uniform(-7, -3, size=(2, 4, 7))).astype(np.float32)
    model = jax.tree.map(lambda x: np.repeat(x, 4, 0), tasks.mlps(1))
    layers = [model["params"][f"Dense_{i}"] for i in range(3)]
    for i, scale in enumerate((scales[0], scales[1, :, :6])):
        layers[i]["kernel"] = layers[i]["kernel"] * scale[:, None]
        layers[i]["bias"] = layers[i]["bias"] * scale
        layers[i + 1]["kernel"] = layers[i + 1]["kernel"] / scale[..., None]
    state = adam_state(permute(model, permutations(4)), 4)
    found, _ = compiled(PATH, align="universe")(state, weights=np.eye(4))
    tasks.assert_trees(found.variables, model)


@pytest.mark.parametrize("backend", ["loop", "pmap"])
def test_every_backend_gives_the_same(backend):
    state = adam_state(tasks.mlps(4), 4)
    expected = compiled(PATH, align="universe")(state)
    found = compiled(PATH, backend, align="universe")(state)
    tasks.assert_trees(found, expected, rtol=1e-4, atol=1e-5)


def test_what_gossip_cannot_do_is_refused():
    with pytest.raises(ValueError, match="align='onse' is unknown; did you mean 'once'"):
        agents.gossip(PATH, align="onse")
    with pytest.raises(ValueError, match="unknown matching 'weight'; did you mean 'weights'"):
        agents.gossip(PATH, align="once", matching="weight")
    strategy = agents.gossip(PATH, align="universe")
    problem = tasks.mlp_problem()
    problem = problem._replace(images=jnp.stack([problem.images] * 4), local=True)
    state = tasks.start(tasks.mlps(4), problem.optimizer, 4)._replace(memory=~ALL)
    with pytest.raises(ValueError, match="every agent has its own; use images that all share"):
        tasks.over(
            4,
            lambda axis, s: strategy.communicate(tasks.network(axis, PATH), problem, s),
            state,
        )
