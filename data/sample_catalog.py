"""A sample catalogue whose price law is known, and with it the best score that any model can reach.

    python -m data.sample_catalog --out data/sample --train-rows 2000 --test-rows 500 --seed 0

The folder receives train.csv, test.csv (without prices) and images/ in the format of the challenge. Beside them lie two
files that no stage may read: test_truth.csv (sample_id, price) and truth.json (law, noise, best possible SMAPE).
A sample_id is a string, and no id of test.csv occurs in train.csv.

Amount and brand stand only in the text, and the grade shows only in the picture, so the price needs both. Both tables
also have the faults of real catalogues: broken and missing pictures, shared pictures, repeated texts, an odd id and a
product called "NA".
"""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from tqdm import tqdm

from contracts.catalog import TEXT_COLUMNS
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from contracts.smape import smape, smape_of_ln
from contracts.workspace import SPLITS
from training.settings import parse_settings

LAW = "ln price = ln(category price) + exponent * ln(total / typical total) + brand tier + grade + noise"
NOISE_SIGMA = 0.15
"""Standard deviation of the noise in ln price."""

FEWEST_ROWS = 20
"""The smallest split: a smaller one could not hold every fault."""
MOST_ROWS = 400_000
"""The largest split: sample_ids are six digits, drawn without replacement."""
MOST_SEED = 2**32


@dataclass
class SampleSettings:
    out: Path = Path("data/sample")
    """Folder to write; it is made when absent."""
    train_rows: int = 2000
    """Products with a price."""
    test_rows: int = 500
    """Products to price."""
    seed: int = 0
    """The same seed and sizes give the same bytes in every csv."""

    def __post_init__(self) -> None:
        _check_range("--train-rows", self.train_rows, FEWEST_ROWS, MOST_ROWS)
        _check_range("--test-rows", self.test_rows, FEWEST_ROWS, MOST_ROWS)
        _check_range("--seed", self.seed, 0, MOST_SEED)


def _check_range(flag: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"{flag} {value}: must be {low} to {high}")


@dataclass(frozen=True)
class Category:
    price: float
    """Dollars for the typical total, before tier and grade."""
    typical: float
    """Total amount of an ordinary order in ounces, fluid ounces or pieces, by `kind`."""
    exponent: float
    """Below 1: a larger order costs less per ounce."""
    kind: str
    """weight, volume or count."""
    sizes: tuple[float, ...]
    """Amounts that one item comes in."""
    varieties: tuple[str, ...]
    """Words for the name; they do not change the price."""


CATEGORIES = {
    "Ground Coffee": Category(17, 24, 0.65, "weight", (8, 12, 16, 32), ("Dark Roast", "Hazelnut", "Decaf")),
    "Tea Bags": Category(8, 40, 0.55, "count", (16, 20, 50, 80), ("Peppermint", "Earl Grey", "Ginger Lemon")),
    "Olive Oil": Category(28, 34, 0.65, "volume", (8.5, 16.9, 25.4, 34), ("Cold Pressed", "Mild", "Garlic")),
    "Sparkling Water": Category(6, 36, 0.50, "volume", (8, 12, 16, 33.8), ("Lime", "Grapefruit", "Cherry")),
    "Honey": Category(15, 24, 0.70, "weight", (8, 12, 16, 32), ("Clover", "Wildflower", "Buckwheat")),
    "Seasoning": Category(7, 6, 0.45, "weight", (1.5, 2.5, 5, 12), ("Barbecue", "Lemon Pepper", "Taco")),
    "Protein Powder": Category(42, 36, 0.50, "weight", (16, 24, 32, 64), ("Vanilla", "Chocolate", "Banana")),
    "Granola Bars": Category(11, 16, 0.65, "count", (5, 6, 12, 18), ("Oat and Almond", "Peanut", "Coconut")),
    "Pasta": Category(5, 24, 0.55, "weight", (8, 12, 16, 32), ("Penne", "Spaghetti", "Whole Wheat Rotini")),
    "Chocolate": Category(9, 8, 0.60, "weight", (1.75, 3, 3.5, 10), ("Dark", "Milk", "Sea Salt")),
    "Tablets": Category(22, 120, 0.45, "count", (30, 60, 90, 180), ("Vitamin C", "B Complex", "Zinc")),
    "Dish Soap": Category(9, 40, 0.60, "volume", (16, 19.4, 24, 64), ("Lavender", "Lemon", "Green Apple")),
}

# What a brand adds to ln price. Nothing in a name betrays its tier: a model has to learn it from the rows.
BRANDS_OF_TIER = {
    -0.45: "Alderby Corvane Dunmarrow Elmsy Fennick Harlowe Ostrand Pellworth Quenby Rivasol Tavish",
    -0.15: "Ashcombe Bexley Calloway Dorrin Estrel Garnock Imbry Kestrow Lomond Marrick Sorrel",
    +0.15: "Aldous Birchell Cadmore Delphin Farrow Grendon Hollis Jessop Lintern Orrin Tolland",
    +0.45: "Amberley Brisco Corrigan Danvers Evermoor Gilroy Hexham Kirrin Norvane Penrow Thackley",
}
TIER = {brand: tier for tier, brands in BRANDS_OF_TIER.items() for brand in brands.split()}

# What a grade adds to ln price. It is drawn and never written: steel has a white ribbon, black a gold one and a seal.
GRADE = {"kraft": -0.5, "steel": 0.0, "black": +0.5}
BODY = {"kraft": (200, 150, 95), "steel": (75, 105, 140), "black": (28, 26, 32)}
RIBBON = {"steel": (250, 250, 250), "black": (240, 190, 40)}
GOLD_RIM = (150, 100, 10)


def fair_ln_price(category: str, total: float, brand: str, grade: str) -> float:
    """The law without noise: ln of dollars, whereas `log_price` elsewhere in the project means log1p.

    Args:
        total: amount of the whole order in ounces, fluid ounces or pieces.
    """
    law = CATEGORIES[category]
    of_amount = law.exponent * math.log(total / law.typical)
    return math.log(law.price) + of_amount + TIER[brand] + GRADE[grade]


def best_possible_smape(sigma: float) -> float:
    """SMAPE of a model that predicts the noise-free price; no model can expect less.

    It is E[200 tanh(|e| / 2)] for noise e ~ N(0, sigma²) in ln price (see `contracts.smape.smape_of_ln`), integrated
    over z = |e| / sigma up to ten standard deviations.
    """
    z = np.linspace(0, 10, 100_001)
    density_of_z = np.exp(-(z**2) / 2) * math.sqrt(
        2 / math.pi
    )  # twice the normal density: z is an absolute value
    return float(np.trapezoid(smape_of_ln(sigma * z) * density_of_z, z))


PACKS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 6, 12)
"""Items per order; a product draws one of these, so half of the products are single items."""
UNITS: dict[str, dict[str, float]] = {  # how many of each unit make one ounce, fluid ounce or piece
    "weight": {"Ounce": 1, "ounce": 1, "oz": 1, "OZ": 1, "lb": 1 / 16, "Pound": 1 / 16, "gram": 28.349523},
    "volume": {"Fl Oz": 1, "fl oz": 1, "Fluid Ounce": 1, "Fl. Oz": 1, "ml": 29.573530},
    "count": {"Count": 1, "count": 1, "ct": 1},
}
NAMES = ("{brand} {variety} {noun}, ", "{brand} {noun} {variety} ", "{variety} {noun} by {brand}, ")
PACKED = ("{size} (Pack of {pack})", "{size}, {pack}-Pack", "{pack} x {size}", "{size} - Pack of {pack}")
BULLETS = (
    "{variety} {noun} from {brand}, a steady favorite at home and on the road",
    "Net content {pack} x {size}",
    "Free from artificial colors; keep in a cool, dry place",
    "Questions? {brand} answers every letter within two days",
)
STORY = "Product Description: {brand} has made {noun} for three generations. Try the {variety} next."


BULLET_COUNTS = (0, 2, 3, 4)
BULLET_CHANCES = (0.2, 0.3, 0.3, 0.2)
STORY_CHANCE = 0.4
NOTHING_STATED_CHANCE = 0.01
"""As in the real catalogue, one text in a hundred has "None" as Value and Unit; its name still tells the size."""
SMALLEST_SIZE = 0.2
"""A unit in which the size would be smaller is not used: nobody writes 0.09375 lb."""


def write_text(product, rng: np.random.Generator) -> str:
    """`catalog_content` of one row of `draw_products`.

    As in most real rows, the Value line states the total over all items of the pack.
    """
    category = CATEGORIES[product.category]
    size = product.item_size
    units = {}
    for unit, per_canonical in UNITS[category.kind].items():
        if size * per_canonical > SMALLEST_SIZE:
            units[unit] = per_canonical
    unit_in_name, unit_of_value = rng.choice(list(units), 2)
    words = {
        "brand": product.brand,
        "noun": product.category,
        "variety": rng.choice(category.varieties),
        "size": f"{size * units[unit_in_name]:.4g} {unit_in_name}",
        "pack": product.pack,
    }

    name = rng.choice(NAMES)
    name += rng.choice(PACKED) if product.pack > 1 else "{size}"
    bullets = list(rng.permutation(BULLETS))
    bullets = bullets[: rng.choice(BULLET_COUNTS, p=BULLET_CHANCES)]
    states_nothing = rng.random() < NOTHING_STATED_CHANCE
    has_story = rng.random() < STORY_CHANCE
    if product.named_na:  # the bullet points still tell what it is
        name = "NA"
        bullets = list(BULLETS)

    lines = [f"Item Name: {name}"]
    lines += [f"Bullet Point {number}: {text}" for number, text in enumerate(bullets, start=1)]
    if has_story:
        lines.append(STORY)
    text = "\n".join(lines).format(**words)
    if states_nothing:
        return text + "\nValue: None\nUnit: None\n"
    value = round(product.total * units[unit_of_value], 3)
    return text + f"\nValue: {value}\nUnit: {unit_of_value}\n"


FAULTY_ROWS = {
    "odd_id": 1,
    "named_na": 1,
    "truncated_picture": 1,
    "html_picture": 1,
    "other_pack": 3,
    "other_pack_original": 3,
    "repeated_text": 3,
    "repeated_text_original": 3,
}
"""Rows per split that take part in each fault. An original is a row that others are copied from."""
MISSING_PICTURE_EVERY = 100
"""One picture in a hundred is missing, and at least one per split."""
ODD_ID = "007"
"""An id that a reader of numbers would turn into 7. Only train has it, since ids are unique over both files."""
OTHER_PACK_COLUMNS = ["category", "brand", "grade", "item_size", "image_link"]
"""What another pack of one product shares with it; the number of items, and so the price, is its own."""
REPEATED_TEXT_COLUMNS = ["category", "brand", "item_size", "pack", "total", "catalog_content"]
"""What rows of one text share; the grade, and so the price, may differ."""


def deal_faults(shuffled_rows: np.ndarray) -> dict[str, list[int]]:
    """The row numbers that each fault falls on, dealt from one shuffled split so that no row has two."""
    counts = FAULTY_ROWS | {"missing_picture": max(1, len(shuffled_rows) // MISSING_PICTURE_EVERY)}
    deck = iter(shuffled_rows)
    return {fault: list(islice(deck, count)) for fault, count in counts.items()}


def draw_products(train_rows: int, test_rows: int, seed: int) -> pd.DataFrame:
    """All products, those of train first.

    Returns:
        DataFrame with the columns of the csv files; `split`; the factors behind the price: category, brand, grade,
        item_size, pack, total (ounces, fluid ounces or pieces), noise, fair_ln_price; and the faults: named_na (bool),
        picture (good, missing, truncated or html).
    """
    rows = train_rows + test_rows
    rng = np.random.default_rng(seed)
    # The order of the draws is part of the format: the same seed must always give the same bytes.
    ids = 100_000 + rng.choice(900_000, rows, replace=False)
    pictures = rng.choice(10**10, rows, replace=False)
    products = pd.DataFrame({
        "sample_id": ids.astype(str),
        "image_link": [f"https://pictures.example/I/{number:010d}.jpg" for number in pictures],
        "split": ["train"] * train_rows + ["test"] * test_rows,
        "category": rng.choice(list(CATEGORIES), rows),
        "brand": rng.choice(list(TIER), rows),
        "grade": rng.choice(list(GRADE), rows),
        "pack": rng.choice(PACKS, rows),
        "noise": rng.normal(0, NOISE_SIGMA, rows),
        "picture": "good",
        "named_na": False,
    })  # fmt: skip
    products["item_size"] = [float(rng.choice(CATEGORIES[name].sizes)) for name in products["category"]]

    faults = {}  # both splits have them, so that every path of every stage is exercised
    for split in SPLITS:
        of_split = np.flatnonzero(products["split"] == split)
        faults[split] = deal_faults(rng.permutation(of_split))
    products.loc[faults["train"]["odd_id"], "sample_id"] = ODD_ID
    for fault in faults.values():
        products.loc[fault["named_na"], "named_na"] = True
        products.loc[fault["truncated_picture"], "picture"] = "truncated"
        products.loc[fault["html_picture"], "picture"] = "html"
        products.loc[fault["missing_picture"], "picture"] = "missing"
        _copy(products, OTHER_PACK_COLUMNS, fault["other_pack_original"], fault["other_pack"])

    products["total"] = products["item_size"] * products["pack"]
    products["catalog_content"] = [write_text(product, rng) for product in products.itertuples()]
    for fault in faults.values():
        _copy(products, REPEATED_TEXT_COLUMNS, fault["repeated_text_original"], fault["repeated_text"])

    factors = products[["category", "total", "brand", "grade"]].itertuples(index=False)
    products["fair_ln_price"] = [fair_ln_price(*of_row) for of_row in factors]
    products["price"] = np.exp(products["fair_ln_price"] + products["noise"]).round(2)
    return products


def _copy(products: pd.DataFrame, columns: list[str], source: list[int], target: list[int]) -> None:
    products.loc[target, columns] = products.loc[source, columns].to_numpy()


# Shapes that are painted in this order in a unit square whose origin is the upper left corner. B has the grade's body
# colour, C the category's own. Four numbers are a box (left, top, right, bottom); more are corners, x before y.
OUTLINES = {
    "Ground Coffee": "B .22,.2,.78,.2,.86,.95,.14,.95  C .2,.1,.8,.25  C .32,.66,.68,.88",
    "Tea Bags": "B .05,.25,.95,.9  C .05,.25,.25,.9  C .75,.25,.95,.9",
    "Olive Oil": "B .42,.05,.58,.3  B .28,.28,.72,.97  C .4,.02,.6,.14  C .28,.64,.72,.88",
    "Sparkling Water": "B .3,.08,.7,.95  C .33,.03,.67,.13  C .3,.64,.7,.74  C .3,.8,.7,.88",
    "Honey": "B .14,.28,.86,.28,.96,.6,.86,.95,.14,.95,.04,.6  C .2,.1,.8,.29  C .3,.7,.7,.88",
    "Seasoning": "B .34,.35,.66,.97  C .34,.12,.66,.37",
    "Protein Powder": "B .08,.22,.92,.97  C .04,.04,.96,.24  C .08,.7,.92,.84",
    "Granola Bars": "B .02,.32,.98,.76  C .02,.32,.2,.76  C .8,.32,.98,.76",
    "Pasta": "B .2,.2,.8,.97  C .2,.2,.5,.02,.8,.2  C .28,.64,.72,.9",
    "Chocolate": "B .22,.04,.78,.97  C .22,.04,.78,.04,.22,.42  C .46,.68,.78,.97",
    "Tablets": "B .22,.34,.78,.97  B .34,.24,.66,.36  C .26,.06,.74,.26  C .22,.7,.78,.88",
    "Dish Soap": "B .5,.3,.8,.5,.8,.97,.2,.97,.2,.5  C .43,.1,.57,.34  C .26,.06,.57,.16  C .3,.66,.7,.9",
}


def draw_picture(category: str, grade: str, rng: np.random.Generator, pixels: int = 128) -> Image.Image:
    """(pixels, pixels) RGB: the category's outline in the grade's colours; place, size and light vary."""
    light = int(rng.integers(235, 256))
    image = Image.new("RGB", (pixels, pixels), (light, light, light))
    draw = ImageDraw.Draw(image)
    scale = rng.uniform(0.85, 0.97) * pixels
    corner = rng.uniform(0, pixels - scale, 2)

    def points(numbers: str) -> list[tuple[float, ...]]:
        in_unit_square = np.array(numbers.split(","), float).reshape(-1, 2)
        return [tuple(corner + scale * xy) for xy in in_unit_square]

    hue = list(CATEGORIES).index(category) / len(CATEGORIES)
    own_colour = tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.9, 0.9))
    colours = {"B": BODY[grade], "C": own_colour}
    for shape in OUTLINES[category].split("  "):
        paint, numbers = shape.split()
        is_box = numbers.count(",") == 3
        if is_box:
            draw.rounded_rectangle(points(numbers), radius=0.03 * scale, fill=colours[paint])
        else:
            draw.polygon(points(numbers), fill=colours[paint])
    if grade in RIBBON:
        draw.rectangle(points(".2,.48,.8,.58"), fill=RIBBON[grade])
    if grade == "black":
        draw.ellipse(points(".37,.4,.63,.66"), fill=RIBBON[grade], outline=GOLD_RIM, width=2)
    return image


def write_pictures(products: pd.DataFrame, folder: Path, seed: int) -> None:
    """Draw the picture of every product; each has a generator of its own, so that rows do not depend on each other."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in tqdm(products.itertuples(), "pictures", len(products), unit=" pictures"):
        path = folder / row.image_link.rsplit("/", 1)[-1]
        if row.picture == "missing":
            path.unlink(missing_ok=True)  # an earlier catalogue in this folder may have left one
            continue
        picture = draw_picture(row.category, row.grade, np.random.default_rng([seed, row.Index]))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        jpeg = buffer.getvalue()
        if row.picture == "truncated":
            jpeg = jpeg[: len(jpeg) // 2]
        elif row.picture == "html":
            jpeg = b"<html>Not Found</html>"
        path.write_bytes(jpeg)


def write_catalog(out: Path, products: pd.DataFrame, seed: int) -> dict:
    """Write all files and return the content of truth.json.

    Raises:
        InputError: the folder holds a train.csv that this program did not write.
    """
    if (out / "train.csv").exists() and not (out / "truth.json").exists():
        raise InputError(f"{out}/train.csv is not from this program and would be lost; choose another --out")
    write_pictures(products, out / "images", seed)
    train = products[products["split"] == "train"]
    test = products[products["split"] == "test"]
    truth = {
        "law": LAW,
        "seed": seed,
        "noise_sigma": NOISE_SIGMA,
        "best_smape_expected": best_possible_smape(NOISE_SIGMA),
        "best_smape_on_test": smape(test["price"], np.exp(test["fair_ln_price"])),
        "brand_tier": TIER,
        "grade": GRADE,
        "category": {name: asdict(category) for name, category in CATEGORIES.items()},
    }
    write_json(out / "truth.json", truth)  # before train.csv: from here on the folder is known to be ours
    _write_csv(out / "train.csv", train, [*TEXT_COLUMNS, "price"])
    _write_csv(out / "test.csv", test, [*TEXT_COLUMNS])
    _write_csv(out / "test_truth.csv", test, ["sample_id", "price"])
    return truth


def _write_csv(path: Path, table: pd.DataFrame, columns: list[str]) -> None:
    with atomic_write(path) as file:
        table[columns].to_csv(file, index=False, lineterminator="\n")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(SampleSettings, argv, description=__doc__.split("\n")[0])
    products = draw_products(settings.train_rows, settings.test_rows, settings.seed)
    truth = write_catalog(settings.out, products, settings.seed)
    print(f"{settings.out}: the best possible SMAPE on its test rows is {truth['best_smape_on_test']:.2f}")


if __name__ == "__main__":
    run_entry_point(main)
