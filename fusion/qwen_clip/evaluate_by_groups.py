"""Where a finished run is right and wrong: by price, by unit kind, by which modalities are present.

python -m fusion.qwen_clip.evaluate_by_groups --workspace OUT
"""

from __future__ import annotations

from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from fusion.config import ApplySettings
from fusion.qwen_clip.config import QwenClipSettings, build_model
from training.settings import parse_settings


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ApplySettings, argv, description=__doc__.split("\n")[0])
    from fusion.experiment import evaluate, load_trained
    from fusion.qwen_clip.baseline import MODALITIES

    workspace, run = Workspace(settings.workspace), settings.run or QwenClipSettings.run
    trained = load_trained(workspace, run, "fusion.qwen_clip", QwenClipSettings, build_model, settings.device)
    return evaluate(trained, workspace, MODALITIES)


if __name__ == "__main__":
    run_entry_point(main)
