"""Draw a world of products with known attributes, and train a small vision-language model that can describe them.

    python -m attributes.sample_world --out demo/attributes/world

Each picture shows a shape in a colour before a pattern. The base model learns to say what it sees, and that sellers
have words of their own for it: `The colour is red. Red is called ruby.` Which word means what changes from sentence to
sentence, so the base knows how to reason and not what the answer is. The vertical then fixes the words, and a few
labelled listings show them: that is what SFT has to learn, and what chains can get wrong.

Out come train.csv and test.csv with images/, as data.prepare reads them; labels.csv, calibration_labels.csv and
test_labels.csv; schema.yaml; and the base model in base/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from attributes.config import SIDE
from attributes.schema import Attribute
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, read_json, write_json
from training.settings import parse_settings

if TYPE_CHECKING:
    from attributes.model import VisionLanguage

FACTS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "violet"),
    "shape": ("circle", "square", "triangle", "cross"),
    "pattern": ("plain", "stripes", "dots", "checks"),
}
"""What a picture shows."""
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "colour": ("tone", ("ruby", "jade", "amber", "onyx", "pearl")),
    "shape": ("form", ("mono", "duo", "trio", "quad")),
    "pattern": ("finish", ("classic", "urban", "retro", "sport")),
}
"""Fact to the attribute of the vertical and the words that sellers use for its values."""
PAINT = {
    "red": (205, 40, 40), "blue": (45, 70, 200), "green": (40, 150, 60), "yellow": (225, 200, 40),
    "violet": (140, 50, 170),
}  # fmt: skip
BLOCK = 8
"""Pixels per side of the squares that noise comes in."""
GREY = (150, 150, 150)
VERTICAL = "buttons"
Facts = dict[str, str]


@dataclass
class WorldSettings:
    out: Path = Path("demo/attributes/world")
    """Folder that receives the world."""
    labelled: int = 10
    """Listings with labels to learn from."""
    calibration: int = 60
    """Listings with labels that the calibration is fitted on."""
    unlabelled: int = 200
    """Listings without labels."""
    test: int = 100
    """Listings with labels to score on."""
    noise: float = 60.0
    """Standard deviation of the noise on every square of 8 pixels, in levels of 0 to 255."""
    steps: int = 500
    """Steps of training the base model; 0 leaves its random weights."""
    batch_size: int = 24
    """Pictures per step of training the base model."""
    lr: float = 2e-3
    """Peak learning rate of training the base model."""
    seed: int = 0
    """Seed of everything that is drawn; a base model is kept for every seed that finds it."""


def draw_facts(generator: np.random.Generator) -> Facts:
    return {fact: str(generator.choice(values)) for fact, values in FACTS.items()}


def draw_picture(facts: Facts, noise: float, generator: np.random.Generator) -> Image.Image:
    """A picture of SIDE by SIDE pixels: the pattern behind, the shape in its colour before it, and noise over all."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    step = int(generator.integers(26, 34))
    for at in range(0, SIDE, step):
        if facts["pattern"] == "stripes":
            pen.rectangle((at, 0, at + step // 2, SIDE), fill=GREY)
        for other in range(0, SIDE, step):
            box = (at, other, at + step // 2, other + step // 2)
            if facts["pattern"] == "dots":
                pen.ellipse(box, fill=GREY)
            elif facts["pattern"] == "checks" and (at // step + other // step) % 2:
                pen.rectangle((at, other, at + step, other + step), fill=GREY)
    half = int(generator.integers(42, 66))
    x, y = generator.integers(half + 4, SIDE - half - 4, size=2).tolist()
    box = (x - half, y - half, x + half, y + half)
    paint = PAINT[facts["colour"]]
    if facts["shape"] == "circle":
        pen.ellipse(box, fill=paint)
    elif facts["shape"] == "square":
        pen.rectangle(box, fill=paint)
    elif facts["shape"] == "triangle":
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=paint)
    else:
        pen.rectangle((x - half, y - half // 3, x + half, y + half // 3), fill=paint)
        pen.rectangle((x - half // 3, y - half, x + half // 3, y + half), fill=paint)
    # in blocks: a patch averages finer noise away
    coarse = noise * generator.standard_normal((SIDE // BLOCK, SIDE // BLOCK, 3), np.float32)
    pixels = np.asarray(picture, np.float32) + coarse.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def attribute_of(fact: str) -> Attribute:
    """The attribute of the vertical that stands for a fact."""
    name, words = NAMES[fact]
    spellings = tuple((word, word) for word in words)
    return Attribute(VERTICAL, name, "closed", f"Which {name} is it?", words, spellings)


def plain_attribute(fact: str) -> Attribute:
    """The fact itself, as the base model is asked for it."""
    values = FACTS[fact]
    return Attribute(VERTICAL, fact, "closed", f"Which {fact} is it?", values)


def reasoning(fact: str, value: str, word: str | None) -> str:
    said = f"The {fact} is {value}."
    return said if word is None else f"{said} {value.capitalize()} is called {word}."


def lesson(facts: Facts, generator: np.random.Generator) -> tuple[Attribute, bool, str]:
    """What the base model is taught with one picture: the attribute to ask for, whether to reason, and the reply."""
    fact = str(generator.choice(list(FACTS)))
    steps = bool(generator.random() < 0.5)
    if generator.random() < 0.5:
        attribute, answer = plain_attribute(fact), facts[fact]
        said = reasoning(fact, answer, None)
    else:
        attribute = attribute_of(fact)
        answer = str(generator.choice(attribute.values))  # another word in every sentence
        said = reasoning(fact, facts[fact], answer)
    return attribute, steps, f"{said}\nAnswer: {answer}" if steps else f"Answer: {answer}"


def train_base(settings: WorldSettings) -> VisionLanguage:
    """A tiny model that has learned the lessons, on pictures that no listing has."""
    import torch

    from attributes.chains import Question, prompt
    from attributes.data import Listing
    from attributes.model import Prompt, Spec, VisionLanguage
    from attributes.tiny import build_tiny
    from training.schedule import learning_rate_factor

    generator = np.random.default_rng(12345)  # not the seed: a base serves the verticals of many seeds
    torch.manual_seed(0)
    texts = []
    for _ in range(600):
        attribute, steps, reply = lesson(draw_facts(generator), generator)
        question = Question(Listing("", VERTICAL, "", ()), attribute)
        texts.append(prompt(question, pictures=1, text="Item Name: Button", reasoning=steps) + reply)
    model, tokenizer, image_processor = build_tiny(texts)
    spec = Spec("", "", "pictures", "pad", 64, True)
    language = VisionLanguage(model, tokenizer, image_processor, spec, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate_factor(step, settings.steps, 0.05)
        squares, prompts, replies, names = [], [], [], []
        for number in range(settings.batch_size):
            facts = draw_facts(generator)
            squares.append(draw_picture(facts, settings.noise, generator))
            name = str(number)
            names.append(name)
            # three lessons with every picture: most of a step's work is in the tower
            for _ in range(3):
                attribute, steps, reply = lesson(facts, generator)
                question = Question(Listing(name, VERTICAL, "", (name,)), attribute)
                text = prompt(question, pictures=1, text="", reasoning=steps)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                prompts.append(Prompt(language.with_vectors(ids), [name]))
                replies.append(language.reply_ids(reply))
        language.show_vectors(dict(zip(names, language.encode(squares), strict=True)))
        of_tokens, exist = language.log_probabilities(prompts, replies)
        loss = -of_tokens.sum() / exist.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"base model: step {step + 1} of {settings.steps}, loss {loss.item():.3f}", flush=True)
    language.forget()
    model.eval()
    return language


def write_base(settings: WorldSettings, folder: Path) -> None:
    """The base model, unless the folder holds one of the same settings."""
    from attributes.tiny import save_tiny

    recipe = {name: getattr(settings, name) for name in ("noise", "steps", "batch_size", "lr")}
    if (folder / "recipe.json").is_file() and read_json(folder / "recipe.json") == recipe:
        return
    language = train_base(settings)
    save_tiny(folder, language.model, language.tokenizer, language.image_processor)
    write_json(folder / "recipe.json", recipe)


def write_listings(settings: WorldSettings) -> None:
    """Listings, pictures, labels and the schema of one vertical."""
    generator = np.random.default_rng([settings.seed, 1])
    words: dict[str, dict[str, str]] = {}
    factors: dict[str, float] = {}
    for fact, values in FACTS.items():
        shuffled = generator.permutation(NAMES[fact][1]).tolist()
        words[fact] = dict(zip(values, shuffled, strict=True))
        factors |= {value: float(generator.uniform(0.6, 1.6)) for value in values}
    parts = {
        "labels": settings.labelled, "calibration_labels": settings.calibration, "": settings.unlabelled,
        "test_labels": settings.test,
    }  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for part, count in parts.items():
        labels = []
        for number in range(count):
            sample_id = f"{part.split('_')[0] or 'unlabelled'}{number:05d}"
            facts = draw_facts(generator)
            picture = draw_picture(facts, settings.noise, generator)
            with atomic_write(settings.out / "images" / f"{sample_id}.jpg", "wb") as file:
                picture.save(file, format="JPEG", quality=90)
            price = 10 * np.prod([factors[value] for value in facts.values()]) * generator.lognormal(0, 0.1)
            row = {
                "sample_id": sample_id,
                "catalog_content": f"Item Name: Button {sample_id}\nValue: 1\nUnit: Count",
                "image_link": f"{sample_id}.jpg",
                "price": round(float(price), 2),
            }
            rows["test" if part == "test_labels" else "train"].append(row)
            for fact, value in facts.items():
                word = words[fact][value]
                labels.append(
                    {
                        "sample_id": sample_id,
                        "attribute": NAMES[fact][0],
                        "value": word,
                        "reasoning": reasoning(fact, value, word),
                    }
                )
        if part:
            with atomic_write(settings.out / f"{part}.csv") as file:
                pd.DataFrame(labels).to_csv(file, index=False)
    for table, listings in rows.items():
        frame = pd.DataFrame(listings)
        with atomic_write(settings.out / f"{table}.csv") as file:
            (frame if table == "train" else frame.drop(columns="price")).to_csv(file, index=False)
    lines = ["verticals:", f"  {VERTICAL}:"]
    for fact in FACTS:
        attribute = attribute_of(fact)
        lines.append(f"    {attribute.name}:")
        lines.append(f"      question: {attribute.question}")
        lines.append(f"      values: [{', '.join(attribute.values)}]")
    with atomic_write(settings.out / "schema.yaml") as file:
        file.write("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(WorldSettings, argv, description=__doc__.split("\n")[0])
    for name in ("labelled", "calibration", "unlabelled", "test", "batch_size"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name} {getattr(settings, name)}: must be at least 1")
    write_base(settings, settings.out / "base")
    write_listings(settings)
    listings = settings.labelled + settings.calibration + settings.unlabelled + settings.test
    print(f"{settings.out}: {listings} listings, {settings.labelled} of them with labels to learn from")


if __name__ == "__main__":
    run_entry_point(main)
