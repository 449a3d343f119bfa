"""What the recorded vectors of the masked, weighed and selective methods do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests.reference import merging_masks as reference

RNG = np.random.default_rng(0)
SHAPES = {"a": (5, 4), "b": (7,), "c": ()}


def random_tree():
    # Coarse numbers, so that zeros, equal magnitudes and entries within epsilon are frequent.
    return {name: RNG.integers(-3, 4, shape).astype(np.float32) for name, shape in SHAPES.items()}


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in sorted(tree)])


@pytest.fixture(scope="module")
def models():
    base, *models = (random_tree() for _ in range(5))
    return base, models


def test_ram_plus_over_the_whole_model(models):
    base, models = models
    merged = jax.jit(merge.ram_plus(0.5, 0.9, 1.0))(models, base=base)
    taus = np.stack([flat(model) - flat(base) for model in models])
    expected = reference.ram_plus(taus, r=0.5, alpha=0.9, epsilon=1.0)
    np.testing.assert_allclose(flat(merged) - flat(base), expected, atol=1e-5)


@pytest.mark.parametrize(("variant", "ratio"), [("paper", 0.4), ("paper", 1e-3), ("vision", 1.0)])
def test_pcb_on_a_model_of_several_leaves(models, variant, ratio):
    base, models = models
    weights = [0.8, 1.3, 1.0, 0.9]
    method = merge.pcb(ratio, 0.7, weights=weights, variant=variant)
    merged = jax.jit(method)(models, base=base)
    taus = np.stack([flat(model) - flat(base) for model in models])
    expected = 0.7 * reference.pcb(taus, ratio, weights=weights, variant=variant)
    np.testing.assert_allclose(flat(merged) - flat(base), expected, atol=1e-5)


def test_emr_counts_leaves_alike_and_elects_minus_where_the_sum_is_zero():
    zero = {"long": np.zeros(4, np.float32), "short": np.zeros((), np.float32)}
    one = {"long": np.float32([1, 2, -3, 4]), "short": np.float32(2)}
    two = {"long": np.float32([-1, 4, -1, -5]), "short": np.float32(4)}
    method = merge.emr()

    @jax.jit
    def run(models, base):
        plan = method.measure(models, base)
        return plan, method.split(plan, models, base)

    plan, split = run([one, two], zero)
    np.testing.assert_array_equal(split.vector["long"], [-1, 4, -3, -5])
    np.testing.assert_array_equal(
        split.masks["long"], [[False, True, True, False], [True, True, True, True]]
    )
    np.testing.assert_allclose(
        plan["rescalers"], [(10 / 4 + 2) / (7 / 4 + 4), (11 / 4 + 4) / (13 / 4 + 4)], rtol=1e-6
    )


def test_tall_masks_are_strict_and_lam_is_for_each_task():
    base = {"x": np.zeros(3, np.float32)}
    models = [{"x": np.float32([1, 2, 0])}, {"x": np.float32([1, 1, 0])}]
    masks = merge.tall_masks(1.0).masks(models, base=base)["x"]
    np.testing.assert_array_equal(masks, [[False, True, False], [False, False, False]])
    masks = merge.tall_masks([2.0, 0.25]).masks(models, base=base)["x"]
    np.testing.assert_array_equal(masks, [[False, False, False], [True, True, False]])


def test_edges_give_finite_models():
    """One model, no difference at all in one of them, opposite and equal ones."""
    several = ["emr", "tall_masks", "tall_masks(multi_task='ties')", "consensus", "ram", "ram_plus"]
    several += ["pcb", "pcb(variant='vision')"]
    zero, some = np.zeros(9, np.float32), RNG.normal(size=9).astype(np.float32)

    @jax.jit
    def run(models, base):
        texts = several + ["arcee_fusion", "nearswap(0.5)"] * (len(models) == 1)
        return {text: merge.parse(text)(models, base=base) for text in texts}

    for models in ([some], [zero], [zero, some], [some, zero], [some, -some], [some, some]):
        for text, merged in run(models, zero).items():
            assert np.all(np.isfinite(merged)), text
            if not np.any(models):
                np.testing.assert_array_equal(np.ravel(merged), zero, err_msg=text)


@pytest.mark.parametrize("text", ["emr", "tall_masks", "consensus", "arcee_fusion"])
def test_nan_in_the_base_stays_at_its_entry(text):
    base, *models = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    base[2, 3] = np.nan
    merged = merge.parse(text)(models[: 1 if text == "arcee_fusion" else 3], base=base)
    np.testing.assert_array_equal(np.isnan(merged), np.broadcast_to(np.isnan(base), merged.shape))


def test_nan_is_in_the_vector_and_in_every_mask():
    base, *models = RNG.normal(size=(4, 9)).astype(np.float32)
    models[1][2] = np.nan
    for method in (merge.emr(), merge.tall_masks()):
        split = method.split(method.measure(models, base), models, base)
        np.testing.assert_array_equal(np.isnan(split.vector), np.arange(9) == 2)
        assert np.all(split.masks[:, 2])
        compressed = merge.compress(method, models, base=base)
        np.testing.assert_array_equal(compressed.models(base), method(models, base=base))


def test_nearswap_moves_by_t_at_most():
    base = {"x": np.float32([0, 0, 0, 1])}
    other = {"x": np.float32([0.5, -3, 0, 1.25])}
    merged = merge.nearswap(0.5)([other], base=base)["x"]
    np.testing.assert_allclose(merged, [0.5, -0.5, 0, 1.25], rtol=1e-6)


def test_bad_arguments():
    base, one = random_tree(), random_tree()
    for make, match in (
        (lambda: merge.tall_masks(-1.0), "lam"),
        (lambda: merge.tall_masks([0.2, np.nan]), "lam"),
        (lambda: merge.tall_masks(0.4, multi_task="mean"), "'sum', 'ties'"),
        (lambda: merge.tall_masks([0.2, 0.3])([one], base=base), "each of the 1 models"),
        (lambda: merge.consensus(-1), "k must"),
        (lambda: merge.consensus(2, scale=np.inf), "scale"),
        (lambda: merge.pcb(0.0), "above 0"),
        (lambda: merge.pcb(1.5), "ratio"),
        (lambda: merge.pcb(variant="nlp"), "'paper', 'vision'"),
        (lambda: merge.nearswap(0.0), "above 0"),
        (lambda: merge.ram(-1.0), "epsilon"),
        (lambda: merge.ram_plus(alpha=-1.0), "alpha"),
        (lambda: merge.ram_plus(scope="layer"), "'model', 'leaf'"),
        (lambda: merge.twin(1.5), "density"),
        (lambda: merge.twin(compression="topk"), "'svd', 'magnitude', 'bernoulli'"),
        (lambda: merge.twin(exclude=[3]), r"patterns are texts such as '\*/bias', got \[3\]"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    complex_model = {"x": jnp.ones(2, jnp.complex64)}
    for text in ("emr", "tall_masks", "pcb", "ram", "twin"):
        with pytest.raises(TypeError, match="'x' is complex64"):
            merge.parse(text)([complex_model], base=complex_model)
    for text in ("arcee_fusion", "nearswap(0.1)"):
        with pytest.raises(TypeError, match="'x' is complex64"):
            merge.parse(text)([complex_model], base=complex_model)
