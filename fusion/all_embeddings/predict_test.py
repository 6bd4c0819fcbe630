"""Price every row of test.csv with a finished run and write test_out.csv.

python -m fusion.all_embeddings.predict_test --workspace OUT
"""

from __future__ import annotations

from pathlib import Path

from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from fusion.all_embeddings.config import AllEmbeddingsSettings, build_model
from fusion.config import ApplySettings
from training.settings import parse_settings


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ApplySettings, argv, description=__doc__.split("\n")[0])
    from fusion.all_embeddings.model import MODALITIES
    from fusion.experiment import load_trained, write_submission

    workspace, run = Workspace(settings.workspace), settings.run or AllEmbeddingsSettings.run
    out = Path(settings.out) if settings.out else workspace.path("submission")
    trained = load_trained(
        workspace, run, "fusion.all_embeddings", AllEmbeddingsSettings, build_model, settings.device
    )
    write_submission(trained, workspace, MODALITIES, out)


if __name__ == "__main__":
    run_entry_point(main)
