"""Price the rows of a prepared table with a finished run and write predictions/<run>_<table>.csv.

python -m fusion.all_embeddings.predict new --workspace OUT
"""

from __future__ import annotations

from contracts.errors import run_entry_point
from fusion import commands
from fusion.all_embeddings.config import PACKAGE


def main(argv: list[str] | None = None) -> None:
    commands.predict(PACKAGE, argv, description=__doc__.split("\n")[0])


if __name__ == "__main__":
    run_entry_point(main)
