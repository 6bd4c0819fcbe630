"""The training loop: batches of triplets, the in-batch loss, validation after each epoch, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from product_matching.config import TrainSettings
from product_matching.evaluate import retrieval
from product_matching.lora import trainable
from product_matching.pairs import Pairs
from product_matching.triplets import TripletTexts
from training.best_weights import BestWeights
from training.device import choose_dtype
from training.run_folder import RunFolder, random_state, require_finite, restore_random_state
from training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

LOG_STEPS = 10
"""Steps between two log lines; the default epoch on the public benchmarks has 32 to 39 steps."""
VALIDATION_SCORES = ("recall_at_1", "recall_at_10", "mrr", "ndcg_at_10")


def build_sampler(triplets: TripletTexts, settings: TrainSettings) -> NoDuplicatesBatchSampler:
    """Batches of triplets in which no text occurs twice: the second one would be a negative of its own product.

    A record that is the negative of many anchors allows only one of them per batch, so some batches are not full.
    """
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    return NoDuplicatesBatchSampler(
        triplets,
        settings.batch_size,
        drop_last=False,
        generator=torch.Generator(),
        seed=settings.seed,
    )


def build_loss(encoder: SentenceTransformer, settings: TrainSettings) -> torch.nn.Module:
    """In-batch softmax over the cosines of an anchor to all positives and negatives of the batch.

    Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, with one anchor per positive.
    """
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    if settings.cached_mini_batch:
        return CachedMultipleNegativesRankingLoss(
            encoder, scale=settings.scale, mini_batch_size=settings.cached_mini_batch
        )
    return MultipleNegativesRankingLoss(encoder, scale=settings.scale)


class TrainState:
    """What changes during training: the trained weights, the best of them, the optimizer and the counters."""

    def __init__(self, weights: dict[str, torch.Tensor], settings: TrainSettings):
        self.weights = weights
        self.best = BestWeights(weights, higher_is_better=True)
        self.optimizer = torch.optim.AdamW(
            weights.values(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.max_grad_norm = settings.max_grad_norm
        self.epoch = 0  # epochs finished
        self.step = 0  # optimizer steps taken

    def update(self, loss: torch.Tensor, lr: float) -> None:
        """Take one optimizer step on `loss` at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.max_grad_norm)
        self.optimizer.step()
        self.step += 1

    def save(self, run: RunFolder) -> None:
        progress = {
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best.epoch,
            "best_mrr": self.best.score,
        }
        state = {
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),  # of dropout
            "progress": progress,
        }
        run.save_checkpoint(self.step, self.best.tensors(), state)

    def restore(self, run: RunFolder) -> bool:
        """Continue from the newest complete checkpoint. Returns False if there is none."""
        checkpoint = run.newest_checkpoint()
        if checkpoint is None:
            return False
        tensors, state = checkpoint
        progress = state["progress"]
        self.best.restore(tensors, {"score": progress["best_mrr"], "epoch": progress["best_epoch"]})
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"])
        self.epoch = progress["epoch"]
        self.step = progress["step"]
        return True


def fit(
    encoder: SentenceTransformer,
    triplets: TripletTexts,
    pairs: Pairs,
    settings: TrainSettings,
    run: RunFolder,
) -> BestWeights:
    """Train the weights that require a gradient. On return the encoder has those of the best validation MRR."""
    sampler = build_sampler(triplets, settings)
    batches_per_epoch = sum(1 for _ in sampler)  # of the first epoch; the others differ by a few
    total_steps = settings.epochs * batches_per_epoch
    loss_function = build_loss(encoder, settings)
    # the weights stay float32; autocast computes matrix products in bfloat16
    use_bf16 = choose_dtype(settings.precision, encoder.device) == torch.bfloat16
    autocast = torch.autocast(encoder.device.type, torch.bfloat16, enabled=use_bf16)

    state = TrainState(trainable(encoder), settings)
    restored = settings.resume and state.restore(run)
    if not restored:
        # an earlier start that ended before its first checkpoint may have logged something
        (run.path / "metrics.jsonl").unlink(missing_ok=True)
        # epoch 0 is the untuned encoder: if training never beats it, it is kept
        scores = validate(encoder, pairs, run, step=0)
        state.best.offer(scores["mrr"], epoch=0)

    bar = tqdm(total=total_steps, initial=state.step, desc=run.path.name, unit=" steps", mininterval=1)
    for epoch in range(state.epoch, settings.epochs):
        encoder.train()  # validation switched dropout off
        # the order depends on seed and epoch alone, so a resumed run sees the same batches
        sampler.set_epoch(epoch)
        for rows in sampler:
            features = triplets.features(rows, encoder)
            with autocast:
                # no labels: the positive of each anchor is known by its place
                loss = loss_function(features, None)
            require_finite(loss.item(), run=run.path.name, step=state.step + 1)
            factor = learning_rate_factor(state.step, total_steps, settings.warmup_ratio, decay="linear")
            lr = settings.lr * factor
            state.update(loss, lr)
            if state.step == 1 or state.step % LOG_STEPS == 0:
                run.log(state.step, **{"train/loss": loss.item(), "lr": lr})
            bar.update()
        state.epoch = epoch + 1
        scores = validate(encoder, pairs, run, step=state.step)
        bar.set_postfix(mrr=f"{scores['mrr']:.3f}", recall_at_1=f"{scores['recall_at_1']:.3f}")
        state.best.offer(scores["mrr"], epoch=state.epoch)
        state.save(run)
    bar.close()
    state.best.load()
    return state.best


def validate(encoder: SentenceTransformer, pairs: Pairs, run: RunFolder, step: int) -> dict[str, float]:
    """Retrieval scores of the validation matches, logged at `step`.

    The corpus is the whole right catalogue. In a part of it nearly every match is soon found, and epochs look alike.
    """
    encoder.eval()
    scores = retrieval(encoder, pairs, "valid")
    run.log(step, **{f"valid/{name}": scores[name] for name in VALIDATION_SCORES})
    return scores
