import numpy as np
import pytest

from mixlab.align.inference.layout import (
    Atom,
    Fixed,
    Prod,
    Solver,
    Sum,
    Wild,
    concat,
    describe,
    index,
    occurrences,
    prod,
    rename,
)


@pytest.fixture
def solver():
    return Solver()


def test_canonical_terms():
    a, b = Atom(2, "a"), Atom(3, "b")
    assert prod([Fixed(2), Fixed(3), a]) == Prod((Fixed(6), a))
    assert prod([a, Fixed(1)]) == a
    assert prod([prod([a, b]), a]) == Prod((a, b, a))
    assert prod([Wild(2), Wild(3)]) == Wild(6)
    assert concat([Fixed(2), Fixed(3), a]) == Sum((Fixed(5), a))
    # Two constants laid side by side are not one constant.
    assert concat([Wild(2), Wild(3)]) == Sum((Wild(2), Wild(3)))
    assert concat([Fixed(0), a]) == a
    assert prod([]) == Fixed(1)
    assert prod([a, b]).size == 6
    assert concat([a, b]).size == 5
    assert describe(prod([Fixed(4), concat([a, b])])) == "[4 x [a + b]]"


def test_unify_atoms_fixed_and_wild(solver):
    a, b, c = (solver.fresh(6) for _ in range(3))
    assert solver.unify(a, Wild(6)) == a
    assert solver.unify(Wild(6), Wild(6)) == Wild(6)
    solver.unify(a, b)
    assert solver.resolve(a) == solver.resolve(b) != solver.resolve(c)
    assert solver.unify(b, Fixed(6)) == Fixed(6)
    assert solver.resolve(a) == Fixed(6)
    assert solver.fresh(1) == Fixed(1)


def test_products_take_their_common_refinement(solver):
    a, b, c, d = (solver.fresh(n) for n in (2, 6, 4, 3))
    solver.unify(prod([a, b]), prod([c, d]))
    first, second = solver.resolve(c).parts
    assert solver.resolve(a) == first
    assert solver.resolve(b) == prod([second, solver.resolve(d)])


def test_products_without_common_refinement_become_fixed(solver):
    a, b, c, d = (solver.fresh(n) for n in (2, 3, 3, 2))
    assert solver.unify(prod([a, b]), prod([c, d])) == Fixed(6)
    assert [solver.resolve(t) for t in (a, b, c, d)] == [Fixed(n) for n in (2, 3, 3, 2)]


def test_sums_take_their_common_refinement(solver):
    a, b, c = solver.fresh(2), solver.fresh(5), solver.fresh(4)
    solver.unify(concat([a, b]), concat([c, Fixed(3)]))
    first, second = solver.resolve(c).parts
    assert solver.resolve(a) == first
    assert solver.resolve(b) == concat([second, Fixed(3)])


def test_repeated_segments_stay_together(solver):
    a, b = solver.fresh(3), solver.fresh(6)
    solver.unify(b, concat([a, a]))
    assert solver.resolve(b) == Sum((a, a))
    # Seen as a matrix with two rows, the same permutation acts on both.
    assert solver.factor(b, 2) == (Fixed(2), a)
    c, d = solver.fresh(2), solver.fresh(3)
    solver.unify(prod([c, d]), concat([a, a]))
    assert solver.resolve(c) == Fixed(2)
    assert solver.resolve(d) == solver.resolve(a)


def test_atom_against_a_constant_part_stays_free(solver):
    a, b = solver.fresh(3), solver.fresh(8)
    solver.unify(b, concat([Wild(2), a, Wild(3)]))
    left, middle, right = solver.resolve(b).parts
    assert middle == a
    assert isinstance(left, Atom)
    assert isinstance(right, Atom)


def test_reshape_splits_and_joins(solver):
    a = solver.fresh(6)
    flat = solver.reshape((Fixed(2), Fixed(5), a), (10, 6))
    assert flat == (Fixed(10), a)
    heads = solver.reshape(flat, (10, 2, 3))
    assert solver.resolve(a) == prod(heads[1:])
    (joined,) = solver.reshape(heads, (60,))
    assert joined == prod([Fixed(10), *heads[1:]])
    # Rows of six out of 4 x 9: the cuts do not nest.
    b = solver.fresh(9)
    assert solver.reshape((solver.fresh(4), b), (6, 6)) == (Fixed(6), Fixed(6))
    assert solver.resolve(b) == Fixed(9)
    assert solver.reshape((Fixed(0), solver.fresh(2)), (2, 0)) == (Fixed(2), Fixed(0))


def test_index_and_occurrences_of_nested_terms():
    a, b = Atom(3, "a"), Atom(2, "b")
    term = concat([prod([Fixed(2), a]), b])
    p = {"a": np.array([2, 0, 1]), "b": np.array([1, 0])}
    np.testing.assert_array_equal(index(term, p, np), [2, 0, 1, 5, 3, 4, 7, 6])
    np.testing.assert_array_equal(index(prod([b, a]), p, np), [5, 3, 4, 2, 0, 1])
    value = np.arange(16).reshape(2, 8)
    ((found, _, axis),) = occurrences(value, (Fixed(2), term), "a")
    assert found.shape == (2, 2, 3)
    assert axis == 2
    np.testing.assert_array_equal(found[1], [[8, 9, 10], [11, 12, 13]])
    ((found, _, _),) = occurrences(value, (Fixed(2), term), "b")
    np.testing.assert_array_equal(found, value[:, 6:])


def test_rename_leaves_unnamed_atoms_fixed():
    term = prod([Atom(2, 1), concat([Atom(2, 2), Atom(3, 3)])])
    assert rename(term, {1: "x"}) == Prod((Atom(2, "x"), Fixed(5)))


def test_sizes_must_agree(solver):
    with pytest.raises(AssertionError, match="different sizes"):
        solver.unify(solver.fresh(2), solver.fresh(3))
