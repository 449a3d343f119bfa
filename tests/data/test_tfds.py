"""TensorFlow Datasets; in one file, for TensorFlow takes seconds to import."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mixlab import data

pytestmark = pytest.mark.slow

PREPARED = pathlib.Path(
    os.environ.get("MIXLAB_DATA", pathlib.Path(__file__).resolve().parents[3] / "shared" / "data")
)


def _examples(seed, count, size):
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = (4, 6) if size == "fixed" else rng.integers(3, 9, 2)
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        yield i, {"image": image, "label": i % 3, "id": f"{seed}/{i}"}


def _prepare(folder, set_name, file_format, features, splits):
    """Writes a set to where TFDS finds it by its name."""
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, download_manager):
            return splits

        def _generate_examples(self):
            raise AssertionError

    Made(data_dir=folder, file_format=file_format).download_and_prepare()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    for name, size, file_format in (
        ("tiny_record", "fixed", "tfrecord"),
        ("tiny_array", "fixed", "array_record"),
        ("tiny_varying", "varying", "array_record"),
    ):
        shape = (4, 6, 3) if size == "fixed" else (None, None, 3)
        features = {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
            "id": tfds.features.Text(),
        }
        splits = {"train": _examples(0, 12, size), "test": _examples(1, 6, size)}
        _prepare(folder, name, file_format, features, splits)
    text = {"text": tfds.features.Text()}
    _prepare(folder, "tiny_text", "array_record", text, {"train": [(0, {"text": "none"})]})
    return folder


def _load(folder, name, split, **options):
    return data.load(name, split, data_dir=folder, download=False, **options)


@pytest.mark.parametrize("name", ["tiny_record", "tiny_array"])
def test_a_set_that_fits_is_read(tiny, name):
    train = _load(tiny, name, "train")
    assert train.images.shape == (12, 4, 6, 3)
    assert train.in_memory
    assert train.class_names == ("x", "y", "z")
    # Whatever order TFDS wrote them in, each image kept its own label.
    expected = {e["image"].tobytes(): e["label"] for _, e in _examples(0, 12, "fixed")}
    assert {i.tobytes(): k for i, k in zip(train.images, train.labels, strict=True)} == expected
    again = _load(tiny, name, "train")
    np.testing.assert_array_equal(again.images, train.images)
    assert len(_load(tiny, name, "test")) == 6
    part = _load(tiny, name, "train[:25%]")
    np.testing.assert_array_equal(part.images, train.images[:3])


def test_a_larger_set_is_indexed(tiny):
    whole = _load(tiny, "tiny_array", "train", memory_bytes=12 * 72)
    lazy = _load(tiny, "tiny_array", "train", memory_bytes=12 * 72 - 1)
    assert (whole.in_memory, lazy.in_memory) == (True, False)
    assert lazy.images.shape == whole.images.shape
    np.testing.assert_array_equal(lazy.labels, whole.labels)
    indices = np.array([11, 0, 11, 5])
    batch = lazy.subset(np.arange(12)[::-1]).batch(indices)
    np.testing.assert_array_equal(batch["image"], whole.images[::-1][indices])
    np.testing.assert_array_equal(batch["label"], whole.labels[::-1][indices])
    with pytest.raises(ValueError, match=r"864 bytes, more than memory_bytes=10.*array_record"):
        _load(tiny, "tiny_record", "train", memory_bytes=10)


def test_varying_sizes_need_a_size(tiny):
    with pytest.raises(ValueError, match="images vary in size; give image_size="):
        _load(tiny, "tiny_varying", "train")
    whole = _load(tiny, "tiny_varying", "test", image_size=(5, 7))
    lazy = _load(tiny, "tiny_varying", "test", image_size=(5, 7), memory_bytes=0)
    assert whole.images.shape == (6, 5, 7, 3)
    np.testing.assert_array_equal(lazy.images[np.arange(6)], whole.images)


def test_a_set_that_is_not_there_is_prepared_so_that_it_can_be_indexed(tmp_path):
    import tensorflow_datasets as tfds

    class TinyGenerated(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(4, 6, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=3),
                    "id": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return _examples(2, 5, "fixed")

    with pytest.raises(ValueError, match="tiny_generated is not prepared"):
        _load(tmp_path, "tiny_generated", "train")
    lazy = data.load("tiny_generated", "train", data_dir=tmp_path, memory_bytes=0)
    assert (len(lazy), lazy.in_memory) == (5, False)
    assert lazy.class_names == ("0", "1", "2")
    assert len(_load(tmp_path, "tiny_generated", "train")) == 5


def test_errors_say_what_to_do(tiny):
    with pytest.raises(ValueError, match="no data set 'cifar11'; did you mean 'cifar10"):
        _load(tiny, "cifar11", "train")
    with pytest.raises(ValueError, match="no data set 'mnist5'; did you mean 'mnist5k'"):
        _load(tiny, "mnist5", "train")
    with pytest.raises(ValueError, match=r"mnist is not prepared under .*download is off"):
        _load(tiny, "mnist", "train")
    with pytest.raises(ValueError, match=r"no image classification set: it needs .* it has"):
        _load(tiny, "tiny_text", "train")


def test_prepared_cifar10():
    if not (PREPARED / "cifar10").is_dir():
        pytest.skip(f"no prepared cifar10 under {PREPARED}: set MIXLAB_DATA to the folder")
    test = _load(PREPARED, "cifar10", "test")
    assert test.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(test.labels), [1000] * 10)
    assert test.class_names[3] == "cat"


def test_tensorflow_is_imported_only_when_asked_for():
    code = (
        "import sys; from mixlab import data; data.load('digits', 'train');"
        "sys.exit('tensorflow' in sys.modules or 'tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_tensorflow_leaves_the_gpu_to_jax(tiny, monkeypatch):
    import tensorflow as tf

    asked = []
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["GPU:0"])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *args: asked.append(args))
    _load(tiny, "tiny_record", "test")
    assert asked == [([], "GPU")]


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"did you mean 'digits'.*'mixlab\[data\]'"):
        data.load("digit", "train")


def test_what_cannot_be_fetched_is_told_in_a_line(tmp_path, monkeypatch):
    def download_and_prepare(self):
        raise ConnectionError("no such host")

    builder = pytest.importorskip("tensorflow_datasets").core.DatasetBuilder
    monkeypatch.setattr(builder, "download_and_prepare", download_and_prepare)
    says = rf"mnist is not prepared under {tmp_path}/.* not be fetched: no such host; .* data_dir"
    with pytest.raises(OSError, match=says):
        data.load("mnist", "train", data_dir=tmp_path)
