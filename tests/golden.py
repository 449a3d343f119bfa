"""Vectors recorded from the reference implementations, where they are present.

They lie in the folder that MIXLAB_GOLDEN names, by default `../shared/golden` beside the
repository. They are no part of it: a test that needs one is skipped without it, and says so; the
restatements in `tests/reference` hold the same ground there.
"""

import os
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(
    os.environ.get(
        "MIXLAB_GOLDEN", pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
    )
)


def load(name: str) -> dict[str, np.ndarray]:
    """Reads `ROOT/<name>.npz`, e.g. `load("merging/public_ties")`; skips the test without it."""
    path = ROOT / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no recorded vectors at {path}: set MIXLAB_GOLDEN to the folder that has them")
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def cases(vectors: dict[str, np.ndarray], prefix: str, depth: int) -> list[str]:
    """The distinct first `depth` parts of the keys that begin with `prefix`, sorted."""
    keys = (key for key in vectors if key.startswith(prefix))
    return sorted({"/".join(key.split("/")[:depth]) for key in keys})
