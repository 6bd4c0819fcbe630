"""Train the fusion of four embeddings and score it on the held-out rows.

python -m fusion.all_embeddings.train --workspace OUT --preset tiny
"""

from __future__ import annotations

from typing import Any

from contracts.errors import run_entry_point
from fusion.all_embeddings.config import PRESETS, AllEmbeddingsSettings, build_model
from training.settings import parse_settings


def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(
        AllEmbeddingsSettings, argv, description=__doc__.split("\n")[0], presets=PRESETS
    )
    from fusion.all_embeddings.model import MODALITIES
    from fusion.experiment import build_data, fit_and_score

    data = build_data(settings, MODALITIES)
    return fit_and_score(settings, data, build_model)


if __name__ == "__main__":
    run_entry_point(main)
