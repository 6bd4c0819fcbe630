import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from contracts.splits import (
    N_FOLDS,
    N_HOLDOUTS,
    assign_folds,
    fitted_on,
    group_rows,
    leaked_folds,
    read_folds,
    roles,
    split_hash,
    write_folds,
)  # fmt: skip


def products(rows=1000):
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "sample_id": [f"{row:04d}" for row in range(rows)],
            "catalog_content": [
                f"Item  Name: product {row // 2 if row < 100 else row}" for row in range(rows)
            ],
            "image": [
                "" if row % 7 == 0 else f"{row - row % 3 if row > 900 else row}.jpg" for row in range(rows)
            ],
            "price": np.exp(generator.normal(2.6, 1, rows)),
        }
    )


def test_groups_join_by_picture_or_text_and_never_by_an_empty_key():
    picture = pd.Series(["a", "a", "", "", "b", "c"])
    text = pd.Series(["1", "2", "2", "3", "4", "5"])
    groups = group_rows(picture, text)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 4


def test_folds_keep_groups_together_and_balance_price():
    table = products()
    folds = assign_folds(table)["fold"].to_numpy()
    assert set(folds) == set(range(N_FOLDS))
    for row in range(0, 100, 2):
        assert folds[row] == folds[row + 1]  # same text
    pictures = table.assign(fold=folds)[table["image"] != ""].groupby("image")["fold"].nunique()
    assert (pictures == 1).all()
    medians = pd.Series(np.log(table["price"])).groupby(folds).median()
    assert medians.max() - medians.min() < 0.25
    assert np.bincount(folds).max() - np.bincount(folds).min() < 20


def test_every_row_is_validated_once_and_never_fitted_at_the_same_time():
    validated = [fold for holdout in range(N_HOLDOUTS) for fold in roles(holdout).validate]
    assert sorted(validated) == list(range(N_FOLDS))
    for holdout in range(N_HOLDOUTS):
        role = roles(holdout)
        assert sorted(role.fit + role.stop + role.validate) == list(range(N_FOLDS))
    assert roles(None).validate == ()
    with pytest.raises(InputError, match="--holdout 5"):
        roles(5)


def test_leak_is_seen():
    role = roles(1)
    assert leaked_folds(fitted_on(encoder_folds=role.fitted_on), role.validate) == []
    assert leaked_folds(fitted_on(encoder_folds=roles(0).fitted_on), role.validate) == [2, 3]
    assert leaked_folds(fitted_on(encoder_folds=()), role.validate) == []


def test_round_trip_and_hash(tmp_path):
    table = assign_folds(products(200))
    write_folds(tmp_path / "folds.csv", table)
    folds = read_folds(tmp_path / "folds.csv")
    assert folds.index.tolist() == table["sample_id"].tolist()  # "0007" stays
    assert split_hash(folds) == split_hash(folds.iloc[::-1])
    moved = folds.copy()
    moved.iloc[0] = (moved.iloc[0] + 1) % N_FOLDS
    assert split_hash(moved) != split_hash(folds)
    (tmp_path / "folds.csv").write_text("sample_id,fold\na,x\n")
    with pytest.raises(InputError, match="folds.csv"):
        read_folds(tmp_path / "folds.csv")


def test_too_few_products(tmp_path):
    with pytest.raises(InputError, match="distinct products"):
        assign_folds(products(9))
