"""M fine-tuned models in little more than the space of one, in memory and in a file.

`compress` makes the form of a method that has one; `save_compressed` writes it and
`load_compressed` reads it back. Both forms are pytrees, so what they make of a base runs under
`jit`. Only the leaves that are merged are kept: the others come from the base.
"""

import dataclasses
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixlab import random, trees
from mixlab.merge import core, masks, twin
from mixlab.types import Array, ArrayLike, Key, PyTree

_FORMAT = "mixlab compressed models 1"
_HEADER = "header"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedMasks:
    """`theta_m = theta_base + rescaler_m * mask_m * vector`, a bit for each entry of a mask.

    What `tall_masks` and `emr` leave of the models, exactly.

    Attributes:
        vector: by name, `[...]`, in float32 or wider.
        bits: by name, the masks packed along the flattened leaf, uint8 `[M, ceil(n / 8)]`.
        rescalers: `[M]`.
    """

    vector: twin.Table
    bits: twin.Table
    rescalers: Array
    kind: ClassVar[str] = "masks"

    @property
    def num_models(self) -> int:
        """M."""
        return len(self.rescalers)

    def masks(self, name: str) -> Array:
        """The masks of a leaf, bool `[M, ...]`."""
        return self._unpacked(name, self.bits[name])

    def models(self, base: PyTree) -> PyTree:
        """All models, stacked: every leaf `[M, ...]`.

        Raises:
            ValueError: the base has other leaves; the message names one.
        """
        opened = self._opened(base)

        def merge(name: str, origin: Array) -> Array:
            return masks.unmask(origin[0], self.vector[name], self.masks(name), self.rescalers)

        return opened.write(opened.leaves.map(merge).read, self.num_models)

    def model(self, base: PyTree, task: ArrayLike) -> PyTree:
        """The model of one task, a number of 0 ... M - 1, which may be traced.

        Raises:
            ValueError: there is no such task, or the base has other leaves.
        """
        if not isinstance(task, jax.core.Tracer) and not 0 <= task < self.num_models:
            raise ValueError(f"task must be one of 0 ... {self.num_models - 1}, got {task}")
        opened = self._opened(base)

        def merge(name: str, origin: Array) -> Array:
            mask = self._unpacked(name, self.bits[name][task])
            return masks.unmask(origin[0], self.vector[name], mask, self.rescalers[task])

        return opened.write(opened.leaves.map(merge).read)

    def consensus(self, base: PyTree, k: ArrayLike = 2, scale: ArrayLike = 0.3) -> PyTree:
        """One model of the entries that at least `k` tasks use.

        Of the form of `tall_masks` what `consensus` with the same `lam` makes of the models, so
        that `k` and `scale` can be chosen when the models are gone.

        Args:
            base: the model that they were fine-tuned from.
            k: as in `consensus`.
            scale: as in `consensus`.

        Raises:
            ValueError: the base has other leaves; the message names one. `k` or `scale` is out of
                its range.
        """
        core.check_number(k, "k", 0.0)
        core.check_number(scale, "scale")
        opened, factor = self._opened(base), jnp.asarray(scale, float)

        def merge(name: str, origin: Array) -> Array:
            enough = jnp.sum(self.masks(name), axis=0, dtype=factor.dtype) >= k
            return masks.unmask(origin[0], self.vector[name], enough, factor)

        return opened.write(opened.leaves.map(merge).read)

    def _unpacked(self, name: str, bits: Array) -> Array:
        vector = self.vector[name]
        flat = jnp.unpackbits(bits, axis=-1, count=vector.size)
        return flat.reshape(*bits.shape[:-1], *vector.shape).astype(bool)

    def _opened(self, base: PyTree) -> core.Models:
        opened = core.open_models([base])
        masks.check_leaves(self.vector, opened)
        return opened


Compressed = CompressedMasks | twin.CompressedTwin


def compress(
    method: core.MergeMethod, models: PyTree, *, base: PyTree, key: Key | None = None
) -> Compressed:
    """What a method needs of M models to give them back, or to merge them again.

    Args:
        method: `tall_masks` or `emr`, for `CompressedMasks`; `twin`, for a `CompressedTwin`.
        models: M models, a list or one stacked tree.
        base: the model that they were fine-tuned from.
        key: a PRNG key, where the method draws.

    Returns:
        A pytree. What it makes of the base equals what the method makes of the models, to the
        bit where both run eagerly.

    Raises:
        TypeError: the method has no compressed form, or the key is none.
        ValueError: the models or the base do not match.
    """
    if key is not None:
        random.check_key(key)
    if isinstance(method, twin.TwinMethod):
        return method.parts(models, base, key)
    if not isinstance(method, masks.MaskMethod) or method.one_model:
        got = "another method" if isinstance(method, core.MergeMethod) else repr(method)
        if isinstance(method, masks.MaskMethod):
            got += "; of compressed tall_masks, .consensus(base, k, scale) makes that of consensus"
        raise TypeError(
            "compress takes a method that keeps something of every model: tall_masks, emr or "
            f"twin; got {got}"
        )
    split = method.split(method.measure(models, base), models, base)
    vector, bits = {}, {}
    for (name, leaf), (_, mask) in zip(
        trees.named_leaves(split.vector), trees.named_leaves(split.masks), strict=True
    ):
        if leaf is not None:
            vector[name] = leaf
            bits[name] = jnp.packbits(mask.reshape(len(mask), -1), axis=1)
    return CompressedMasks(vector, bits, split.rescalers)


def compressed_sizes(compressed: Compressed, base: PyTree) -> dict[str, int]:
    """Bytes of the leaves that are merged.

    Args:
        compressed: what `compress` gave.
        base: the model that it belongs to.

    Returns:
        `"base"`, `"compressed"`, and `"models"`: of the M models in full. Compressed models need
        the base too, except for the merges of `twin`.

    Raises:
        ValueError: the base has other leaves; the message names one.
    """
    opened = core.open_models([base])
    masks.check_leaves(_reference(compressed), opened)
    one = sum(
        int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        for name, spec in opened.specs.items()
        if spec is not None and name in opened.leaves.specs
    )
    return {
        "base": one,
        "compressed": trees.num_bytes(compressed),
        "models": one * compressed.num_models,
    }


def save_compressed(path: str | Path, compressed: Compressed, base: PyTree) -> None:
    """Writes the form to one file, a NumPy archive without pickled objects.

    The file is written under another name and renamed, so that `path` holds all of it or what it
    held before. Beside the arrays stand shape, dtype and checksum of every leaf of the base.

    Args:
        path: where to; an existing file is replaced.
        compressed: what `compress` gave.
        base: the model that it belongs to.

    Raises:
        ValueError: the base has other leaves; the message names one.
        OSError: the file could not be written.
    """
    opened = core.open_models([base])
    masks.check_leaves(_reference(compressed), opened)
    arrays = {}
    for field in dataclasses.fields(compressed):
        value = getattr(compressed, field.name)
        for name, array in value.items() if isinstance(value, dict) else [("", value)]:
            arrays[f"{field.name}/{name}"] = np.asarray(array)
    header = {
        "format": _FORMAT,
        "kind": compressed.kind,
        "base": _fingerprints(opened),
        "arrays": list(arrays),
    }
    arrays[_HEADER] = np.asarray(json.dumps(header))
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load_compressed(path: str | Path, base: PyTree) -> Compressed:
    """Reads what `save_compressed` wrote.

    Args:
        path: the file.
        base: the model that it belongs to, the very one: its leaves are checked by checksum.

    Raises:
        ValueError: the file is damaged or something else; or the base is another one, and the
            message names a leaf.
        OSError: there is no such file.
    """
    with open(path, "rb") as raw:
        try:
            header, tables = _read(raw)
        except Exception as error:  # Whatever a damaged archive makes zipfile and NumPy raise.
            raise ValueError(
                f"{path} is not a whole file of compressed models ({error}); write it again with "
                "save_compressed"
            ) from error
    found, expected = _fingerprints(core.open_models([base])), header["base"]
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path} was made with another base: leaf {name!r} is "
                f"{_words(expected.get(name))} there and {_words(found.get(name))} in the base "
                "that was given"
            )
    if header["kind"] == CompressedMasks.kind:
        rescalers = tables.pop("rescalers")[""]
        return CompressedMasks(**{"vector": {}, "bits": {}} | tables, rescalers=rescalers)
    return twin.CompressedTwin(**{"shared": {}} | tables)


def _read(raw: BinaryIO) -> tuple[dict[str, Any], dict[str, twin.Table]]:
    # First a look at the directory at the end, or NumPy would offer to unpickle the file.
    zipfile.ZipFile(raw).close()
    raw.seek(0)
    tables: dict[str, twin.Table] = {}
    with np.load(raw, allow_pickle=False) as file:
        header = json.loads(str(file[_HEADER]))
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {_FORMAT!r}")
        if sorted(header["arrays"]) != sorted(set(file.files) - {_HEADER}):
            raise ValueError("arrays are missing")
        for entry in header["arrays"]:
            field, _, name = entry.partition("/")
            tables.setdefault(field, {})[name] = jnp.asarray(file[entry])
    return header, tables


def _reference(compressed: Compressed) -> twin.Table:
    return compressed.vector if isinstance(compressed, CompressedMasks) else compressed.shared


def _fingerprints(opened: core.Models) -> dict[str, list[Any]]:
    def fingerprint(name: str) -> list[Any]:
        leaf = np.asarray(opened.original(name))
        return [list(leaf.shape), str(leaf.dtype), zlib.crc32(np.ascontiguousarray(leaf).tobytes())]

    return {name: fingerprint(name) for name in opened.leaves.specs}


def _words(fingerprint: list[Any] | None) -> str:
    if fingerprint is None:
        return "missing"
    shape, dtype, checksum = fingerprint
    return f"{dtype}{shape} with checksum {checksum:08x}"
