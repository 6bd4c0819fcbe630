"""What the fusion benchmarks compare with: one dict per row, collated and sent to the device batch by batch.

The rows are separate arrays in separate dicts, as they are after a pickled list of dicts has been read.

Legend: B batch, M modalities, D_in encoder width.
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

from contracts.workspace import CLIP_IMAGE, QWEN_TEXT, SIGLIP_IMAGE, SIGLIP_TEXT
from fusion.blocks import AttentionBlock, Dropout, EmbeddingBranch, MixtureOfExperts, zero_missing
from fusion.dataset import FusionTable
from fusion.int8 import LinearExperts
from fusion.target import Target

WIDTHS = {CLIP_IMAGE: 768, SIGLIP_IMAGE: 1152, SIGLIP_TEXT: 1024, QWEN_TEXT: 1027}
"""D_in of the published encoders, in the order of the model's modalities; qwen_text has three structural features."""
MISSING_SHARE = 0.05
MEAN_LOG_PRICE = 2.6


def random_table(rows: int, seed: int = 0) -> FusionTable:
    """Normal embeddings, a twentieth of the entries missing, and prices that depend on the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(rows, len(WIDTHS), generator=generator) > MISSING_SHARE
    embeddings = {}
    log_price = torch.full((rows,), MEAN_LOG_PRICE)
    for column, (name, width) in enumerate(WIDTHS.items()):
        matrix = torch.randn(rows, width, generator=generator)
        matrix *= valid[:, column, None]
        direction = torch.randn(width, generator=generator) / width**0.5
        log_price += 0.5 * matrix @ direction
        embeddings[name] = matrix
    price = np.expm1(log_price.clamp(min=0.1).double().numpy())
    return FusionTable.of(pd.DataFrame({"price": price}), embeddings, valid)


class RowDicts(Dataset):
    """The content of a table as one dict of arrays per row.

    With `as_tensors` each access copies the arrays to tensors, as a Dataset that calls torch.tensor(row[…]) does.
    """

    def __init__(self, table: FusionTable, as_tensors: bool = False):
        self.as_tensors = as_tensors
        matrices = {name: matrix.numpy() for name, matrix in table.embeddings.items()}
        valid = table.valid.numpy()
        log_price = table.log_price.numpy()
        self.rows = []
        for row in range(len(valid)):
            content = {name: matrix[row].copy() for name, matrix in matrices.items()}
            content["valid"] = valid[row].copy()
            content["log_price"] = log_price[row]
            self.rows.append(content)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray] | dict[str, Tensor]:
        if self.as_tensors:
            return {name: torch.tensor(array) for name, array in self.rows[row].items()}
        return self.rows[row]


class PlainBranch(EmbeddingBranch):
    """The branch as its formula reads: the scale is applied before the product with the weights."""

    def forward(self, embedding: Tensor, valid: Tensor | None = None) -> Tensor:
        scaled = self.scale * zero_missing(embedding, valid)
        return zero_missing(self.layers(scaled), valid)


PLAIN_CLASSES = {Dropout: nn.Dropout, EmbeddingBranch: PlainBranch}


def with_plain_layers(model: nn.Module) -> nn.Module:
    """The same model, changed in place to what one would write first: without the fast paths of `fusion.blocks`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, MixtureOfExperts):
                with torch.no_grad():
                    setattr(module, name, LinearExperts(child))
        if isinstance(module, AttentionBlock):
            module.short_path = False
        module.__class__ = PLAIN_CLASSES.get(type(module), type(module))
    return model


class ModelWithLoss(nn.Module):
    """The model as transformers' Trainer wants it: the batch comes as keyword arguments, {"loss": scalar} goes out."""

    def __init__(self, model: nn.Module, target: Target):
        super().__init__()
        self.model = model
        self.target = target
        self.modality_dropout = target.settings.modality_dropout

    def forward(self, valid: Tensor, log_price: Tensor, **embeddings: Tensor) -> dict[str, Tensor]:
        """valid (B, M), log_price (B,), and an embedding (B, D_in) per modality."""
        kept = valid & (torch.rand(valid.shape, device=valid.device) >= self.modality_dropout)
        visible = torch.where(kept.any(dim=1, keepdim=True), kept, valid)
        output = self.model(embeddings, visible)
        return {"loss": self.target.loss(output, log_price)}


# Both rivals return train(steps), which goes on from where the call before it ended.


def trainer_steps(
    model: ModelWithLoss, dataset: Dataset, target: Target, device: str, workers: int
) -> Callable[[int], object]:
    """Training with transformers' Trainer as it comes: its fused AdamW, gradient clipping and collator."""
    from training.device import guard_torchvision

    guard_torchvision()
    from transformers import Trainer, TrainingArguments

    settings = target.settings

    def train(steps: int) -> object:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.lr,
                lr_scheduler_type="constant",
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                bf16=device == "cuda",
                use_cpu=device == "cpu",
                dataloader_num_workers=workers,
                dataloader_pin_memory=device == "cuda",
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            return Trainer(model=model, args=arguments, train_dataset=dataset).train()

    return train


def loop_steps(
    model: ModelWithLoss, dataset: Dataset, target: Target, device: str, workers: int
) -> Callable[[int], object]:
    """Training with the usual loop: DataLoader, .to(device), AdamW, clipping, and the loss read after every step."""
    settings = target.settings
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)

    def endless_batches() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from DataLoader(
                dataset, settings.batch_size, shuffle=True, num_workers=workers, pin_memory=device == "cuda"
            )

    batches = endless_batches()

    def train(steps: int) -> float:
        model.train()
        total = 0.0
        for batch in islice(batches, steps):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            total += loss.item()
        return total

    return train
