"""Fusion training under torchrun over gloo."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from contracts import splits
from contracts.catalog import read_table
from contracts.embeddings import Embeddings, write_embeddings
from contracts.workspace import Workspace
from fusion.all_embeddings import train
from training.run_folder import RunFolder

# 280 rows to fit: the last batch has one row, so that the second process gets none of it
FLAGS = "--preset tiny --width 16 --heads 2 --dropout 0 --auxiliary-under-15 --epochs 8 --batch-size 93"


@pytest.fixture(scope="module")
def workspace(sample_workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(sample_workspace / "data", folder / "data")
    workspace, generator = Workspace(folder), np.random.default_rng(0)
    rows = workspace.prepared("train")
    signal = np.log1p(rows["price"].to_numpy())[:, None]
    for name in ("clip_image", "siglip_image", "siglip_text", "qwen_text"):
        matrix = signal * generator.normal(size=(1, 9)) + generator.normal(size=(len(rows), 9))
        meta = {
            "name": name, "split": "train", "model": "synthetic", "checkpoint": "sha", "command": "test",
            "fitted_on": splits.fitted_on(encoder_folds=()), "split_hash": splits.split_hash(workspace.folds()),
        }  # fmt: skip
        valid = generator.random(len(rows)) > 0.1
        content = Embeddings(rows["sample_id"].to_numpy(str), matrix.astype(np.float32), valid, meta)
        write_embeddings(workspace.path("embeddings", name=name, split="train"), content)
    return workspace


@pytest.mark.slow
def test_two_processes_predict_like_one(workspace):
    flags = [*FLAGS.split(), "--workspace", str(workspace.root), "--device", "cpu"]
    train.main([*flags, "--run", "one"])
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 -m fusion.all_embeddings.train --"
    subprocess.run([sys.executable, *command.split(), *flags, "--run", "two"], check=True, timeout=120)

    folders = [RunFolder(workspace.path("run", name=name)) for name in ("one", "two")]
    curves = [[list(line.values()) for line in folder.metrics()] for folder in folders]
    assert len(curves[0]) == len(curves[1]) == 16  # two lines an epoch: only the first process writes
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    one, two = (
        read_table(workspace.path("predictions", name=name, split="train")).set_index("sample_id")[
            "log_price"
        ]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one.astype(float), two[one.index].astype(float), atol=2e-4)
    assert curves[0][-2][1] < 0.9 * curves[0][0][1]  # the loss of the last epoch: something was learnt
