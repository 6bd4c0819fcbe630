"""Two small generated catalogues and a small encoder with random weights: the input of the demo.

    python -m product_matching.sample_pairs --out demo/matching

Writes left.csv, right.csv (products of both shops share a UPC) and encoder/. Each shop writes titles in its own way:
their order, units, abbreviations and spelling of model numbers differ, and the right shop often leaves out brand and
model number. So shared words alone do not find the match.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from product_matching.catalogue import COLUMNS, product_text, read_catalogue
from training.settings import parse_settings


class ProductType(NamedTuple):
    """A type of product as each shop names it, with the sizes that it comes in."""

    left: str
    right: str
    left_category: str
    right_category: str
    sizes: tuple[int, ...]
    left_unit: str
    right_unit: str


TYPES = (
    ProductType(
        "LCD Television", "Flat Panel TV", "televisions", "tv & video", (19, 22, 32, 40, 46), "inch", '"'
    ),
    ProductType(
        "Digital Camera", "Point and Shoot Cam", "cameras", "photo", (8, 10, 12, 14, 16), "megapixel", "MP"
    ),
    ProductType(
        "External Hard Drive", "Portable HDD", "storage", "computer drives", (250, 320, 500, 750), "gigabyte", "GB"
    ),
    ProductType(
        "Laser Toner Cartridge", "Toner", "office", "printer supplies", (1500, 2500, 4000, 6000), "pages", "pg"
    ),
    ProductType(
        "Microwave Oven", "Countertop Microwave", "kitchen", "appliances", (700, 900, 1000, 1200), "watt", "W"
    ),
    ProductType(
        "Cordless Telephone", "DECT Phone Set", "telephones", "communication", (1, 2, 3, 4), "handsets", "HS"
    ),
)  # fmt: skip
BRANDS = ("Alderby", "Bexley", "Corvane", "Dorrin", "Estrel", "Fennick", "Garnock", "Harlowe", "Imbry", "Kestrow",
          "Lomond", "Marrick")  # fmt: skip
# product lines and colours, as the left and as the right shop writes them
LINES = (("Aurora", "AUR"), ("Meridian", "MDN"), ("Summit", "SMT"), ("Harbour", "HBR"), ("Pioneer", "PNR"),
         ("Quartz", "QTZ"), ("Velvet", "VLV"), ("Zephyr", "ZPH"))  # fmt: skip
COLOURS = (("Black", "BLK"), ("White", "WHT"), ("Silver", "SLV"), ("Red", "RD"))
MODEL_LETTERS = "ABCDEFGHKLMNPRSTVX"

# how often the right shop fills in what the left shop always does
BRAND_IN_TITLE = 0.7
MODEL_NUMBER_IN_TITLE = 0.4
BRAND_IN_FIELD = 0.5

MAX_TOKENS = 64
"""Text length of the tiny encoder; the generated texts have at most about 25 tokens."""


@dataclass
class SampleSettings:
    out: str = "demo/matching"
    """folder to write"""
    products: int = 600
    """products that both shops sell; each shop has a third as many of its own"""
    seed: int = 0
    """seed of the catalogues and of the encoder's weights"""

    def __post_init__(self) -> None:
        if self.products < 50:
            raise InputError(f"--products {self.products}: must be at least 50")


def write_catalogues(folder: Path, products: int, seed: int) -> None:
    """Write left.csv and right.csv; the same seed gives the same files."""
    rng = np.random.default_rng(seed)
    own = products // 3
    total = products + 2 * own
    left = []
    right = []
    for number in range(total):
        left_listing, right_listing = _listings(rng, number)
        # first the products of both shops, then those of the left shop alone, then those of the right one
        if number < products + own:
            left.append(left_listing)
        if number < products or number >= products + own:
            right.append(right_listing)
    for name, records in (("left", left), ("right", right)):
        table = pd.DataFrame(records, columns=list(COLUMNS), dtype=str).fillna("")
        # shuffled, so that the order of rows does not give the matches away
        table = table.sample(frac=1, random_state=seed)
        with atomic_write(folder / f"{name}.csv") as file:
            table.to_csv(file, index=False)


def _listings(rng: np.random.Generator, number: int) -> tuple[dict[str, str], dict[str, str]]:
    """One product as the left and as the right shop lists it."""
    brand = BRANDS[rng.integers(len(BRANDS))]
    kind = TYPES[rng.integers(len(TYPES))]
    size = kind.sizes[rng.integers(len(kind.sizes))]
    left_colour, right_colour = COLOURS[rng.integers(len(COLOURS))]
    left_line, right_line = LINES[rng.integers(len(LINES))]
    letters = "".join(rng.choice(list(MODEL_LETTERS), 3))
    digits = rng.integers(1000, 10_000)
    price = round(float(rng.lognormal(4, 0.8)), 2)  # dollars; the median is e^4 = 55
    upc = _upc(rng)

    right_words = [f"{size}{kind.right_unit}", kind.right, right_line, right_colour]
    if rng.random() < BRAND_IN_TITLE:
        right_words.insert(0, brand.upper())
    if rng.random() < MODEL_NUMBER_IN_TITLE:
        right_words.append(f"{letters}{digits}")
    right_brand = brand.upper() if rng.random() < BRAND_IN_FIELD else ""
    right_price = price * rng.lognormal(0, 0.1)  # some 10 % above or below

    left = {
        "id": f"L{number:05d}",
        "title": f"{brand} {left_line} {size} {kind.left_unit} {kind.left} {letters}-{digits} {left_colour}",
        "brand": brand,
        "category": kind.left_category,
        "upc": upc,
        "price": f"{price}",
    }
    right = {
        "id": f"R{number:05d}",
        "title": " ".join(right_words),
        "brand": right_brand,
        "category": kind.right_category,
        "upc": upc,
        "price": f"{right_price:.2f}",
    }
    return left, right


def _upc(rng: np.random.Generator) -> str:
    """A random UPC-A with its check digit (GS1 General Specifications 7.9: the 1st, 3rd, … digit weigh 3)."""
    digits = [int(digit) for digit in rng.integers(0, 10, 11)]
    weighted = 3 * sum(digits[0::2]) + sum(digits[1::2])
    check_digit = -weighted % 10
    return "".join(map(str, [*digits, check_digit]))


def write_tiny_encoder(
    folder: Path, texts: list[str], *, width: int = 64, layers: int = 2, seed: int = 0
) -> None:
    """Save a small BERT with random weights, mean pooling and the words of `texts` as a model folder."""
    from training.device import guard_torchvision, seed_everything

    guard_torchvision()
    seed_everything(seed)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    pieces = BertWordPieceTokenizer(_vocabulary(texts), lowercase=True)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=MAX_TOKENS)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=MAX_TOKENS)
    encoder = SentenceTransformer(modules=[transformer, Pooling(width, "mean"), Normalize()], device="cpu")
    encoder.save_pretrained(str(folder), create_model_card=False)


def _vocabulary(texts: list[str]) -> dict[str, int]:
    """WordPiece vocabulary: every character, and every word that occurs at least twice.

    It is counted here, since a trained vocabulary breaks ties by hash order and would differ from run to run.
    """
    count_of_word = Counter()
    for text in texts:
        count_of_word.update(re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted(set("".join(count_of_word)))
    frequent = sorted(word for word, count in count_of_word.items() if count > 1 and len(word) > 1)
    continuations = [f"##{character}" for character in characters]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *continuations, *frequent]
    return {piece: number for number, piece in enumerate(pieces)}


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(
        SampleSettings, argv, description="Write two generated catalogues and a tiny encoder."
    )
    folder = Path(settings.out)
    write_catalogues(folder, settings.products, settings.seed)
    left = read_catalogue(folder / "left.csv")
    right = read_catalogue(folder / "right.csv")
    write_tiny_encoder(folder / "encoder", product_text(left) + product_text(right), seed=settings.seed)
    print(f"{len(left)} and {len(right)} records, and an encoder with random weights → {folder}")


if __name__ == "__main__":
    run_entry_point(main)
