"""Train the fusion of two embeddings (CLIP image, Qwen text) and score it on the held-out rows.

python -m fusion.qwen_clip.train --workspace OUT --preset tiny
"""

from __future__ import annotations

from typing import Any

from contracts.errors import run_entry_point
from fusion import commands
from fusion.qwen_clip.config import PACKAGE


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return commands.train(PACKAGE, argv, description=__doc__.split("\n")[0])


if __name__ == "__main__":
    run_entry_point(main)
