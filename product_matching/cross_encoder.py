"""The cross-encoder: a transformer that reads both records of a pair together and gives the logit of a match.

    title: sony dsc-w120 | model: dscw120 | price: 199.0  [SEP]  title: cyber-shot w120 pink | brand: sony | …

The model is a `CrossEncoder` of sentence-transformers with one output. The loop is our own for the reasons that
product_matching.train gives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from contracts.errors import InputError
from product_matching.config import DecisionSettings
from product_matching.lora import add_lora, trainable
from training.best_weights import BestWeights
from training.device import (
    choose_device,
    choose_dtype,
    guard_torchvision,
    missing_model,
    prefer_cache_offline,
    require_model_source,
)
from training.run_folder import RunFolder, require_finite
from training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

INFERENCE_BATCH = 64
LOG_STEPS = 10


def load_cross_encoder(name: str, *, pair_tokens: int, device: str = "auto") -> CrossEncoder:
    """Load a cross-encoder, or an encoder with a new output layer, in float32.

    Raises InputError when the folder does not exist or holds no such model.
    """
    source = require_model_source(name)
    guard_torchvision()
    prefer_cache_offline(source)
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging

    if os.environ.get("TRANSFORMERS_VERBOSITY") is None:
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # that the output layer is new is what we asked for
    try:
        model = CrossEncoder(source, num_labels=1, device=str(choose_device(device)))
    except (OSError, ValueError, KeyError) as error:
        raise missing_model(name, error) from None
    model.max_seq_length = min(pair_tokens, model.max_seq_length or pair_tokens)
    return model.float()


def match_logits(
    model: CrossEncoder, left: Sequence[str], right: Sequence[str], *, progress: bool = False
) -> np.ndarray:
    """Logit of a match for n pairs of texts, (n,) float64: the mean over both orders of the two records.

    A transformer reads "a [SEP] b" and "b [SEP] a" differently; their mean does not depend on the order.

    Raises InputError when a logit is NaN or infinite: the weights are damaged.
    """
    if not left:
        return np.zeros(0)
    both_orders = [*zip(left, right, strict=True), *zip(right, left, strict=True)]
    logits = model.predict(
        both_orders,
        batch_size=INFERENCE_BATCH,
        activation_fn=torch.nn.Identity(),
        show_progress_bar=progress,
    )
    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise InputError(
            "the cross-encoder gives NaN or inf: its weights are damaged; train the decision again"
        )
    return logits.reshape(2, -1).mean(axis=0)


class PairTexts:
    """Labelled pairs of record texts."""

    def __init__(self, left: Sequence[str], right: Sequence[str], match: np.ndarray):
        self.left = left
        self.right = right
        self.match = match

    def __len__(self) -> int:
        return len(self.match)

    def batches(self, size: int, seed: int) -> list[list[tuple[str, str, float]]]:
        """All pairs in random order, half of them with their sides swapped."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self))
        swapped = rng.random(len(self)) < 0.5
        pairs = []
        for row in order.tolist():
            sides = (self.left[row], self.right[row])
            first, second = sides[::-1] if swapped[row] else sides
            pairs.append((first, second, float(self.match[row])))
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def fit(
    model: CrossEncoder, train: PairTexts, valid: PairTexts, settings: DecisionSettings, run: RunFolder
) -> BestWeights:
    """Train on labelled pairs with binary cross-entropy. On return the model has the weights of the best epoch.

    The best epoch has the highest average precision on the validation pairs, each read in one order to save time.
    """
    from sklearn.metrics import average_precision_score

    adapters = _add_adapters(model, settings)
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    use_bf16 = choose_dtype(settings.precision, model.device) == torch.bfloat16
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=use_bf16)
    best = BestWeights(weights, higher_is_better=True)
    # what is wrong with a match weighs as much as what is wrong with all of its non-matches
    non_matches_per_match = (len(train) - train.match.sum()) / max(1, train.match.sum())
    loss_function = torch.nn.BCEWithLogitsLoss(
        pos_weight=torch.tensor(non_matches_per_match, device=model.device)
    )

    steps_per_epoch = -(-len(train) // settings.batch_size)
    total_steps = settings.epochs * steps_per_epoch
    step = 0
    bar = tqdm(total=total_steps, desc=run.path.name, unit=" steps", mininterval=1)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for batch in train.batches(settings.batch_size, seed=1000 * settings.seed + epoch):
            lr = settings.lr * learning_rate_factor(step, total_steps, settings.warmup_ratio, decay="linear")
            for group in optimizer.param_groups:
                group["lr"] = lr
            inputs = model.preprocess([(first, second) for first, second, _ in batch])
            inputs = {
                key: value.to(model.device) if hasattr(value, "to") else value
                for key, value in inputs.items()
            }
            match = torch.tensor([label for _, _, label in batch], device=model.device)
            with autocast:
                loss = loss_function(model(inputs)["scores"].float().squeeze(-1), match)
            require_finite(loss.item(), run=run.path.name, step=step + 1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), settings.max_grad_norm)
            optimizer.step()
            step += 1
            if step == 1 or step % LOG_STEPS == 0:
                run.log(step, **{"train/loss": loss.item(), "lr": lr})
            bar.update()
        logits = model.predict(
            list(zip(valid.left, valid.right, strict=True)),
            batch_size=INFERENCE_BATCH,
            activation_fn=torch.nn.Identity(),
        )
        score = float(average_precision_score(valid.match, logits))
        run.log(step, epoch=epoch, **{"valid/average_precision": score})
        bar.set_postfix(average_precision=f"{score:.3f}")
        best.offer(score, epoch)
    bar.close()
    best.load()
    if adapters is not None:
        adapters.merge_and_unload()
    model.eval()
    return best


def _add_adapters(model: CrossEncoder, settings: DecisionSettings) -> torch.nn.Module | None:
    """LoRA adapters in the transformer, or none with --lora-rank 0. Pooler and output layer are trained in full."""
    if settings.lora_rank == 0:
        return None
    adapters = add_lora(
        model.model.base_model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
    )
    pooler = getattr(model.model.base_model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(True)  # a sentence encoder with mean pooling has never used it
    return adapters
