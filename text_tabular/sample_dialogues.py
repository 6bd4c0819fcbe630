"""Generate dialogues of a buyer and a seller beside 11 fields, of which the class of each is known to follow.

    python -m text_tabular.sample_dialogues --out demo/dialogues

Each row has three scores, one per class (`buys`, `haggles`, `leaves`): how often the buyer speaks as one of that class
does, plus what the fields say for it. The class is drawn with probabilities softmax(SHARPNESS · score), so text and
fields each decide a part of it, and nobody can do better than the printed best accuracies.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from contracts.files import atomic_write, write_json
from training.settings import parse_settings

CLASSES = ("buys", "haggles", "leaves")
SHARPNESS = 1.6
LEVELS = np.array([0, 1, 2, 3])
"""How much a text, or the fields, speak for a class; each level equally often."""
SAYINGS = {
    "buys": (
        "i will take it today",
        "this is just what i need",
        "where can i pay",
        "please reserve it for me",
    ),
    "haggles": (
        "can you lower the price",
        "is there a discount",
        "that is over my budget",
        "what about half of it",
    ),
    "leaves": (
        "i am only looking around",
        "maybe another time",
        "i have to ask my wife",
        "it is not my colour",
    ),
}
BUYER_FILLER = (
    "hello",
    "how old is it",
    "does it come with a cable",
    "thanks for the quick answer",
    "good morning",
)
SELLER = (
    "it works well", "i can send more pictures", "pick up is possible after six", "it was bought last year",
    "the box is included", "tell me if you have questions",
)  # fmt: skip
COLUMNS = """id: dialogue_id
group: seller_id
text: messages
numeric: [price_ratio, buyer_purchases, answer_minutes, photos, distance_km, seller_rating, days_online, has_warranty]
category: [shipping, district, weekday]
target: outcome
task: classification
"""


@dataclass
class SampleSettings:
    out: Path = Path("demo/dialogues")
    """Folder that receives train.csv, test.csv, columns.yaml and best_scores.json."""
    train_rows: int = 1200
    """Labelled dialogues."""
    test_rows: int = 300
    """Dialogues without a label; test_truth.csv has it."""
    seed: int = 0
    """Seed of everything that is drawn."""


def probabilities(scores: np.ndarray) -> np.ndarray:
    """(N, 3) scores to (N, 3) probabilities of the classes."""
    grown = np.exp(SHARPNESS * (scores - scores.max(axis=1, keepdims=True)))
    return grown / grown.sum(axis=1, keepdims=True)


def messages(level: np.ndarray, generator: np.random.Generator) -> list[str]:
    """A dialogue in which the buyer says `level[k]` different things that speak for class k."""
    said = []
    for name, count in zip(CLASSES, level, strict=True):
        said += generator.choice(SAYINGS[name], size=count, replace=False).tolist()
    said += generator.choice(BUYER_FILLER, size=2, replace=False).tolist()
    turns = []
    for number in generator.permutation(len(said)):
        turns.append(f"buyer: {said[number]}")
        turns.append(f"seller: {generator.choice(SELLER)}")
    return turns


def fields(level: np.ndarray, generator: np.random.Generator) -> dict[str, str]:
    """11 fields. Three of them tell the level of a class each, one way or another; eight are noise or weak echoes."""
    return {
        "price_ratio": f"{1.3 - 0.15 * level[0] + generator.uniform(-0.05, 0.05):.3f}",  # a low price sells
        "buyer_purchases": str(int(3 * level[1] + generator.integers(3))),  # practised buyers haggle
        "shipping": ("free", "cheap", "dear", "pick up only")[level[2]],  # dear shipping makes them leave
        "answer_minutes": f"{generator.exponential(30):.0f}",
        "photos": str(generator.integers(1, 9)),
        "distance_km": f"{generator.gamma(2, 20):.1f}" if generator.random() > 0.1 else "",
        "seller_rating": f"{generator.uniform(3, 5):.1f}",
        "days_online": str(generator.integers(0, 60)),
        "has_warranty": str(bool(generator.random() < 0.3)).lower(),
        "district": f"district {generator.integers(12)}",
        "weekday": ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[generator.integers(7)],
    }


def sample(
    rows: int, generator: np.random.Generator, prefix: str
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """A table of dialogues, and how much text and fields speak for each class, (N, 3) each."""
    in_text = generator.choice(LEVELS, size=(rows, 3))
    in_fields = generator.choice(LEVELS, size=(rows, 3))
    chances = probabilities(in_text + in_fields)
    lines = []
    for number in range(rows):
        outcome = CLASSES[generator.choice(3, p=chances[number])]
        lines.append(
            {
                "dialogue_id": f"{prefix}{number:05d}",
                "seller_id": f"{prefix}{generator.integers(rows // 2)}",
                "messages": json.dumps(messages(in_text[number], generator)),
                **fields(in_fields[number], generator),
                "outcome": outcome,
            }
        )
    return pd.DataFrame(lines), in_text, in_fields


def best_accuracies(in_text: np.ndarray, in_fields: np.ndarray) -> dict[str, float]:
    """The accuracy of whoever knows the generator: from both sides, from the text alone, from the fields alone."""
    other = np.array(list(itertools.product(LEVELS, repeat=3)))  # all levels of the side that is not seen
    one_side = {}
    for name, seen in (("text", in_text), ("fields", in_fields)):
        chances = [probabilities(level + other).mean(axis=0).max() for level in seen]
        one_side[name] = float(np.mean(chances))
    return {"both": float(probabilities(in_text + in_fields).max(axis=1).mean()), **one_side}


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(SampleSettings, argv, description=__doc__.split("\n")[0])
    generator = np.random.default_rng(settings.seed)
    train, in_text, in_fields = sample(settings.train_rows, generator, "a")
    test, *of_test = sample(settings.test_rows, generator, "b")
    for name, table in (
        ("train", train),
        ("test", test.drop(columns="outcome")),
        ("test_truth", test[["dialogue_id", "outcome"]]),
    ):
        with atomic_write(settings.out / f"{name}.csv") as file:
            table.to_csv(file, index=False)
    with atomic_write(settings.out / "columns.yaml") as file:
        file.write(COLUMNS)
    best = {"train": best_accuracies(in_text, in_fields), "test": best_accuracies(*of_test)}
    write_json(settings.out / "best_scores.json", best)
    listed = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in best["test"].items())
    print(f"{settings.out}: {len(train)} + {len(test)} dialogues; best possible accuracy on test: {listed}")


if __name__ == "__main__":
    run_entry_point(main)
