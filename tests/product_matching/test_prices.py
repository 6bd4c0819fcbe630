import shutil

import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.predictions import prediction_names, read_predictions
from contracts.workspace import Workspace
from product_matching import prices
from product_matching.prices import neighbour_prices, out_of_fold


def unit(*angles: float) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_prices_of_the_neighbours_by_hand():
    rows = pd.DataFrame({"sample_id": ["a", "b", "c"], "price": [10.0, 20.0, 500.0]})
    found = neighbour_prices(unit(0.0), unit(0.1, -0.2, 2.0), rows, neighbours=2, sharpness=5.0)
    weight = np.exp(5 * np.cos([0.1, 0.2]))
    expected = (weight * np.log1p([10, 20])).sum() / weight.sum()
    assert found["log_price"].iloc[0] == pytest.approx(expected, rel=1e-5)
    assert found["neighbour_log_price"].iloc[0] == pytest.approx(np.log(11))
    assert found["neighbour_similarity"].iloc[0] == pytest.approx(np.cos(0.1), abs=1e-6)
    assert found["neighbour_id"].iloc[0] == "a"


def test_a_training_row_sees_no_price_of_its_own_hold_out():
    rng = np.random.default_rng(0)
    fold = rng.permutation(np.arange(40) % 10)
    vectors = unit(*rng.uniform(0, 1, 40))
    rows = pd.DataFrame({"sample_id": [f"s{n}" for n in range(40)], "price": rng.uniform(1, 9, 40)})
    options = {"neighbours": 3, "sharpness": 10.0}
    before = out_of_fold(vectors, rows, fold, **options)
    holdout = pd.Series(fold // 2, index=rows["sample_id"])
    assert (holdout[before["neighbour_id"]].to_numpy() != holdout[rows["sample_id"]].to_numpy()).all()
    # prices of hold-out 2 change: its own rows' features must not, and some others must
    changed = rows.assign(price=np.where(fold // 2 == 2, 1000.0, rows["price"]))
    after = out_of_fold(vectors, changed, fold, **options)
    inside = fold // 2 == 2
    pd.testing.assert_frame_equal(before[inside], after[inside])
    assert (before.loc[~inside, "log_price"] != after.loc[~inside, "log_price"]).any()
    with pytest.raises(InputError, match="all training rows lie in one hold-out"):
        out_of_fold(vectors, rows, np.zeros(40, int), **options)


def test_files_have_the_ids_and_order_of_the_tables(sample_workspace, shops, tmp_path, capsys):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    prices.main(["--workspace", str(tmp_path), "--model", str(shops / "encoder"), "--device", "cpu"])
    workspace = Workspace(tmp_path)
    for split in ("train", "test"):
        ids = workspace.prepared(split)["sample_id"].tolist()
        predictions = read_predictions(workspace, "matched_prices", split)
        assert predictions.sample_ids.tolist() == ids
        assert (predictions.log_price > 0).all()
        neighbours = pd.read_csv(
            tmp_path / "predictions" / f"matched_prices_{split}.neighbours.csv", dtype={"sample_id": str}
        )
        assert neighbours["sample_id"].tolist() == ids
        numbers = neighbours[["neighbour_log_price", "neighbour_similarity", "neighbour_spread"]]
        assert np.isfinite(numbers).all(axis=None)
    train = read_predictions(workspace, "matched_prices", "train")
    assert train.unseen.all()  # the ensemble may score every row
    assert train.fold.tolist() == workspace.folds()[train.sample_ids].tolist()
    assert prediction_names(workspace) == ["matched_prices"]
    # a random encoder still shares words between similar texts: better than guessing at random
    assert float(capsys.readouterr().out.split("SMAPE of log_price: ")[1].split()[0]) < 100


def test_a_row_without_a_fold_is_refused(sample_workspace, shops, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    path = tmp_path / "data" / "folds.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match=f"no fold for sample_id {lines[-1].split(',')[0]}"):
        prices.main(["--workspace", str(tmp_path), "--model", str(shops / "encoder")])
