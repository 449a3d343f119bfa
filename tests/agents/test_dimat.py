"""Aligned merging and consensus, held against the alignment functions and a restatement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import agents, align
from mixlab.agents.network import neighbour_slots
from mixlab.agents.strategies import alignment
from tests.agents import tasks
from tests.reference import decentral

STAR = agents.star(4)  # the hub has three neighbours, the others one and two places of padding


def permutations(num_agents, seed=0):
    """One permutation of every hidden group for each agent; agent 0 keeps its order."""
    rng = np.random.default_rng(seed)
    groups = tasks.mlp_symmetry().groups
    return [
        {name: rng.permutation(n) if i else np.arange(n) for name, n in groups.items()}
        for i in range(num_agents)
    ]


def permute(trees, perms):
    """Agent i's slice of `trees` permuted by `perms[i]`."""
    one = [tasks.mlp_symmetry().permute(p, tasks.agent(trees, i)) for i, p in enumerate(perms)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *one)


def copies(num_agents):
    """Agents that compute the same function with their hidden units in different orders."""
    same = jax.tree.map(lambda x: np.repeat(x, num_agents, 0), tasks.mlps(1))
    return permute(same, permutations(num_agents))


def logits(variables):
    return np.asarray(jax.vmap(tasks.mlp, (0, None))(variables, tasks.mlp_problem().images))


def adam_state(variables, num_agents):
    """A state in the middle of training: all moments and counts differ."""
    state = tasks.start(variables, tasks.adam(), num_agents)
    adam, rest = state.opt_state
    moments = [tasks.mlps(num_agents, seed)["params"] for seed in (5, 6)]
    count = 3 + np.arange(num_agents, dtype=np.int32)
    adam = adam._replace(count=count, mu=moments[0], nu=jax.tree.map(np.square, moments[1]))
    return state._replace(opt_state=(adam, rest), failed_at=np.arange(num_agents, dtype=np.int32))


@functools.cache
def compiled(opt_state="reset", statistic="correlation"):
    """`communicate` of four agents on the star."""
    where = agents.parallel(4, "vmap")
    strategy = agents.dimat(STAR, opt_state=opt_state, statistic=statistic)
    problem = tasks.mlp_problem(tasks.adam())
    program = where.compile(
        lambda axis, s, held, w: strategy.communicate(tasks.network(axis, STAR, w), problem, s)
    )

    def run(state, weights=STAR.weights):
        return where.get(program(where.put(state), (), where.replicate(np.float32(weights))))

    return run


@functools.cache
def hidden(i):
    """The activations [S, n] of both hidden layers of agent i, in float64."""
    params = tasks.agent(tasks.mlps(4)["params"], i)
    x, found = np.asarray(tasks.mlp_problem().images, np.float64), []
    for layer in (params["Dense_0"], params["Dense_1"]):
        x = np.tanh(x @ layer["kernel"] + layer["bias"])
        found.append(x)
    return found


def restated(state, weights, match):
    """Each agent's neighbours matched, permuted and averaged, moments likewise."""
    axes = {}
    for tree in ("params", "mu", "nu"):
        for layer, (before, after) in enumerate([(None, 0), (0, 1), (1, None)]):
            axes[f"{tree}/{layer}/kernel"], axes[f"{tree}/{layer}/bias"] = (before, after), (after,)
    adam = state.opt_state[0]
    whole = {"params": state.variables["params"], "mu": adam.mu, "nu": adam.nu}
    flat = [
        {
            f"{tree}/{layer}/{leaf}": whole[tree][f"Dense_{layer}"][leaf][i]
            for tree, layer, leaf in (name.split("/") for name in axes)
        }
        for i in range(4)
    ]
    merged = []
    for i in range(4):
        perms = [
            {g: match(a.T, b.T) for g, (a, b) in enumerate(zip(hidden(i), hidden(j), strict=True))}
            for j in range(4)
        ]
        merged.append(decentral.aligned_average(axes, flat, perms, weights[i]))
    stacked = {name: np.float32([one[name] for one in merged]) for name in axes}
    return {
        tree: {
            f"Dense_{layer}": {
                leaf: stacked[f"{tree}/{layer}/{leaf}"] for leaf in ("kernel", "bias")
            }
            for layer in range(3)
        }
        for tree in whole
    }


@pytest.mark.parametrize("rule", ["metropolis", "uniform"])
def test_agents_of_unequal_degree_merge_as_restated_moments_with_them(rule):
    weights = agents.star(4, weights=rule).weights
    state = adam_state(tasks.mlps(4), 4)
    found = compiled("permute")(state, weights)
    expected = restated(state, weights, decentral.match_correlation)
    tasks.assert_trees(found.variables, {"params": expected["params"]})
    adam = found.opt_state[0]
    tasks.assert_trees((adam.mu, adam.nu), (expected["mu"], expected["nu"]))
    # Each agent's own count of steps, an integer, is not averaged.
    np.testing.assert_array_equal(adam.count, state.opt_state[0].count)
    np.testing.assert_array_equal(found.failed_at, state.failed_at)
    # The units did move: the plain average is another.
    plain = jax.tree.map(lambda x: np.float32(decentral.mix(weights, x)), state.variables)
    assert not np.allclose(
        plain["params"]["Dense_0"]["kernel"], found.variables["params"]["Dense_0"]["kernel"]
    )


def test_the_second_moment_matches_otherwise():
    state = adam_state(tasks.mlps(4), 4)
    found = compiled(statistic="second_moment")(state)

    def match(a, b):
        one, other = {"g": np.float32(a.T)}, {"g": np.float32(b.T)}
        return np.asarray(align.match_activations(one, other, statistic="second_moment")["g"])

    expected = restated(state, STAR.weights, match)
    tasks.assert_trees(found.variables, {"params": expected["params"]})
    other = compiled()(state).variables["params"]
    assert not np.allclose(other["Dense_1"]["kernel"], expected["params"]["Dense_1"]["kernel"])


@pytest.mark.parametrize("opt_state", ["reset", "keep"])
def test_other_optimizer_states(opt_state):
    state = adam_state(tasks.mlps(4), 4)
    found, permuted = compiled(opt_state)(state), compiled("permute")(state)
    tasks.assert_trees(found.variables, permuted.variables)
    fresh = jax.vmap(tasks.adam().init)(found.variables["params"])
    expected = state.opt_state if opt_state == "keep" else jax.tree.map(np.asarray, fresh)
    tasks.assert_trees(found.opt_state, expected, rtol=0, atol=0)


def test_permuted_copies_of_one_model_merge_to_it():
    state = adam_state(copies(4), 4)
    same = jax.tree.map(lambda x: np.repeat(x[:1], 4, 0), state.opt_state)
    state = state._replace(opt_state=permute(same, permutations(4)))
    found = compiled("permute")(state)
    # Each agent keeps the model in its own order, and moments that belong to it.
    tasks.assert_trees(found.variables, state.variables)
    tasks.assert_trees(found.opt_state, state.opt_state)
    np.testing.assert_allclose(logits(found.variables), logits(state.variables), atol=1e-5)
    plain = jax.tree.map(lambda x: np.float32(decentral.mix(STAR.weights, x)), state.variables)
    assert np.abs(logits(plain) - logits(state.variables)).max() > 0.1


def test_batch_statistics_are_re_estimated_before_and_after():
    """Before, so that activations are compared at their right scale; after, for the merged."""
    problem, first = tasks.cnn_problem()
    ((group, size),) = problem.symmetry.groups.items()
    roll = {group: np.roll(np.arange(size), 1)}
    variables = jax.tree.map(lambda *x: np.stack(x), first, problem.symmetry.permute(roll, first))
    # Statistics so stale that every unit would be dead, and match nothing.
    variables["batch_stats"] = jax.tree.map(lambda x: x + 9, variables["batch_stats"])
    rng = np.random.default_rng(0)
    variables["params"] = jax.tree.map(
        lambda x: x + 0.1 * rng.random(x.shape, np.float32), variables["params"]
    )
    state = tasks.start(variables, problem.optimizer, 2)
    strategy = agents.dimat(agents.ring(2))
    weights = np.float32([[0.75, 0.25], [0.5, 0.5]])
    found = tasks.over(
        2,
        lambda axis, s, w: strategy.communicate(tasks.network(axis, agents.ring(2), w), problem, s),
        state,
        shared=[weights],
    )
    batch_stats = jax.jit(problem.batch_stats)
    own = [batch_stats(tasks.agent(variables, i), problem.images) for i in range(2)]
    for i in range(2):
        perms = align.activation_matching(
            problem.symmetry, tasks.CNN.apply, own[i], own[1 - i], problem.images
        )
        np.testing.assert_array_equal(perms[group], np.roll(np.arange(size), 2 * i - 1))
        other = problem.symmetry.permute(perms, own[1 - i])
        merged = jax.tree.map(
            lambda a, b, w=weights[i], i=i: a * w[i] + b * w[1 - i], own[i], other
        )
        expected = batch_stats(merged, problem.images)
        tasks.assert_trees(tasks.agent(found.variables, i), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- faults, images, other matchings

TRIANGLE = agents.complete(3)


@functools.cache
def triangle(local=False, faulty=False, **options):
    """A round of three agents; with `faulty` agent 2 lies, or agent 1 is late."""
    where = agents.parallel(3, "vmap")
    strategy, problem = agents.dimat(TRIANGLE, **options), tasks.mlp_problem()
    rng = np.random.default_rng(4)
    images = rng.normal(size=(3, 40, tasks.FEATURES)).astype(np.float32)

    def attack(key, messages, byzantine):
        return jax.tree.map(
            lambda x: jnp.where(byzantine.reshape(3, *[1] * (x.ndim - 1)), 1e30, x), messages
        )

    def program(axis, state, images, shared):
        fields = {name: x for name, x in shared.items() if name != "weights"}
        if faulty:
            sent = jax.tree.map(lambda x: x[axis.ids], shared["outbox"])
            fields |= {"outbox": sent, "attack": attack}
        network = tasks.network(axis, TRIANGLE, shared["weights"], **fields)
        here = problem._replace(images=images, local=True) if local else problem
        return strategy.communicate(network, here, state)

    run = where.compile(program)

    def call(variables, weights=TRIANGLE.weights, **faults):
        state = tasks.start(variables, problem.optimizer, 3)
        shared = {"weights": np.float32(weights), **faults}
        return where.get(run(where.put(state), where.put(images), where.replicate(shared)))

    return call, images


def noisy_copies(num_agents):
    """Permuted copies of one model that have drifted apart a little."""
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda x: x + 0.01 * rng.normal(size=x.shape).astype(np.float32), copies(num_agents)
    )


@pytest.mark.parametrize("options", [{"batch": 16}, {"matching": "weights"}], ids=str)
def test_matching_by_parts_or_by_weights(options):
    variables = noisy_copies(3)
    found, _ = triangle(**options)
    expected, _ = triangle()
    tasks.assert_trees(found(variables).variables, expected(variables).variables)


@pytest.mark.parametrize("text", ["ring", "complete", "star", "erdos_renyi(p=0.5)", "disconnected"])
def test_pairs_are_shared_out_evenly(text):
    for size in (1, 2, 5, 8):
        graph = agents.topology.parse(text, size)
        does = alignment.share_pairs(graph.adjacency)
        np.testing.assert_array_equal(does ^ does.T, graph.adjacency)
        assert not (does & does.T).any()
        assert does.sum(1).max() == -(-graph.adjacency.sum() // 2 // size)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_pair_matched_once_is_as_one_matched_by_both(devices):
    graph = agents.topology.parse("erdos_renyi(p=0.6, seed=2)", 6)
    slots, valid = neighbour_slots(graph.adjacency)
    assert not valid.all()
    problem, how = tasks.mlp_problem(), alignment.Matching()
    where = agents.parallel(6, num_devices=devices)

    def program(axis, variables, held, weights):
        network = agents.Network(axis, weights, graph.adjacency, jax.random.key(0), jnp.int32(0))
        arrived = network.broadcast(variables)
        others = arrived._replace(rows=arrived.rows[:, 1:])
        everyone = alignment.match(
            axis, problem, how, variables, others, lambda tree: axis.fetch(tree, slots[:, 1:])
        )
        return everyone, alignment.match_neighbours(network, problem, how, variables, arrived)

    weights = where.replicate(np.asarray(graph.weights, np.float32))
    each, once = where.get(where.compile(program)(where.put(tasks.mlps(6)), {}, weights))
    for name, found in once.items():
        np.testing.assert_array_equal(found[valid[:, 1:]], each[name][valid[:, 1:]])
        assert any((p != np.arange(len(p))).any() for p in found[valid[:, 1:]])


def test_agents_with_images_of_their_own_match_on_these():
    variables = tasks.mlps(3)
    run, images = triangle(local=True, statistic="second_moment")
    found = run(variables).variables
    symmetry = tasks.mlp_symmetry()
    for i in range(3):
        seen = [
            jax.jit(symmetry.activations)(tasks.agent(variables, j), images[i]) for j in range(3)
        ]
        aligned = [
            symmetry.permute(
                align.match_activations(seen[i], seen[j], statistic="second_moment"),
                tasks.agent(variables, j),
            )
            if j != i
            else tasks.agent(variables, i)
            for j in range(3)
        ]
        expected = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *aligned)
        tasks.assert_trees(tasks.agent(found, i), expected)


def outbox(variables):
    """The one message of a round, from before."""
    return ((variables["params"], np.ones(3, bool)),)


def test_robust_merges_of_aligned_neighbours_bear_a_liar():
    variables, nobody = noisy_copies(3), np.zeros(3, bool)
    honest = triangle()[0](variables).variables
    faults = {"late": nobody, "byzantine": np.array([False, False, True])}
    box = outbox(variables)
    robust = triangle(faulty=True, merge="median")[0](variables, outbox=box, **faults).variables
    plain = triangle(faulty=True)[0](variables, outbox=box, **faults).variables
    for i in range(2):
        tasks.assert_trees(tasks.agent(robust, i), tasks.agent(honest, i), atol=0.05)
        assert np.abs(tasks.agent(plain, i)["params"]["Dense_1"]["kernel"]).min() > 1e28
    # Nothing of it comes over an edge that carries nothing.
    cut = np.float32([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    honest = triangle()[0](variables, cut).variables
    tasks.assert_trees(
        triangle(faulty=True)[0](variables, cut, outbox=box, **faults).variables, honest
    )


def test_of_a_late_agent_others_merge_what_it_sent_last():
    variables, before = tasks.mlps(3), tasks.mlps(3, seed=8)
    faults = {"late": np.array([False, True, False]), "byzantine": np.zeros(3, bool)}
    run = triangle(faulty=True)[0]
    found = run(variables, outbox=outbox(before), **faults).variables
    stale = jax.tree.map(lambda x, old: np.stack([x[0], old[1], x[2]]), variables, before)
    seen, own = triangle()[0](stale).variables, triangle()[0](variables).variables
    for i, expected in enumerate((seen, own, seen)):
        tasks.assert_trees(tasks.agent(found, i), tasks.agent(expected, i))


# ---------------------------------------------------------------- consensus


@functools.cache
def consensus(num_agents):
    problem = tasks.mlp_problem()
    where = agents.parallel(num_agents, "vmap")
    run = where.compile(lambda axis, v, held, shared: agents.consensus(axis, problem, v))
    return lambda variables: where.get(run(where.put(variables), (), ()))


def test_consensus_of_permuted_copies_is_the_model():
    variables = copies(4)
    found = consensus(4)(variables)
    np.testing.assert_allclose(found.aligned_distance, np.zeros(4), atol=1e-6)
    first = jax.tree.map(lambda x: np.repeat(x[:1], 4, 0), variables)
    tasks.assert_trees(found.aligned, first)
    # By hand: root mean square distance to the mean, over the root mean square norm.
    flat = np.concatenate([x.reshape(4, -1) for x in jax.tree.leaves(variables)], 1)
    apart = np.sqrt(((flat - flat.mean(0)) ** 2).sum() / (flat**2).sum())
    np.testing.assert_allclose(found.plain_distance, np.full(4, apart), rtol=1e-5)
    assert apart > 0.3
    mean = jax.tree.map(lambda x: np.broadcast_to(x.mean(0), x.shape), variables)
    tasks.assert_trees(found.plain, mean)


def test_consensus_of_agents_that_agree():
    variables = jax.tree.map(lambda x: np.repeat(x, 4, 0), tasks.mlps(1))
    found = consensus(4)(variables)
    for distance in (found.plain_distance, found.aligned_distance):
        np.testing.assert_allclose(distance, np.zeros(4), atol=1e-6)
    tasks.assert_trees(found.plain, variables)
    tasks.assert_trees(found.aligned, variables)


def test_consensus_among_some():
    """Agent 2 is broken, and agent 0 has an order of its own that nobody asks for."""
    variables = copies(4)
    variables["params"]["Dense_1"]["kernel"][2] = np.nan
    among = np.array([False, True, False, True])
    found = tasks.over(
        4,
        lambda axis, v, m: agents.consensus(axis, tasks.mlp_problem(), v, among=m),
        variables,
        shared=[among],
    )
    np.testing.assert_allclose(found.aligned_distance, np.zeros(4), atol=1e-6)
    tasks.assert_trees(found.aligned, jax.tree.map(lambda x: x[[1, 1, 1, 1]], variables))
    mean = jax.tree.map(lambda x: np.broadcast_to(x[[1, 3]].mean(0), x.shape), variables)
    tasks.assert_trees(found.plain, mean)


def test_consensus_of_unlike_agents():
    variables = tasks.mlps(4)
    found = consensus(4)(variables)
    aligned = [
        tasks.mlp_symmetry().permute(
            {
                name: decentral.match_correlation(a.T, b.T)
                for name, a, b in zip(
                    tasks.mlp_symmetry().groups, hidden(0), hidden(i), strict=True
                )
            },
            tasks.agent(variables, i),
        )
        for i in range(4)
    ]
    mean = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *aligned)
    for i in range(4):
        tasks.assert_trees(tasks.agent(found.aligned, i), mean)
    assert (found.aligned_distance < found.plain_distance).all()
    assert (found.aligned_distance > 0.1).all()


def test_consensus_re_estimates_the_statistics():
    problem, variables = tasks.cnn_problem()
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x + 0.3 * rng.random((2, *x.shape), np.float32), variables)
    found = tasks.over(2, lambda axis, v: agents.consensus(axis, problem, v), variables)
    for model in (found.plain, found.aligned):
        own = tasks.agent(model, 1)
        expected = problem.batch_stats(own, problem.images)
        tasks.assert_trees(own, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("lacking", ["symmetry", "images"])
def test_alignment_needs_symmetry_and_images(lacking):
    problem = tasks.mlp_problem()._replace(**{lacking: None})
    state = tasks.start(tasks.mlps(2), problem.optimizer, 2)
    strategy = agents.dimat(agents.ring(2))
    with pytest.raises(ValueError, match=r"give both in Problem\(symmetry=..., images=...\)"):
        tasks.over(
            2,
            lambda axis, s: strategy.communicate(tasks.network(axis, agents.ring(2)), problem, s),
            state,
        )
    with pytest.raises(ValueError, match="needs the model's symmetry and images"):
        tasks.over(2, lambda axis, v: agents.consensus(axis, problem, v), state.variables)


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="unknown statistic 'corelation'; did you mean"):
        compiled(statistic="corelation")(adam_state(tasks.mlps(4), 4))
