"""Scores of a fusion model on rows it has not seen: overall, by group, and as plots.

For a mixture of experts there is also the gate's share of each expert by price, which shows whether the experts
specialise in cheap and dear products.

Legend: N rows of the table, n scored rows, B batch, E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contracts.files import atomic_write, write_json
from contracts.smape import price_bin, smape_by_group, smape_with_error
from fusion.blocks import PriceModel
from fusion.dataset import FusionTable
from training.plots import draw_error_bars, figure_at, plot_error_by_price


def modalities_present(table: FusionTable) -> np.ndarray:
    """Per row "text + image", "text only", "image only" or "neither", (N,) str."""
    valid = table.valid.cpu().numpy()
    is_image = np.array([name.endswith("image") for name in table.widths])
    is_text = np.array([name.endswith("text") for name in table.widths])
    image = valid[:, is_image].any(axis=1)
    text = valid[:, is_text].any(axis=1)
    return np.select([text & image, text, image], ["text + image", "text only", "image only"], "neither")


def score_by_groups(table: FusionTable, rows: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """SMAPE and bias of `rows` (positions) by price bin, unit kind and which modalities are present."""
    frame = table.rows.iloc[rows]
    groups = {
        "price": price_bin(frame["price"].to_numpy()),
        "unit kind": frame["unit_kind"].to_numpy(),
        "what is present": modalities_present(table)[rows],
    }
    return smape_by_group(frame["price"].to_numpy(), predicted, groups)


@torch.no_grad()
def gate_shares(model: PriceModel, table: FusionTable, rows: Tensor, batch_size: int = 4096) -> Tensor | None:
    """The gate's share of each expert for `rows` (n,) positions: (n, E) on the CPU, each row summing to 1.

    None for a model without a mixture of several experts.
    """
    model.eval()
    shares = []
    for batch in rows.to(table.valid.device).split(batch_size):
        gate = model(*table.take(batch)).gate
        if gate is None or gate.shape[1] == 1:
            return None
        shares.append(gate)
    return torch.cat(shares).cpu()


def gate_by_price(price: np.ndarray, gate: np.ndarray) -> pd.DataFrame:
    """Mean share of each expert, by the true price.

    Where the experts do not specialise by price, all lines say the same.

    Args:
        price: true prices (n,) in dollars.
        gate: shares (n, E).

    Returns:
        DataFrame price_bin, rows, expert_0 … expert_{E−1}; one line per bin that has rows, the cheapest first.
    """
    experts = [f"expert_{number}" for number in range(gate.shape[1])]
    by_bin = pd.DataFrame(gate, columns=experts).groupby(price_bin(price), observed=True)
    table = by_bin.mean()
    table.insert(0, "rows", by_bin.size())
    return table.rename_axis("price_bin").reset_index().astype({"price_bin": str})


def write_scores(
    folder: Path,
    table: FusionTable,
    rows: np.ndarray,
    predicted: np.ndarray,
    *,
    name: str,
    gate: Tensor | None = None,
) -> dict:
    """Write by_group.csv, scores.json and two plots into `folder`; with `gate` also gate_by_price.csv and .png.

    Args:
        rows: positions of the scored rows.
        predicted: their prices in dollars.
        name: what the number may be called, "validation" or "leaked".
        gate: their shares of the experts (n, E), from `gate_shares`.

    Returns:
        {"<name>_smape": …, "standard_error": …, "rows": …}
    """
    price = table.rows["price"].to_numpy()[rows]
    score, error = smape_with_error(price, predicted)
    summary = {f"{name}_smape": round(score, 3), "standard_error": round(error, 3), "rows": len(rows)}
    groups = score_by_groups(table, rows, predicted).round(4)
    with atomic_write(folder / "by_group.csv") as file:
        groups.to_csv(file, index=False)
    scores = {**summary, "by_group": groups.to_dict("records")}
    if gate is not None:
        shares = gate_by_price(price, gate.numpy()).round(4)
        with atomic_write(folder / "gate_by_price.csv") as file:
            shares.to_csv(file, index=False)
        _plot_gate(folder / "gate_by_price.png", shares)
        scores["gate_by_price"] = shares.to_dict("records")
    write_json(folder / "scores.json", scores)
    plot_error_by_price(
        folder / "error_by_price.png", price, predicted, title=f"{folder.name}: {name} SMAPE {score:.2f}"
    )
    _plot_groups(folder / "error_by_group.png", groups)
    return summary


def _plot_groups(path: Path, groups: pd.DataFrame) -> None:
    """A panel per grouping; the one by price is in error_by_price.png already."""
    of_all = groups["smape"].iloc[0]
    tables = [
        (name, part.set_index("group"))
        for name, part in groups.groupby("grouping", sort=False)
        if name not in ("all", "price")
    ]
    with figure_at(path, columns=len(tables), width=4.2, height=3.4) as (_, axes):
        for axis, (name, part) in zip(axes, tables, strict=True):
            draw_error_bars(axis, part["smape"], part["standard_error"], part["rows"], overall=of_all)
            axis.set(title=f"by {name}")


def _plot_gate(path: Path, shares: pd.DataFrame) -> None:
    """A stacked bar per price bin: equal bars mean that the experts do not specialise by price."""
    labels = shares["price_bin"] + "\nn=" + shares["rows"].astype(str)  # a bin of few rows says little
    foot = np.zeros(len(shares))
    with figure_at(path, columns=1, width=5.2, height=3.4) as (_, (axis,)):
        for expert in shares.columns.drop(["price_bin", "rows"]):
            axis.bar(labels, shares[expert], bottom=foot, label=expert.replace("_", " "))
            foot += shares[expert].to_numpy()
        axis.set(xlabel="true price", ylabel="mean share of the gate", ylim=(0, 1), title="experts by price")
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
