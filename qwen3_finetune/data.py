"""From the prepared table to batches of tokens.

A text that is too long for the encoder loses tokens from its middle, and its start (title, first bullet points) and its
`Value:` and `Unit:` lines stay. Those lines stand at the end of a catalogue text and say most about the price; plain
truncation would cut them off from exactly the longest texts.

Legend: N rows of the table, B batch, T tokens, D_in width of the encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from contracts.errors import InputError
from contracts.workspace import STRUCTURAL_FEATURES, Workspace

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import PreTrainedTokenizerBase

    from qwen3_finetune.spec import EncoderSpec

N_STRUCTURAL = len(STRUCTURAL_FEATURES)
"""The width of the structural features."""

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
    """(N,) bool: the row has a text"""
    unit_kind: np.ndarray
    """(N,) str"""
    log_price: np.ndarray | None
    """(N,) float32 log1p of dollars; None outside the training table"""
    fold: np.ndarray | None
    """(N,) int; None outside the training table"""

    def __len__(self) -> int:
        return len(self.texts)

    def of_folds(self, folds: Sequence[int]) -> np.ndarray:
        """The numbers of the training rows in these folds."""
        assert self.fold is not None
        return np.flatnonzero(np.isin(self.fold, folds))

    @classmethod
    def of(cls, table: pd.DataFrame, source: object = "table") -> TextRows:
        """The rows of a prepared table; with a column `fold` it is the training table.

        Args:
            source: what an error calls the table.

        Raises:
            InputError: a structural feature is not a number.
        """
        structural = table[list(STRUCTURAL_FEATURES)].to_numpy(np.float32)
        broken = ~np.isfinite(structural).all(axis=1)
        if broken.any():
            raise InputError(
                f"{source}: sample_id {table['sample_id'][broken].iloc[0]} lacks {STRUCTURAL_FEATURES}"
            )
        log_price = None
        fold = None
        if "fold" in table:
            log_price = np.log1p(table["price"].to_numpy()).astype(np.float32)
            fold = table["fold"].to_numpy()
        return cls(
            sample_ids=table["sample_id"].to_numpy(np.str_),
            texts=table["text"].tolist(),
            structural=structural,
            valid=(table["entity_name"] + table["catalog_content"]).str.strip().ne("").to_numpy(bool),
            unit_kind=table["unit_kind"].to_numpy(np.str_),
            log_price=log_price,
            fold=fold,
        )


def read_rows(workspace: Workspace, split: str) -> TextRows:
    """Raises InputError when a structural feature is not a number or a training row has no fold."""
    table = workspace.training_table() if split == "train" else workspace.prepared(split)
    return TextRows.of(table, source=workspace.path("prepared", split=split))


LONGEST_WORD = ".{1,100}"
"""What a tokenizer that is learnt here takes for one word at most; a longer one is read in pieces."""


class Tokenize:
    """Turns texts into at most `max_length` token ids each, with the tokenizer's own special tokens around them.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens per text, special ones included.
        instruction: written before each text as "Instruct: …\\nQuery:".
        end_token: append the end-of-sequence token if the tokenizer appends nothing itself. Last-token pooling takes
            the hidden state of that token.

    Raises:
        InputError: an end token is needed and the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        instruction: str = "",
        end_token: bool = False,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        # any token will do for padding, since the mask hides it
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token = next(token for token in candidates if token is not None)
        self.prefix_text = f"Instruct: {instruction}\nQuery:" if instruction else ""

        # post-processors do not tell which special tokens they add, so these are read off one encoded word
        bare = tokenizer("price", add_special_tokens=False)["input_ids"]
        framed = tokenizer("price")["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        self.before = framed[:start]
        self.after = framed[start + len(bare) :]
        if end_token and not self.after:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    "--pooling last: the tokenizer has no end-of-sequence token; use --pooling mean"
                )
            self.after = [tokenizer.eos_token_id]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec) -> Tokenize:
        return cls(
            tokenizer,
            max_length=spec.max_length,
            instruction=spec.instruction,
            end_token=spec.pooling == "last",
        )

    def __call__(self, texts: Sequence[str], chunk: int = 2000) -> list[np.ndarray]:
        """One (T,) int64 array per text, T at most max_length."""
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
        """`ids` in the special tokens; where it is too long, its start and then `end`, the quantity lines."""
        room = self.max_length - len(self.before) - len(self.after)
        if len(ids) > room:
            end = end[: room // 2]
            ids = ids[: room - len(end)] + end
        return np.array(self.before + ids + self.after, np.int64)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, learnt from `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()  # a few thousand texts are too few to learn each word twice
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        # digits are separate tokens, as in Qwen's tokenizer: 72.0 and 7.2 then share their pieces
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            # the time for a word grows with the square of its length: one of 300 kB would take minutes
            pre_tokenizers.Split(Regex(LONGEST_WORD), behavior="isolated"),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)


class TextInputs:
    """Tokens and structural features of N rows, and the tensors that the model reads of any of them."""

    def __init__(
        self, tokenize: Tokenize, texts: Sequence[str], structural: np.ndarray, *, padding_side: str
    ):
        self.tokens = tokenize(texts)
        self.structural = structural
        self.lengths = np.array([len(ids) for ids in self.tokens], np.int64)
        self.pad_token = tokenize.pad_token
        self.padding_side = padding_side
        self.features: np.ndarray | None = None
        """(N, D_in + 3), which replaces the tokens once a frozen encoder has read them"""

    def __call__(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """input_ids (B, T), attention_mask (B, T), structural (B, 3); or features (B, D_in + 3) where there are any."""
        import torch

        if self.features is not None:
            return (torch.from_numpy(self.features[rows]),)
        tokens = [self.tokens[row] for row in rows]
        input_ids, attention_mask = pad(tokens, pad_token=self.pad_token, side=self.padding_side)
        return input_ids, attention_mask, torch.from_numpy(self.structural[rows])

    def batches(self, rows: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
        """`rows` with the longest texts first, in batches of at most `tokens_per_batch` padded tokens.

        A text that is longer than this is a batch of its own.
        """
        longest_first = np.argsort(-self.lengths[rows], kind="stable")
        rows = rows[longest_first]
        batches = []
        while len(rows):
            size = max(1, tokens_per_batch // int(self.lengths[rows[0]]))
            batches.append(rows[:size])
            rows = rows[size:]
        return batches


def pad(tokens: Sequence[np.ndarray], *, pad_token: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (B, T) int64 and attention_mask (B, T) int64; T is the length of the longest text."""
    import torch

    longest = max(map(len, tokens))
    input_ids = np.full((len(tokens), longest), pad_token, np.int64)
    attention_mask = np.zeros((len(tokens), longest), np.int64)
    for row, ids in enumerate(tokens):
        columns = slice(longest - len(ids), None) if side == "left" else slice(len(ids))
        input_ids[row, columns] = ids
        attention_mask[row, columns] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)


def training_batches(
    lengths: np.ndarray, rows: np.ndarray, *, batch_size: int, per_update: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Micro-batches of row numbers in random order, each of texts of similar length.

    Rows are shuffled, sorted by length within pools of about 50 micro-batches and cut. Then the updates are shuffled.
    The micro-batches of one update come from one pool, so processes that share an update have equally much to do.

    Args:
        lengths: (N,) tokens of all rows.
        rows: row numbers to deal.
        per_update: micro-batches per update, over all processes.
        seed, epoch: the same two give the same batches.
    """
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(rows)
    pool_size = batch_size * per_update * math.ceil(50 / per_update)
    batches = []
    for pool in np.split(rows, range(pool_size, len(rows), pool_size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, range(batch_size, len(pool), batch_size))

    updates = [batches[start : start + per_update] for start in range(0, len(batches), per_update)]
    shuffled = rng.permutation(len(updates))
    # an incomplete update goes last, because the training loop counts off `per_update` batches per update
    order = sorted(shuffled, key=lambda number: len(updates[number]) < per_update)
    return [batch for number in order for batch in updates[number]]
