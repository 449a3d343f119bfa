"""What receivers make of compressed messages, and how long these are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.agents import compression
from tests import golden

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TREE = {
    "a": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=13), jnp.bfloat16),
    "count": jnp.asarray(3, jnp.int32),
    "empty": jnp.zeros((0, 2)),
    "none": None,
    "zero": jnp.zeros(7),
}
TEXTS = (
    "identity",
    "quantise(4)",
    "quantise(4, bucket=6, unbiased=False)",
    "random_k(0.25)",
    "random_k(0.5, scope='leaf', unbiased=True)",
    "sign",
    "top_k(0.25)",
    "top_k(0.25, scope='leaf')",
)
MADE = {text: compression.parse(text) for text in TEXTS}


@pytest.fixture(scope="module")
def found():
    """What 300 keys make of the tree."""
    keys = jax.random.split(KEY, 300)
    return jax.jit(
        lambda tree: {
            text: jax.vmap(made.compress, (0, None))(keys, tree) for text, made in MADE.items()
        }
    )(TREE)


def test_every_compressor_is_tested():
    assert {text.split("(")[0] for text in TEXTS} == set(compression.COMPRESSORS)


def test_other_leaves_and_dtypes_stay(found):
    for text, sent in found.items():
        assert sent["none"] is None
        np.testing.assert_array_equal(sent["count"], 3, err_msg=text)
        assert sent["empty"].shape == (300, 0, 2)
        assert not sent["zero"].any()
        assert sent["b"].dtype == jnp.bfloat16


def test_the_largest_entries(found):
    whole = np.concatenate([np.ravel(TREE[k]).astype(np.float32) for k in ("a", "b", "zero")])
    for text, groups in {
        "top_k(0.25)": [("a", "b", "zero")],
        "top_k(0.25, scope='leaf')": [("a",), ("b",)],
    }.items():
        for group in groups:
            given = np.concatenate([np.ravel(TREE[k]).astype(np.float32) for k in group])
            sent = [np.ravel(found[text][k][0]).astype(np.float32) for k in group]
            order = np.argsort(-np.abs(given), kind="stable")[: round(0.25 * given.size)]
            expected = np.zeros_like(given)
            expected[order] = given[order]
            np.testing.assert_array_equal(np.concatenate(sent), expected, err_msg=text)
    assert whole.size == 40
    ties = compression.top_k(0.5).compress(KEY, jnp.array([1.0, -1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(ties, [1, -1, 0, 0])


def test_means_of_what_is_drawn(found):
    a = np.asarray(TREE["a"])
    for text in ("quantise(4)", "random_k(0.5, scope='leaf', unbiased=True)"):
        sent = np.asarray(found[text]["a"])
        error = sent.std(axis=0) / np.sqrt(len(sent))
        assert np.all(np.abs(sent.mean(axis=0) - a) < 4.5 * error + 1e-6), text
    kept = np.asarray(found["random_k(0.25)"]["a"])
    np.testing.assert_array_equal(kept[kept != 0], np.broadcast_to(a, kept.shape)[kept != 0])
    together = [np.asarray(found["random_k(0.25)"][k]).reshape(300, -1) for k in ("a", "b")]
    assert np.all(np.count_nonzero(np.concatenate(together, axis=1), axis=1) <= 10)
    assert abs(np.mean(kept != 0) - 0.25) < 0.02
    signs = np.asarray(found["sign"]["a"][0])
    np.testing.assert_allclose(signs, np.abs(a).mean() * np.sign(a), rtol=1e-6)


def test_few_levels_and_bounded_errors(found):
    a = np.asarray(TREE["a"]).reshape(-1)
    levels = np.asarray(found["quantise(4)"]["a"]).reshape(300, -1) / np.linalg.norm(a) * 7
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
    assert len(np.unique(np.round(levels[:, 0]))) == 2
    biased = np.asarray(found["quantise(4, bucket=6, unbiased=False)"]["a"]).reshape(300, -1)
    bound = 1 - 1 / (1 + min(6 / 49, np.sqrt(6) / 7))
    for bucket in (slice(0, 6), slice(6, 12), slice(18, 20)):
        error = np.mean(np.sum(np.square(biased - a)[:, bucket], axis=1))
        assert error < 1.1 * bound * np.sum(np.square(a[bucket]))
    huge = compression.quantise(8).compress(KEY, jnp.array([1e30, -1e30, 1e-30]))
    assert np.all(np.isfinite(huge))


def test_bytes_of_messages():
    shapes = jax.eval_shape(lambda: TREE)
    sizes = {text: made.num_bytes(shapes) for text, made in MADE.items()}
    assert sizes == {
        "identity": 4 * 20 + 2 * 13 + 4 + 4 * 7,
        "quantise(4)": (10 + 4) + (7 + 4) + (4 + 4) + 4,
        "quantise(4, bucket=6, unbiased=False)": (10 + 4 * 4) + (7 + 3 * 4) + (4 + 2 * 4) + 4,
        "random_k(0.25)": 4 * 10 + 8 + 4,
        "random_k(0.5, scope='leaf', unbiased=True)": 4 * 10 + 2 * 6 + 4 * 4 + 8 + 4,
        "sign": (3 + 4) + (2 + 4) + (1 + 4) + 4,
        "top_k(0.25)": 4 * 10 + 5 + 4,
        "top_k(0.25, scope='leaf')": (4 * 5 + 3) + (2 * 3 + 2) + (4 * 2 + 1) + 4,
    }
    sparse = jnp.zeros(3200)
    assert compression.top_k(0.01).num_bytes(sparse) == 32 * (4 + 4)


@pytest.mark.parametrize("case", ["choco_ring", "choco_star"])
def test_choco(case):
    """CHOCO on recorded local updates: gossip of what top-k lets through."""
    v = golden.load("decentral/public_extra")
    adjacency = v[f"{case}/adj"].astype(bool)
    gamma, alpha, rounds = {"choco_ring": (0.6, 0.3, 5), "choco_star": (0.4, 0.5, 4)}[case]
    degree = adjacency.sum(axis=1)
    weights = adjacency / (1 + np.maximum(degree[:, None], degree))
    weights = jnp.asarray(weights + np.diag(1 - weights.sum(axis=1)), jnp.float32)
    compress = jax.jit(jax.vmap(compression.top_k(alpha).compress, (None, 0)))
    x = jnp.asarray(v[f"{case}/X0"], jnp.float32)
    public = jnp.zeros_like(x)
    for t in range(rounds):
        x = x + jnp.asarray(v[f"{case}/U"][t], jnp.float32)
        public = public + compress(KEY, x - public)
        x = x + gamma * (weights @ public - public)
        np.testing.assert_allclose(x, v[f"{case}/X"][t], rtol=2e-5, atol=1e-5)


def test_errors():
    for text, message in {
        "top_k(0.0)": r"top_k takes a fraction in \(0, 1\], got 0.0",
        "random_k(0.1, scope='layer')": "unknown scope 'layer'",
        "quantise(1)": "quantise takes 2 to 16 bits, one of them the sign, got 1",
        "quantise(4, bucket=0)": "a bucket has at least 1 entry",
        "topk(0.1)": "did you mean 'top_k'",
    }.items():
        with pytest.raises(ValueError, match=message):
            compression.parse(text)
    with pytest.raises(TypeError, match="leaf 'z' is complex64"):
        compression.sign().compress(KEY, {"z": jnp.zeros(2, jnp.complex64)})
