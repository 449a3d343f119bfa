"""The floor plan: who may import whom."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "mixlab"
FILES = sorted(ROOT.rglob("*.py"))

# package or module -> what of mixlab it may import besides itself
FOUNDATION = {"types", "trees", "spec", "random"}
MAY_IMPORT = {
    "types": set(),
    "trees": {"types"},
    "spec": set(),
    "random": {"types"},
    "augment": FOUNDATION,
    "merge": FOUNDATION,
    "align": FOUNDATION,
    "models": FOUNDATION,
    "data": FOUNDATION,
    "agents": FOUNDATION | {"merge", "align"},
    "figures": set(),
    "gallery": FOUNDATION | {"augment", "data", "figures"},
    "progress": FOUNDATION | {"distributed"},
    "distributed": {"types"},
    "checkpoint": FOUNDATION | {"distributed"},
    "report": {"figures", "spec"},
    "landscape": FOUNDATION | {"figures"},
    "experiment": FOUNDATION | {"augment", "align", "models", "data", "agents"},
    "train": FOUNDATION | {"experiment", "checkpoint", "distributed", "progress", "report"},
    "sweep": {"agents", "progress", "report", "train"},
    "experts": FOUNDATION
    | {"augment", "data", "experiment", "landscape", "merge", "models", "checkpoint", "report"},
    "barrier": FOUNDATION
    | {"align", "augment", "data", "experiment", "models"}
    | {"checkpoint", "figures", "report", "train"},
    "bench": FOUNDATION | {"agents", "align", "augment", "merge", "models"},
    "cli": FOUNDATION
    | {"agents", "augment", "merge", "train", "sweep", "experts", "barrier", "report"}
    | {"checkpoint", "distributed", "figures", "gallery", "bench"},
    "__main__": {"cli"},
    "__init__": {"agents", "align", "augment", "data", "merge", "models"},
}
# Heavy or special packages, and the only places that may name them.
ONLY_IN = {
    # augment.manifold and merge.grams, when they run a Linen module
    "flax": {"models", "augment", "merge"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "orbax": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "matplotlib": {"figures", "gallery", "landscape", "report"},
    "ml_collections": {"experiment", "experts", "barrier", "train", "sweep", "cli"},
}


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """The dotted names that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "mixlab":
            yield from (f"mixlab.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_the_floor_plan(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part}
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "mixlab" and rest:
            assert rest[0] in allowed, f"{part} must not import mixlab.{rest[0]}"
        if top in ONLY_IN:
            assert part in ONLY_IN[top], f"{top} belongs in {sorted(ONLY_IN[top])}, not in {part}"


def test_pmap_is_named_in_one_module():
    naming = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "pmap"
    }
    assert naming == {"agents/parallel.py"}


def test_the_rooms_open_when_they_are_entered():
    code = (
        "import sys, mixlab; assert 'jax' not in sys.modules; mixlab.merge.average\n"
        "assert 'flax' not in sys.modules; assert set(mixlab.__all__) <= set(dir(mixlab))\n"
        "mixlab.kitchen"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "module 'mixlab' has no attribute 'kitchen'; it has agents" in result.stderr
