"""The restatements of agents and alignment against the recorded vectors."""

import itertools

import numpy as np
import pytest

from tests import golden
from tests.reference import decentral

SIZES = (4, 5, 8, 10, 20)


def tree(vectors, prefix):
    return {key.removeprefix(prefix): vectors[key] for key in vectors if key.startswith(prefix)}


@pytest.mark.parametrize("n", SIZES)
def test_topologies(n):
    vectors = golden.load("decentral/public_topology_partition")
    for recorded, adjacency in (
        ("dimat/FullyConnectedTopology", decentral.complete(n)),
        ("dimat/RingTopology", decentral.ring(n)),
    ):
        found = decentral.uniform_weights(adjacency)
        np.testing.assert_allclose(found, vectors[f"{recorded}/n{n}/pi"], atol=1e-12)
    for recorded, adjacency in (
        ("RingGraph0", decentral.ring(n)),
        ("FullyConnectedGraph", decentral.complete(n)),
        ("ExponentialTwoGraph", decentral.exponential(n)),
    ):
        found = decentral.uniform_weights(adjacency)
        np.testing.assert_allclose(found, vectors[f"bluefog/{recorded}/n{n}"], atol=1e-12)
        gap = vectors[f"bluefog/{recorded}/n{n}/gap"]
        np.testing.assert_allclose(decentral.spectral_gap(found), gap, atol=1e-9)
    star = decentral.metropolis_hastings(decentral.star(n))
    np.testing.assert_allclose(star, vectors[f"bluefog/StarGraph/n{n}"], atol=1e-12)
    ring = decentral.metropolis_hastings(decentral.ring(n))
    np.testing.assert_allclose(ring, vectors[f"mh/ring{n}/W"], atol=1e-12)


def test_metropolis_hastings():
    vectors = golden.load("decentral/public_topology_partition")
    for i in range(4):
        found = decentral.metropolis_hastings(vectors[f"mh/er{i}/adj"])
        np.testing.assert_allclose(found, vectors[f"mh/er{i}/W"], atol=1e-12)
        np.testing.assert_allclose(decentral.spectral_gap(found), vectors[f"mh/er{i}/gap"])


def test_small_rings_and_the_torus():
    np.testing.assert_array_equal(decentral.uniform_weights(decentral.ring(1)), [[1]])
    np.testing.assert_array_equal(
        decentral.uniform_weights(decentral.ring(2)), np.full((2, 2), 0.5)
    )
    torus = decentral.torus(3, 4)
    np.testing.assert_array_equal(torus.sum(axis=1), 4)
    np.testing.assert_array_equal(np.flatnonzero(torus[0]), [1, 3, 4, 8])


@pytest.mark.parametrize("graph", ["fc", "ring", "bipar"])
def test_steps(graph):
    v = golden.load("decentral/public_optim")
    matrix, lr = v[f"pi_{graph}"], float(v["lr"])
    for name, step in (("CDSGD", decentral.cdsgd_step), ("SGP", decentral.atc_step)):
        x = v["P0"].astype(np.float64)
        for gradients, expected in zip(v["G"], v[f"{graph}/{name}"], strict=True):
            x = step(matrix, x, gradients, lr)
            np.testing.assert_allclose(x, expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_correlation_matching():
    vectors = golden.load("decentral/public_matching")
    for case in golden.cases(vectors, "c", 1):
        v = tree(vectors, f"{case}/")
        cov = decentral.covariance(v["feats"].reshape(-1, v["feats"].shape[-1]))
        np.testing.assert_allclose(cov, v["cov"], atol=2e-6, err_msg=case)
        np.testing.assert_allclose(decentral.correlation(cov), v["corr"], atol=1e-4, err_msg=case)
        for other, expected in zip(v["feats"], v["permute_idx"], strict=True):
            found = decentral.match_correlation(v["feats"][0], other)
            np.testing.assert_array_equal(found, expected, err_msg=case)


@pytest.mark.parametrize("case", ["actmatch0", "actmatch1"])
def test_activation_matching(case):
    v = tree(golden.load("decentral/public_weight_matching"), f"{case}/")
    a, b = v["a"].T, v["b"].T
    np.testing.assert_array_equal(decentral.match_correlation(a, b), v["perm_pearson"])
    np.testing.assert_array_equal(decentral.match_second_moment(a, b), v["perm_E_ab"])


def mlp_axes(hidden):
    """git-re-basin's specification of an MLP with `hidden` hidden layers."""
    axes, before = {}, None
    for i in range(hidden + 1):
        after = f"P_{i}" if i < hidden else None
        axes[f"Dense_{i}/kernel"], axes[f"Dense_{i}/bias"] = (before, after), (after,)
        before = after
    return axes


@pytest.mark.parametrize(
    ("case", "hidden"),
    [
        ("mlp1_random0", 1),
        ("mlp1_random1", 1),
        ("mlp3_planted0", 3),
        ("mlp3_planted1", 3),
        ("mlp3_random0", 3),
        ("mlp3_random1", 3),
    ],
)
def test_weight_matching(case, hidden):
    v = tree(golden.load("decentral/public_weight_matching"), f"{case}/")
    axes, a, b = mlp_axes(hidden), tree(v, "A/"), tree(v, "B/")
    order = [str(v["perm_names"][i]) for i in v["order"].ravel()]
    perms, gains = decentral.weight_matching(axes, a, b, order)
    for name, perm in perms.items():
        np.testing.assert_array_equal(perm, v[f"perm/{name}"])
    np.testing.assert_allclose(gains, v["gains"], rtol=1e-4, atol=1e-4)
    for leaf, value in decentral.permute(b, axes, perms).items():
        np.testing.assert_array_equal(value, v[f"Bperm/{leaf}"])
    found = decentral.objective(axes, a, b, perms)
    np.testing.assert_allclose(found, v["objective"], rtol=1e-5)


# torch layout: kernels are [out, in].
TORCH_MLP = {
    "fc1.weight": ("3", None),
    "fc1.bias": ("3",),
    "fc2.weight": ("6", "3"),
    "fc2.bias": ("6",),
    "fc3.weight": (None, "6"),
    "fc3.bias": (None,),
}


def torch_mlp_activations(params, x):
    """What the two hidden layers pass on, [C, S]."""
    hidden = {}
    for layer, node in (("fc1", "3"), ("fc2", "6")):
        x = np.maximum(x @ params[f"{layer}.weight"].T.astype(float) + params[f"{layer}.bias"], 0)
        hidden[node] = x.T
    return hidden


def dimat_merge(models, x, weights):
    """Every model aligned to the first by its activations on `x`, then averaged."""
    hidden = [torch_mlp_activations(model, x) for model in models]
    perms = [
        {node: decentral.match_correlation(hidden[0][node], own[node]) for node in own}
        for own in hidden
    ]
    return perms, decentral.aligned_average(TORCH_MLP, models, perms, weights)


@pytest.mark.parametrize(("case", "n"), [("mlp_N2_equal", 2), ("mlp_N3_unequal", 3)])
def test_aligned_average(case, n):
    v = tree(golden.load("decentral/public_merge_models"), f"{case}/")
    models = [tree(v, f"in{i}/") for i in range(n)]
    perms, merged = dimat_merge(models, v["x"].astype(np.float64), v["interp_w"])
    for node in ("3", "6"):
        np.testing.assert_array_equal([p[node] for p in perms], v[f"node{node}/perm"])
    for leaf, value in merged.items():
        # The reference scales aligned rows by N / (N + 1e-5).
        np.testing.assert_allclose(
            value, v[f"merged_before_bnreset/{leaf}"], rtol=1e-4, atol=1e-5, err_msg=leaf
        )


@pytest.mark.parametrize("case", ["dimat_mlp_ring5", "dimat_mlp_bipar5"])
def test_dimat_round(case):
    v = tree(golden.load("decentral/public_merge_models"), f"{case}/")
    pi, models = v["pi"], [tree(v, f"in{i}/") for i in range(5)]
    for i in range(5):
        members = [i] + [j for j in range(5) if j != i and pi[i, j] > 0]
        chosen = [models[j] for j in members]
        _, merged = dimat_merge(chosen, v["x"].astype(np.float64), pi[i, members])
        for leaf, value in merged.items():
            np.testing.assert_allclose(value, v[f"dimat{i}/{leaf}"], rtol=1e-4, atol=1e-5)
            mixed = decentral.mix(pi, np.stack([model[leaf] for model in models]))[i]
            np.testing.assert_allclose(mixed, v[f"wa{i}/{leaf}"], rtol=2e-5, atol=1e-6)


def convolve(x, kernel, stride):
    """3x3 or 1x1, NCHW with OIHW kernels, the padding that keeps the size at stride 1."""
    size = kernel.shape[-1]
    pad = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows, cols = (n - size + 1 for n in padded.shape[2:])
    out = 0.0
    for i, j in itertools.product(range(size), repeat=2):
        window = padded[:, :, i : i + rows : stride, j : j + cols : stride]
        out = out + np.einsum("bchw,oc->bohw", window, kernel[:, :, i, j].astype(np.float64))
    return out


def train_mode_resnet(params, x, seen):
    """Runs the recorded ResNet on batch statistics; notes what each BatchNorm was given."""

    def norm(x, name):
        seen.setdefault(name, []).append(np.moveaxis(x, 1, -1))
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        scale, bias = (params[f"{name}.{k}"][:, None, None] for k in ("weight", "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(norm(convolve(x, params["conv1.weight"], 1), "bn1"), 0)
    for block in ("layer1.0", "layer2.0", "layer2.1", "layer3.0"):
        shortcut = f"{block}.shortcut.0.weight" in params
        stride = 2 if shortcut else 1
        y = convolve(x, params[f"{block}.conv1.weight"], stride)
        y = np.maximum(norm(y, f"{block}.bn1"), 0)
        y = norm(convolve(y, params[f"{block}.conv2.weight"], 1), f"{block}.bn2")
        if shortcut:
            x = convolve(x, params[f"{block}.shortcut.0.weight"], stride)
            x = norm(x, f"{block}.shortcut.1")
        x = np.maximum(x + y, 0)


def test_batch_norm_reset():
    v = tree(golden.load("decentral/public_merge_models"), "resnet_N2_equal/")
    x, size = v["x"].astype(np.float64), int(v["batch"])
    for given, expected in (("in0", "in0_bnreset"), ("merged_before_bnreset", "merged")):
        seen = {}
        for start in range(0, len(x), size):
            train_mode_resnet(tree(v, f"{given}/"), x[start : start + size], seen)
        assert len(seen) == 11
        for name, batches in seen.items():
            mean, var = decentral.reset_statistics(batches, unbiased=True)
            settings = {"rtol": 1e-4, "atol": 1e-5, "err_msg": name}
            np.testing.assert_allclose(mean, v[f"{expected}/{name}.running_mean"], **settings)
            np.testing.assert_allclose(var, v[f"{expected}/{name}.running_var"], **settings)
