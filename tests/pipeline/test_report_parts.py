"""What the report is made of: groups of rows, intervals, bars, ticks and curves."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from pipeline.page import charts
from pipeline.page.held_out import by_group, category_groups, nested_intervals, price_groups
from pipeline.page.markup import money
from pipeline.page.training_runs import read_curves


def counted(groups):
    return pd.Series(groups).value_counts(sort=False).to_dict()


def test_the_twelve_most_frequent_values_and_the_rest_together():
    values = [f"v{number:02}" for number in range(14) for _ in range(20 - number)] + ["once", "", " "]
    groups = category_groups(pd.Series(values))
    assert list(groups.categories) == [f"v{number:02}" for number in range(12)] + ["3 others", "not stated"]
    assert counted(groups) == {f"v{number:02}": 20 - number for number in range(12)} | {
        "3 others": 16,
        "not stated": 2,
    }


def test_a_value_of_one_row_has_no_bar_of_its_own():
    assert counted(category_groups(pd.Series(["a", "b", "a", "c"]))) == {
        "a": 2,
        "2 others": 2,
        "not stated": 0,
    }
    assert category_groups(pd.Series(["a", "a", "c"])).tolist() == ["a", "a", "another one"]


def test_a_price_on_an_edge_is_in_the_upper_bin():
    groups = price_groups(np.array([4.99, 5.0, 29.0, 30.0, 200.0]), "$")
    assert groups.tolist() == ["under $5", "$5 to $10", "$10 to $30", "$30 to $60", "$200 and more"]


def test_a_catalogue_in_yen_has_bins_of_its_own():
    price = np.geomspace(900, 110_000, 500)
    groups = price_groups(price, "¥")
    assert len(counted(groups)) == 5
    assert all(60 < rows < 140 for rows in counted(groups).values())
    assert groups.categories[0] == "under ¥2,400"


@pytest.mark.parametrize(
    ("price", "currency", "written"),
    [(4.5, "$", "$4.50"), (1312.4, "$", "$1,312"), (4.5, "EUR", "EUR 4.50"), (np.inf, "$", "no limit")],
)
def test_money(price, currency, written):
    assert money(price, currency) == written


def test_groups_have_mean_standard_error_and_size():
    table = by_group(pd.Series([1.0, 3.0, 7.0]), pd.Categorical(["a", "a", "b"], ["b", "a", "c"]))
    assert table.index.tolist() == ["b", "a"]
    assert table.loc["a"].tolist() == [2.0, 1.0, 2.0]
    assert np.isnan(table.loc["b", "error"])


def random_rows(seed=0, folds=10):
    random = np.random.default_rng(seed)
    price = np.exp(random.normal(3, 1, 300))
    rows = pd.DataFrame({"price": price, "fold": np.arange(300) % folds})
    rows["predicted"] = price * np.exp(random.normal(0, 0.3, 300))
    spread = random.normal(0, 0.2, (300, 2))
    return rows, pd.DataFrame(rows["predicted"].to_numpy()[:, None] * np.exp(spread))


def widths(intervals):
    return {level: np.log(interval["high"] / interval["low"]) for level, interval in intervals.items()}


@pytest.mark.parametrize(("folds", "own"), [(10, [4, 5]), (2, [1])])
def test_the_width_of_an_interval_does_not_depend_on_the_prices_that_it_is_tested_with(folds, own):
    rows, members = random_rows(folds=folds)
    before = widths(nested_intervals(rows, members))
    tested = rows["fold"].isin(own)
    rows.loc[tested, "price"] *= 7
    after = widths(nested_intervals(rows, members))
    for level in (0.8, 0.95):
        assert np.allclose(before[level][tested], after[level][tested])
        assert (after[level][~tested] > 1.2 * before[level][~tested]).all()


def test_intervals_hold_what_they_promise():
    rows, members = random_rows()
    intervals = nested_intervals(rows, members)
    assert intervals[0.8]["inside"].mean() == pytest.approx(0.8, abs=0.07)
    for interval in intervals.values():
        held = rows["price"].between(interval["low"], interval["high"])
        assert (held == interval["inside"]).all()


def test_no_intervals_from_a_single_fold_or_without_members():
    rows, members = random_rows(folds=1)
    assert nested_intervals(rows, members) == {}
    assert nested_intervals(random_rows()[0], pd.DataFrame(index=rows.index)) == {}


def test_bars_with_numbers_where_they_fit():
    table = pd.DataFrame(
        {"value": [100.0, 5.0], "error": [10.0, np.nan], "rows": [1234, 1]}, ["<long>", "short"]
    )
    html = charts.bars(table, reference=55.0, heading="SMAPE")
    long, short = re.findall("<tr>.*?</tr>", html)
    assert "<span>n=1,234</span>" in long and "&lt;long&gt;" in long and "± 10.0" in long
    assert "left:81.8%;width:18.2%" in long  # 90 to 110 of 110
    assert "--at:50.0%" in long
    assert "<small>n=1</small>" in short and "whisker" not in short and "±" not in short


def test_a_whisker_over_the_foot_of_a_bar_leaves_the_number_to_the_label():
    table = pd.DataFrame({"value": [60.0], "error": [55.0], "rows": [2]}, ["two"])
    assert "two <small>n=2</small>" in charts.bars(table, reference=60.0, heading="SMAPE")


def test_shares_fill_the_bar():
    html = charts.stacked(
        pd.DataFrame({"expert 0": [0.75], "expert 1": [0.25]}, ["$0-5"]), pd.Series([9], ["$0-5"])
    )
    assert "width:75.00%" in html and "width:25.00%" in html and "n=9" in html


def test_the_scatter_plot_draws_at_most_so_many_points_all_in_its_frame():
    price = np.exp(np.random.default_rng(0).normal(3, 1, 5000))
    html = charts.scatter(price, price[::-1], "$")
    places = np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', html), float)
    assert len(places) == charts.POINTS
    assert places.min() > 0 and places[:, 0].max() < 360 and places[:, 1].max() < 334
    assert len(html) < 120_000


def test_a_single_price_can_be_drawn():
    assert "<circle" in charts.scatter(np.array([5.0]), np.array([5.0]), "$")
    assert "<circle" in charts.price_strip({"price": 5.0, "predicted": 5.0}, [(0.0, np.inf)], [5.0])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(15, 900, [20, 50, 100, 200, 500]), (0.1, 900, [0.1, 0.3, 1, 3, 10, 30, 100, 300][1:]), (30, 40, [])],
)
def test_prices_along_an_axis_are_round(low, high, ticks):
    found = charts.price_ticks(low, high)
    assert len(found) <= 7 and all(low <= tick <= high for tick in found)
    if (low, high) == (15, 900):
        assert found == pytest.approx(ticks)


def test_tick_labels_are_short():
    labels = [charts.tick_label(price, "$") for price in (0.5, 5.0, 200.0, 2000.0, 3e6)]
    assert labels == ["$0.50", "$5", "$200", "$2k", "$3M"]
    assert charts.tick_label(2000.0, "EUR") == "EUR 2k"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 3.0), (1.0, 87.0), (-2.0, 0.001), (1e-5, 2e-5)])
def test_linear_ticks_are_few_and_inside(low, high):
    ticks = charts.linear_ticks(low, high)
    assert 1 <= len(ticks) <= 5
    assert low - 1e-9 <= min(ticks) and max(ticks) <= high + 1e-9


def test_curves_run_over_epochs_and_time_is_no_curve(tmp_path):
    lines = [{"step": step, "train/loss": 1 / step} for step in range(5, 25, 5)]
    lines += [
        {"step": step, "epoch": step // 10, "stop/loss": 2.0, "seconds": 7.0, "once": 1} for step in (10, 20)
    ]
    del lines[-1]["once"]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = {(quantity, part): at.tolist() for quantity, (part, at, _) in read_curves(path)}
    assert found == {("loss", "train"): [0.5, 1.0, 1.5, 2.0], ("loss", "stop"): [1.0, 2.0]}


def test_a_run_without_epochs_has_no_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}')
    assert read_curves(path) == []


def test_long_curves_are_thinned_to_means():
    at, value = charts.thinned(np.arange(1200.0), np.arange(1200.0))
    assert len(at) == charts.CURVE_POINTS
    assert value[0] == pytest.approx(4.5)
