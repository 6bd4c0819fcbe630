"""Small saved systems, made by the stages' own commands."""

import shutil

import pytest

from contracts.workspace import Workspace
from ensemble import train as ensemble


@pytest.fixture(scope="session")
def pretrained(sample_workspace, tmp_path_factory):
    """A tiny text encoder as a local folder, as one would download it."""
    from training.device import guard_torchvision

    guard_torchvision()
    from transformers import AutoModel, Qwen3Config

    from qwen3_finetune.config import ARCHITECTURES
    from qwen3_finetune.data import train_tokenizer

    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = train_tokenizer(Workspace(sample_workspace).prepared("train")["text"].tolist(), 1000)
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(**ARCHITECTURES["tiny"] | {"vocab_size": len(tokenizer)})
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_system(sample_workspace, pretrained, tmp_path_factory):
    """Two models on words, one of them with the embedding of a tiny frozen encoder; read only."""
    from qwen3_finetune import extract_embeddings
    from qwen3_finetune import train as encoder
    from word_models import train as words

    root = tmp_path_factory.mktemp("word_system")
    shutil.copytree(sample_workspace / "data", root / "data")
    workspace = ["--workspace", str(root)]
    frozen = ["--model", str(pretrained), "--train", "head", "--epochs", "1", "--max-length", "32"]
    encoder.main([*frozen, "--run", "frozen", "--device", "cpu", *workspace])
    for table in ("train", "test"):
        extract_embeddings.main([table, "--run", "frozen", "--embedding", "frozen_text", *workspace])
    words.main(["--model", "ridge", "--embeddings", "frozen_text", *workspace])
    words.main(["--model", "mlp", "--seeds", "1", *workspace])
    ensemble.main(workspace)
    return root


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a system that a test may change."""

    def copy(root):
        return shutil.copytree(root, tmp_path / "copy")

    return copy
