"""A small table of dialogues and a run of preset tiny, made once for all tests of the stage."""

import pytest

from text_tabular import sample_dialogues, train


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    sample_dialogues.main(["--out", str(folder), "--train-rows", "160", "--test-rows", "30"])
    return folder


@pytest.fixture
def command(dialogues, tmp_path):
    """Flags of a short training run; a test adds its own."""
    return [
        "--preset", "tiny", "--train", str(dialogues / "train.csv"), "--columns", str(dialogues / "columns.yaml"),
        "--workspace", str(tmp_path), "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(dialogues, tmp_path_factory):
    """Workspace with the finished run `gate`."""
    workspace = tmp_path_factory.mktemp("finished")
    train.main(
        [
            "--preset", "tiny", "--train", str(dialogues / "train.csv"), "--columns", str(dialogues / "columns.yaml"),
            "--workspace", str(workspace), "--device", "cpu", "--run", "gate", "--epochs", "2",
        ]
    )  # fmt: skip
    return workspace
