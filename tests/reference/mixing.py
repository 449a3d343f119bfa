"""Mixed-sample data augmentation, restated from the papers and the specification.

Plain loops and float64 NumPy: slow, short, and independent of `mixlab`. `lam` is the weight of the
example itself, boxes are half-open `(top, left, bottom, right)`, masks are 1 where the example
itself is kept.
"""

import math

import numpy as np


def mixup(images, partner, lam):
    """`lam x + (1 - lam) x[partner]`; uint8 is rounded half to even. `lam` is [B]."""
    own, other = images.astype(np.float64), images[partner].astype(np.float64)
    lam = np.asarray(lam, np.float64).reshape((-1,) + (1,) * (images.ndim - 1))
    mixed = lam * own + (1 - lam) * other
    return np.rint(mixed).astype(np.uint8) if images.dtype == np.uint8 else mixed


def mix_labels(labels, partner, lam):
    """Soft labels [B, K] mixed by `lam` [B]."""
    lam = np.asarray(lam, np.float64)[:, None]
    return lam * labels + (1 - lam) * labels[partner]


def smooth_labels(classes, num_classes, smoothing):
    """One-hot labels with `smoothing / K` everywhere and the rest on the class."""
    labels = np.full((len(classes), num_classes), smoothing / num_classes)
    for row, k in enumerate(classes):
        labels[row, k] += 1 - smoothing
    return labels


def clipped_box(height, width, centre, half):
    """The box `centre -/+ half`, clipped to the image."""
    (row, col), (half_h, half_w) = centre, half
    return (
        min(max(row - half_h, 0), height),
        min(max(col - half_w, 0), width),
        min(max(row + half_h, 0), height),
        min(max(col + half_w, 0), width),
    )


def cutmix_box(height, width, lam, centre):
    """The official box: sides `int(L sqrt(1 - lam))`, half of a side is `side // 2`."""
    sides = (int(length * math.sqrt(1 - lam)) for length in (height, width))
    return clipped_box(height, width, centre, tuple(side // 2 for side in sides))


def cutmix_box_torchvision(height, width, lam, centre):
    """torchvision's box: half of a side is `int(L sqrt(1 - lam) / 2)`."""
    half = tuple(int(0.5 * math.sqrt(1 - lam) * length) for length in (height, width))
    return clipped_box(height, width, centre, half)


def cutmix_box_minmax(cut_height, cut_width, top, left):
    """timm's min-max box: drawn sides at a drawn corner, always inside the image."""
    return (top, left, top + cut_height, left + cut_width)


def box_lam(height, width, box):
    """The share of the image outside the box."""
    top, left, bottom, right = box
    return 1 - max(bottom - top, 0) * max(right - left, 0) / (height * width)


def box_mask(height, width, box):
    """[H, W], 0 inside the box and 1 outside."""
    mask = np.ones((height, width))
    top, left, bottom, right = box
    mask[top:bottom, left:right] = 0
    return mask


def cutmix(images, partner, boxes):
    """Pastes the partner's pixels inside each example's box."""
    out = images.copy()
    for i, (top, left, bottom, right) in enumerate(boxes):
        out[i, top:bottom, left:right] = images[partner[i], top:bottom, left:right]
    return out


def resizemix_box(height, width, tau, centre):
    """As CutMix with sides `int(L tau)`, but at least one pixel high and wide."""
    half = (int(height * tau) // 2, int(width * tau) // 2)
    top, left, bottom, right = clipped_box(height, width, centre, half)
    return (top, left, max(bottom, top + 1), max(right, left + 1))


def resize_nearest(image, height, width):
    """Source index `floor(i in / out)`."""
    rows = [i * image.shape[0] // height for i in range(height)]
    cols = [j * image.shape[1] // width for j in range(width)]
    return image[rows][:, cols]


def resize_bilinear(image, height, width):
    """Pixel centres at half integers, edges clamped, no antialiasing."""

    def interpolate(array, size):
        out = np.empty((size, *array.shape[1:]))
        for i in range(size):
            source = max((i + 0.5) * len(array) / size - 0.5, 0.0)
            low = int(source)
            high = min(low + 1, len(array) - 1)
            out[i] = array[low] + (source - low) * (array[high] - array[low])
        return out

    rows = interpolate(image.astype(np.float64), height)
    return interpolate(rows.swapaxes(0, 1), width).swapaxes(0, 1)


def resizemix(images, partner, boxes, resize):
    """The whole partner, resized into the box of each example."""
    out = images.copy()
    for i, (top, left, bottom, right) in enumerate(boxes):
        small = resize(images[partner[i]], bottom - top, right - left)
        if images.dtype == np.uint8:
            small = np.rint(small)
        out[i, top:bottom, left:right] = small
    return out


def fmix_frequencies(shape):
    """Distance from the origin of each bin of the noise.

    `(h,)` gives [h], `(h, w)` gives [h, w // 2 + 1] (one more column if w is odd), `(h, w, z)`
    gives [h, z, w // 2 + 1].
    """
    fy = np.fft.fftfreq(shape[0])
    if len(shape) == 1:
        return np.abs(fy)
    w = shape[1]
    fx = np.fft.fftfreq(w)[: w // 2 + 1 + w % 2]
    if len(shape) == 2:
        return np.sqrt(fy[:, None] ** 2 + fx**2)
    fz = np.fft.fftfreq(shape[2])
    return np.sqrt(fy[:, None, None] ** 2 + fz[:, None] ** 2 + fx**2)


def fmix_grey(noise, shape, decay=3.0, mode="reference"):
    """The low-frequency image in [0, 1] that FMix thresholds.

    Args:
        noise: standard normal, [1, *frequencies, 2].
        shape: of the image, 1-D to 3-D.
        decay: power of 1 / f.
        mode: "reference" reads rows 0 and 1 of the first frequency axis as real and imaginary part
            (what the published code computes), "spectral" the last axis (what the paper says; 1-D
            and 2-D here).
    """
    scale = 1 / np.maximum(fmix_frequencies(shape), 1 / max(shape)) ** decay
    scaled = noise[0].astype(np.float64) * scale[..., None]
    if mode == "reference":
        spectrum = scaled[0] + 1j * scaled[1]
    else:
        spectrum = scaled[..., 0] + 1j * scaled[..., 1]
    grey = np.fft.irfftn(spectrum, shape, axes=range(len(shape)))
    grey = grey - grey.min()
    return grey / grey.max()


def fmix_mask(grey, lam, max_soft=0.0, ceil=True):
    """The `lam` share of the brightest pixels is 1, the rest 0, with an optional ramp between."""
    n = grey.size
    order = grey.ravel().argsort()[::-1]
    count = math.ceil(lam * n) if ceil else math.floor(lam * n)
    soft = int(n * min(max_soft, lam, 1 - lam))
    mask = np.zeros(n)
    mask[order[:count]] = 1
    mask[order[count - soft : count + soft]] = np.linspace(1, 0, 2 * soft)
    return mask.reshape(grey.shape)


def fmix(images, partner, mask):
    """`mask x + (1 - mask) x[partner]` with masks [B, H, W] or one [H, W]."""
    mask = mask[..., None]
    return mask * images + (1 - mask) * images[partner]


def random_crop(image, padding, offset, size, mode="constant"):
    """Pads every side (zeros or reflection) and takes `size` pixels from `offset`."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    (top, left), (height, width) = offset, size
    return padded[top : top + height, left : left + width]


def flip(image):
    """Left and right exchanged."""
    return np.stack([image[:, -1 - j] for j in range(image.shape[1])], axis=1)


def normalize(image, mean, std):
    """`(x - mean) / std` a channel, uint8 scaled to [0, 1] first."""
    scale = 255 if image.dtype == np.uint8 else 1
    return (image.astype(np.float64) / scale - np.asarray(mean)) / np.asarray(std)


def mosaic(images, labels, partners, corners):
    """Cuts windows [H, W] at `corners` from canvases of own, right, lower, diagonal [B, 3]."""
    out, mixed = images.copy(), labels.astype(np.float64)
    height, width = images.shape[1:3]
    for i, (top, left) in enumerate(corners):
        right, below, diagonal = images[partners[i]]
        canvas = np.vstack([np.hstack([images[i], right]), np.hstack([below, diagonal])])
        out[i] = canvas[top : top + height, left : left + width]
        four = np.stack([labels[i], *labels[partners[i]]])
        counts = [
            (height - top) * (width - left),
            (height - top) * left,
            top * (width - left),
            top * left,
        ]
        mixed[i] = np.array(counts) @ four / (height * width)
    return out, mixed


def jigsaw(image, rows, columns, order):
    """Place k, counted row by row, gets the tile `order[k]`."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    out = np.empty_like(image)
    for place, tile in enumerate(order):
        (r, c), (y, x) = divmod(place, columns), divmod(tile, columns)
        out[r * height : (r + 1) * height, c * width : (c + 1) * width] = image[
            y * height : (y + 1) * height, x * width : (x + 1) * width
        ]
    return out
