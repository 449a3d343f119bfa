"""How fast `mixlab.augment` is, beside timm, torchvision, kornia, Keras, FMix and OpenMixup.

Ours always draws for every example; what the peers draw is in the table. FMix and OpenMixup are
repositories, not packages: what they do in a call is restated here, and labelled so.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import augment
from mixlab.bench import (
    Options,
    PeerError,
    Report,
    import_peer,
    interleaved,
    milliseconds,
    one_line,
)
from mixlab.types import Array

PACKAGES = ("jax", "numpy", "torch", "torchvision", "timm", "kornia", "keras", "pillow")
SIZES = ((256, 32), (64, 224))
"""Examples of a batch, and the side of its square images."""
_CLASSES = 10

Call = Callable[[], Any]
Build = Callable[[np.ndarray, np.ndarray], Call]
"""`build(image [B, H, W, 3], label int64 [B]) -> call`."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: what the table calls it.
        package: what must be installed.
        draws: `"batch"` or `"example"`: what it makes its random decisions for.
        build: makes the call that is timed.
    """

    name: str
    package: str
    draws: str
    build: Build


def run(options: Options) -> Report:
    """Measures what the machine's accelerator, or its absence, makes worth measuring."""
    if jax.default_backend() != "cpu":
        return Report({"On the accelerator": list(_accelerator(options))}, {})
    left_out: dict[str, str] = {}
    rows = list(_against_peers(options, left_out))
    return Report(
        {"Against peers, milliseconds a batch": rows, "First call": list(_first_calls(options))},
        left_out,
    )


def _against_peers(options: Options, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    _limit_torch()
    rng = np.random.default_rng(0)
    for (ours, dtype, peers), (size, side) in itertools.product(_cases(), SIZES):
        batch = _described(size, side, dtype)
        chosen = [peer for peer in peers if options.selects(ours, batch, peer.name)]
        if not chosen:
            continue
        image = rng.integers(0, 256, (size, side, side, 3), np.uint8)
        if dtype == "float32":
            image = (image / 255.0).astype(np.float32)
        label = rng.integers(0, _CLASSES, size)
        calls: dict[str, Call] = {ours: _ours(ours, image, label)}
        for peer in chosen:
            try:
                import_peer(peer.package)
                call = peer.build(image.copy(), label)
                call()
            except PeerError as error:
                left_out[peer.package] = str(error)
            except Exception as error:  # a peer that fails is no reason not to measure the others
                left_out[f"{peer.name}, {batch}"] = one_line(error)
            else:
                calls[peer.name] = call
        if len(calls) == 1:
            continue
        timings = interleaved(calls, options)
        own = timings.pop(ours)
        draws = {peer.name: peer.draws for peer in chosen}
        for name, timing in timings.items():
            yield {
                "op": ours,
                "batch": batch,
                "peer": name,
                "peer draws per": draws[name],
                "ours, ms": milliseconds(own.median),
                "±, %": f"{100 * own.spread:.0f}",
                "peer, ms": milliseconds(timing.median),
                "± %": f"{100 * timing.spread:.0f}",
                "peer / ours": f"{timing.median / own.median:.2f}",
            }


def _described(size: int, side: int, dtype: str) -> str:
    return f"{size}x{side}x{side}x3 {dtype}"


def _ours(text: str, image: np.ndarray, label: np.ndarray) -> Call:
    aug = jax.jit(augment.parse(text))
    batch = {"image": jnp.asarray(image), "label": jax.nn.one_hot(label, _CLASSES)}
    # Other decisions in every call, as the peers make them.
    keys = itertools.cycle(list(jax.random.split(jax.random.key(0), 64)))
    return lambda: jax.block_until_ready(aug(next(keys), batch))


def _cases() -> list[tuple[str, str, list[Peer]]]:
    """Our op, the dtype, and the peers of both."""
    timm_pil = Peer("timm rand-m9-n2, PIL", "timm", "example", _timm_randaugment)
    mixup = [
        Peer("timm Mixup, in place", "timm", "batch", _timm_mix(mixup_alpha=1.0)),
        Peer("torchvision v2 MixUp", "torchvision", "batch", _torchvision_mix("MixUp")),
        Peer("kornia RandomMixUpV2", "kornia", "example", _kornia_mix("RandomMixUpV2")),
        Peer("keras MixUp, jax", "keras", "example", _keras_mix("MixUp")),
    ]
    cutmix = [
        Peer(
            "timm Mixup (cutmix), in place",
            "timm",
            "batch",
            _timm_mix(mixup_alpha=0.0, cutmix_alpha=1.0),
        ),
        Peer("torchvision v2 CutMix", "torchvision", "batch", _torchvision_mix("CutMix")),
        Peer("kornia RandomCutMixV2", "kornia", "example", _kornia_mix("RandomCutMixV2")),
        Peer("keras CutMix, jax", "keras", "example", _keras_mix("CutMix")),
    ]
    fmix = [
        Peer("FMix repository, restated, a loop", "scipy", "example", _fmix(True)),
        Peer("FMix repository, restated", "scipy", "batch", _fmix(False)),
    ]
    resizemix = [Peer("OpenMixup, restated, nearest", "torch", "batch", _resizemix)]
    return [
        (
            "randaugment(2, 9)",
            "uint8",
            [
                timm_pil,
                Peer(
                    "torchvision v2 RandAugment, PIL",
                    "torchvision",
                    "example",
                    _torchvision_randaugment,
                ),
            ],
        ),
        ("timm('rand-m9-n2')", "uint8", [timm_pil]),
        ("mixup(alpha=1.0)", "float32", mixup),
        ("cutmix(alpha=1.0)", "float32", cutmix),
        ("cutmix(alpha=1.0)", "uint8", cutmix[1:2]),
        ("fmix()", "float32", fmix),
        ("resizemix()", "float32", resizemix),
        ("resizemix()", "uint8", resizemix),
    ]


def _limit_torch() -> None:
    try:
        import_peer("torch").set_num_threads(1)
    except PeerError:
        return  # those that need it say so


def _tensor(image: np.ndarray) -> Any:
    """The images in PyTorch's layout, contiguous."""
    torch = import_peer("torch")
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def _pictures(image: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(one) for one in image]


def _timm_randaugment(image: np.ndarray, label: np.ndarray) -> Call:
    policies = import_peer("timm.data.auto_augment")
    transform = policies.rand_augment_transform("rand-m9-n2", {"img_mean": (128, 128, 128)})
    pictures = _pictures(image)
    return lambda: [transform(picture) for picture in pictures]


def _torchvision_randaugment(image: np.ndarray, label: np.ndarray) -> Call:
    transform = import_peer("torchvision.transforms.v2").RandAugment(2, 9)
    pictures = _pictures(image)
    return lambda: [transform(picture) for picture in pictures]


def _timm_mix(**alphas: float) -> Build:
    def build(image: np.ndarray, label: np.ndarray) -> Call:
        mix = import_peer("timm.data").Mixup(num_classes=_CLASSES, label_smoothing=0.0, **alphas)
        x, target = _tensor(image), import_peer("torch").from_numpy(label)
        return lambda: mix(x, target)

    return build


def _torchvision_mix(name: str) -> Build:
    def build(image: np.ndarray, label: np.ndarray) -> Call:
        v2 = import_peer("torchvision.transforms.v2")
        mix = getattr(v2, name)(alpha=1.0, num_classes=_CLASSES)
        x, target = _tensor(image), import_peer("torch").from_numpy(label)
        return lambda: mix(x, target)

    return build


def _kornia_mix(name: str) -> Build:
    def build(image: np.ndarray, label: np.ndarray) -> Call:
        augmentation = import_peer("kornia.augmentation")
        mix = getattr(augmentation, name)(p=1.0, data_keys=["input", "class"])
        x, target = _tensor(image), import_peer("torch").from_numpy(label)
        return lambda: mix(x, target)

    return build


def _keras_mix(name: str) -> Build:
    def build(image: np.ndarray, label: np.ndarray) -> Call:
        layer = getattr(import_peer("keras").layers, name)()
        batch = {"images": jnp.asarray(image), "labels": jax.nn.one_hot(label, _CLASSES)}
        return lambda: jax.block_until_ready(layer(batch, training=True))

    return build


def _fmix(per_example: bool) -> Build:
    """FMix as its repository computes it: `reference` in `fmix`'s terms, in NumPy."""

    def mask(rng: np.random.Generator, side: int) -> np.ndarray:
        across = np.fft.fftfreq(side)[: side // 2 + (2 if side % 2 else 1)]
        frequency = np.sqrt(np.square(across) + np.square(np.fft.fftfreq(side))[:, None])
        decay = 1.0 / np.maximum(frequency, 1.0 / side) ** 3.0
        spectrum = rng.standard_normal((1, *frequency.shape, 2)) * decay[None, ..., None]
        grey = np.fft.irfftn(spectrum[:, 0] + 1j * spectrum[:, 1], (side, side), (1, 2))
        grey = grey.reshape(1, side, side)
        grey = (grey - grey.min()) / (grey - grey.min()).max()
        order = grey.ravel().argsort()[::-1]
        lam = rng.beta(1.0, 1.0)
        count = int((np.ceil if rng.random() > 0.5 else np.floor)(lam * grey.size))
        flat = np.zeros(grey.size, np.float32)
        flat[order[:count]] = 1.0
        return flat.reshape(1, side, side)

    def build(image: np.ndarray, label: np.ndarray) -> Call:
        x, rng = np.ascontiguousarray(image.transpose(0, 3, 1, 2)), np.random.default_rng(0)
        size, side = len(x), x.shape[-1]

        def call() -> np.ndarray:
            other = rng.permutation(size)
            if not per_example:
                m = mask(rng, side)
                return m * x + (1.0 - m) * x[other]
            out = np.empty_like(x)
            for i, j in enumerate(other):
                m = mask(rng, side)
                out[i] = m * x[i] + (1.0 - m) * x[j]
            return out

        return call

    return build


def _resizemix(image: np.ndarray, label: np.ndarray) -> Call:
    """ResizeMix as OpenMixup computes it: one box a batch, the partners made small by PyTorch."""
    torch = import_peer("torch")
    x, rng = _tensor(image), np.random.default_rng(0)
    size, side = len(image), image.shape[1]

    def call() -> Any:
        out, other = x.clone(), torch.randperm(size)
        half = int(side * rng.uniform(0.1, 0.8)) // 2
        center = rng.integers(0, side, 2)
        low = np.clip(center - half, 0, side)
        high = np.maximum(np.clip(center + half, 0, side), low + 1)
        small = torch.nn.functional.interpolate(x[other], tuple(high - low), mode="nearest")
        out[:, :, low[0] : high[0], low[1] : high[1]] = small
        return out

    return call


_FIRST_CALL = """
import time
import jax, jax.numpy as jnp
from mixlab import augment
batch = {{"image": jnp.zeros(({size}, {side}, {side}, 3), jnp.uint8), "label": jnp.zeros(({size}, 10))}}
key = jax.block_until_ready(jax.random.key(0))
start = time.process_time()
jax.block_until_ready(jax.jit(augment.parse({text!r}))(key, batch))
print(time.process_time() - start)
"""  # noqa: E501


def _first_calls(options: Options) -> Iterator[dict[str, Any]]:
    """Trace, compilation and one run, in a process of its own without a compilation cache."""
    text = "randaugment | mixup"
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    for size, side in SIZES:
        batch = _described(size, side, "uint8")
        if not options.selects("first call", text, batch):
            continue
        code = _FIRST_CALL.format(size=size, side=side, text=text)
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        yield {
            "op": text,
            "batch": batch,
            "first call, s": f"{float(done.stdout):.2f}",
        }


def _accelerator(options: Options) -> Iterator[dict[str, Any]]:
    """The mixing ops as a share of what the memory's bandwidth allows; images/s of RandAugment."""
    size, side, calls = 256, 224, 10
    image = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    label = np.zeros(size, int)
    large = jnp.zeros(1 << 28, jnp.float32)
    copy = jax.jit(jnp.negative)

    def queued(f: Callable[..., Any], *args: Any) -> Call:
        """Several calls, started before the first is done: the device does not wait for Python."""
        return lambda: jax.block_until_ready([f(*args) for _ in range(calls)][-1])

    bandwidth = 2 * large.nbytes * calls / _seconds(queued(copy, large), options)
    # What must be read and written: the own and the partner's pixel, or whichever is chosen.
    for text, passes in (("mixup()", 3), ("cutmix()", 2), ("fmix()", 2), ("randaugment()", 2)):
        dtype = "uint8" if text.startswith("rand") else "float32"
        if not options.selects(text, _described(size, side, dtype)):
            continue
        pixels: Array = jnp.asarray(image if dtype == "uint8" else image.astype(np.float32) / 255.0)
        batch = {"image": pixels, "label": jax.nn.one_hot(label, _CLASSES)}
        aug = jax.jit(augment.parse(text))
        seconds = _seconds(queued(aug, jax.random.key(0), batch), options) / calls
        yield {
            "op": text,
            "batch": _described(size, side, dtype),
            "ms": milliseconds(seconds),
            "images/s": f"{size / seconds:.0f}",
            "GB/s of a copy": f"{bandwidth / 1e9:.0f}",
            "share of it, %": f"{100 * passes * pixels.nbytes / seconds / bandwidth:.0f}",
        }


def _seconds(call: Call, options: Options) -> float:
    return interleaved({"": call}, options, time.perf_counter)[""].median
