"""Selection and the stages of task-vector methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from mixlab.merge import core, selection


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
        ("dense", 6),
        ("smooth", 11),
        ("spikes", 19),
        ("few values", 8),
        ("mostly zero", 11),
        ("not finite", 13),
        ("all scales", 10),
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
    for k in (1, 20_000, 49_999):
        num_reads.clear()
        np.testing.assert_array_equal(selection.kth_smallest(leaves, k), ordered[:, k - 1])
        # One read is the sample's.
        assert len(num_reads) <= (sweeps + 1) * len(parts)


def test_kth_smallest_clips_k():
    values = jnp.asarray([[3.0, 1.0, 2.0]])
    assert kth([values], 0) == kth([values], -5) == 1.0
    assert kth([values], 4) == 3.0


DELTAS = np.asarray([[0.5, -0.25, 0.125, 0.0], [-0.5, 0.25, 0.25, 0.0]], np.float32)


def run(text, deltas=DELTAS):
    base = {"v": np.zeros(deltas.shape[1:], np.float32)}
    method = merge.parse(text) if isinstance(text, str) else text
    return method([{"v": d} for d in deltas], base=base)["v"]


def test_density_one_keeps_everything():
    np.testing.assert_array_equal(run("trim(1.0) | reduce"), DELTAS.sum(axis=0))
    np.testing.assert_array_equal(run("trim(1, scope='leaf') | reduce"), DELTAS.sum(axis=0))


@pytest.mark.parametrize("density", [0, -0.1, 1.5, np.nan])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density"):
        merge.ties(density)


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


def test_scale_and_density_may_be_traced():
    """Both are hyper-parameters that one may map over; the scale also has a gradient."""

    def norm(scale, density, deltas):
        return jnp.sum(jnp.abs(run(merge.ties(density, scale), deltas)))

    scales, densities = jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray([0.01, 0.5, 1.0])
    of_each = jax.vmap(jax.value_and_grad(norm), in_axes=(0, 0, None))
    found = jax.jit(of_each)(scales, densities, DELTAS)
    expected = [np.abs(run(merge.ties(d, 1.0))).sum() for d in (0.01, 0.5, 1.0)]
    np.testing.assert_allclose(found[0], np.asarray(expected) * scales, rtol=1e-6)
    np.testing.assert_allclose(found[1], expected, rtol=1e-6)


def test_unknown_choices_name_the_known_ones():
    for make in (
        lambda: merge.trim(0.2, scope="layer"),
        lambda: merge.elect_sign("vote"),
        lambda: merge.elect_sign(zero="negative"),
        lambda: merge.reduce("median"),
        lambda: merge.ties(reduce="median"),
        lambda: merge.fisher(floor_mode="none"),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            make()
    for make in (merge.rescale, merge.task_arithmetic, merge.slerp, merge.interpolate):
        with pytest.raises(ValueError, match="must be finite"):
            make(np.nan)
