"""Embeddings beside the word counts."""

import numpy as np
import pytest

from contracts.errors import InputError
from contracts.splits import fitted_on, roles
from word_models.embedding_columns import EmbeddingColumns, read_embedding
from word_models.features import build_features

FROZEN = fitted_on(encoder_folds=())


@pytest.fixture(scope="module")
def plain(tables):
    return build_features(**tables)


def add_embeddings(workspace, tables, plain):
    """The features of both tables with the embedding "encoder", and how it becomes columns."""
    contents = {name: read_embedding(workspace, "encoder", name) for name in tables}
    ids = {name: table["sample_id"].to_numpy() for name, table in tables.items()}
    columns = EmbeddingColumns.fit("encoder", contents["train"], ids["train"])
    return {name: columns.add_to(plain[name], ids[name], contents[name]) for name in tables}, columns


def test_nameless_columns_are_a_view_of_unit_rows_and_named_ones_are_structural(
    workspace, tables, plain, write_embedding
):
    rng = np.random.default_rng(0)
    for split, table in tables.items():
        write_embedding(split, rng.normal(3, 5, size=(len(table), 52)), FROZEN, names=["log_price", "size"])
    matrix = read_embedding(workspace, "encoder", "train").embeddings.copy()
    train = add_embeddings(workspace, tables, plain)[0]["train"]
    *known, view = train.meanings
    assert len(known) == len(plain["train"].meanings)
    assert view.shape[1] == 50
    np.testing.assert_allclose(np.linalg.norm(view, axis=1), 1, rtol=1e-4)
    assert np.abs(view.mean()) < 0.01  # centred: written around 3
    assert list(train.columns)[-2:] == ["encoder: log_price", "encoder: size"]
    for column, name in ((50, "encoder: log_price"), (51, "encoder: size")):
        expected = (matrix[:, column] - matrix[:, column].mean()) / matrix[:, column].std()
        np.testing.assert_allclose(train.columns_named(name)[:, 0], expected, atol=1e-4)


def test_a_row_without_an_embedding_has_the_mean_and_no_meaning(workspace, tables, plain, write_embedding):
    rng = np.random.default_rng(0)
    for split, table in tables.items():
        valid = np.arange(len(table)) % 3 > 0
        write_embedding(split, rng.normal(3, 5, size=(len(table), 5)), FROZEN, valid=valid)
    added, _ = add_embeddings(workspace, tables, plain)
    for split in ("train", "test"):
        assert np.all(added[split].columns_named("encoder: log_price")[::3] == 0)
        assert np.all(added[split].meanings[-1][::3] == 0)
        assert np.all(np.linalg.norm(added[split].meanings[-1][1::3], axis=1) > 0.99)


def test_unusable_files_are_refused(workspace, tables, plain, write_embedding):
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(len(table), 3)) for table in tables.values())
    write_embedding("train", train, fitted_on(encoder_folds=roles(0).fitted_on))
    write_embedding("test", test, FROZEN)
    with pytest.raises(InputError, match="encoder_train.pkl: its encoder was fitted on rows that it embeds"):
        read_embedding(workspace, "encoder", "train")

    write_embedding("train", train, FROZEN)
    write_embedding("test", test, FROZEN, names=["size"])
    with pytest.raises(InputError, match=r"encoder_test.pkl: 3 columns.*'size'.*'log_price'"):
        add_embeddings(workspace, tables, plain)

    write_embedding("test", test, FROZEN, checkpoint="other")
    with pytest.raises(
        InputError, match="encoder_test.pkl: made by checkpoint other.*run text, checkpoint c"
    ):
        add_embeddings(workspace, tables, plain)

    write_embedding("train", train, FROZEN, valid=np.zeros(len(train), bool))
    write_embedding("test", test, FROZEN)
    with pytest.raises(InputError, match="--embeddings encoder: no training row"):
        add_embeddings(workspace, tables, plain)


def test_loaded_columns_are_the_fitted_ones(workspace, tables, plain, write_embedding, tmp_path):
    rng = np.random.default_rng(0)
    for split, table in tables.items():
        write_embedding(split, rng.normal(3, 5, size=(len(table), 7)), FROZEN)
    added, columns = add_embeddings(workspace, tables, plain)
    columns.save(tmp_path / "saved")
    loaded = EmbeddingColumns.load(tmp_path / "saved", "encoder")
    assert loaded.encoder == {"stage": "qwen3_finetune", "run": "text", "checkpoint": "c"}
    content = read_embedding(workspace, "encoder", "test")
    again = loaded.add_to(plain["test"], tables["test"]["sample_id"].to_numpy(), content)
    np.testing.assert_array_equal(again.dense, added["test"].dense)
    assert again.columns == added["test"].columns
