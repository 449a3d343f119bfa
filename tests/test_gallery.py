"""What the gallery draws is what the plans say; every method is on the sheet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mixlab import augment, cli, data, gallery
from mixlab.augment import Augmentation
from mixlab.gallery import drawing

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8),
    "label": np.arange(4, dtype=np.int32),
}
SOFT = {**BATCH, "label": np.eye(4, dtype=np.float32)}


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """As the command line has it; the gallery runs every program once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_every_method_is_on_the_sheet():
    shown = [name for group in gallery.METHODS.values() for name in group]
    assert sorted([*shown, *gallery.NOT_SHOWN]) == sorted(augment.CONSTRUCTORS)
    assert sorted(name for group in gallery.OPS.values() for name in group) == augment.ops.__all__
    for group in gallery.METHODS.values():
        for name, make in group.items():
            for size in ((28, 28), (9, 15)):
                assert isinstance(make(size), Augmentation), name


@pytest.mark.parametrize(
    "aug",
    [
        augment.mosaic(),
        augment.chain(augment.identity(), augment.one_of(augment.cutmix(), augment.mixup(1.0))),
        augment.sometimes(0.5, augment.smoothmix()),
    ],
    ids=["mosaic", "one_of in chain", "sometimes"],
)
def test_the_masks_are_what_was_mixed(aug, key):
    # Of one colour each: a mosaic moves its pieces about.
    color = 60.0 * np.arange(4)
    image = np.broadcast_to(color[:, None, None, None], (4, 8, 8, 3)).astype(np.uint8)
    plan, out = drawing._run(aug, key, {**SOFT, "image": image})
    mixed = 0
    for row in range(4):
        done = [step for step in gallery.steps(aug, plan, row, (8, 8)) if step.partner]
        assert len(done) <= 1
        for step in done:
            members = [row, *step.partner]
            want = np.tensordot(color[members], step.weight, axes=1)
            np.testing.assert_allclose(out["image"][row, ..., 0], want, atol=0.51)
            label = np.zeros(4)
            np.add.at(label, members, step.weight.mean(axis=(1, 2)))
            np.testing.assert_allclose(out["label"][row], label, atol=1e-5)
            mixed += 1
        if not done:
            np.testing.assert_array_equal(out["image"][row], image[row])
    assert mixed


def test_the_ops_of_policies_are_told_by_name():
    names = list(augment.randaugment_arguments("torchvision", 0.0, 1.0, (8, 8)))
    plan = {
        "op": np.array([[names.index("rotate"), names.index("equalize")]]),
        "argument": np.array([[-12.0, 0.0]], np.float32),
        "use": np.array([[True, True]]),
    }
    aug = augment.randaugment()
    assert gallery.steps(aug, plan, 0, (8, 8))[0].ops == ("rotate −12°", "equalize")
    plan["use"][0, 0] = False
    assert gallery.steps(aug, plan, 0, (8, 8))[0].ops == ("equalize",)
    chains = {name: np.stack([leaf, leaf], 1) for name, leaf in plan.items()}
    chains["weights"] = np.array([[0.25, 0.75]])
    mixed = augment.chain(Augmentation(aug.sample, aug.apply, ops=aug.ops))
    told = gallery.steps(mixed, {"0": chains}, 0, (8, 8))[0].ops
    assert told == ("0.25 equalize", "0.75 equalize")


def test_boxes_without_partners_are_shown(key):
    aug = augment.cutout(4, count=2)
    plan, out = drawing._run(aug, key, BATCH)
    want = BATCH["image"][1].copy()
    for top, left, bottom, right in gallery.steps(aug, plan, 1, (8, 8))[0].boxes:
        want[top:bottom, left:right] = 0
    np.testing.assert_array_equal(out["image"][1], want)


def words(figure):
    return [text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text"))]


def pixels(figure):
    """Of all pictures, in the order in which they were drawn."""
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]


def test_draw_shows_sources_partners_masks_results_labels():
    aug = augment.chain(augment.mixup(1.0, pairing="roll"), augment.cutmix(pairing="flip"))
    figure = gallery.draw({"both": aug}, BATCH, class_names=list("abcd"), rows=2, seed=1)
    shown = pixels(figure)
    want = np.asarray(jax.jit(aug)(jax.random.key(1), SOFT)["image"])
    assert len(shown) == 2 * 6
    np.testing.assert_array_equal(shown[0], BATCH["image"][0])
    np.testing.assert_array_equal(shown[1], BATCH["image"][3])  # roll
    np.testing.assert_array_equal(shown[9], BATCH["image"][2])  # flip
    np.testing.assert_allclose(shown[5].astype(int), want[0], atol=1)
    assert {"both", "source", "partner", "mask", "result", "label", "a", "d"} <= set(words(figure))


def test_draw_takes_grey_floats_views_and_halves():
    grey = {"image": RNG.random((4, 8, 8, 1), np.float32)}
    figure = gallery.draw("mixup(pairing='half')", grey)
    assert len(pixels(figure)) == 2 * 4  # two rows come out, without labels
    assert pixels(figure)[0].shape == (8, 8)
    figure = gallery.draw("views(3, random_flip)", grey, rows=1)
    assert pixels(figure)[1].shape == (17, 17)
    with pytest.raises(ValueError, match="3 class_names for labels of 4 classes"):
        gallery.draw("mixup", SOFT, class_names=list("abc"))


def test_local_crops_are_drawn_below():
    def crops(plan, batch):
        big = jnp.stack([batch["image"]] * 2, axis=1)
        return {**batch, "image": big, "local": jnp.stack([batch["image"][:, :4, :4]] * 6, axis=1)}

    figure = gallery.draw(Augmentation(lambda key, batch: {}, crops), BATCH, rows=1)
    assert [image.shape[:2] for image in pixels(figure)] == [(8, 8)] * 3 + [(4, 4)] * 6


def test_sheet(monkeypatch):
    few = {"Mixing": {"fmix": gallery.METHODS["Mixing"]["fmix"]}}
    monkeypatch.setattr(drawing, "METHODS", few)
    ops = {"invert": (), "translate_x": (0.25,), "posterize": (2,)}
    monkeypatch.setattr(drawing, "OPS", {"Ops": ops})
    figure = gallery.sheet(BATCH, class_names=["$one$", "two", "three", "a" * 40])
    told = words(figure)
    assert {"Sources", "Mixing", "Ops", "$one$", "fmix", "translate_x(2)"} <= set(told)
    shown = pixels(figure)
    assert len(shown) == 4 + 1 + 3
    # A group that fits goes on in the row: the op stands in the second column.
    np.testing.assert_array_equal(shown[5], 255 - BATCH["image"][1])
    assert any(text.startswith("$one$ 0.") for text in told)


def test_examples_come_from_as_many_classes_as_there_are(tmp_path):
    chosen = gallery.examples("digits", count=12, seed=3)
    assert sorted(np.bincount(chosen.labels)) == [1] * 8 + [2] * 2
    assert sorted(chosen.labels) == chosen.labels.tolist()
    for name in ("b", "a"):
        Image.fromarray(RNG.integers(0, 256, (6, 9), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no image")
    folder = gallery.examples(f"folder:{tmp_path}", image_size=6)
    assert folder.images.shape == (2, 6, 6, 1)
    assert folder.class_names == ("a", "b")
    with Image.open(tmp_path / "a.png") as image:  # the middle of 6 x 9, not squeezed
        np.testing.assert_array_equal(folder.images[0, ..., 0], np.asarray(image)[:, 1:7])


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["mixlab", "gallery", *map(str, arguments)])
    cli.main()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["mixap"], 2, "did you mean 'mixup'"),
        (["cutmix(alfa=1)"], 2, "it takes (alpha=1.0"),
        (["--out", "sheet.jpg"], 2, ".png, .pdf, .svg, got 'sheet.jpg'"),
        (["--count", "0"], 2, "invalid positive int value: '0'"),
        (["mixup", "--data", "folder:/nowhere"], 1, "there is no folder /nowhere"),
        (["mixup", "--split", "test"], 1, "photos has no split 'test'"),
    ],
)
def test_command_line_errors(monkeypatch, capsys, arguments, status, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", gallery.SUFFIXES)
def test_command_line_writes_the_same_file_again(monkeypatch, capsys, tmp_path, suffix):
    written = []
    monkeypatch.setattr(drawing, "_run", lambda aug, key, batch: ({"use": np.ones(8, bool)}, batch))
    for name in ("one", "two"):
        out = tmp_path / f"{name}{suffix}"
        run(monkeypatch, "random_flip", "--count", 1, "--image-size", 8, "--out", out)
        assert f"wrote {out}" in capsys.readouterr().out
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert written[0]


def test_photos():
    photos = data.load("photos", "train")
    assert photos.images.shape == (8, 256, 256, 3)
    assert photos.labels.tolist() == list(range(8))
    assert photos.class_names[:3] == ("astronaut", "cat", "coffee")
    # The flower is orange on green, the retina red on black: the files are the right ones.
    flower, retina = (photos.images[photos.class_names.index(n)] for n in ("flower", "retina"))
    assert flower[128, 128, 0] > 150 > flower[128, 128, 2]
    assert retina[2, 2].max() < 20 < retina[128, 128, 0]
    with pytest.raises(ValueError, match="photos has no split 'test'; known: train"):
        data.load("photos", "test")
