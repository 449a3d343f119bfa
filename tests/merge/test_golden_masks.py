"""Recorded vectors of the methods that mask, weigh or select entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests import golden
from tests.merge.test_golden import ATOL, check, compare, flat, inputs, tree  # noqa: F401


def test_emr(inputs):  # noqa: F811
    base, models = inputs
    v = golden.load("merging/public_geometry")
    method = merge.emr()

    @jax.jit
    def run(models, base):
        plan = method.measure(models, base)
        return plan, method.split(plan, models, base), method.combine(plan, models, base)

    plan, split, merged = run(models, base)
    np.testing.assert_allclose(plan["rescalers"], v["emr/fusionbench/rescalers"], rtol=1e-6)
    compare(split.vector, v, "emr/fusionbench/unified")
    for i in range(len(models)):
        one = {name: leaf[i] for name, leaf in merged.items()}
        compare(one, v, f"emr/fusionbench/model/ft{i}")
        for name, mask in tree(v, f"emr/fusionbench/mask/ft{i}").items():
            np.testing.assert_array_equal(split.masks[name][i], mask, err_msg=name)


@pytest.mark.parametrize("kind", ["sum", "ties"])
def test_tall_masks_and_consensus(inputs, kind):  # noqa: F811
    base, models = inputs
    base, models = {"flat": flat(base)}, [{"flat": flat(model)} for model in models]
    v = golden.load("merging/public_tall")
    lams = (0.2, 0.4, 0.6, 1.0)

    def whole(method, models, base):
        plan = method.measure(models, base)
        return method.split(plan, models, base), method.combine(plan, models, base)

    @jax.jit
    def run(models, base):
        def tall(lam):
            return whole(merge.tall_masks(lam, multi_task=kind), models, base)

        def consensus(k):
            return whole(merge.consensus(k, 0.4, 0.3, multi_task=kind), models, base)

        return jax.vmap(tall)(jnp.asarray(lams)), jax.vmap(consensus)(jnp.arange(6))

    (split, merged), consensus = run(models, base)
    name = {"sum": "sum_flat", "ties": "ties20_dis-sum_flat"}[kind]
    vector = split.vector["flat"][0]
    np.testing.assert_allclose(vector, v[f"multi_task_vector/{name}"], rtol=0, atol=ATOL)
    for i, lam in enumerate(lams):
        case = f"tall/official/{kind}/lambda={lam}"
        np.testing.assert_array_equal(split.masks["flat"][i], v[f"{case}/mask_flat"])
        expected = v[f"{case}/reconstructed_flat"]
        np.testing.assert_allclose(merged["flat"][i], expected, rtol=0, atol=ATOL)

    split, merged = consensus
    for k in range(6):
        case = f"consensus/official/{kind}/lambda=0.4/k={k}"
        np.testing.assert_array_equal(split.masks["flat"][k], v[f"{case}/mask_flat"])
        expected = v[f"{case}/alpha=0.3/merged_flat"]
        np.testing.assert_allclose(merged["flat"][k], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("variant", ["paper", "vision"])
def test_pcb(inputs, variant):  # noqa: F811
    base, models = inputs
    v = golden.load("merging/public_pcb")
    group, suffix, scale = {
        "paper": ("official", "merged_delta_flat", 1.0),
        "vision": ("vision_ES", "merged_delta_flat_lam1.2", 1.2),
    }[variant]

    big, ratios = v["big_deltas"], (0.1, 0.05)
    deltas = {"model": np.stack([flat(m) - flat(base) for m in models]), "big": big}

    @jax.jit
    def run(ratio, deltas):
        method = merge.pcb(ratio, scale, variant=variant)
        zero = jnp.zeros(deltas.shape[1])
        plan = method.measure(list(deltas), zero)
        return plan["0/balance"], method.combine(plan, list(deltas), zero)

    for which, taus in deltas.items():
        for ratio in ratios:
            case = f"pcb/{group}/{which}/ratio={ratio}"
            plan, merged = run(ratio, taus)
            np.testing.assert_allclose(merged, v[f"{case}/{suffix}"], rtol=0, atol=ATOL)
            ends = (np.asarray(plan[end])[:, None] for end in ("low", "high"))
            clamped = np.sign(taus) * np.clip(np.abs(taus), *ends)
            np.testing.assert_array_equal(clamped, v[f"{case}/clamped_flat"])


def test_pairs(inputs):  # noqa: F811
    base, models = inputs
    v = golden.load("merging/public_geometry")
    methods = {
        "arcee_fusion/mergekit": merge.arcee_fusion(),
        "nearswap/mergekit": merge.nearswap(0.01),
    }
    check(methods, v, models[:1], base)
    check(methods, v, [base, models[0]])


def test_ram(inputs):  # noqa: F811
    base, models = inputs
    v = golden.load("merging/public_geometry")
    methods = {
        "ram/mergekit": merge.ram(1e-5),
        "ramplus_tl/mergekit": merge.ram_plus(0.1, 0.2, 1e-5, scope="leaf"),
    }
    check(methods, v, models, base)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_twin(inputs, density):  # noqa: F811
    base, models = inputs
    v = golden.load("merging/public_twin")

    @jax.jit
    def run(models, base, router_weights):
        method = merge.twin(density)
        merged = method(models, base=base, router_weights=router_weights)
        largest = merge.compress(merge.twin(density, compression="magnitude"), models, base=base)
        return merge.compress(method, models, base=base), largest, merged

    svd, largest, merged = run(models, base, v["router_weights"])
    compare(dict(svd.shared), v, "shared")
    for name in base:
        # The reference cannot factor the leaf of four axes.
        if name == "conv/kernel":
            continue
        for i in range(len(models)):
            expected = v[f"exclusive_svd/density={density}/ft{i}::{name}"]
            np.testing.assert_allclose(svd.exclusive(name)[i], expected, rtol=0, atol=ATOL)
        for row in range(3):
            expected = v[f"twin/density={density}/router_row{row}::{name}"]
            np.testing.assert_allclose(merged[name][row], expected, rtol=0, atol=ATOL)
    kept = {name: largest.exclusive(name)[0] for name in base}
    compare(kept, v, f"exclusive_magnitude/density={density}/ft0")
    for name, value in tree(v, f"exclusive_magnitude/density={density}/ft0").items():
        np.testing.assert_array_equal(kept[name] != 0, value != 0, err_msg=name)


def test_pcb_compiled_keeps_what_it_keeps_otherwise():
    run = jax.jit(lambda models, base: merge.pcb()(models, base=base))
    for seed in range(100, 110):
        rng = np.random.default_rng(seed)
        models = [{"a": np.float32(0.02 * rng.normal(size=(64, 64)))} for _ in range(4)]
        base = {"a": np.zeros((64, 64), np.float32)}
        plain = merge.pcb()(models, base=base)
        compiled = run(models, base)
        np.testing.assert_allclose(compiled["a"], plain["a"], atol=1e-6)
