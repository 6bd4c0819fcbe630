"""The study of the kernel on few rows: its approximations are what they are called, and its tables are complete."""

import numpy as np
import pandas as pd
import pytest
import torch

from contracts.smape import smape
from contracts.splits import N_HOLDOUTS
from contracts.workspace import Workspace
from studies import kernel_scaling
from word_models.neighbourhoods import Sizes

FEW_STEPS = ["--steps", "3"]


def test_accuracy_compares_all_forms_on_the_same_rows(sample_workspace, tmp_path):
    out = tmp_path / "accuracy.csv"
    flags = ["accuracy", "--workspace", str(sample_workspace), "--holdouts", "2", *FEW_STEPS]
    # neighbourhoods as large as the catalogue are the exact form
    table = kernel_scaling.main([*flags, "--sizes", "60", "320", "--seeds", "1", "--out", str(out)])
    assert len(pd.read_csv(out)) == len(table)
    table = table.set_index("form")
    workspace = Workspace(sample_workspace)
    held_out = workspace.training_table().query("fold < 4")
    assert (table["rows"] == len(held_out)).all() and (table["hold_outs"] == 2).all()
    assert table.loc["exact", "rms_from_exact"] == 0
    assert table.loc["neighbourhoods of 320", "rms_from_exact"] < 1e-3
    assert table.loc["neighbourhoods of 60", "rms_from_exact"] > 0.01
    for form in ("exact", "neighbourhoods of 60", "neighbourhoods of 320"):
        assert {f"boosted on {form}", f"mlp_on_kernel on {form}"} <= set(table.index)
        assert table.loc[form, "cpu_seconds_without_learning"] > 0
    constant = smape(held_out["price"], np.full(len(held_out), held_out["price"].median()))
    assert (table["smape"] < constant).all()


def test_rivals_of_all_rows_are_the_exact_form():
    """All rows as landmarks, and all rows as the nearest ones, against numpy's solution."""
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(35, 3)))
    gram = torch.exp(-torch.cdist(points, points).square()).float()
    known = torch.from_numpy(rng.normal(size=30))
    fit = gram[:30, :30]
    asked = gram[30:, :30]
    expected = asked.double().numpy() @ np.linalg.solve(
        fit.double().numpy() + 0.1 * np.eye(30), known.numpy()
    )
    landmarks = kernel_scaling._by_landmarks(fit, fit, asked, known, noise=0.1)
    nearest = kernel_scaling._by_nearest(fit, asked, known.float(), noise=0.1, count=30)
    np.testing.assert_allclose(landmarks.numpy(), expected, atol=1e-3)
    np.testing.assert_allclose(nearest.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("holdouts", [1, N_HOLDOUTS])
def test_time_fits_every_hold_out_and_then_all_rows(tmp_path, monkeypatch, holdouts):
    monkeypatch.setattr(kernel_scaling, "SIZES", Sizes(exact=100, home=40, members=120))
    out = tmp_path / "time.csv"
    flags = ["time", "--rows", "400", "--holdouts", str(holdouts), *FEW_STEPS, "--out", str(out)]
    table = kernel_scaling.main(flags)
    assert len(pd.read_csv(out)) == len(table)
    fits = [str(number) for number in range(holdouts)]
    assert table["hold_out"].tolist() == (fits if holdouts == 1 else [*fits, "none"])
    scored = table[table["hold_out"] != "none"]
    assert (scored["fitted"] + scored["asked"] == 400).all()
    assert (scored["best_smape"] < scored["smape"]).all() and (scored["smape"] < 100).all()
    parts = table[["learning_cpu", "fitting_cpu"]].sum(axis=1) + table["asking_cpu"]
    assert (parts > 0).all() and (table["peak_gb"] > 0.1).all()
    if holdouts == N_HOLDOUTS:
        assert scored["asked"].sum() == 400 and table["fitted"].iloc[-1] == 400
