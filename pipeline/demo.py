"""Run the whole system on a generated catalogue whose best possible score is known: `make demo`.

python -m pipeline.demo --workspace demo
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contracts.errors import run_entry_point
from contracts.workspace import CLIP_IMAGE, QWEN_TEXT, SIGLIP_IMAGE, SIGLIP_TEXT, Workspace
from data import sample_catalog
from pipeline.report import write_report
from pipeline.run import describe_outcome, run_stages
from pipeline.scores import write_scores
from pipeline.stages import PipelineSettings, Stage, pipeline_stages
from training.settings import parse_settings

PRESET: Literal["tiny"] = "tiny"


@dataclass
class DemoSettings:
    workspace: Path = Path("demo")
    """Folder that receives the catalogue and every artefact."""
    train_rows: int = 2000
    """Products with a price."""
    test_rows: int = 500
    """Products to price."""


def single_modality(name: str, *use: str) -> list[Stage]:
    """The stages of a fusion that sees some embeddings only, which shows what pictures and texts are worth alone."""
    run = f"fusion_{name}_only"
    return [
        Stage("fusion.all_embeddings.train", ("--preset", PRESET, "--run", run, "--use", *use)),
        Stage("fusion.all_embeddings.predict", ("test", "--run", run)),
    ]


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(DemoSettings, argv, description=__doc__.split("\n")[0])
    workspace = Workspace(settings.workspace)
    catalogue = settings.workspace / "catalogue"
    rows = ["--train-rows", str(settings.train_rows), "--test-rows", str(settings.test_rows)]
    sample_catalog.main(["--out", str(catalogue), *rows])

    stages = pipeline_stages(PipelineSettings(data=catalogue, preset=PRESET))
    stages += single_modality("image", CLIP_IMAGE, SIGLIP_IMAGE)
    stages += single_modality("text", QWEN_TEXT, SIGLIP_TEXT)
    run_stages(stages, workspace.root)

    print(
        "\nThe encoders here are tiny and start from random weights: the demo shows that the stages work together,"
    )
    print("and not what the published encoders can do.\n")
    print(write_scores(workspace.root, catalogue))
    print(f"\nreport      {write_report(workspace.root)}")
    print(describe_outcome(workspace.root))


if __name__ == "__main__":
    run_entry_point(main)
