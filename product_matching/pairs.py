"""Labelled pairs of products, from pair files or from two catalogues that share UPCs.

    python -m product_matching.pairs --pairs ../shared/data/matching/walmart_amazon --out catalogues
    python -m product_matching.pairs --left shop_a.csv --right shop_b.csv --out catalogues

Both write left.csv, right.csv and pairs.csv, a form that every other program of this folder reads. pairs.csv names
records of the two catalogues by id: left_id, right_id, match (0 or 1), split (train, valid or test).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
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
SIMILARITIES_AT_ONCE = 20_000_000
"""float64 similarities held in memory while similar products are searched: 160 MB."""

_PAIR_COLUMNS = ["left_id", "right_id", "match", "split"]
# what the public benchmarks call our columns
_COLUMN_OF_FIELD = {"name": "title", "modelno": "model", "manufacturer": "brand"}
_FIELD = re.compile(r"COL (\w+) VAL ")


@dataclass
class Pairs:
    """Two catalogues and the labelled pairs between them."""

    left: pd.DataFrame
    right: pd.DataFrame
    labelled: pd.DataFrame
    """left_id, right_id, match (bool), split"""

    def of(self, split: str) -> pd.DataFrame:
        """The labelled pairs of one split."""
        return self.labelled[self.labelled["split"] == split]

    def matches(self, split: str) -> pd.DataFrame:
        """The labelled pairs of one split that match."""
        return self.labelled[(self.labelled["split"] == split) & self.labelled["match"]]

    def only(self, split: str) -> Pairs:
        """The pairs of one split with the records that they name, and no others."""
        labelled = self.of(split)
        left = self.left[self.left["id"].isin(labelled["left_id"])]
        right = self.right[self.right["id"].isin(labelled["right_id"])]
        return Pairs(left, right, labelled)


def read_pairs(source: Path | str) -> Pairs:
    """Read a folder with left.csv, right.csv and pairs.csv, or with train.txt, valid.txt and test.txt.

    A line of a txt file is a left record, a right record, and 0 or 1, separated by tabs. A record is written
    `COL title VAL … COL brand VAL …`.

    Raises InputError naming the file, and the line or id, that is not of this form.
    """
    folder = Path(source)
    if (folder / "pairs.csv").is_file():
        return _read_tables(folder)
    if (folder / "train.txt").is_file():
        return _read_pair_files(folder)
    raise InputError(f"{folder}: neither pairs.csv nor train.txt is there")


def pair_files(source: Path | str) -> list[Path]:
    """The files that `read_pairs` reads, for the manifest of a run."""
    names = ("left.csv", "right.csv", "pairs.csv", *(f"{split}.txt" for split in SPLITS))
    paths = [Path(source) / name for name in names]
    return [path for path in paths if path.is_file()]


def write_pairs(folder: Path | str, pairs: Pairs) -> None:
    """Write left.csv, right.csv and pairs.csv."""
    labelled = pairs.labelled.assign(match=pairs.labelled["match"].astype(int))
    for name, table in (("left", pairs.left), ("right", pairs.right), ("pairs", labelled)):
        with atomic_write(Path(folder) / f"{name}.csv") as file:
            table.to_csv(file, index=False)


def _read_tables(folder: Path) -> Pairs:
    left = read_catalogue(folder / "left.csv")
    right = read_catalogue(folder / "right.csv")
    path = folder / "pairs.csv"
    labelled = read_table(path)
    if list(labelled.columns) != _PAIR_COLUMNS:
        raise InputError(f"{path}: expected the columns {', '.join(_PAIR_COLUMNS)}")
    for column, catalogue in (("left_id", left), ("right_id", right)):
        unknown = ~labelled[column].isin(catalogue["id"])
        if unknown.any():
            raise InputError(f"{path}: {column} {labelled.loc[unknown, column].iloc[0]} is in no catalogue")
    for column, allowed in (("match", ("0", "1")), ("split", SPLITS)):
        bad = ~labelled[column].isin(allowed)
        if bad.any():
            value = labelled.loc[bad, column].iloc[0]
            raise InputError(f"{path}: {column} {value!r} is none of {', '.join(allowed)}")
    return Pairs(left, right, labelled.assign(match=labelled["match"] == "1"))


def _read_pair_files(folder: Path) -> Pairs:
    left_records: dict[str, dict[str, str]] = {}
    right_records: dict[str, dict[str, str]] = {}
    labelled = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        for number, line in enumerate(_read_lines(path), 1):
            where = f"{path}: line {number}"
            left, right, match = _parse_line(line, where)
            # a record occurs in many pairs; its first listing is kept
            left_records.setdefault(left["id"], left)
            right_records.setdefault(right["id"], right)
            labelled.append((left["id"], right["id"], match, split))
    table = pd.DataFrame(labelled, columns=_PAIR_COLUMNS)
    # listings that differ only in price are one record, and may make one pair twice
    table = table.drop_duplicates(["left_id", "right_id", "match"], ignore_index=True)
    left_table = pd.DataFrame(list(left_records.values()), columns=list(COLUMNS))
    right_table = pd.DataFrame(list(right_records.values()), columns=list(COLUMNS))
    return Pairs(
        check_catalogue(left_table, f"{folder} left"), check_catalogue(right_table, f"{folder} right"), table
    )


def _read_lines(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8").removesuffix("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    # not splitlines, which would also split at a line separator within a title
    return content.split("\n") if content else []


def _parse_line(line: str, where: str) -> tuple[dict[str, str], dict[str, str], bool]:
    fields = line.split("\t")
    if len(fields) != 3 or fields[2] not in ("0", "1"):
        raise InputError(f"{where} is not left TAB right TAB 0 or 1")
    return _parse_record(fields[0], where), _parse_record(fields[1], where), fields[2] == "1"


def _parse_record(written: str, where: str) -> dict[str, str]:
    """A record `COL title VAL … COL brand VAL …` as the columns of a catalogue.

    Fields that a catalogue has no column for are added to the description. A record without a title is called by its
    first field that is not empty; one without any text is refused, since nothing could be decided about it.

    Its id is a hash of title, brand and model number, and of those other fields. So it is the same in every split and
    in any order of lines, and two listings that differ only in category, description or price are one record.
    """
    before, *fields = _FIELD.split(written)
    if not fields or before.strip():
        raise InputError(f"{where}: a record is written COL <field> VAL <text> …")
    record = dict.fromkeys(COLUMNS, "")
    others = []
    for field, value in zip(fields[0::2], fields[1::2], strict=True):
        column = _COLUMN_OF_FIELD.get(field.lower(), field.lower())
        if column in record:
            record[column] = value.strip()
        elif value.strip():
            others.append(value.strip())
    if not record["title"]:
        record["title"] = next((value.strip() for value in fields[1::2] if value.strip()), "")
    if not record["title"]:
        raise InputError(f"{where}: all fields of a record are empty; leave this pair out")
    record["description"] = " ".join(part for part in (record["description"], *others) if part)
    identity = "\0".join((record["title"], record["brand"], record["model"], *others))
    record["id"] = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return record


def normalise_upc(written: str) -> str:
    """A UPC-A, EAN-8, EAN-13 or GTIN-14 as 14 digits, or "" for anything else, such as a wrong check digit."""
    digits = re.sub(r"[\s-]", "", written)  # as printed on packages, such as 0 36000-29145 2
    if not re.fullmatch(r"\d{8}|\d{12,14}", digits) or not digits.strip("0"):
        return ""
    digits = digits.zfill(14)
    # GS1 General Specifications 7.9: of the 13 digits before the check digit, the 1st, 3rd, … weigh 3, the others 1
    weighted = 3 * sum(map(int, digits[0:13:2])) + sum(map(int, digits[1:13:2]))
    check_digit = -weighted % 10
    return digits if check_digit == int(digits[13]) else ""


def join_by_upc(left: pd.DataFrame, right: pd.DataFrame, *, non_matches: int = 9) -> Pairs:
    """Label pairs by shared UPC, and for each matched left record the most similar other products as non-matches.

    Similarity is the cosine of TF-IDF vectors, so the labels do not depend on any encoder. Non-matches are taken from
    the right records with a valid UPC, since only these are known to be another product.

    Args:
        non_matches: non-matching pairs per matched left record.

    Raises:
        InputError: the two catalogues share no valid UPC.
    """
    left_upc = left["upc"].map(normalise_upc)
    right_upc = right["upc"].map(normalise_upc)
    known = right[right_upc != ""]
    matched = left[left_upc.isin(right_upc[known.index])]
    if matched.empty:
        raise InputError("the two catalogues share no valid UPC")
    known_ids = known["id"].to_numpy()
    known_upc = right_upc[known.index].to_numpy()
    ranking = _most_similar(product_text(matched), product_text(known))

    labelled = []
    for left_id, upc, nearest in zip(matched["id"], left_upc[matched.index], ranking, strict=True):
        split = split_of(upc)  # by product, so all pairs of a left record are in one split
        others = nearest[known_upc[nearest] != upc][:non_matches]
        for right_id in known_ids[known_upc == upc]:
            labelled.append((left_id, right_id, True, split))
        for right_id in known_ids[others]:
            labelled.append((left_id, right_id, False, split))
    return Pairs(left, right, pd.DataFrame(labelled, columns=_PAIR_COLUMNS))


def label_pairs(
    left: pd.DataFrame, right: pd.DataFrame, matches: Sequence[tuple[str, str]], *, non_matches: int = 9
) -> Pairs:
    """Pairs of given matches, each left record once, and for each the most similar other products as non-matches.

    Non-matches are taken from the right records of the matches, as in `join_by_upc`. The split is one of the left id.

    Args:
        matches: left and right id of each match.
        non_matches: non-matching pairs per match.
    """
    matched = left.set_index("id", drop=False).loc[[left_id for left_id, _ in matches]]
    known = right.set_index("id", drop=False).loc[[right_id for _, right_id in matches]]
    known_ids = known["id"].to_numpy()
    labelled = []
    ranking = _most_similar(product_text(matched), product_text(known))
    for (left_id, right_id), nearest in zip(matches, ranking, strict=True):
        split = split_of(left_id)
        labelled.append((left_id, right_id, True, split))
        others = known_ids[nearest][known_ids[nearest] != right_id][:non_matches]
        for other in others:
            labelled.append((left_id, other, False, split))
    return Pairs(left, right, pd.DataFrame(labelled, columns=_PAIR_COLUMNS))


def _most_similar(queries: list[str], corpus: list[str]) -> Iterator[np.ndarray]:
    """For each query all rows of the corpus, the most similar first, by TF-IDF of groups of three or four letters."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    corpus_vectors = vectorizer.fit_transform(corpus)
    chunk_rows = max(1, SIMILARITIES_AT_ONCE // len(corpus))
    for start in tqdm(range(0, len(queries), chunk_rows), desc="similar products", disable=None):
        chunk = vectorizer.transform(queries[start : start + chunk_rows])
        for similarity in (chunk @ corpus_vectors.T).toarray():
            yield np.argsort(-similarity, kind="stable")


def split_of(key: str) -> str:
    """The split of a product, 8:1:1 by a hash of `key`: a product keeps its split when the catalogues grow."""
    place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    if place == 8:
        return "valid"
    if place == 9:
        return "test"
    return "train"


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(PairSettings, argv, description="Write left.csv, right.csv and pairs.csv.")
    if settings.pairs:
        pairs = read_pairs(settings.pairs)
    elif settings.left and settings.right:
        left = read_catalogue(settings.left)
        right = read_catalogue(settings.right)
        pairs = join_by_upc(left, right, non_matches=settings.non_matches)
    else:
        raise InputError(
            "give --pairs with a folder, or --left and --right with two catalogues that have a column upc"
        )
    write_pairs(settings.out, pairs)
    for split in SPLITS:
        print(f"{split}: {len(pairs.of(split))} pairs, {len(pairs.matches(split))} matches")
    print(f"{len(pairs.left)} left and {len(pairs.right)} right records → {settings.out}")


if __name__ == "__main__":
    run_entry_point(main)
