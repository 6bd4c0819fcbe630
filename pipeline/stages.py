"""Which stages make up the pipeline, in which order, and which files each of them reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contracts.errors import InputError
from contracts.workspace import CLIP_IMAGE, EMBEDDINGS, QWEN_TEXT, REPOSITORY, SIGLIP_IMAGE, SIGLIP_TEXT
from data.prepare import find_tables

TABLES = ("train", "test")
FROZEN_TEXT = "frozen_text"
"""Embedding file of the frozen text encoder that the word models compare products by."""


@dataclass
class PipelineSettings:
    data: Path = Path("data/sample")
    """Folder with the tables train and, optionally, test, and optionally images/; or one file, the priced table."""
    workspace: Path = REPOSITORY
    """Folder that receives every artefact."""
    preset: Literal["base", "tiny", "cpu"] = "base"
    """base: the published encoders and fusion, for one GPU; tiny: the same classes, small and with random weights;
    cpu: word models on a frozen text encoder and their ensemble, the best score without a GPU."""
    columns: tuple[str, ...] = ()
    """Which column is which, such as id=sku text=title,description price=sell_price; see data.prepare."""
    features: tuple[str, ...] = ()
    """Columns with further facts, numbers or categories."""
    decimal: str = "."
    """What stands before the cents of a price: . or ,"""
    currency: str = "$"
    """How prices are labelled."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Frozen text encoder of preset cpu: hub id or local folder."""
    download: bool = False
    """Download the pictures that are not in the images folder yet."""
    resume: bool = False
    """Skip every stage whose command, inputs and outputs are those of an earlier call."""


@dataclass(frozen=True)
class Stage:
    """One command, and the files by which the pipeline knows whether it must run again.

    `reads` and `writes` are glob patterns below the workspace, or absolute paths.
    """

    module: str
    arguments: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.module, *self.arguments])


def prepared(*tables: str) -> tuple[str, ...]:
    return tuple(f"data/prepared_{table}.csv" for table in tables)


def embedding(name: str, *tables: str) -> tuple[str, ...]:
    # the json holds the sha256 of the pickle, which may be large
    return tuple(f"data/embeddings/{name}_{table}.pkl.json" for table in tables)


def predictions(name: str, *tables: str) -> tuple[str, ...]:
    return tuple(f"predictions/{name}_{table}.csv" for table in tables)


def run_files(run: str) -> tuple[str, ...]:
    return (f"checkpoints/{run}/summary.json", f"checkpoints/{run}/**/*.safetensors")


def pipeline_stages(settings: PipelineSettings) -> list[Stage]:
    """The stages of a preset. Raises InputError where `data` holds no priced table."""
    sources = find_tables(settings.data)
    tables = tuple(name for name in TABLES if name in sources)
    mapping = []
    for flag, values in (("--columns", settings.columns), ("--features", settings.features)):
        mapping += [flag, *values] if values else []
    for flag, value, default in (
        ("--decimal", settings.decimal, "."),
        ("--currency", settings.currency, "$"),
    ):
        mapping += [flag, value] if value != default else []
    prepare = Stage(
        "data.prepare", ("--data", str(settings.data), *mapping),
        reads=tuple(str(file.resolve()) for file in sources.values()),
        writes=(*prepared(*tables), "data/folds.csv", "data/catalog.json"),
    )  # fmt: skip
    download = [Stage("data.download_images")] if settings.download else []
    if settings.preset == "cpu" and settings.download:
        raise InputError("--download: preset cpu looks at no pictures; leave it out")
    if settings.preset == "cpu":
        return [prepare, *word_stages(settings.encoder, tables)]
    if "test" not in tables:
        raise InputError(
            f"{settings.data}: preset {settings.preset} needs a table test; preset cpu does without"
        )
    return [prepare, *download, *fusion_stages(settings.preset, tables)]


def word_stages(encoder: str, tables: tuple[str, ...]) -> list[Stage]:
    """The frozen text encoder, the two word models that earn a weight, and their ensemble (docs/results.md)."""
    frozen = (
        "--run",
        "frozen",
        "--model",
        encoder,
        "--train",
        "head",
        "--epochs",
        "1",
        "--max-length",
        "128",
    )
    stages = [
        Stage("qwen3_finetune.train", frozen, (*prepared("train"), "data/folds.csv"), run_files("frozen")),
    ]
    for table in tables:
        stages.append(
            Stage(
                "qwen3_finetune.extract_embeddings",
                (table, "--run", "frozen", "--embedding", FROZEN_TEXT),
                reads=(*prepared(table), *run_files("frozen")),
                writes=embedding(FROZEN_TEXT, table),
            )  # fmt: skip
        )
    members = []
    for model, flags in (("boosted", ()), ("mlp_on_kernel", ("--seeds", "8"))):
        name = f"words_{model}_{FROZEN_TEXT}"
        members.append(name)
        stages.append(
            Stage(
                "word_models.train",
                ("--model", model, *flags, "--embeddings", FROZEN_TEXT),
                reads=(*prepared(*tables), "data/folds.csv", *embedding(FROZEN_TEXT, *tables)),
                writes=(*predictions(name, *tables), f"checkpoints/{name}/summary.json"),
            )  # fmt: skip
        )
    of_members = tuple(file for name in members for file in predictions(name, *tables))
    outputs = ("test_out.csv", "test_intervals.csv") if "test" in tables else ()
    stages.append(
        Stage(
            "ensemble.train",
            ("--members", *members),
            reads=(*prepared(*tables), "data/folds.csv", *of_members),
            writes=("checkpoints/ensemble/model.json", *outputs),
        )  # fmt: skip
    )
    return stages


def fusion_stages(preset: str, tables: tuple[str, ...]) -> list[Stage]:
    """The three encoder stages and the fusion of their four embeddings."""
    flags = ("--preset", preset)
    training = (*prepared("train"), "data/folds.csv")
    stages = [Stage("clip_finetune.train", flags, training, run_files("clip_finetune"))]
    for table in tables:
        stages.append(
            Stage(
                "clip_finetune.extract_embeddings",
                (table,),
                (*prepared(table), *run_files("clip_finetune")),
                embedding(CLIP_IMAGE, table),
            )  # fmt: skip
        )
    for table in tables:
        files = (*embedding(SIGLIP_IMAGE, table), *embedding(SIGLIP_TEXT, table))
        stages.append(Stage("siglip_extract.extract_embeddings", (table, *flags), prepared(*tables), files))
    stages.append(Stage("qwen3_finetune.train", flags, training, run_files("qwen3_finetune")))
    for table in tables:
        stages.append(
            Stage(
                "qwen3_finetune.extract_embeddings",
                (table,),
                (*prepared(table), *run_files("qwen3_finetune")),
                embedding(QWEN_TEXT, table),
            )  # fmt: skip
        )
    run = "fusion_all_embeddings"
    of_train, of_test = (tuple(f for name in EMBEDDINGS for f in embedding(name, table)) for table in tables)
    stages += [
        Stage("fusion.all_embeddings.train", flags, (*training, *of_train), run_files(run)),
        Stage(
            "fusion.all_embeddings.predict_test",
            (),
            (*prepared("test"), *of_test, *run_files(run)),
            ("test_out.csv",),
        ),  # fmt: skip
    ]
    return stages
