"""What holds for every public method, by construction: a method without a row fails."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab import merge, trees
from mixlab.types import PyTree


class Row(NamedTuple):
    """A method, as a config names it, and what holds for it.

    Attributes:
        text: what `merge.parse` makes it of.
        num_models: how many models the tests merge.
        pair: whether it takes two models, no more and no fewer.
        into_base: whether it merges one model into its base.
        needs_base: whether it stops where there is no base.
        needs_key: whether it draws.
        symmetric: whether the order of the models does not matter.
        per_model: whether a model comes out for each that goes in, stacked.
        inputs: what else it takes, `models -> {name: value}`, one value a model.
        tolerance: relative, for what is true but for rounding.
        nan: how far the NaN of one model goes: to its `"entry"`; to it, while the others may
            change (`"weights"`) or be NaN too (`"leaf"`); or `"nowhere"`, in robust methods.
    """

    text: str
    num_models: int = 3
    pair: bool = False
    into_base: bool = False
    needs_base: bool = False
    needs_key: bool = False
    symmetric: bool = True
    per_model: bool = False
    inputs: Callable[[list[PyTree]], dict[str, list[PyTree]]] = lambda models: {}
    tolerance: float = 1e-5
    nan: str = "entry"

    @property
    def method(self):
        return merge.parse(self.text)


def fishers(models):
    return {"fishers": [jax.tree.map(jnp.square, model(i + 10)) for i in range(len(models))]}


def grams(models):
    """Of the kernel alone, made of inputs that span it only together; the third's are zero."""
    inputs = [np.random.default_rng(i).normal(size=(3, 4)) * (i != 2) for i in range(len(models))]
    return {
        "grams": [{"dense": {"kernel": jnp.asarray(x.T @ x, jnp.float32)}} for x in inputs],
    }


def router_weights(models):
    return {"router_weights": [0.2, 0.5, 0.3]}


ROWS = {
    "arcee_fusion": Row("arcee_fusion", num_models=1, into_base=True, needs_base=True),
    "average": Row("average"),
    "breadcrumbs": Row("breadcrumbs(density=0.5, gamma=0.1)", needs_base=True),
    "bulyan": Row("bulyan(num_byzantine=1)", num_models=7, nan="nowhere"),
    "caf": Row("caf(num_byzantine=1)", num_models=5, tolerance=1e-4, nan="nowhere"),
    "centered_clipping": Row("centered_clipping(radius=2.0, iterations=30)", nan="nowhere"),
    "consensus": Row("consensus(k=2, lam=0.4)", needs_base=True),
    "dare": Row(
        "dare(density=0.5, consensus='ties')", needs_base=True, needs_key=True, symmetric=False
    ),
    "della": Row("della", needs_base=True, needs_key=True, symmetric=False),
    "ema": Row("ema(decay=0.5)", symmetric=False),
    "emr": Row("emr", needs_base=True, per_model=True),
    "fisher": Row("fisher(normalize=True)", inputs=fishers),
    "flag": Row("flag(rank=2, iterations=2)", num_models=4, tolerance=1e-4, nan="nowhere"),
    "geometric_median": Row("geometric_median", num_models=4, nan="nowhere"),
    "interpolate": Row("interpolate(0.3)", num_models=2, pair=True, symmetric=False),
    "iso_c": Row("iso_c(scale=0.5)", needs_base=True, nan="leaf"),
    "iso_cts": Row("iso_cts(scale=0.5, common_space_fraction=0.4)", needs_base=True, nan="leaf"),
    "karcher": Row("karcher", nan="weights"),
    "krum": Row("krum(num_byzantine=1)", num_models=5, nan="nowhere"),
    "magmax": Row("magmax", needs_base=True),
    "mda": Row("mda(num_byzantine=1)", num_models=4, nan="nowhere"),
    "meamed": Row("meamed(num_byzantine=1)", num_models=4, nan="nowhere"),
    "median": Row("median", num_models=4, nan="nowhere"),
    "model_stock": Row("model_stock", needs_base=True, nan="weights"),
    "monna": Row("monna(num_byzantine=2)", num_models=5, symmetric=False, nan="nowhere"),
    "multi_krum": Row("multi_krum(num_byzantine=1)", num_models=5, nan="nowhere"),
    "multislerp": Row("multislerp", nan="weights"),
    "nearswap": Row("nearswap(t=0.5)", num_models=1, into_base=True, needs_base=True),
    "nuslerp": Row("nuslerp(t=0.3)", num_models=2, pair=True, symmetric=False, nan="weights"),
    "pcb": Row("pcb(ratio=0.5)", needs_base=True),
    "phocas": Row("phocas(num_byzantine=1)", num_models=4, nan="nowhere"),
    "ram": Row("ram", needs_base=True),
    "ram_plus": Row("ram_plus(epsilon=0.5)", needs_base=True),
    "regmean": Row("regmean(off_diagonal=0.9)", inputs=grams, nan="leaf"),
    "sce": Row("sce(select_topk=0.5)", needs_base=True),
    "smea": Row("smea(num_byzantine=1)", num_models=4, nan="nowhere"),
    "slerp": Row("slerp(t=0.3)", num_models=2, pair=True, symmetric=False, nan="weights"),
    "swa": Row("swa"),
    "tall_masks": Row("tall_masks(lam=0.4)", needs_base=True, per_model=True),
    "task_arithmetic": Row("task_arithmetic(scale=0.5)", needs_base=True),
    "ties": Row("ties(density=0.5)", needs_base=True),
    "trimmed_mean": Row("trimmed_mean(num_byzantine=1)", num_models=4, nan="nowhere"),
    "tsv": Row("tsv(scale=0.5)", needs_base=True, nan="leaf"),
    "twin": Row("twin(density=0.7)", needs_base=True, inputs=router_weights, nan="leaf"),
}
every = pytest.mark.parametrize("name", sorted(ROWS))


METHOD_TYPES = (merge.MergeMethod, merge.MaskMethod, merge.TwinMethod)


def test_every_method_has_a_row():
    public = (getattr(merge, name) for name in merge.__all__)
    methods = {
        fn.__name__
        for fn in public
        if inspect.isfunction(fn)
        and inspect.signature(fn).return_annotation in METHOD_TYPES
        and fn not in (merge.chain, merge.parse)
    }
    assert methods == ROWS.keys() == merge.METHODS.keys()


def model(seed, dtype="float32"):
    """A tree with every kind of leaf; kernels of the same seed are alike but for rounding."""
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(4, 3)), dtype),
            "gain": jnp.asarray(rng.normal(), dtype),
            "empty": jnp.zeros((0, 2), dtype),
        },
        "steps": jnp.asarray(seed, jnp.int32),
        "frozen": jnp.asarray([seed % 2 == 0, True]),
        "bias": None,
    }


BASE_SEED = 100


def arguments(row, dtype="float32"):
    """Models, and the keyword arguments that the method takes with them."""
    models = [model(seed, dtype) for seed in range(row.num_models)]
    kwargs = {"base": model(BASE_SEED, dtype), **row.inputs(models)}
    if row.needs_key:
        kwargs["key"] = jax.random.key(0)
    return models, kwargs


def halves(row, kwargs):
    """The base, the key and the other inputs, as `measure` takes them."""
    inputs = dict(kwargs)
    return inputs.pop("base"), inputs.pop("key", None), inputs


@functools.cache
def jitted(name):
    return jax.jit(ROWS[name].method)


@functools.cache
def eager(name):
    models, kwargs = arguments(ROWS[name])
    return ROWS[name].method(models, **kwargs)


def assert_close(a, b, **tolerance):
    trees.check_same_structure(a, b)
    for (name, x), (_, y) in zip(trees.named_leaves(a), trees.named_leaves(b), strict=True):
        if x is not None:
            assert jnp.asarray(x).dtype == jnp.asarray(y).dtype, name
            x, y = (np.asarray(leaf, np.float64) for leaf in (x, y))
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)


def assert_equal(a, b):
    assert_close(a, b, rtol=0, atol=0)


@every
def test_equal_models_merge_to_that_model(name):
    row = ROWS[name]
    models, kwargs = arguments(row)
    models = [models[0]] * len(models)
    if row.needs_base:
        kwargs["base"] = models[0]
    merged = jitted(name)(models, **kwargs)
    expected = trees.stack(models) if row.per_model else models[0]
    assert_close(merged["dense"], expected["dense"], rtol=row.tolerance / 10, atol=1e-6)


@every
def test_order_of_models(name):
    row = ROWS[name]
    models, kwargs = arguments(row)

    def turned(many):
        return [*many[1:], many[0]]

    kwargs |= {name: turned(kwargs[name]) for name in row.inputs(models)}
    merged, expected = jitted(name)(turned(models), **kwargs), eager(name)
    if row.per_model:
        merged, expected = merged["dense"], trees.stack(turned(trees.unstack(expected["dense"])))
    if row.symmetric:
        assert_close(merged, expected, rtol=row.tolerance, atol=1e-6)
    else:
        assert not np.allclose(merged["dense"]["kernel"], expected["dense"]["kernel"])


@every
def test_other_leaves_come_from_the_base(name):
    models, kwargs = arguments(ROWS[name])
    row = ROWS[name]

    def copied(tree, times=1):
        few = {k: tree[k] for k in ("steps", "frozen", "bias")}
        return trees.stack([few] * times) if row.per_model else few

    for run in (eager(name), jitted(name)(models, **kwargs)):
        found = {k: run[k] for k in ("steps", "frozen", "bias")}
        assert_equal(found, copied(kwargs["base"], row.num_models))
    if not row.needs_base:
        kwargs["base"] = None
        merged = row.method(models, **kwargs)
        found = {k: merged[k] for k in ("steps", "frozen", "bias")}
        assert_equal(found, copied(models[0], row.num_models))


@every
def test_list_is_stacked_is_tuple(name):
    models, kwargs = arguments(ROWS[name])
    assert_equal(ROWS[name].method(trees.stack(models), **kwargs), eager(name))
    assert_equal(ROWS[name].method(tuple(models), **kwargs), eager(name))


@every
def test_jit_is_eager(name):
    models, kwargs = arguments(ROWS[name])
    tolerance = ROWS[name].tolerance
    assert_close(jitted(name)(models, **kwargs), eager(name), rtol=tolerance, atol=1e-6)


class OnDisk:
    """An array that is not in memory until it is read, and that notes by name when it is."""

    def __init__(self, name, value, reads):
        self.name, self.value, self.reads = name, value, reads
        self.shape, self.dtype = value.shape, value.dtype

    def __array__(self, dtype=None, copy=None):
        self.reads.append(self.name)
        return np.array(self.value)


@every
def test_leaf_by_leaf_is_whole(name):
    """Both halves on models that are on disk: `measure` sweeps, `combine` takes one leaf a call."""
    models, kwargs = arguments(ROWS[name])
    reads = []

    def on_disk(tree):
        return trees.map_named(
            lambda leaf, x: OnDisk(leaf, np.asarray(x), reads) if trees.is_inexact(x) else x, tree
        )

    method, (base, key, inputs) = ROWS[name].method, halves(ROWS[name], kwargs)
    base, *models = map(on_disk, (base, *models))
    assert not reads
    plan = method.measure(models, base, key, **inputs)
    sweep = [leaf for i, leaf in enumerate(reads) if i == 0 or reads[i - 1] != leaf]
    num_leaves = len(set(reads))
    assert all(len(set(sweep[i : i + num_leaves])) == num_leaves for i in range(len(sweep) - 2))

    merged = {}
    for leaf in dict(trees.named_leaves(base)):
        reads.clear()
        part, *parts = ({leaf: dict(trees.named_leaves(tree))[leaf]} for tree in (base, *models))
        merged |= method.combine(plan, parts, part)
        assert set(reads) <= {leaf}
    assert_equal(merged, dict(trees.named_leaves(eager(name))))


@every
def test_narrow_dtypes_are_computed_in_float32(name):
    models, kwargs = arguments(ROWS[name])

    def narrow(tree):
        dense = tree["dense"]
        kinds = {"kernel": "bfloat16", "gain": "float16", "empty": "float16"}
        return tree | {"dense": {k: x.astype(kinds[k]) for k, x in dense.items()}}

    def widen(tree):
        return jax.tree.map(lambda x: x.astype("float32") if trees.is_inexact(x) else x, tree)

    models, base = [narrow(m) for m in models], narrow(kwargs["base"])
    merged = jitted(name)(models, **kwargs | {"base": base})
    wide = jitted(name)([widen(m) for m in models], **kwargs | {"base": widen(base)})
    rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, merged)
    for leaf, like in merged["dense"].items():
        assert like.dtype == models[0]["dense"][leaf].dtype
    for part, tolerance in (("kernel", "bfloat16"), ("gain", "float16")):
        found, expected = ({part: tree["dense"][part]} for tree in (merged, rounded))
        assert_close(found, expected, rtol=2 * float(jnp.finfo(tolerance).eps), atol=1e-7)


@every
def test_double_precision_is_kept(name, x64):
    models, kwargs = arguments(ROWS[name], "float64")
    if "fishers" in kwargs:
        kwargs["fishers"] = [jax.tree.map(jnp.ones_like, m) for m in models]
    kernel = jax.jit(ROWS[name].method)(models, **kwargs)["dense"]["kernel"]
    assert kernel.dtype == jnp.float64
    if name in ("average", "fisher"):
        mean = np.mean([m["dense"]["kernel"] for m in models], axis=0)
        np.testing.assert_allclose(kernel, mean, rtol=1e-15, atol=1e-15)


@every
def test_gradient_is_finite(name):
    row = ROWS[name]
    models, kwargs = arguments(row)
    # Zero and equal leaves, where norms and angles have no gradient of their own.
    models[0]["dense"]["gain"] = jnp.zeros(())
    models[-1]["dense"]["kernel"] = models[0]["dense"]["kernel"]

    base, key, inputs = halves(row, kwargs)

    def loss(moving):
        whole = [m | {"dense": d} for m, d in zip(models, moving, strict=True)]
        plan = row.method.measure(whole, base, key, **inputs)
        merged = row.method.combine(plan, whole, base)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(merged["dense"]))

    gradient = jax.jit(jax.grad(loss))([m["dense"] for m in models])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@every
def test_nan_in_one_model_comes_out_at_its_entry(name):
    row = ROWS[name]
    models, kwargs = arguments(row)

    # The second of several, in which `flag` has to round the weight that is to be 0.
    which = 1 if row.num_models > 2 else -1

    def merged(entry):
        damaged = jax.tree.map(lambda leaf: leaf, models)
        dense = damaged[which]["dense"]
        dense["kernel"] = dense["kernel"].at[1, 2].set(entry)
        made = jitted(name)(damaged, **kwargs)["dense"]
        return np.asarray(made["kernel"]), np.asarray(made["gain"])

    kernel, gain = merged(np.nan)
    assert np.isfinite(gain).all()
    if row.nan == "nowhere":
        assert np.isfinite(kernel).all()
        return
    assert np.isnan(kernel[..., 1, 2]).all()
    others = np.arange(12).reshape(4, 3) != 5
    if row.nan != "leaf":
        assert np.isfinite(kernel[..., others]).all()
    if row.nan == "entry":
        # Nor does it count in what is decided about the others.
        unchanged, same_gain = merged(kwargs["base"]["dense"]["kernel"][1, 2])
        np.testing.assert_allclose(kernel[..., others], unchanged[..., others], rtol=1e-6)
        np.testing.assert_allclose(gain, same_gain, rtol=1e-6)


@every
def test_mismatched_models_are_errors_that_name_the_leaf(name):
    method = ROWS[name].method
    models, kwargs = arguments(ROWS[name])

    def broken(**dense):
        return [*models[:-1], models[-1] | {"dense": models[-1]["dense"] | dense}]

    with pytest.raises(ValueError, match="dense/extra"):
        method(broken(extra=jnp.ones(3)), **kwargs)
    with pytest.raises(ValueError, match=r"'dense/gain' is .*float32\[3\]"):
        method(broken(gain=jnp.ones(3)), **kwargs)
    with pytest.raises(ValueError, match=r"'dense/kernel' is .*bfloat16\[4, 3\]"):
        method(broken(kernel=jnp.ones((4, 3), jnp.bfloat16)), **kwargs)
    with pytest.raises(ValueError, match=r"'dense/kernel' is .*None"):
        method(broken(kernel=None), **kwargs)
    with pytest.raises(TypeError, match="'dense/kernel' is a str"):
        method(broken(kernel="weights"), **kwargs)
    with pytest.raises(ValueError, match="empty list"):
        method([], **kwargs)
    other = kwargs | {
        "base": kwargs["base"] | {"dense": models[0]["dense"] | {"gain": jnp.ones(2)}}
    }
    with pytest.raises(ValueError, match=r"'dense/gain' is float32\[2\] in the base"):
        method(models, **other)
    with pytest.raises(TypeError, match="fischers"):
        method(models, **kwargs, fischers=None)


@every
def test_a_missing_base_or_key_is_an_error(name):
    row = ROWS[name]
    models, kwargs = arguments(row)
    for needed in ["base"] * row.needs_base + ["key"] * row.needs_key:
        with pytest.raises(ValueError, match=f"{needed}="):
            row.method(models, **{k: v for k, v in kwargs.items() if k != needed})


@every
def test_the_same_key_draws_the_same(name):
    """Whatever the order of the leaves; another key draws something else."""
    row = ROWS[name]
    if not row.needs_key:
        return
    models, kwargs = arguments(row)
    kernel = eager(name)["dense"]["kernel"]

    def alone(tree):
        return {"dense": {"kernel": tree["dense"]["kernel"]}}

    few = row.method([alone(m) for m in models], **kwargs | {"base": alone(kwargs["base"])})
    np.testing.assert_array_equal(few["dense"]["kernel"], kernel)
    other = row.method(models, **kwargs | {"key": jax.random.key(1)})
    assert not np.array_equal(other["dense"]["kernel"], kernel)


@every
def test_wrong_number_of_models_or_weights(name):
    models, kwargs = arguments(ROWS[name])
    maker = merge.METHODS[name]
    if "weights" in inspect.signature(maker).parameters:
        num_models = len(models)
        with pytest.raises(ValueError, match=f"each of the {num_models} models"):
            maker(weights=[0.5] * (num_models - 1))(models, **kwargs)
        with pytest.raises(ValueError, match="finite"):
            maker(weights=[0.5, 0.5, np.nan])
    if ROWS[name].pair:
        with pytest.raises(ValueError, match="two models, got 1"):
            ROWS[name].method(models[:1], **kwargs)
    if ROWS[name].into_base:
        with pytest.raises(ValueError, match="got 2 models and base="):
            ROWS[name].method(models * 2, **kwargs)


def test_parse_passes_methods_through():
    method = merge.average()
    assert merge.parse(method) is method


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(), (3,), (0,), (2, 3)]), max_size=3),
    ints=st.booleans(),
    weights=st.lists(st.floats(0.125, 4, width=16), min_size=1, max_size=3),
    nested=st.sampled_from([dict, list, tuple]),
)
def test_average_of_any_tree(shapes, ints, weights, nested):
    rng = np.random.default_rng(len(shapes))

    def tree():
        floats = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        inner = {str(i): x for i, x in enumerate(floats)} if nested is dict else nested(floats)
        return {"inner": inner, "count": 3 if ints else None}

    models = [tree() for _ in weights]
    merged = merge.average(weights)(models)
    assert merged["count"] == (3 if ints else None)
    assert type(merged["inner"]) is nested
    expected = [
        np.average(np.stack(leaves), axis=0, weights=weights)
        for leaves in zip(*(jax.tree.leaves(m["inner"]) for m in models), strict=True)
    ]
    for found, value in zip(jax.tree.leaves(merged["inner"]), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
