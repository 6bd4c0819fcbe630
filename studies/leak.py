"""What a leak does to a validation score: three protocols on the same rows, what each reports, and the truth.

    python -m studies.leak --data ../shared/data/challenge --model FOLDER_OF_MINILM --workspace OUT

A fifth of the priced rows is untouched: the whole system sees it as test.csv, its prices are compared at the very end.
The rest goes through the usual stages, once each way:

leaked  the encoder is fitted on every row; the fusion then validates on rows that its embeddings remember. This is how
        published systems of this kind report scores in the thirties.
honest  the encoder is fitted on the rows that the fusion fits, and both are validated on rows that neither has seen.
out of fold  five encoders, each row embedded by the one that has not seen it, and one of all rows for new rows: as many
        rows as the leaked way has, without the leak.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import read_table
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.smape import best_constant, smape, smape_with_error
from contracts.splits import roles
from contracts.workspace import Workspace
from pipeline.run import run_stages
from training.plots import figure_at
from training.settings import parse_settings

UNTOUCHED = roles(4).validate
PROTOCOLS = {
    "leaked": ["--holdout", "null"],
    "honest": ["--holdout", "0"],
    "out_of_fold": ["--folds", "5"],
}


@dataclass
class LeakStudySettings:
    data: str = "../shared/data/challenge"
    """Folder with train.csv; its prices are all that is needed."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Text encoder with pretrained weights, hub id or local folder; every weight is fine-tuned."""
    workspace: str = "leak_study"
    """Folder that receives every artefact; an interrupted study goes on with --resume."""
    epochs: int = 3
    """Of the encoder."""
    max_length: int = 64
    """Tokens of a text."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the fusion."""
    out: str = "studies/results/leak_study.csv"
    """The table; the plot goes beside it."""
    resume: bool = False
    """Skip the stages that an earlier, interrupted call has finished."""


def set_aside(data: Path, workspace: Path) -> pd.Series:
    """Write catalogue/ with the untouched rows as test.csv; returns their price by sample_id."""
    priced = read_table(data / "train.csv")
    fold = Workspace(workspace / "all").folds().reindex(priced["sample_id"]).to_numpy()
    untouched = priced[np.isin(fold, UNTOUCHED)]
    for name, rows in (
        ("train", priced[~np.isin(fold, UNTOUCHED)]),
        ("test", untouched.drop(columns="price")),
    ):
        with atomic_write(workspace / "catalogue" / f"{name}.csv") as file:
            rows.to_csv(file, index=False)
    return untouched.set_index("sample_id")["price"].astype(float)


def stages(settings: LeakStudySettings) -> list[list[str]]:
    """The protocols, stage by stage. Each encoder's embeddings replace those of the one before."""
    encoder = ["--model", settings.model, "--train", "full", "--epochs", str(settings.epochs), "--lr", "1e-4"]
    encoder += ["--max-length", str(settings.max_length), "--batch-size", "32", "--grad-accum", "1"]
    encoder += ["--smape-weight", "1", "--encoder-dropout", "0", "--no-gradient-checkpointing"]
    planned = [["data.prepare", "--data", str(Path(settings.workspace) / "catalogue")]]
    for protocol, holdout in PROTOCOLS.items():
        planned.append(["qwen3_finetune.train", "--run", f"encoder_{protocol}", *encoder, *holdout])
        for split in ("train", "test"):
            planned.append(["qwen3_finetune.extract_embeddings", split, "--run", f"encoder_{protocol}"])
        leak = ["--allow-leak"] if protocol == "leaked" else []
        for seed in settings.seeds:
            run = ["--run", f"{protocol}_{seed}"]
            fusion = ["--preset", "tiny", "--use", "qwen_text", "--loss", "smape_tanh", "--seed", str(seed)]
            planned.append(["fusion.all_embeddings.train", *run, *fusion, *leak])
            planned.append(["fusion.all_embeddings.predict_test", *run])
    return planned


def score_table(settings: LeakStudySettings, untouched: pd.Series) -> pd.DataFrame:
    """One row a protocol: the SMAPE it reports, and that on the untouched rows; ± is the spread over seeds."""
    workspace = Workspace(Path(settings.workspace) / "study")
    price = workspace.prepared("train").set_index("sample_id")["price"]
    validated = price[workspace.folds()[price.index].isin(roles(0).validate)].to_numpy()
    constant = best_constant(price.to_numpy())
    lines = [{"protocol": "constant", **{
        name: smape(rows, np.full(len(rows), constant))
        for name, rows in (("reported", validated), ("untouched", untouched.to_numpy()))
    }}]  # fmt: skip
    for protocol in PROTOCOLS:
        reported, truth, reported_error, error = [], [], [], []
        for seed in settings.seeds:
            summary = read_json(workspace.path("run", name=f"{protocol}_{seed}") / "summary.json")
            reported.append(summary["leaked_smape" if protocol == "leaked" else "validation_smape"])
            reported_error.append(summary["standard_error"])
            predicted = read_table(workspace.path("predictions", name=f"{protocol}_{seed}", split="test"))
            log_price = predicted.set_index("sample_id")["log_price"].astype(float)[untouched.index]
            score = smape_with_error(untouched.to_numpy(), np.expm1(log_price.to_numpy()))
            truth.append(score[0])
            error.append(score[1])
        lines.append(
            {
                "protocol": protocol,
                "reported": np.mean(reported),
                "reported_spread": np.std(reported, ddof=1) if len(reported) > 1 else 0.0,
                "reported_standard_error": np.mean(reported_error),
                "untouched": np.mean(truth),
                "untouched_spread": np.std(truth, ddof=1) if len(truth) > 1 else 0.0,
                "untouched_standard_error": np.mean(error),
                "optimism": np.mean(truth) - np.mean(reported),
                "in_standard_errors": (np.mean(truth) - np.mean(reported))
                / np.hypot(np.mean(reported_error), np.mean(error)),
            }
        )
    return pd.DataFrame(lines)


def plot(path: Path, table: pd.DataFrame) -> None:
    shown = table[table["protocol"] != "constant"]
    with figure_at(path, columns=1, width=6.5, height=3.8) as (_, (axis,)):
        for shift, column, label in (
            (-0.2, "reported", "reported as validation"),
            (0.2, "untouched", "on untouched rows"),
        ):
            bars = axis.bar(np.arange(len(shown)) + shift, shown[column], width=0.36, label=label)
            axis.bar_label(bars, fmt="%.1f")
        constant = table["untouched"].iloc[0]
        axis.axhline(constant, color="black", linestyle="--", linewidth=0.8, label="best constant")
        axis.set_xticks(range(len(shown)), shown["protocol"].str.replace("_", " "))
        axis.set(ylabel="SMAPE, % (lower is better)", title="The same rows and encoder, three protocols")
        axis.set_ylim(0, 1.3 * constant)
        axis.legend(frameon=False, loc="upper center", ncols=3, fontsize=8)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(LeakStudySettings, argv, description=__doc__.split("\n")[0])
    folder = Path(settings.workspace)
    run_stages([["data.prepare", "--data", settings.data]], folder / "all", resume=settings.resume)
    untouched = set_aside(Path(settings.data), folder)
    run_stages(stages(settings), folder / "study", resume=settings.resume)
    table = score_table(settings, untouched)
    out = Path(settings.out)
    with atomic_write(out) as file:
        table.to_csv(file, index=False, float_format="%.2f")
    plot(out.with_suffix(".png"), table)
    print("\n" + table.to_string(index=False, na_rep="", float_format="%.2f"))
    print(f"{out}\n{out.with_suffix('.png')}")
    return table


if __name__ == "__main__":
    run_entry_point(main)
