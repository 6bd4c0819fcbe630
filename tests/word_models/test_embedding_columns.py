"""Embeddings beside the word counts."""

import numpy as np
import pytest

from contracts.errors import InputError
from contracts.splits import fitted_on, roles
from word_models.embedding_columns import add_embeddings, read_embedding_files
from word_models.features import build_features

FROZEN = fitted_on(encoder_folds=())


@pytest.fixture(scope="module")
def plain(tables):
    return build_features(**tables)


def test_nameless_columns_are_a_view_of_unit_rows_and_named_ones_are_structural(
    workspace, tables, plain, write_embedding
):
    rng = np.random.default_rng(0)
    for split, table in tables.items():
        write_embedding(split, rng.normal(3, 5, size=(len(table), 52)), FROZEN, names=["log_price", "size"])
    files = read_embedding_files(workspace, "encoder")
    matrix = files["train"].embeddings.copy()
    train = add_embeddings(plain, tables, "encoder", files)["train"]
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
    added = add_embeddings(plain, tables, "encoder", read_embedding_files(workspace, "encoder"))
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
        read_embedding_files(workspace, "encoder")

    write_embedding("train", train, FROZEN)
    write_embedding("test", test, FROZEN, names=["size"])
    with pytest.raises(InputError, match=r"encoder_test.pkl: 3 columns.*'size'.*'log_price'"):
        read_embedding_files(workspace, "encoder")

    write_embedding("train", train, FROZEN, valid=np.zeros(len(train), bool))
    write_embedding("test", test, FROZEN)
    with pytest.raises(InputError, match="--embeddings encoder: no training row"):
        add_embeddings(plain, tables, "encoder", read_embedding_files(workspace, "encoder"))
