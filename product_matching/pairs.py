"""Labelled pairs of products, from pair files or from two catalogues that share a UPC, and training triplets.

A catalogue is a table with the columns of `COLUMNS`, all text, `id` unique. Pairs name records by id:
left_id, right_id, match (bool), split (train | valid | test).

    python -m product_matching.pairs --pairs ../shared/data/matching/walmart_amazon --out catalogues
    python -m product_matching.pairs --left shop_a.csv --right shop_b.csv --out catalogues

writes left.csv, right.csv and pairs.csv, the form that every other program of this folder also reads.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from contracts.settings import parse_settings
from product_matching.config import MAX_CHARACTERS, PairSettings

COLUMNS = ("id", "title", "brand", "model", "category", "description", "price", "upc")
SPLITS = ("train", "valid", "test")
_COLUMN_OF_FIELD = {"name": "title", "modelno": "model"}
_MODEL_NUMBER = re.compile(r"(?=.*[a-z])(?=.*\d)\w{5,}")
_FIELD = re.compile(r"COL (\w+) VAL ")

Encode = Callable[[list[str]], np.ndarray]
"""texts → (N, D) float32 with rows of length 1"""


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


def product_text(table: pd.DataFrame, *, plain: bool = False) -> list[str]:
    """What the encoder reads of each record: title, brand, model number.

    The brand is left out where the title has it. The model number is squeezed to letters and digits, as shops
    write TF-TV 1022 and tftv1022; where the field is empty it is the longest such word of the title.

    Args:
        plain: join the fields as they are written, the text that published base scores refer to.
    """
    join = _plain_text if plain else _text
    return [join(*fields) for fields in zip(table["title"], table["brand"], table["model"], strict=True)]


def _plain_text(title: str, brand: str, model: str) -> str:
    return " ".join(field for field in (title, brand, model) if field)


def _text(title: str, brand: str, model: str) -> str:
    if brand.lower() in title.lower():
        brand = ""
    return _plain_text(brand, title, _squeeze(model) or model_number(title))


def model_number(title: str) -> str:
    """The longest word of at least five letters and digits that has both, or ""."""
    words = (_squeeze(word) for word in title[:MAX_CHARACTERS].lower().split())
    return max((word for word in words if _MODEL_NUMBER.fullmatch(word)), key=len, default="")


def _squeeze(written: str) -> str:
    return re.sub(r"[\W_]", "", written.lower())


def read_catalogue(path: Path | str) -> pd.DataFrame:
    """Read a catalogue csv: columns id and title are required, the others of `COLUMNS` optional, all kept as text.

    Raises InputError: no such file, not UTF-8, no rows, a column missing, an id empty or used twice, no title.
    """
    table = read_table(Path(path))
    if missing := {"id", "title"} - set(table.columns):
        raise InputError(
            f"{path}: column {', '.join(sorted(missing))} is missing; found {', '.join(table.columns)}"
        )
    return check_catalogue(table, path)


def check_catalogue(table: pd.DataFrame, name: Path | str) -> pd.DataFrame:
    """The catalogue with exactly the columns of `COLUMNS`; raises InputError as `read_catalogue` does."""
    if table.empty:
        raise InputError(f"{name}: the catalogue has no rows")
    table = table.reindex(columns=list(COLUMNS), fill_value="").apply(lambda column: column.str.strip())
    for column in ("id", "title"):
        if (empty := table[column] == "").any():
            raise InputError(f"{name}: data row {int(np.flatnonzero(empty)[0]) + 1} has an empty {column}")
    if (repeated := table["id"].duplicated()).any():
        first = table.loc[repeated, "id"].iloc[0]
        raise InputError(f"{name}: id {first} occurs twice ({repeated.sum()} repeated ids in all)")
    return table.reset_index(drop=True)


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


def training_pairs(pairs: Pairs, held_out: str = "matches") -> pd.DataFrame:
    """The labelled pairs that training may see: split train, and neither record held out.

    Held out are, by `held_out`, the records of all validation and test matches ("matches": the products that the
    evaluation looks for) or of all validation and test pairs, non-matches included ("pairs"). Public splits deal
    out pairs, not products, so without this step a test product is seen in training as another pair's negative.
    """
    if held_out not in ("matches", "pairs"):
        raise InputError(f"--held-out {held_out}: choose matches or pairs")
    table = pairs.labelled
    elsewhere = table[(table["split"] != "train") & (table["match"] | (held_out == "pairs"))]
    train = pairs.of("train")
    # by text, not id: a text written twice is one product to the encoder
    text_of = {
        side: pd.Series([text.lower() for text in product_text(catalogue)], index=catalogue["id"])
        for side, catalogue in (("left_id", pairs.left), ("right_id", pairs.right))
    }
    hidden = {text for side, texts in text_of.items() for text in texts[elsewhere[side]]}
    seen = [texts[train[side]].isin(hidden).to_numpy() for side, texts in text_of.items()]
    return train[~(seen[0] | seen[1])]


def mine_triplets(pairs: Pairs, train: pd.DataFrame, encode: Encode, *, negatives: int = 4) -> pd.DataFrame:
    """Triplets for every match of `train`: columns anchor_id, positive_id, negative_id; anchors are left records.

    The negatives of a match are the `negatives` records most similar to the anchor under `encode` (cosine, faiss)
    that are not its match: those of the anchor's brand or category first, then the others. Candidates are the right
    records of `train`, so nothing that is held out there can come in.
    """
    import faiss

    matches = train[train["match"]]
    if matches.empty:
        raise InputError("no training match is left; there is nothing to train on")
    left = pairs.left.set_index("id", drop=False)
    candidates = pairs.right[pairs.right["id"].isin(train["right_id"])].reset_index(drop=True)
    texts = [text.lower() for text in product_text(candidates)]
    text_of = dict(zip(candidates["id"], texts, strict=True))
    brands, categories = _brands(candidates), candidates["category"].str.lower().tolist()

    anchors = left.loc[matches["left_id"].unique()]
    index = faiss.IndexFlatIP((vectors := encode(product_text(candidates))).shape[1])
    index.add(vectors)
    _, nearest = index.search(encode(product_text(anchors)), min(50 + negatives, len(candidates)))
    positives_of = matches.groupby("left_id")["right_id"].agg(list)
    triplets = []
    for anchor_id, anchor, brand, category, rows in zip(
        anchors["id"],
        product_text(anchors),
        _brands(anchors),
        anchors["category"].str.lower(),
        nearest,
        strict=True,
    ):
        # by text: the words of the anchor or of a match under another id are no negative
        same = {text_of[positive] for positive in positives_of[anchor_id]} | {anchor.lower()}
        others = [row for row in rows if texts[row] not in same]
        related = [
            bool(brand and brands[row] == brand or category and categories[row] == category) for row in others
        ]
        chosen = [others[place] for place in np.argsort(np.logical_not(related), kind="stable")[:negatives]]
        triplets += [
            (anchor_id, positive, candidates.at[row, "id"])
            for positive in positives_of[anchor_id]
            for row in chosen
        ]
    return pd.DataFrame(triplets, columns=["anchor_id", "positive_id", "negative_id"])


def _brands(table: pd.DataFrame) -> list[str]:
    """Brand of each record; a catalogue without brands usually puts it first in the title."""
    first_word = table["title"].str.lower().str.split().str[0]
    return table["brand"].str.lower().where(table["brand"] != "", first_word).tolist()


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
