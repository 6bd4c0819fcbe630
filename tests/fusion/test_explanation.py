"""Explanations of a fusion model: properties that define Shapley values, and models whose answer is known."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from contracts import splits
from contracts.errors import InputError
from contracts.workspace import STRUCTURAL_FEATURES, Workspace
from fusion.all_embeddings import explain, train
from fusion.all_embeddings.config import MODALITIES, AllEmbeddingsSettings
from fusion.all_embeddings.model import AllEmbeddings
from fusion.blocks import FusionOutput
from fusion.dataset import FusionTable
from fusion.explanation import (
    choose_products,
    ln_price,
    permutation_importance,
    permuted,
    permuted_columns,
    shapley_values,
)
from fusion.target import Target

WIDTHS = {"clip_image": 6, "siglip_image": 5, "siglip_text": 4, "qwen_text": 7}


def make_table(rows=40, missing=0.3, last_columns=STRUCTURAL_FEATURES):
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(rows, width, generator=generator) for name, width in WIDTHS.items()}
    valid = torch.rand(rows, 4, generator=generator) > missing
    for column, name in enumerate(WIDTHS):
        embeddings[name][~valid[:, column]] = 0
    frame = pd.DataFrame(
        {
            "sample_id": [f"id {row}" for row in range(rows)],
            "entity_name": "honey",
            "price": np.arange(rows) + 3.0,
        }
    )
    meta = {name: {} for name in WIDTHS} | {"qwen_text": {"last_columns": list(last_columns)}}
    return FusionTable.of(frame, embeddings, valid, meta)


def trained_model(model=None):
    settings = AllEmbeddingsSettings(width=16, heads=2)
    torch.manual_seed(0)
    model = model or AllEmbeddings(settings, WIDTHS)
    return SimpleNamespace(model=model.eval(), target=Target(settings, 2.6, 20.0), settings=settings)


class Additive(torch.nn.Module):
    """log price from clip's first column and the sum of qwen_text's last three: nothing else matters."""

    def forward(self, embeddings, valid):
        clip = torch.where(valid[:, 0], embeddings["clip_image"][:, 0], 0.0)
        structural = torch.where(valid[:, 3], embeddings["qwen_text"][:, -3:].sum(dim=1), 0.0)
        return FusionOutput(8 + 0.5 * clip + 0.2 * structural)


@pytest.mark.parametrize("variant", ["hierarchical", "concat", "flat", "tokens"])
def test_contributions_sum_to_the_prediction_and_missing_ones_are_zero(variant):
    settings = AllEmbeddingsSettings(width=16, heads=2, variant=variant)
    torch.manual_seed(0)
    model = AllEmbeddings(settings, WIDTHS)
    model.set_output_bias(2.6)
    trained, table = trained_model(model), make_table()
    values, nothing = shapley_values(trained, table)
    np.testing.assert_allclose(values.sum(axis=1), ln_price(trained, table) - nothing, rtol=0, atol=1e-12)
    masked = replace(table, valid=torch.zeros_like(table.valid))
    np.testing.assert_array_equal(nothing, ln_price(trained, masked))
    assert (values[~table.valid.numpy()] == 0).all()
    assert (np.abs(values[table.valid.numpy()]) > 0).mean() > 0.99


def test_an_additive_model_gets_its_own_terms_back():
    trained, table = trained_model(Additive()), make_table()
    values, _ = shapley_values(trained, table)
    # at a log price of 8, ln price is log1p(price) to 3e-4
    clip = torch.where(table.valid[:, 0], 0.5 * table.embeddings["clip_image"][:, 0], 0.0)
    structural = torch.where(table.valid[:, 3], 0.2 * table.embeddings["qwen_text"][:, -3:].sum(dim=1), 0.0)
    np.testing.assert_allclose(values[:, 0], clip, atol=2e-3)
    np.testing.assert_allclose(values[:, 3], structural, atol=2e-3)
    assert (values[:, 1:3] == 0).all()


def test_two_modalities_that_say_the_same_share_it():
    class Either(torch.nn.Module):
        def forward(self, embeddings, valid):
            return FusionOutput(3 + (valid[:, 0] | valid[:, 1]).float())

    table = make_table(missing=0)
    values, _ = shapley_values(trained_model(Either()), table)
    np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-6)
    assert (values[:, 0] > 0.4).all() and (values[:, 2:] == 0).all()


def test_permutation_of_an_ignored_modality_changes_nothing():
    table = make_table(rows=200)
    importance = permutation_importance(trained_model(Additive()), table, repeats=3, seed=0)
    importance = importance.set_index("group")
    assert set(importance.index) == {*MODALITIES, "all images", "all texts", "amounts in qwen_text"}
    for ignored in ("siglip_image", "siglip_text"):
        assert (importance.loc[ignored] == 0).all()
    np.testing.assert_array_equal(importance.loc["all images"], importance.loc["clip_image"])
    assert "amounts in qwen_text" in importance.index


def test_the_columns_of_the_table_are_dealt_out_too():
    class OfColumns(torch.nn.Module):
        def forward(self, embeddings, valid):
            return FusionOutput(2 + embeddings["tabular"][:, 0])

    table = make_table(rows=200)
    columns = torch.rand(200, 3, generator=torch.Generator().manual_seed(3))
    valid = torch.cat([table.valid, torch.ones(200, 1, dtype=torch.bool)], dim=1)
    table = FusionTable.of(table.rows, table.embeddings | {"tabular": columns}, valid, table.meta)
    trained = trained_model(OfColumns())
    table.rows["price"] = np.exp(ln_price(trained, table))
    importance = permutation_importance(trained, table, repeats=2, seed=0)
    assert importance.loc[0, "group"] == "tabular" and importance.loc[0, "smape_increase"] > 5
    assert (importance.loc[1:, "smape_increase"] == 0).all()


def test_what_the_price_depends_on_is_important():
    table = make_table(rows=200, missing=0.1)
    trained = trained_model(Additive())
    table.rows["price"] = np.exp(ln_price(trained, table))  # a perfect model: any permutation makes it worse
    importance = permutation_importance(trained, table, repeats=4, seed=0).set_index("group")
    for group in ("clip_image", "qwen_text", "amounts in qwen_text"):
        assert importance.loc[group, "smape_increase"] > 5 * importance.loc[group, "spread"] > 0
    again = permutation_importance(trained, table, repeats=4, seed=0).set_index("group")
    pd.testing.assert_frame_equal(importance, again)


def test_a_permutation_moves_values_and_mask_together():
    table, order = make_table(), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved = permuted(table, ("siglip_text",), order)
    assert torch.equal(moved.embeddings["siglip_text"], table.embeddings["siglip_text"][order])
    assert torch.equal(moved.valid[:, 2], table.valid[order, 2])
    assert torch.equal(moved.valid[:, [0, 1, 3]], table.valid[:, [0, 1, 3]])
    assert torch.equal(moved.embeddings["clip_image"], table.embeddings["clip_image"])

    columns = permuted_columns(table, "qwen_text", 3, torch.Generator().manual_seed(1))
    before, after, valid = table.embeddings["qwen_text"], columns.embeddings["qwen_text"], table.valid[:, 3]
    assert torch.equal(before[:, :-3], after[:, :-3]) and torch.equal(before[~valid], after[~valid])
    assert (before[valid, -3:] != after[valid, -3:]).any(dim=1).float().mean() > 0.8
    assert set(map(tuple, before[valid, -3:].tolist())) == set(map(tuple, after[valid, -3:].tolist()))


def test_products_span_the_prices_or_are_named():
    table, predicted = make_table(), np.random.default_rng(0).normal(size=40)
    rows = choose_products(table, (), 3, predicted)
    ranks = sorted(predicted.argsort().argsort()[rows].tolist())
    assert ranks == [6, 20, 33]
    assert choose_products(table, ("id 7", "id 2"), 3, predicted).tolist() == [7, 2]
    with pytest.raises(InputError, match="--ids x: not among the run's 40 validation rows"):
        choose_products(table, ("id 7", "x"), 3, predicted)


@pytest.fixture(scope="module")
def run(empty_workspace, write_embedding):
    """A run whose clip image says the price, siglip image is noise, siglip text is left out."""
    workspace = empty_workspace
    rows = workspace.prepared("train")
    generator = np.random.default_rng(0)
    has_image = np.random.default_rng(1).random(len(rows)) > 0.1
    for name, width in WIDTHS.items():
        matrix = generator.normal(size=(len(rows), width))
        extra = {"valid": has_image} if name.endswith("image") else {}
        if name == "clip_image":
            matrix[:, 0] = np.log(rows["price"]) - 2.6
            extra["encoder_folds"] = splits.roles(0).fitted_on
        if name == "qwen_text":
            matrix[:, -3:] = rows[list(STRUCTURAL_FEATURES)].fillna(0)
            extra["last_columns"] = list(STRUCTURAL_FEATURES)
        write_embedding(workspace, "train", name, matrix, **extra)
    flags = ["--preset", "tiny", "--width", "16", "--heads", "2", "--epochs", "25", "--batch-size", "64"]
    used = ["--use", "clip_image", "siglip_image", "qwen_text", "--device", "cpu"]
    train.main(["--workspace", str(workspace.root), *flags, *used])
    return workspace


def test_explain_a_finished_run(run):
    importance = explain.main(["--workspace", str(run.root), "--products", "3", "--device", "cpu"])
    importance = importance.set_index("group")["smape_increase"]
    assert set(importance.index) == {
        "clip_image", "siglip_image", "qwen_text", "all images", "amounts in qwen_text",
    }  # fmt: skip
    assert importance["clip_image"] > 10 > importance["siglip_image"]

    folder = run.path("run", name="fusion_all_embeddings") / "explanation"
    products = pd.read_csv(folder / "products.csv", dtype={"sample_id": str})
    held_out = run.folds()[lambda fold: fold.isin(splits.roles(0).validate)].index
    assert len(products) == 3 and set(products["sample_id"]) <= set(held_out)
    factors = products.filter(like="factor_")
    assert (factors["factor_siglip_text"] == 1).all()
    predicted = products["nothing_known"] * factors.prod(axis=1)
    np.testing.assert_allclose(predicted, products["predicted"], rtol=1e-3)
    for name in ("importance", *(f"products/{sample_id}" for sample_id in products["sample_id"])):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    explain.main(["--workspace", str(run.root), "--ids", held_out[5], "--repeats", "1"])
    assert (folder / "products" / f"{held_out[5]}.png").is_file()
    seen = run.folds().index.difference(held_out)[0]
    with pytest.raises(InputError, match=f"--ids {seen}: not among"):
        explain.main(["--workspace", str(run.root), "--ids", seen])


def test_leaked_rows_are_refused(run, write_embedding, tmp_path):
    shutil.copytree(run.root, tmp_path, dirs_exist_ok=True)
    leaked = np.zeros((len(run.prepared("train")), 5))
    write_embedding(Workspace(tmp_path), "train", "siglip_image", leaked, encoder_folds=(0, 1))
    with pytest.raises(InputError, match="no honest validation score.*siglip_image"):
        explain.main(["--workspace", str(tmp_path)])


def test_a_final_model_has_no_rows_to_explain(run):
    flags = ["--preset", "tiny", "--width", "16", "--heads", "2", "--epochs", "1", "--holdout", "null"]
    train.main(["--workspace", str(run.root), *flags, "--run", "final", "--device", "cpu"])
    with pytest.raises(InputError, match="--holdout null: no rows are left to validate"):
        explain.main(["--workspace", str(run.root), "--run", "final"])


@pytest.mark.parametrize("flags", [["--products", "-1"], ["--repeats", "0"]])
def test_senseless_settings_are_refused(flags):
    with pytest.raises(InputError, match=flags[0]):
        explain.main(flags)
