"""Labelled pairs from purchase behaviour, where two shops share no barcodes but know the same customers.

    python -m product_matching.purchases --left shop_a.csv --right shop_b.csv --purchases log.csv --out catalogues

The log has the columns user, product, shop (left or right) and day (YYYY-MM-DD). Who runs out of a product buys it
again, sometimes in the other shop. So a left and a right product of one category that many users bought within 30 days
of each other are taken for one product, if each is the other's closest partner. These labels are guesses: they train a
model, and a few reviewed pairs should judge it. Writes what product_matching.pairs writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from product_matching.catalogue import read_catalogue
from product_matching.config import PurchaseSettings
from product_matching.pairs import SPLITS, label_pairs, write_pairs
from training.settings import parse_settings

COLUMNS = ("user", "product", "shop", "day")


def read_purchases(path: Path | str, left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """The log with `day` as a number. Raises InputError for a shop, day or product that cannot be."""
    table = read_table(Path(path))
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise InputError(f"{path}: column {', '.join(missing)} is missing; found {', '.join(table.columns)}")
    unknown_shop = ~table["shop"].isin(["left", "right"])
    if unknown_shop.any():
        raise InputError(
            f"{path}: shop {table.loc[unknown_shop, 'shop'].iloc[0]!r} is neither left nor right"
        )
    for shop, catalogue in (("left", left), ("right", right)):
        bought = table.loc[table["shop"] == shop, "product"]
        unknown = bought[~bought.isin(catalogue["id"])]
        if len(unknown):
            raise InputError(f"{path}: product {unknown.iloc[0]} is not in the {shop} catalogue")
    day = pd.to_datetime(table["day"], format="%Y-%m-%d", errors="coerce")
    if day.isna().any():
        raise InputError(f"{path}: day {table.loc[day.isna(), 'day'].iloc[0]!r} is not YYYY-MM-DD")
    return table[list(COLUMNS)].assign(day=(day - pd.Timestamp(0)).dt.days)


def bought_together(purchases: pd.DataFrame, days: int) -> pd.DataFrame:
    """Left and right products that users bought within `days` of each other: left_id, right_id, users, closeness.

    `users` counts each user once. `closeness` is users / sqrt(buyers of the one · buyers of the other), a cosine: what
    everybody buys is close to nothing.
    """
    left = purchases[purchases["shop"] == "left"]
    right = purchases[purchases["shop"] == "right"]
    joined = left.merge(right, on="user", suffixes=("_left", "_right"))
    near = joined[(joined["day_left"] - joined["day_right"]).abs() <= days]
    pairs = near[["user", "product_left", "product_right"]].drop_duplicates()
    counted = pairs.groupby(["product_left", "product_right"]).size().rename("users").reset_index()
    counted.columns = pd.Index(["left_id", "right_id", "users"])
    left_buyers = left.groupby("product")["user"].nunique()
    right_buyers = right.groupby("product")["user"].nunique()
    buyers = counted["left_id"].map(left_buyers) * counted["right_id"].map(right_buyers)
    return counted.assign(closeness=counted["users"] / np.sqrt(buyers.astype(float)))


def matches_from_purchases(
    left: pd.DataFrame,
    right: pd.DataFrame,
    purchases: pd.DataFrame,
    *,
    days: int = 30,
    support: int = 5,
    same_category: bool = True,
) -> list[tuple[str, str]]:
    """Ids of the left and right products that are taken for one product.

    Args:
        days: most days between the two purchases of a user.
        support: fewest users who bought both.
        same_category: leave out pairs whose categories are both known and differ.
    """
    together = bought_together(purchases, days)
    together = together[together["users"] >= support]
    if same_category:
        left_category = together["left_id"].map(left.set_index("id")["category"]).str.lower()
        right_category = together["right_id"].map(right.set_index("id")["category"]).str.lower()
        known = (left_category != "") & (right_category != "")
        together = together[~known | (left_category == right_category)]
    # ties are broken by id, so that the same log gives the same pairs
    together = together.sort_values(["closeness", "left_id", "right_id"], ascending=[False, True, True])
    best_of_left = ~together["left_id"].duplicated()
    best_of_right = ~together["right_id"].duplicated()
    mutual = together[best_of_left & best_of_right]
    return list(zip(mutual["left_id"], mutual["right_id"], strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(
        PurchaseSettings, argv, description="Label pairs by what customers buy in both shops."
    )
    left = read_catalogue(settings.left)
    right = read_catalogue(settings.right)
    purchases = read_purchases(settings.purchases, left, right)
    matches = matches_from_purchases(
        left,
        right,
        purchases,
        days=settings.days,
        support=settings.support,
        same_category=settings.same_category,
    )
    if not matches:
        raise InputError(
            f"{settings.purchases}: no two products of one category have {settings.support} users who bought both "
            f"within {settings.days} days; lower --support or raise --days"
        )
    pairs = label_pairs(left, right, matches, non_matches=settings.non_matches)
    write_pairs(settings.out, pairs)
    for split in SPLITS:
        print(f"{split}: {len(pairs.of(split))} pairs, {len(pairs.matches(split))} matches")


if __name__ == "__main__":
    run_entry_point(main)
