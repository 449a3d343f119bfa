"""Recorded inputs and outputs of mergekit, FusionBench and the authors' own codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests import golden

WEIGHTS = (0.7, 0.2, 0.4, 0.9)
ATOL = 2e-6


def tree(vectors, case):
    prefix = f"{case}::"
    return {k.removeprefix(prefix): v for k, v in vectors.items() if k.startswith(prefix)}


def flat(model):
    """The reference's flat vector: leaves by sorted name."""
    return np.concatenate([np.ravel(model[name]) for name in sorted(model)])


@pytest.fixture(scope="module")
def inputs():
    vectors = golden.load("merging/public_inputs")
    return tree(vectors, "base"), [tree(vectors, f"ft{i}") for i in range(4)]


def check(methods, vectors, models, base=None, **inputs):
    """Compiles all the methods as one program, which is much quicker than one by one."""
    merged = jax.jit(lambda *a, **k: {case: m(*a, **k) for case, m in methods.items()})(
        models, base=base, **inputs
    )
    for case, model in merged.items():
        compare(model, vectors, case)


def compare(merged, vectors, case):
    expected = tree(vectors, case)
    assert expected, f"no case {case}"
    assert expected.keys() == merged.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=0, atol=ATOL, err_msg=f"{case} {name}")


def test_linear(inputs):
    base, models = inputs
    v = golden.load("merging/public_linear")
    zeros = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    shares = np.asarray(WEIGHTS) / np.sum(WEIGHTS)
    plain_sum = merge.task_arithmetic(1.0, WEIGHTS)
    methods = {
        "average/fusionbench": merge.average(),
        "weighted/mergekit/normalize=True": merge.average(WEIGHTS),
        "task_arithmetic/fusionbench": merge.task_arithmetic(),
        "task_arithmetic/mergekit/normalize=False": merge.task_arithmetic(0.3, WEIGHTS),
        "task_arithmetic/mergekit/normalize=True": merge.task_arithmetic(0.3, shares),
        "magmax/fusionbench": merge.parse("reduce('max') | rescale(0.3)"),
    }
    check(methods, v, models, base)
    check({"weighted/mergekit/normalize=False": plain_sum}, v, models, zeros)


def test_slerp(inputs):
    base, models = inputs
    v = golden.load("merging/public_spherical")
    deltas = [{name: leaf - base[name] for name, leaf in m.items()} for m in models[:2]]
    places = (0.0, 0.3, 0.5, 1.0)
    for peer in ("mergekit", "fusionbench"):
        check({f"slerp/{peer}/t={t}": merge.slerp(t) for t in places}, v, models[:2])
    check({f"slerp_of_deltas/mergekit/t={t}": merge.slerp(t) for t in places}, v, deltas)


def test_slerp_of_zero_parallel_and_opposite_vectors():
    v = golden.load("merging/public_spherical")
    one = v["slerp_edge/v"]
    pairs = {
        "zero_v": (0 * one, one),
        "v_zero": (one, 0 * one),
        "v_2v": (one, 2 * one),
        "v_minus_v": (one, -one),
        "v_v": (one, one),
    }
    for name, pair in pairs.items():
        for t in (0.25, 0.5):
            expected = v[f"slerp_edge/{name}/t={t}/mergekit_slerp"]
            merged = merge.slerp(t)([{"v": x} for x in pair])["v"]
            np.testing.assert_allclose(merged, expected, rtol=0, atol=ATOL, err_msg=name)


@pytest.mark.parametrize(("k", "density"), [("20", 0.2), ("0.5", 0.5)])
def test_ties_official(inputs, k, density):
    base, models = inputs
    v = golden.load("merging/public_ties")
    case = f"ties/official/K={k}"
    methods = {
        f"{case}/mass/dis-{reduce}": merge.ties(density, 0.3, reduce=reduce)
        for reduce in ("mean", "sum", "max")
    }
    methods[f"ties/fusionbench/K={k}/sum"] = merge.ties(density, 0.3, reduce="sum")
    for by in ("normfrac", "normmass"):
        methods[f"{case}/{by}/dis-mean"] = merge.parse(
            f"trim({density}) | elect_sign({by!r}) | reduce('mean') | rescale(0.3)"
        )
    check(methods, v, models, base)


@pytest.mark.parametrize(("k", "density"), [("20", 0.2), ("0.5", 0.5)])
def test_ties_decisions(inputs, k, density):
    """The masks and signs behind the merge, exactly."""
    base, models = inputs
    v = golden.load("merging/public_ties")
    plan = merge.ties(density).measure(models, base)
    deltas = np.stack([flat(m) - flat(base) for m in models])
    mask = np.abs(deltas) >= np.asarray(plan["0/trim"]["threshold"])[:, None]
    np.testing.assert_array_equal(mask, v[f"ties/official/K={k}/trim_mask_flat"])
    np.testing.assert_array_equal(
        mask.mean(axis=1, dtype=np.float32), v[f"ties/official/K={k}/kept_fraction"]
    )

    sign = {}
    for name in base:
        leaf = merge.TaskVectors(
            jnp.stack([jnp.asarray(m[name] - base[name]) for m in models]), jnp.ones(4)
        )
        for part, stage in (("0/trim", merge.trim(density)), ("2/elect_sign", merge.elect_sign())):
            leaf = stage.apply(plan[part], name, leaf)
        sign[name] = leaf.sign
    np.testing.assert_array_equal(flat(sign), v[f"ties/official/K={k}/elected_sign_flat"])


@pytest.mark.parametrize("k", ["25", "50", "75", "0.5"])
def test_ties_edges(k):
    """Columns that sum to zero, zero columns, magnitudes equal to the threshold."""
    v = golden.load("merging/public_ties")
    density = float(k) / 100 if float(k) > 1 else float(k)
    models = [{"v": x} for x in v["ties_edge/deltas"]]
    base = {"v": np.zeros(8, np.float32)}
    plan = merge.ties(density).measure(models, base)
    deltas = v["ties_edge/deltas"]
    kept = np.abs(deltas) >= np.asarray(plan["0/trim"]["threshold"])[:, None]
    # A zero that reaches a threshold of zero counts as kept, which changes nothing.
    np.testing.assert_array_equal(kept, v[f"ties_edge/K={k}/mask"])
    for reduce in ("mean", "sum", "max"):
        merged = merge.ties(density, reduce=reduce)(models, base=base)["v"]
        np.testing.assert_array_equal(merged, v[f"ties_edge/K={k}/dis-{reduce}"], err_msg=reduce)


def test_ties_keeps_one_entry_at_the_least_density():
    v = golden.load("merging/public_ties")
    deltas = v["ties_edge/deltas"]
    for model, expected in zip(deltas, v["ties_edge/K=0.0/trimmed"], strict=True):
        method = merge.parse("trim(density=1e-9) | reduce")
        merged = method([{"v": model}], base={"v": np.zeros(8, np.float32)})["v"]
        np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_ties_mergekit(inputs, density):
    base, models = inputs
    v = golden.load("merging/public_ties")

    def mergekit(weights, scale, reduce):
        return merge.chain(
            merge.trim(density, scope="leaf", exact=True),
            merge.weigh(weights),
            merge.elect_sign(zero="positive"),
            merge.reduce(reduce),
            merge.rescale(scale),
        )

    case = f"ties/mergekit/density={density}"
    methods = {
        f"{case}/normalize=True": mergekit(WEIGHTS, 0.3, "mean"),
        f"{case}/normalize=False": mergekit(WEIGHTS, 0.3, "sum"),
        f"{case}/unit_weights": mergekit(None, 1.0, "mean"),
    }
    check(methods, v, models, base)


def test_ties_mergekit_without_trim():
    v = golden.load("merging/public_ties")
    method = merge.parse("elect_sign(zero='positive') | reduce('mean')")
    models = [{"x": x} for x in v["ties_edge/deltas"]]
    check({"ties_edge/mergekit/density=1": method}, v, models, {"x": np.zeros(8, np.float32)})


def test_fisher(inputs):
    _, models = inputs
    fusionbench = golden.load("merging/public_fisher")
    official = golden.load("merging/public_fisher_official")
    fishers = [tree(fusionbench, f"fisher/ft{i}") for i in range(len(models))]
    of_official, of_fusionbench = {}, {}
    for coeff, weights in (("uniform", None), ("weights", WEIGHTS)):
        for normalize in (False, True):
            for mode, favor in (("max", False), ("first", True)):
                case = f"merged/official/coeff={coeff}/favor_target={favor}/normalize={normalize}"
                of_official[case] = merge.fisher(weights, normalize=normalize, floor_mode=mode)
            case = f"merged/fusionbench/normalize={normalize}/coeff={coeff}"
            of_fusionbench[case] = merge.fisher(weights, normalize=normalize, floor_mode="add")
    check(of_official, official, models, fishers=fishers)
    check(of_fusionbench, fusionbench, models, fishers=fishers)

    ones = [jax.tree.map(np.ones_like, model) for model in models]
    isometric = {"isometric/official/coeff=weights": merge.fisher(WEIGHTS)}
    check(isometric, official, models, fishers=ones)


@pytest.mark.parametrize("model", [0, 1])
def test_diagonal_fisher(model):
    v = golden.load("merging/public_fisher")
    official = golden.load("merging/public_fisher_official")
    params = {name: v[f"tiny/model{model}/{name}"] for name in ("kernel", "bias")}

    def log_probs(params, x):
        return jax.nn.log_softmax(x @ params["kernel"] + params["bias"])

    found = jax.jit(lambda p, x: merge.diagonal_fisher(log_probs, p, x))(params, v["tiny/X"])
    for name, value in found.items():
        expected = official[f"tiny/official/fisher/model{model}/{name}"]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=ATOL)
