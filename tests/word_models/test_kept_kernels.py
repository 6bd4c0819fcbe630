"""Kernels that are kept: the second model reads what the first has fitted, and only that."""

import numpy as np
import pytest

from contracts.errors import InputError
from contracts.predictions import read_predictions
from word_models import kept_kernels, train
from word_models.config import WordModelSettings
from word_models.features import build_features
from word_models.kept_kernels import fit_or_read
from word_models.kernel import KernelModel

FEW_STEPS = ["--seeds", "1", "--kernel-steps", "3", "--updates", "1", "--trees", "10"]


@pytest.fixture
def fits(monkeypatch):
    """The numbers of rows of all kernels that were fitted."""
    counted = []
    fit = KernelModel.fit

    def counting(settings, rows, ln_price):
        counted.append(len(rows))
        return fit(settings, rows, ln_price)

    monkeypatch.setattr(KernelModel, "fit", counting)
    return counted


def test_the_second_model_fits_no_kernel_and_predicts_the_same(workspace, fits):
    flags = ["--workspace", str(workspace.root), *FEW_STEPS]
    train.main([*flags, "--model", "boosted", "--keep-kernels"])
    assert len(fits) == 6  # five hold-outs and all rows
    train.main([*flags, "--model", "mlp_on_kernel", "--keep-kernels"])
    assert len(fits) == 6

    kept = read_predictions(workspace, "words_mlp_on_kernel", "test").log_price
    train.main([*flags, "--model", "mlp_on_kernel"])
    assert len(fits) == 12
    np.testing.assert_array_equal(read_predictions(workspace, "words_mlp_on_kernel", "test").log_price, kept)


def test_what_a_kernel_depends_on_is_part_of_its_name(workspace, tables, fits, monkeypatch, tmp_path):
    rows = build_features(tables["train"])["train"]
    ln_price = np.log(tables["train"]["price"].to_numpy())
    settings = {"workspace": str(workspace.root), "kernel_steps": 2, "keep_kernels": True}

    def fitted(rows=rows, ln_price=ln_price, **changed):
        before = len(fits)
        fit_or_read(WordModelSettings(**settings | changed), rows, ln_price)
        return len(fits) > before

    assert fitted() and not fitted()
    assert not fitted(trees=7)  # of no concern to the kernel
    dearer = ln_price.copy()
    dearer[3] += 0.01
    moved = rows[np.arange(len(rows))]
    moved.structural[5, 0] += 0.01
    assert fitted(ln_price=dearer) and fitted(rows=moved) and fitted(kernel_steps=3) and fitted(seed=1)

    # another version of the program
    for module in kept_kernels.SOURCES:
        (tmp_path / f"{module}.py").write_text("")
    monkeypatch.setattr(kept_kernels, "__file__", str(tmp_path / "kept_kernels.py"))
    assert fitted()


def test_a_damaged_kernel_is_named(workspace, tables):
    rows = build_features(tables["train"])["train"]
    settings = WordModelSettings(workspace=str(workspace.root), kernel_steps=2, keep_kernels=True)
    ln_price = np.log(tables["train"]["price"].to_numpy())
    fit_or_read(settings, rows, ln_price)
    (path,) = workspace.path("run", name="kernels").glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{path.name}: not readable"):
        fit_or_read(settings, rows, ln_price)
