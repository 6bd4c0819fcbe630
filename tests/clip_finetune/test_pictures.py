import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_finetune.config import PRESETS, ClipSettings
from clip_finetune.pictures import Data, TrainingRows, epoch_steps, load_batches, reasons_unusable
from contracts.errors import InputError
from contracts.splits import roles
from training.pictures import PictureRows

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "good.png")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    images = ["good.png", "page.jpg", "absent.jpg", ""]
    return pd.DataFrame({"text": "x" * 5000, "image": images, "price": [1.0, 2.0, 3.0, 4.0]})


def ones(picture):
    return torch.ones(3, 8, 8)


def length(texts):
    return torch.tensor([[len(text)] for text in texts])


def rows_of(table, folder):
    return TrainingRows(table, PictureRows(table["image"], folder, ones, min_side=8), length)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_reason(table, tmp_path, workers):
    reasons = reasons_unusable(table["image"], tmp_path, workers, quiet=True)
    assert reasons == ["", "not a picture", "missing", "no image link"]


def test_a_batch_has_picture_text_and_price(table, tmp_path):
    [batch] = load_batches(rows_of(table, tmp_path), [np.array([0, 0])], workers=0, device=CPU)
    assert batch["picture"].shape == (2, 3, 8, 8)
    assert batch["tokens"].tolist() == [[2000], [2000]]  # a long text is cut before it is cleaned
    assert batch["log_price"].dtype == torch.float32
    np.testing.assert_allclose(batch["log_price"].numpy(), np.log(2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_became_unusable_is_named(table, tmp_path, workers):
    batches = load_batches(rows_of(table, tmp_path), [np.array([0, 2])], workers, CPU)
    with pytest.raises(InputError, match="absent.jpg: the picture became unusable") as caught:
        next(batches)
    assert "(missing)" in str(caught.value) and "\n" not in str(caught.value)


def test_rows_have_the_role_of_their_fold_and_a_usable_picture(table):
    table = pd.concat([table] * 5, ignore_index=True).assign(fold=np.arange(20) % 10)
    data = Data.by_role(table, None, np.arange(20) != 3, roles(1))
    assert data.validate.tolist() == [2, 12, 13] and data.stop.tolist() == [4, 14]
    assert set(table["fold"][data.fit]) == {0, 1, 5, 6, 7, 8, 9}


def settings(**changes):
    return ClipSettings(**(PRESETS["tiny"] | changes))


def test_epoch_steps():
    sixteen = settings(batch_size=8, gradient_accumulation_steps=2)
    rows = np.arange(100, 205)
    steps = epoch_steps(rows, sixteen, 0, 1)
    assert sorted(np.concatenate(steps)) == rows.tolist() and {len(step) for step in steps} == {15}
    assert all(np.array_equal(*pair) for pair in zip(steps, epoch_steps(rows, sixteen, 0, 1), strict=True))
    assert not np.array_equal(steps[0], epoch_steps(rows, sixteen, 1, 1)[0])
    for processes in (2, 4):
        found = epoch_steps(rows, sixteen, 0, processes)
        assert all(len(step) % processes == 0 and len(step) <= 16 * processes for step in found)
        assert sum(map(len, found)) > 105 - len(found) * processes


def test_no_step_is_empty():
    """Five rows for two processes in steps of two: the fifth row alone cannot be shared."""
    two = settings(batch_size=2, gradient_accumulation_steps=1)
    assert [len(step) for step in epoch_steps(np.arange(5), two, 0, 2)] == [2, 2]
