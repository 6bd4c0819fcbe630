"""The whole system on a generated catalogue whose best possible score is known: `make demo`.

python -m pipeline.demo --workspace demo
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from contracts.errors import run_entry_point
from pipeline.report import write_report
from pipeline.run import PipelineSettings, commands, run_stages
from pipeline.scores import write_scores
from training.settings import parse_settings


@dataclass
class DemoSettings:
    workspace: Path = Path("demo")
    """Folder that receives the catalogue and every artefact."""
    train_rows: int = 2000
    """Products with a price."""
    test_rows: int = 500
    """Products to price."""


def single_modality(workspace: Path, name: str, *use: str) -> list[list[str]]:
    """The fusion with some embeddings treated as missing everywhere, to see what each side is worth."""
    run = f"fusion_{name}_only"
    out = workspace / "predictions" / f"{run}.csv"
    return [
        ["fusion.all_embeddings.train", "--preset", "tiny", "--run", run, "--use", *use],
        ["fusion.all_embeddings.predict_test", "--run", run, "--out", str(out)],
    ]


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(DemoSettings, argv, description=__doc__.split("\n")[0])
    workspace = settings.workspace
    catalogue = workspace / "catalogue"
    rows = ["--train-rows", str(settings.train_rows), "--test-rows", str(settings.test_rows)]
    from data import sample_catalog

    sample_catalog.main(["--out", str(catalogue), *rows])
    stages = commands(PipelineSettings(data=str(catalogue), preset="tiny"))
    stages += single_modality(workspace, "image", "clip_image", "siglip_image")
    stages += single_modality(workspace, "text", "qwen_text", "siglip_text")
    run_stages(stages, workspace)
    print(
        "\nEncoders here are tiny and start from random weights; this shows the machinery, not the models.\n"
    )
    print(write_scores(workspace, catalogue))
    print(f"\nreport      {write_report(workspace)}\nsubmission  {workspace / 'test_out.csv'}")


if __name__ == "__main__":
    run_entry_point(main)
