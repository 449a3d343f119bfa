import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align, models, trees
from tests.align import networks
from tests.align.test_matching import IMAGES, signed_variables
from tests.align.test_symmetry import mlp, mlp_variables, normal


def agreement(scores, p):
    """The sum over pairs of models of the scores of the units matched, in float64."""
    pairs = [(i, j) for i in range(len(p)) for j in range(i + 1, len(p))]
    return sum(np.asarray(scores[i, j], np.float64)[p[i], p[j]].sum() for i, j in pairs)


def noisy_scores(seed, noise, number=4, size=10):
    """Correlations of models whose units are one set in other orders, with noise; the orders."""
    rng = np.random.default_rng(seed)
    units = rng.normal(size=(size, 30))
    orders = np.stack([rng.permutation(size) for _ in range(number)])
    seen = [units[p] + noise * rng.normal(size=units.shape) for p in orders]
    scores = np.corrcoef(np.concatenate(seen)).reshape(number, size, number, size)
    return scores.transpose(0, 2, 1, 3).astype(np.float32), orders


def test_planted_orders_are_recovered():
    scores, orders = noisy_scores(0, noise=0.5)
    p = np.asarray(align.match_universe(scores))
    np.testing.assert_array_equal(p[0], np.arange(10))
    # Every model's unit p[i, u] is the same planted unit.
    np.testing.assert_array_equal([o[q] for o, q in zip(orders, p, strict=True)], [orders[0]] * 4)


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_matching_all_to_one_model(seed):
    scores, _ = noisy_scores(seed, noise=4)
    p = np.asarray(align.match_universe(scores))
    stars = [
        np.stack(
            [
                np.arange(10) if i == j else align.assignment(jnp.asarray(scores[j, i]))
                for i in range(4)
            ]
        )
        for j in range(4)
    ]
    best = max(agreement(scores, star) for star in stars)
    assert agreement(scores, p) >= best - 1e-4
    assert [sorted(q) for q in p.tolist()] == [list(range(10))] * 4
    if seed == 0:
        assert agreement(scores, p) > best + 0.1
        assert agreement(scores, np.asarray(align.match_universe(scores, max_iterations=0))) == best


def test_only_scores_of_pairs_in_order_are_read():
    scores, _ = noisy_scores(1, noise=2)
    lower = np.tril(np.ones((4, 4), bool))[:, :, None, None]
    np.testing.assert_array_equal(
        align.match_universe(np.where(lower, 99, scores)), align.match_universe(scores)
    )


def noisy(tree, noise, seed):
    return jax.tree.map(lambda x: x + noise * normal(*x.shape, seed=seed), tree)


@functools.cache
def planted(module):
    """A network, three copies of it with their units renumbered and noise, and the answer."""
    variables = signed_variables(module)
    symmetry = align.infer_symmetry(module.apply, variables, IMAGES[:1], check=False)
    drawn = [symmetry.random(jax.random.key(i)) for i in range(3)]
    copies = [symmetry.permute(p, noisy(variables, 0.01, i)) for i, p in enumerate(drawn)]
    return symmetry, copies, drawn


@pytest.mark.parametrize(
    ("module", "how"),
    [
        (networks.Transformer(), "activations"),
        (networks.Transformer(), "weights"),
        (models.CNN(3, (6, 8)), "weights in a drawn order"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_planted_models_come_into_the_order_of_the_first(module, how):
    symmetry, copies, drawn = planted(module)
    if how == "activations":
        batches = [IMAGES[:3], IMAGES[3:]]
        found = align.activation_universe(symmetry, module.apply, copies, batches)
    else:
        key = jax.random.key(0) if "drawn" in how else None
        found = align.weight_universe(symmetry, copies, key=key)
    for i, p in enumerate(drawn):
        expected = symmetry.compose(drawn[0], symmetry.inverse(p))
        for name, q in expected.items():
            np.testing.assert_array_equal(found[name][i], q, err_msg=name)


def inner_products(symmetry, found, layers):
    aligned = jax.vmap(symmetry.permute)(found, trees.stack(layers))
    total = [np.asarray(x, np.float64) for x in jax.tree.leaves(aligned)]
    return sum((np.square(x.sum(0)).sum() - np.square(x).sum()) / 2 for x in total)


def test_weights_of_unlike_models():
    layers = [noisy(mlp_variables((5, 12, 9, 3)), 1, i) for i in range(4)]
    symmetry = align.infer_symmetry(mlp, layers[0], normal(2, 5), check=False)
    found = align.weight_universe(symmetry, layers)
    star = trees.stack([align.weight_matching(symmetry, layers[0], other) for other in layers])
    sweeps = [
        inner_products(symmetry, align.weight_universe(symmetry, layers, max_iterations=n), layers)
        for n in range(3)
    ]
    assert sweeps[0] == inner_products(symmetry, star, layers)
    assert sorted(sweeps) == sweeps
    assert inner_products(symmetry, found, layers) > sweeps[0] + 1
    two = align.weight_universe(symmetry, layers[:2])
    for name, p in two.items():
        np.testing.assert_array_equal(p[0], np.arange(p.shape[1]))
        np.testing.assert_array_equal(p[1], star[name][1])
    x = normal(40, 5)
    by_activations = align.activation_universe(
        symmetry, mlp, layers[:2], [x], statistic="second_moment"
    )
    pair = align.activation_matching(symmetry, mlp, *layers[:2], x, statistic="second_moment")
    for name, p in by_activations.items():
        np.testing.assert_array_equal(p, [np.arange(p.shape[1]), pair[name]])


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_models_far_apart_never_end_below_the_start(seed):
    """The first model moves too, and takes all others back into its order."""
    layers = [noisy(mlp_variables((5, 12, 9, 3)), 5, i) for i in range(4, 8)]
    symmetry = align.infer_symmetry(mlp, layers[0], normal(2, 5), check=False)
    key = None if seed is None else jax.random.key(seed)
    found = align.weight_universe(symmetry, layers, key=key)
    start = align.weight_universe(symmetry, layers, max_iterations=0)
    unmatched = trees.stack([symmetry.identity() for _ in layers])
    after, *before = (inner_products(symmetry, p, layers) for p in (found, start, unmatched))
    assert after > max(before)
    for p in found.values():
        np.testing.assert_array_equal(p[0], np.arange(p.shape[1]))


def test_errors():
    layers, x = mlp_variables(), normal(4, 5)
    symmetry = align.infer_symmetry(mlp, layers, x, check=False)
    broken = jax.tree.map(np.array, layers)
    broken[1]["w"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"must have shape \[N, N, n, n\], got \(2, 3, 3\)"):
        align.match_universe(np.ones((2, 3, 3)))
    with pytest.raises(ValueError, match="finite"):
        align.match_universe(np.full((2, 2, 3, 3), np.nan))
    with pytest.raises(ValueError, match="group '1' contain NaN"):
        align.activation_universe(symmetry, mlp, [layers, broken], [x])
    with pytest.raises(ValueError, match="unknown statistic 'cosine'"):
        align.activation_universe(symmetry, mlp, [layers, layers], [x], statistic="cosine")
    with pytest.raises(ValueError, match="at least two models"):
        align.weight_universe(symmetry, [layers])
    with pytest.raises(ValueError, match="leaf '1/w' contains NaN"):
        align.weight_universe(symmetry, [layers, broken])
