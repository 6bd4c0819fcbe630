"""The model: what a missing side may not do, and that padding and chunks average as they should."""

from dataclasses import replace

import pytest
import torch

from contracts.errors import InputError
from text_tabular.config import TextTabularSettings
from text_tabular.encoder import choose_trained, layers_of, load_encoder, pool
from text_tabular.explain import text_share
from text_tabular.model import Batch, TextTabular

DESIGNS = ("concat", "gate", "moe", "cross_attention")
SETTINGS = TextTabularSettings(preset="tiny", model="", random_weights=True, hidden=16, fused=12, dropout=0.0)


def build(design="gate", outputs=3, **changed):
    torch.manual_seed(0)
    settings = replace(SETTINGS, design=design, **changed)
    encoder = choose_trained(load_encoder(settings, words=50), settings)
    return TextTabular(settings, encoder, d_tab=4, outputs=outputs).eval()


def batch(chunks=(2, 1, 0), tokens=6, fields_valid=(True, False, True), pad=0):
    """Rows with 2, 1 and 0 chunks; the second one has no fields."""
    generator = torch.Generator().manual_seed(1)
    chunk_valid = torch.zeros(len(chunks), max(chunks), dtype=torch.bool)
    for row, count in enumerate(chunks):
        chunk_valid[row, :count] = True
    ids = torch.randint(1, 50, (sum(chunks), tokens), generator=generator)
    token_valid = torch.ones(sum(chunks), tokens, dtype=torch.bool)
    token_valid[0, 4:] = False
    ids[0, 4:] = pad
    fields = torch.randn(len(chunks), 4, generator=generator)
    return Batch(ids, token_valid, chunk_valid, fields, torch.tensor(fields_valid))


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_missing_has_no_say(design):
    """Neither the fields of a row without fields nor what fills a chunk up may change any output."""
    model = build(design)
    output = model(batch())
    other = batch(pad=7)
    other.fields[1] = float("nan")
    assert output.shape == (3, 3)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(model(other), output)


@pytest.mark.parametrize("design", DESIGNS)
def test_each_side_decides_where_the_other_is_missing(design):
    model = build(design)
    before = model(batch())
    changed = batch()
    changed.fields[2, 0] += 1  # of the row without text
    changed.tokens[2] = torch.arange(10, 16)  # the only chunk of the row without fields
    after = model(changed)
    assert not torch.allclose(after[1], before[1])
    assert not torch.allclose(after[2], before[2])
    torch.testing.assert_close(after[0], before[0])


@pytest.mark.parametrize("design", DESIGNS)
def test_rows_do_not_depend_on_their_batch(design):
    model = build(design)
    together = model(batch())
    alone = batch(chunks=(1,), fields_valid=(False,))
    full = batch()
    alone.tokens, alone.token_valid, alone.fields = full.tokens[2:3], full.token_valid[2:3], full.fields[1:2]
    torch.testing.assert_close(model(alone)[0], together[1], rtol=1e-5, atol=1e-6)


def test_the_text_is_the_mean_of_its_chunks():
    model = build()
    rows = batch()
    chunks = pool(model.encoder, rows.tokens, rows.token_valid, "mean")
    expected = torch.stack([chunks[:2].mean(dim=0), chunks[2], torch.zeros(64)])
    torch.testing.assert_close(model.encode_text(rows), expected)


def test_the_mean_over_tokens_by_hand():
    model = build()
    rows = batch()
    states = model.encoder(input_ids=rows.tokens[:1, :4]).last_hidden_state
    torch.testing.assert_close(
        pool(model.encoder, rows.tokens, rows.token_valid, "mean")[0],
        states[0].mean(dim=0),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("design", ["text", "tabular"])
def test_one_side_alone_ignores_the_other(design):
    model = build(design)
    changed = batch()
    if design == "text":
        changed.fields[:, 0] += 1
    else:
        changed.tokens = 49 - changed.tokens
    torch.testing.assert_close(model(changed), model(batch()))


@pytest.mark.parametrize("design", DESIGNS)
def test_shares_follow_what_is_there(design):
    share = text_share(build(design), batch())
    assert 0 < share[0] < 1
    assert share[1] == pytest.approx(1, abs=1e-6)  # no fields
    assert share[2] == pytest.approx(0, abs=1e-6)  # no text


def trained_weights(**changed):
    model = build(**changed)
    return {name for name, weight in model.encoder.named_parameters() if weight.requires_grad}


def test_what_is_trained_of_the_encoder():
    everything = trained_weights(tuning="full")
    assert trained_weights(tuning="head") == set()
    lora = trained_weights(tuning="lora", lora_rank=2)
    assert lora and all("lora_" in name for name in lora)
    upper = trained_weights(tuning="full", frozen_layers=1)
    assert everything > upper
    assert not any(name.startswith(("embeddings.word_embeddings", "encoder.layer.0.")) for name in upper)
    assert any(name.startswith("encoder.layer.1.") for name in upper)
    with pytest.raises(InputError, match="--frozen-layers 3: the encoder has 2 layers"):
        trained_weights(tuning="full", frozen_layers=3)


def test_the_layers_of_an_encoder_are_found():
    assert len(layers_of(build().encoder)) == 2


def test_an_encoder_without_a_pooler_is_refused():
    model = build(pooling="pooler")
    assert torch.isfinite(model(batch())).all()
    model.encoder.pooler = None
    with pytest.raises(InputError, match="--pooling mean"):
        model(batch())
