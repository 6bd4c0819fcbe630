"""What a leak does to a reported score: three protocols on the same rows, what each reports, and the true error.

    python -m studies.leak --data ../shared/data/challenge --model FOLDER_OF_MINILM --workspace OUT

A fifth of the priced rows is set aside: the whole system sees it only as test.csv, and its prices are compared at the
very end. The other rows go through the usual stages once per protocol:

leaked       The encoder is fitted on every row, so the fusion validates on rows that its embeddings remember.
             Published systems of this kind report scores in the thirties this way.
honest       The encoder is fitted on the rows that the fusion is fitted on, and both validate on rows that neither
             has seen.
out of fold  There are five encoders, and each row is embedded by one that has not seen it. A sixth, fitted on all
             rows, embeds new rows. It sees as many rows as the leaked encoder, without the leak.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from contracts.catalog import TEXT_COLUMNS
from contracts.errors import run_entry_point
from contracts.files import atomic_write, read_json
from contracts.predictions import read_predictions
from contracts.smape import best_constant, smape, smape_with_error
from contracts.splits import roles
from contracts.workspace import QWEN_TEXT, SPLITS, Workspace
from pipeline.run import run_stages
from pipeline.stages import Stage
from studies.tables import RESULTS, spread, write_table
from training.plots import figure_at
from training.settings import parse_settings

UNTOUCHED_HOLDOUT = 4
"""The hold-out whose rows are set aside."""
PROTOCOLS = {
    "leaked": ["--holdout", "null"],
    "honest": ["--holdout", "0"],
    "out_of_fold": ["--folds", "5"],
}
"""The flags of the encoder's training, by protocol."""


@dataclass
class LeakStudySettings:
    data: Path = Path("../shared/data/challenge")
    """Folder with train.csv and test.csv; only the rows with a price are used."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Text encoder with pretrained weights, hub id or local folder; every weight is fine-tuned."""
    workspace: Path = Path("leak_study")
    """Folder that receives every artefact."""
    epochs: int = 3
    """Epochs of the encoder."""
    max_length: int = 64
    """Tokens per text."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the fusion."""
    out: Path = RESULTS / "leak_study.csv"
    """The table to write; the plot goes beside it."""
    resume: bool = False
    """Skip the stages that an earlier, interrupted call has finished."""


def set_aside(prepared: Workspace, catalogue: Path) -> pd.Series:
    """Write a catalogue whose test.csv holds the untouched rows; returns their prices by sample_id.

    Args:
        prepared: workspace in which all rows were prepared; its folds say which rows are set aside.
        catalogue: folder to write.
    """
    priced = prepared.training_table()
    is_untouched = priced["fold"].isin(roles(UNTOUCHED_HOLDOUT).validate)
    train = priced.loc[~is_untouched, [*TEXT_COLUMNS, "price"]]
    test = priced.loc[is_untouched, list(TEXT_COLUMNS)]
    for name, rows in {"train": train, "test": test}.items():
        with atomic_write(catalogue / f"{name}.csv") as file:
            # quoted, as a bare carriage return in a text would otherwise split its row
            rows.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC)
    return priced[is_untouched].set_index("sample_id")["price"]


def stages(settings: LeakStudySettings, catalogue: Path) -> list[Stage]:
    """The commands of all protocols, in order. Each encoder's embeddings replace those of the one before."""
    encoder = [
        "--model", settings.model, "--train", "full", "--epochs", str(settings.epochs), "--lr", "1e-4",
        "--max-length", str(settings.max_length), "--batch-size", "32", "--gradient-accumulation-steps", "1",
        "--smape-weight", "1", "--encoder-dropout", "0", "--no-gradient-checkpointing",
    ]  # fmt: skip
    fusion = ["--preset", "tiny", "--use", QWEN_TEXT, "--loss", "smape_tanh"]
    planned = [["data.prepare", "--data", str(catalogue)]]
    for protocol, fitted_on in PROTOCOLS.items():
        encoder_run = ["--run", f"encoder_{protocol}"]
        planned.append(["qwen3_finetune.train", *encoder_run, *encoder, *fitted_on])
        for split in SPLITS:
            planned.append(["qwen3_finetune.extract_embeddings", split, *encoder_run])
        leak = ["--allow-leak"] if protocol == "leaked" else []
        for seed in settings.seeds:
            run = ["--run", f"{protocol}_{seed}"]
            planned.append(["fusion.all_embeddings.train", *run, *fusion, "--seed", str(seed), *leak])
            planned.append(["fusion.all_embeddings.predict_test", *run])
    return [Stage(module, tuple(arguments)) for module, *arguments in planned]


def score_table(settings: LeakStudySettings, study: Workspace, untouched: pd.Series) -> pd.DataFrame:
    """One row per protocol, the best constant first: the SMAPE that it reports, and the SMAPE on the untouched rows.

    Both are means over the seeds, with their spread and the mean standard error over rows. `optimism` is the second
    minus the first, and `in_standard_errors` is the optimism in units of its own standard error.
    """
    rows = [_constant(study, untouched)]
    rows += [_protocol(settings, study, protocol, untouched) for protocol in PROTOCOLS]
    return pd.DataFrame(rows)


def _constant(study: Workspace, untouched: pd.Series) -> dict:
    train = study.training_table()
    constant = best_constant(train["price"].to_numpy())
    validated = train.loc[train["fold"].isin(roles(0).validate), "price"]
    return {
        "protocol": "constant",
        "reported": smape(validated, np.full(len(validated), constant)),
        "untouched": smape(untouched, np.full(len(untouched), constant)),
    }


def _protocol(settings: LeakStudySettings, study: Workspace, protocol: str, untouched: pd.Series) -> dict:
    score_name = "leaked_smape" if protocol == "leaked" else "validation_smape"
    reported: list[float] = []
    reported_errors: list[float] = []
    true: list[float] = []
    true_errors: list[float] = []
    for seed in settings.seeds:
        run = f"{protocol}_{seed}"
        summary = read_json(study.path("run", name=run) / "summary.json")
        reported.append(summary[score_name])
        reported_errors.append(summary["standard_error"])
        predicted = read_predictions(study, run, "test").by_id[untouched.index]
        score, error = smape_with_error(untouched, predicted)
        true.append(score)
        true_errors.append(error)
    optimism = np.mean(true) - np.mean(reported)
    return {
        "protocol": protocol,
        "reported": np.mean(reported),
        "reported_spread": spread(reported),
        "reported_standard_error": np.mean(reported_errors),
        "untouched": np.mean(true),
        "untouched_spread": spread(true),
        "untouched_standard_error": np.mean(true_errors),
        "optimism": optimism,
        "in_standard_errors": optimism / np.hypot(np.mean(reported_errors), np.mean(true_errors)),
    }


def plot(path: Path, table: pd.DataFrame) -> None:
    """Two bars per protocol: the reported score and the true one."""
    shown = table[table["protocol"] != "constant"]
    places = np.arange(len(shown))
    with figure_at(path, columns=1, width=6.5, height=3.8) as (_, (axis,)):
        reported = axis.bar(places - 0.2, shown["reported"], width=0.36, label="reported as validation")
        axis.bar_label(reported, fmt="%.1f")
        true = axis.bar(places + 0.2, shown["untouched"], width=0.36, label="on untouched rows")
        axis.bar_label(true, fmt="%.1f")
        constant = table["untouched"].iloc[0]
        axis.axhline(constant, color="black", linestyle="--", linewidth=0.8, label="best constant")
        axis.set_xticks(places, shown["protocol"].str.replace("_", " "))
        axis.set_ylabel("SMAPE, % (lower is better)")
        axis.set_title("The same rows and encoder, three protocols")
        axis.set_ylim(0, 1.3 * constant)
        axis.legend(frameon=False, loc="upper center", ncols=3, fontsize=8)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(LeakStudySettings, argv, description=__doc__.split("\n")[0])
    prepared = Workspace(settings.workspace / "all")
    catalogue = settings.workspace / "catalogue"
    study = Workspace(settings.workspace / "study")
    run_stages([Stage("data.prepare", ("--data", str(settings.data)))], prepared.root, resume=settings.resume)
    untouched = set_aside(prepared, catalogue)
    run_stages(stages(settings, catalogue), study.root, resume=settings.resume)

    table = score_table(settings, study, untouched)
    png = settings.out.with_suffix(".png")
    write_table(settings.out, table)
    plot(png, table)
    print("\n" + table.to_string(index=False, na_rep="", float_format="%.2f"))
    print(f"{settings.out}\n{png}")
    return table


if __name__ == "__main__":
    run_entry_point(main)
