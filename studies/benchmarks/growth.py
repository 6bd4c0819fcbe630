"""Does a product cost the same in a catalogue ten times as large? Time and memory of each stage at several sizes.

    python -m studies.benchmarks.growth --quick
    python -m studies.benchmarks.growth --data ../shared/data/challenge     # texts of a real train.csv

The products are texts of a small catalogue, repeated, each with a word, a picture name and an id of its own, so that no
two form a group in the folds. The encoders are the tiny presets: what grows does not lie inside the encoder. Every
measurement is a process of its own that first does the same work on a small catalogue, so that imports count neither in
its time nor in its memory.

`mib` is the peak above what the warm process held. A stage holds the prepared table (strings, a few KB per product),
and that is accepted; the row `table alone` says how much it is. Extraction to shards may hold one shard beyond it, and
not more.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.catalog import read_catalog, read_table
from contracts.embeddings import Embeddings, write_embeddings
from contracts.errors import InputError, run_entry_point
from contracts.splits import fitted_on, split_hash
from contracts.workspace import EMBEDDINGS, SPLITS, Workspace
from data import prepare, sample_catalog
from studies.benchmarks.memory import seconds_and_peak
from studies.tables import RESULTS
from training.settings import parse_settings

WARM_ROWS = 200
"""Size of the catalogue on which a process warms up."""
TRAIN_ROWS = 500
"""Rows that the encoders are trained on; only the table that they embed grows."""
SOURCE_ROWS = 1000
"""Generated products whose texts are repeated."""
MISSING_SHARE = 0.01
"""Share of the random embeddings that are not valid."""
MIB = 2**20


@dataclass
class GrowthSettings:
    rows: tuple[int, ...] = (10_000, 30_000, 100_000)
    """Catalogue sizes; the first is the reference."""
    quick: bool = False
    """Use 1,000 and 5,000 rows and one round."""
    stages: tuple[str, ...] = ()
    """Stages to measure; empty means all."""
    data: str = ""
    """Folder with a train.csv whose texts are repeated; empty means texts of the generated catalogue."""
    shard_rows: int = 1024
    """Rows per shard in extraction."""
    rounds: int = 2
    """Times that each measurement is made; the fastest counts."""
    out: Path = RESULTS / "growth.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.rows = (1000, 5000)
            self.rounds = 1


def products(rows: int, data: str) -> pd.DataFrame:
    """`rows` products with a price, no two alike."""
    if data:
        source, _ = read_catalog(Path(data) / "train.csv", with_price=True)
    else:
        source = sample_catalog.draw_products(SOURCE_ROWS, sample_catalog.FEWEST_ROWS, seed=0)
    table = source.iloc[np.arange(rows) % len(source)].reset_index(drop=True)
    numbers = [f"{row:07d}" for row in range(rows)]
    table["sample_id"] = numbers
    table["image_link"] = [f"https://pictures.example/{number}.jpg" for number in numbers]
    table["catalog_content"] = [
        text.replace("Item Name:", f"Item Name: Lot {number}", 1)
        for text, number in zip(table["catalog_content"], numbers, strict=True)
    ]
    return table[["sample_id", "catalog_content", "image_link", "price"]]


def write_catalogue(folder: Path, train_rows: int, test_rows: int, data: str) -> None:
    """train.csv, test.csv and images/; the pictures are a few files under many names."""
    table = products(train_rows + test_rows, data)
    images = folder / "images"
    images.mkdir(parents=True)
    table[:train_rows].to_csv(folder / "train.csv", index=False)
    table[train_rows:].drop(columns="price").to_csv(folder / "test.csv", index=False)
    pictures = _draw_pictures(folder)
    for row, link in enumerate(table["image_link"]):
        os.link(pictures[row % len(pictures)], images / link.rsplit("/", 1)[-1])


def _draw_pictures(folder: Path) -> list[Path]:
    """One picture file for each category and grade of the sample catalogue."""
    paths: list[Path] = []
    for category in sample_catalog.CATEGORIES:
        for grade in sample_catalog.GRADE:
            path = folder / f"{len(paths)}.jpg"
            rng = np.random.default_rng(len(paths))
            sample_catalog.draw_picture(category, grade, rng).save(path)
            paths.append(path)
    return paths


def half_and_half(folder: Path, rows: int, data: str) -> None:
    """A prepared workspace of a new catalogue of `rows` products, half of which have a price."""
    write_catalogue(folder / "catalogue", rows // 2, rows - rows // 2, data)
    prepared(folder)


def write_random_embeddings(folder: Path, width: int = 64) -> None:
    """The four files that fusion reads, as frozen encoders would write them."""
    workspace = Workspace(folder)
    rng = np.random.default_rng(0)
    folds = split_hash(workspace.folds())
    for split in SPLITS:
        ids = workspace.prepared(split)["sample_id"].to_numpy(np.str_)
        for name in EMBEDDINGS:
            meta = {
                "name": name, "split": split, "model": "random", "checkpoint": "random", "command": "growth",
                "fitted_on": fitted_on(encoder_folds=()), "split_hash": folds,
            }  # fmt: skip
            matrix = rng.standard_normal((len(ids), width), np.float32)
            valid = rng.random(len(ids)) > MISSING_SHARE
            path = workspace.path("embeddings", name=name, split=split)
            write_embeddings(path, Embeddings(ids, matrix, valid, meta))


def encoders(folder: Path, train_rows: int, test_rows: int, data: str) -> None:
    """A prepared workspace with tiny encoders that were trained for one epoch."""
    write_catalogue(folder / "catalogue", train_rows, test_rows, data)
    prepared(folder)
    for stage in ("qwen3_finetune", "clip_finetune"):
        flags = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--workspace", str(folder)]
        import_module(f"{stage}.train").main(flags)


def cut(source: Path, folder: Path, rows: int) -> None:
    """Copy the workspace `source`, with the first `rows` of its test table only."""
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    shutil.copytree(source / "data", folder / "data", ignore=shutil.ignore_patterns("prepared_test.csv"))
    test = Workspace(source).path("prepared", split="test")
    read_table(test, nrows=rows).to_csv(Workspace(folder).path("prepared", split="test"), index=False)


# What is measured. Each takes a workspace, and is a function of this module so that a fresh process finds it.


def table_alone(folder: Path) -> None:
    """Read the prepared test table."""
    Workspace(folder).prepared("test")


def prepared(folder: Path) -> None:
    """Run data.prepare on the catalogue in the workspace."""
    prepare.main(["--data", str(folder / "catalogue"), "--workspace", str(folder)])


def extraction(folder: Path, *, module: str, flags: Sequence[str]) -> None:
    """Embed the test table anew."""
    shutil.rmtree(folder / "data" / "embeddings", ignore_errors=True)
    import_module(module).main(["test", "--device", "cpu", "--workspace", str(folder), *flags])


def fusion(folder: Path) -> None:
    """Train the fusion for one epoch and predict the test table."""
    flags = ["--device", "cpu", "--workspace", str(folder)]
    import_module("fusion.all_embeddings.train").main(["--preset", "tiny", "--epochs", "1", *flags])
    import_module("fusion.all_embeddings.predict_test").main(flags)


@dataclass
class Stage:
    """What is run, and on which workspace at each size."""

    work: Callable[[Path], None]
    folders: dict[int, Path]


def stages_of(whole: dict[int, Path], parts: dict[int, Path], shard_rows: int) -> dict[str, Stage]:
    """All stages.

    Args:
        whole: for each size the workspace of a catalogue with random embeddings, half of its rows with a price.
        parts: for each size a workspace with trained encoders and a test table of that size.
    """

    def extract(stage: str, *flags: str) -> Stage:
        module = f"{stage}.extract_embeddings"
        work = functools.partial(extraction, module=module, flags=(*flags, "--shard-rows", str(shard_rows)))
        return Stage(work, parts)

    siglip_image = ("--preset", "tiny", "--tower", "image")
    return {
        "prepare": Stage(prepared, whole),
        "table alone": Stage(table_alone, parts),
        "qwen3_finetune to shards": extract("qwen3_finetune", "--keep-shards"),
        "qwen3_finetune": extract("qwen3_finetune"),
        "siglip_extract image to shards": extract("siglip_extract", *siglip_image, "--keep-shards"),
        "clip_finetune": extract("clip_finetune", "--workers", "0"),
        "fusion": Stage(fusion, whole),
    }


def build(root: Path, settings: GrowthSettings) -> dict[str, Stage]:
    """The stages that are asked for, with the workspaces that they need."""
    sizes = (WARM_ROWS, *settings.rows)
    whole = {size: root / f"whole_{size}" for size in sizes}
    parts = {size: root / f"part_{size}" for size in sizes}
    stages = stages_of(whole, parts, settings.shard_rows)
    if unknown := set(settings.stages) - set(stages):
        raise InputError(f"--stages {', '.join(sorted(unknown))}: choose from {', '.join(stages)}")
    if settings.stages:
        stages = {name: stages[name] for name in stages if name in settings.stages}

    if any(stage.folders is whole for stage in stages.values()):
        for size, folder in whole.items():
            half_and_half(folder, size, settings.data)
            write_random_embeddings(folder)
    if any(stage.folders is parts for stage in stages.values()):
        encoders(root / "encoders", TRAIN_ROWS, max(sizes), settings.data)
        for size, folder in parts.items():
            cut(root / "encoders", folder, size)
    return stages


def fresh_process(stage: Stage, size: int) -> dict[str, float]:
    """Seconds and peak MiB of the stage at one size, in a new process that has warmed up."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    work = (stage.work, stage.folders[WARM_ROWS], stage.folders[size])
    process = context.Process(target=_measured, args=(sender, *work))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{stage} at {size} rows ended without a result; its error stands above") from None
    finally:
        process.join()


def _measured(sender: Connection, work: Callable[[Path], None], warm: Path, folder: Path) -> None:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        work(warm)
        seconds, peak = seconds_and_peak(lambda: work(folder))
    sender.send({"seconds": seconds, "mib": peak / MIB})


def measure_stage(name: str, stage: Stage, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row per size, with the fastest time and the smallest peak of the rounds."""
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:  # in turns: a machine that slows down slows all sizes down
            found[size].append(fresh_process(stage, size))
    rows: list[dict[str, Any]] = []
    for size, results in found.items():
        seconds = min(result["seconds"] for result in results)
        rows.append(
            {
                "stage": name,
                "products": size,
                "seconds": seconds,
                "us_per_product": 1e6 * seconds / size,
                "mib": min(result["mib"] for result in results),
            }
        )
    for row in rows:
        row["times_the_smallest"] = row["us_per_product"] / rows[0]["us_per_product"]
    return rows


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(GrowthSettings, argv, description=__doc__.split("\n")[0])
    from studies.benchmarks.measure import in_one_line, report

    rows = []
    table_mib = {}
    with tempfile.TemporaryDirectory(prefix="growth") as root:
        for name, stage in build(Path(root), settings).items():
            for row in measure_stage(name, stage, settings.rows, settings.rounds):
                if name == "table alone":
                    table_mib[row["products"]] = row["mib"]
                elif name.endswith("to shards") and table_mib:
                    row["mib_beyond_table"] = row["mib"] - table_mib[row["products"]]
                rows.append(row)
                print(in_one_line(row), flush=True)
    report(settings.out, rows)


if __name__ == "__main__":
    run_entry_point(main)
