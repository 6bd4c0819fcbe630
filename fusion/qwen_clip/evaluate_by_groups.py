"""Where a finished run is right and wrong: by price, by unit kind, by which modalities are present.

python -m fusion.qwen_clip.evaluate_by_groups --workspace OUT
"""

from __future__ import annotations

from typing import Any

from contracts.errors import run_entry_point
from fusion import commands
from fusion.qwen_clip.config import PACKAGE


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return commands.evaluate_by_groups(PACKAGE, argv, description=__doc__.split("\n")[0])


if __name__ == "__main__":
    run_entry_point(main)
