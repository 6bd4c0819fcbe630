"""Every artefact that passes between stages, in one table: `python -m contracts.workspace` prints it.

A workspace is one folder, by default the repository itself. Stages meet only through these files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from contracts.catalog import FEATURE, read_table
from contracts.errors import InputError, listed
from contracts.files import read_json
from contracts.splits import read_folds

REPOSITORY = Path(__file__).resolve().parents[1]
SPLITS = ("train", "test")
# a part may follow behind "/": the runs of an out-of-fold run lie in its folder
NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*", re.ASCII)
CLIP_IMAGE, SIGLIP_IMAGE, SIGLIP_TEXT, QWEN_TEXT = "clip_image", "siglip_image", "siglip_text", "qwen_text"
EMBEDDINGS = (CLIP_IMAGE, SIGLIP_IMAGE, SIGLIP_TEXT, QWEN_TEXT)
"""Names of the embedding files that the fusion of all embeddings reads."""


@dataclass(frozen=True)
class Artefact:
    path: str
    producer: str
    consumers: str
    keys: str
    content: str


ARTEFACTS = {
    "catalog": Artefact(
        "data/catalog.json", "data.prepare", "all stages", "-",
        "source files with sha256, images folder, what validation found",
    ),
    "prepared": Artefact(
        "data/prepared_{split}.csv", "data.prepare", "all stages", "sample_id",
        "text, image, parsed amount, unit, pack, 3 structural features; price float64 in train",
    ),
    "input_ids": Artefact(
        "data/input_ids_{split}.csv", "data.prepare", "fusion, ensemble", "-",
        "sample_id of every line of the input, in its order; only where a product has several lines",
    ),
    "folds": Artefact("data/folds.csv", "data.prepare", "all stages", "sample_id", "fold int, 0 to 9"),
    "image_status": Artefact(
        "data/image_status.csv", "data.download_images", "report", "sample_id", "image, status, detail",
    ),
    "image_failures": Artefact(
        "data/image_failures_{name}_{split}.csv", "clip_finetune, siglip_extract", "report", "sample_id",
        "image, reason: the rows of embedding file {name} that have no usable picture",
    ),
    "embeddings": Artefact(
        "data/embeddings/{name}_{split}.pkl", "clip_finetune, siglip_extract, qwen3_finetune", "fusion", "sample_id",
        "embeddings (N, D_in) float32|float16, valid (N,) bool, meta; sha256 in .pkl.json",
    ),
    "predictions": Artefact(
        "predictions/{name}_{split}.csv",
        "clip_finetune, qwen3_finetune, fusion, word_models, product_matching, ensemble", "ensemble, pipeline",
        "sample_id",
        "log_price float64 (= log1p of dollars), fold int in train; what its model was fitted on in .csv.json",
    ),
    "run": Artefact(
        "checkpoints/{name}", "every train.py", "its own extract and predict", "-",
        "settings.json, manifest.json, metrics.jsonl, weights as safetensors, plots, COMPLETE",
    ),
    "submission": Artefact(
        "test_out.csv", "fusion.*.predict_test, ensemble.train", "-", "sample_id",
        "price float64, finite, > 0; ids and order of test.csv",
    ),
    "intervals": Artefact(
        "test_intervals.csv", "ensemble.train, ensemble.predict", "-", "sample_id",
        "price and the bounds of its 80 % and 95 % intervals",
    ),
    "scores": Artefact(
        "scores.csv", "pipeline.scores", "pipeline.report", "model", "SMAPE of every model on rows it has not seen",
    ),
    "stages": Artefact(
        "pipeline.json", "pipeline.run", "pipeline.run, pipeline.report", "stage",
        "seconds and peak memory of every stage, and what it read and wrote",
    ),
    "report": Artefact("report.html", "pipeline.report", "-", "-", "scores, plots and problems on one page"),
}  # fmt: skip

_PREPARED_NUMBERS = (
    "amount", "pack_count", "item_size", "total_amount", "quantity_value", "unit_volume", "unit_weight", "price",
)  # fmt: skip
STRUCTURAL_FEATURES = ("quantity_value", "unit_volume", "unit_weight")


class Workspace:
    """Paths and readers of one workspace folder."""

    def __init__(self, root: Path | str = REPOSITORY):
        self.root = Path(root)

    def path(self, artefact: str, **fields: str) -> Path:
        """`workspace.path("embeddings", name="clip_image", split="train")`

        Raises InputError for a name that would lead out of the artefact's folder, or to the folder itself.
        """
        for field, name in fields.items():
            if not NAME.fullmatch(name):
                raise InputError(
                    f"{field} {name!r}: use letters, digits, '.', '_' and '-', and start with no '.'"
                )
        return self.root / ARTEFACTS[artefact].path.format(**fields)

    def prepared(self, split: str) -> pd.DataFrame:
        """The prepared table: text columns str, numbers float64 (NaN where a text states none)."""
        path = self.path("prepared", split=split)
        if not path.is_file():
            hint = "" if split in SPLITS else f" --input FILE --table {split}"
            raise InputError(
                f"{path}: no prepared table; run python -m data.prepare{hint} --workspace {self.root}"
            )
        table = read_table(path)
        if (repeated := table["sample_id"].duplicated()).any():
            ids = table["sample_id"][repeated].tolist()
            raise InputError(f"{path}: more than one row of sample_id {listed(ids)}; run data.prepare again")
        for column in table.columns.intersection([*_PREPARED_NUMBERS, *self.number_features()]):
            table[column] = pd.to_numeric(table[column].mask(table[column] == "")).astype("float64")
        return table

    def tables(self) -> list[str]:
        """Names of the prepared tables: train, test where there is one, then the others in alphabetical order."""
        start, end = self.path("prepared", split="NAME").name.split("NAME")
        found = set()
        for path in (self.root / "data").glob(f"{start}*{end}"):
            found.add(path.name.removeprefix(start).removesuffix(end))
        return [name for name in SPLITS if name in found] + sorted(found - set(SPLITS))

    def input_ids(self, split: str) -> pd.Series:
        """sample_id of every line that the input had, in its order; a product may have several lines."""
        path = self.path("input_ids", split=split)
        return read_table(path)["sample_id"] if path.is_file() else self.prepared(split)["sample_id"]

    def number_features(self) -> list[str]:
        """Columns of the prepared tables that hold further facts which are numbers."""
        path = self.path("catalog")
        features = read_json(path).get("features", {}) if path.is_file() else {}
        return [FEATURE + name for name, kind in features.items() if kind == "number"]

    def training_table(self) -> pd.DataFrame:
        """The prepared training rows with their folds: the columns of `prepared` and `fold` (int, 0 to 9).

        Raises InputError for a row without a fold: it would have no role, and a model could not say whether it saw it.
        """
        table = self.prepared("train")
        fold = self.folds().reindex(table["sample_id"])
        if fold.isna().any():
            first = fold.index[fold.isna()][0]
            raise InputError(
                f"{self.path('folds')}: no fold for sample_id {first} ({fold.isna().sum()} rows in all); "
                "run data.prepare again"
            )
        return table.assign(fold=fold.to_numpy(int))

    def folds(self) -> pd.Series:
        """Fold of each training row: int, indexed by sample_id."""
        return read_folds(self.path("folds"))

    def images_folder(self) -> Path:
        return Path(read_json(self.path("catalog"))["images_folder"])


def table() -> str:
    """The artefacts as a Markdown table."""
    lines = ["| path | written by | read by | key | content |", "|---|---|---|---|---|"]
    for item in ARTEFACTS.values():
        content = item.content.replace("|", "\\|")
        lines.append(f"| `{item.path}` | {item.producer} | {item.consumers} | {item.keys} | {content} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
