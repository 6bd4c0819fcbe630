import json

import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.files import sidecar_of
from contracts.predictions import prediction_names, read_predictions, remove_predictions, write_predictions
from contracts.splits import fitted_on, fitted_out_of_fold, union_fitted_on, write_folds
from contracts.workspace import Workspace

IDS = np.array([f"p{row:02d}" for row in range(20)])
FOLDS = np.arange(20) % 10
LOG_PRICE = np.linspace(0.5, 4.0, 20)


@pytest.fixture
def workspace(tmp_path):
    write_folds(tmp_path / "data" / "folds.csv", pd.DataFrame({"sample_id": IDS, "fold": FOLDS}))
    return Workspace(tmp_path)


def write(workspace, fitted, name="model", ids=IDS, log_price=LOG_PRICE):
    meta = {"stage": "test", "model": "m", "fitted_on": fitted}
    return write_predictions(workspace, name, "train", ids, log_price, meta=meta, fold=FOLDS[: len(ids)])


def test_round_trip_with_what_the_model_was_fitted_on(workspace):
    path = write(workspace, fitted_on(encoder_folds=(1, 2, 3)))
    loaded = read_predictions(workspace, "model", "train")
    assert loaded.sample_ids.tolist() == IDS.tolist()
    np.testing.assert_allclose(loaded.log_price, LOG_PRICE)
    np.testing.assert_allclose(loaded.price, np.expm1(LOG_PRICE))
    assert loaded.fold.tolist() == FOLDS.tolist()
    assert loaded.meta["stage"] == "test" and loaded.meta["command"]
    assert loaded.unseen.tolist() == [fold not in (1, 2, 3) for fold in FOLDS]
    assert prediction_names(workspace) == ["model"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_unseen_rows_pass_and_seen_rows_are_named(workspace):
    write(workspace, fitted_out_of_fold(5))
    read_predictions(workspace, "model", "train").require_unseen()
    write(workspace, fitted_on(encoder_folds=(0, 7)))
    with pytest.raises(InputError, match=r"model_train.csv: no honest score.*folds \[0, 7\]"):
        read_predictions(workspace, "model", "train").require_unseen()


def test_an_encoder_behind_the_model_counts(workspace):
    write(workspace, union_fitted_on(fitted_out_of_fold(5), fitted_on(encoder_folds=(4,))))
    predictions = read_predictions(workspace, "model", "train")
    assert predictions.unseen.tolist() == [fold != 4 for fold in FOLDS]


def test_a_file_without_a_sidecar_can_be_read_but_scores_nothing(workspace):
    sidecar_of(write(workspace, fitted_out_of_fold(5))).unlink()
    predictions = read_predictions(workspace, "model", "train")
    np.testing.assert_allclose(predictions.log_price, LOG_PRICE)
    assert not predictions.unseen.any()
    with pytest.raises(InputError, match="says what its model was fitted on"):
        predictions.require_unseen()


def test_a_changed_file_is_refused(workspace):
    path = write(workspace, fitted_out_of_fold(5))
    path.write_text(path.read_text().replace("p00,0.5", "p00,0.6"))
    with pytest.raises(InputError, match="sha256 differs"):
        read_predictions(workspace, "model", "train")


def test_predictions_of_other_folds_are_refused(workspace):
    write(workspace, fitted_out_of_fold(5))
    other = pd.DataFrame({"sample_id": IDS, "fold": FOLDS[::-1]})
    write_folds(workspace.path("folds"), other)
    with pytest.raises(InputError, match="another fold file"):
        read_predictions(workspace, "model", "train")


def test_what_is_no_prediction_file_is_refused(workspace):
    path = workspace.path("predictions", name="x", split="train")
    path.parent.mkdir()
    for content, message in [
        ("id,price\n1,2\n", "not a prediction file"),
        ("sample_id,log_price\np00,1\np00,2\n", "p00 occurs twice"),
        ("sample_id,log_price\np00,cheap\n", "log_price of sample_id p00"),
        ("sample_id,log_price\nstranger,1\n", "stranger has no fold"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_predictions(workspace, "x", "train")


def test_a_price_that_is_not_finite_is_not_written(workspace):
    with pytest.raises(InputError, match="p01 is not finite"):
        write(workspace, fitted_out_of_fold(5), ids=IDS[:2], log_price=np.array([1.0, np.nan]))
    assert prediction_names(workspace) == []


def test_meta_must_say_what_the_model_was_fitted_on(workspace):
    with pytest.raises(InputError, match="lacks fitted_on"):
        write_predictions(workspace, "m", "train", IDS, LOG_PRICE, meta={"stage": "s", "model": "m"})
    with pytest.raises(InputError, match="each of 10 folds"):
        write(workspace, [[0, 1]])


def test_a_sidecar_of_another_version_is_refused(workspace):
    sidecar = sidecar_of(write(workspace, fitted_out_of_fold(5)))
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        read_predictions(workspace, "model", "train")


def test_removed_predictions_leave_nothing_behind(workspace):
    path = write(workspace, fitted_out_of_fold(5))
    remove_predictions(workspace, "model", "train")
    remove_predictions(workspace, "model", "train")
    assert list(path.parent.iterdir()) == []
