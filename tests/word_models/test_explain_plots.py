"""How the effects of words are written and drawn."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from word_models.explain import plot_effects, written_percent


@pytest.mark.parametrize(
    ("changes", "sign", "written"),
    [
        ([0.29, -0.13, 0.001], None, ["+29 %", "−13 %", "+0 %"]),
        ([0.024, -0.004], None, ["+2.4 %", "−0.4 %"]),
        ([0.31, 0.03], "±", ["±31 %", "±3 %"]),
        ([], None, []),
    ],
)
def test_effects_in_percent(changes, sign, written):
    assert written_percent(np.log1p(changes), sign) == written


def test_labels_stand_beside_the_bars_and_never_on_the_line():
    figure = Figure(figsize=(8, 5))
    axis = figure.subplots()
    contributions = np.log1p([0.5, -0.3, 0.004, -0.004])
    plot_effects(axis, list("abcd"), contributions)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    zero = axis.transData.transform((0, 0))[0]
    for box, contribution in zip(boxes, contributions, strict=True):
        end = axis.transData.transform((contribution, 0))[0]
        assert box.x0 > max(zero, end) if contribution > 0 else box.x1 < min(zero, end)
        assert box.x0 > axis.bbox.x0 and box.x1 < axis.bbox.x1
