"""Fine-tuning a text encoder: our training step beside transformers' Trainer, on the same rows.

    python -m studies.benchmarks.qwen_finetuning --quick                      # a tiny encoder on the CPU
    python -m studies.benchmarks.qwen_finetuning --device cuda --rows 4096    # Qwen3-Embedding-0.6B, random weights

Encoder, adapters, head, loss, batch size and optimizer are the same; the rivals differ in what a batch is: ours holds
texts of similar length, the Trainer's are drawn at random and padded to --max-length or to the longest of the batch.
Tokens are those of the texts, never padding. `gemm_share` is of the arithmetic that those tokens need: forward and the
gradient with respect to the activations; recomputed activations and padding are overhead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from contracts.errors import run_entry_point
from contracts.workspace import REPOSITORY
from studies.benchmarks.text_extraction import attention_flops, catalogue_texts, linear_weights, padding_share
from training.device import choose_device, guard_torchvision, mixed_precision
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen3_finetune.config import QwenSettings
    from qwen3_finetune.data import TextRows
    from qwen3_finetune.loop import Training


@dataclass
class QwenFinetuningSettings:
    data: str = "../shared/data/challenge"
    """folder with a train.csv to sample; where absent, texts are generated"""
    tokenizer: str = "../shared/data/tokenizers/qwen2"
    """for the full encoder; where absent, one is trained on the texts"""
    rows: int = 512
    """texts an epoch"""
    max_length: int = 512
    """tokens of a text"""
    batch_size: int = 16
    """texts a step"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: the tiny architecture in fp32; cuda: Qwen3-Embedding-0.6B in NF4 and in bf16, random weights"""
    rounds: int = 3
    """epochs that every rival is measured, in turns"""
    quick: bool = False
    """96 texts, one round: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "qwen_finetuning.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows, self.rounds = 96, 1


def stage_settings(settings: QwenFinetuningSettings, quantization: str) -> QwenSettings:
    """LoRA as the stage's defaults have it, on the encoder of this device."""
    from qwen3_finetune.config import QwenSettings

    on_gpu = settings.device == "cuda"
    tokenizer = settings.tokenizer if on_gpu and Path(settings.tokenizer).is_dir() else ""
    return QwenSettings(
        model=QwenSettings.model if on_gpu else "tiny", tokenizer=tokenizer, random_weights=True, pooling="last",
        quantization=quantization, max_length=settings.max_length, batch_size=settings.batch_size, grad_accum=1,
        holdout=None, gradient_checkpointing=on_gpu,
    )  # fmt: skip


def text_rows(texts: list[str]) -> TextRows:
    """`texts` as rows of the fit folds, at random prices."""
    from qwen3_finetune.data import TextRows

    log_price = np.random.default_rng(0).normal(2.7, 0.9, len(texts)).clip(0.1).astype(np.float32)
    return TextRows(
        sample_ids=np.arange(len(texts)).astype(np.str_), texts=texts, valid=np.ones(len(texts), bool),
        structural=np.zeros((len(texts), 3), np.float32), unit_kind=np.full(len(texts), "none"),
        log_price=log_price, fold=np.ones(len(texts), int),
    )  # fmt: skip


def one_epoch(training: Training) -> None:
    """An epoch of the stage itself."""
    from qwen3_finetune.loop import Progress

    training.progress = Progress()
    training.train_epoch()


def one_trainer_epoch(training: Training, pad_to: int | None, folder: str) -> None:
    """The same model and rows in transformers' Trainer, padded to `pad_to` tokens or the longest of a batch."""
    import torch
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from qwen3_finetune.loss import price_loss

    stage, model = training.settings, training.accelerator.unwrap_model(training.model)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, structural, labels):
            _, log_price = self.model(input_ids, attention_mask, structural)
            loss = price_loss(
                log_price, labels, huber_weight=stage.huber_weight, smape_weight=stage.smape_weight,
                huber_delta=stage.huber_delta,
            )  # fmt: skip
            return {"loss": loss, "logits": log_price}

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        *text, structural = training.inputs(np.array(rows))
        if pad_to is not None:
            missing = pad_to - text[0].shape[1]
            sides = (missing, 0) if model.padding_side == "left" else (0, missing)
            text = [nn.functional.pad(tensor, sides) for tensor in text]
        labels = torch.from_numpy(training.log_price[rows])
        return {"input_ids": text[0], "attention_mask": text[1], "structural": structural, "labels": labels}

    on_gpu = training.accelerator.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=stage.batch_size, num_train_epochs=1, learning_rate=stage.lr,
        weight_decay=stage.weight_decay, max_grad_norm=stage.clip_norm, bf16=on_gpu, use_cpu=not on_gpu,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(
        WithLoss(), arguments, data_collator=collate, train_dataset=range(len(training.log_price))
    ).train()


def training_flops(training: Training) -> float:
    """FLOP of one epoch over the texts' own tokens: once forward, once backward to the activations.

    The weights are frozen, so their gradients cost nothing; the adapters are below 3 % of the weights. The backward of
    attention's products has both operands.
    """
    encoder, lengths = training.accelerator.unwrap_model(training.model).encoder, training.inputs.lengths
    return 4.0 * linear_weights(encoder) * lengths.sum() + 3 * attention_flops(
        encoder.config, lengths, causal=True
    )


def compare(
    settings: QwenFinetuningSettings, quantization: str, accelerator: Accelerator, folder: Path
) -> list[dict[str, object]]:
    """Rows of our epoch and the Trainer's, for one kind of weights."""
    import torch

    from qwen3_finetune.loop import Training
    from studies.benchmarks.measure import gemm_rate, interleave
    from training.run_folder import RunFolder

    on_gpu = settings.device == "cuda"
    texts = catalogue_texts(settings.data, settings.rows)
    training = Training(
        stage_settings(settings, quantization), accelerator, RunFolder(folder), text_rows(texts)
    )
    rivals: dict[str, Callable[[], None]] = {
        "ours": lambda: one_epoch(training),
        f"Trainer, padded to {settings.max_length}": lambda: one_trainer_epoch(
            training, settings.max_length, str(folder)
        ),
        "Trainer, padded to the longest": lambda: one_trainer_epoch(training, None, str(folder)),
    }
    peak_gb = {}
    for name, work in rivals.items():  # also the warm-up
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        work()
        if on_gpu:
            peak_gb[name] = torch.cuda.max_memory_allocated() / 1e9
    seconds = {
        name: time["median"] for name, time in interleave(rivals, rounds=settings.rounds, warmup=0).items()
    }
    rate = gemm_rate(settings.device, torch.bfloat16 if on_gpu else torch.float32)
    tokens, flops = int(training.inputs.lengths.sum()), training_flops(training)
    weights = "NF4" if quantization == "nf4" else "bf16" if on_gpu else "fp32, tiny encoder"
    rows = []
    for name, time in seconds.items():
        row = {
            "weights": weights, "rival": name, "seconds_an_epoch": time, "tokens": tokens,
            "tokens_per_second": tokens / time, "gemm_share": flops / time / rate,
            "seconds_over_ours": time / seconds["ours"],
        }  # fmt: skip
        rows.append(row | ({"peak_gb": peak_gb[name]} if on_gpu else {}))
    rows[0]["padding_share"] = padding_share(training.inputs.lengths, training.batches_of_this_device(0))
    return rows


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(QwenFinetuningSettings, argv, description=__doc__.split("\n")[0])
    guard_torchvision()
    from accelerate import Accelerator

    from studies.benchmarks.measure import report

    device = choose_device(settings.device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision("auto", device))
    rows = []
    for quantization in ("nf4", "none") if settings.device == "cuda" else ("none",):
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(settings, quantization, accelerator, Path(folder))
    report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
