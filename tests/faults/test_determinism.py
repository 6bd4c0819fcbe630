"""The same seed gives the same prices, to the byte: in two processes that know nothing of each other."""

import os
import subprocess
import sys

import pytest


def priced(source, workspace, hash_seed):
    # the order of sets and of hashed names differs from process to process, as it does between two users
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pipeline.run", "--data", str(source), "--workspace", str(workspace), "--preset", "tiny",
        "--set", "qwen3_finetune.epochs=1", "clip_finetune.epochs=1", "fusion.epochs=3",
    ]  # fmt: skip
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return (workspace / "test_out.csv").read_bytes()


@pytest.mark.slow
def test_the_same_seed_twice_gives_the_same_file(tmp_path):
    from data import sample_catalog

    sample_catalog.main(["--out", str(tmp_path / "catalogue"), "--train-rows", "300", "--test-rows", "40"])
    first, second = (priced(tmp_path / "catalogue", tmp_path / name, name) for name in ("1", "2"))
    assert first == second
    assert first.count(b"\n") == 41
