"""The figures that no report test draws."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from mixlab import figures
from mixlab.align import Barrier
from mixlab.align.inference.layout import Atom, Fixed, Prod, Sum
from mixlab.figures import style


def test_barriers_have_a_panel_a_metric_and_their_heights_in_the_legend(tmp_path):
    t = np.linspace(0, 1, 5)
    hill = Barrier(
        t,
        {"accuracy": 0.9 - t * (1 - t), "loss": 1 + 12 * t * (1 - t)},
        {"accuracy": 0.25, "loss": 3.0},
    )
    flat = Barrier(
        t, {"accuracy": 0 * t + 0.9, "loss": 0 * t + 1}, {"accuracy": 0.0, "loss": np.nan}
    )
    figure = figures.barriers({"as trained": hill, "matched": flat})
    loss, accuracy = figure.axes
    assert [loss.get_ylabel(), accuracy.get_ylabel()] == ["loss", "accuracy, %"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), 100 * hill.values["accuracy"])
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [1, 1])  # the dotted line
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["as trained: loss 3, accuracy 25.0 %", "matched: loss nan, accuracy 0.0 %"]
    figure.savefig(tmp_path / "barriers.png")
    with pytest.raises(ValueError, match="no curves"):
        figures.barriers({})


def test_symmetry_has_a_row_a_leaf_and_a_colour_a_group(tmp_path):
    a, b = Atom(4, "a"), Atom(3, "b")
    layouts = {
        "batch_stats/bn_10/mean": (a,),
        "params/bn_10/scale": (a,),
        "params/bn_9/scale": (b,),
        "params/dense/kernel": (Sum((a, b, Fixed(2))), Prod((Fixed(5), a))),
        "params/temperature": (),
    }
    symmetry = SimpleNamespace(groups={"a": 4, "b": 3}, layouts=layouts)
    figure = figures.symmetry(symmetry)
    (ax,) = figure.axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["bn_9/scale", "bn_10/mean, scale", "dense/kernel"]
    first, second, grey = to_rgb(style.BLUE), to_rgb(style.ORANGE), to_rgb("#EDEDED")
    colours = [patch.get_facecolor()[:3] for patch in ax.patches]
    assert colours == [second, first, first, second, grey, grey, first]
    signs = [text.get_text() for text in ax.texts if text.get_text() in "+×"]
    assert signs == ["+", "+", "×"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["1  a (4)", "2  b (3)"]
    figure.savefig(tmp_path / "symmetry.png")
    assert len(figures.symmetry(symmetry, rows=2).axes) == 2
    with pytest.raises(ValueError, match="no leaf"):
        figures.symmetry(SimpleNamespace(groups={}, layouts={"x": ()}))
