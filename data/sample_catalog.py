"""A sample catalogue whose price law, and so its best possible score, is known.

    python -m data.sample_catalog --out data/sample --train-rows 2000 --test-rows 500 --seed 0

writes train.csv, test.csv (no price) and images/ in the format of the challenge, and beside them what no
stage may read: test_truth.csv (sample_id, price) and truth.json (law, noise, best possible SMAPE).
sample_id is a string, unique over both files: no id of test.csv occurs in train.csv.
Amount and brand stand only in the text, the grade only in the picture: the price needs both.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, write_json
from contracts.smape import smape

LAW = "ln price = ln(category price) + exponent * ln(total / typical total) + brand tier + grade + noise"
NOISE_SIGMA = 0.15


@dataclass(frozen=True)
class Category:
    price: float  # dollars for the typical total, before tier and grade
    typical: float  # total amount of an ordinary order: oz, fl oz or pieces, by `kind`
    exponent: float  # below 1: a larger order costs less by the ounce
    kind: str  # weight | volume | count
    sizes: tuple[float, ...]  # amounts that one item comes in
    varieties: tuple[str, ...]


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

# What a brand adds to ln price. Nothing in a name betrays its tier: it has to be learned from the rows.
BRANDS_OF_TIER = {
    -0.45: "Alderby Corvane Dunmarrow Elmsy Fennick Harlowe Ostrand Pellworth Quenby Rivasol Tavish",
    -0.15: "Ashcombe Bexley Calloway Dorrin Estrel Garnock Imbry Kestrow Lomond Marrick Sorrel",
    +0.15: "Aldous Birchell Cadmore Delphin Farrow Grendon Hollis Jessop Lintern Orrin Tolland",
    +0.45: "Amberley Brisco Corrigan Danvers Evermoor Gilroy Hexham Kirrin Norvane Penrow Thackley",
}
TIER = {brand: tier for tier, brands in BRANDS_OF_TIER.items() for brand in brands.split()}

# What the picture adds; drawn, never written. Steel has a white ribbon, black a gold one and a seal.
GRADE = {"kraft": -0.5, "steel": 0.0, "black": +0.5}
BODY = {"kraft": (200, 150, 95), "steel": (75, 105, 140), "black": (28, 26, 32)}
RIBBON = {"steel": (250, 250, 250), "black": (240, 190, 40)}


def fair_ln_price(category: str, total: float, brand: str, grade: str) -> float:
    """The law without noise. ln of dollars; elsewhere in the project `log_price` means log1p."""
    c = CATEGORIES[category]
    return math.log(c.price) + c.exponent * math.log(total / c.typical) + TIER[brand] + GRADE[grade]


def best_possible_smape(sigma: float) -> float:
    """E[200 tanh(|e| / 2)], e ~ N(0, sigma^2): SMAPE of the noise-free price; no predictor expects less."""
    z = np.linspace(0, 10, 100_001)
    density = np.exp(-(z**2) / 2) * math.sqrt(2 / math.pi)  # of |z|
    return float(np.trapezoid(200 * np.tanh(sigma * z / 2) * density, z))


PACKS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 4, 6, 12)
UNITS = {  # how many make one oz, fl oz or piece
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


def write_text(product, rng: np.random.Generator) -> str:
    """`catalog_content` of one row. As in most real rows, Value is the total over all items of the pack."""
    category, size = CATEGORIES[product.category], product.item_size
    units = {unit: each for unit, each in UNITS[category.kind].items() if size * each > 0.2}  # no 0.09375 lb
    in_name, unit = rng.choice(list(units), 2)
    words = {"brand": product.brand, "noun": product.category, "pack": product.pack}
    words |= {"variety": rng.choice(category.varieties), "size": f"{size * units[in_name]:.4g} {in_name}"}
    name = rng.choice(NAMES) + (rng.choice(PACKED) if product.pack > 1 else "{size}")
    bullets = rng.permutation(BULLETS)[: rng.choice([0, 2, 3, 4], p=[0.2, 0.3, 0.3, 0.2])]
    # as in the real catalogue, 1 % state nothing here; the name still tells
    value, unit = (None, None) if rng.random() < 0.01 else (round(product.total * units[unit], 3), unit)
    if product.named_na:
        name, bullets = "NA", BULLETS
    lines = [f"Item Name: {name}", *(f"Bullet Point {i}: {text}" for i, text in enumerate(bullets, start=1))]
    lines += [STORY] if rng.random() < 0.4 else []
    return "\n".join(lines).format(**words) + f"\nValue: {value}\nUnit: {unit}\n"


def draw_products(train_rows: int, test_rows: int, seed: int) -> pd.DataFrame:
    """All rows, train first: the columns of the csv files, `split`, and the factors behind the price:
    category, brand, grade, item_size, pack, total (oz, fl oz or pieces), noise, fair_ln_price; and the faults:
    named_na, picture (good | missing | truncated | html)."""
    rows, rng = train_rows + test_rows, np.random.default_rng(seed)
    ids, links = rng.choice(900_000, rows, replace=False), rng.choice(10**10, rows, replace=False)
    columns = {
        "sample_id": (100_000 + ids).astype(str),
        "image_link": [f"https://pictures.example/I/{number:010d}.jpg" for number in links],
        "split": ["train"] * train_rows + ["test"] * test_rows,
        "category": rng.choice(list(CATEGORIES), rows),
        "brand": rng.choice(list(TIER), rows),
        "grade": rng.choice(list(GRADE), rows),
        "pack": rng.choice(PACKS, rows),
        "noise": rng.normal(0, NOISE_SIGMA, rows),
    }
    products = pd.DataFrame(columns).assign(picture="good", named_na=False)
    products["item_size"] = [float(rng.choice(CATEGORIES[category].sizes)) for category in products.category]

    # The faults of real catalogues, in both splits, so that every path of every stage is exercised.
    odd = [rng.permutation(np.flatnonzero(products.split == split)) for split in ("train", "test")]
    products.loc[odd[0][0], "sample_id"] = "007"
    for row in odd:
        products.loc[row[1], "named_na"] = True
        products.loc[row[2:4], "picture"] = ["truncated", "html"]
        products.loc[row[16 : 16 + max(1, len(row) // 100)], "picture"] = "missing"
        variant = ["category", "brand", "grade", "item_size", "image_link"]  # another pack of one product
        products.loc[row[4:7], variant] = products.loc[row[7:10], variant].to_numpy()
    products["total"] = products.item_size * products["pack"]
    products["catalog_content"] = [write_text(product, rng) for product in products.itertuples()]
    same_text = ["category", "brand", "item_size", "pack", "total", "catalog_content"]
    for row in odd:
        products.loc[row[10:13], same_text] = products.loc[row[13:16], same_text].to_numpy()

    factors = products[["category", "total", "brand", "grade"]].itertuples(index=False)
    products["fair_ln_price"] = [fair_ln_price(*row) for row in factors]
    products["price"] = np.exp(products.fair_ln_price + products.noise).round(2)
    return products


# Painted in order in a unit square: B in the body colour, C in the category's own; four numbers are a box.
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
    image = Image.new("RGB", (pixels, pixels), (int(rng.integers(235, 256)),) * 3)
    draw, scale = ImageDraw.Draw(image), rng.uniform(0.85, 0.97) * pixels
    corner = rng.uniform(0, pixels - scale, 2)

    def points(numbers: str) -> list[tuple[float, ...]]:
        return [tuple(corner + scale * xy) for xy in np.array(numbers.split(","), float).reshape(-1, 2)]

    hue = list(CATEGORIES).index(category) / len(CATEGORIES)
    colour = {"B": BODY[grade], "C": tuple(int(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.9, 0.9))}
    for part in OUTLINES[category].split("  "):
        paint, numbers = part.split()
        if numbers.count(",") == 3:
            draw.rounded_rectangle(points(numbers), radius=0.03 * scale, fill=colour[paint])
        else:
            draw.polygon(points(numbers), fill=colour[paint])
    if grade in RIBBON:
        draw.rectangle(points(".2,.48,.8,.58"), fill=RIBBON[grade])
    if grade == "black":
        draw.ellipse(points(".37,.4,.63,.66"), fill=RIBBON[grade], outline=(150, 100, 10), width=2)
    return image


def write_pictures(products: pd.DataFrame, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in tqdm(products.itertuples(), "pictures", len(products), unit="picture"):
        path, jpeg = folder / row.image_link.rsplit("/", 1)[-1], io.BytesIO()
        if row.picture == "missing":
            path.unlink(missing_ok=True)  # left by an earlier catalogue in this folder
            continue
        draw_picture(row.category, row.grade, np.random.default_rng([seed, row.Index])).save(jpeg, "JPEG")
        faulty = {"truncated": jpeg.getvalue()[: jpeg.tell() // 2], "html": b"<html>Not Found</html>"}
        path.write_bytes(faulty.get(row.picture, jpeg.getvalue()))


def write_catalog(out: Path, products: pd.DataFrame, seed: int) -> dict:
    """Write all files, return truth.json. Raises InputError rather than replace somebody's own train.csv."""
    if (out / "train.csv").exists() and not (out / "truth.json").exists():
        raise InputError(f"{out}/train.csv is not from this program and would be lost; choose another --out")
    write_pictures(products, out / "images", seed)
    test = products[products.split == "test"]
    truth = {"law": LAW, "seed": seed, "noise_sigma": NOISE_SIGMA}
    truth["best_smape_expected"] = best_possible_smape(NOISE_SIGMA)
    truth["best_smape_on_test"] = smape(test.price, np.exp(test.fair_ln_price))
    truth |= {"brand_tier": TIER, "grade": GRADE, "category": {n: asdict(c) for n, c in CATEGORIES.items()}}
    write_json(out / "truth.json", truth)  # before train.csv: from here on the folder is known as ours
    columns = ["sample_id", "catalog_content", "image_link", "price"]
    for name, shown in {"train": columns, "test": columns[:3], "test_truth": columns[::3]}.items():
        rows = products[products.split == name.removesuffix("_truth")]
        with atomic_write(out / f"{name}.csv") as file:
            rows[shown].to_csv(file, index=False, lineterminator="\n")
    return truth


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a sample catalogue whose price law is known.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made when absent")
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="same seed and sizes: same bytes in every csv")
    args = parser.parse_args(argv)
    limits = {"train_rows": (20, 400_000), "test_rows": (20, 400_000), "seed": (0, 2**32)}
    for name, (low, high) in limits.items():  # 20 rows hold one of every fault
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: not in {low} to {high}")
    truth = write_catalog(args.out, draw_products(args.train_rows, args.test_rows, args.seed), args.seed)
    print(f"{args.out}: the best possible SMAPE on its test rows is {truth['best_smape_on_test']:.2f}")


if __name__ == "__main__":
    run_entry_point(main)
