"""Does a product cost the same in a catalogue ten times as large? Time and memory of each stage at several sizes.

    python -m studies.benchmarks.growth --quick
    python -m studies.benchmarks.growth --data ../shared/data/challenge     # texts of a real train.csv

Products are texts of a small catalogue, repeated, each with a word, a picture name and an id of its own, so that no
two are one group. Encoders are the tiny presets: what grows is not inside the encoder. Every measurement is a process
of its own, warmed up on a small catalogue first, so that imports are in neither its time nor its memory.

`mib` is the peak above what the warm process held. A stage holds the prepared table (strings; a few KB a product), and
that is accepted: the row `table alone` says how much it is. Extraction to shards may hold a shard beyond it, not more.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.catalog import read_catalog, read_table
from contracts.embeddings import Embeddings, write_embeddings
from contracts.errors import InputError, run_entry_point
from contracts.splits import fitted_on, split_hash
from contracts.workspace import SPLITS, Workspace
from data import prepare, sample_catalog
from studies.benchmarks.measure import RESULTS, report, seconds_of
from training.settings import parse_settings

WARM_ROWS = 200
TRAIN_ROWS = 500  # what the encoders are trained on; only the table that they embed grows


@dataclass
class GrowthSettings:
    rows: tuple[int, ...] = (10_000, 30_000, 100_000)
    """catalogue sizes; the first is the reference"""
    quick: bool = False
    """1,000 and 5,000 rows, one round"""
    stages: tuple[str, ...] = ()
    """stages to measure; empty: all"""
    data: str = ""
    """folder with a train.csv whose texts are repeated; empty: texts of the generated catalogue"""
    shard_rows: int = 1024
    """rows a shard in extraction"""
    rounds: int = 2
    """times that each measurement is made; the fastest counts"""
    out: str = str(RESULTS / "growth.json")
    """json file to write"""


def products(rows: int, data: str) -> pd.DataFrame:
    """`rows` products with a price, no two alike."""
    if data:
        source = read_catalog(Path(data) / "train.csv", with_price=True)[0]
    else:
        source = sample_catalog.draw_products(1000, 20, seed=0)
    table = source.iloc[np.arange(rows) % len(source)].reset_index(drop=True)
    numbers = [f"{row:07d}" for row in range(rows)]
    texts = zip(table["catalog_content"], numbers, strict=True)
    table["catalog_content"] = [text.replace("Item Name:", f"Item Name: Lot {n}", 1) for text, n in texts]
    table["sample_id"], table["image_link"] = numbers, [f"https://pictures.example/{n}.jpg" for n in numbers]
    return table[["sample_id", "catalog_content", "image_link", "price"]]


def write_catalogue(folder: Path, train_rows: int, test_rows: int, data: str) -> None:
    """train.csv, test.csv and images/; the pictures are a few files under many names."""
    table = products(train_rows + test_rows, data)
    (folder / "images").mkdir(parents=True)
    table[:train_rows].to_csv(folder / "train.csv", index=False)
    table[train_rows:].drop(columns="price").to_csv(folder / "test.csv", index=False)
    kinds = [(category, grade) for category in sample_catalog.CATEGORIES for grade in sample_catalog.GRADE]
    for row, link in enumerate(table["image_link"]):
        picture = folder / f"{row % len(kinds)}.jpg"
        if row < len(kinds):
            sample_catalog.draw_picture(*kinds[row], np.random.default_rng(row)).save(picture)
        os.link(picture, folder / "images" / link.rsplit("/", 1)[-1])


def half_and_half(folder: Path, rows: int, data: str) -> list[str]:
    """Flags of data.prepare for a new catalogue of `rows` products, half of them to train on."""
    write_catalogue(folder / "catalogue", rows // 2, rows - rows // 2, data)
    return ["--data", str(folder / "catalogue"), "--workspace", str(folder)]


def write_random_embeddings(folder: Path, width: int = 64) -> None:
    """The four files that fusion reads, as frozen encoders would write them."""
    from fusion.all_embeddings.model import MODALITIES

    workspace, rng = Workspace(folder), np.random.default_rng(0)
    folds = split_hash(workspace.folds())
    for split in SPLITS:
        ids = workspace.prepared(split)["sample_id"].to_numpy(np.str_)
        for name in MODALITIES:
            meta = {"name": name, "split": split, "model": "random", "checkpoint": "random", "command": "growth",
                    "fitted_on": fitted_on(encoder_folds=()), "split_hash": folds}  # fmt: skip
            matrix = rng.standard_normal((len(ids), width), np.float32)
            path = workspace.path("embeddings", name=name, split=split)
            write_embeddings(path, Embeddings(ids, matrix, rng.random(len(ids)) > 0.01, meta))


def encoders(folder: Path, train_rows: int, test_rows: int, data: str) -> None:
    """A prepared workspace with tiny encoders that were trained for an epoch."""
    write_catalogue(folder / "catalogue", train_rows, test_rows, data)
    prepare.main(["--data", str(folder / "catalogue"), "--workspace", str(folder)])
    for stage in ("qwen3_finetune", "clip_finetune"):
        flags = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--workspace", str(folder)]
        import_module(f"{stage}.train").main(flags)


def cut(source: Path, folder: Path, rows: int) -> None:
    """The workspace `source` with the first `rows` of its test table."""
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    shutil.copytree(source / "data", folder / "data", ignore=shutil.ignore_patterns("prepared_test.csv"))
    test = Workspace(source).path("prepared", split="test")
    read_table(test, nrows=rows).to_csv(Workspace(folder).path("prepared", split="test"), index=False)


# What is measured. Each takes the workspace; they are functions of this module so that a fresh process finds them.


def table_alone(folder: Path) -> None:
    Workspace(folder).prepared("test")


def prepared(folder: Path) -> None:
    prepare.main(["--data", str(folder / "catalogue"), "--workspace", str(folder)])


def extraction(folder: Path, *, module: str, flags: Sequence[str]) -> None:
    """Embed the test table anew."""
    shutil.rmtree(folder / "data" / "embeddings", ignore_errors=True)
    import_module(module).main(["test", "--device", "cpu", "--workspace", str(folder), *flags])


def fusion(folder: Path) -> None:
    """One epoch and the predictions of the test table."""
    flags = ["--device", "cpu", "--workspace", str(folder)]
    import_module("fusion.all_embeddings.train").main(["--preset", "tiny", "--epochs", "1", *flags])
    import_module("fusion.all_embeddings.predict_test").main(flags)


def fresh_process(work: Callable[[Path], None], warm: Path, folder: Path) -> dict[str, float]:
    """Seconds and peak MiB of `work(folder)` in a new process that has done `work(warm)`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, warm, folder))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work} on {folder} ended without a result; its error stands above") from None
    finally:
        process.join()


def _measured(sender: Any, work: Callable[[Path], None], warm: Path, folder: Path) -> None:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        work(warm)
        gc.collect()
        # not ru_maxrss: it starts with what the parent held when it forked. 5 resets the peak, VmHWM
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        seconds = seconds_of(lambda: work(folder))
    sender.send({"seconds": seconds, "mib": _memory("VmHWM") - before})


def _memory(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def build(root: Path, sizes: Sequence[int], settings: GrowthSettings) -> dict[str, dict[str, Any]]:
    """The stages: what is run, and on which workspace at each size."""
    sizes = (WARM_ROWS, *sizes)
    whole, parts = ({size: root / f"{kind}_{size}" for size in sizes} for kind in ("whole", "part"))

    def extract(module: str, *flags: str) -> dict[str, Any]:
        flags = (*flags, "--shard-rows", str(settings.shard_rows))
        work = functools.partial(extraction, module=f"{module}.extract_embeddings", flags=flags)
        return {"work": work, "folders": parts}

    stages = {
        "prepare": {"work": prepared, "folders": whole},
        "table alone": {"work": table_alone, "folders": parts},
        "qwen3_finetune to shards": extract("qwen3_finetune", "--keep-shards"),
        "qwen3_finetune": extract("qwen3_finetune"),
        "siglip_extract image to shards": extract(
            "siglip_extract", "--preset", "tiny", "--tower", "image", "--keep-shards"
        ),
        "clip_finetune": extract("clip_finetune", "--workers", "0"),
        "fusion": {"work": fusion, "folders": whole},
    }
    if unknown := set(settings.stages) - set(stages):
        raise InputError(f"--stages {', '.join(sorted(unknown))}: choose from {', '.join(stages)}")
    stages = {name: stage for name, stage in stages.items() if name in settings.stages or not settings.stages}
    if any(stage["folders"] is whole for stage in stages.values()):
        for size, folder in whole.items():
            prepare.main(half_and_half(folder, size, settings.data))
            write_random_embeddings(folder)
    if any(stage["folders"] is parts for stage in stages.values()):
        encoders(root / "encoders", TRAIN_ROWS, max(sizes), settings.data)
        for size, folder in parts.items():
            cut(root / "encoders", folder, size)
    return stages


def measure_growth(settings: GrowthSettings, root: Path) -> list[dict[str, object]]:
    sizes, rounds = ((1000, 5000), 1) if settings.quick else (settings.rows, settings.rounds)
    stages = build(root, sizes, settings)
    rows, table = [], {}
    for name, stage in stages.items():
        work, folders = stage["work"], stage["folders"]
        found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
        for _ in range(rounds):  # the sizes in turn: a machine that slows down slows both
            for size in sizes:
                found[size].append(fresh_process(work, folders[WARM_ROWS], folders[size]))
        reference = None
        for size, results in found.items():
            seconds, mib = (min(result[key] for result in results) for key in ("seconds", "mib"))
            each = 1e6 * seconds / size
            reference = reference or each
            row = {"stage": name, "products": size, "seconds": seconds, "us_per_product": each,
                   "times_the_smallest": each / reference, "mib": mib}  # fmt: skip
            if name == "table alone":
                table[size] = mib
            elif name.endswith("to shards") and size in table:
                row["mib_beyond_table"] = mib - table[size]
            rows.append(row)
            print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in row.items()), flush=True)  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(GrowthSettings, argv, description=__doc__.split("\n")[0])
    with tempfile.TemporaryDirectory(prefix="growth") as root:
        rows = measure_growth(settings, Path(root))
    report(settings.out, rows)


if __name__ == "__main__":
    run_entry_point(main)
