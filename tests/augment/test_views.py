"""Random resized crops, multi-crop, low-frequency crops, colour jitter and their single ops."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mixlab import augment
from mixlab.augment import ops
from mixlab.augment.crops import random_boxes
from mixlab.augment.ops.resized import resized_boxes

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(4)
PHOTO = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
# Smaller than the result, larger, at the border, the whole image.
BOXES = np.array([[10, 20, 22, 31], [3, 5, 30, 50], [20, 30, 37, 53], [0, 0, 37, 53]], np.int32)


@functools.cache
def crops(image, size, interpolation, antialias):
    image = jnp.asarray(PHOTO) if image == "uint8" else jnp.asarray(PHOTO, jnp.float32) / 255
    run = jax.jit(lambda box: resized_boxes(image[None], box, size, interpolation, antialias)[0])
    return np.asarray(run(BOXES[None]), np.float64)


@pytest.mark.parametrize(("interpolation", "atol"), [("bilinear", 1), ("bicubic", 2)])
def test_resizing_equals_pillow(interpolation, atol):
    """39 pixels are more than a tile."""
    resample = getattr(Image.Resampling, interpolation.upper())
    found = crops("uint8", (39, 17), interpolation, True)
    for box, ours in zip(BOXES, found, strict=True):
        top, left, bottom, right = box
        theirs = Image.fromarray(PHOTO[top:bottom, left:right]).resize((17, 39), resample)
        difference = np.abs(ours - np.asarray(theirs, int))
        assert difference.max() <= atol
        assert (difference > 0).mean() < 0.05
    real = crops("float32", (39, 17), interpolation, True) * 255
    # Bicubic floats keep, between the two passes, what leaves the range of the levels.
    assert (np.abs(real - found) < 1.1).mean() > 0.9


def cubic(x, slope):
    x = abs(x)
    if x < 1:
        return (slope + 2) * x**3 - (slope + 3) * x**2 + 1
    return slope * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def by_points(line, size, interpolation):
    """A line of pixels [n, ...] at `size` points, as PyTorch interpolates without antialiasing."""
    n, out = len(line), []
    for i in range(size):
        point = (i + 0.5) * n / size - 0.5
        if interpolation == "nearest":
            out.append(line[(2 * i + 1) * n // (2 * size)])
            continue
        whole = int(np.floor(point))
        taps = (
            range(whole, whole + 2) if interpolation == "bilinear" else range(whole - 1, whole + 3)
        )
        kernel = (
            (lambda x: 1 - abs(x)) if interpolation == "bilinear" else (lambda x: cubic(x, -0.75))
        )
        out.append(sum(kernel(tap - point) * line[min(max(tap, 0), n - 1)] for tap in taps))
    return np.stack(out)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resizing_without_antialiasing(interpolation):
    found = crops("float32", (16, 24), interpolation, False)
    for (top, left, bottom, right), ours in zip(BOXES, found, strict=True):
        rows = by_points(PHOTO[top:bottom, left:right] / 255, 16, interpolation)
        both = np.swapaxes(by_points(np.swapaxes(rows, 0, 1), 24, interpolation), 0, 1)
        np.testing.assert_allclose(ours, np.clip(both, 0, 1), atol=2e-5)


def boxes_of_torchvision(rng, n, height, width, scale, ratio):
    boxes = []
    for _ in range(n):
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = np.exp(rng.uniform(*np.log(ratio)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                break
        else:
            w, h = width, height
            if width / height < ratio[0]:
                h = round(width / ratio[0])
            elif width / height > ratio[1]:
                w = round(height * ratio[1])
            top, left = (height - h) // 2, (width - w) // 2
        boxes.append((top, left, top + h, left + w))
    return np.array(boxes)


def test_boxes_follow_the_law_of_torchvision():
    n, extent, scale, ratio = 6000, (40, 56), (0.3, 1.0), (3 / 4, 4 / 3)
    draw = jax.jit(lambda key: random_boxes(key, (n,), extent, scale, ratio))
    found = np.asarray(draw(KEY))
    assert found.dtype == np.int32
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] <= extent).all()
    wanted = boxes_of_torchvision(np.random.default_rng(1), n, *extent, scale, ratio)
    for of in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        lambda b: (b[:, 3] - b[:, 1]) / (b[:, 2] - b[:, 0]),
        lambda b: b[:, 0],
        lambda b: b[:, 1] + b[:, 3],
    ):
        assert stats.ks_2samp(of(found), of(wanted)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("extent", "box"), [((10, 99), (0, 43, 10, 56)), ((99, 10), (43, 0, 56, 10))]
)
def test_box_in_the_middle_where_none_fits(extent, box):
    found = random_boxes(KEY, (2,), extent, (1.0, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(found, [box] * 2)


def test_multi_crop():
    turned = augment.random_flip(1.0), augment.random_flip(1.0, vertical=True)
    aug = augment.multi_crop((6, 4), (2, 3), then=(augment.identity(), *turned))
    batch = {"image": jnp.stack([PHOTO, PHOTO[::-1]]), "label": jnp.eye(2), "index": jnp.arange(2)}
    out, plan = jax.jit(lambda b: (aug(KEY, b), aug.sample(KEY, b)))(batch)
    assert (out["image"].shape, out["local"].shape) == ((2, 2, 6, 6, 3), (2, 3, 4, 4, 3))
    np.testing.assert_array_equal(out["label"], batch["label"])
    np.testing.assert_array_equal(out["index"], batch["index"])
    assert plan["box"].shape == (2, 5, 4)
    assert set(plan) == {"box", "0", "1", "2"}
    area = np.prod(plan["box"][..., 2:] - plan["box"][..., :2], -1) / (37 * 53)
    assert (area[:, :2] > 0.13).all()
    assert (area[:, 2:] < 0.15).all()
    cut = jax.jit(resized_boxes, static_argnums=(2, 3, 4))
    large = np.asarray(cut(batch["image"], plan["box"][:, :2], (6, 6), "bilinear", True))
    small = np.asarray(cut(batch["image"], plan["box"][:, 2:], (4, 4), "bilinear", True))
    np.testing.assert_array_equal(out["image"][:, 0], large[:, 0])
    np.testing.assert_array_equal(out["image"][:, 1], large[:, 1, :, ::-1])
    np.testing.assert_array_equal(out["local"], small[:, :, ::-1])


def test_multi_crop_of_dino_from_text():
    jitter = (
        "random_flip | color_jitter(0.4, 0.4, 0.2, 0.1, prob=0.8) | random_grayscale(0.2) | "
        "random_blur(prob={})"
    )
    aug = augment.parse(
        "multi_crop(counts=(2, 8), scales=((0.4, 1.0), (0.05, 0.4)), interpolation='bicubic', "
        f"then=({jitter.format(1.0)}, {jitter.format(0.1)} | random_solarize(prob=0.2), "
        f"{jitter.format(0.5)}))"
    )
    batch = {"image": jax.ShapeDtypeStruct((2, 256, 240, 3), jnp.uint8)}
    out = jax.eval_shape(aug, KEY, batch)
    assert out["image"].shape == (2, 2, 224, 224, 3)
    assert out["local"].shape == (2, 8, 96, 96, 3)
    large = jax.eval_shape(augment.multi_crop((32, 8), (3, 0)), KEY, batch)
    assert {name: leaf.shape for name, leaf in large.items()} == {"image": (2, 3, 32, 32, 3)}


def by_fourier(x, band):
    """As the paper describes it; [H, W]."""
    spectrum = np.fft.fftshift(np.fft.fft2(x))
    first = [n // 2 - m // 2 for n, m in zip(x.shape, band, strict=True)]
    kept = spectrum[first[0] : first[0] + band[0], first[1] : first[1] + band[1]]
    return np.fft.ifft2(np.fft.ifftshift(kept)).real * np.prod(band) / x.size


@pytest.mark.parametrize("band", [(6, 8), (5, 7), (8, 5), (12, 7), (12, 15)])
def test_low_frequency_crop(band):
    image = np.random.default_rng(0).random((2, 12, 15, 3)).astype(np.float32)
    out = augment.low_frequency_crop(band)(KEY, {"image": image})["image"]
    expected = np.stack([[by_fourier(x[..., c], band) for c in range(3)] for x in image])
    np.testing.assert_allclose(out, np.moveaxis(expected, 1, -1), atol=1e-6)
    np.testing.assert_allclose(jnp.mean(out, (1, 2)), image.mean((1, 2)), atol=1e-6)
    if band == (12, 15):
        np.testing.assert_array_equal(out, image)


def test_low_frequency_crop_keeps_low_cosines_and_levels():
    def wave(cycles, n):
        return 0.5 + 0.5 * np.cos(2 * np.pi * cycles * np.arange(n) / n) * np.ones((n, 1))

    cycles = [3, 7, 8, 12]
    image = np.stack([wave(k, 32) for k in cycles])[..., None].astype(np.float32)
    crop = augment.low_frequency_crop(16)
    out = crop(KEY, {"image": image})["image"][..., 0]
    np.testing.assert_allclose(out[0], wave(3, 16), atol=1e-6)
    np.testing.assert_allclose(out[1], wave(7, 16), atol=1e-6)
    np.testing.assert_allclose(out[2], 0.25 + 0.5 * wave(8, 16), atol=1e-6)  # half the amplitude
    np.testing.assert_allclose(out[3], 0.5, atol=1e-6)
    whole = np.where(image > 0.7, 255, 0).astype(np.uint8)
    out = crop(KEY, {"image": whole})["image"]
    assert out.dtype == jnp.uint8
    expected = [by_fourier(x, (16, 16)) for x in whole[..., 0]]
    np.testing.assert_allclose(out[..., 0], np.clip(expected, 0, 255), atol=0.501)


@pytest.mark.parametrize(
    ("variant", "bands", "magnitudes", "work"),
    [
        ("efficienttrain", [160] * 3 + [192, 224], [1, 3, 5, 7, 9], 0.653061),
        ("efficienttrain++", [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2, range(10), 0.426435),
    ],
)
def test_curriculum(variant, bands, magnitudes, work):
    total = 2345 if variant.endswith("+") else 1000
    curriculum = functools.partial(augment.efficienttrain_curriculum, variant=variant)
    plan = [curriculum(step, total) for step in range(total)]
    stages = sorted(set(plan), key=plan.index)
    assert stages == list(zip(bands, magnitudes, strict=True))
    np.testing.assert_allclose(np.mean([(band / 224) ** 2 for band, _ in plan]), work, rtol=2e-3)
    share = np.array([plan.count(stage) for stage in stages]) / total
    wanted = np.ones(len(bands)) if total == 1000 else 1 / np.square(bands)
    np.testing.assert_allclose(share, wanted / np.sum(wanted), atol=1.01 / total)
    small = {curriculum(step, total, size=32)[0] for step in range(total)}
    assert small == ({22, 28, 32} if total == 1000 else {14, 22, 28, 32})
    assert curriculum(0, total, size=384, multiple=16)[0] == (272 if total == 1000 else 160)


def test_color_jitter_is_its_ops_in_order():
    batch = {"image": jnp.stack([PHOTO[:9, :8]] * 12)}
    aug = augment.color_jitter(0.4, (0.5, 1.5), 0.0, 0.1, prob=0.7)
    plan = jax.tree.map(np.asarray, jax.jit(aug.sample)(KEY, batch))
    assert 0 < plan["use"].sum() < 12
    out = jax.jit(aug.apply)(plan, batch)["image"]
    still = lambda image, factor: image  # noqa: E731
    named = [jax.jit(op) for op in (ops.brightness, ops.contrast, still, ops.hue)]
    for i in range(12):
        expected = batch["image"][i]
        for op in plan["order"][i] if plan["use"][i] else ():
            expected = named[op](expected, plan["factor"][i, op])
        np.testing.assert_array_equal(out[i], expected)


def test_laws_of_the_jitter():
    batch = {"image": jnp.zeros((4000, 1, 1, 3), jnp.uint8)}
    plan = jax.jit(augment.color_jitter(0.4, 1.6, 0.0, 0.1, prob=0.3).sample)(KEY, batch)
    factor = np.asarray(plan["factor"], np.float64)
    for column, (low, high) in zip((0, 1, 3), ((0.6, 1.4), (0.0, 2.6), (-0.1, 0.1)), strict=True):
        uniform = stats.uniform(low, high - low)
        assert stats.kstest(factor[:, column], uniform.cdf).pvalue > 1e-4
    assert (factor[:, 2] == 1).all()
    codes = np.asarray(plan["order"]) @ [64, 16, 4, 1]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4
    assert abs(np.mean(plan["use"]) - 0.3) < 5 * np.sqrt(0.21 / 4000)


def test_hue_equals_colorsys():
    image = PHOTO[:8, :8].copy()
    image[0, :3] = [[0, 0, 0], [255, 255, 255], [90, 90, 90]]
    for shift in (-0.5, -0.3, 0.0, 0.25):
        expected = np.zeros(image.shape)
        for at in np.ndindex(8, 8):
            h, s, v = colorsys.rgb_to_hsv(*(image[at] / 255.0))
            expected[at] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
        real = ops.hue(jnp.asarray(image, jnp.float32) / 255, shift)
        np.testing.assert_allclose(real, expected, atol=1e-5)
        np.testing.assert_allclose(ops.hue(image, shift), expected * 255, atol=1)


def test_gamma_grey_and_middle():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16, 1)
    for power, gain in ((0.4, 1.0), (2.2, 1.3), (0.0, 1.0)):
        table = [min(255, int(255.999 * gain * (i / 255) ** power)) for i in range(256)]
        np.testing.assert_allclose(np.ravel(ops.gamma(levels, power, gain)), table, atol=1)
    grey = np.asarray(Image.fromarray(PHOTO).convert("L"))
    np.testing.assert_array_equal(ops.grayscale(PHOTO), np.stack([grey] * 3, -1))
    # Of a room of 17 and 34 pixels, 8 (the even half) and 17 lie before.
    np.testing.assert_array_equal(ops.center_crop(PHOTO, (20, 19)), PHOTO[8:28, 17:36])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_affine(interpolation):
    """Moves of the plane composed one by one; the inverse goes through Pillow."""
    degrees, (right, down), scale, (slant_x, slant_y) = 17.0, (3.0, -4.0), 1.2, (5.0, -9.0)
    turn, tan_x, tan_y = np.radians(degrees), *np.tan(np.radians([slant_x, slant_y]))
    center = np.array([[1, 0, 53 / 2], [0, 1, 37 / 2], [0, 0, 1]])
    move = np.array([[1, 0, right], [0, 1, down], [0, 0, 1]])
    rotate = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    shear_x = np.array([[1, -tan_x, 0], [0, 1, 0], [0, 0, 1]])
    shear_y = np.array([[1, 0, 0], [-tan_y, 1, 0], [0, 0, 1]])
    forward = move @ center @ rotate @ np.diag([scale, scale, 1]) @ shear_y @ shear_x
    inverse = np.linalg.inv(forward @ np.linalg.inv(center))[:2].ravel()
    resample = getattr(Image.Resampling, interpolation.upper())
    expected = Image.fromarray(PHOTO).transform(
        (53, 37), Image.Transform.AFFINE, tuple(inverse), resample, fillcolor=(9, 9, 9)
    )
    arguments = (degrees, (right, down), scale, (slant_x, slant_y))
    found = ops.affine(PHOTO, *arguments, interpolation=interpolation, fill=9)
    difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    # A point next to a whole level or to the border of a pixel may fall on its other side.
    assert (difference > (1 if interpolation != "nearest" else 0)).mean() < 0.002
    assert (difference > 0).mean() < 0.01


def test_videos_share_the_decision():
    video = {"image": jnp.stack([jnp.stack([PHOTO[:9, :8]] * 3)] * 2)}
    for text in ("random_resized_crop(4)", "color_jitter(0.4)", "low_frequency_crop(4)"):
        out = jax.jit(augment.parse(text))(KEY, video)["image"]
        assert out.shape[:2] == (2, 3)
        np.testing.assert_array_equal(out[:, 0], out[:, 2])


def test_flip_upside_down():
    out = augment.random_flip(1.0, vertical=True)(KEY, {"image": PHOTO[None]})["image"]
    np.testing.assert_array_equal(out[0], PHOTO[::-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random_resized_crop(0)", "whole number, at least 1"),
        ("random_resized_crop(8, scale=(0.0, 1.0))", "0 < min <= max <= 1"),
        ("random_resized_crop(8, interpolation='cubic')", "did you mean 'bicubic'"),
        ("multi_crop(counts=(0, 6))", "at least one large"),
        ("multi_crop(sizes=(224,))", "sizes has two parts"),
        ("multi_crop(then=(random_flip, random_flip))", "one augmentation or 3"),
        ("color_jitter(hue=0.6)", "hue is a number"),
        ("color_jitter((1.2, 0.8))", "brightness is a number"),
        ("random_blur((2.0, 1.0))", "0 <= min <= max"),
        ("random_solarize(300)", "0..256"),
        ("random_grayscale(1.5)", "probability"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=message):
        augment.parse(text)


def test_refusals_when_applied():
    with pytest.raises(ValueError, match="larger than the image"):
        augment.low_frequency_crop(40)(KEY, {"image": PHOTO[None]})
    with pytest.raises(ValueError, match="does not fit"):
        ops.center_crop(PHOTO, 40)
    with pytest.raises(ValueError, match="step=5 of 5"):
        augment.efficienttrain_curriculum(5, 5)
    with pytest.raises(ValueError, match="did you mean 'efficienttrain"):
        augment.efficienttrain_curriculum(0, 5, variant="efficient_train")
