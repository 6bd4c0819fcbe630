"""Saved models: they price the test table as training did, and any other table."""

import numpy as np
import pytest

from contracts.embeddings import Embeddings
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.predictions import read_predictions
from contracts.splits import fitted_on
from training.run_folder import RunFolder
from training.sealed import note_change
from word_models import predict, train
from word_models.config import WordModelSettings
from word_models.models import MODELS
from word_models.saved import WordModel

FEW_STEPS = ["--seeds", "1", "--kernel-steps", "3", "--updates", "1", "--trees", "30", "--svd", "16"]
FROZEN = fitted_on(encoder_folds=())


@pytest.fixture
def embeddings(workspace, write_embedding):
    """The matrix of each embedding file "encoder"; every fifth row has none."""
    rng = np.random.default_rng(0)
    matrices = {}
    for table in ("train", "test"):
        rows = len(workspace.prepared(table))
        matrices[table] = rng.normal(2, 1, size=(rows, 9)).astype(np.float32)
        write_embedding(table, matrices[table], FROZEN, valid=np.arange(rows) % 5 > 0)
    return matrices


def embeddings_of(workspace, table="test", **changed):
    from contracts.embeddings import read_embeddings

    content = read_embeddings(workspace.path("embeddings", name="encoder", split=table))
    content.meta.update(changed)
    return content


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_loaded_model_gives_the_written_prices_to_rows_alone_and_in_any_order(
    workspace, embeddings, kind
):
    flags = ["--workspace", str(workspace.root), "--model", kind, "--embeddings", "encoder"]
    train.main([*flags, *FEW_STEPS])
    name = f"words_{kind}_encoder"
    written = np.log(read_predictions(workspace, name, "test").price)
    folder = workspace.path("run", name=name)
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".joblib", ".pickle")]

    model = WordModel.load(folder)
    assert model.embeddings == {"encoder": {"stage": "qwen3_finetune", "run": "text", "checkpoint": "c"}}
    table = workspace.prepared("test")
    content = embeddings_of(workspace)
    np.testing.assert_allclose(model.predict(table, {"encoder": content}), written, rtol=1e-7, atol=1e-7)

    # another order of the rows than that of the embeddings
    turned = model.predict(table[::-1].reset_index(drop=True), {"encoder": embeddings_of(workspace)})
    np.testing.assert_allclose(turned[::-1], written, rtol=1e-5, atol=1e-5)
    for row in (0, 31):
        one = Embeddings(
            content.sample_ids[[row]], content.embeddings[[row]], content.valid[[row]], content.meta
        )
        alone = model.predict(table.iloc[[row]], {"encoder": one})
        np.testing.assert_allclose(alone, written[[row]], rtol=1e-5, atol=1e-5)
    assert len(model.predict(table.iloc[:0], {"encoder": content})) == 0


def test_the_run_folder_says_what_was_fitted_and_what_it_scores(workspace):
    score = train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    folder = workspace.path("run", name="words_ridge")
    run = RunFolder.finished(folder, "word_models")
    assert run.settings(WordModelSettings).model == "ridge"
    inputs = read_json(folder / "manifest.json")["inputs"]
    tables = [str(workspace.path("prepared", split=table)) for table in ("train", "test")]
    assert set(inputs) == {*tables, str(workspace.path("folds"))}
    summary = read_json(folder / "summary.json")
    assert {name: summary[name] for name in score} == score
    assert summary["smape"] < summary["constant_smape"] - 10


def test_settings_of_older_runs_stay_readable(workspace):
    train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    folder = workspace.path("run", name="words_ridge")
    stored = read_json(folder / "settings.json")
    del stored["updates"]
    write_json(folder / "settings.json", stored | {"epochs": 6})
    assert RunFolder(folder).settings(WordModelSettings).updates == WordModelSettings().updates


def test_another_table_is_priced_from_the_saved_model_alone(workspace):
    train.main(["--workspace", str(workspace.root), "--model", "ridge"])
    written = read_predictions(workspace, "words_ridge", "test").log_price
    test = workspace.prepared("test")
    new = test[::-1].assign(sample_id="new" + test["sample_id"][::-1])
    new.to_csv(workspace.path("prepared", split="new"), index=False)
    # nothing that training read may be needed
    for table in ("train", "test"):
        workspace.path("prepared", split=table).unlink()
    predict.main(["new", "--run", "words_ridge", "--workspace", str(workspace.root)])
    priced = read_predictions(workspace, "words_ridge", "new")
    assert priced.sample_ids.tolist() == new["sample_id"].tolist()
    np.testing.assert_allclose(priced.log_price[::-1], written, rtol=1e-12)
    assert priced.meta["stage"] == "word_models.train" and priced.meta["model"] == "words_ridge"


def test_without_a_test_table_the_score_and_the_model_remain(workspace):
    flags = ["--workspace", str(workspace.root), "--model", "ridge"]
    train.main(flags)
    test = workspace.prepared("test")
    workspace.path("prepared", split="test").unlink()
    score = train.main(flags)
    assert score["smape"] < score["constant_smape"] - 10
    folder = workspace.path("run", name="words_ridge")
    assert (folder / "COMPLETE").is_file()
    # the prices of the model before would pass for those of this one
    assert not workspace.path("predictions", name="words_ridge", split="test").exists()
    assert np.isfinite(WordModel.load(folder).predict(test)).all()


def test_a_model_that_is_no_better_than_the_constant_is_named(workspace, capsys):
    table = workspace.prepared("train")
    table["price"] = table["price"].sample(frac=1, random_state=0).to_numpy()  # no text tells the price
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    flags = ["--workspace", str(workspace.root), "--model", "neighbours"]
    score = train.main(flags)
    assert "words_neighbours: no better than one constant price" in capsys.readouterr().out
    assert score["smape"] > score["constant_smape"] - 5


def test_what_would_fail_at_the_end_is_refused_at_the_start(
    workspace, embeddings, write_embedding, monkeypatch
):
    monkeypatch.setattr(
        MODELS["ridge"], "fit", lambda *_: pytest.fail("fitted before the inputs were checked")
    )
    flags = ["--workspace", str(workspace.root), "--model", "ridge", "--embeddings", "encoder"]
    write_embedding("test", embeddings["test"], FROZEN, checkpoint="d")
    with pytest.raises(InputError, match="encoder_test.pkl: made by checkpoint d"):
        train.main(flags)
    workspace.path("embeddings", name="encoder", split="test").unlink()
    with pytest.raises(InputError, match="encoder_test.pkl: no such embedding file"):
        train.main(flags)

    other = workspace.path("run", name="text")
    write_json(other / "settings.json", {"pooling": "mean"})
    with pytest.raises(InputError, match="text: the run of another stage"):
        train.main(["--workspace", str(workspace.root), "--model", "ridge", "--predictions", "text"])
    assert (other / "settings.json").is_file()


def test_what_cannot_be_priced_is_refused(workspace, embeddings):
    flags = ["--workspace", str(workspace.root)]
    train.main([*flags, "--model", "ridge", "--embeddings", "encoder"])
    run = "words_ridge_encoder"
    model = WordModel.load(workspace.path("run", name=run))
    table = workspace.prepared("test")
    with pytest.raises(InputError, match="embedding encoder: the model reads it, but it is not given"):
        model.predict(table)
    other = embeddings_of(workspace, checkpoint="d")
    with pytest.raises(InputError, match="encoder_test.pkl: made by checkpoint d.*run text, checkpoint c"):
        model.predict(table, {"encoder": other})
    with pytest.raises(InputError, match="train: the saved model was fitted on these rows"):
        predict.main(["train", "--run", run, *flags])
    with pytest.raises(InputError, match=r"word_model.json: no saved model; run python -m word_models.train"):
        predict.main(["test", "--run", "nothing", *flags])
    path = workspace.path("run", name=run) / "word_model.json"
    write_json(path, read_json(path) | {"schema": 99})
    note_change(path)
    with pytest.raises(InputError, match="schema 99, this version reads 1"):
        predict.main(["test", "--run", run, *flags])
