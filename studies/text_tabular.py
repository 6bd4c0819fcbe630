"""Text, fields, and the designs that join them, on one table: scores over seeds and paired differences.

    python -m studies.text_tabular --train train.csv --columns columns.yaml --workspace OUT --out table.csv

Each seed validates on a hold-out of its own, so that the spread covers rows as well as weights; differences are paired
by hold-out. Trees (LightGBM on TF-IDF and the fields) see the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.errors import run_entry_point
from contracts.splits import roles
from studies.tables import RESULTS, spread, write_table
from training.settings import parse_settings

VARIANTS: dict[str, tuple[str, ...]] = {
    "text only": ("--design", "text"),
    "fields only": ("--design", "tabular"),
    "everything as text": ("--design", "text", "--fields-as-text"),
    "concat": ("--design", "concat"),
    "gate": ("--design", "gate"),
    "moe": ("--design", "moe"),
    "cross_attention": ("--design", "cross_attention"),
}
TREES = "TF-IDF and fields, LightGBM"
REFERENCE = "text only"


@dataclass
class StudySettings:
    train: Path = Path("train.csv")
    """Labelled table."""
    columns: Path = Path("columns.yaml")
    """Which column is which."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Text encoder: hub id or local folder."""
    workspace: Path = Path("text_tabular_study")
    """Folder for the runs."""
    tuning: str = "full"
    """What is trained of the encoder: full, lora or head."""
    frozen_layers: int = 0
    """Lower layers of the encoder that keep their weights."""
    epochs: int = 4
    """Epochs per run."""
    variants: tuple[str, ...] = ()
    """Variants to run, such as gate; empty means all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each validates on the hold-out of its number."""
    out: Path = RESULTS / "text_tabular.csv"
    """Table to write."""
    resume: bool = False
    """Keep the runs that an earlier, interrupted call has finished."""


def run_variant(settings: StudySettings, name: str, seed: int) -> dict[str, Any]:
    """Train one variant and return its scores on the hold-out of the seed's number."""
    from text_tabular.train import main as train

    run = "".join(letter if letter.isalnum() else "_" for letter in f"{settings.columns.stem}_{name}_{seed}")
    flags = [
        "--train", str(settings.train), "--columns", str(settings.columns), "--model", settings.model,
        "--workspace", str(settings.workspace), "--run", run, "--tuning", settings.tuning,
        "--frozen-layers", str(settings.frozen_layers), "--epochs", str(settings.epochs), "--seed", str(seed),
        "--holdout", str(seed), "--skip-unlabelled",
    ]  # fmt: skip
    return train([*flags, *VARIANTS[name], *(["--resume"] if settings.resume else [])])


def run_trees(settings: StudySettings, seed: int) -> dict[str, Any]:
    """LightGBM on the TF-IDF of words and on the fields, stopped on the stop fold like every other variant."""
    import lightgbm
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    from fusion.tabular import TableColumns
    from text_tabular.columns import ColumnRoles
    from text_tabular.config import TextTabularSettings
    from text_tabular.data import TrainingTable
    from text_tabular.metrics import Calibration, score_classes, score_numbers

    shared = TextTabularSettings(train=settings.train, columns=settings.columns, skip_unlabelled=True)
    table = TrainingTable.read(shared, ColumnRoles.read(settings.columns))
    parts = roles(seed)
    fit, stop, validate = (table.rows_in(folds) for folds in (parts.fit, parts.stop, parts.validate))
    texts = np.array([" ".join(messages) for messages in table.rows.messages])
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True).fit(texts[fit])
    columns = TableColumns.fit(table.rows.fields.iloc[fit])
    words = vectorizer.transform(texts)
    matrix = csr_matrix(hstack([words, csr_matrix(columns.matrix(table.rows.fields)[0])]))
    is_class = table.target.task == "classification"
    options: dict[str, Any] = {
        "n_estimators": 2000, "learning_rate": 0.03, "num_leaves": 15, "min_child_samples": 10,
        "colsample_bytree": 0.5, "random_state": seed, "verbose": -1, "n_jobs": 2,
    }  # fmt: skip
    model: Any = lightgbm.LGBMClassifier(**options) if is_class else lightgbm.LGBMRegressor(**options)
    early = lightgbm.early_stopping(50, verbose=False)
    model.fit(
        matrix[fit], table.values[fit], eval_set=[(matrix[stop], table.values[stop])], callbacks=[early]
    )
    if not is_class:
        scale, mean = table.target.deviation, table.target.mean
        return score_numbers(
            model.predict(matrix[validate]) * scale + mean, table.values[validate] * scale + mean
        )

    def logits(rows: np.ndarray) -> np.ndarray:
        return np.log(np.clip(model.predict_proba(matrix[rows]), 1e-6, None))

    calibration = Calibration.fit(logits(stop), table.values[stop])
    return score_classes(logits(validate), table.values[validate], table.target.classes, calibration)


def summarise(scores: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """One row per variant: every metric's mean and spread, in percent, and its paired difference to text only."""
    first = next(iter(scores.values()))[0]
    metrics = ("macro_f1", "pr_auc", "accuracy", "ece") if "macro_f1" in first else ("mae", "rmse", "r2")
    factor = 100 if "macro_f1" in first else 1
    lines = []
    for name, runs in scores.items():
        line: dict[str, Any] = {"variant": name, "runs": len(runs), "rows": sum(run["rows"] for run in runs)}
        for metric in metrics:
            values = factor * np.array([run[metric] for run in runs])
            line[metric] = values.mean()
            line[f"{metric}_spread"] = spread(values)
        for metric in metrics[:2]:
            if REFERENCE in scores:
                reference = [run[metric] for run in scores[REFERENCE]]
                difference = factor * (np.array([run[metric] for run in runs]) - np.array(reference))
                line[f"{metric}_over_text"] = difference.mean()
                line[f"{metric}_over_text_error"] = spread(difference) / np.sqrt(len(difference))
        lines.append(line)
    return pd.DataFrame(lines)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(StudySettings, argv, description=__doc__.split("\n")[0])
    scores: dict[str, list[dict[str, Any]]] = {}
    for name in settings.variants or (*VARIANTS, TREES):
        runs = []
        for seed in settings.seeds:
            runs.append(run_trees(settings, seed) if name == TREES else run_variant(settings, name, seed))
        scores[name] = runs
        write_table(settings.out, summarise(scores))  # a study of an hour shows what it has
    table = summarise(scores)
    print(table.to_string(index=False, float_format="%.2f"))
    return table


if __name__ == "__main__":
    run_entry_point(main)
