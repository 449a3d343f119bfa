"""Recorded inputs and outputs of FusionBench's RegMean."""

import jax
import numpy as np
import pytest

from mixlab import merge
from tests import golden

LAYERS = ("fc1", "fc2")


@pytest.mark.usefixtures("x64")
def test_regmean():
    v = golden.load("merging/public_regmean")
    models = [
        {
            layer: {
                "kernel": v[f"param/{layer}/kernel_in_out/ft{i}"],
                "bias": v[f"param/{layer}/bias/ft{i}"],
            }
            for layer in LAYERS
        }
        for i in range(4)
    ]
    grams = [
        {layer: {"kernel": v[f"gram/{layer}/ft{i}"], "bias": None} for layer in LAYERS}
        for i in range(4)
    ]
    merged = jax.jit(
        lambda models, grams: {r: merge.regmean(r)(models, grams=grams) for r in (1.0, 0.6, 0.1)}
    )(models, grams)
    for ratio, model in merged.items():
        for layer in LAYERS:
            case = f"regmean/fusionbench/ratio={ratio}/{layer}"
            for leaf, name in (("kernel", "kernel_in_out"), ("bias", "bias")):
                expected = v[f"{case}/{name}"]
                np.testing.assert_allclose(model[layer][leaf], expected, rtol=0, atol=1e-7)
