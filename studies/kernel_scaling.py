"""The kernel on large catalogues: what its neighbourhoods cost in accuracy, and whether time per row stays flat.

    python -m studies.kernel_scaling accuracy --workspace OUT --embeddings frozen_text
    python -m studies.kernel_scaling time --rows 75000

`accuracy` compares the exact form with approximations on a workspace of real rows, out of fold, and what the trees and
the network (`boosted`, `mlp_on_kernel`) make of it. All of them share the similarity that was learned outside the
hold-out, so that they differ in the approximation alone:

- *neighbourhoods*: what `word_models.kernel` does beyond its exact form, at several sizes;
- *landmarks*: the Nyström approximation by some of the rows, as a subset of regressors (Rasmussen & Williams 2006,
  "Gaussian processes for machine learning", section 8.3.1);
- *nearest*: exact regression of each asked row on its own nearest rows (kriging with moving neighbourhoods).

`time` fits generated catalogues without pictures, whose best possible score is known: per number of rows five hold-outs
and all rows, or `--holdouts` of them without all rows. Each row of its table has the peak memory of the process until
then, so give each number of rows a run of its own and join the tables. CPU seconds are those of the process and its
children on all cores. Other work on the machine makes wall time longer, so that it is an upper bound.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contracts.catalog import ColumnMapping
from contracts.errors import run_entry_point
from contracts.smape import smape
from contracts.splits import N_HOLDOUTS, assign_folds, roles
from contracts.workspace import REPOSITORY, Workspace
from studies.tables import RESULTS, write_table
from training.settings import parse_settings
from word_models.compared import ComparedRows
from word_models.config import WordModelSettings
from word_models.features import FeatureBuilder, Features, build_features
from word_models.kernel import KernelModel
from word_models.models import Boosted, MlpOnKernel
from word_models.neighbourhoods import SIZES, Sizes
from word_models.similarity import Similarity, learn

GRAM_ROWS_AT_ONCE = 1_024
JITTER = 1e-6
"""Added to the diagonal of the landmarks' matrix: equal products make it singular."""


@dataclass
class KernelScalingSettings:
    workspace: str = str(REPOSITORY)
    """Workspace whose training rows `accuracy` uses."""
    embeddings: tuple[str, ...] = ()
    """Embedding files that the kernel of `accuracy` sees."""
    rows: tuple[int, ...] = (25_000, 50_000, 75_000)
    """Rows of the catalogues of `time`."""
    holdouts: int = N_HOLDOUTS
    """Hold-outs to fit. `time` also fits all rows if it fits all hold-outs."""
    sizes: tuple[int, ...] = (2_000, SIZES.members)
    """Rows of a neighbourhood in `accuracy`, where a tenth of them is at home."""
    steps: int = 40
    """Steps in which the similarity is learned."""
    seeds: int = 4
    """Random seeds of the trees and of the network in `accuracy`. Without seeds, these two are left out."""
    out: str = ""
    """Csv file to write; empty means studies/results/kernel_<part>.csv."""


def main(argv: list[str] | None = None) -> pd.DataFrame:
    settings, part = parse_settings(
        KernelScalingSettings,
        argv,
        description=__doc__.split("\n")[0],
        positional={"part": ("accuracy", "time")},
    )
    out = Path(settings.out) if settings.out else RESULTS / f"kernel_{part}.csv"
    measure = measure_accuracy if part == "accuracy" else measure_time
    return measure(settings, out)


def measure_accuracy(settings: KernelScalingSettings, out: Path) -> pd.DataFrame:
    """One row per form: SMAPE of the rows of the hold-outs, and how far prices lie from those of the exact form."""
    features, ln_price, fold = _real_rows(settings)
    kernel = WordModelSettings(model="kernel", kernel_steps=settings.steps, seeds=max(settings.seeds, 1))
    second_models: dict[str, Any] = (
        {"boosted": Boosted, "mlp_on_kernel": MlpOnKernel} if settings.seeds else {}
    )
    predicted: dict[str, np.ndarray] = {}
    cpu: dict[str, float] = {}
    scored = np.zeros(len(fold), bool)
    for holdout in range(settings.holdouts):
        asked = np.isin(fold, roles(holdout).validate)
        scored |= asked
        compared = ComparedRows.of(features[~asked])
        known = ln_price[~asked]
        similarity = learn(kernel, compared, known)
        forms = {"exact": Sizes(exact=len(known))}
        for members in settings.sizes:
            forms[f"neighbourhoods of {members}"] = Sizes(exact=0, home=members // 10, members=members)
        for name, sizes in forms.items():
            clock = _Clock()
            model = KernelModel.with_similarity(similarity, compared, known, sizes=sizes, seed=kernel.seed)
            of_form = {name: model.estimate(features[asked]).ln_price}
            cpu[name] = cpu.get(name, 0) + clock.lap()[1]
            for second, kind in second_models.items():
                fitted = kind.on_kernel(model, kernel, features[~asked], known)
                of_form[f"{second} on {name}"] = fitted.predict(features[asked])
            _keep(predicted, of_form, asked)
        _keep(predicted, _rivals(similarity, compared, known, ComparedRows.of(features[asked])), asked)

        # after every hold-out: a run that is interrupted leaves what it has measured
        table = _accuracy_table(predicted, ln_price, scored, cpu, holdout + 1)
        write_table(out, table)
    return table


def _keep(predicted: dict[str, np.ndarray], of_form: dict[str, np.ndarray], asked: np.ndarray) -> None:
    """Write ln price (m,) of the asked rows by each form into `predicted`, (N,) each."""
    for name, of_asked in of_form.items():
        predicted.setdefault(name, np.full(len(asked), np.nan))[asked] = of_asked


def _accuracy_table(
    predicted: dict[str, np.ndarray],
    ln_price: np.ndarray,
    scored: np.ndarray,
    cpu: dict[str, float],
    holdouts: int,
) -> pd.DataFrame:
    price = np.exp(ln_price[scored])
    exact = predicted["exact"][scored]
    rows = []
    for name, of_form in predicted.items():
        difference = of_form[scored] - exact
        rows.append({
            "form": name,
            "hold_outs": holdouts,
            "rows": int(scored.sum()),
            "smape": smape(price, np.exp(of_form[scored])),
            "rms_from_exact": np.sqrt(np.square(difference).mean()),
            "cpu_seconds_without_learning": cpu.get(name, np.nan),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _real_rows(settings: KernelScalingSettings) -> tuple[Features, np.ndarray, np.ndarray]:
    """Features, ln price (N,) and fold (N,) of the training rows."""
    from word_models.embedding_columns import EmbeddingColumns, read_embedding
    from word_models.saved import features_of

    workspace = Workspace(settings.workspace)
    table = workspace.training_table()
    embeddings = {name: read_embedding(workspace, name, "train") for name in settings.embeddings}
    sample_ids = table["sample_id"].to_numpy()
    encoders = [EmbeddingColumns.fit(name, content, sample_ids) for name, content in embeddings.items()]
    builder = FeatureBuilder.fit(table, [workspace.prepared("test")])
    features = features_of(builder, encoders, table, embeddings)
    return features, np.log(table["price"].to_numpy()), table["fold"].to_numpy()


@torch.no_grad()
def _rivals(
    similarity: Similarity, fit: ComparedRows, ln_price: np.ndarray, asked: ComparedRows
) -> dict[str, np.ndarray]:
    """ln price (m,) of the asked rows by each approximation that was not kept."""
    between_fit = _gram(similarity, fit, fit)
    to_asked = _gram(similarity, asked, fit)
    mean = float(ln_price.mean())
    centred = torch.from_numpy(ln_price - mean)
    noise = float(similarity.noise.exp())
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(fit)))
    found = {}
    for fraction in (4, 2):
        some = shuffled[: len(fit) // fraction]
        of_asked = _by_landmarks(
            between_fit[:, some], between_fit[some][:, some], to_asked[:, some], centred, noise
        )
        found[f"landmarks, 1 row in {fraction}"] = mean + of_asked.numpy()
    for count in (128, 512):
        of_asked = _by_nearest(between_fit, to_asked, centred.float(), noise, min(count, len(fit)))
        found[f"{count} nearest rows"] = mean + of_asked.numpy()
    return found


def _gram(similarity: Similarity, asked: ComparedRows, fit: ComparedRows) -> Tensor:
    slabs = []
    for slab in np.array_split(np.arange(len(asked)), 1 + len(asked) // GRAM_ROWS_AT_ONCE):
        slabs.append(similarity(asked[slab].differences(fit)))
    return torch.cat(slabs)


def _by_landmarks(to_fit: Tensor, between: Tensor, to_asked: Tensor, centred: Tensor, noise: float) -> Tensor:
    """Equation 8.14 of Rasmussen & Williams, without their mean: K_*m (K_mn K_nm + noise K_mm)⁻¹ K_mn y."""
    to_fit = to_fit.double()
    system = to_fit.T @ to_fit + noise * between.double() + JITTER * torch.eye(len(between))
    weights = torch.linalg.solve(system, to_fit.T @ centred)
    return to_asked.double() @ weights


def _by_nearest(between_fit: Tensor, to_asked: Tensor, centred: Tensor, noise: float, count: int) -> Tensor:
    """Each asked row by a regression on the `count` rows that are most similar to it."""
    nearest = to_asked.topk(count, dim=1).indices  # (m, count)
    found = []
    for asked, rows in enumerate(nearest):
        gram = between_fit[rows][:, rows] + noise * torch.eye(count)
        found.append(to_asked[asked, rows] @ torch.linalg.solve(gram, centred[rows]))
    return torch.stack(found)


def measure_time(settings: KernelScalingSettings, out: Path) -> pd.DataFrame:
    """One row per catalogue and fit: rows fitted and asked, SMAPE, seconds, and the peak memory of the process."""
    found = []
    for rows in settings.rows:
        clock = _Clock()
        features, ln_price, ln_best, fold = generated_rows(rows)
        _, features_cpu = clock.lap()
        fits: list[int | None] = list(range(settings.holdouts))
        if settings.holdouts == N_HOLDOUTS:
            fits.append(None)
        for holdout in fits:
            asked = np.isin(fold, roles(holdout).validate) if holdout is not None else np.zeros(rows, bool)
            measured = {"rows": rows, "hold_out": "none" if holdout is None else str(holdout)}
            measured |= _fit_and_ask(settings, features, ln_price, ln_best, asked)
            measured |= {"features_cpu": features_cpu, "peak_gb": _peak_gb()}
            found.append(measured)
            write_table(out, pd.DataFrame(found))
    return pd.DataFrame(found)


def generated_rows(rows: int) -> tuple[Features, np.ndarray, np.ndarray, np.ndarray]:
    """A generated catalogue: its features, ln price (N,), the best ln price that a text allows (N,), and fold (N,)."""
    from data.prepare import prepare_table
    from data.sample_catalog import FEWEST_ROWS, GRADE, draw_products

    products = draw_products(rows, FEWEST_ROWS, seed=0)
    products = products[products["split"] == "train"].reset_index(drop=True)
    raw = products[["sample_id", "catalog_content", "image_link", "price"]].astype(str)
    prepared, _ = prepare_table(raw, ColumnMapping(), with_price=True)
    # the grade shows only in the picture; its mean effect is 0
    ln_best = products["fair_ln_price"] - products["grade"].map(GRADE)
    fold = assign_folds(prepared)["fold"].to_numpy()
    features = build_features(prepared)["train"]
    return features, np.log(prepared["price"].to_numpy()), ln_best.to_numpy(), fold


def _fit_and_ask(
    settings: KernelScalingSettings,
    features: Features,
    ln_price: np.ndarray,
    ln_best: np.ndarray,
    asked: np.ndarray,
) -> dict[str, float]:
    """Learn, fit and ask as `word_models.train` does, and what each part took."""
    kernel = WordModelSettings(model="kernel", kernel_steps=settings.steps)
    known = ln_price[~asked]
    compared = ComparedRows.of(features[~asked])
    clock = _Clock()
    similarity = learn(kernel, compared, known)
    learning = clock.lap()
    model = KernelModel.with_similarity(similarity, compared, known, sizes=SIZES, seed=kernel.seed)
    fitting = clock.lap()
    score = np.nan
    best = np.nan
    if asked.any():
        of_asked = model.estimate(features[asked]).ln_price
        score = smape(np.exp(ln_price[asked]), np.exp(of_asked))
        best = smape(np.exp(ln_price[asked]), np.exp(ln_best[asked]))
    asking = clock.lap()
    return {
        "fitted": len(known),
        "asked": int(asked.sum()),
        "smape": score,
        "best_smape": best,
        "left_out_smape": smape(np.exp(known), np.exp(model.left_out.ln_price)),
        "learning_cpu": learning[1],
        "fitting_cpu": fitting[1],
        "asking_cpu": asking[1],
        "wall_seconds": learning[0] + fitting[0] + asking[0],
        "fitting_cpu_ms_per_row": 1000 * fitting[1] / len(known),
        "asking_cpu_ms_per_row": 1000 * asking[1] / asked.sum() if asked.any() else np.nan,
    }


class _Clock:
    """Wall and CPU seconds since the last lap."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> tuple[float, float]:
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        now = (time.perf_counter(), cpu)
        before = getattr(self, "before", now)
        self.before = now
        return now[0] - before[0], now[1] - before[1]


def _peak_gb() -> float:
    """Peak memory of this process. Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    run_entry_point(main)
