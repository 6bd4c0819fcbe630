"""The metric. One reference implementation: range 0 to 200, never halved."""

from __future__ import annotations

import numpy as np
import pandas as pd

SMALLEST_PRICE = 0.01
"""Dollars. No model predicts less than one cent: SMAPE sees ratios, and a ratio to zero does not exist."""

PRICE_BINS = (0.0, 5.0, 10.0, 30.0, 60.0, 200.0, np.inf)  # dollars; the bins of the weighted loss


def smape_terms(actual: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Per-row terms 100·|p − a| / ((|p| + |a|) / 2), shape (N,). A pair (0, 0) counts 0.

    Raises ValueError for different shapes or values that are not finite.
    """
    actual, predicted = np.asarray(actual, np.float64), np.asarray(predicted, np.float64)
    if actual.shape != predicted.shape:
        raise ValueError(f"actual has shape {actual.shape}, predicted {predicted.shape}")
    if not (np.isfinite(actual).all() and np.isfinite(predicted).all()):
        raise ValueError("SMAPE needs finite prices")
    scale = (np.abs(actual) + np.abs(predicted)) / 2
    return 100 * np.divide(np.abs(predicted - actual), scale, out=np.zeros_like(scale), where=scale > 0)


def smape_of_ln(ln_difference: np.ndarray) -> np.ndarray:
    """The SMAPE term in percent of each pair of prices, from ln p − ln a; same shape, range 0 to 200.

    |p − a| / ((p + a) / 2) = 2 · tanh(|ln p − ln a| / 2) holds exactly for positive prices, so the metric depends on
    the ratio p / a alone. `training.smape_loss` has the same for torch.
    """
    return 200 * np.tanh(np.abs(ln_difference) / 2)


def smape(actual: np.ndarray, predicted: np.ndarray) -> float:
    """SMAPE in percent, 0 to 200: smape([100], [120]) is 18.18."""
    terms = smape_terms(actual, predicted)
    if terms.size == 0:
        raise ValueError("SMAPE of no rows")
    return float(terms.mean())


def smape_with_error(actual: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """SMAPE and its standard error over rows (rows taken as independent)."""
    terms = smape_terms(actual, predicted)
    return float(terms.mean()), float(terms.std(ddof=1) / np.sqrt(terms.size))


def best_constant(actual: np.ndarray) -> float:
    """The one price with the lowest SMAPE on `actual`, searched over its quantiles."""
    candidates = np.quantile(actual, np.linspace(0.05, 0.95, 181))
    return float(min(candidates, key=lambda price: smape(actual, np.full(len(actual), price))))


def price_bin(price: np.ndarray) -> pd.Categorical:
    """The bin of each price as an ordered label ("$0-5" … "$200+"); a price on an edge is in the upper bin."""
    labels = [f"${low:g}-{high:g}" for low, high in zip(PRICE_BINS[:-2], PRICE_BINS[1:-1], strict=True)]
    return pd.cut(price, PRICE_BINS, right=False, labels=[*labels, f"${PRICE_BINS[-2]:g}+"])


def smape_by_group(actual: np.ndarray, predicted: np.ndarray, groups: dict[str, object]) -> pd.DataFrame:
    """One line per group: columns grouping, group, rows, smape, standard_error, bias (mean of ln p − ln a).

    `groups` maps the name of a grouping to one label per row. The first line covers all rows. A group of one row has
    no standard error.
    """
    frame = pd.DataFrame(
        {"smape": smape_terms(actual, predicted), "bias": np.log(predicted) - np.log(actual)}
    )
    of_all = {"": np.full(len(frame), "all")}
    tables = []
    for name, labels in (of_all | groups).items():
        categories = labels if isinstance(labels, pd.Categorical) else np.asarray(labels)
        grouped = frame.groupby(categories, observed=True)
        table = grouped.mean().assign(rows=grouped.size(), standard_error=grouped["smape"].sem())
        table = table.assign(grouping=name or "all").rename_axis("group").reset_index()
        tables.append(table.astype({"group": str}))
    columns = ["grouping", "group", "rows", "smape", "standard_error", "bias"]
    return pd.concat(tables, ignore_index=True)[columns]
