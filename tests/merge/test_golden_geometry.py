"""Recorded vectors of the methods that work with angles and with singular values."""

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import merge
from tests import golden
from tests.merge.test_golden import WEIGHTS, check, compare, inputs

__all__ = ["inputs"]


def deltas(models, base):
    return [{name: leaf - base[name] for name, leaf in m.items()} for m in models]


def test_nuslerp(inputs):
    base, models = inputs
    v = golden.load("merging/public_spherical")
    pair = deltas(models[:2], base)
    places = (0.0, 0.3, 0.5, 1.0)
    axes = {
        None: "flatten=True/row_wise=False",
        -1: "flatten=False/row_wise=False",
        0: "flatten=False/row_wise=True",
    }

    @jax.jit
    def run(places, pair):
        def of(t):
            return {case: merge.nuslerp(t, axis=axis)(pair) for axis, case in axes.items()}

        return jax.vmap(of)(places)

    merged = run(jnp.asarray(places), pair)
    for i, t in enumerate(places):
        for case in axes.values():
            one = {name: x[i] for name, x in merged[case].items()}
            compare(one, v, f"nuslerp_of_deltas/mergekit/t={t}/{case}")


def test_means_on_the_sphere(inputs):
    base, models = inputs
    v = golden.load("merging/public_spherical")

    @jax.jit
    def means(models):
        return {n: merge.karcher(max_iter=n)(models) for n in (1, 10, 50)}

    for kind, given in (("karcher", models), ("karcher_of_deltas", deltas(models, base))):
        for n, merged in means(given).items():
            compare(merged, v, f"{kind}/mergekit/max_iter={n}")
    check({"multislerp/mergekit/base=True": merge.multislerp(WEIGHTS)}, v, models, base)
    check({"multislerp/mergekit/base=False": merge.multislerp(WEIGHTS)}, v, models)


def test_model_stock(inputs):
    base, models = inputs
    v = golden.load("merging/public_geometry")
    of_angles = merge.model_stock(angle="angle")
    methods = {
        "model_stock/mergekit/filter_wise=False": merge.model_stock(),
        "model_stock/mergekit/filter_wise=True": merge.model_stock(filter_wise=True),
        "model_stock/fusionbench/N": of_angles,
    }
    check(methods, v, models, base)
    # The rule works leaf by leaf, so that of two models a few leaves will do.
    names = ("layer2/bias", "layer1/kernel")
    few = {key: value for key, value in v.items() if key.endswith(names)}
    *pair, base = ({name: m[name] for name in names} for m in (*models[:2], base))
    check({"model_stock/fusionbench/2": of_angles}, few, pair, base)


def test_spectral(inputs):
    base, models = inputs
    v = golden.load("merging/public_geometry")
    methods = {
        "iso_c/fusionbench/delta": merge.iso_c(),
        "iso_cts/fusionbench/delta": merge.iso_cts(),
        "tsvm/fusionbench/delta": merge.tsv(),
        "tsvm_lossless/fusionbench/delta": merge.tsv(density=1.0),
    }
    models = deltas(models, base)
    base = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    check(methods, v, models, base)
