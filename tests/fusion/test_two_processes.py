"""Fusion training under torchrun over gloo."""

import subprocess
import sys

import numpy as np
import pytest

from contracts.predictions import read_predictions
from contracts.workspace import EMBEDDINGS
from fusion.all_embeddings import train
from training.run_folder import RunFolder

# 280 rows to fit: the last batch has one row, so that the second process gets none of it
FLAGS = "--preset tiny --width 16 --heads 2 --dropout 0 --auxiliary-under-15 --epochs 8 --batch-size 93"


@pytest.fixture(scope="module")
def workspace(empty_workspace, write_embedding):
    generator = np.random.default_rng(0)
    signal = np.log1p(empty_workspace.prepared("train")["price"].to_numpy())[:, None]
    for name in EMBEDDINGS:
        matrix = signal * generator.normal(size=(1, 9)) + generator.normal(size=(len(signal), 9))
        write_embedding(empty_workspace, "train", name, matrix, valid=generator.random(len(signal)) > 0.1)
    return empty_workspace


@pytest.mark.slow
def test_two_processes_predict_like_one(workspace):
    flags = [*FLAGS.split(), "--workspace", str(workspace.root), "--device", "cpu"]
    train.main([*flags, "--run", "one"])
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 -m fusion.all_embeddings.train --"
    subprocess.run([sys.executable, *command.split(), *flags, "--run", "two"], check=True, timeout=120)

    lines_of_one, lines_of_two = (
        RunFolder(workspace.path("run", name=name)).metrics() for name in ("one", "two")
    )
    assert len(lines_of_one) == 16  # two lines per epoch: only the first process writes
    for line_of_one, line_of_two in zip(lines_of_one, lines_of_two, strict=True):
        assert line_of_one == pytest.approx(line_of_two, rel=1e-4)
    losses = [line["train/loss"] for line in lines_of_one if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]  # something was learnt
    one = read_predictions(workspace, "one", "train")
    two = read_predictions(workspace, "two", "train")
    np.testing.assert_array_equal(one.sample_ids, two.sample_ids)
    np.testing.assert_allclose(one.log_price, two.log_price, atol=2e-4)
