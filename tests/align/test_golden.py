"""Alignment held against vectors recorded from DIMAT, ZipIt and Git Re-Basin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import align
from tests import golden

MATCHING = "decentral/public_matching"
WEIGHTS = "decentral/public_weight_matching"
MERGES = "decentral/public_merge_models"


# ---------------------------------------------------------------- statistics and assignment


def test_correlation_matching():
    v = golden.load(MATCHING)
    for case in golden.cases(v, "c", 1):
        models = [jnp.asarray(f.T) for f in v[f"{case}/feats"]]
        ends = np.cumsum(v[f"{case}/batch_sizes"] * v[f"{case}/samples_per_item"])
        stacked = jnp.concatenate(models, axis=1)
        batches = [stacked[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        total = functools.reduce(align.merge_moments, [align.moments(b, b) for b in batches])
        np.testing.assert_allclose(align.covariance(total), v[f"{case}/cov"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            align.correlation(total), v[f"{case}/corr"], rtol=1e-4, atol=1e-5
        )
        for model, expected in zip(models, v[f"{case}/permute_idx"], strict=True):
            found = align.match_activations({"g": models[0]}, {"g": model})["g"]
            np.testing.assert_array_equal(found, expected, err_msg=case)


def test_activation_statistics_of_git_rebasin():
    v = golden.load(WEIGHTS)
    for case in golden.cases(v, "actmatch", 1):
        a, b = jnp.asarray(v[f"{case}/a"]), jnp.asarray(v[f"{case}/b"])
        m = align.moments(a, b)
        np.testing.assert_allclose(align.second_moment(m), v[f"{case}/E_ab"], rtol=1e-4, atol=1e-5)
        unbiased = align.covariance(m) * (len(a) / (len(a) - 1))
        np.testing.assert_allclose(unbiased, v[f"{case}/cov"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(align.correlation(m), v[f"{case}/pearson"], rtol=1e-4, atol=1e-5)
        for statistic, name in (("second_moment", "perm_E_ab"), ("correlation", "perm_pearson")):
            found = align.match_activations({"g": a}, {"g": b}, statistic=statistic)["g"]
            np.testing.assert_array_equal(found, v[f"{case}/{name}"])


# ---------------------------------------------------------------- weight matching


def specification(names):
    """The published specifications of the three architectures, from the names of their leaves."""

    def dense(index, last, before):
        return (f"P_{index - 1}" if index else before, None if index == last else f"P_{index}")

    def axes(name):
        parts = name.split("/")
        kernel = parts[-1] == "kernel"
        if "conv1/kernel" in names:
            if parts[0] == "dense":
                return ("P_bg2", None) if kernel else (None,)
            if parts[0] in ("conv1", "norm1"):
                return (None, None, None, "P_bg0") if kernel else ("P_bg0",)
            group, block = int(parts[0][-1]), int(parts[1][-1])
            before = f"P_bg{group - 1 if group and not block else group}"
            inner = f"P_{parts[0]}/{parts[1]}_inner"
            into, out = {
                "conv1": (before, inner),
                "norm1": (None, inner),
                "conv2": (inner, f"P_bg{group}"),
                "norm2": (None, f"P_bg{group}"),
                "shortcut": (before, f"P_bg{group}"),
            }[parts[2]]
            return (None, None, into, out) if kernel else (out,)
        layer, index = parts[0].rsplit("_", 1)
        index = int(index)
        if "Conv_0/kernel" in names:
            if layer == "Dense":
                out = None if index == 2 else f"P_Dense_{index}"
                return (f"P_Dense_{index - 1}" if index else "P_Conv_12", out) if kernel else (out,)
            before = f"P_Conv_{index - 1}" if index else None
            return (None, None, before, f"P_Conv_{index}") if kernel else (f"P_Conv_{index}",)
        last = max(int(n.split("/")[0].rsplit("_", 1)[1]) for n in names)
        before, out = dense(index, last, None)
        return (before, out) if kernel else (out,)

    return {name: axes(name) for name in names}


@pytest.mark.parametrize("kind", ["mlp1", "mlp3", "resnet20", "vgg16"])
def test_weight_matching_replays_git_rebasin(kind):
    v = golden.load(WEIGHTS)
    for case in golden.cases(v, kind, 1):
        a, b, aligned = (
            {
                k.removeprefix(f"{case}/{m}/"): x
                for k, x in v.items()
                if k.startswith(f"{case}/{m}/")
            }
            for m in ("A", "B", "Bperm")
        )
        symmetry = align.Symmetry.from_axes(specification(a), a)
        groups = [str(name) for name in v[f"{case}/perm_names"]]
        order = [[groups[i] for i in sweep] for sweep in v[f"{case}/order"]]
        found = align.weight_matching(symmetry, a, b, order=order)
        assert set(found) == set(groups)
        for group in groups:
            np.testing.assert_array_equal(found[group], v[f"{case}/perm/{group}"], err_msg=case)
        permuted = symmetry.permute(found, b)
        for name in a:
            np.testing.assert_array_equal(permuted[name], aligned[name])
        objective = sum(np.vdot(a[name], np.asarray(permuted[name])) for name in a)
        np.testing.assert_allclose(objective, v[f"{case}/objective"], rtol=1e-4)
        # Other visiting orders end elsewhere, but no lower.
        drawn = symmetry.permute(align.weight_matching(symmetry, a, b, key=jax.random.key(0)), b)
        found = sum(np.vdot(a[name], np.asarray(drawn[name])) for name in a)
        assert found >= objective * (1 - 1e-6)


# ---------------------------------------------------------------- DIMAT's merge, in torch layout


def _conv(x, kernel, stride):
    numbers = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
    )


def network(variables, x, train=False):
    """The recorded networks; returns the logits, and in training mode the batch statistics."""
    params, stats, new_stats = variables["params"], variables["batch_stats"], {}
    if "fc1.weight" in params:
        for i in (1, 2, 3):
            x = x @ params[f"fc{i}.weight"].T + params[f"fc{i}.bias"]
            x = jax.nn.relu(x) if i < 3 else x
        return x, new_stats

    def norm(x, name):
        mean, var = stats[f"{name}.running_mean"], stats[f"{name}.running_var"]
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            count = x.size // x.shape[1]
            new_stats[f"{name}.running_mean"] = mean
            new_stats[f"{name}.running_var"] = var * (count / (count - 1))
        mean, var, scale, bias = (
            p[:, None, None] for p in (mean, var, params[f"{name}.weight"], params[f"{name}.bias"])
        )
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(norm(_conv(x, params["conv1.weight"], 1), "bn1"))
    for block in ("layer1.0", "layer2.0", "layer2.1", "layer3.0"):
        stride = 2 if f"{block}.shortcut.0.weight" in params else 1
        h = jax.nn.relu(norm(_conv(x, params[f"{block}.conv1.weight"], stride), f"{block}.bn1"))
        h = norm(_conv(h, params[f"{block}.conv2.weight"], 1), f"{block}.bn2")
        if stride == 2:
            x = norm(_conv(x, params[f"{block}.shortcut.0.weight"], 2), f"{block}.shortcut.1")
        x = jax.nn.relu(x + h)
    return x.mean((2, 3)) @ params["linear.weight"].T + params["linear.bias"], new_stats


@jax.jit
def run(variables, x):
    return network(variables, x)[0]


@jax.jit
def run_train(variables, x):
    return network(variables, x, train=True)[1]


def model(v, prefix):
    leaves = {k.removeprefix(prefix): x for k, x in v.items() if k.startswith(prefix)}
    assert leaves, prefix
    return {
        "params": {k: jnp.asarray(x) for k, x in leaves.items() if k.endswith(("weight", "bias"))},
        "batch_stats": {k: jnp.asarray(x) for k, x in leaves.items() if "running" in k},
    }


def assert_models(found, expected, rtol, atol=1e-6):
    for collection, leaves in expected.items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(
                found[collection][name], leaf, rtol=rtol, atol=atol, err_msg=name
            )


@functools.cache
def symmetry_of(kind):
    v = golden.load(MERGES)
    case = {"mlp": "mlp_N2_equal", "resnet": "resnet_N2_equal"}[kind]
    return align.infer_symmetry(run, model(v, f"{case}/in0/"), v[f"{case}/x"][:2])


def reset(variables, v, case):
    x, size = v[f"{case}/x"], int(v[f"{case}/batch"])
    return align.reestimate_batch_stats(
        run_train, variables, [x[i : i + size] for i in range(0, len(x), size)]
    )


def average(models, weights):
    return jax.tree.map(
        lambda *x: sum(w * leaf for w, leaf in zip(weights, x, strict=True)), *models
    )


def merge(symmetry, models, weights, x):
    """Aligns all models to the first and averages them."""
    perms = [
        align.activation_matching(symmetry, symmetry.fn, models[0], other, x) for other in models
    ]
    aligned = [symmetry.permute(p, m) for p, m in zip(perms, models, strict=True)]
    return perms, aligned, average(aligned, weights)


@pytest.mark.parametrize(
    "case", ["mlp_N2_equal", "mlp_N3_unequal", "resnet_N2_equal", "resnet_N3_third"]
)
def test_model_merge(case):
    v = golden.load(MERGES)
    symmetry = symmetry_of(case.split("_")[0])
    weights = [float(w) for w in v[f"{case}/interp_w"]]
    models = [reset(model(v, f"{case}/in{i}/"), v, case) for i in range(len(weights))]
    for i, m in enumerate(models):
        assert_models(m, model(v, f"{case}/in{i}_bnreset/"), rtol=1e-4)
    perms, aligned, merged = merge(symmetry, models, weights, v[f"{case}/x"])

    assert len(symmetry.groups) == len(v[f"{case}/nodes"])
    for node in v[f"{case}/nodes"]:
        number, consumers = str(node).split("|")
        consumer = consumers.split(",")[0].replace("avgpool", "linear")
        group = symmetry.layouts[f"params/{consumer}.weight"][1].name
        expected = v[f"{case}/node{number}/perm"]
        for p, row in zip(perms, expected, strict=True):
            np.testing.assert_array_equal(p[group], row, err_msg=str(node))
    # The reference scales aligned rows by N / (N + 1e-5), hence 1e-4.
    if len(models) == 2:
        # Recorded before the statistics were permuted: weights only.
        weights_only = {"params": model(v, f"{case}/aligned1/")["params"]}
        assert_models(aligned[1], weights_only, rtol=1e-4)
    assert_models(merged, model(v, f"{case}/merged_before_bnreset/"), rtol=1e-4, atol=1e-5)
    merged = reset(merged, v, case)
    assert_models(merged, model(v, f"{case}/merged/"), rtol=3e-4, atol=1e-5)
    logits = run(merged, v[f"{case}/x"][:8])
    np.testing.assert_allclose(logits, v[f"{case}/merged_logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["dimat_mlp_ring5", "dimat_mlp_bipar5", "dimat_resnet_fc5", "dimat_resnet_ring5"]
)
def test_dimat_round(case):
    v = golden.load(MERGES)
    symmetry = symmetry_of(case.split("_")[1])
    pi = v[f"{case}/pi"]
    snapshot = [model(v, f"{case}/in{i}/") for i in range(5)]
    models = [reset(m, v, case) for m in snapshot]
    for agent in range(1 if case == "dimat_resnet_fc5" else 5):
        others = [j for j in range(5) if pi[agent, j] > 0 and j != agent]
        order = [agent, *others]
        weights = [float(pi[agent, j]) for j in order]
        merged = merge(symmetry, [models[j] for j in order], weights, v[f"{case}/x"])[2]
        expected = model(v, f"{case}/dimat{agent}/")
        assert_models(reset(merged, v, case), expected, rtol=3e-4, atol=1e-5)
        plain = average(snapshot, [float(w) for w in pi[agent]])
        assert_models(plain, model(v, f"{case}/wa{agent}/"), rtol=2e-5)
