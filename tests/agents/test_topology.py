import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@given(n=st.integers(1, 24))
def test_every_topology_mixes(build, n):
    t = build(n)
    w = t.weights
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
    assert any("draw 1)" not in name for name in names), names


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


def test_metropolis_vectors():
    vectors = golden.load(VECTORS)
    for case in golden.cases(vectors, "mh/er", 2):
        edges = np.argwhere(np.triu(vectors[f"{case}/adj"], 1))
        t = topology.from_edges(len(vectors[f"{case}/adj"]), edges, connected=False)
        np.testing.assert_allclose(t.weights, vectors[f"{case}/W"], atol=1e-12)
        np.testing.assert_allclose(t.spectral_gap(), vectors[f"{case}/gap"], atol=1e-9)
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
        (lambda: topology.parse("rnig", 4), "did you mean 'ring'"),
        (lambda: topology.parse("from_matrix([[1.0]])", 4), "for 1 agents, there are 4"),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
    # Allowed where it is meant.
    assert not topology.from_matrix(np.eye(2), connected=False).connected
