import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from training.plots import draw_error_bars, figure_at, plot_error_by_price, plot_training_curves


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_curves_run_over_epochs_and_seconds_are_no_curve(tmp_path, drawn):
    metrics = [{"step": step, "train/loss": 1 / step} for step in range(5, 25, 5)]
    metrics += [
        {"step": step, "epoch": step // 10, "stop/loss": 2 / step, "seconds": 7.0} for step in (10, 20)
    ]
    plot_training_curves(tmp_path / "curves.png", metrics, title="run")
    (axis,) = drawn[0].axes
    assert axis.get_xlabel() == "epoch" and axis.get_title() == "loss"
    at = {line.get_label(): line.get_xdata().tolist() for line in axis.get_lines()}
    assert at == {"train/loss": [0.5, 1.0, 1.5, 2.0], "stop/loss": [1.0, 2.0]}


def test_without_epochs_steps_are_drawn(tmp_path, drawn):
    plot_training_curves(tmp_path / "curves.png", [{"step": 3, "lr": 0.1}], title="run")
    assert drawn[0].axes[0].get_xlabel() == "step"


def test_error_by_price_labels_dollars_and_rows(tmp_path, drawn):
    price = np.array([2.0, 3.0, 12.0, 14.0, 300.0])
    plot_error_by_price(tmp_path / "error.png", price, price * 1.2, title="run")
    scatter, bars = drawn[0].axes
    assert scatter.xaxis.get_major_formatter()(10, 0) == "$10"
    assert [text.get_text() for text in bars.texts] == ["n=2", "n=2", "n=1"]
    assert bars.get_legend().get_texts()[0].get_text() == "all rows: 18.2"


def test_over_few_powers_of_ten_there_are_more_prices_along_the_axis(tmp_path, drawn):
    price = np.array([15.0, 40.0, 900.0])
    plot_error_by_price(tmp_path / "error.png", price, price * 1.2, title="run")
    axis = drawn[0].axes[0].xaxis
    labels = [axis.get_major_formatter()(place, 0) for place in axis.get_majorticklocs()]
    assert {"$20", "$50", "$100", "$200", "$500"} <= set(labels)
    assert not len(axis.get_minorticklocs())


def test_no_number_of_rows_is_struck_through(tmp_path):
    """It stands at the foot of its bar or, where bar, error bar or line are too low for that, above them."""
    smape = pd.Series([100.0, 4.0, 30.0, 35.0], list("abcd"))
    error = pd.Series([10.0, 1.0, 28.0, 2.0], list("abcd"))
    rows = pd.Series([3, 1000, 2, 5], list("abcd"))

    def places(overall):
        with figure_at(tmp_path / "bars.png", columns=1, width=3, height=3) as (_, (axis,)):
            draw_error_bars(axis, smape, error, rows, overall=overall)
        return {text.get_text(): (text.xy[1], text.get_color()) for text in axis.texts}

    assert places(overall=36.0) == {
        "n=3": (0, "white"),
        "n=1000": (5.0, "black"),
        "n=2": (58.0, "black"),
        "n=5": (0, "white"),
    }
    # a line at the foot moves all of them up, and the low one above the line
    assert places(overall=6.0) == {
        "n=3": (110.0, "black"),
        "n=1000": (6.0, "black"),
        "n=2": (58.0, "black"),
        "n=5": (37.0, "black"),
    }


def test_a_bar_has_its_standard_error(tmp_path):
    index = ["a", "b"]
    with figure_at(tmp_path / "bars.png", columns=1, width=3, height=3) as (_, (axis,)):
        smape, error, rows = (pd.Series(values, index) for values in ([50.0, 60.0], [5.0, np.nan], [9, 1]))
        draw_error_bars(axis, smape, error, rows, overall=52.0)
        (caps,) = axis.collections
        assert [segment[:, 1].tolist() for segment in caps.get_segments()] == [[45.0, 55.0], [60.0, 60.0]]


def test_many_quantities_stand_in_rows_that_fit_a_page(tmp_path, drawn):
    plot_training_curves(
        tmp_path / "curves.png", [{"step": 1, **{f"q{n}": 1.0 for n in range(7)}}], title="run"
    )
    shown = [axis for axis in drawn[0].axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [f"q{n}" for n in range(7)]
    assert drawn[0].get_size_inches().tolist() == pytest.approx([3 * 4.2, 3 * 3.4])
