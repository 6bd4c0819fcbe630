"""Labelled pairs of products, from pair files or from two catalogues that share a UPC.

Pairs name records of two catalogues (`product_matching.catalogue`) by id:
left_id, right_id, match (bool), split (train | valid | test).

    python -m product_matching.pairs --pairs ../shared/data/matching/walmart_amazon --out catalogues
    python -m product_matching.pairs --left shop_a.csv --right shop_b.csv --out catalogues

writes left.csv, right.csv and pairs.csv, the form that every other program of this folder also reads.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from product_matching.catalogue import COLUMNS, check_catalogue, product_text, read_catalogue
from product_matching.config import PairSettings
from training.settings import parse_settings

SPLITS = ("train", "valid", "test")
_COLUMN_OF_FIELD = {"name": "title", "modelno": "model"}
_FIELD = re.compile(r"COL (\w+) VAL ")


@dataclass
class Pairs:
    """Two catalogues and the labelled pairs between them."""

    left: pd.DataFrame
    right: pd.DataFrame
    labelled: pd.DataFrame

    def of(self, split: str) -> pd.DataFrame:
        return self.labelled[self.labelled["split"] == split]

    def only(self, split: str) -> Pairs:
        """One split's pairs with no other records."""
        labelled = self.of(split)
        left, right = self.left["id"].isin(labelled["left_id"]), self.right["id"].isin(labelled["right_id"])
        return Pairs(self.left[left], self.right[right], labelled)

    def matches(self, split: str) -> pd.DataFrame:
        return self.labelled[(self.labelled["split"] == split) & self.labelled["match"]]


def read_pairs(source: Path | str) -> Pairs:
    """Read a folder with left.csv, right.csv, pairs.csv, or train.txt, valid.txt, test.txt (left TAB right TAB 0|1)."""
    folder = Path(source)
    if (folder / "pairs.csv").is_file():
        return _read_tables(folder)
    if not (folder / "train.txt").is_file():
        raise InputError(f"{folder}: neither pairs.csv nor train.txt is there")
    return _read_pair_files(folder)


def pair_files(source: Path | str) -> list[Path]:
    """The files that `read_pairs` reads, for a run's manifest."""
    names = ("left.csv", "right.csv", "pairs.csv", "train.txt", "valid.txt", "test.txt")
    return [path for name in names if (path := Path(source) / name).is_file()]


def _read_tables(folder: Path) -> Pairs:
    left, right = read_catalogue(folder / "left.csv"), read_catalogue(folder / "right.csv")
    labelled = read_table(folder / "pairs.csv")
    if list(labelled.columns) != ["left_id", "right_id", "match", "split"]:
        raise InputError(f"{folder / 'pairs.csv'}: expected the columns left_id, right_id, match, split")
    for side, table in (("left_id", left), ("right_id", right)):
        unknown = ~labelled[side].isin(table["id"])
        if unknown.any():
            raise InputError(
                f"{folder / 'pairs.csv'}: {side} {labelled.loc[unknown, side].iloc[0]} is in no catalogue"
            )
    for column, allowed in (("match", ("0", "1")), ("split", SPLITS)):
        if (bad := ~labelled[column].isin(allowed)).any():
            value = labelled.loc[bad, column].iloc[0]
            raise InputError(f"{folder / 'pairs.csv'}: {column} {value!r} is none of {', '.join(allowed)}")
    return Pairs(left, right, labelled.assign(match=labelled["match"] == "1"))


def write_pairs(folder: Path | str, pairs: Pairs) -> None:
    labelled = pairs.labelled.assign(match=pairs.labelled["match"].astype(int))
    for name, table in (("left", pairs.left), ("right", pairs.right), ("pairs", labelled)):
        with atomic_write(Path(folder) / f"{name}.csv") as file:
            table.to_csv(file, index=False)


def _read_pair_files(folder: Path) -> Pairs:
    records: dict[str, dict[str, dict[str, str]]] = {"left": {}, "right": {}}
    labelled = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
        for number, line in enumerate(lines if lines != [""] else [], 1):
            fields = line.split("\t")
            if len(fields) != 3 or fields[2] not in ("0", "1"):
                raise InputError(f"{path}: line {number} is not left TAB right TAB 0 or 1")
            ids = []
            for side, written in zip(("left", "right"), fields[:2], strict=True):
                record = _parse_record(written, f"{path}: line {number}")
                ids.append(record["id"])
                records[side].setdefault(record["id"], record)
            labelled.append((*ids, fields[2] == "1", split))
    left, right = (
        check_catalogue(pd.DataFrame(list(records[side].values()), columns=list(COLUMNS)), f"{folder} {side}")
        for side in ("left", "right")
    )
    columns = ["left_id", "right_id", "match", "split"]
    return Pairs(
        left, right, pd.DataFrame(labelled, columns=columns).drop_duplicates(columns[:3], ignore_index=True)
    )


def _parse_record(written: str, where: str) -> dict[str, str]:
    """A record `COL title VAL … COL brand VAL …`.

    Its id is a hash of title, brand and model number: it stays the same in every split and in any order of lines,
    and two listings that differ only in category, description or price are one record.
    """
    parts = _FIELD.split(written)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{where}: a record is written COL <field> VAL <text> …")
    record = dict.fromkeys(COLUMNS, "")
    for field, value in zip(parts[1::2], parts[2::2], strict=True):
        if (column := _COLUMN_OF_FIELD.get(field, field)) in record:
            record[column] = value.strip()
    identity = "\0".join(record[column] for column in ("title", "brand", "model"))
    record["id"] = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return record


def normalise_upc(written: str) -> str:
    """A UPC-A, EAN-8, EAN-13 or GTIN-14 as 14 digits, or "" for anything else, such as a failed check digit."""
    digits = re.sub(r"[\s-]", "", written)
    if not re.fullmatch(r"\d{8}|\d{12,14}", digits) or not digits.strip("0"):
        return ""
    digits = digits.zfill(14)
    # GS1 General Specifications 7.9: weights 3 and 1 from the left of the 13 digits before the check digit
    weighted = sum(int(digit) * (3 if place % 2 == 0 else 1) for place, digit in enumerate(digits[:13]))
    return digits if (10 - weighted % 10) % 10 == int(digits[13]) else ""


def join_by_upc(left: pd.DataFrame, right: pd.DataFrame, *, non_matches: int = 9) -> Pairs:
    """Label pairs by shared UPC; for each matched left record add the `non_matches` most similar other products.

    Non-matches are nearest by TF-IDF of the titles among records whose UPC is known and another, so labels and
    splits do not depend on any encoder. A hash of the UPC deals products into train, valid and test 8:1:1: a
    product keeps its split when the catalogues grow.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    left_upc, right_upc = left["upc"].map(normalise_upc), right["upc"].map(normalise_upc)
    known = right[right_upc != ""]
    matched = left[left_upc.isin(right_upc[known.index])]
    if matched.empty:
        raise InputError("the two catalogues share no valid UPC")
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    known_vectors = vectorizer.fit_transform(product_text(known))
    known_ids, known_upc = known["id"].to_numpy(), right_upc[known.index].to_numpy()
    labelled = []
    chunk_rows = max(1, 20_000_000 // len(known))  # similarities of a chunk: at most 160 MB
    for start in tqdm(range(0, len(matched), chunk_rows), desc="similar products", disable=None):
        chunk = matched.iloc[start : start + chunk_rows]
        similarity = (vectorizer.transform(product_text(chunk)) @ known_vectors.T).toarray()
        for left_id, upc, row in zip(chunk["id"], left_upc[chunk.index], similarity, strict=True):
            split, nearest = split_of(upc), np.argsort(-row, kind="stable")
            labelled += [(left_id, right_id, True, split) for right_id in known_ids[known_upc == upc]]
            others = nearest[known_upc[nearest] != upc][:non_matches]
            labelled += [(left_id, right_id, False, split) for right_id in known_ids[others]]
    return Pairs(left, right, pd.DataFrame(labelled, columns=["left_id", "right_id", "match", "split"]))


def split_of(key: str) -> str:
    place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "valid" if place == 8 else "test" if place == 9 else "train"


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(PairSettings, argv, description="Write left.csv, right.csv and pairs.csv.")
    if settings.pairs:
        pairs = read_pairs(settings.pairs)
    elif settings.left and settings.right:
        left, right = read_catalogue(settings.left), read_catalogue(settings.right)
        pairs = join_by_upc(left, right, non_matches=settings.non_matches)
    else:
        raise InputError(
            "give --pairs FOLDER, or --left and --right with two catalogues that have a upc column"
        )
    write_pairs(settings.out, pairs)
    for split in SPLITS:
        print(f"{split}: {len(pairs.of(split))} pairs, {len(pairs.matches(split))} matches")
    print(f"{len(pairs.left)} left and {len(pairs.right)} right records → {settings.out}")


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
