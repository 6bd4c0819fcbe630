"""Every ablation of the fusion: one change at a time, on the same rows and seeds, as a csv and a plot.

    python -m studies.ablation --workspace OUT --out studies/results/ablation

The workspace must hold extracted embeddings (`make pipeline` or `make demo`). A variant is the reference with the
flags beside its name in VARIANTS, so `python -m fusion.all_embeddings.train --workspace OUT <flags>` runs it alone.
Each variant runs once per hold-out and seed. The table has the mean and the spread over these runs, and the difference
to the reference, paired by hold-out and seed.

Where the table has feature columns, such as a category, one more variant reads them; all others leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.catalog import FEATURE
from contracts.errors import InputError, run_entry_point
from contracts.workspace import CLIP_IMAGE, EMBEDDINGS, QWEN_TEXT, SIGLIP_IMAGE, SIGLIP_TEXT, Workspace
from fusion.all_embeddings import config as all_embeddings
from fusion.config import TABULAR, LossName
from fusion.qwen_clip import config as qwen_clip
from fusion.qwen_clip.config import Design
from studies.tables import RESULTS, spread, write_table
from training.plots import figure_at
from training.settings import parse_settings

LOSSES = get_args(LossName)
DESIGNS = get_args(Design)
REFERENCE_LOSS = "smape_tanh"
MODALITIES = {"all_embeddings": all_embeddings.MODALITIES, "qwen_clip": qwen_clip.MODALITIES}
"""The embeddings that the models of each package read."""


class Variant(NamedTuple):
    """One experiment: what it changes about the reference, and in which package of the fusion."""

    group: str
    name: str
    flags: tuple[str, ...]
    package: str = "all_embeddings"


REFERENCE = Variant("reference", f"hierarchical, {REFERENCE_LOSS}", ())

WITH_FEATURES = Variant("features", "the table's own columns", ("--use", *EMBEDDINGS, TABULAR))
"""Runs only where the prepared table has feature columns."""


def without(embedding: str) -> tuple[str, ...]:
    """The flags that leave one embedding out."""
    return ("--use", *(name for name in EMBEDDINGS if name != embedding))


def branches_of(width: str, *embeddings: str) -> tuple[str, ...]:
    """The flags that give some branches a width of their own, which `flags_of` fills in."""
    return ("--branch-widths", *(f"{name}={width}" for name in embeddings))


VARIANTS = [
    REFERENCE,
    *(Variant("loss", loss, ("--loss", loss)) for loss in LOSSES if loss != REFERENCE_LOSS),
    Variant("target", "price instead of log price", ("--target", "price")),
    Variant("attention", "tokens (several keys)", ("--variant", "tokens")),
    Variant("attention", "concat", ("--variant", "concat")),
    Variant("attention", "flat (one MLP)", ("--variant", "flat")),
    Variant("branches", "two layers", ("--branch-depth", "2")),
    Variant("branches", "structural fields apart", ("--structural-branch",)),
    Variant("branch width", "pictures half as wide", branches_of("{half}", CLIP_IMAGE, SIGLIP_IMAGE)),
    Variant("branch width", "texts twice as wide", branches_of("{double}", QWEN_TEXT, SIGLIP_TEXT)),
    Variant("sum of branches", "a gate per product", ("--variant", "branch_mixture")),
    Variant("sum of branches", "a weight per embedding", ("--variant", "branch_weights")),
    *(Variant("experts", experts, ("--experts", experts)) for experts in ("1", "2", "5")),
    Variant("auxiliary", "under $15", ("--auxiliary-under-15",)),
    Variant("patience", "15 epochs", ("--patience", "15")),
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
    groups: tuple[str, ...] = ()
    """Groups of variants to run beside the reference, such as loss; empty means all."""
    holdouts: tuple[int, ...] = (0,)
    """Hold-outs to validate on. More than one needs embeddings that were made out of fold."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial weights, the order of the rows and dropout."""
    out: Path = RESULTS / "ablation"
    """Path of the table and the plot, without .csv and .png."""
    resume: bool = False
    """Keep the runs that an earlier, interrupted call has finished."""


def chosen_variants(settings: AblationSettings) -> list[Variant]:
    """The reference, then the variants of the groups to run.

    Raises InputError for a group that does not exist in this workspace.
    """
    variants = list(VARIANTS)
    prepared = Workspace(settings.workspace).prepared("train")
    if prepared.columns.str.startswith(FEATURE).any():
        variants.append(WITH_FEATURES)
    groups = {variant.group for variant in variants}
    if unknown := set(settings.groups) - groups:
        raise InputError(f"--groups {', '.join(sorted(unknown))}: choose from {', '.join(sorted(groups))}")
    if not settings.groups:
        return variants
    return [variant for variant in variants if variant == REFERENCE or variant.group in settings.groups]


def flags_of(settings: AblationSettings, variant: Variant) -> list[str]:
    """The variant's flags; widths of branches follow from the fused width D of the preset."""
    preset = all_embeddings.PRESETS[settings.preset]
    width = preset.get("width", all_embeddings.ModelConfig.width)
    return [flag.format(half=width // 2, double=2 * width) for flag in variant.flags]


def run_variant(settings: AblationSettings, variant: Variant, holdout: int, seed: int) -> dict[str, Any]:
    """Train the variant once and return the content of its summary.json, with `validation_smape` in percent."""
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
    if "--use" not in variant.flags:  # the features of the table are a variant of their own
        flags += ["--use", *MODALITIES[variant.package]]
    if settings.resume:
        flags.append("--resume")
    train = import_module(f"fusion.{variant.package}.train")
    return train.main([*flags, *flags_of(settings, variant)])


def ablate(settings: AblationSettings) -> pd.DataFrame:
    """One row per variant, the reference first: its SMAPE over the runs, and the paired difference to the reference."""
    runs = [(holdout, seed) for holdout in settings.holdouts for seed in settings.seeds]
    rows = []
    reference = None
    for variant in tqdm(chosen_variants(settings), "ablations", unit=" variants"):
        summaries = pd.DataFrame(run_variant(settings, variant, holdout, seed) for holdout, seed in runs)
        smape = summaries["validation_smape"].to_numpy()
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
                "epochs": round(summaries["epochs"].mean()),
                "parameters": summaries["parameters"].iloc[0],
                "flags": " ".join(flags_of(settings, variant)),
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
