import numpy as np
import pytest
import torch

from contracts.catalog import read_table
from contracts.embeddings import Embeddings, write_embeddings
from contracts.errors import InputError
from contracts.smape import smape
from contracts.splits import fitted_on, fitted_out_of_fold, roles, split_hash
from contracts.workspace import Workspace
from word_models import train
from word_models.config import WordModelSettings
from word_models.features import add_embeddings, build_features
from word_models.models import MODELS, kernel_estimates, neighbour_features
from word_models.sparse_mlp import PriceBins, SparseMlp, as_tensors
from word_models.surroundings import COLUMNS, PRICES


@pytest.fixture(scope="module")
def tables(sample_workspace):
    workspace = Workspace(sample_workspace)
    return workspace.prepared("train"), workspace.prepared("test")


@pytest.fixture
def workspace(sample_workspace, tmp_path):
    import shutil

    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    return Workspace(tmp_path)


@pytest.mark.parametrize("model", list(MODELS))
def test_each_model_learns_and_prices_every_row_out_of_fold(workspace, model):
    flags = [
        "--workspace",
        str(workspace.root),
        "--model",
        model,
        "--seeds",
        "1",
        "--epochs",
        "12",
        "--svd",
        "32",
        "--kernel-steps",
        "30",
    ]
    score = train.main([*flags, "--lr", "5e-3"])["smape"]
    table = workspace.prepared("train")
    price = table["price"].to_numpy()
    assert score < smape(price, np.full(len(price), np.median(price))) - 8
    for split in ("train", "test"):
        predictions = read_table(workspace.path("predictions", name=f"words_{model}", split=split))
        assert predictions["sample_id"].tolist() == workspace.prepared(split)["sample_id"].tolist()
        assert np.isfinite(predictions["log_price"].astype(float)).all()


@pytest.mark.parametrize("model", ["ridge", "boosted", "mlp_on_kernel"])
def test_a_rows_own_price_never_reaches_its_prediction(workspace, model):
    """Change the prices of one hold-out: its own predictions stay, those of others move."""
    flags = ["--workspace", str(workspace.root), "--model", model, "--seeds", "1"]
    flags += ["--kernel-steps", "3", "--epochs", "2"]
    train.main(flags)
    path = workspace.path("predictions", name=f"words_{model}", split="train")
    before = read_table(path)["log_price"].astype(float)
    prepared = workspace.path("prepared", split="train")
    table = workspace.prepared("train")
    asked = np.isin(workspace.folds()[table["sample_id"]], roles(2).validate)
    table.loc[asked, "price"] *= 7
    table.to_csv(prepared, index=False)
    train.main(flags)
    after = read_table(path)["log_price"].astype(float)
    np.testing.assert_allclose(after[asked], before[asked], rtol=1e-6)
    assert (after[~asked] - before[~asked]).abs().max() > 0.1


def test_a_second_model_learns_from_prices_by_other_rows_only(tables):
    """Were the kernel's fit of a row's own price shown, it would correlate with the price far beyond other rows'."""
    features, _ = build_features(*tables)
    shuffled = np.random.default_rng(0).permutation(np.log(tables[0]["price"].to_numpy()))
    fit, apply = features[np.arange(300)], features[np.arange(300, 400)]
    settings = WordModelSettings(model="boosted", kernel_steps=5)
    left_out, predicted = kernel_estimates(settings, fit, shuffled[:300], apply)
    near = left_out.surroundings.reshape(300, -1, len(COLUMNS))
    near[..., :PRICES] += left_out.ln_price[:, None, None]  # the prices themselves
    for column in (left_out.ln_price, *near.reshape(300, -1).T):
        # prices without meaning cannot be foreseen
        assert np.corrcoef(column, shuffled[:300])[0, 1] < 0.2
    assert len(predicted.ln_price) == len(predicted.surroundings) == 100


def test_vocabulary_comes_from_training_texts(tables):
    train_table, test_table = tables
    changed = test_table.assign(entity_name="ξξξψ", catalog_content="ξξξψ ψψ")
    features, other = build_features(train_table, changed)
    assert features.terms.shape[1] == other.terms.shape[1]
    assert other.terms.nnz == 0
    again, _ = build_features(train_table, test_table)
    assert (again.terms != features.terms).nnz == 0


def test_neighbours_of_a_fitted_row_do_not_hold_its_own_price(tables):
    features, _ = build_features(*tables)
    ln_price = np.log(tables[0]["price"].to_numpy())
    seen = neighbour_features(features, ln_price, features, skip_self=True)
    moved = ln_price.copy()
    moved[17] += 5
    assert neighbour_features(features, moved, features, skip_self=True)[17] == pytest.approx(seen[17])
    own = neighbour_features(features, ln_price, features)
    assert np.mean(own[:, 1] == ln_price) > 0.9  # without skip_self the nearest product is the row itself


def test_best_price_minimises_expected_smape():
    bins = PriceBins(9, scale=1.0)
    probability = torch.softmax(torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    best = bins.best_price(probability)
    prices = torch.exp(bins.centres)
    for row in range(5):

        def expected(ln, row=row):
            p = np.exp(ln)
            return sum(
                q * smape([a], [p]) for q, a in zip(probability[row].tolist(), prices.tolist(), strict=True)
            )

        assert all(expected(best[row].item()) <= expected(c) + 1e-3 for c in np.linspace(-2.8, 3.0, 36))


def test_batch_of_rows_equals_the_dense_product(tables):
    features, _ = build_features(*tables)
    rows = features[np.arange(7)]
    torch.manual_seed(0)
    model = SparseMlp(terms=rows.terms.shape[1], structural=rows.dense.shape[1], hidden=8, outputs=2)
    dense = torch.from_numpy(rows.terms.toarray()) @ model.terms.weight + model.structural(
        torch.from_numpy(rows.dense)
    )
    torch.testing.assert_close(model(*as_tensors(rows)), model.layers(dense), rtol=1e-4, atol=1e-5)


def test_senseless_settings():
    with pytest.raises(InputError, match="--bins 2"):
        WordModelSettings(bins=2)
    with pytest.raises(InputError, match="--epochs 0"):
        WordModelSettings(epochs=0)


def write_columns(workspace, split, matrix, fitted_on):
    ids = workspace.prepared(split)["sample_id"].to_numpy(str)
    meta = {"name": "encoder", "split": split, "model": "m", "checkpoint": "c", "command": "test",
            "fitted_on": fitted_on, "last_columns": ["log_price"],
            "split_hash": split_hash(workspace.folds())}  # fmt: skip
    path = workspace.path("embeddings", name="encoder", split=split)
    write_embeddings(path, Embeddings(ids, matrix.astype(np.float32), np.ones(len(ids), bool), meta))


def test_an_out_of_fold_embedding_helps_and_a_leaked_one_is_refused(workspace):
    rng = np.random.default_rng(0)
    ln_price = np.log(workspace.prepared("train")["price"].to_numpy())
    informative = np.stack([rng.normal(size=len(ln_price)), ln_price + rng.normal(0, 0.1, len(ln_price))], 1)
    write_columns(workspace, "train", informative, fitted_out_of_fold(5))
    write_columns(workspace, "test", rng.normal(size=(60, 2)), fitted_out_of_fold(5))
    flags = ["--workspace", str(workspace.root), "--model", "ridge"]
    without = train.main(flags)["smape"]
    assert train.main([*flags, "--embeddings", "encoder"])["smape"] < without - 10
    assert workspace.path("predictions", name="words_ridge_encoder", split="test").is_file()

    write_columns(workspace, "train", informative, fitted_on(encoder_folds=roles(0).fitted_on))
    with pytest.raises(InputError, match="encoder_train.pkl: its encoder was fitted on rows that it embeds"):
        train.main([*flags, "--embeddings", "encoder"])


def test_nameless_columns_are_a_view_of_unit_rows_and_named_ones_are_structural(workspace, tables):
    rng = np.random.default_rng(0)
    for split, rows in (("train", len(workspace.prepared("train"))), ("test", 60)):
        write_columns(workspace, split, rng.normal(3, 5, size=(rows, 51)), fitted_on(encoder_folds=()))
    plain = dict(zip(("train", "test"), build_features(*tables), strict=True))
    train_features = add_embeddings(plain, workspace, ("encoder",))["train"]
    *known, view = train_features.meanings
    assert len(known) == len(plain["train"].meanings)
    assert view.shape[1] == 50
    np.testing.assert_allclose(np.linalg.norm(view, axis=1), 1, rtol=1e-4)
    assert np.abs(view.mean()) < 0.01  # centred: written around 3
    named = train_features.structural[:, plain["train"].structural.shape[1] :]
    np.testing.assert_allclose([named.std(), np.abs(named.mean())], [1, 0], atol=1e-4)
