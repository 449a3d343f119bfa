"""Compressed models: exact, small, and safe in a file."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge, trees
from tests.merge.test_battery import BASE_SEED, assert_close, assert_equal, model

NUM_MODELS = 3
ROUTER = np.asarray([[0.2, 0.5, 0.3], [1, 0, 0]], np.float32)


def tree(seed):
    """The battery's model, and a leaf of four axes."""
    conv = np.random.default_rng(seed + 1000).normal(size=(3, 3, 2, 5))
    return model(seed) | {"conv": jnp.asarray(conv, "float32")}


def experts():
    return tree(BASE_SEED), [tree(seed) for seed in range(NUM_MODELS)]


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("tall_masks([0.2, 0.4, 0.6])", "bfloat16"),
        ("emr", "float32"),
    ],
)
def test_masked_models_come_back_to_the_bit(text, dtype, tmp_path):
    base, *models = (model(seed, dtype) for seed in (BASE_SEED, *range(NUM_MODELS)))
    method = merge.parse(text)
    merged = method(models, base=base)
    compressed = merge.compress(method, models, base=base)
    merge.save_compressed(tmp_path / "models.npz", compressed, base)
    read = merge.load_compressed(tmp_path / "models.npz", base)
    assert_equal(read, compressed)
    assert_equal(read.models(base), merged)
    for task, expected in enumerate(trees.unstack(merged)):
        assert_equal(read.model(base, task), expected)
    traced = jax.jit(lambda c, b, t: c.model(b, t))(read, base, 1)
    assert_close(traced, trees.unstack(merged)[1], rtol=1e-6, atol=1e-6)

    found = trees.map_named(lambda name, _: read.masks(name) if name in read.bits else None, base)
    assert_equal(found, method.masks(models, base=base))


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_consensus_is_made_of_the_masks_without_the_models(k):
    base, models = experts()
    lam = [0.2, 0.4, 0.6]
    compressed = merge.compress(merge.tall_masks(lam), models, base=base)
    expected = merge.consensus(k, lam, 0.7)(models, base=base)
    assert_equal(compressed.consensus(base, k, 0.7), expected)


@pytest.mark.parametrize("compression", ["svd", "magnitude", "bernoulli"])
def test_twin_merges_again_without_the_models(compression, tmp_path):
    base, models = experts()
    method = merge.twin(0.5, compression=compression, exclude="*gain")
    key = jax.random.key(0)
    compressed = merge.compress(method, models, base=base, key=key)
    merge.save_compressed(tmp_path / "twin.npz", compressed, base)
    read = merge.load_compressed(tmp_path / "twin.npz", base)
    assert_equal(read, compressed)
    for weights in (ROUTER, ROUTER[0]):
        merged = method(models, base=base, key=key, router_weights=weights)
        assert_equal(read.merge(base, weights), merged)
    assert merged["steps"] == base["steps"]
    sure = read.merge(base, ROUTER)["dense"]["gain"][1]
    np.testing.assert_allclose(sure, models[0]["dense"]["gain"], rtol=1e-6)


def test_twin_bernoulli_keeps_the_drawn_entries_rescaled():
    base, (first, *_) = experts()
    method = merge.twin(0.25, 0.0, compression="bernoulli")
    models = [{"conv": first["conv"]}] * 40
    compressed = merge.compress(method, models, base={"conv": base["conv"]}, key=jax.random.key(3))
    kept = np.asarray(compressed.exclusive("conv"))
    tau = np.asarray(first["conv"] - base["conv"])
    np.testing.assert_allclose(kept, np.where(kept != 0, tau / 0.25, 0), rtol=1e-5)
    # 3600 draws; five standard deviations.
    assert abs(np.mean(kept != 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / kept.size)
    assert len({row.tobytes() for row in kept != 0}) > 30
    with pytest.raises(ValueError, match="key="):
        merge.compress(method, models, base={"conv": base["conv"]})


def test_twin_at_density_0_and_1():
    base, models = experts()
    shared = merge.task_arithmetic(0.3)(models, base=base)
    one_hot = [0.0, 1.0, 0.0]
    for compression in ("svd", "magnitude"):
        for density, expected in ((0.0, shared), (1.0, models[1])):
            method = merge.twin(density, compression=compression)
            merged = method(models, base=base, router_weights=one_hot)
            assert_close(merged["dense"], expected["dense"], rtol=1e-5, atol=1e-6)
            assert_close(merged["conv"], expected["conv"], rtol=1e-5, atol=1e-6)


def test_twin_factors_a_leaf_of_four_axes_as_a_matrix():
    base, models = experts()
    compressed = merge.compress(merge.twin(0.4, 0.0), models, base=base)
    rest = (np.asarray(models[2]["conv"], np.float64) - base["conv"]).reshape(18, 5)
    left = np.linalg.svd(rest)[0][:, :2]
    expected = left @ left.T @ rest
    assert np.linalg.matrix_rank(expected) == 2
    found = compressed.exclusive("conv")[2].reshape(18, 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert compressed.left["conv"].shape == (3, 18, 2)
    assert compressed.right["conv"].shape == (3, 2, 5)


def test_sizes():
    rng = np.random.default_rng(0)
    base, *models = ({"w": jnp.asarray(rng.normal(size=1001), "float32")} for _ in range(9))
    compressed = merge.compress(merge.tall_masks(0.4), models, base=base)
    packed = 8 * -(-1001 // 8)
    assert merge.compressed_sizes(compressed, base) == {
        "base": 4004,
        "compressed": 4004 + packed + 8 * 4,
        "models": 8 * 4004,
    }


def test_errors(tmp_path):
    base, models = experts()
    compressed = merge.compress(merge.emr(), models, base=base)
    path = tmp_path / "models.npz"
    merge.save_compressed(path, compressed, base)
    for method, says in (
        (merge.average(), "method$"),
        (merge.consensus(), r"method; .*\.consensus\("),
    ):
        with pytest.raises(TypeError, match=f"tall_masks, emr or twin; got another {says}"):
            merge.compress(method, models, base=base)
    with pytest.raises(TypeError, match="got 'emr'"):
        merge.compress("emr", models, base=base)
    with pytest.raises(TypeError, match="key is a PRNG key"):
        merge.compress(merge.twin(), models, base=base, key=0)
    for task in (-1, 3):
        with pytest.raises(ValueError, match=r"0 \.\.\. 2"):
            compressed.model(base, task)
    wider = base | {"conv": jnp.ones((3, 3, 2, 6))}
    for use in (
        compressed.models,
        lambda other: merge.save_compressed(path, compressed, other),
        lambda other: merge.load_compressed(path, other),
    ):
        with pytest.raises(ValueError, match="'conv'"):
            use(wider)
        with pytest.raises(ValueError, match="'conv'"):
            use({name: leaf for name, leaf in base.items() if name != "conv"})
    moved = base | {"conv": base["conv"].at[0, 0, 0, 0].add(1)}
    with pytest.raises(ValueError, match=r"'conv' is .* with checksum"):
        merge.load_compressed(path, moved)
    with pytest.raises(FileNotFoundError):
        merge.load_compressed(tmp_path / "nothing.npz", base)
    with pytest.raises(ValueError, match="router_weights"):
        merge.twin()(models, base=base)
    with pytest.raises(ValueError, match=r"for the 3 models, got shape \(2,\)"):
        merge.twin()(models, base=base, router_weights=[0.5, 0.5])


def test_a_damaged_file_is_an_error(tmp_path):
    base, models = experts()
    path = tmp_path / "models.npz"
    merge.save_compressed(path, merge.compress(merge.emr(), models, base=base), base)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"vector/conv") + 200] ^= 255
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    other = (tmp_path / "other.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b"not an archive", b"", other):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole file"):
            merge.load_compressed(path, base)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    base, models = experts()
    path = tmp_path / "models.npz"
    merge.save_compressed(path, merge.compress(merge.emr(), models, base=base), base)
    before = path.read_bytes()

    def full(file):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        merge.save_compressed(path, merge.compress(merge.tall_masks(), models, base=base), base)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["models.npz"]
