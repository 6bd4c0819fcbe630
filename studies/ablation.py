"""Every ablation of the fusion: one change at a time, on the same rows and seeds, as a csv and a plot.

    python -m studies.ablation --workspace OUT --out studies/results/ablation

The workspace must hold extracted embeddings (`make pipeline` or `make demo`). A variant is the reference with the
flags beside its name in VARIANTS, so `python -m fusion.all_embeddings.train --workspace OUT <flags>` runs it alone.
Each variant runs once per hold-out and seed. The table has the mean and the spread over these runs, and the difference
to the reference, paired by hold-out and seed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.errors import run_entry_point
from contracts.workspace import EMBEDDINGS, QWEN_TEXT, SIGLIP_TEXT
from fusion.config import LossName
from fusion.qwen_clip.config import Design
from studies.tables import RESULTS, spread, write_table
from training.plots import figure_at
from training.settings import parse_settings

LOSSES = get_args(LossName)
DESIGNS = get_args(Design)
REFERENCE_LOSS = "smape_tanh"


class Variant(NamedTuple):
    """One experiment: what it changes about the reference, and in which package of the fusion."""

    group: str
    name: str
    flags: tuple[str, ...]
    package: str = "all_embeddings"


REFERENCE = Variant("reference", f"hierarchical, {REFERENCE_LOSS}", ())


def without(embedding: str) -> tuple[str, ...]:
    """The flags that leave one embedding out."""
    return ("--use", *(name for name in EMBEDDINGS if name != embedding))


VARIANTS = [
    REFERENCE,
    *(Variant("loss", loss, ("--loss", loss)) for loss in LOSSES if loss != REFERENCE_LOSS),
    Variant("target", "price instead of log price", ("--target", "price")),
    Variant("attention", "tokens (several keys)", ("--variant", "tokens")),
    Variant("attention", "concat", ("--variant", "concat")),
    Variant("attention", "flat (one MLP)", ("--variant", "flat")),
    Variant("branches", "two layers", ("--branch-depth", "2")),
    Variant("branches", "structural fields apart", ("--structural-branch",)),
    *(Variant("experts", experts, ("--experts", experts)) for experts in ("1", "2", "5")),
    Variant("auxiliary", "under $15", ("--auxiliary-under-15",)),
    *(Variant("left out", name, without(name)) for name in EMBEDDINGS),
    Variant("text alone", f"fine-tuned ({QWEN_TEXT})", ("--use", QWEN_TEXT)),
    Variant("text alone", f"frozen ({SIGLIP_TEXT})", ("--use", SIGLIP_TEXT)),
    *(Variant("two embeddings", design, ("--design", design), "qwen_clip") for design in DESIGNS),
]


@dataclass
class AblationSettings:
    workspace: Path = Path("demo")
    """Folder whose embeddings are used; the runs go to checkpoints/ablation/ in it."""
    preset: Literal["base", "tiny"] = "tiny"
    """Preset of the fusion: base has the published width, for a GPU."""
    holdouts: tuple[int, ...] = (0,)
    """Hold-outs to validate on. More than one needs embeddings that were made out of fold."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial weights, the order of the rows and dropout."""
    out: Path = RESULTS / "ablation"
    """Path of the table and the plot, without .csv and .png."""
    resume: bool = False
    """Keep the runs that an earlier, interrupted call has finished."""


def run_variant(settings: AblationSettings, variant: Variant, holdout: int, seed: int) -> float:
    """Train the variant once and return its validation SMAPE in percent."""
    name = f"{variant.group}_{variant.name}"
    folder = "".join(character if character.isalnum() else "_" for character in name)
    flags = [
        "--workspace", str(settings.workspace),
        "--run", f"ablation/{folder}_{holdout}_{seed}",
        "--preset", settings.preset,
        "--holdout", str(holdout),
        "--seed", str(seed),
    ]  # fmt: skip
    if "--loss" not in variant.flags:
        flags += ["--loss", REFERENCE_LOSS]
    if settings.resume:
        flags.append("--resume")
    train = import_module(f"fusion.{variant.package}.train")
    summary = train.main([*flags, *variant.flags])
    return summary["validation_smape"]


def ablate(settings: AblationSettings) -> pd.DataFrame:
    """One row per variant, the reference first: its SMAPE over the runs, and the paired difference to the reference."""
    runs = [(holdout, seed) for holdout in settings.holdouts for seed in settings.seeds]
    rows = []
    reference = None
    for variant in tqdm(VARIANTS, "ablations", unit=" variants"):
        started = time.monotonic()
        smape = np.array([run_variant(settings, variant, holdout, seed) for holdout, seed in runs])
        seconds = time.monotonic() - started
        if reference is None:
            reference = smape
        difference = smape - reference
        rows.append(
            {
                "group": variant.group,
                "variant": variant.name,
                "smape": smape.mean(),
                "spread": spread(smape),
                "difference": difference.mean(),
                "difference_spread": spread(difference),
                "runs": len(runs),
                "seconds_per_run": seconds / len(runs),
                "flags": " ".join(variant.flags),
            }
        )
    return pd.DataFrame(rows)


def plot(path: Path, table: pd.DataFrame) -> None:
    """The mean and spread of each variant, one below the other, coloured by group."""
    heights = np.arange(len(table))[::-1]
    labels = table["group"] + ": " + table["variant"]
    with figure_at(path, columns=1, width=7.5, height=0.26 * len(table) + 1.2) as (_, (axis,)):
        for _, part in table.groupby("group", sort=False):
            height = heights[part.index]
            axis.errorbar(part["smape"], height, xerr=part["spread"], fmt="o", capsize=2, markersize=4)
        axis.axvline(table["smape"].iloc[0], color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(heights, labels)
        axis.set_xlabel("validation SMAPE, % (mean ± spread over seeds)")
        axis.set_title("One change at a time; dashed: reference")
        axis.grid(axis="x", linewidth=0.3)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(AblationSettings, argv, description=__doc__.split("\n")[0])
    table = ablate(settings)
    csv = settings.out.with_suffix(".csv")
    png = settings.out.with_suffix(".png")
    write_table(csv, table)
    plot(png, table)
    print(table.drop(columns="flags").to_string(index=False, float_format="%.2f"))
    print(f"{csv}\n{png}")
    return table


if __name__ == "__main__":
    run_entry_point(main)
