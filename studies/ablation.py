"""Every ablation of the fusion, one change at a time, on the same rows and seeds: mean ± spread as csv and plot.

    python -m studies.ablation --workspace OUT --out studies/results/ablation

needs a workspace whose embeddings are extracted (`make pipeline`, `make demo`). A variant is the reference with the
flags beside its name in VARIANTS: `python -m fusion.all_embeddings.train --workspace OUT <flags>` runs it alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.errors import run_entry_point
from contracts.files import atomic_write
from training.plots import figure_at
from training.settings import parse_settings

ALL = ("clip_image", "siglip_image", "siglip_text", "qwen_text")


class Variant(NamedTuple):
    group: str
    name: str
    flags: tuple[str, ...]
    package: str = "all_embeddings"


def without(embedding: str) -> tuple[str, ...]:
    return "--use", *(name for name in ALL if name != embedding)


REFERENCE = Variant("reference", "hierarchical, smape_tanh", ())
LOSSES = ("weighted_smape", "smape", "focal_smape", "huber", "log_l1", "huber_smape")
DESIGNS = ("attention_moe", "plain", "concat", "gate", "moe", "cross_attention")
VARIANTS = [
    REFERENCE,
    *(Variant("loss", loss, ("--loss", loss)) for loss in LOSSES),
    Variant("target", "price instead of log price", ("--target", "price")),
    Variant("attention", "tokens (several keys)", ("--variant", "tokens")),
    Variant("attention", "concat", ("--variant", "concat")),
    Variant("attention", "flat (one MLP)", ("--variant", "flat")),
    Variant("branches", "two layers", ("--branch-depth", "2")),
    Variant("branches", "structural fields apart", ("--structural-branch",)),
    *(Variant("experts", str(experts), ("--experts", str(experts))) for experts in (1, 2, 5)),
    Variant("auxiliary", "under $15", ("--auxiliary-under-15",)),
    *(Variant("left out", name, without(name)) for name in ALL),
    Variant("text alone", "fine-tuned (qwen_text)", ("--use", "qwen_text")),
    Variant("text alone", "frozen (siglip_text)", ("--use", "siglip_text")),
    *(Variant("two embeddings", design, ("--design", design), "qwen_clip") for design in DESIGNS),
]


@dataclass
class AblationSettings:
    workspace: str = "demo"
    """Folder whose embeddings are used; the runs go to checkpoints/ablation/ in it."""
    preset: str = "tiny"
    """Of the fusion: base is the published width, for a GPU."""
    holdouts: tuple[int, ...] = (0,)
    """Hold-outs to validate on; more than 0 needs out-of-fold embeddings."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, row order and dropout."""
    out: str = "studies/results/ablation"
    """Path of the table and the plot, without .csv and .png."""
    resume: bool = False
    """Keep the runs that an earlier, interrupted call has finished."""


def run_variant(settings: AblationSettings, variant: Variant, holdout: int, seed: int) -> float:
    """Train one; its validation SMAPE."""
    from fusion.all_embeddings import train as all_embeddings
    from fusion.qwen_clip import train as qwen_clip

    main = {"all_embeddings": all_embeddings, "qwen_clip": qwen_clip}[variant.package].main
    name = "".join(c if c.isalnum() else "_" for c in f"{variant.group}_{variant.name}")
    arguments = ["--workspace", settings.workspace, "--run", f"ablation/{name}_{holdout}_{seed}"]
    arguments += ["--preset", settings.preset, "--holdout", str(holdout), "--seed", str(seed)]
    loss = [] if "--loss" in variant.flags else ["--loss", "smape_tanh"]
    return main([*arguments, *loss, *variant.flags, *(["--resume"] if settings.resume else [])])[
        "validation_smape"
    ]


def ablate(settings: AblationSettings) -> pd.DataFrame:
    """A row a variant: mean and spread of SMAPE over its runs, and the paired difference to the reference."""
    cells = [(holdout, seed) for holdout in settings.holdouts for seed in settings.seeds]
    lines, reference = [], None
    for variant in tqdm(VARIANTS, "ablations", unit="variant"):
        started = time.monotonic()
        scores = np.array([run_variant(settings, variant, *cell) for cell in cells])
        reference = scores if reference is None else reference
        difference = scores - reference
        lines.append(
            {
                "group": variant.group,
                "variant": variant.name,
                "smape": scores.mean(),
                "spread": scores.std(ddof=1) if len(cells) > 1 else 0.0,
                "difference": difference.mean(),
                "difference_spread": difference.std(ddof=1) if len(cells) > 1 else 0.0,
                "runs": len(cells),
                "seconds_a_run": (time.monotonic() - started) / len(cells),
                "flags": " ".join(variant.flags),
            }
        )
    return pd.DataFrame(lines)


def plot(path: Path, table: pd.DataFrame) -> None:
    rows = np.arange(len(table))[::-1]
    with figure_at(path, columns=1, width=7.5, height=0.26 * len(table) + 1.2) as (_, (axis,)):
        for group, part in table.groupby("group", sort=False):
            axis.errorbar(
                part["smape"], rows[part.index], xerr=part["spread"], fmt="o", capsize=2, markersize=4, label=group
            )  # fmt: skip
        axis.axvline(table["smape"].iloc[0], color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(
            rows, [f"{group}: {name}" for group, name in zip(table["group"], table["variant"], strict=True)]
        )
        axis.set(
            xlabel="validation SMAPE, % (mean ± spread over seeds)", title="One change at a time; dashed: reference"
        )  # fmt: skip
        axis.grid(axis="x", linewidth=0.3)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings = parse_settings(AblationSettings, argv, description=__doc__.split("\n")[0])
    table = ablate(settings)
    out = Path(settings.out)
    with atomic_write(out.with_suffix(".csv")) as file:
        table.to_csv(file, index=False, float_format="%.2f")
    plot(out.with_suffix(".png"), table)
    print(table.drop(columns="flags").to_string(index=False, float_format="%.2f"))
    print(f"{out.with_suffix('.csv')}\n{out.with_suffix('.png')}")
    return table


if __name__ == "__main__":
    run_entry_point(main)
