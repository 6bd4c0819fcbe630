"""A tiny random model, a few listings, and an SFT run, made once for all tests of the stage."""

import pandas as pd
import pytest
import torch

from attributes import sample_world, train_sft
from attributes.model import Spec, VisionLanguage, add_lora, load_base


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A drawn world; its base model has learned how replies look, and hardly more."""
    folder = tmp_path_factory.mktemp("world")
    sample_world.main(
        [
            "--out", str(folder), "--steps", "140", "--batch-size", "6", "--lr", "4e-3", "--labelled", "4",
            "--calibration", "6", "--unlabelled", "6", "--test", "4",
        ]
    )  # fmt: skip
    return folder


@pytest.fixture
def language(world):
    """The base with fresh adapters whose B is not zero, so that they change something."""
    model, tokenizer, processor = load_base(str(world / "base"), precision="fp32", device=torch.device("cpu"))
    torch.manual_seed(0)
    model = add_lora(model, rank=4, alpha=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    spec = Spec(str(world / "base"), "base", "both", "pad", 64, True)
    return VisionLanguage(model, tokenizer, processor, spec, world / "images")


@pytest.fixture
def sft_command(world):
    """Flags of a short SFT run; a test adds its workspace."""
    return [
        "--preset", "tiny", "--model", str(world / "base"), "--schema", str(world / "schema.yaml"), "--device", "cpu",
        "--listings", str(world / "train.csv"), "--labels", str(world / "labels.csv"), "--input", "pictures",
        "--lora-rank", "4",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def sft(world, tmp_path_factory):
    """Workspace with the finished run attributes_sft of a few steps."""
    workspace = tmp_path_factory.mktemp("sft")
    train_sft.main(
        ["--preset", "tiny", "--model", str(world / "base"), "--schema", str(world / "schema.yaml"),
         "--listings", str(world / "train.csv"), "--labels", str(world / "labels.csv"), "--input", "pictures",
         "--device", "cpu", "--epochs", "60", "--lr", "1e-2", "--workspace", str(workspace)]
    )  # fmt: skip
    return workspace


@pytest.fixture
def write_csv(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        pd.DataFrame(rows).to_csv(path, index=False)
        return path

    return write
