"""Experts of a tiny network: every step from the data to the table and the picture."""

import csv
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import experts, landscape, merge
from mixlab.data import Dataset

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "experts.py"


def config_file():
    spec = importlib.util.spec_from_file_location("experts_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(**fields):
    config = experts.default_config()
    config.update(
        data="digits",
        model="mlp(hidden=(16,))",
        optimizer="adam(1e-2)",
        tasks=("rotated", "inverted", "classes(0, 1, 2)"),
        pretrain_steps=40,
        tune_steps=40,
        measured_examples=4,
        seeds=(0, 1),
        methods=("average", "fisher", "regmean", "emr", "greedy_soup", "regmean_plus_plus"),
        pair_methods=("slerp",),
        scales=(0.5, 1.0),
        marks=("average",),
        plane_examples=5,
    )
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    # Every program runs a few times: compiling it well takes longer than running it as it is.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield experts.run(tiny_config(), tmp_path_factory.mktemp("experts"))
    jax.config.update("jax_disable_most_optimizations", False)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_experts_know_their_own_task_and_merges_are_tested_on_all(done):
    found = {
        (row["method"], row["seed"], row["scale"]): np.array([float(row[t]) for t in tasks])
        for row in rows(done.parent / "results.csv")
        for tasks in [("rotated", "inverted", "classes(0, 1, 2)")]
    }
    for seed in ("0", "1"):
        individual = found["individual experts", seed, ""]
        assert np.all(individual > found["pretrained", seed, ""])
        assert individual.mean() > found["average", seed, ""].mean()
        # A mask for each task keeps more than one model for all.
        assert found["emr", seed, ""].mean() > found["average", seed, ""].mean()
    # Twice three pairs, each on its own two tasks.
    pairs = rows(done.parent / "pairs.csv")
    assert len(pairs) == 2 * 3 * 2
    assert all(
        sum(row[t] != "" for t in ("rotated", "inverted", "classes(0, 1, 2)")) == 2 for row in pairs
    )


@pytest.mark.slow
def test_the_report_has_a_row_a_method(done):
    text = done.read_text()
    for method in (*tiny_config().methods, "pretrained", "individual experts", "slerp"):
        assert f"| {method} " in text
    assert "± " in text
    assert (done.parent / "landscape.png").stat().st_size > 10_000


@pytest.mark.slow
def test_trained_models_are_kept_and_not_those_of_another_config(done, monkeypatch):
    monkeypatch.setattr(experts.setting, "_fitter", None)  # nothing is trained again
    with jax.numpy_dtype_promotion("standard"):
        changed = tiny_config()
        changed.methods = ("average", "emr")
        text = experts.run(changed, done.parent).read_text()
        assert "| emr " in text
        assert "| fisher " not in text
        with pytest.raises(ValueError, match="another config, which differs in tune_steps"):
            experts.run(tiny_config(tune_steps=41), done.parent)
        with pytest.raises(ValueError, match="another config; use another --workdir"):
            experts.run(tiny_config(tasks=("rotated", "inverted")), done.parent)


@pytest.mark.parametrize("field", ["methods", "pair_methods", "marks"])
def test_an_unknown_method_stops_before_training(field, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'ties'"):
        experts.run(tiny_config(**{field: ("tie(0.2)",)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["mnist5k", "cifar10"])
def test_the_config_names_every_method(variant):
    module = config_file()
    config = module.get_config(variant)
    texts = [*config.methods, *config.pair_methods]
    names = {text.split("(")[0] for text in texts}
    assert names - {"greedy_soup", "regmean_plus_plus"} == set(merge.METHODS) - set(module.NOT_HERE)
    for text in texts:
        if text not in ("greedy_soup", "regmean_plus_plus"):
            merge.parse(text)
    for task in config.tasks:
        experts.parse_task(task)


def test_what_tasks_make_of_images():
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 1)
    digits = Dataset(images, np.array([0, 1], np.int32), 2, "d", "train", ("0", "1"))

    def made(text):
        return experts.parse_task(text)(digits)

    first = images[0, ..., 0]
    np.testing.assert_array_equal(made("rotated").images[0, ..., 0], np.rot90(first))
    np.testing.assert_array_equal(made("flipped").images[0, ..., 0], first[::-1])
    np.testing.assert_array_equal(made("inverted | inverted").images, images)
    permuted = made("permuted(1)").images
    np.testing.assert_array_equal(np.sort(permuted[0], axis=None), np.arange(9))
    np.testing.assert_array_equal(permuted[1], permuted[0] + 9)  # one order for all
    assert (permuted != images).any()
    chosen = made("flipped | classes(1)")
    assert chosen.labels.tolist() == [1]
    np.testing.assert_array_equal(chosen.images[0], images[1, ::-1])


def test_a_model_with_statistics_is_refused():
    config = tiny_config()
    config.model = "cnn(features=(2,))"
    with pytest.raises(ValueError, match="keeps statistics"):
        jax.eval_shape(experts.prepare(config, 0).init, jax.random.key(0))


def score(params):
    """A bowl around (1, 2, 0.5)."""
    return jnp.sum(jnp.square(params["w"] - jnp.asarray([1.0, 2.0, 0.5])))


def at(*w):
    return {"w": np.array(w, np.float32), "steps": np.int32(7), "none": None}


def test_a_landscape_has_the_score_where_it_says():
    models = {"a": at(1, 1, 0), "b": at(4, 1, 0), "c": at(1, 3, 0)}
    marks = {"on": at(2, 2, 0), "off": at(2, 2, -0.5)}
    found = landscape.measure(score, models, marks, points=5)
    # The plane is that of the first two entries, with `a` as its origin.
    x, y = np.meshgrid(found.x, found.y)
    np.testing.assert_allclose(found.values, x**2 + (y - 1) ** 2 + 0.25, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.models["b"], (3, 0, 0, 10.25), atol=1e-5)
    np.testing.assert_allclose(found.models["c"], (0, 2, 0, 1.25), atol=1e-5)
    np.testing.assert_allclose(found.marks["on"], (1, 1, 0, 1.25), atol=1e-5)
    np.testing.assert_allclose(found.marks["off"], (1, 1, 0.5, 2), atol=1e-5)
    assert len(found.x) == 5
    assert found.x[0] < 0 < 3 < found.x[-1]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"a": at(0, 0, 0), "b": at(1, 1, 1)}, "three models, got 2"),
        ({"a": at(0, 0, 0), "b": at(1, 1, 1), "c": at(3, 3, 3)}, "a, b, c lie on a line"),
        ({"a": at(0, 0, 0), "b": at(0, 0, 0), "c": at(3, 3, 3)}, "lie on a line"),
        ({"a": at(0, 0, 0), "b": at(1, 1, 1), "c": {"w": np.zeros(3)}}, "'a' and 'c'"),
    ],
)
def test_no_plane_is_an_error(models, message):
    with pytest.raises(ValueError, match=message):
        landscape.measure(score, models)


def test_the_drawing_marks_every_model():
    models = {"a": at(1, 1, 0), "b": at(4, 1, 0), "c": at(1, 3, 0)}
    figure = landscape.draw(score, models, {"mean": at(2, 5 / 3, 0)}, points=4)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mean  1.36"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"a", "b", "c"}


def test_a_flat_landscape_is_drawn_and_one_without_numbers_is_an_error():
    models = {"a": at(1, 1, 0), "b": at(4, 1, 0), "c": at(1, 3, 0)}
    landscape.draw(lambda params: jnp.float32(0.5), models, points=2)
    with pytest.raises(ValueError, match="finite number nowhere"):
        landscape.draw(lambda params: jnp.float32(jnp.nan), models, points=2)
