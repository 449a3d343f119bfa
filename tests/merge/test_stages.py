"""Selection and the stages of task-vector methods."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from mixlab.merge import core, selection
from tests.reference import merging_sparse


def kth(arrays, k):
    leaves = core.open_models({str(i): a for i, a in enumerate(arrays)}).leaves
    return selection.kth_smallest(leaves, k)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kth_smallest_is_that_of_numpy(dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        flat = np.abs(rng.standard_cauchy(size=(2, 60))).astype(dtype)
        flat[:, 20:40] = np.round(flat[:, 20:40])  # equal magnitudes, among them zeros
        flat[0, 3], flat[1, 4] = np.inf, np.finfo(dtype).tiny
        parts = [flat[:, :7].reshape(2, 7, 1), flat[:, 7:10], flat[:, 10:]]
        run = jax.jit(jax.vmap(kth, in_axes=(None, 0)))
        found = run([jnp.asarray(part) for part in parts], jnp.arange(1, 61))
        np.testing.assert_array_equal(found, np.sort(flat, axis=1).T)


def numbers(kind):
    """`[2, 50000]`: what a sample tells much about, little, or the wrong thing."""
    rng = np.random.default_rng(1)
    smooth = np.abs(rng.standard_normal((2, 50_000), np.float32))
    spikes = np.full_like(smooth, 1e-30)
    spikes[:, ::3] = smooth[:, ::3]  # the sample takes every third entry
    return {
        "dense": 1 + smooth / 2**8,
        "smooth": smooth,
        "spikes": spikes,
        "few values": np.round(2 * smooth) / 2,
        "mostly zero": np.where(rng.random(smooth.shape) < 0.9, 0, smooth),
        "not finite": np.where(smooth < 0.5, smooth, np.where(smooth < 1, np.inf, np.nan)),
        "all scales": np.exp(40 * rng.standard_normal(smooth.shape).clip(-2, 2), dtype=np.float32),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "sweeps"),
    [
        ("dense", (6, 4, 12)),
        ("smooth", (11, 7, 11)),
        ("spikes", (19, 15, 7)),
        ("few values", (1, 1, 8)),
        ("mostly zero", (1, 1, 11)),
        ("not finite", (11, 13, 1)),
        ("all scales", (1, 9, 1)),
    ],
)
def test_kth_smallest_takes_few_sweeps_over_the_leaves(kind, sweeps):
    flat = numbers(kind).astype(np.float32)
    parts = dict(enumerate(np.split(flat, [30_000, 45_000, 45_010], axis=1)))
    num_reads = []

    def read(name):
        num_reads.append(name)
        return jnp.asarray(parts[name])

    specs = {name: core.LeafSpec(part.shape[1:], part.dtype) for name, part in parts.items()}
    leaves = core.Leaves(specs, 2, read)
    ordered = np.sort(flat, axis=1)
    for k, most in zip((1, 20_000, 49_999), sweeps, strict=True):
        num_reads.clear()
        np.testing.assert_array_equal(selection.kth_smallest(leaves, k), ordered[:, k - 1])
        # One read is the sample's.
        assert len(num_reads) <= (most + 1) * len(parts)


def test_kth_smallest_clips_k():
    values = jnp.asarray([[3.0, 1.0, 2.0]])
    assert kth([values], 0) == kth([values], -5) == 1.0
    assert kth([values], 4) == 3.0


DELTAS = np.asarray([[0.5, -0.25, 0.125, 0.0], [-0.5, 0.25, 0.25, 0.0]], np.float32)


def run(text, deltas=DELTAS, key=None):
    base = {"v": np.zeros(deltas.shape[1:], np.float32)}
    method = merge.parse(text) if isinstance(text, str) else text
    return method([{"v": d} for d in deltas], base=base, key=key)["v"]


def test_density_one_keeps_everything():
    for method in (merge.dare(1), merge.breadcrumbs(1, 0), merge.breadcrumbs(1, 0.5)):
        np.testing.assert_array_equal(run(method, key=jax.random.key(0)), DELTAS.sum(axis=0))
    found = run(merge.della(1, consensus="linear", normalize=False), key=jax.random.key(0))
    np.testing.assert_array_equal(found, DELTAS.sum(axis=0))
    np.testing.assert_array_equal(run("trim(1.0) | reduce"), DELTAS.sum(axis=0))
    np.testing.assert_array_equal(run("trim(1, scope='leaf') | reduce"), DELTAS.sum(axis=0))


@pytest.mark.parametrize("density", [-0.1, 1.5, np.nan])
def test_density_out_of_range(density):
    for make in (merge.ties, merge.dare, merge.della, merge.breadcrumbs):
        with pytest.raises(ValueError, match="density"):
            make(density)


def test_density_zero_keeps_the_largest_entry_or_nothing():
    largest = [-0.5, 0, 0, 0]
    for text in ("trim(0)", "trim(0, scope='leaf')", "trim(0, scope='leaf', exact=True)"):
        np.testing.assert_array_equal(run(f"{text} | reduce", DELTAS[1:]), largest)
    for rescale in ("expectation", "l1", None):
        found = run(merge.dare(0, rescale=rescale), key=jax.random.key(0))
        np.testing.assert_array_equal(found, np.zeros(4))
    for method in (merge.breadcrumbs(0), merge.sce(0)):
        np.testing.assert_array_equal(run(method), np.zeros(4))
    np.testing.assert_array_equal(run(merge.della(0), key=jax.random.key(0)), np.zeros(4))


def test_scope_decides_what_is_ranked_together():
    models = [{"big": jnp.asarray([8.0, 9.0]), "small": jnp.asarray([1.0, 2.0])}]
    base = jax.tree.map(jnp.zeros_like, models[0])
    whole = merge.parse("trim(0.25) | reduce")(models, base=base)
    assert (whole["big"].tolist(), whole["small"].tolist()) == ([8, 9], [0, 0])
    leafwise = merge.parse("trim(0.5, scope='leaf', exact=True) | reduce")(models, base=base)
    assert (leafwise["big"].tolist(), leafwise["small"].tolist()) == ([0, 9], [0, 2])


def test_exact_keeps_the_earlier_of_equal_entries():
    found = run("trim(0.5, scope='leaf', exact=True) | reduce", DELTAS[1:])
    np.testing.assert_array_equal(found, [-0.5, 0.25, 0, 0])
    found = run("trim(0.01, scope='leaf', exact=True) | reduce", DELTAS[1:])
    np.testing.assert_array_equal(found, [-0.5, 0, 0, 0])
    with pytest.raises(ValueError, match='scope="leaf"'):
        merge.trim(0.5, exact=True)


def test_weights_vote_and_count_in_the_mean():
    chain = merge.chain(merge.weigh([1, 3]), merge.elect_sign(), merge.reduce("mean"))
    np.testing.assert_allclose(run(chain), [-0.5, 0.25, 0.875 / 4, 0])
    np.testing.assert_allclose(run(merge.ties(1.0, weights=[1, 3])), [-0.5, 0.25, 0.875 / 4, 0])


def test_a_negative_weight_subtracts():
    chain = merge.chain(merge.weigh([1, -1]), merge.reduce("mean"))
    np.testing.assert_allclose(run(chain), [0.5, -0.25, -0.0625, 0])


def test_a_zero_task_vector_has_no_say():
    deltas = np.stack([DELTAS[0], np.zeros(4, np.float32)])
    for by in ("mass", "normfrac", "normmass"):
        found = run(f"elect_sign({by!r}) | reduce('mean')", deltas)
        np.testing.assert_array_equal(found, DELTAS[0])
    np.testing.assert_array_equal(run(merge.ties(), np.zeros((2, 3), np.float32)), [0, 0, 0])


def test_stages_after_the_reduction_work_on_what_it_leaves():
    found = run("reduce('sum') | trim(0.25, scope='leaf', exact=True) | rescale(2.0)")
    np.testing.assert_array_equal(found, [0, 0, 0.75, 0])


@pytest.mark.parametrize("method", [merge.task_arithmetic, lambda s: merge.ties(0.5, s)])
def test_gradient_of_a_loss_with_respect_to_the_scale(method):
    """Of a linear model's squared error, against the derivative by hand."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 4)), rng.normal(size=8)

    def loss(scale, deltas):
        return jnp.mean(jnp.square(jnp.asarray(inputs) @ run(method(scale), deltas) - targets))

    scales = jnp.asarray([-0.5, 0.3, 1.0])
    found = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(scales, DELTAS)
    slope = inputs @ np.asarray(run(method(1.0)), np.float64)
    expected = [np.mean(2 * (scale * slope - targets) * slope) for scale in (-0.5, 0.3, 1.0)]
    assert np.all(np.abs(expected) > 0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scale_and_density_may_be_mapped_over():
    densities, scales = (0.01, 0.5, 1.0), (0.5, 1.0, 2.0)
    key = jax.random.key(0)
    methods = {
        "ties": merge.ties,
        "dare": merge.dare,
        "della": lambda density, scale: merge.della(density, 0.3, scale),
        "breadcrumbs": lambda density, scale: merge.breadcrumbs(density, 0.25, scale),
        "sce": merge.sce,
    }
    deltas = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def mapped(density, scale, deltas):
        return {name: run(make(density, scale), deltas, key) for name, make in methods.items()}

    @jax.jit
    def one_by_one(deltas):
        pairs = list(zip(densities, scales, strict=True))
        return {
            name: jnp.stack([run(make(d, s), deltas, key) for d, s in pairs])
            for name, make in methods.items()
            if name != "della"  # Whose epsilon must fit a density that is known.
        }

    found = mapped(jnp.asarray(densities), jnp.asarray(scales), deltas)
    for name, expected in one_by_one(deltas).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, err_msg=name)
    assert np.all(np.isfinite(found["della"]))


def test_drop_keeps_the_expectation_and_l1_the_sum_of_magnitudes():
    deltas = np.random.default_rng(0).normal(size=(2, 20_000)).astype(np.float32) + 1
    key = jax.random.key(3)
    for method in (merge.dare(0.3), merge.parse("drop(0.3, epsilon=0.2) | reduce")):
        difference = np.asarray(run(method, deltas, key)) - deltas.sum(axis=0)
        assert abs(difference.mean()) < 5 * difference.std() / np.sqrt(difference.size)
    for delta in deltas:
        found = run(merge.dare(0.3, rescale="l1"), delta[None], key)
        np.testing.assert_allclose(np.abs(found).sum(), np.abs(delta).sum(), rtol=1e-5)
    np.testing.assert_array_equal(run(merge.dare(0.5), 0 * deltas[:, :4], key), np.zeros(4))


def test_equal_models_draw_differently_and_keep_what_they_keep():
    deltas = np.ones((2, 1000), np.float32)
    found = run(merge.dare(0.5), deltas, jax.random.key(0))
    assert set(np.unique(found)) == {0, 2, 4}


def probabilities(value, density=0.5, epsilon=0.25, **options):
    models, base = [{"v": value}], {"v": jnp.zeros_like(value)}
    method = merge.chain(merge.drop(density, epsilon=epsilon, **options), merge.reduce())
    return method.measure(models, base, jax.random.key(0))["0/drop"]["v"]["probability"][0]


def test_larger_entries_are_kept_more_often():
    """Among the weights of a unit, the last axis, or along the axis that is named."""
    kernel = jnp.asarray([[1.0, -6.0], [-2.0, 4.0], [3.0, -5.0]])
    rising = [[0.25, 0.75], [0.5, 0.25], [0.75, 0.5]]
    np.testing.assert_array_equal(probabilities(kernel), rising)
    np.testing.assert_array_equal(probabilities(kernel, axis=0), rising)
    np.testing.assert_array_equal(probabilities(kernel, axis=1), [[0.25, 0.75]] * 3)
    np.testing.assert_array_equal(probabilities(kernel.reshape(3, 1, 1, 2)).reshape(3, 2), rising)
    np.testing.assert_array_equal(probabilities(kernel[:, 0]), [0.25, 0.5, 0.75])
    # Where there is one entry, it has no rank.
    np.testing.assert_array_equal(probabilities(kernel[:, :1], axis=1), [[0.5]] * 3)
    np.testing.assert_array_equal(probabilities(kernel[0, 0]), 0.5)
    for shape in ((0,), (0, 2), (2, 0), (1, 3, 0, 2)):
        assert probabilities(jnp.zeros(shape)).shape == shape
    with pytest.raises(ValueError, match=r"density=0\.9 and epsilon=0\.2"):
        merge.della(0.9, 0.2)
    with pytest.raises(ValueError, match="epsilon"):
        merge.drop(0.5, epsilon=0.6)


def test_band_counts_from_the_largest_down():
    deltas = np.asarray([[4, -3, 3, 2, 1, 0, 0, 0]], np.float32)
    found = run("band(0.25, 0.125) | reduce", deltas)
    np.testing.assert_array_equal(found, [0, -3, 3, 0, 0, 0, 0, 0])
    found = run("band(0.25, 0.25) | reduce", deltas)
    np.testing.assert_array_equal(found, [0, 0, 3, 2, 0, 0, 0, 0])
    # No outlier in so few entries; and fewer outliers than asked for where more are kept.
    np.testing.assert_array_equal(run("band(0.5, 0.1) | reduce", deltas), [4, -3, 3, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(run("band(0.875, 0.5) | reduce", deltas)[:3], [0, -3, 3])


def test_masks_are_of_all_models_or_of_each():
    keep = np.asarray([True, False, True, True])
    each = np.asarray([[1, 0, 2, 1], [0, 1, 0.5, 1]], np.float32)
    expected = (each * DELTAS).sum(axis=0)
    for masks, value in (
        ({"v": keep}, keep * DELTAS.sum(axis=0)),
        ({"v": each}, expected),
        ([{"v": row} for row in each], expected),
        ({"v": None}, DELTAS.sum(axis=0)),
        ({"v": None, "steps": None}, DELTAS.sum(axis=0)),
    ):
        np.testing.assert_array_equal(run(merge.chain(merge.mask(masks), merge.reduce())), value)
    after = merge.chain(merge.reduce(), merge.mask({"v": keep}))
    np.testing.assert_array_equal(run(after), keep * DELTAS.sum(axis=0))
    with pytest.raises(ValueError, match=r"no masks for the leaves \['v'\], only for \['w'\]"):
        run(merge.chain(merge.mask({"w": keep}), merge.reduce()))
    with pytest.raises(ValueError, match=r"mask of leaf 'v' must be of shape \(4,\) or \(2, 4\)"):
        run(merge.chain(merge.mask({"v": keep[:3]}), merge.reduce()))


def test_sce_by_hand():
    """Variances 4, 1, 0, 0.25, energies (of what is selected) 25 : 1, then the minority goes."""
    deltas = np.asarray([[4, 3, 1, 1], [0, 1, 1, 0]], np.float32)
    found = run(merge.sce(0.75), deltas)
    np.testing.assert_allclose(found, [4, (25 * 3 + 1) / 26, 0, 0])
    deltas = np.asarray([[2, 0], [-1, 1], [-1, 0]], np.float32)
    np.testing.assert_allclose(run(merge.sce(), deltas), [2, 1])
    np.testing.assert_array_equal(run(merge.sce(0.5), 0 * DELTAS), np.zeros(4))


def test_of_equal_magnitudes_the_later_model_wins():
    np.testing.assert_array_equal(run(merge.magmax(1.0)), [-0.5, 0.25, 0.25, 0])
    np.testing.assert_array_equal(run(merge.magmax(2.0), -DELTAS[::-1]), [-1, 0.5, -0.5, 0])
    nan = DELTAS.copy()
    nan[0, 0] = np.nan
    assert np.isnan(run(merge.magmax(), nan)[0])


@pytest.mark.parametrize(
    "text",
    [
        "trim(0.5, scope='leaf', exact=True) | elect_sign(by='normfrac') | reduce('mean')",
        "elect_sign(by='normmass', zero='positive') | reduce('max')",
        "drop(0.3, rescale='l1') | reduce",
        "select(0.5) | weigh([1, 0, 1]) | reduce",
        "threshold(9.0) | reduce",
        "balance(0.5, variant='vision') | reduce",
    ],
)
@pytest.mark.parametrize("in_base", [False, True])
def test_nan_passes_by_the_stages(text, in_base):
    """It is there in the end, and meanwhile the entry is one that no model changed."""
    base, *models = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32)
    damaged, whole, broken = np.stack(models), np.stack(models), base.copy()
    if in_base:
        broken[4], whole[:, 4] = np.nan, base[4]
    else:
        damaged[1, 4], whole[1, 4] = np.nan, base[4]
    key = jax.random.key(0)
    found = merge.parse(text)([{"v": m} for m in damaged], base={"v": broken}, key=key)["v"]
    clean = merge.parse(text)([{"v": m} for m in whole], base={"v": base}, key=key)["v"]
    assert np.isnan(found[4])
    np.testing.assert_allclose(np.delete(found, 4), np.delete(clean, 4), rtol=1e-6)


def test_a_traced_fraction_counts_in_float32():
    """As the docstring of the stages says."""
    base, moved = {"w": jnp.zeros(100)}, {"w": jnp.arange(1.0, 101.0)}

    def kept(density):
        stages = merge.trim(density, scope="leaf", exact=True), merge.reduce()
        return jnp.sum(merge.chain(*stages)([moved], base=base)["w"] != 0)

    assert kept(0.29) == int(100 * 0.29) == 28
    assert jax.jit(kept)(0.29) == int(np.float32(100) * np.float32(0.29)) == 29


def test_weights_are_normalised():
    chain = merge.chain(merge.weigh([1, 3], normalize=True), merge.reduce())
    np.testing.assert_allclose(run(chain), np.average(DELTAS, axis=0, weights=[1, 3]))
    with pytest.raises(ValueError, match="sum to zero"):
        merge.weigh([1, -1], normalize=True)


def test_unknown_choices_name_the_known_ones():
    for make in (
        lambda: merge.trim(0.2, scope="layer"),
        lambda: merge.elect_sign("vote"),
        lambda: merge.elect_sign(zero="negative"),
        lambda: merge.reduce("median"),
        lambda: merge.ties(reduce="median"),
        lambda: merge.ties(zero="negative"),
        lambda: merge.dare(consensus="vote"),
        lambda: merge.dare(rescale="l2"),
        lambda: merge.fisher(floor_mode="none"),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            make()
    with pytest.raises(ValueError, match=r"^reduce must be one of 'sum', 'mean', 'max', got 'avg'"):
        merge.ties(0.2, reduce="avg")
    with pytest.raises(ValueError, match=r"^select_topk must lie between"):
        merge.sce(1.5)
    for make in (
        merge.magmax,
        merge.rescale,
        merge.task_arithmetic,
        merge.slerp,
        merge.interpolate,
    ):
        with pytest.raises(ValueError, match="must be finite"):
            make(np.nan)


def test_sparse_methods_against_their_restatements(x64):
    """On multiples of 1 / 64, where magnitudes tie and signs cancel, and variances are exact."""
    shapes = {"kernel": (3, 2, 4), "bias": (5,), "gain": ()}
    rng = np.random.default_rng(0)
    base = {name: rng.integers(-64, 65, shape) / 64 for name, shape in shapes.items()}
    taus = {name: rng.integers(-9, 10, (4, *shape)) / 64 for name, shape in shapes.items()}
    weights = [0.5, 2.0, 1.0, 0.25]
    options = [(False, False), (False, True), (True, False), (True, True)]
    methods, expected = {"magmax": merge.magmax(0.5)}, {}
    expected["magmax"] = lambda name, drawn: 0.5 * merging_sparse.magmax(taus[name])
    methods["crumbs"] = merge.breadcrumbs(0.4, 0.2)
    expected["crumbs"] = lambda name, drawn: sum(
        merging_sparse.band(tau, 0.4, 0.2) for tau in taus[name]
    )
    methods["sce"] = merge.sce(0.4)
    expected["sce"] = lambda name, drawn: merging_sparse.sce(taus[name], 0.4)
    for (elect, normalize), rescale in zip(options, ("l1", None, "expectation", "l1"), strict=True):
        common = {
            "weights": weights,
            "normalize": normalize,
            "consensus": "ties" if elect else "linear",
        }
        case = f"{elect} {normalize}"
        methods[f"dare {case}"] = merge.dare(0.4, rescale=rescale, **common)
        methods[f"della {case}"] = merge.della(0.4, 0.25, rescale=rescale, **common)

        def dropped(name, drawn, epsilon, elect=elect, normalize=normalize, rescale=rescale):
            p = [merging_sparse.keep_probability(tau, 0.4, epsilon) for tau in taus[name]]
            left = map(merging_sparse.drop, taus[name], drawn, p, [rescale] * 4)
            return merging_sparse.consensus(np.stack(list(left)), weights, elect, normalize)

        expected[f"dare {case}"] = functools.partial(dropped, epsilon=0.0)
        expected[f"della {case}"] = functools.partial(dropped, epsilon=0.25)

    @jax.jit
    def merge_all(models, base):
        plans = {case: m.measure(models, base, jax.random.key(0)) for case, m in methods.items()}
        return plans, {case: m.combine(plans[case], models, base) for case, m in methods.items()}

    plans, merged = merge_all({name: base[name] + tau for name, tau in taus.items()}, base)
    assert merged.keys() == expected.keys()
    for case, restated in expected.items():
        for name in shapes:
            drawn = plans[case].get("0/drop", {}).get(name, {}).get("kept")
            value = base[name] + restated(name, None if drawn is None else np.asarray(drawn))
            np.testing.assert_allclose(
                merged[case][name], value, rtol=1e-12, atol=1e-13, err_msg=f"{case} {name}"
            )
