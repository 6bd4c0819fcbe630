"""Scores of a fusion model on rows it has not seen: overall, by group, and as plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from contracts.files import atomic_write, write_json
from contracts.smape import price_bin, smape_by_group, smape_with_error
from fusion.dataset import FusionTable
from training.plots import draw_error_bars, figure_at, plot_error_by_price


def modalities_present(table: FusionTable) -> np.ndarray:
    """Per row "text + image", "text only", "image only" or "nothing", (N,) str."""
    valid = table.valid.cpu().numpy()
    is_image = np.array([name.endswith("image") for name in table.widths])
    image = valid[:, is_image].any(axis=1)
    text = valid[:, ~is_image].any(axis=1)
    return np.select([text & image, text, image], ["text + image", "text only", "image only"], "nothing")


def score_by_groups(table: FusionTable, rows: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """SMAPE and bias of `rows` (positions) by price bin, unit kind and which modalities are present."""
    frame = table.rows.iloc[rows]
    groups = {
        "price": price_bin(frame["price"].to_numpy()),
        "unit kind": frame["unit_kind"].to_numpy(),
        "what is present": modalities_present(table)[rows],
    }
    return smape_by_group(frame["price"].to_numpy(), predicted, groups)


def write_scores(
    folder: Path, table: FusionTable, rows: np.ndarray, predicted: np.ndarray, *, name: str
) -> dict:
    """Write by_group.csv, scores.json and two plots into `folder`.

    Args:
        rows: positions of the scored rows.
        predicted: their prices in dollars.
        name: what the number may be called, "validation" or "leaked".

    Returns:
        {"<name>_smape": …, "standard_error": …, "rows": …}
    """
    price = table.rows["price"].to_numpy()[rows]
    score, error = smape_with_error(price, predicted)
    summary = {f"{name}_smape": round(score, 3), "standard_error": round(error, 3), "rows": len(rows)}
    groups = score_by_groups(table, rows, predicted).round(4)
    with atomic_write(folder / "by_group.csv") as file:
        groups.to_csv(file, index=False)
    write_json(folder / "scores.json", {**summary, "by_group": groups.to_dict("records")})
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
