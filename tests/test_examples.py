"""The code that the README and the notebooks show runs as it stands."""

import json
import pathlib
import re

import jax
import matplotlib as mpl
import pytest

from mixlab import augment, models
from mixlab.experiment import check

ROOT = pathlib.Path(__file__).parents[1]
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def _as_users_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", README, ids=lambda b: re.findall(r"from mixlab import (.*)", b)[0]
)
def test_readme(block, capsys, monkeypatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    monkeypatch.setattr(augment, "CONSTRUCTORS", dict(augment.CONSTRUCTORS))
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "get_config" in names:
        check(names["get_config"]())
    assert capsys.readouterr().out or "print(" not in block


def test_the_readme_has_an_example_a_room():
    assert [
        room
        for room in ("augment", "merge", "align", "agents")
        if f"`mixlab.{room}`" in (ROOT / "README.md").read_text()
    ] == ["augment", "merge", "align", "agents"]
    imported = [re.findall(r"from mixlab import (.*)", block)[0] for block in README]
    assert all(any(room in names for names in imported) for room in ("augment", "merge", "align"))
    assert len(README) == 9


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "notebooks are committed without outputs"
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    assert names["report"].exists()
