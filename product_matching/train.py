"""Tune a sentence encoder so that the same product in two catalogues gets the same embedding.

    python -m product_matching.train --pairs ../shared/data/matching/walmart_amazon
    python -m product_matching.train --pairs catalogues --model /models/all-mpnet-base-v2 --resume

The loss and the batch sampler come from sentence-transformers. The loop (`product_matching.loop`) is our own, so that
a run folder looks and resumes as in every other stage, and a loss that is NaN ends the run. The library's trainer
would log it as 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from contracts.errors import InputError, run_entry_point
from contracts.files import write_json
from contracts.workspace import Workspace
from product_matching.calibration import Calibration
from product_matching.config import TrainSettings
from product_matching.encoder import encode, load_encoder
from product_matching.evaluate import EmbeddedPairs
from product_matching.pairs import Pairs, pair_files, read_pairs
from product_matching.triplets import TripletTexts, mine_triplets, training_pairs
from training.device import seed_everything
from training.plots import plot_training_curves
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from peft import LoraModel
    from sentence_transformers import SentenceTransformer


def build_data(encoder: SentenceTransformer, settings: TrainSettings) -> tuple[Pairs, TripletTexts]:
    """All labelled pairs, and the training triplets that the untuned encoder mines from them."""
    pairs = read_pairs(settings.pairs)
    if pairs.matches("valid").empty:
        raise InputError(f"{settings.pairs}: there are no validation matches to choose the best epoch by")
    train = training_pairs(pairs, settings.held_out)
    triplets = mine_triplets(
        pairs, train, lambda texts: encode(encoder, texts, progress=True), negatives=settings.negatives
    )
    print(
        f"{len(pairs.matches('train'))} training matches, {train['match'].sum()} of them without a held-out product "
        f"→ {len(triplets)} triplets"
    )
    return pairs, TripletTexts(triplets, pairs)


def add_adapters(encoder: SentenceTransformer, settings: TrainSettings) -> LoraModel | None:
    """Put LoRA adapters into the encoder. With --lora-rank 0 there are none, and all weights are trained."""
    from product_matching.lora import add_lora

    if settings.lora_rank == 0:
        return None
    return add_lora(
        encoder[0].auto_model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
    )


def save_model(encoder: SentenceTransformer, pairs: Pairs, folder: Path) -> None:
    """Write the encoder as a sentence-transformers model, with the calibration of its cosines beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder.save_pretrained(str(folder), create_model_card=False)
    cosine, match = EmbeddedPairs.of(encoder, pairs.only("valid")).scores("valid")
    write_json(folder / "calibration.json", asdict(Calibration.fit(cosine, match)))


def train(settings: TrainSettings) -> Path:
    """Train, and return the folder of the tuned model. Its adapters are merged: it loads like any other model."""
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    model_folder = folder / "model"
    if RunFolder(folder).already_complete(settings.resume, settings, pair_files(settings.pairs)):
        return model_folder
    seed_everything(settings.seed)
    from product_matching.loop import fit
    from product_matching.lora import trainable

    encoder = load_encoder(settings.model, max_length=settings.max_length, device=settings.device)
    pairs, triplets = build_data(encoder, settings)
    adapters = add_adapters(encoder, settings)  # after mining, which needs the untuned encoder
    trained = sum(weight.numel() for weight in trainable(encoder).values())
    total = sum(weight.numel() for weight in encoder.parameters())
    print(f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %)")

    run = RunFolder.start(
        folder,
        settings,
        inputs=pair_files(settings.pairs),
        resume=settings.resume,
        report_to=settings.report_to,
    )
    best = fit(encoder, triplets, pairs, settings, run)
    if adapters is not None:
        adapters.merge_and_unload()
    encoder.eval()
    save_model(encoder, pairs, model_folder)
    plot_training_curves(folder / "training.png", run.metrics(), title=settings.run)
    run.finish(best_epoch=best.epoch, valid_mrr=best.score, trainable_parameters=trained)
    print(f"epoch {best.epoch} has the best validation MRR, {best.score:.4f} → {model_folder}")
    return model_folder


def main(argv: Sequence[str] | None = None) -> Path:
    return train(
        parse_settings(TrainSettings, argv, description="Tune a sentence encoder on matched products.")
    )


if __name__ == "__main__":
    run_entry_point(main)
