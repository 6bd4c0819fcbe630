"""What the fusion benchmarks compare with: one dict a row, collated and sent batch by batch.

The rows are separate arrays in separate dicts, as they are after a pickled list of dicts has been read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fusion.blocks import AttentionBlock, Dropout, EmbeddingBranch, MixtureOfExperts, zero_missing
from fusion.dataset import FusionTable
from fusion.int8 import LinearExperts
from fusion.loop import Target

WIDTHS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
"""SPEC's encoders; the order is that of the model's modalities."""


def random_table(rows: int, seed: int = 0) -> FusionTable:
    """Normal embeddings, a twentieth of the entries missing, prices that depend on the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(rows, len(WIDTHS), generator=generator) > 0.05
    embeddings, log_price = {}, torch.full((rows,), 2.6)
    for column, (name, width) in enumerate(WIDTHS.items()):
        matrix = torch.randn(rows, width, generator=generator).mul_(valid[:, column, None])
        log_price += 0.5 * matrix @ (torch.randn(width, generator=generator) / width**0.5)
        embeddings[name] = matrix
    price = np.expm1(log_price.clamp(min=0.1).double().numpy())
    return FusionTable.of(pd.DataFrame({"price": price}), embeddings, valid)


class RowDicts(Dataset):
    """The same content as a table, one dict of arrays a row; `as_tensors` copies them, as torch.tensor(row[…]) does."""

    def __init__(self, table: FusionTable, as_tensors: bool = False):
        self.as_tensors = as_tensors
        matrices = {name: matrix.numpy() for name, matrix in table.embeddings.items()}
        valid, log_price = table.valid.numpy(), table.log_price.numpy()
        self.rows = [
            {name: matrix[row].copy() for name, matrix in matrices.items()}
            | {"valid": valid[row].copy(), "log_price": log_price[row]}
            for row in range(len(valid))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray] | dict[str, Tensor]:
        if self.as_tensors:
            return {name: torch.tensor(array) for name, array in self.rows[row].items()}
        return self.rows[row]


class PlainBranch(EmbeddingBranch):
    """The branch as its formula reads: the scale before the product."""

    def forward(self, embedding: Tensor, valid: Tensor | None = None) -> Tensor:
        return zero_missing(self.layers(self.scale * zero_missing(embedding, valid)), valid)


def with_plain_layers(model: nn.Module) -> nn.Module:
    """The same model, in place, as one would write it first: without the fast paths of `fusion.blocks`."""
    plain = {Dropout: nn.Dropout, EmbeddingBranch: PlainBranch}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, MixtureOfExperts):
                with torch.no_grad():
                    setattr(module, name, LinearExperts(child))
        if isinstance(module, AttentionBlock):
            module.short_path = False
        module.__class__ = plain.get(type(module), type(module))
    return model


class ModelWithLoss(nn.Module):
    """The model as the Trainer wants it: a batch as keyword arguments → {"loss": scalar}."""

    def __init__(self, model: nn.Module, target: Target):
        super().__init__()
        self.model, self.loss, self.chance = model, target.loss(), target.settings.modality_dropout

    def forward(self, valid: Tensor, log_price: Tensor, **embeddings: Tensor) -> dict[str, Tensor]:
        kept = valid & (torch.rand(valid.shape, device=valid.device) >= self.chance)  # modality dropout
        output = self.model(embeddings, torch.where(kept.any(dim=1, keepdim=True), kept, valid))
        return {"loss": self.loss(output, log_price)}


def trainer_steps(
    model: ModelWithLoss, dataset: Dataset, target: Target, device: str, workers: int
) -> Callable[[int], object]:
    """train(steps) with Hugging Face's Trainer as it comes: its own fused AdamW, gradient clipping, collator."""
    from training.device import guard_torchvision

    guard_torchvision()
    from transformers import Trainer, TrainingArguments

    settings = target.settings

    def train(steps: int) -> object:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.lr, weight_decay=settings.weight_decay, max_grad_norm=settings.clip_norm,
                lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", report_to=[],
                disable_tqdm=True, use_cpu=device == "cpu", bf16=device == "cuda", remove_unused_columns=False,
                dataloader_num_workers=workers, dataloader_pin_memory=device == "cuda",
            )  # fmt: skip
            return Trainer(model=model, args=arguments, train_dataset=dataset).train()

    return train


def loop_steps(
    model: ModelWithLoss, dataset: Dataset, target: Target, device: str, workers: int
) -> Callable[[int], object]:
    """train(steps) with the usual loop: DataLoader, .to(device), AdamW, clipping, the loss read every step."""
    settings = target.settings
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from DataLoader(
                dataset, settings.batch_size, shuffle=True, num_workers=workers, pin_memory=device == "cuda"
            )

    endless = batches()

    def train(steps: int) -> float:
        model.train()
        total = 0.0
        for batch in islice(endless, steps):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            total += loss.item()
        return total

    return train
