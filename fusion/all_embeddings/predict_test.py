"""Price every row of test.csv with a finished run and write test_out.csv.

python -m fusion.all_embeddings.predict_test --workspace OUT
"""

from __future__ import annotations

from contracts.errors import run_entry_point
from fusion import commands
from fusion.all_embeddings.config import PACKAGE


def main(argv: list[str] | None = None) -> None:
    commands.predict_test(PACKAGE, argv, description=__doc__.split("\n")[0])


if __name__ == "__main__":
    run_entry_point(main)
