"""Two small generated catalogues of the same shop world, and a small encoder with random weights: the demo's input.

    python -m product_matching.sample_pairs --out demo/matching

writes left.csv, right.csv (shared products have the same UPC) and encoder/. Each shop writes a title in its own
way: order, units, abbreviations and the spelling of model numbers differ, and the right shop often leaves brand
and model number out, so that shared words alone do not find the match.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write
from product_matching.catalogue import COLUMNS, product_text
from training.settings import parse_settings

BRANDS = ("Alderby", "Bexley", "Corvane", "Dorrin", "Estrel", "Fennick", "Garnock", "Harlowe", "Imbry", "Kestrow",
          "Lomond", "Marrick")  # fmt: skip
# type as the left shop calls it, as the right shop calls it, category of each, sizes, unit left, unit right
TYPES = (
    ("LCD Television", "Flat Panel TV", "televisions", "tv & video", (19, 22, 32, 40, 46), "inch", '"'),
    ("Digital Camera", "Point and Shoot Cam", "cameras", "photo", (8, 10, 12, 14, 16), "megapixel", "MP"),
    (
        "External Hard Drive",
        "Portable HDD",
        "storage",
        "computer drives",
        (250, 320, 500, 750),
        "gigabyte",
        "GB",
    ),
    ("Laser Toner Cartridge", "Toner", "office", "printer supplies", (1500, 2500, 4000, 6000), "pages", "pg"),
    ("Microwave Oven", "Countertop Microwave", "kitchen", "appliances", (700, 900, 1000, 1200), "watt", "W"),
    ("Cordless Telephone", "DECT Phone Set", "telephones", "communication", (1, 2, 3, 4), "handsets", "HS"),
)
# name of the product line, as each shop writes it
LINES = (("Aurora", "AUR"), ("Meridian", "MDN"), ("Summit", "SMT"), ("Harbour", "HBR"), ("Pioneer", "PNR"),
         ("Quartz", "QTZ"), ("Velvet", "VLV"), ("Zephyr", "ZPH"))  # fmt: skip
COLOURS = (("Black", "BLK"), ("White", "WHT"), ("Silver", "SLV"), ("Red", "RD"))


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
    listings = [_listing(rng, number) for number in range(total)]
    left = [left for left, _ in listings[: products + own]]
    right = [right for _, right in listings[:products] + listings[products + own :]]
    for name, records in (("left", left), ("right", right)):
        table = (
            pd.DataFrame(records, columns=list(COLUMNS), dtype=str)
            .fillna("")
            .sample(frac=1, random_state=seed)
        )
        with atomic_write(folder / f"{name}.csv") as file:
            table.to_csv(file, index=False)


def _listing(rng: np.random.Generator, number: int) -> tuple[dict[str, str], dict[str, str]]:
    """One product as each shop lists it."""
    brand = BRANDS[rng.integers(len(BRANDS))]
    left_type, right_type, left_category, right_category, sizes, left_unit, right_unit = TYPES[
        rng.integers(len(TYPES))
    ]
    size = sizes[rng.integers(len(sizes))]
    left_colour, right_colour = COLOURS[rng.integers(len(COLOURS))]
    left_line, right_line = LINES[rng.integers(len(LINES))]
    letters, digits = "".join(rng.choice(list("ABCDEFGHKLMNPRSTVX"), 3)), rng.integers(1000, 10_000)
    price, upc = round(float(rng.lognormal(4, 0.8)), 2), _upc(rng)
    left_title = f"{brand} {left_line} {size} {left_unit} {left_type} {letters}-{digits} {left_colour}"
    pieces = [f"{size}{right_unit}", right_type, right_line, right_colour]
    brand_written = [brand.upper()] if rng.random() < 0.7 else []
    right_title = " ".join(brand_written + pieces + ([f"{letters}{digits}"] if rng.random() < 0.4 else []))
    left = {"id": f"L{number:05d}", "title": left_title, "brand": brand, "category": left_category, "upc": upc,
            "price": f"{price}"}  # fmt: skip
    right = {"id": f"R{number:05d}", "title": right_title, "brand": brand.upper() if rng.random() < 0.5 else "",
             "category": right_category, "upc": upc, "price": f"{price * rng.lognormal(0, 0.1):.2f}"}  # fmt: skip
    return left, right


def _upc(rng: np.random.Generator) -> str:
    """A random UPC-A with its check digit (GS1: odd places weigh 3)."""
    digits = [int(digit) for digit in rng.integers(0, 10, 11)]
    check = -(3 * sum(digits[0::2]) + sum(digits[1::2])) % 10
    return "".join(map(str, [*digits, check]))


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

    pieces = BertWordPieceTokenizer(_vocabulary(texts), lowercase=True)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=64, hidden_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=64)
    encoder = SentenceTransformer(modules=[transformer, Pooling(width, "mean"), Normalize()], device="cpu")
    encoder.save_pretrained(str(folder), create_model_card=False)


def _vocabulary(texts: list[str]) -> dict[str, int]:
    """WordPiece vocabulary: every character, and every word that occurs twice.

    Counted here because a trained one breaks ties by hash order: it would differ from run to run.
    """
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted({character for word in words for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters)]
    pieces += sorted(word for word, count in words.items() if count > 1 and len(word) > 1)
    return {piece: number for number, piece in enumerate(pieces)}


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(
        SampleSettings, argv, description="Write two generated catalogues and a tiny encoder."
    )
    folder = Path(settings.out)
    write_catalogues(folder, settings.products, settings.seed)
    tables = [
        pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False) for name in ("left", "right")
    ]
    write_tiny_encoder(
        folder / "encoder", [text for table in tables for text in product_text(table)], seed=settings.seed
    )
    print(f"{len(tables[0])} and {len(tables[1])} records, and an encoder with random weights → {folder}")


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
