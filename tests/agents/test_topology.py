import math
import re

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab import figures
from mixlab.agents import topology
from tests import golden

VECTORS = "decentral/public_topology_partition"
BUILDERS = {
    "ring": topology.ring,
    "directed ring": lambda n: topology.ring(n, directed=True),
    "complete": topology.complete,
    "star": topology.star,
    "uniform star": lambda n: topology.star(n, weights="uniform"),
    "exponential": topology.exponential,
    "symmetric exponential": lambda n: topology.exponential(n, symmetric=True),
    "grid": topology.grid,
    "torus": topology.torus,
    "erdos_renyi": lambda n: topology.erdos_renyi(n, 0.6, seed=n),
    "hypercube": lambda n: topology.hypercube(2 ** (n % 5)),
    "small_world": lambda n: topology.small_world(n + 4, seed=n),
    "random_regular": lambda n: topology.random_regular(n + 3, 2 + n % 2, seed=n),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@given(n=st.integers(1, 24))
def test_every_topology_mixes(build, n):
    t = build(n)
    w, n = t.weights, t.num_agents
    assert w.shape == (n, n)
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-12)
    assert t.connected
    assert (np.diag(w) > 0).all()
    assert 0 < t.spectral_gap() <= 1
    # What the gap says: the distance to consensus dies out, at that rate in the end.
    power = np.linalg.matrix_power(w, 64 * n * n)
    np.testing.assert_allclose(power - power[0], 0, atol=1e-6)
    assert t.messages == t.degree.sum() == sum(len(t.neighbours(i)) for i in range(n))
    assert (t.diameter < n) if n > 1 else (t.diameter == 0)
    if t.symmetric:
        assert t.doubly_stochastic
    assert f"gap {t.spectral_gap():.4f}" in str(t)
    assert "\n" not in str(t)


@given(n=st.integers(1, 12), seed=st.integers(0, 10_000), p=st.floats(0.3, 1))
def test_erdos_renyi_is_reproducible_and_metropolis_keeps_the_mean(n, seed, p):
    t = topology.erdos_renyi(n, p, seed)
    np.testing.assert_array_equal(t.weights, topology.erdos_renyi(n, p, seed).weights)
    assert t.symmetric
    assert t.doubly_stochastic
    assert t.connected
    for i in range(n):
        for j in t.neighbours(i):
            assert t.weights[i, j] == pytest.approx(1 / (1 + max(t.degree[i], t.degree[j])))


@given(n=st.integers(3, 30), seed=st.integers(0, 1000))
def test_given_weights_survive(n, seed):
    w = np.random.default_rng(seed).random((n, n))
    w /= w.sum(axis=1, keepdims=True)
    t = topology.from_matrix(w)
    np.testing.assert_array_equal(t.weights, w)
    assert not t.doubly_stochastic
    with pytest.raises(ValueError, match="read-only"):
        t.weights[0, 0] = 1


@pytest.mark.parametrize(
    ("text", "n", "weights"),
    [
        ("ring", 1, [[1]]),
        ("ring", 2, [[1 / 2, 1 / 2]] * 2),
        ("ring", 3, [[1 / 3] * 3] * 3),
        ("ring(directed=True)", 3, [[1 / 2, 0, 1 / 2], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]]),
        ("complete", 1, [[1]]),
        ("star", 3, [[1 / 3] * 3, [1 / 3, 2 / 3, 0], [1 / 3, 0, 2 / 3]]),
        ("star(weights='uniform')", 3, [[1 / 3] * 3, [1 / 2, 1 / 2, 0], [1 / 2, 0, 1 / 2]]),
        ("torus", 2, [[1 / 2, 1 / 2]] * 2),
        ("exponential", 3, [[1 / 3] * 3] * 3),
        ("disconnected", 2, np.eye(2)),
        ("from_edges([(0, 1)])", 2, [[1 / 2, 1 / 2]] * 2),
        ("from_matrix([[0.75, 0.25], [1, 0]])", 2, [[0.75, 0.25], [1, 0]]),
    ],
)
def test_small_ones_by_hand(text, n, weights):
    np.testing.assert_allclose(topology.parse(text, n).weights, weights, atol=1e-15)


def test_properties_by_hand():
    t = topology.torus(8)
    assert t.name == "torus(2x4)"
    np.testing.assert_array_equal(t.degree, [3] * 8)
    np.testing.assert_array_equal(t.neighbours(0), [1, 3, 4])
    assert (t.num_agents, t.messages, t.diameter) == (8, 24, 3)
    np.testing.assert_array_equal(topology.torus(9).degree, [4] * 9)
    np.testing.assert_array_equal(topology.torus(8, rows=8).adjacency, topology.ring(8).adjacency)
    np.testing.assert_array_equal(topology.exponential(8).neighbours(7), [0, 1, 3])
    assert topology.ring(8).diameter == 4
    assert topology.ring(5, directed=True).diameter == 4
    assert topology.exponential(8).doubly_stochastic
    assert not topology.exponential(8).symmetric
    # The eigenvalues of a circulant: (1 + 2 cos(2 pi k / n)) / 3.
    assert topology.ring(8).spectral_gap() == pytest.approx(2 / 3 * (1 - math.cos(math.pi / 4)))
    assert topology.complete(5).spectral_gap() == pytest.approx(1)
    apart = topology.disconnected(3)
    assert (apart.connected, apart.diameter, apart.spectral_gap()) == (False, math.inf, 0)
    # Agents that only swap never agree.
    assert topology.from_matrix([[0, 1], [1, 0]]).spectral_gap() == 0
    assert "degree 1-3" in str(topology.star(4))


def test_erdos_renyi_says_which_draw():
    names = [topology.erdos_renyi(6, 0.3, seed).name for seed in range(5)]
    assert any(", draw " in name for name in names), names
    assert any(", draw " not in name for name in names), names


@pytest.mark.parametrize("n", [2, 4, 5, 8, 10, 20])
def test_dimat_vectors(n):
    vectors = golden.load(VECTORS)

    def recorded(name):
        return vectors[f"dimat/{name}Topology/n{n}/pi"]

    def check(t, name):
        np.testing.assert_allclose(t.weights, recorded(name), atol=1e-12)
        closed = t.adjacency | np.eye(n, dtype=bool)
        np.testing.assert_array_equal(
            closed, vectors[f"dimat/{name}Topology/n{n}/connectivity"] > 0
        )

    check(topology.complete(n), "FullyConnected")
    check(topology.disconnected(n), "Dis")
    if n == 2:
        # The reference's ring of two shrinks the weights each round; its bipartite graph has
        # nobody but the two hubs, who are not joined.
        with pytest.raises(ValueError, match=r"row 0 sums to 0\.666667"):
            topology.from_matrix(recorded("Ring"))
        with pytest.raises(ValueError, match="not connected"):
            topology.from_matrix(recorded("Bipar"))
        with pytest.raises(ValueError, match="at least 3 agents"):
            topology.bipartite(2)
    else:
        check(topology.ring(n), "Ring")
        check(topology.bipartite(n, weights="dimat"), "Bipar")
        by_rule = {"Bipar": topology.bipartite, "Ring": topology.ring}
        by_rule |= {"FullyConnected": topology.complete, "Dis": topology.disconnected}
        for name, build in by_rule.items():
            np.testing.assert_allclose(build(n).mixing_matrix("dimat"), recorded(name), atol=1e-12)
        np.testing.assert_allclose(topology.bipartite(n).weights, recorded("Bipar"), atol=0.05)


@pytest.mark.parametrize("n", [2, 4, 5, 8, 10, 20])
@pytest.mark.parametrize(
    ("graph", "text"),
    [
        ("RingGraph0", "ring"),
        ("RingGraph1", "ring(directed=True)"),
        ("FullyConnectedGraph", "complete"),
        ("StarGraph", "star"),
        ("MeshGrid2DGraph", "grid"),
        ("ExponentialTwoGraph", "exponential"),
        ("ExponentialGraph", "exponential(base=2)"),
        ("SymmetricExponentialGraph", "exponential(base=4, symmetric=True)"),
    ],
)
def test_bluefog_vectors(graph, text, n):
    vectors = golden.load(VECTORS)
    t = topology.parse(text, n)
    np.testing.assert_allclose(t.weights, vectors[f"bluefog/{graph}/n{n}"], atol=1e-12)
    np.testing.assert_allclose(t.spectral_gap(), vectors[f"bluefog/{graph}/n{n}/gap"], atol=1e-9)


@pytest.mark.parametrize("n", [4, 5, 8, 10, 20])
def test_bluefog_one_peer_and_the_ring_the_other_way(n):
    vectors = golden.load(VECTORS)
    t = topology.one_peer_exponential(n)
    for turn, (to, source) in enumerate(vectors[f"bluefog/one_peer_exp/n{n}/rank0_first8"]):
        now = t.at(turn)
        assert now.adjacency[:, 0].nonzero()[0].tolist() == [to]
        assert now.neighbours(0).tolist() == [source]
    backwards = vectors[f"bluefog/RingGraph2/n{n}"]
    ring = topology.ring(n, directed=True)
    np.testing.assert_allclose(topology.from_matrix(backwards).weights, ring.weights.T)
    np.testing.assert_allclose(ring.mixing_matrix("push"), vectors[f"bluefog/RingGraph1/n{n}"])


def test_metropolis_vectors():
    vectors = golden.load(VECTORS)
    for case in golden.cases(vectors, "mh/er", 2):
        edges = np.argwhere(np.triu(vectors[f"{case}/adj"], 1))
        t = topology.from_edges(len(vectors[f"{case}/adj"]), edges, connected=False)
        np.testing.assert_allclose(t.weights, vectors[f"{case}/W"], atol=1e-12)
        np.testing.assert_allclose(t.spectral_gap(), vectors[f"{case}/gap"], atol=1e-9)
        t = topology.from_matrix(topology.uniform(vectors[f"{case}/adj"] > 0), connected=False)
        np.testing.assert_allclose(t.mixing_matrix("metropolis"), vectors[f"{case}/W"], atol=1e-12)
    for case in golden.cases(vectors, "mh/ring", 2):
        n = int(case.removeprefix("mh/ring"))
        np.testing.assert_allclose(topology.ring(n).weights, vectors[f"{case}/W"], atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: topology.from_matrix([[0.5, 0.4], [0.5, 0.5]]), r"row 0 sums to 0\.9"),
        (lambda: topology.from_matrix([[1.5, -0.5], [0.5, 0.5]]), r"-0\.5 at \[0, 1\]"),
        (lambda: topology.from_matrix([[math.nan, 1], [0.5, 0.5]]), r"nan at \[0, 0\]"),
        (lambda: topology.from_matrix([[0.5, 0.5]]), r"must be \[A, A\], got shape \(1, 2\)"),
        (lambda: topology.from_matrix(np.eye(2)), "not connected.*connected=False"),
        # Reaches one way only.
        (lambda: topology.from_matrix([[1, 0], [0.5, 0.5]]), "not connected"),
        (lambda: topology.from_edges(4, [(0, 1), (2, 3)]), "not connected"),
        (lambda: topology.from_edges(3, [(0, 3)]), r"edge \(0, 3\)"),
        (lambda: topology.from_edges(3, [(1, 1)]), r"edge \(1, 1\)"),
        (lambda: topology.star(4, weights="metropolys"), "did you mean 'metropolis'"),
        (lambda: topology.metropolis(np.eye(3, k=1, dtype=bool)), "between 0 and 1 goes one way"),
        (lambda: topology.ring(0), "at least one agent, got n=0"),
        (lambda: topology.disconnected(0), "at least one agent"),
        (lambda: topology.torus(8, rows=3), "do not fill 3 rows"),
        (lambda: topology.exponential(8, base=1), "base >= 2"),
        (lambda: topology.bipartite(102, weights="dimat"), "zero from n=102"),
        (lambda: topology.erdos_renyi(5, 1.2), r"in \[0, 1\], got 1\.2"),
        (lambda: topology.erdos_renyi(5, 0.0), r"none of 1000 draws.*0\.32"),
        (lambda: topology.hypercube(6), "power of two of agents, got n=6"),
        (lambda: topology.small_world(8, 3), r"even and in \[2, n=8\), got 3"),
        (lambda: topology.small_world(4), r"even and in \[2, n=4\), got 4"),
        (lambda: topology.random_regular(5, 3), "gives 5 agents 3 neighbours each"),
        (lambda: topology.peer_sampling(4, 4), "gives 4 agents 4 neighbours each"),
        (lambda: topology.matchings(4, 0), "got rounds=0"),
        (lambda: topology.matchings(4, 1), "none of 1000 draws.*more rounds"),
        (lambda: topology.sequence([]), r"sizes \[\]"),
        (lambda: topology.sequence([topology.ring(3), topology.ring(4)]), r"sizes \[3, 4\]"),
        (lambda: topology.sequence([topology.disconnected(3)]), "not connected"),
        (
            lambda: topology.from_matrix([[[0.5, 0.5]] * 2, [[1, 0], [0.3, 0.3]]]),
            r"row 1 of round 1 sums to 0\.6",
        ),
        (lambda: topology.star(4).mixing_matrix("dimat"), "degrees 1-3; choose 'metropolis'"),
        (lambda: topology.ring(4).mixing_matrix("pull"), "unknown weights 'pull'"),
        (lambda: topology.ring(4).mixing_matrix(np.full((4, 4), 0.25)), r"not, at \[0, 2\]"),
        (lambda: topology.ring(4).mixing_matrix(np.eye(3)), r"shape \(4, 4\), got \(3, 3\)"),
        (
            lambda: topology.star(4, weights="uniform").require_doubly_stochastic("gossip"),
            r"gossip needs doubly.*column 0 of star sums to 1\.75.*weights='metropolis'",
        ),
        (lambda: topology.from_edges(4, [(0, 1, 2), (1, 2, 3)]), r"pairs \[E, 2\].*int64 \[2, 3\]"),
        (lambda: topology.from_edges(2, [(0.2, 1.7)]), r"agents' numbers, got float64"),
        (lambda: topology.from_edges(4, [0, 1, 2]), r"int64 \[3\]; weighted edges go to"),
        (lambda: topology.parse("ring, star", 4), r"several topologies; to alternate, sequence"),
        (lambda: topology.parse("rnig", 4), "did you mean 'ring'"),
        (lambda: topology.parse("from_matrix([[1.0]])", 4), "for 1 agents, there are 4"),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
    # Allowed where it is meant.
    assert not topology.from_matrix(np.eye(2), connected=False).connected


@pytest.mark.parametrize("n", ["8", 8.0, None, [8]])
@pytest.mark.parametrize(
    "build",
    [
        topology.bipartite,
        topology.complete,
        topology.disconnected,
        topology.exponential,
        topology.grid,
        topology.hypercube,
        topology.matchings,
        topology.one_peer_exponential,
        topology.ring,
        topology.small_world,
        topology.star,
        topology.torus,
        lambda n: topology.erdos_renyi(n, 0.5),
        lambda n: topology.from_edges(n, [(0, 1)]),
        lambda n: topology.peer_sampling(n, 2),
        lambda n: topology.random_regular(n, 2),
    ],
)
def test_the_number_of_agents_is_a_whole_number(build, n):
    with pytest.raises(TypeError, match=f"whole number such as 8, got n={re.escape(repr(n))}"):
        build(n)


def test_numpy_counts_agents_too():
    for build in (topology.exponential, topology.hypercube, topology.one_peer_exponential):
        np.testing.assert_array_equal(build(np.int64(8)).weights, build(8).weights)


def test_rules_by_hand():
    star, ring = topology.star(3), topology.ring(3, directed=True)
    assert star.mixing_matrix() is star.weights
    np.testing.assert_allclose(star.mixing_matrix("uniform")[1], [1 / 2, 1 / 2, 0])
    # What an agent sends sums to one: the hub's column is split in three, the others' in two.
    push = [[1 / 3, 1 / 2, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 0, 1 / 2]]
    np.testing.assert_allclose(star.mixing_matrix("push"), push)
    given = np.array([[0.2, 0, 0.8], [0.3, 0.7, 0], [0, 1, 0]])
    np.testing.assert_array_equal(ring.mixing_matrix(given), given)
    square = topology.from_edges(4, [(0, 2), (2, 1), (1, 3), (3, 0)])
    np.testing.assert_allclose(square.mixing_matrix("dimat")[0], [0.34, 0, 0.33, 0.33])
    both = topology.sequence([star, ring])
    np.testing.assert_allclose(both.mixing_matrix("push")[0], push)
    star.require_doubly_stochastic("gossip")


def test_hypercube_gap():
    for bits in range(5):
        assert topology.hypercube(2**bits).spectral_gap() == pytest.approx(min(2 / (1 + bits), 1))


def test_small_world_begins_with_a_ring_and_keeps_its_edges():
    near = topology.small_world(9, p=0)
    np.testing.assert_array_equal(near.neighbours(0), [1, 2, 7, 8])
    moved = [topology.small_world(30, 4, p, seed=3).adjacency for p in (0.1, 1.0)]
    start = topology.small_world(30, 4, p=0).adjacency
    assert [a.sum() for a in moved] == [120, 120]
    few, all_ = ((a & ~start).sum() // 2 for a in moved)
    assert 1 <= few <= 15
    assert all_ > 40


@given(n=st.integers(2, 17), degree=st.integers(1, 16), seed=st.integers(0, 999))
def test_regular_graphs_and_matchings(n, degree, seed):
    degree = min(degree, n - 1)
    degree -= degree * n % 2
    t = topology.peer_sampling(n, degree, 30, seed) if degree else topology.matchings(n, 30, seed)
    assert t.weights.shape == (30, n, n)
    degrees = np.array([t.at(k).degree for k in range(30)])
    if degree:
        assert (degrees == degree).all()
    else:
        assert (degrees.sum(axis=1) == n // 2 * 2).all()
        assert degrees.max() == 1
    assert t.symmetric
    assert t.connected
    assert t.messages == degrees.sum() / 30
    assert n < 5 or degree == n - 1 or len(np.unique(t.weights, axis=0)) > 1
    again = topology.parse(t.name.split(", draw")[0].rstrip(")") + ")", n)
    np.testing.assert_array_equal(again.weights, t.weights)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 8])
def test_one_peer_exponential(n):
    t = topology.one_peer_exponential(n)
    static = topology.exponential(n)
    np.testing.assert_array_equal(t.adjacency, static.adjacency.T)
    assert t.period == max(1, math.ceil(math.log2(n)))
    assert t.doubly_stochastic
    if n in (1, 2, 8):
        assert t.spectral_gap() == pytest.approx(1)
    assert t.diameter == (t.period if n > 1 else 0)


def test_a_sequence_by_hand():
    pairs = topology.from_edges(4, [(0, 1), (2, 3)], connected=False)
    across = topology.from_edges(4, [(1, 2)], connected=False)
    t = topology.sequence([pairs, across])
    assert t.name == "sequence(from_edges, from_edges)"
    assert (t.num_agents, t.period, t.messages, t.connected) == (4, 2, 3, True)
    np.testing.assert_array_equal(t.adjacency, topology.grid(4, rows=1).adjacency)
    np.testing.assert_array_equal(t.at(5).weights, across.weights)
    assert t.at(5).name.endswith("round 1")
    # 0 and 1, then 1 and 2, then 2 and 3 know of 0, which is all of the way.
    assert t.diameter == 3
    values = np.linalg.eigvals(across.weights @ pairs.weights)
    gap = 1 - np.sqrt(np.sort(np.abs(values))[-2])
    assert t.spectral_gap() == pytest.approx(gap)
    assert topology.sequence([t, topology.ring(4)]).period == 3
    ring = topology.ring(4)
    assert ring.at(7) is ring
    assert ring.rounds.shape == (1, 4, 4)
    parsed = topology.parse("sequence([ring, exponential(symmetric=True)])", 4)
    np.testing.assert_array_equal(parsed.rounds[0], ring.weights)
    assert "period 2" in str(parsed)
    with pytest.raises(TypeError, match="without quotes"):
        topology.parse("sequence(['ring'])", 4)
    # Rounds that are not doubly stochastic: the mean is not kept, the gap is that of the product.
    biased = topology.sequence([topology.star(5, weights="uniform"), topology.ring(5)])
    product = biased.rounds[1] @ biased.rounds[0]
    gap = 1 - np.sqrt(np.sort(np.abs(np.linalg.eigvals(product)))[-2])
    assert biased.spectral_gap() == pytest.approx(gap)


def test_from_networkx():
    graph = nx.Graph([("b", "a"), ("a", "c")])
    t = topology.from_networkx(graph)
    np.testing.assert_array_equal(t.weights, topology.star(3).weights[[1, 0, 2]][:, [1, 0, 2]])
    np.testing.assert_array_equal(
        topology.from_networkx(graph, weights="uniform").weights,
        topology.uniform(nx.to_numpy_array(graph) > 0),
    )
    # An edge is a message: 0 sends to 1, which receives from it.
    cycle = topology.from_networkx(nx.cycle_graph(4, nx.DiGraph))
    np.testing.assert_array_equal(cycle.weights, topology.ring(4, directed=True).weights)
    graph.add_weighted_edges_from([("b", "a", 0.25), ("a", "c", 0.5)])
    weights = [[0.75, 0.25, 0], [0.25, 0.25, 0.5], [0, 0.5, 0.5]]
    np.testing.assert_allclose(topology.from_networkx(graph).weights, weights)
    directed = nx.DiGraph()
    directed.add_weighted_edges_from([(0, 1, 0.3), (1, 0, 0.8), (0, 0, 0.2)])
    np.testing.assert_allclose(topology.from_networkx(directed).weights, [[0.2, 0.8], [0.3, 0.7]])
    graph.add_edge("b", "c")
    with pytest.raises(ValueError, match="between agents 0 and 2 has none"):
        topology.from_networkx(graph)
    graph.add_edge("b", "c", weight=2.0)
    with pytest.raises(ValueError, match=r"into agent 2 sum to 2\.5"):
        topology.from_networkx(graph)
    assert topology.from_networkx(graph, weights="metropolis").degree.tolist() == [2, 2, 2]


def test_diameter_agrees_with_networkx():
    for seed in range(5):
        graph = nx.gnp_random_graph(12, 0.35, seed, directed=True)
        t = topology.from_networkx(graph, connected=False)
        assert t.connected == nx.is_strongly_connected(graph)
        assert t.diameter == (nx.diameter(graph) if t.connected else math.inf)


def test_a_thousand_agents():
    t = topology.random_regular(1000, 4)
    assert (t.degree == 4).all()
    assert t.diameter < 12


def test_figure(tmp_path):
    t = topology.parse("one_peer_exponential", 8)
    figure = figures.topology(t.weights, str(t), columns=2)
    graphs, matrices = figure.axes[:2], figure.axes[2:4]
    assert [ax.get_title() for ax in graphs] == ["round 0", "round 1"]
    assert figure.get_suptitle().endswith("rounds 0-1 of 3")
    for ax, w in zip(matrices, t.rounds[:2], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), w)
    # Round 0: i sends to i + 1; agents are numbered clockwise, and so go the arrows.
    arrows = [text for text in graphs[0].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 8
    for arrow in arrows:
        assert np.cross([*arrow.xyann, 0], [*arrow.xy, 0])[2] < 0
    figure.savefig(tmp_path / "rounds.png", dpi=30)
    # A hub stands in the middle; both ways, no arrows.
    graph, matrix, _ = figures.topology(topology.star(6).weights, "star").axes
    np.testing.assert_array_equal(graph.collections[1].get_offsets()[0], [0, 0])
    assert [text.get_text() for text in graph.texts] == list("012345")
    assert len(matrix.texts) == 16
    many = figures.topology(topology.ring(300).weights, "ring").axes[0]
    assert len(many.texts) <= 30
