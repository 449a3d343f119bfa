import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.agents import partition
from tests import golden

VECTORS = "decentral/public_topology_partition"


def _check(parts, labels, num_agents):
    assert len(parts) == num_agents
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) > 0
        assert (np.diff(part) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


def _labels(seed, num_classes, num_examples):
    """Every class at least ten times."""
    rng = np.random.default_rng(seed)
    few = np.repeat(np.arange(num_classes), 10)
    rest = rng.integers(0, num_classes, num_examples).astype(np.int64)
    return rng.permutation(np.concatenate([few, rest])).astype(np.int32)


CASES = {
    "labels": st.builds(_labels, st.integers(0, 99), st.integers(1, 7), st.integers(0, 200)),
    "num_agents": st.integers(1, 10),
    "seed": st.integers(0, 999),
}


@given(**CASES, data=st.data())
def test_iid(labels, num_agents, seed, data):
    stratified = data.draw(st.booleans())
    parts = partition.iid(labels, num_agents, seed, stratified=stratified)
    _check(parts, labels, num_agents)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    if stratified:
        held = partition.counts(parts, labels, labels.max() + 1)
        assert (held.max(axis=0) - held.min(axis=0) <= 1).all()
    again = partition.iid(labels, num_agents, seed, stratified=stratified)
    for a, b in zip(parts, again, strict=True):
        np.testing.assert_array_equal(a, b)


@given(**CASES, data=st.data())
def test_shards_hold_exactly_k_classes(labels, num_agents, seed, data):
    num_classes = int(labels.max()) + 1
    k = data.draw(st.integers(1, num_classes))
    if num_agents * k < num_classes:
        with pytest.raises(ValueError, match="cannot hold"):
            partition.shards(labels, num_agents, seed, classes_per_agent=k)
        return
    parts = partition.shards(labels, num_agents, seed, classes_per_agent=k)
    _check(parts, labels, num_agents)
    held = partition.counts(parts, labels, num_classes)
    assert ((held > 0).sum(axis=1) == k).all()
    holders = (held > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1
    for shares in held.T:
        shares = shares[shares > 0]
        assert shares.max() - shares.min() <= 1


@given(**CASES)
def test_by_class(labels, num_agents, seed):
    parts = partition.by_class(labels, num_agents, seed)
    _check(parts, labels, num_agents)
    held = partition.counts(parts, labels, labels.max() + 1) > 0
    num_classes = held.shape[1]
    for r in range(num_agents):
        mine = np.flatnonzero(held[r])
        expected = np.arange(r, num_classes, num_agents) if r < num_classes else [r % num_classes]
        np.testing.assert_array_equal(mine, expected)


@given(**CASES, data=st.data())
def test_dirichlet(labels, num_agents, seed, data):
    options = {
        "alpha": data.draw(st.sampled_from([1.0, 10.0, 100.0])),
        "balanced": data.draw(st.booleans()),
    }
    num_agents = min(num_agents, 5)  # Of 10 examples among 10 agents no draw leaves each one.
    parts = partition.dirichlet(labels, num_agents, seed, **options)
    _check(parts, labels, num_agents)
    for a, b in zip(parts, partition.dirichlet(labels, num_agents, seed, **options), strict=True):
        np.testing.assert_array_equal(a, b)


@given(**CASES)
def test_arcs(labels, num_agents, seed):
    parts = partition.arcs(labels, num_agents, seed, arcs_per_agent=1)
    _check(parts, labels, num_agents)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_is_skewed_when_alpha_is_small_and_even_when_it_is_large():
    labels = np.repeat(np.arange(10), 200)

    def largest_share(alpha):
        parts = partition.dirichlet(labels, 5, 1, alpha=alpha, min_examples=10)
        held = partition.counts(parts, labels, 10)
        return (held.max(axis=0) / held.sum(axis=0)).mean()

    assert largest_share(1e4) < 0.22
    assert largest_share(0.05) > 0.75
    parts = partition.dirichlet(labels, 5, 1, alpha=0.1, min_examples=200)
    assert min(map(len, parts)) >= 200


def test_seeds_differ():
    labels = np.arange(60) % 6
    for text in ("iid", "shards", "dirichlet", "arcs", "by_class"):
        split = partition.parse(text)
        a, b = split(labels, 9, 1), split(labels, 9, 2)
        assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True)), text


def test_a_registered_partition_is_parsed_and_held_to_the_number_of_agents(monkeypatch):
    def halves(labels, num_agents, seed, *, first=0.5):
        return np.split(np.arange(len(labels)), [int(first * len(labels))])

    monkeypatch.setitem(partition.PARTITIONS, "halves", halves)
    dealt = partition.parse("halves(first=0.25)")
    assert [len(part) for part in dealt(np.zeros(8, int), 2, 0)] == [2, 6]
    with pytest.raises(ValueError, match="halves dealt to 2 agents, there are 3"):
        dealt(np.zeros(8, int), 3, 0)


def test_parse_keeps_the_options():
    labels = np.arange(60) % 6
    parts = partition.parse("shards(classes_per_agent=3)")(labels, 4, 7)
    held = partition.counts(parts, labels, 6)
    np.testing.assert_array_equal((held > 0).sum(axis=1), [3] * 4)
    np.testing.assert_array_equal(held.sum(axis=0), [10] * 6)
    with pytest.raises(ValueError, match="did you mean 'dirichlet'"):
        partition.parse("dirichlets(alpha=1)")
    with pytest.raises(TypeError, match=r"it takes \(alpha=0\.5"):
        partition.parse("dirichlet(alfa=1)")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda y: partition.iid(y, 13), "12 examples can be shared by 1 to 12 agents"),
        (lambda y: partition.iid(y, 0), "num_agents=0"),
        (lambda y: partition.iid(y.astype(float), 2), "ints"),
        (lambda y: partition.iid(y[:, None], 2), r"\[12, 1\]"),
        (lambda y: partition.shards(y, 3, classes_per_agent=5), r"in \[1, 4\]"),
        (lambda y: partition.shards(y, 3, classes_per_agent=1), "classes_per_agent=2"),
        (lambda y: partition.shards(y, 12, classes_per_agent=4), "3 examples for 12 agents"),
        (lambda y: partition.by_class(np.array([0, 1, 1, 1, 1]), 4), "1 examples for 2 agents"),
        (lambda y: partition.dirichlet(y, 3, alpha=0), "above 0, got 0"),
        (lambda y: partition.dirichlet(y, 3, alpha=float("nan")), "above 0, got nan"),
        (lambda y: partition.dirichlet(y, 3, min_examples=5), r"in \[1, 4\]"),
        (lambda y: partition.dirichlet(y, 5, alpha=1e-300), "raise alpha"),
        (lambda y: partition.arcs(y, 4, arcs_per_agent=4), "between 1 and 12"),
    ],
)
def test_errors_say_what_to_do(split, message):
    with pytest.raises(ValueError, match=message):
        split(np.arange(12) % 4)


def _recorded(vectors, case):
    ranks = sorted(key for key in vectors if key.startswith(f"{case}/rank"))
    return [np.sort(vectors[f"{case}/rank{r}"]) for r in range(len(ranks))]


def test_dimat_vectors():
    vectors = golden.load(VECTORS)
    for case in golden.cases(vectors, "dimat_part/", 2):
        settings, kind, stage = case.removeprefix("dimat_part/").rsplit("_", 2)
        per_class, agents = (int(part.strip("perw")) for part in settings.split("_")[1:])
        labels = vectors[f"{case}/labels"]
        # The reference takes the first examples of each class; `PF` keeps half for pre-training.
        first, last = 0, per_class
        if kind == "non-iid-PF":
            half = per_class // 2
            first, last = (0, half) if stage == "pretrain" else (half, per_class)
        chosen = np.sort(
            np.concatenate([np.flatnonzero(labels == k)[first:last] for k in np.unique(labels)])
        )
        if kind == "iid" or stage == "pretrain":
            parts = partition.iid(labels[chosen], agents, None, stratified=True)
        else:
            parts = partition.by_class(labels[chosen], agents, None)
        for part, recorded in zip(parts, _recorded(vectors, case), strict=True):
            np.testing.assert_array_equal(chosen[part], recorded, err_msg=case)


def test_decentralizepy_vectors():
    vectors = golden.load(VECTORS)
    for case in golden.cases(vectors, "dpy_dirichlet/", 2):
        labels = vectors[f"{case}/labels"]
        agents, alpha = case.removeprefix("dpy_dirichlet/w").split("_a")
        parts = partition.dirichlet(
            labels,
            int(agents),
            int(vectors[f"{case}/seed"]),
            alpha=float(alpha),
            min_examples=len(np.unique(labels)),
            balanced=True,
        )
        for part, recorded in zip(parts, _recorded(vectors, case), strict=True):
            np.testing.assert_array_equal(part, recorded, err_msg=case)
    for case in golden.cases(vectors, "dpy_kshard/", 2):
        n, agents, arcs = (int(p[1:]) for p in case.removeprefix("dpy_kshard/").split("_"))
        labels = np.zeros(n, int)  # The reference takes the data as sorted by label already.
        seed = int(vectors[f"{case}/seed"])
        parts = partition.arcs(labels, agents, seed, arcs_per_agent=arcs)
        for part, recorded in zip(parts, _recorded(vectors, case), strict=True):
            np.testing.assert_array_equal(part, recorded, err_msg=case)
