"""Tune a sentence encoder so that the same product in two catalogues gets the same embedding.

    python -m product_matching.train --pairs ../shared/data/matching/walmart_amazon
    python -m product_matching.train --pairs catalogues --model /models/all-mpnet-base-v2 --resume

The loss and the batch sampler are those of sentence-transformers; the loop is ours, so that a run folder is written
and resumed as in every other stage, and a loss that is NaN ends the run instead of being logged as 0.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from tqdm import tqdm

from contracts.errors import InputError, run_entry_point
from contracts.files import write_json
from contracts.workspace import Workspace
from product_matching.catalogue import product_text
from product_matching.config import TrainSettings
from product_matching.pairs import Pairs, pair_files, read_pairs
from product_matching.triplets import mine_triplets, training_pairs
from training.device import choose_dtype, seed_everything
from training.plots import plot_training_curves
from training.run_folder import RunFolder, random_state, restore_random_state
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

LOG_STEPS = 10


class Triplets:
    """The texts of mined triplets, in the form that the library's batch sampler reads."""

    column_names = ("anchor", "positive", "negative")

    def __init__(self, triplets: pd.DataFrame, pairs: Pairs):
        text_of = {
            side: dict(zip(table["id"], product_text(table), strict=True))
            for side, table in (("left", pairs.left), ("right", pairs.right))
        }
        sides = {"anchor": "left", "positive": "right", "negative": "right"}
        self.texts = {
            name: triplets[f"{name}_id"].map(text_of[side]).tolist() for name, side in sides.items()
        }

    def __len__(self) -> int:
        return len(self.texts["anchor"])

    def __getitem__(self, row: int) -> dict[str, str]:
        return {name: texts[row] for name, texts in self.texts.items()}

    def features(self, rows: list[int], encoder: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
        """Model inputs on the encoder's device, one dict for each of anchor, positive and negative."""
        columns = [encoder.preprocess([texts[row] for row in rows]) for texts in self.texts.values()]
        return [
            {
                key: value.to(encoder.device) if hasattr(value, "to") else value
                for key, value in column.items()
            }
            for column in columns
        ]


def build_data(encoder: SentenceTransformer, settings: TrainSettings) -> tuple[Pairs, Triplets]:
    from product_matching.encoder import encode

    pairs = read_pairs(settings.pairs)
    train = training_pairs(pairs, settings.held_out)
    triplets = mine_triplets(
        pairs, train, lambda texts: encode(encoder, texts, progress=True), negatives=settings.negatives
    )
    print(
        f"{len(pairs.matches('train'))} training matches, {train['match'].sum()} without held-out products → "
        f"{len(triplets)} triplets"
    )
    return pairs, Triplets(triplets, pairs)


def build_loss(encoder: SentenceTransformer, settings: TrainSettings) -> torch.nn.Module:
    """In-batch softmax over cosines, anchor to all positives and negatives (van den Oord et al. 2018)."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    if settings.cached_mini_batch:
        return CachedMultipleNegativesRankingLoss(
            encoder, scale=settings.scale, mini_batch_size=settings.cached_mini_batch
        )
    return MultipleNegativesRankingLoss(encoder, scale=settings.scale)


class State:
    """What changes while training: trained weights, the best of them, optimizer, schedule and counters."""

    def __init__(self, weights: dict[str, torch.nn.Parameter], steps: int, settings: TrainSettings):
        import torch

        self.weights = weights
        self.best = self._copy()
        self.progress = {"epoch": 0, "step": 0, "best_epoch": 0, "best_mrr": 0.0}
        self.optimizer = torch.optim.AdamW(weights.values(), settings.lr, weight_decay=settings.weight_decay)
        warmup = max(1, round(settings.warmup * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
        )

    def keep_if_best(self, mrr: float) -> None:
        if mrr > self.progress["best_mrr"]:
            self.progress.update(best_mrr=mrr, best_epoch=self.progress["epoch"])
            self.best = self._copy()

    def load_best(self) -> None:
        for name, weight in self.weights.items():
            weight.data.copy_(self.best[name])

    def save(self, run: RunFolder) -> None:
        tensors = {f"last.{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                 "random": random_state(), "progress": dict(self.progress)}  # fmt: skip
        run.save_checkpoint(self.progress["step"], tensors, state)

    def restore(self, run: RunFolder) -> bool:
        """Continue from the newest complete checkpoint; False if there is none."""
        if not (checkpoint := run.newest_checkpoint()):
            return False
        tensors, state = checkpoint
        for name, weight in self.weights.items():
            weight.data.copy_(tensors[f"last.{name}"])
            self.best[name].copy_(tensors[f"best.{name}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = state["progress"]
        restore_random_state(state["random"])
        return True

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}


def fit(
    encoder: SentenceTransformer, triplets: Triplets, pairs: Pairs, settings: TrainSettings, run: RunFolder
) -> dict:
    """Train what requires a gradient; on return the encoder holds the epoch with the best validation MRR."""
    import torch
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    from product_matching.lora import trainable

    # a record that is the negative of many anchors allows only one of them a batch: some batches are not full
    sampler = NoDuplicatesBatchSampler(
        triplets, settings.batch_size, drop_last=False, generator=torch.Generator(), seed=settings.seed
    )
    steps = settings.epochs * sum(1 for _ in sampler)  # epochs differ by a few batches
    state = State(trainable(encoder), steps, settings)
    loss_function = build_loss(encoder, settings)
    autocast = torch.autocast(
        encoder.device.type,
        torch.bfloat16,
        choose_dtype(settings.precision, encoder.device) == torch.bfloat16,
    )
    if not (settings.resume and state.restore(run)):
        run.path.joinpath("metrics.jsonl").unlink(
            missing_ok=True
        )  # of a run that ended before any checkpoint
        # epoch 0 is the base model: if training never beats it, it stays
        state.keep_if_best(validate(encoder, pairs, run, step=0)["mrr"])

    progress = state.progress
    bar = tqdm(total=steps, initial=progress["step"], desc=run.path.name, unit=" steps", mininterval=1)
    for epoch in range(progress["epoch"], settings.epochs):
        encoder.train()
        sampler.set_epoch(epoch)
        for rows in sampler:
            with autocast:
                loss = loss_function(triplets.features(rows, encoder), None)
            state.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(state.weights.values(), settings.clip_norm)
            if progress["step"] % LOG_STEPS == 0:
                run.log(
                    progress["step"], **{"train/loss": loss.item(), "lr": state.schedule.get_last_lr()[0]}
                )
            state.optimizer.step()
            state.schedule.step()
            progress["step"] += 1
            bar.update()
        scores = validate(encoder, pairs, run, step=progress["step"])
        bar.set_postfix(mrr=f"{scores['mrr']:.3f}", recall_at_1=f"{scores['recall_at_1']:.3f}")
        progress["epoch"] = epoch + 1
        state.keep_if_best(scores["mrr"])
        state.save(run)
    bar.close()
    state.load_best()
    return progress


def validate(encoder: SentenceTransformer, pairs: Pairs, run: RunFolder, step: int) -> dict[str, float]:
    """Retrieval scores of the validation matches in the whole right catalogue; a part of it is soon too easy."""
    from product_matching.evaluate import retrieval

    encoder.eval()
    scores = retrieval(encoder, pairs, "valid")
    run.log(
        step,
        **{f"valid/{name}": scores[name] for name in ("recall_at_1", "recall_at_10", "mrr", "ndcg_at_10")},
    )
    return scores


def train(settings: TrainSettings) -> Path:
    """Returns the folder of the tuned model, with the adapters merged in: it loads like any other model."""
    seed_everything(settings.seed)
    from product_matching.encoder import load_encoder
    from product_matching.evaluate import Calibration, EmbeddedPairs
    from product_matching.lora import add_lora, trainable

    folder = Workspace(settings.workspace).path("run", name=settings.run)
    if settings.resume and RunFolder(folder).complete:
        print(f"{folder} is complete; leave --resume out to train again")
        return folder / "model"
    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    pairs, triplets = build_data(encoder, settings)
    if pairs.matches("valid").empty:
        raise InputError(f"{settings.pairs}: no validation matches to choose an epoch by")
    adapters = None
    if settings.lora_rank:
        adapters = add_lora(
            encoder[0].auto_model, rank=settings.lora_rank, alpha=settings.lora_alpha,
            dropout=settings.lora_dropout, targets=settings.lora_targets,
        )  # fmt: skip
    counted = sum(weight.numel() for weight in trainable(encoder).values())
    total = sum(weight.numel() for weight in encoder.parameters())
    print(f"trainable parameters: {counted:,} of {total:,} ({100 * counted / total:.2f} %)")

    run = RunFolder.start(
        folder,
        settings,
        inputs=pair_files(settings.pairs),
        resume=settings.resume,
        report_to=settings.report_to,
    )
    progress = fit(encoder, triplets, pairs, settings, run)
    if adapters is not None:
        adapters.merge_and_unload()
    encoder.eval()
    model_folder = folder / "model"
    shutil.rmtree(model_folder, ignore_errors=True)
    encoder.save_pretrained(str(model_folder), create_model_card=False)
    calibration = Calibration.fit(*EmbeddedPairs.of(encoder, pairs.only("valid")).scores("valid"))
    write_json(model_folder / "calibration.json", asdict(calibration))
    plot_training_curves(folder / "training.png", run.metrics(), title=settings.run)
    run.finish(
        best_epoch=progress["best_epoch"], valid_mrr=progress["best_mrr"], trainable_parameters=counted
    )
    print(f"epoch {progress['best_epoch']} with validation MRR {progress['best_mrr']:.4f} → {model_folder}")
    return model_folder


def main(argv: Sequence[str] | None = None) -> Path:
    return train(
        parse_settings(TrainSettings, argv, description="Tune a sentence encoder on matched products.")
    )


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
