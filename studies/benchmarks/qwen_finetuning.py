"""Fine-tuning a text encoder: our training step beside transformers' Trainer, on the same rows.

    python -m studies.benchmarks.qwen_finetuning --quick                      # a tiny encoder on the CPU
    python -m studies.benchmarks.qwen_finetuning --device cuda --rows 4096    # Qwen3-Embedding-0.6B, random weights

Encoder, adapters, head, loss, batch size and optimizer are the same. The rivals differ in what a batch is: ours holds
texts of similar length, whereas the Trainer draws its texts at random and pads them to --max-length or to the longest
of the batch. Tokens are those of the texts, never padding. `gemm_share` is the share of the arithmetic that these
tokens need: the forward pass and the gradient with respect to the activations. Recomputed activations and padding are
overhead.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from contracts.errors import run_entry_point
from contracts.workspace import STRUCTURAL_FEATURES
from studies.benchmarks.text_extraction import attention_flop, catalogue_texts, linear_weights, padding_share
from studies.tables import RESULTS
from training.device import build_accelerator, choose_device, guard_torchvision
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from qwen3_finetune.config import QwenSettings
    from qwen3_finetune.data import TextRows
    from qwen3_finetune.loop import Training


Quantization = Literal["nf4", "none"]


@dataclass
class QwenFinetuningSettings:
    data: str = "../shared/data/challenge"
    """Folder with a train.csv to sample; where it is absent, texts are generated."""
    tokenizer: str = "../shared/data/tokenizers/qwen2"
    """Tokenizer of the full encoder; where it is absent, one is trained on the texts."""
    rows: int = 512
    """Texts per epoch."""
    max_length: int = 512
    """Tokens per text."""
    batch_size: int = 16
    """Texts per step."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: the tiny architecture in fp32; cuda: Qwen3-Embedding-0.6B in NF4 and in bf16, with random weights."""
    rounds: int = 3
    """Epochs that every rival is measured, in turns."""
    quick: bool = False
    """Use 96 texts and one round, to see that it runs."""
    out: Path = RESULTS / "qwen_finetuning.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = 96
            self.rounds = 1


def stage_settings(settings: QwenFinetuningSettings, quantization: Quantization) -> QwenSettings:
    """LoRA as the stage's defaults have it, on the encoder of this device."""
    from qwen3_finetune.config import QwenSettings

    on_gpu = settings.device == "cuda"
    has_tokenizer = on_gpu and Path(settings.tokenizer).is_dir()
    return QwenSettings(
        model=QwenSettings.model if on_gpu else "tiny",
        tokenizer=settings.tokenizer if has_tokenizer else "",
        random_weights=True,
        pooling="last",
        quantization=quantization,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        holdout=None,
        gradient_checkpointing=on_gpu,
        device=settings.device,
    )


def text_rows(texts: list[str]) -> TextRows:
    """`texts` as rows of a fit fold, at random prices."""
    from qwen3_finetune.data import TextRows

    count = len(texts)
    log_price = np.random.default_rng(0).normal(2.7, 0.9, count).clip(0.1).astype(np.float32)
    return TextRows(
        sample_ids=np.arange(count).astype(np.str_),
        texts=texts,
        structural=np.zeros((count, len(STRUCTURAL_FEATURES)), np.float32),
        valid=np.ones(count, bool),
        unit_kind=np.full(count, "none"),
        log_price=log_price,
        fold=np.ones(count, int),
    )


def our_epoch(training: Training) -> None:
    """An epoch of the stage itself."""
    from qwen3_finetune.loop import Progress
    from training.stopping import StopRequest

    training.progress = Progress()
    training.train_epoch(StopRequest(training.accelerator.device))


def trainer_epoch(training: Training, pad_to: int | None, folder: Path) -> None:
    """The same model and rows in transformers' Trainer, padded to `pad_to` tokens or the longest of a batch."""
    from transformers import Trainer, TrainingArguments

    stage = training.settings
    on_gpu = training.accelerator.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.lr,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model_with_loss(training),
        arguments,
        data_collator=functools.partial(collate, training, pad_to),
        train_dataset=range(len(training.log_price)),
    ).train()


def model_with_loss(training: Training) -> nn.Module:
    """The model as the Trainer wants it: a batch comes as keyword arguments, its loss goes out."""
    from torch import nn

    from training.smape_loss import huber_smape

    stage = training.settings

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = training.accelerator.unwrap_model(training.model)

        def forward(self, input_ids, attention_mask, structural, labels):
            _, log_price = self.model(input_ids, attention_mask, structural)
            loss = huber_smape(
                log_price,
                labels,
                huber_weight=stage.huber_weight,
                smape_weight=stage.smape_weight,
                delta=stage.huber_delta,
            )
            return {"loss": loss, "logits": log_price}

    return WithLoss()


def collate(training: Training, pad_to: int | None, rows: list[int]) -> dict[str, torch.Tensor]:
    """The batch of these rows by the names of the model's arguments."""
    import torch

    input_ids, attention_mask, structural = training.inputs(np.array(rows))
    if pad_to is not None:
        missing = pad_to - input_ids.shape[1]
        sides = (missing, 0) if training.inputs.padding_side == "left" else (0, missing)
        input_ids = torch.nn.functional.pad(input_ids, sides)
        attention_mask = torch.nn.functional.pad(attention_mask, sides)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "structural": structural,
        "labels": torch.from_numpy(training.log_price[rows]),
    }


def training_flop(training: Training) -> float:
    """FLOP of one epoch over the texts' own tokens: once forward, once backward to the activations.

    The weights are frozen, so their gradients cost nothing, and the adapters have less than 3 % of the weights. The
    backward pass of attention's products has both operands, hence twice the forward pass.
    """
    encoder = training.accelerator.unwrap_model(training.model).encoder
    lengths = training.inputs.lengths
    of_weights = 2 * (2.0 * linear_weights(encoder) * lengths.sum())
    of_attention = 3 * attention_flop(encoder.config, lengths, causal=True)
    return of_weights + of_attention


def peak_gigabytes(work: Callable[[], object]) -> float:
    """Peak CUDA memory of one call."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


def compare(
    settings: QwenFinetuningSettings, quantization: Quantization, accelerator: Accelerator, folder: Path
) -> list[dict[str, Any]]:
    """Rows of our epoch and the Trainer's, for one way to store the weights."""
    import torch

    from qwen3_finetune.loop import Training
    from qwen3_finetune.spec import EncoderSpec
    from studies.benchmarks.measure import gemm_rate, interleave
    from training.run_folder import RunFolder

    on_gpu = settings.device == "cuda"
    stage = stage_settings(settings, quantization)
    spec = EncoderSpec.resolve(stage, accelerator.device)
    texts = catalogue_texts(settings.data, settings.rows)
    training = Training(stage, spec, accelerator, RunFolder(folder), text_rows(texts))
    rivals: dict[str, Callable[[], None]] = {
        "ours": functools.partial(our_epoch, training),
        f"Trainer, padded to {settings.max_length}": functools.partial(
            trainer_epoch, training, settings.max_length, folder
        ),
        "Trainer, padded to the longest": functools.partial(trainer_epoch, training, None, folder),
    }
    peak_gb = {}
    for name, work in rivals.items():  # this round is the warm-up, too
        if on_gpu:
            peak_gb[name] = peak_gigabytes(work)
        else:
            work()
    times = interleave(rivals, rounds=settings.rounds, warmup=0)

    rate = gemm_rate(settings.device, torch.bfloat16 if on_gpu else torch.float32)
    lengths = training.inputs.lengths
    tokens = int(lengths.sum())
    flop = training_flop(training)
    weights = "NF4" if quantization == "nf4" else "bf16" if on_gpu else "fp32, tiny encoder"
    rows = []
    for name, time in times.items():
        seconds = time["median"]
        row = {
            "weights": weights,
            "rival": name,
            "seconds_per_epoch": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "gemm_share": flop / seconds / rate,
            "seconds_over_ours": seconds / times["ours"]["median"],
        }
        if on_gpu:
            row["peak_gb"] = peak_gb[name]
        rows.append(row)
    rows[0]["padding_share"] = padding_share(lengths, training.batches_of_this_device(0))
    return rows


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(QwenFinetuningSettings, argv, description=__doc__.split("\n")[0])
    guard_torchvision()
    from studies.benchmarks.measure import report

    accelerator = build_accelerator(choose_device(settings.device), "auto")
    rows = []
    quantizations: tuple[Quantization, ...] = ("nf4", "none") if settings.device == "cuda" else ("none",)
    for quantization in quantizations:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(settings, quantization, accelerator, Path(folder))
    report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
