import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import trees

TREE = {"b": {"kernel": jnp.ones((2, 3)), "none": None}, "a": [jnp.zeros(2), jnp.arange(2)]}


def test_named_leaves_give_paths_and_keep_none():
    assert [name for name, _ in trees.named_leaves(TREE)] == ["a/0", "a/1", "b/kernel", "b/none"]
    assert trees.named_leaves(3.0) == [("", 3.0)]


def test_map_named_sees_names_and_none():
    named = trees.map_named(lambda name, x: None if x is None else name, TREE)
    assert named == {"b": {"kernel": "b/kernel", "none": None}, "a": ["a/0", "a/1"]}
    with pytest.raises(ValueError, match=r"only in the first: \['b/kernel', 'b/none'\]"):
        trees.map_named(lambda *x: x, TREE, {"a": TREE["a"]})


def test_structures_that_differ_in_containers_only_are_told_apart():
    with pytest.raises(ValueError, match="containers of different types"):
        trees.check_same_structure({"a": (1, 2)}, {"a": [1, 2]})


def test_stack_and_unstack_are_inverse():
    stacked = trees.stack([TREE, jax.tree.map(lambda x: x + 1, TREE)])
    assert stacked["b"]["none"] is None
    assert stacked["b"]["kernel"].shape == (2, 2, 3)
    back = trees.unstack(stacked)
    assert len(back) == 2
    np.testing.assert_array_equal(back[1]["a"][1], [1, 2])
    with pytest.raises(ValueError, match="at least one"):
        trees.stack([])


def test_leading_size():
    assert trees.leading_size({"a": jnp.ones((4, 2)), "b": None, "c": jnp.ones(4)}) == 4
    with pytest.raises(ValueError, match="a: 4, b: scalar"):
        trees.leading_size({"a": jnp.ones(4), "b": jnp.ones(())})
    with pytest.raises(ValueError, match="no leading axis"):
        trees.leading_size({"a": None})


def test_sizes_norms_and_kinds():
    tree = {"a": jnp.full(4, 2.0), "b": jnp.arange(3, dtype=jnp.int32), "c": None}
    assert trees.num_bytes(tree) == 4 * 4 + 3 * 4
    assert float(trees.norm(tree)) == pytest.approx(4.0)
    assert [trees.is_inexact(x) for x in (tree["a"], tree["b"], tree["c"], True)] == [
        True,
        False,
        False,
        False,
    ]


def test_name_keys_depend_on_the_name_alone(key):
    a, b = trees.name_key(key, "a/kernel"), trees.name_key(key, "b/kernel")
    assert jax.random.key_data(a).tolist() != jax.random.key_data(b).tolist()
