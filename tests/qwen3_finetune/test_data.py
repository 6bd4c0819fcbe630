import functools
import shutil
import time

import numpy as np
import pytest

from contracts.errors import InputError
from contracts.workspace import Workspace
from qwen3_finetune.data import TextInputs, Tokenize, pad, read_rows, train_tokenizer, training_batches
from training.device import guard_torchvision

TEXT = "Honey [SEP] Item Name: Honey\nBullet Point 1: {}\nValue: 24.0\nUnit: Ounce\n"


@pytest.fixture(scope="module")
def tokenizer():
    texts = [TEXT.format(words) for words in ("sweet and golden", "from a meadow", "Value: for money")]
    return train_tokenizer(texts * 5, 400)


def test_trained_tokenizer_reads_back_any_text(tokenizer):
    text = "Café Ünsal 72.5 Fl Oz\n中文"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.lower()
    assert len(tokenizer) <= 400


def test_end_token_is_appended_once(tokenizer):
    ids = Tokenize(tokenizer, max_length=64, end_token=True)(["Honey"])[0]
    assert ids[-1] == tokenizer.eos_token_id and (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.eos_token_id not in Tokenize(tokenizer, max_length=64)(["Honey"])[0]


def test_end_token_of_the_qwen_tokenizer(challenge):
    from qwen3_finetune.backbone import load_tokenizer

    folder = challenge.parent / "tokenizers" / "qwen2"
    tokenizer = load_tokenizer(str(folder))
    ids = Tokenize(tokenizer, max_length=32, end_token=True)([TEXT.format("sweet " * 100), ""])
    assert [len(x) for x in ids] == [32, 1] and ids[0][-1] == ids[1][0] == 151643
    assert tokenizer.decode(ids[0][:-1]).endswith("\nValue: 24.0\nUnit: Ounce")


def test_long_text_keeps_its_title_and_its_quantity(tokenizer):
    tokenize = Tokenize(tokenizer, max_length=48, end_token=True)
    ids = tokenize([TEXT.format("Value: for money " * 200)])[0]
    text = tokenizer.decode(ids[:-1])
    assert len(ids) == 48 and text.startswith("honey [sep]") and text.endswith("\nvalue: 24.0\nunit: ounce")


def test_short_text_is_left_alone(tokenizer):
    text = TEXT.format("sweet")
    assert tokenizer.decode(Tokenize(tokenizer, max_length=200)([text])[0]) == text.lower()


def test_instruction_stands_before_the_text(tokenizer):
    ids = Tokenize(tokenizer, max_length=200, instruction="Judge the price")(["Honey"])[0]
    assert tokenizer.decode(ids) == "instruct: judge the price\nquery:honey"


def test_pad_sides():
    tokens = [np.array([5, 6, 7]), np.array([8])]
    for side, expected in (("left", [0, 0, 8]), ("right", [8, 0, 0])):
        input_ids, mask = pad(tokens, pad_token=0, side=side)
        assert input_ids.tolist() == [[5, 6, 7], expected]
        assert mask.tolist() == [[1, 1, 1], [int(token > 0) for token in expected]]


def test_training_batches_cover_each_row_once_and_follow_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 300, 1000)
    rows = np.arange(1000)[::2]
    deal = functools.partial(training_batches, lengths, rows, batch_size=8, seed=3)
    batches = deal(per_update=1, epoch=1)
    assert sorted(np.concatenate(batches)) == rows.tolist()
    assert max(map(len, batches)) == 8
    again = deal(per_update=1, epoch=1)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert (np.concatenate(deal(per_update=1, epoch=2)) != np.concatenate(again)).any()
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths[rows].sum()  # random batches of 8 would pad by about 1.7


def test_batches_of_one_update_are_equally_long():
    lengths = np.random.default_rng(0).integers(5, 300, 1000)
    batches = training_batches(lengths, np.arange(995), batch_size=8, per_update=4, seed=3, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(995))
    assert len(batches) == 125
    tokens = np.array([lengths[batch].max() for batch in batches[:124]]).reshape(31, 4)
    waiting = tokens.max(axis=1) / tokens.mean(axis=1)
    assert waiting.mean() < 1.25  # 1.6 if four batches are drawn at random
    # the updates come in no order of length
    correlation = np.corrcoef(np.arange(31), tokens.mean(axis=1))[0, 1]
    assert abs(correlation) < 0.5


def test_inference_batches_respect_the_token_budget(tokenizer):
    texts = [TEXT.format("sweet " * n) for n in (1, 50, 3, 120, 0, 7)]
    inputs = TextInputs(
        Tokenize(tokenizer, max_length=100), texts, np.zeros((6, 3), np.float32), padding_side="right"
    )
    batches = inputs.batches(np.array([0, 1, 2, 3, 5]), tokens_per_batch=150)
    assert sorted(np.concatenate(batches)) == [0, 1, 2, 3, 5] and batches[0].tolist() == [3]
    assert all(len(batch) * inputs.lengths[batch].max() <= 150 for batch in batches)
    assert len(inputs.batches(np.array([3]), tokens_per_batch=1)) == 1  # one text is always taken


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_token_budget_changes_no_embedding(tokenizer, padding_side):
    """Batches by token budget against every text padded to the maximum, for a decoder and for an encoder."""
    import torch

    guard_torchvision()
    from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

    from qwen3_finetune.config import ARCHITECTURES
    from qwen3_finetune.model import PriceHead, PriceModel, encode

    torch.manual_seed(0)
    if padding_side == "left":
        changed = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
        encoder = Qwen3Model(Qwen3Config(**{**ARCHITECTURES["tiny"], **changed}))
        pooling = "last"
    else:
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        encoder = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False)
        pooling = "mean"
    head = PriceHead(64, hidden=8, dropout=0)
    model = PriceModel(encoder, head, pooling=pooling, padding_side=padding_side).eval()
    texts = [TEXT.format("sweet " * n) for n in (1, 50, 3, 120, 0, 7, 60, 61)]
    structural = np.zeros((len(texts), 3), np.float32)
    tokenize = Tokenize(tokenizer, max_length=100, end_token=True)
    inputs = TextInputs(tokenize, texts, structural, padding_side=padding_side)

    ids, mask = pad([*inputs.tokens, np.zeros(100, int)], pad_token=tokenize.pad_token, side=padding_side)
    with torch.no_grad():
        padded = model.features(ids[:-1], mask[:-1], torch.from_numpy(structural)).numpy()
    for budget in (1, 150, 10_000):
        batches = inputs.batches(np.arange(len(texts)), budget)
        for rows, features, _ in encode(model, inputs, batches, torch.float32):
            np.testing.assert_allclose(features, padded[rows], atol=2e-5)
    assert np.abs(padded[0] - padded[1]).max() > 0.01  # not all the same


def test_rows_of_the_sample(sample_workspace):
    workspace = Workspace(sample_workspace)
    rows, test = read_rows(workspace, "train"), read_rows(workspace, "test")
    table = workspace.prepared("train")
    assert rows.structural.shape == (400, 3) and rows.valid.all() and test.log_price is None
    np.testing.assert_allclose(np.expm1(rows.log_price), table["price"], rtol=1e-5)
    folds = workspace.folds()
    assert (folds[rows.sample_ids[rows.of_folds((2, 5))]].isin([2, 5])).all()
    assert len(rows.of_folds((2, 5))) == folds.isin([2, 5]).sum()


def test_row_without_fold_is_named(sample_workspace, tmp_path):
    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    folds = (tmp_path / "data" / "folds.csv").read_text().splitlines()
    (tmp_path / "data" / "folds.csv").write_text("\n".join(folds[:-1]) + "\n")
    with pytest.raises(InputError, match=f"no fold for sample_id {folds[-1].split(',')[0]}"):
        read_rows(Workspace(tmp_path), "train")


def test_a_word_of_300_kilobytes_takes_no_time():
    """Such words are real: a picture that stands in the text as base64."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 300_000)
    texts = ["green tea"] * 50 + ["".join(letters)]
    started = time.monotonic()
    tokenizer = train_tokenizer(texts, 2000)
    tokens = tokenizer(texts)["input_ids"]
    assert time.monotonic() - started < 20
    assert tokenizer.decode(tokens[0]) == "green tea"
    assert tokenizer.decode(tokens[-1]) == texts[-1]
