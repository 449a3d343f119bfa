"""Two tiny networks trained apart: every step from the data to the table and the picture."""

import csv
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from mixlab import barrier

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "align.py"


def tiny_config(**fields):
    config = barrier.default_config()
    config.update(
        data="digits",
        model="mlp(hidden=(16,))",
        optimizer="adam(1e-2)",
        epochs=3,
        matching_examples=100,
        points=3,
    )
    config.update(fields)
    return config


@pytest.fixture
def quick():
    # Every program runs a few times: compiling it well takes longer than running it as it is.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick")
def test_from_the_data_to_the_table(tmp_path):
    path = barrier.run(tiny_config(), tmp_path)
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    found = {}
    for line in lines:
        own = found.setdefault((line["matching"], line["repaired"]), [])
        own.append((float(line["t"]), float(line["loss"]), float(line["accuracy"])))
    curves = {name: np.array(own).T for name, own in found.items()}
    assert set(curves) == {(text, r) for text in tiny_config().matchings for r in "01"}
    plain = {text: curves[text, "0"] for text in tiny_config().matchings}
    for t, loss, accuracy in plain.values():
        np.testing.assert_array_equal(t, [0, 0.5, 1])
        # Whatever the order of its units, the other network is the same function.
        np.testing.assert_allclose(loss[[0, 2]], plain["none"][1][[0, 2]], rtol=1e-5)
        assert min(accuracy[[0, 2]]) > 0.7
    assert plain["weight_matching"][1][1] < plain["none"][1][1]
    report = path.read_text()
    assert all(f"| {text} " in report for text in plain)
    for name in ("barriers.png", "barriers_repaired.png"):
        assert (tmp_path / name).stat().st_size > 10_000

    with pytest.raises(ValueError, match="another config"):
        barrier.run(tiny_config(epochs=4), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matchings": ("weight_match",)}, "did you mean 'weight_matching'"),
        ({"seeds": (0, 1, 2)}, "two seeds make a pair"),
        ({"points": 4}, "odd"),
    ],
)
def test_what_cannot_be_used_stops_before_training(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        barrier.run(tiny_config(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["mnist5k", "cifar10", "vit"])
def test_the_config_compares_every_matching(variant):
    spec = importlib.util.spec_from_file_location("align_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = module.get_config(variant).matchings
    assert {text.split("(")[0] for text in texts} == set(barrier.MATCHINGS)
    for text in texts:
        barrier.parse_matching(text)
