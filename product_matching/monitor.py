"""Watch decisions in use: precision on reviewed pairs, drift against training, and the pairs most worth a look.

    python -m product_matching.decide … --log decisions            # logging is off by default
    python -m product_matching.monitor --log decisions --model checkpoints/match_decision/decision --out monitor
    python -m product_matching.monitor --log decisions --model … --reviewed labels.csv

Writes report.json and review.html. On that page a person marks pairs and exports them as labels.csv, which --reviewed
reads and whose rows can be appended to the pairs.csv of the next training.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, read_json, read_versioned, write_json
from product_matching.catalogue import product_text
from product_matching.config import MonitorSettings
from product_matching.decision import SCHEMA, probability_histogram
from product_matching.features import plain, words_of
from product_matching.review import review_page
from training.settings import parse_settings

if TYPE_CHECKING:
    from product_matching.decision import DecisionModel, Records, Verdicts

SHOWN_WORDS = 10
LARGE_DRIFT = 0.25
"""A population stability index above this is commonly called a large shift, one below 0.1 none."""
_COLUMNS = (
    "time",
    "run",
    "left_id",
    "right_id",
    "left",
    "right",
    "cosine",
    "probability",
    "threshold",
    "match",
)


def log_decisions(
    folder: Path | str,
    left: Records,
    right: Records,
    rows: np.ndarray,
    verdicts: Verdicts,
    model: DecisionModel,
) -> Path:
    """Add the decisions on n pairs to a log, as one parquet file of its own, and return that file."""
    left_texts = np.array(product_text(left.table), object)
    right_texts = np.array(product_text(right.table), object)
    now = time.time()
    table = pd.DataFrame(
        {
            "time": now,
            "run": model.meta["run"],
            "left_id": left.table["id"].to_numpy()[rows[:, 0]],
            "right_id": right.table["id"].to_numpy()[rows[:, 1]],
            "left": left_texts[rows[:, 0]],
            "right": right_texts[rows[:, 1]],
            "cosine": verdicts.evidence.cosine,
            "probability": verdicts.probability,
            "threshold": model.threshold,
            "match": verdicts.match,
        }
    )
    # several processes may log at once, so each call writes a file that nobody else has
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    path = Path(folder) / f"decisions-{stamp}-{uuid.uuid4().hex[:8]}.parquet"
    with atomic_write(path, "wb") as file:
        table.to_parquet(file, index=False)
    return path


def read_log(folder: Path | str) -> pd.DataFrame:
    """All logged decisions; of a pair that was decided several times the last one.

    Raises InputError for a folder without a log, and for a file that is damaged or of another form.
    """
    files = sorted(Path(folder).glob("decisions-*.parquet"))
    if not files:
        raise InputError(
            f"{folder}: no decisions-*.parquet there; log some with product_matching.decide --log"
        )
    tables = []
    for file in files:
        try:
            table = pd.read_parquet(file)
        except (OSError, ValueError) as error:  # what pyarrow raises is a ValueError
            raise InputError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None
        if missing := [column for column in _COLUMNS if column not in table.columns]:
            raise InputError(f"{file}: column {missing[0]} is missing; this is no log of decisions")
        tables.append(table)
    log = pd.concat(tables, ignore_index=True).sort_values("time", kind="stable")
    return log.drop_duplicates(["left_id", "right_id"], keep="last", ignore_index=True)


def read_reviewed(path: Path | str) -> pd.DataFrame:
    """Reviewed pairs: left_id, right_id and match (bool). Raises InputError for a label that is neither 0 nor 1."""
    table = read_table(Path(path))
    for column in ("left_id", "right_id", "match"):
        if column not in table.columns:
            raise InputError(f"{path}: column {column} is missing; found {', '.join(table.columns)}")
    bad = ~table["match"].isin(["0", "1"])
    if bad.any():
        raise InputError(f"{path}: match {table.loc[bad, 'match'].iloc[0]!r} is neither 0 nor 1")
    reviewed = table[["left_id", "right_id"]].assign(reviewed=table["match"] == "1")
    return reviewed.drop_duplicates(["left_id", "right_id"], keep="last")


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, "Probable inference, the law of succession")."""
    z = 1.96
    share = right / count
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return float(center - half), float(center + half)


def stability_index(reference: np.ndarray, now: np.ndarray) -> float:
    """Population stability index of two histograms of equal bins: the sum of (p − q) · ln(p / q) over the bins.

    It is the symmetric Kullback–Leibler divergence. Half a count in every bin keeps empty bins finite.
    """
    p = (now + 0.5) / (now + 0.5).sum()
    q = (reference + 0.5) / (reference + 0.5).sum()
    return float(((p - q) * np.log(p / q)).sum())


def unknown_words(texts: Sequence[str], known: set[str]) -> tuple[float, list[str]]:
    """Share of the words that training has not seen, and the most frequent of these."""
    words = pd.Series([word for text in texts for word in words_of(plain(text))], dtype=object)
    unknown = words[~words.isin(known)]
    return len(unknown) / max(1, len(words)), unknown.value_counts().index[:SHOWN_WORDS].tolist()


def report(log: pd.DataFrame, reviewed: pd.DataFrame | None, settings: MonitorSettings) -> dict[str, Any]:
    """What the log says, as it is written to report.json."""
    folder = Path(settings.model)
    meta = read_versioned(folder / "decision.json", SCHEMA, "train the decision again")
    if settings.reference:
        reference = probability_histogram(read_log(settings.reference)["probability"].to_numpy())
    else:
        reference = np.array(meta["valid_histogram"])
    shift = stability_index(reference, probability_histogram(log["probability"].to_numpy()))
    texts = pd.concat([log["left"], log["right"]]).drop_duplicates().tolist()
    share, examples = unknown_words(texts, set(read_json(folder / "vocabulary.json")["counts"]))
    content: dict[str, Any] = {
        "pairs": len(log),
        "called_a_match": int(log["match"].sum()),
        "score_shift": shift,
        "score_shift_is_large": shift > LARGE_DRIFT,
        "share_of_unknown_words": share,
        "frequent_unknown_words": examples,
    }
    if reviewed is not None:
        content |= precision_at(log.merge(reviewed, on=["left_id", "right_id"]), settings.confidence)
    return content


def precision_at(answered: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Precision among the reviewed pairs whose match probability is at least `confidence`, with its interval."""
    sure = answered[answered["probability"] >= confidence]
    content: dict[str, Any] = {"reviewed": len(answered), "reviewed_at_confidence": len(sure)}
    if len(sure):
        right = int(sure["reviewed"].sum())
        content["precision_at_confidence"] = right / len(sure)
        content["precision_interval"] = wilson_interval(right, len(sure))
    return content


def worth_a_look(log: pd.DataFrame, reviewed: pd.DataFrame | None, count: int) -> pd.DataFrame:
    """The pairs that nobody has reviewed, those nearest to the threshold first: a label tells most about them."""
    if reviewed is not None:
        known = log.merge(reviewed, on=["left_id", "right_id"], how="left")["reviewed"].notna().to_numpy()
        log = log[~known]
    distance = (log["probability"] - log["threshold"]).abs()
    return log.loc[distance.sort_values(kind="stable").index[:count]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(MonitorSettings, argv, description="Report on logged decisions.")
    log = read_log(settings.log)
    reviewed = read_reviewed(settings.reviewed) if settings.reviewed else None
    content = report(log, reviewed, settings)
    out = Path(settings.out)
    write_json(out / "report.json", content)
    with atomic_write(out / "review.html") as file:
        file.write(review_page(worth_a_look(log, reviewed, settings.pairs)))
    for name, value in content.items():
        print(f"{name:26s} {value:.4f}" if isinstance(value, float) else f"{name:26s} {value}")
    print(f"→ {out / 'report.json'}, {out / 'review.html'}")
    return content


if __name__ == "__main__":
    run_entry_point(main)
