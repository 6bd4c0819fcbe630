"""Faults that are injected for real: processes are killed, files are damaged, numbers become NaN.

`make faults` runs this folder; it takes longer than the other tests.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from contracts import splits
from contracts.embeddings import Embeddings, write_embeddings
from contracts.errors import run_entry_point
from contracts.workspace import Workspace
from training.best_weights import BestWeights
from training.device import guard_torchvision

WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
ROWS = 150
DIALOGUES: list[Path] = []
"""folder of the table that text_tabular trains on, once it is made"""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@dataclass(frozen=True)
class Trainer:
    """One training stage, small enough for a second."""

    name: str
    flags: tuple[str, ...]
    run: str
    step: tuple[str, str, str]
    """module, class or "", and name of the function that is called once per step"""

    def main(self, root: Path, *flags: str) -> None:
        if self.name == "clip":
            from clip_finetune.train import main
        elif self.name == "qwen":
            from qwen3_finetune.train import main
        elif self.name == "fusion":
            from fusion.all_embeddings.train import main
        else:
            from text_tabular.train import main
        data = ()
        if self.name == "text_tabular":
            # by its path, which is a setting, the table must be the same for all copies of a workspace
            data = ("--train", f"{DIALOGUES[0]}/train.csv", "--columns", f"{DIALOGUES[0]}/columns.yaml")
        main([*self.flags, *data, "--workspace", str(root), *flags])

    def folder(self, root: Path) -> Path:
        return root / "checkpoints" / self.run

    def weights(self, root: Path) -> dict[str, torch.Tensor]:
        """All weights of the finished run, by file and name."""
        found = {}
        for file in sorted(self.folder(root).rglob("*.safetensors")):
            for name, tensor in load_file(file).items():
                found[f"{file.relative_to(root)} {name}"] = tensor
        return found


SMALL = ("--preset", "tiny", "--device", "cpu", "--epochs", "2")
TRAINERS = [
    Trainer(
        "clip", (*SMALL, "--batch-size", "16", "--gradient-accumulation-steps", "2"), "clip_finetune",
        ("clip_finetune.loop", "Training", "update"),
    ),
    Trainer(
        "qwen", (*SMALL, "--batch-size", "16", "--max-length", "16"), "qwen3_finetune",
        ("qwen3_finetune.loop", "Training", "update"),
    ),
    Trainer(
        "fusion", (*SMALL, "--width", "16", "--heads", "2", "--batch-size", "32", "--use", "qwen_text"),
        "fusion_all_embeddings", ("fusion.loop", "", "fit_epoch"),
    ),
    Trainer(
        "text_tabular", (*SMALL, "--design", "concat", "--batch-size", "16", "--run", "tt"), "tt",
        ("text_tabular.loop", "Training", "train_step"),
    ),
]  # fmt: skip


@pytest.fixture(params=TRAINERS, ids=lambda trainer: trainer.name)
def trainer(request):
    torch.set_num_threads(1)
    guard_torchvision()
    importlib.import_module(request.param.step[0])  # once, and not in every child
    return request.param


@pytest.fixture(scope="session")
def small_workspace(sample_workspace, tmp_path_factory) -> Path:
    """What every trainer reads, in few rows."""
    from text_tabular import sample_dialogues

    root = tmp_path_factory.mktemp("small")
    (root / "data").mkdir()
    shutil.copy(sample_workspace / "data/catalog.json", root / "data")
    for name in ("prepared_train", "prepared_test", "folds"):
        table = pd.read_csv(sample_workspace / f"data/{name}.csv", dtype=str, keep_default_na=False)
        table.head(ROWS).to_csv(root / f"data/{name}.csv", index=False)
    DIALOGUES.append(tmp_path_factory.mktemp("dialogues"))
    sample_dialogues.main(["--out", str(DIALOGUES[0]), "--train-rows", "120", "--test-rows", "10"])
    workspace = Workspace(root)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        ids = workspace.prepared(split)["sample_id"].to_numpy(str)
        meta = {
            "name": "qwen_text", "split": split, "model": "random", "checkpoint": "sha", "command": "test",
            "fitted_on": splits.fitted_on(encoder_folds=()), "split_hash": splits.split_hash(workspace.folds()),
        }  # fmt: skip
        matrix = random.normal(size=(len(ids), 4)).astype(np.float32)
        path = workspace.path("embeddings", name="qwen_text", split=split)
        write_embeddings(path, Embeddings(ids, matrix, np.ones(len(ids), bool), meta))
    return root


@pytest.fixture
def new_workspace(small_workspace, tmp_path):
    """new_workspace(name) is a copy of the small workspace."""

    def new(name: str) -> Path:
        shutil.copytree(small_workspace, tmp_path / name)
        return tmp_path / name

    return new


def in_child(work: Callable[[], object], *, output: Path | None = None) -> int:
    """Do something in a process of its own; returns its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        try:
            run_entry_point(work)
        except SystemExit as error:
            os._exit(error.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def kill_at(number: int, root: Path, *, after: tuple[type, str] = (BestWeights, "load")) -> None:
    """Kill this process before its n-th change of a file, counted from the end of a method: by default, of training."""
    counted = 0
    armed = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal counted
        if not armed:
            return
        writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        inside = event != "open" or str(arguments[0]).startswith(str(root))
        if (writes or event in WRITES) and inside:
            counted += 1
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)

    owner, name = after
    method = getattr(owner, name)

    def then_armed(*positional, **named):
        nonlocal armed
        result = method(*positional, **named)
        armed = True
        return result

    setattr(owner, name, then_armed)  # in the child only
    sys.addaudithook(hook)


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
