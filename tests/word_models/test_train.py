"""word_models.train as a command: honest predictions of every row, and what their files say about it."""

import numpy as np
import pytest

from contracts.errors import InputError
from contracts.predictions import read_predictions
from contracts.smape import smape
from contracts.splits import fitted_on, fitted_out_of_fold, roles
from word_models import train
from word_models.models import MODELS

FEW_STEPS = ["--seeds", "1", "--kernel-steps", "3", "--updates", "1", "--trees", "40"]


@pytest.mark.parametrize("model", list(MODELS))
def test_each_model_learns_and_prices_every_row_out_of_fold(workspace, model):
    flags = ["--workspace", str(workspace.root), "--model", model, "--seeds", "1", "--svd", "32"]
    score = train.main([*flags, "--updates", "60", "--lr", "5e-3", "--kernel-steps", "30"])["smape"]
    price = workspace.prepared("train")["price"].to_numpy()
    assert score < smape(price, np.full(len(price), np.median(price))) - 8
    for split in ("train", "test"):
        predictions = read_predictions(workspace, f"words_{model}", split)
        assert predictions.sample_ids.tolist() == workspace.prepared(split)["sample_id"].tolist()
    written = read_predictions(workspace, f"words_{model}", "train")
    assert smape(price, written.price) == pytest.approx(score)


@pytest.mark.parametrize("model", ["ridge", "boosted", "mlp_on_kernel"])
def test_a_rows_own_price_never_reaches_its_prediction(workspace, model):
    """Change the prices of one hold-out: its own predictions stay, those of others move."""
    flags = ["--workspace", str(workspace.root), "--model", model, *FEW_STEPS]
    train.main(flags)
    before = read_predictions(workspace, f"words_{model}", "train").log_price
    table = workspace.prepared("train")
    asked = np.isin(workspace.folds()[table["sample_id"]], roles(2).validate)
    table.loc[asked, "price"] *= 7
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    train.main(flags)
    after = read_predictions(workspace, f"words_{model}", "train").log_price
    np.testing.assert_allclose(after[asked], before[asked], rtol=1e-6)
    assert np.abs(after[~asked] - before[~asked]).max() > 0.1


def test_a_row_without_a_fold_is_named_and_nothing_is_written(workspace):
    path = workspace.path("folds")
    header, first, second, *others = path.read_text().splitlines()
    path.write_text("\n".join([header, first, *others]) + "\n")
    with pytest.raises(InputError, match=f"no fold for sample_id {second.split(',')[0]} "):
        train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    assert not (workspace.root / "predictions").exists()


def test_the_files_say_what_their_model_was_fitted_on(workspace):
    train.main(["--workspace", str(workspace.root), "--model", "ridge", "--predictions", "cheap"])
    written = read_predictions(workspace, "cheap", "train")
    written.require_unseen()
    assert written.meta["fitted_on"] == fitted_out_of_fold(5)
    assert written.meta["stage"] == "word_models.train"
    assert written.meta["model"] == "cheap" and written.meta["kind"] == "ridge"
    assert read_predictions(workspace, "cheap", "test").meta["fitted_on"] == [list(range(10))] * 10


def test_the_encoder_behind_a_model_counts_as_fitted(workspace, write_embedding):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = len(workspace.prepared(split))
        write_embedding(split, rng.normal(size=(rows, 3)), fitted_out_of_fold(10))
    train.main(["--workspace", str(workspace.root), "--model", "ridge", "--embeddings", "encoder"])
    seen = read_predictions(workspace, "words_ridge_encoder", "train").meta["fitted_on"]
    # the encoder of fold 0 was also fitted on fold 1, which the hold-out 0 leaves out of the model
    assert seen == [[other for other in range(10) if other != fold] for fold in range(10)]


def test_an_out_of_fold_embedding_helps_and_a_leaked_one_is_refused(workspace, write_embedding):
    rng = np.random.default_rng(0)
    ln_price = np.log(workspace.prepared("train")["price"].to_numpy())
    noise = rng.normal(size=len(ln_price))
    informative = np.stack([noise, ln_price + rng.normal(0, 0.1, len(ln_price))], axis=1)
    write_embedding("train", informative, fitted_out_of_fold(5))
    write_embedding("test", rng.normal(size=(60, 2)), fitted_out_of_fold(5))
    flags = ["--workspace", str(workspace.root), "--model", "ridge"]
    without = train.main(flags)["smape"]
    assert train.main([*flags, "--embeddings", "encoder"])["smape"] < without - 10

    write_embedding("train", informative, fitted_on(encoder_folds=roles(0).fitted_on))
    with pytest.raises(InputError, match="encoder_train.pkl: its encoder was fitted on rows that it embeds"):
        train.main([*flags, "--embeddings", "encoder"])


def test_a_kill_while_fitting_again_leaves_the_saved_model_as_it_was(workspace, killed_at):
    flags = ["--workspace", str(workspace.root), "--model", "ridge"]
    train.main(flags)
    folder = workspace.path("run", name="words_ridge")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with killed_at(MODELS["ridge"], "fit", 6):  # the sixth fit is the one of all rows
        train.main(flags)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
