import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_finetune.config import PRESETS, ClipSettings
from clip_finetune.pictures import CatalogRows, Data, epoch_steps, fold_of_each_row, reasons_unusable
from contracts.errors import InputError
from contracts.splits import roles
from contracts.workspace import Workspace


@pytest.fixture
def table(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "good.png")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    images = ["good.png", "page.jpg", "absent.jpg", ""]
    return pd.DataFrame({"text": "x", "image": images, "price": [1.0, 2.0, 3.0, 4.0]})


def rows_of(table, folder):
    return CatalogRows(table, folder, lambda picture: torch.ones(3, 8, 8), 8)


def test_only_usable_pictures_are_valid(table, tmp_path):
    rows = rows_of(table, tmp_path)
    assert [rows[row]["valid"] for row in range(4)] == [True, False, False, False]
    assert rows[1]["picture"].shape == (3, 8, 8) and not rows[1]["picture"].any()


@pytest.mark.parametrize("workers", [0, 1])
def test_each_reason(table, tmp_path, workers):
    reasons = reasons_unusable(rows_of(table, tmp_path).paths, workers, quiet=True)
    assert reasons == ["", "not a picture", "missing", "no picture named"]


def test_rows_have_the_role_of_their_fold_and_a_usable_picture(table):
    table = pd.concat([table] * 5, ignore_index=True)
    fold, usable = np.arange(20) % 10, np.arange(20) != 3
    data = Data.by_role(table, None, usable, fold, roles(1))
    assert data.validate.tolist() == [2, 12, 13] and data.stop.tolist() == [4, 14]
    assert set(fold[data.fit]) == {0, 1, 5, 6, 7, 8, 9}


def test_folds_of_another_table_are_refused(sample_workspace):
    workspace = Workspace(sample_workspace)
    other = workspace.prepared("train").assign(sample_id=lambda table: "x" + table["sample_id"])
    with pytest.raises(InputError, match="folds.csv: no fold for sample_id x"):
        fold_of_each_row(workspace, other)


def test_epoch_steps():
    settings = ClipSettings(**(PRESETS["tiny"] | {"batch_size": 8, "grad_accum": 2}))
    rows = np.arange(100, 205)
    steps = epoch_steps(rows, settings, 0, 1)
    assert sorted(np.concatenate(steps)) == rows.tolist() and {len(step) for step in steps} == {15}
    assert all(np.array_equal(*pair) for pair in zip(steps, epoch_steps(rows, settings, 0, 1), strict=True))
    assert not np.array_equal(steps[0], epoch_steps(rows, settings, 1, 1)[0])
    for processes in (2, 4):
        found = epoch_steps(rows, settings, 0, processes)
        assert all(len(step) % processes == 0 and len(step) <= 16 * processes for step in found)
        assert sum(map(len, found)) > 105 - len(found) * processes


def test_no_step_is_empty():
    """Five rows for two processes in steps of two: the fifth row alone cannot be shared."""
    settings = ClipSettings(**(PRESETS["tiny"] | {"batch_size": 2, "grad_accum": 1}))
    assert [len(step) for step in epoch_steps(np.arange(5), settings, 0, 2)] == [2, 2]
