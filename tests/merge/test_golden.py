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
    shares = np.asarray(WEIGHTS) / np.sum(WEIGHTS)
    methods = {
        "average/fusionbench": merge.average(),
        "weighted/mergekit/normalize=True": merge.average(WEIGHTS),
        "weighted/mergekit/normalize=False": merge.average(WEIGHTS, normalize=False),
        "task_arithmetic/fusionbench": merge.task_arithmetic(),
        "task_arithmetic/mergekit/normalize=False": merge.task_arithmetic(0.3, WEIGHTS),
        "task_arithmetic/mergekit/normalize=True": merge.task_arithmetic(0.3, shares),
    }
    check(methods, v, models, base)


def test_slerp(inputs):
    base, models = inputs
    v = golden.load("merging/public_spherical")
    deltas = [{name: leaf - base[name] for name, leaf in m.items()} for m in models[:2]]
    places = (0.0, 0.3, 0.5, 1.0)

    @jax.jit
    def run(places, pair):
        return jax.vmap(lambda t: merge.slerp(t)(pair))(places)

    for pair, cases in (
        (models[:2], ("slerp/mergekit", "slerp/fusionbench")),
        (deltas, ("slerp_of_deltas/mergekit",)),
    ):
        merged = run(np.asarray(places, np.float32), pair)
        for i, t in enumerate(places):
            for case in cases:
                compare({name: x[i] for name, x in merged.items()}, v, f"{case}/t={t}")


@pytest.mark.parametrize(
    ("method", "case"), [(merge.slerp, "mergekit_slerp"), (merge.nuslerp, "mergekit_nuslerp_flat")]
)
def test_arcs_between_zero_parallel_and_opposite_vectors(method, case):
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
            expected = v[f"slerp_edge/{name}/t={t}/{case}"]
            merged = method(t)([{"v": x} for x in pair])["v"]
            np.testing.assert_allclose(merged, expected, rtol=0, atol=ATOL, err_msg=name)


def test_ties_official(inputs):
    base, models = inputs
    v = golden.load("merging/public_ties")
    check({"ties/official/K=20/mass/dis-mean": merge.ties(0.2, 0.3)}, v, models, base)

    # The rule does not see leaves, so the other cases run on one flat leaf, quicker to compile.
    methods = {}
    for k, density in (("20", 0.2), ("0.5", 0.5)):
        for reduce in ("mean", "sum", "max"):
            case = f"ties/official/K={k}/mass/dis-{reduce}"
            methods[case] = merge.ties(density, 0.3, reduce=reduce)
        methods[f"ties/fusionbench/K={k}/sum"] = merge.ties(density, 0.3, reduce="sum")
        for by in ("normfrac", "normmass"):
            methods[f"ties/official/K={k}/{by}/dis-mean"] = merge.parse(
                f"trim({density}) | elect_sign({by!r}) | reduce('mean') | rescale(0.3)"
            )
    vectors = {f"{case}::flat": flat(tree(v, case)) for case in methods}
    check(methods, vectors, [{"flat": flat(model)} for model in models], {"flat": flat(base)})


@pytest.mark.parametrize(("k", "density"), [("20", 0.2), ("0.5", 0.5)])
def test_ties_decisions(inputs, k, density):
    """The masks and signs behind the merge, exactly."""
    base, models = inputs
    v = golden.load("merging/public_ties")
    stages = {"0/trim": merge.trim(density), "1/elect_sign": merge.elect_sign()}
    method = merge.chain(*stages.values(), merge.reduce())

    @jax.jit
    def decide(models, base):
        plan, signs = method.measure(models, base), {}
        for name in base:
            taus = jnp.stack([model[name] - base[name] for model in models])
            leaf = merge.TaskVectors(taus, jnp.ones(len(models)))
            for part, stage in stages.items():
                leaf = stage.apply(plan[part], name, leaf)
            signs[name] = leaf.sign
        return plan, signs

    plan, signs = decide(models, base)
    deltas = np.stack([flat(model) - flat(base) for model in models])
    mask = np.abs(deltas) >= np.asarray(plan["0/trim"]["threshold"])[:, None]
    np.testing.assert_array_equal(mask, v[f"ties/official/K={k}/trim_mask_flat"])
    kept = mask.mean(axis=1, dtype=np.float32)
    np.testing.assert_array_equal(kept, v[f"ties/official/K={k}/kept_fraction"])
    np.testing.assert_array_equal(flat(signs), v[f"ties/official/K={k}/elected_sign_flat"])


def test_ties_edges():
    """Columns that sum to zero, zero columns, magnitudes equal to the threshold."""
    v = golden.load("merging/public_ties")
    deltas = v["ties_edge/deltas"]
    densities = {"25": 0.25, "50": 0.5, "75": 0.75, "0.5": 0.5}

    @jax.jit
    def run(models, base):
        merged, limits = {}, {}
        for k, density in densities.items():
            limits[k] = merge.ties(density).measure(models, base)["0/trim"]["threshold"]
            for reduce in ("mean", "sum", "max"):
                merged[k, reduce] = merge.ties(density, reduce=reduce)(models, base=base)["v"]
        return merged, limits

    merged, limits = run([{"v": x} for x in deltas], {"v": np.zeros(8, np.float32)})
    for (k, reduce), value in merged.items():
        np.testing.assert_array_equal(value, v[f"ties_edge/K={k}/dis-{reduce}"])
    for k, limit in limits.items():
        # A zero that reaches a threshold of zero counts as kept, which changes nothing.
        kept = np.abs(deltas) >= np.asarray(limit)[:, None]
        np.testing.assert_array_equal(kept, v[f"ties_edge/K={k}/mask"])


def test_ties_keeps_one_entry_at_the_least_density():
    v = golden.load("merging/public_ties")
    deltas = v["ties_edge/deltas"]
    for model, expected in zip(deltas, v["ties_edge/K=0.0/trimmed"], strict=True):
        method = merge.parse("trim(density=1e-9) | reduce")
        merged = method([{"v": model}], base={"v": np.zeros(8, np.float32)})["v"]
        np.testing.assert_array_equal(merged, expected)


def test_ties_mergekit(inputs):
    base, models = inputs
    v = golden.load("merging/public_ties")

    def mergekit(density, weights, scale, reduce):
        return merge.chain(
            merge.trim(density, scope="leaf", exact=True),
            merge.weigh(weights),
            merge.elect_sign(zero="positive"),
            merge.reduce(reduce),
            merge.rescale(scale),
        )

    normalized = "ties/mergekit/density=0.2/normalize=True"
    check({normalized: mergekit(0.2, WEIGHTS, 0.3, "mean")}, v, models, base)

    # The rule works leaf by leaf, so for the other cases a few leaves will do.
    methods = {}
    for density in (0.2, 0.6):
        case = f"ties/mergekit/density={density}"
        methods[f"{case}/normalize=True"] = mergekit(density, WEIGHTS, 0.3, "mean")
        methods[f"{case}/normalize=False"] = mergekit(density, WEIGHTS, 0.3, "sum")
        methods[f"{case}/unit_weights"] = mergekit(density, None, 1.0, "mean")
    names = ("layer2/bias", "layer1/kernel")
    few = {key: value for key, value in v.items() if key.endswith(names)}
    models = [{name: model[name] for name in names} for model in models]
    check(methods, few, models, {name: base[name] for name in names})


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
