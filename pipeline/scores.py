"""The score table of a workspace: every model beside the constant, on rows that none of them was fitted on.

python -m pipeline.scores --workspace OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.smape import best_constant, smape_with_error
from contracts.splits import roles
from contracts.workspace import REPOSITORY, Workspace
from training.settings import parse_settings

MODELS = {
    "CLIP price head (rows with a picture)": "clip_finetune",
    "text encoder's price head": "qwen3_finetune",
    "fusion, images only": "fusion_image_only",
    "fusion, texts only": "fusion_text_only",
    "fusion, two embeddings": "fusion_qwen_clip",
    "fusion, all embeddings": "fusion_all_embeddings",
}


@dataclass
class ScoreSettings:
    workspace: str = str(REPOSITORY)
    """Folder with predictions/."""


def score_table(workspace: Workspace, test_truth: pd.Series | None = None) -> pd.DataFrame:
    """One row a model: SMAPE on the validation rows it predicts, and on test rows where their price is known.

    Args:
        test_truth: true price by sample_id of test.csv; only a generated catalogue has it.
    """
    table = workspace.prepared("train").set_index("sample_id")
    folds = workspace.folds()
    role = roles(0)
    price = table["price"]
    validation = price[folds.reindex(price.index).isin(role.validate)]
    constant = best_constant(price[folds.reindex(price.index).isin(role.fit)].to_numpy())
    lines = [_line("constant", validation, pd.Series(constant, validation.index), test_truth,
                   None if test_truth is None else pd.Series(constant, test_truth.index))]  # fmt: skip
    for label, run in MODELS.items():
        predicted = _predicted(workspace, run, "train")
        if predicted is not None:
            known = validation.index.intersection(predicted.index)
            test = _predicted(workspace, run, "test") if test_truth is not None else None
            if len(known):
                lines.append(_line(label, validation[known], predicted[known], test_truth, test))
    return pd.DataFrame(lines)


def _predicted(workspace: Workspace, run: str, split: str) -> pd.Series | None:
    path = workspace.path("predictions", name=run, split=split)
    if not path.is_file():
        return None
    table = read_table(path)
    return pd.Series(np.expm1(table["log_price"].astype(float).to_numpy()), index=table["sample_id"])


def _line(label: str, price: pd.Series, predicted: pd.Series, test_truth, test_predicted) -> dict:
    score, error = smape_with_error(price.to_numpy(), predicted.to_numpy())
    line = {"model": label, "rows": len(price), "validation SMAPE": round(score, 2), "±": round(error, 2)}
    if test_truth is not None:
        line["test SMAPE"] = np.nan
        if test_predicted is not None:
            known = test_truth.index.intersection(test_predicted.index)
            test_score = smape_with_error(test_truth[known].to_numpy(), test_predicted[known].to_numpy())[0]
            line["test SMAPE"] = round(test_score, 2)
    return line


def write_scores(workspace: Path, sample: Path | None = None) -> str:
    """Write scores.csv into the workspace and return the table as text.

    Args:
        sample: folder of a generated catalogue; adds the test scores and the best possible one.
    """
    truth = law = None
    if sample is not None:
        known = read_table(sample / "test_truth.csv")
        truth = pd.Series(known["price"].astype(float).to_numpy(), index=known["sample_id"])
        law = read_json(sample / "truth.json")
    table = score_table(Workspace(workspace), truth)
    if law is not None:
        best = {"model": "best possible", "rows": np.nan, "validation SMAPE": round(law["best_smape_expected"], 2),
                "±": np.nan, "test SMAPE": round(law["best_smape_on_test"], 2)}  # fmt: skip
        table = pd.concat([table, pd.DataFrame([best])], ignore_index=True)
    table["rows"] = table["rows"].astype("Int64")
    with atomic_write(workspace / "scores.csv") as file:
        table.to_csv(file, index=False, float_format="%.2f")
    return table.to_string(index=False, na_rep="", justify="right", float_format="%.2f")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ScoreSettings, argv, description=__doc__.split("\n")[0])
    print(write_scores(Path(settings.workspace)))


if __name__ == "__main__":
    run_entry_point(main)
