"""Fixtures shared by all tests. HF_HUB_OFFLINE has effect only when set before transformers is imported."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_data(name: str) -> Path:
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"real data not present: ../shared/data/{name}")
    return path


@pytest.fixture(scope="session")
def challenge() -> Path:
    """Folder with the real train.csv, test.csv and images/; skips where it is absent."""
    return shared_data("challenge")
