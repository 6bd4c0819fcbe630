"""Prepared table to token batches.

A text too long for the encoder is cut in the middle: its first tokens (title, first bullets) and its `Value:` and
`Unit:` lines stay. Those lines come last in a catalogue text and hold the strongest facts about the price, and
plain truncation would drop them from just the texts that say most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from contracts.errors import InputError
from contracts.workspace import STRUCTURAL_FEATURES, Workspace
from qwen3_finetune.config import QwenSettings

if TYPE_CHECKING:
    import torch

_QUANTITY_LINES = re.compile(r"\n(?:Value|Unit):[^\n]{0,64}(?=\n|$)")


@dataclass
class TextRows:
    """What this stage reads of a prepared table."""

    sample_ids: np.ndarray
    """(N,) str"""
    texts: list[str]
    structural: np.ndarray
    """(N, 3) float32: quantity_value, unit_volume, unit_weight, as prepared"""
    valid: np.ndarray
    """(N,) bool: the row has any text"""
    unit_kind: np.ndarray
    """(N,) str"""
    log_price: np.ndarray | None
    """(N,) float32 log1p of dollars, None in test"""
    fold: np.ndarray | None
    """(N,) int, None in test"""

    def __len__(self) -> int:
        return len(self.texts)

    def of_folds(self, folds: Sequence[int]) -> np.ndarray:
        """Row numbers of these folds."""
        return np.flatnonzero(np.isin(self.fold, folds))


def read_rows(workspace: Workspace, split: str) -> TextRows:
    """Raises InputError when a structural feature is not a number or a training row has no fold."""
    table, path = workspace.prepared(split), workspace.path("prepared", split=split)
    structural = table[list(STRUCTURAL_FEATURES)].to_numpy(np.float32)
    if (broken := ~np.isfinite(structural).all(axis=1)).any():
        raise InputError(
            f"{path}: sample_id {table['sample_id'][broken].iloc[0]} lacks {STRUCTURAL_FEATURES}"
        )
    log_price = fold = None
    if split == "train":
        log_price = np.log1p(table["price"].to_numpy()).astype(np.float32)
        fold = workspace.folds().reindex(table["sample_id"])
        if fold.isna().any():
            raise InputError(f"{workspace.path('folds')}: no fold for sample_id {fold.index[fold.isna()][0]}")
        fold = fold.to_numpy(int)
    return TextRows(
        sample_ids=table["sample_id"].to_numpy(np.str_),
        texts=table["text"].tolist(),
        structural=structural,
        valid=(table["entity_name"] + table["catalog_content"]).str.strip().ne("").to_numpy(bool),
        unit_kind=table["unit_kind"].to_numpy(np.str_),
        log_price=log_price,
        fold=fold,
    )


class Tokenize:
    """Texts to token ids of at most `max_length`, with the tokenizer's own special tokens around them.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens, special ones included.
        instruction: written before each text as "Instruct: …\\nQuery:".
        end_token: append the end-of-sequence token where the tokenizer adds nothing: a last-token embedding is the
            hidden state of that token.
    """

    def __init__(self, tokenizer, *, max_length: int, instruction: str = "", end_token: bool = False):
        self.tokenizer, self.max_length = tokenizer, max_length
        # any token does for padding, the mask hides it
        self.pad_token = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self.prefix_text = f"Instruct: {instruction}\nQuery:" if instruction else ""
        # The frame of special tokens is read off one encoded word: post-processors do not expose it otherwise
        bare = tokenizer("price", add_special_tokens=False)["input_ids"]
        framed = tokenizer("price")["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        self.before, self.after = framed[:start], framed[start + len(bare) :]
        if end_token and not self.after:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    "--pooling last: the tokenizer has no end-of-sequence token; use --pooling mean"
                )
            self.after = [tokenizer.eos_token_id]

    @classmethod
    def of(cls, tokenizer, settings: QwenSettings) -> Tokenize:
        return cls(
            tokenizer, max_length=settings.max_length, instruction=settings.instruction,
            end_token=settings.pooling == "last",
        )  # fmt: skip

    def __call__(self, texts: Sequence[str], chunk: int = 2000) -> list[np.ndarray]:
        """One (T,) int64 array a text, T at most max_length."""
        tokens = []
        progress = tqdm(total=len(texts), desc="tokens", unit="text", delay=2, leave=False)
        for start in range(0, len(texts), chunk):
            part = texts[start : start + chunk]
            whole = self._encode([self.prefix_text + text for text in part])
            ends = self._encode(["".join(_QUANTITY_LINES.findall(text)[-2:]) for text in part])
            tokens += [self._fit(ids, end) for ids, end in zip(whole, ends, strict=True)]
            progress.update(len(part))
        progress.close()
        return tokens

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _fit(self, ids: list[int], end: list[int]) -> np.ndarray:
        room = self.max_length - len(self.before) - len(self.after)
        if len(ids) > room:
            end = end[: room // 2]
            ids = ids[: room - len(end)] + end
        return np.array(self.before + ids + self.after, np.int64)


def train_tokenizer(texts: list[str], vocabulary: int):
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, learnt from `texts`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()  # a few thousand texts are too few to learn each word twice
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        # digits one by one, as Qwen does: 72.0 and 7.2 then share their pieces
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)


class TextInputs:
    """Tokens and structural features of N rows, and the tensors that a model reads of some of them.

    Args:
        padding_side: left for a decoder, right otherwise.
    """

    def __init__(
        self, tokenize: Tokenize, texts: Sequence[str], structural: np.ndarray, *, padding_side: str
    ):
        self.tokens, self.structural = tokenize(texts), structural
        self.lengths = np.array([len(ids) for ids in self.tokens])
        self.pad_token, self.padding_side = tokenize.pad_token, padding_side
        self.features: np.ndarray | None = None
        """(N, D_in + 3) when a frozen encoder has read the texts once: it then stands in for them"""

    def __call__(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """input_ids (B, T), attention_mask (B, T), structural (B, 3); or only features (B, D_in + 3)."""
        import torch

        if self.features is not None:
            return (torch.from_numpy(self.features[rows]),)
        text = pad([self.tokens[row] for row in rows], pad_token=self.pad_token, side=self.padding_side)
        return *text, torch.from_numpy(self.structural[rows])

    def batches(self, rows: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
        """`rows`, longest texts first, as many a batch as fit into `tokens_per_batch` padded tokens."""
        rows, batches = rows[np.argsort(-self.lengths[rows], kind="stable")], []
        while len(rows):
            size = max(1, tokens_per_batch // int(self.lengths[rows[0]]))
            batches.append(rows[:size])
            rows = rows[size:]
        return batches


def pad(tokens: Sequence[np.ndarray], *, pad_token: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (B, T) int64 and attention_mask (B, T) int64, T the longest of these texts."""
    import torch

    longest = max(map(len, tokens))
    input_ids = np.full((len(tokens), longest), pad_token, np.int64)
    attention_mask = np.zeros((len(tokens), longest), np.int64)
    for row, ids in enumerate(tokens):
        at = slice(longest - len(ids), None) if side == "left" else slice(len(ids))
        input_ids[row, at], attention_mask[row, at] = ids, 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)


def training_batches(
    lengths: np.ndarray, rows: np.ndarray, *, batch_size: int, per_update: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of row numbers in random order, each of texts of similar length; the same for the same seed and epoch.

    Rows are shuffled, sorted by length within pools of about 50 batches, cut, and shuffled again: all `per_update`
    batches of an update together, so that devices that share an update have equally much to do.
    """
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(rows)
    pool_size = batch_size * per_update * math.ceil(50 / per_update)
    batches = []
    for pool in np.split(rows, range(pool_size, len(rows), pool_size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(batch_size, len(pool), batch_size))
    updates = [batches[start : start + per_update] for start in range(0, len(batches), per_update)]
    order = rng.permutation(len(updates))
    # an incomplete update goes last: the others are cut from the list by counting
    order = sorted(order, key=lambda update: len(updates[update]) < per_update)
    return [batch for update in order for batch in updates[update]]


def predictions_table(rows: TextRows, log_price: np.ndarray) -> pd.DataFrame:
    """sample_id, log_price and, in train, fold."""
    table = pd.DataFrame({"sample_id": rows.sample_ids, "log_price": log_price.astype(np.float64)})
    return table if rows.fold is None else table.assign(fold=rows.fold)
