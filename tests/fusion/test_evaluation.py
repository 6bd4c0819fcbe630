"""What a run folder says of the gate: shares by price that are known beforehand."""

import numpy as np
import pandas as pd
import pytest
import torch

from contracts.files import read_json
from fusion.all_embeddings.config import MODALITIES, ModelConfig
from fusion.all_embeddings.model import AllEmbeddings
from fusion.blocks import FusionOutput
from fusion.dataset import FusionTable
from fusion.evaluation import gate_by_price, gate_shares, modalities_present, write_scores

PRICE = np.array([2.0, 4.0, 7.0, 300.0])
GATE = np.array([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8], [0.0, 1.0]])


def table_of(price: np.ndarray, widths: tuple[str, ...] = MODALITIES) -> FusionTable:
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(len(price), 6, generator=generator) for name in widths}
    rows = pd.DataFrame(
        {"sample_id": [str(row) for row in range(len(price))], "price": price, "unit_kind": "weight"}
    )
    return FusionTable.of(rows, embeddings, torch.ones(len(price), len(widths), dtype=torch.bool))


def test_shares_are_averaged_over_the_rows_of_a_price_bin():
    table = gate_by_price(PRICE, GATE)
    assert list(table.columns) == ["price_bin", "rows", "expert_0", "expert_1"]
    assert table["price_bin"].tolist() == ["$0-5", "$5-10", "$200+"]  # cheapest first, without the empty bins
    assert table["rows"].tolist() == [2, 1, 1]
    np.testing.assert_allclose(table["expert_0"], [0.75, 0.2, 0.0])
    np.testing.assert_allclose(table["expert_1"], [0.25, 0.8, 1.0])


class GateOfFirstColumn(torch.nn.Module):
    """Two experts; the first one's share is the sigmoid of clip_image's first number."""

    def forward(self, embeddings, valid):
        share = embeddings["clip_image"][:, 0].sigmoid()
        return FusionOutput(share, torch.stack([share, 1 - share], dim=1))


def test_gate_shares_are_those_of_the_rows_in_their_order():
    table = table_of(np.full(50, 10.0))
    rows = torch.tensor([7, 3, 41, 0, 7])
    shares = gate_shares(GateOfFirstColumn(), table, rows, batch_size=2)
    first = table.embeddings["clip_image"][rows, 0].sigmoid()
    torch.testing.assert_close(shares, torch.stack([first, 1 - first], dim=1))


def test_gate_shares_are_taken_without_dropout():
    torch.manual_seed(0)
    config = ModelConfig(width=16, heads=2, dropout=0.5)
    model = AllEmbeddings(config, dict.fromkeys(MODALITIES, 6)).train()
    table = table_of(np.full(20, 10.0))
    rows = torch.arange(20)
    shares = gate_shares(model, table, rows)
    assert shares.shape == (20, 3)
    torch.testing.assert_close(shares, gate_shares(model, table, rows), rtol=0, atol=0)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(20))


@pytest.mark.parametrize("settings", [{"variant": "flat"}, {"experts": 1}])
def test_a_model_without_several_experts_has_no_gate(settings):
    model = AllEmbeddings(ModelConfig(width=16, heads=2, **settings), dict.fromkeys(MODALITIES, 6))
    assert gate_shares(model, table_of(PRICE), torch.arange(4)) is None


@pytest.mark.parametrize("gate", [torch.tensor(GATE), None])
def test_run_folder_has_the_gate_where_there_is_one(tmp_path, gate):
    write_scores(tmp_path, table_of(PRICE), np.arange(4), PRICE * 1.1, name="validation", gate=gate)
    scores = read_json(tmp_path / "scores.json")
    assert (tmp_path / "gate_by_price.csv").exists() == (gate is not None)
    assert (tmp_path / "gate_by_price.png").exists() == (gate is not None)
    assert ("gate_by_price" in scores) == (gate is not None)
    if gate is not None:
        written = pd.read_csv(tmp_path / "gate_by_price.csv")
        pd.testing.assert_frame_equal(written, gate_by_price(PRICE, GATE))
        assert scores["gate_by_price"] == written.to_dict("records")


def test_table_columns_are_neither_text_nor_picture():
    table = table_of(PRICE, (*MODALITIES, "tabular"))
    is_image = torch.tensor([name.endswith("image") for name in table.widths])
    is_text = torch.tensor([name.endswith("text") for name in table.widths])
    table.valid[1, is_image] = False
    table.valid[2, is_text] = False
    table.valid[3, is_image | is_text] = False
    assert modalities_present(table).tolist() == ["text + image", "text only", "image only", "neither"]
