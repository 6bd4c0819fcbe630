"""Where a finished run is right and wrong: by price, by unit kind, by which modalities are present.

python -m fusion.all_embeddings.evaluate_by_groups --workspace OUT
"""

from __future__ import annotations

from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from fusion.all_embeddings.config import AllEmbeddingsSettings, build_model
from fusion.config import ApplySettings
from training.settings import parse_settings


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ApplySettings, argv, description=__doc__.split("\n")[0])
    from fusion.all_embeddings.model import MODALITIES
    from fusion.experiment import evaluate, load_trained

    workspace, run = Workspace(settings.workspace), settings.run or AllEmbeddingsSettings.run
    trained = load_trained(
        workspace, run, "fusion.all_embeddings", AllEmbeddingsSettings, build_model, settings.device
    )
    return evaluate(trained, workspace, MODALITIES)


if __name__ == "__main__":
    run_entry_point(main)
