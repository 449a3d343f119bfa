"""Recorded results of mergekit's and FusionBench's sparse methods, with the recorded masks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import merge
from tests import golden
from tests.merge.test_golden import ATOL, WEIGHTS, check, compare, inputs, tree

__all__ = ["inputs"]

SCALE = 0.3
KEEP = np.float32(1 - 0.7)


@pytest.fixture(scope="module")
def vectors():
    return golden.load("merging/public_sparse")


def stacked(vectors, case):
    """A recorded tree of each model, stacked."""
    columns = [tree(vectors, f"{case}/ft{i}") for i in range(4)]
    return {name: np.stack([column[name] for column in columns]) for name in columns[0]}


def replay(methods, decided, models, base):
    """Merges with the decisions `{case: plan of drop}` in place of those that were drawn."""

    @jax.jit
    def run(decided, models, base):
        merged = {}
        for case, method in methods.items():
            plan = method.measure(models, base, jax.random.key(0))
            assert plan["0/drop"].keys() == decided[case].keys()
            merged[case] = method.combine(plan | {"0/drop": decided[case]}, models, base)
        return merged

    return run(decided, models, base)


def test_dare(inputs, vectors):
    base, models = inputs
    uniform, masks = stacked(vectors, "uniform"), stacked(vectors, "mask/keep=0.30")
    plan = {name: {"probability": KEEP, "kept": u < KEEP} for name, u in uniform.items()}
    for name, leaf in plan.items():
        np.testing.assert_array_equal(leaf["kept"], masks[name])

    methods = {}
    for flag, rescale in (("True", "l1"), ("False", None)):
        for consensus in ("linear", "ties"):
            case = f"dare_{consensus}/mergekit/rescale={flag}"
            methods[case] = merge.dare(
                KEEP, SCALE, rescale=rescale, consensus=consensus, weights=WEIGHTS
            )
    for case, merged in replay(methods, dict.fromkeys(methods, plan), models, base).items():
        compare(merged, vectors, case)


def test_dare_of_one_model(inputs, vectors):
    """Keeps 1 - u > p, or u < 1 - p; Twin-Merging leaves leaves of one axis as they are."""
    base, models = inputs
    zeros = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    methods, decided, deltas = {}, {}, {}
    for i, model in enumerate(models):
        delta = {name: leaf - base[name] for name, leaf in model.items()}
        whole, twin = {}, {}
        for name, u in tree(vectors, f"uniform/ft{i}").items():
            whole[name] = {"probability": KEEP, "kept": (1 - u > np.float32(0.7))[None]}
            p = KEEP if u.ndim > 1 else np.float32(1)
            twin[name] = {"probability": p, "kept": (u < p)[None]}
        for code, plan in (("fusionbench", whole), ("twin_merging", twin)):
            case = f"dare_drop/{code}/ft{i}"
            merged = replay({case: merge.dare(KEEP)}, {case: plan}, [delta], zeros)
            compare(merged[case], vectors, case)
