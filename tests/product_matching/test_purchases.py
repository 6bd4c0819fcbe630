import numpy as np
import pandas as pd
import pytest

from contracts.errors import InputError
from product_matching import purchases as stage
from product_matching.catalogue import check_catalogue
from product_matching.pairs import read_pairs
from product_matching.purchases import bought_together, matches_from_purchases, read_purchases

PRODUCTS = 30


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """Two shops with the same 30 products (L7 is R7), and a log of customers who buy their favourites in either shop.

    Each customer has four favourites and buys one every two weeks, in a random shop. Everybody also buys L0 and R1,
    two different products, all the time.
    """
    folder = tmp_path_factory.mktemp("market")
    rng = np.random.default_rng(0)
    for shop, letter in (("left", "L"), ("right", "R")):
        titles = [f"{shop} product {number}" for number in range(PRODUCTS)]
        table = pd.DataFrame({"id": [f"{letter}{number}" for number in range(PRODUCTS)], "title": titles})
        table["category"] = [f"aisle {number % 3}" for number in range(PRODUCTS)]
        check_catalogue(table.fillna(""), shop).to_csv(folder / f"{shop}.csv", index=False)
    rows = []
    for user in range(400):
        favourites = rng.choice(np.arange(2, PRODUCTS), 4, replace=False)
        for week in range(0, 26, 2):
            day = pd.Timestamp("2026-01-01") + pd.Timedelta(days=7 * week + int(rng.integers(5)))
            letter = "LR"[rng.integers(2)]
            shop = {"L": "left", "R": "right"}[letter]
            rows.append((user, f"{letter}{rng.choice(favourites)}", shop, day))
            rows += [(user, "L0", "left", day), (user, "R1", "right", day)]
    log = pd.DataFrame(rows, columns=["user", "product", "shop", "day"])
    log.to_csv(folder / "log.csv", index=False, date_format="%Y-%m-%d")
    return folder


def catalogues(folder):
    return [
        pd.read_csv(folder / f"{shop}.csv", dtype=str, keep_default_na=False) for shop in ("left", "right")
    ]


def test_the_same_products_are_found_in_a_log_whose_truth_is_known(market):
    left, right = catalogues(market)
    matches = matches_from_purchases(left, right, read_purchases(market / "log.csv", left, right))
    right_ones = [left_id[1:] == right_id[1:] for left_id, right_id in matches]
    assert len(matches) >= 26 and np.mean(right_ones) > 0.9
    # what everybody buys is bought together most often, but in another category
    assert ("L0", "R1") not in matches


def test_few_users_are_no_support_and_late_purchases_do_not_count(market):
    left, right = catalogues(market)
    log = pd.DataFrame(
        [
            ("a", "L2", "left", 0), ("a", "R2", "right", 30), ("a", "R3", "right", 31), ("a", "R2", "right", 2),
            ("b", "L2", "left", 5), ("b", "R2", "right", 1),
        ],
        columns=["user", "product", "shop", "day"],
    )  # fmt: skip
    together = bought_together(log, 30).set_index(["left_id", "right_id"])
    assert together.loc[("L2", "R2"), "users"] == 2 and together.loc[("L2", "R2"), "closeness"] == 1
    assert ("L2", "R3") not in together.index  # a day too late
    assert matches_from_purchases(left, right, log, support=2) == [("L2", "R2")]
    assert matches_from_purchases(left, right, log, support=3) == []


def test_the_pairs_can_be_trained_on(market, tmp_path, capsys):
    flags = [f"--{name}={market / name}.csv" for name in ("left", "right")]
    stage.main([*flags, "--purchases", str(market / "log.csv"), "--out", str(tmp_path / "pairs")])
    pairs = read_pairs(tmp_path / "pairs")
    assert (pairs.labelled["match"].sum() * 9) == (~pairs.labelled["match"]).sum()
    assert not pairs.labelled.duplicated(["left_id", "right_id"]).any()
    assert pairs.labelled.groupby("left_id")["split"].nunique().max() == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,L1,middle,2026-01-01", "shop 'middle' is neither left nor right"),
        ("a,L1,right,2026-01-01", "product L1 is not in the right catalogue"),
        ("a,L1,left,01/02/2026", "day '01/02/2026' is not YYYY-MM-DD"),
    ],
)
def test_bad_rows_are_named(market, tmp_path, row, message):
    (tmp_path / "log.csv").write_text(f"user,product,shop,day\n{row}\n")
    with pytest.raises(InputError, match=message):
        read_purchases(tmp_path / "log.csv", *catalogues(market))


def test_a_log_without_support_is_refused(market, tmp_path):
    (tmp_path / "log.csv").write_text("user,product,shop,day\na,L2,left,2026-01-01\na,R2,right,2026-01-02\n")
    flags = [f"--{name}={market / name}.csv" for name in ("left", "right")]
    with pytest.raises(InputError, match="lower --support or raise --days"):
        stage.main([*flags, "--purchases", str(tmp_path / "log.csv"), "--out", str(tmp_path / "out")])
