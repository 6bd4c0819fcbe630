"""Price every row of test.csv with a finished run and write test_out.csv.

python -m fusion.qwen_clip.predict_test --workspace OUT
"""

from __future__ import annotations

from pathlib import Path

from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from fusion.config import ApplySettings
from fusion.qwen_clip.config import QwenClipSettings, build_model
from training.settings import parse_settings


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ApplySettings, argv, description=__doc__.split("\n")[0])
    from fusion.experiment import load_trained, write_submission
    from fusion.qwen_clip.baseline import MODALITIES

    workspace, run = Workspace(settings.workspace), settings.run or QwenClipSettings.run
    out = Path(settings.out) if settings.out else workspace.path("submission")
    trained = load_trained(workspace, run, "fusion.qwen_clip", QwenClipSettings, build_model, settings.device)
    write_submission(trained, workspace, MODALITIES, out)


if __name__ == "__main__":
    run_entry_point(main)
