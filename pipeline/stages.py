"""Which stages make up the pipeline, in which order, and which files each of them reads and writes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from contracts.catalog import ColumnMapping
from contracts.errors import InputError
from contracts.workspace import CLIP_IMAGE, QWEN_TEXT, REPOSITORY, SIGLIP_IMAGE, SIGLIP_TEXT
from data.prepare import find_tables
from word_models.config import WordModelSettings

TABLES = ("train", "test")
FROZEN_TEXT = "frozen_text"
"""Embedding file of the frozen text encoder that preset cpu compares products by."""
FUSION_RUN = "fusion_all_embeddings"
TABULAR = "tabular"
"""What fusion calls the further facts of a table."""
PICTURES = "pictures of "
"""Prefix that tells the pictures of a table from a file's path in `Stage.reads` and `Stage.writes`."""
TRAINED_BY_MANY = ("clip_finetune.train", "qwen3_finetune.train", "fusion.all_embeddings.train")
"""Stages that several processes can share."""


@dataclass
class PipelineSettings:
    data: Path = Path("data/sample")
    """Folder with the tables train and, optionally, test, and optionally images/; or one file, the priced table."""
    workspace: Path = REPOSITORY
    """Folder that receives every artefact."""
    preset: Literal["base", "best", "tiny", "cpu"] = "base"
    """base: the published encoders, fusion, word models and their ensemble, validated on one hold-out, for one GPU;
    best: the same out of fold, which takes six times as long and uses every row for the score and the weights;
    tiny: the stages of base, small and with random weights, on a CPU; cpu: word models on a frozen text encoder and
    their ensemble, the best score without a GPU."""
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
    set: tuple[str, ...] = ()
    """Settings of single stages, such as fusion.loss=huber qwen3_finetune.epochs=2: the stage, and any flag of its
    commands."""
    processes: int = 1
    """Processes that share the training of an encoder or of fusion, one per GPU; torchrun starts them."""
    download: bool = False
    """Download the pictures that are not in the images folder yet."""
    resume: bool = False
    """Skip every stage whose settings, inputs and outputs are those of an earlier call, and continue a training that
    was interrupted."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise InputError(f"--processes {self.processes}: must be at least 1")


@dataclass(frozen=True)
class Stage:
    """One command, and the files by which the pipeline knows whether it must run again.

    `reads` and `writes` are glob patterns below the workspace, absolute paths, or pictures of a table.
    """

    module: str
    arguments: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    processes: int = 1

    @property
    def name(self) -> str:
        return " ".join([self.module, *self.arguments])

    def command(self, workspace: Path, *, resume: bool = False) -> list[str]:
        """What starts the stage; with `resume` it continues its unfinished run."""
        launcher: list[str] = []
        if self.processes > 1:
            launcher = [
                "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes),
            ]  # fmt: skip
        command = [
            sys.executable,
            *launcher,
            "-m",
            self.module,
            *self.arguments,
            "--workspace",
            str(workspace),
        ]
        return [*command, "--resume"] if resume else command


@dataclass(frozen=True)
class Catalogue:
    """What the plan must know of the tables before they are read."""

    tables: tuple[str, ...]
    """train, and test where there is one"""
    has_pictures: bool
    has_features: bool


@dataclass(frozen=True)
class WordModels:
    """The word models of a preset."""

    models: tuple[tuple[str, tuple[str, ...]], ...]
    """each with its flags"""
    embeddings: tuple[str, ...] = ()
    """what they compare products by, beside words: frozen encoders or out-of-fold ones"""


# the two that earn a weight on real rows (docs/results.md)
_STRONG = (("boosted", ()), ("mlp_on_kernel", ("--seeds", "8")))
WORD_MODELS = {
    "cpu": WordModels(_STRONG, (FROZEN_TEXT,)),
    # qwen_text of a single hold-out has seen the rows that it embeds, so only the frozen encoder is honest here
    "base": WordModels(_STRONG, (SIGLIP_TEXT,)),
    "best": WordModels(_STRONG, (QWEN_TEXT, SIGLIP_TEXT)),
    # random encoders say nothing, and the demo must not take long
    "tiny": WordModels((("ridge", ()), ("mlp", ("--seeds", "1")))),
}


def prepared(*tables: str) -> tuple[str, ...]:
    return tuple(f"data/prepared_{table}.csv" for table in tables)


def pictures(*tables: str) -> tuple[str, ...]:
    return tuple(PICTURES + table for table in tables)


def embedding(name: str, *tables: str) -> tuple[str, ...]:
    """The embedding file and its json, or the shards of a catalogue that is too large for one file."""
    patterns: list[str] = []
    for table in tables:
        path = f"data/embeddings/{name}_{table}.pkl"
        patterns += [path, f"{path}.json", f"{path}.shards/*"]
    return tuple(patterns)


def predictions(name: str, *tables: str) -> tuple[str, ...]:
    """The prices and the json that says what their model was fitted on."""
    patterns: list[str] = []
    for table in tables:
        path = f"predictions/{name}_{table}.csv"
        patterns += [path, f"{path}.json"]
    return tuple(patterns)


def weights(run: str) -> tuple[str, ...]:
    """What a later stage reads of a run; that its other files are intact is checked where they were written."""
    return (f"checkpoints/{run}/**/*.safetensors",)


def run_files(run: str) -> tuple[str, ...]:
    """What a training leaves: the model in all its formats, settings and scores, and no plots or logs."""
    return tuple(f"checkpoints/{run}/**/*.{kind}" for kind in ("safetensors", "json", "npz", "txt"))


def pipeline_stages(settings: PipelineSettings) -> list[Stage]:
    """The stages of a preset.

    Raises:
        InputError: `data` holds no priced table, pictures are to be downloaded that nobody would look at, or --set
            names a stage or a setting that does not exist.
    """
    from pipeline.stage_settings import require_valid, with_settings

    sources = find_tables(settings.data)
    mapping = ColumnMapping.parse(settings.columns, features=settings.features)
    catalogue = Catalogue(
        tables=tuple(name for name in TABLES if name in sources),
        has_pictures=mapping.image is not None and settings.preset != "cpu",
        has_features=bool(settings.features),
    )
    if settings.download and not catalogue.has_pictures:
        reason = "preset cpu looks at no pictures" if settings.preset == "cpu" else "--columns names no image"
        raise InputError(f"--download: {reason}; leave it out")

    stages = [prepare_stage(settings, sources, catalogue)]
    if settings.download:
        stages.append(download_stage(catalogue))
    members = []
    if settings.preset == "cpu":
        stages += frozen_text_stages(settings.encoder, catalogue)
    else:
        stages += encoder_stages(settings.preset, catalogue)
        stages += fusion_stages(settings.preset, catalogue)
        members.append(FUSION_RUN)
    words = word_stages(WORD_MODELS[settings.preset], catalogue)
    stages += words.values()
    stages.append(ensemble_stage((*members, *words), catalogue))

    stages = [_shared(stage, settings.processes) for stage in stages]
    stages = with_settings(stages, settings.set)
    require_valid(stages)
    return stages


def _shared(stage: Stage, processes: int) -> Stage:
    return replace(stage, processes=processes) if stage.module in TRAINED_BY_MANY else stage


def prepare_stage(settings: PipelineSettings, sources: dict[str, Path], catalogue: Catalogue) -> Stage:
    mapping: list[str] = []
    for flag, values in (("--columns", settings.columns), ("--features", settings.features)):
        mapping += [flag, *values] if values else []
    defaults = PipelineSettings()
    for flag, value, default in (
        ("--decimal", settings.decimal, defaults.decimal),
        ("--currency", settings.currency, defaults.currency),
    ):
        mapping += [flag, value] if value != default else []
    return Stage(
        "data.prepare",
        ("--data", str(settings.data), *mapping),
        reads=tuple(str(file.resolve()) for file in sources.values()),
        writes=(*prepared(*catalogue.tables), "data/folds.csv", "data/catalog.json"),
    )


def download_stage(catalogue: Catalogue) -> Stage:
    return Stage(
        "data.download_images",
        reads=prepared(*catalogue.tables),
        writes=("data/image_status.csv", *pictures(*catalogue.tables)),
    )


def frozen_text_stages(encoder: str, catalogue: Catalogue) -> list[Stage]:
    """A text encoder as published. Its head is trained, because a run of the stage needs one, and is not used."""
    frozen = (
        "--run", "frozen", "--model", encoder, "--train", "head", "--epochs", "1", "--max-length", "128",
    )  # fmt: skip
    training = Stage(
        "qwen3_finetune.train", frozen, (*prepared("train"), "data/folds.csv"), run_files("frozen")
    )
    extract = ("--run", "frozen", "--embedding", FROZEN_TEXT)
    return [training, *_text_embeddings("frozen", FROZEN_TEXT, extract, catalogue)]


def encoder_stages(preset: str, catalogue: Catalogue) -> list[Stage]:
    """CLIP, the two towers of SigLIP, and Qwen; without pictures only the encoders of texts."""
    flags = _stage_preset(preset)
    out_of_fold = ("--folds", "5") if preset == "best" else ()
    training = (*prepared("train"), "data/folds.csv")
    stages = []
    if catalogue.has_pictures:
        stages.append(
            Stage(
                "clip_finetune.train",
                (*flags, *out_of_fold),
                reads=(*training, *pictures("train")),
                writes=run_files("clip_finetune"),
            )
        )
        for table in catalogue.tables:
            stages.append(
                Stage(
                    "clip_finetune.extract_embeddings",
                    (table,),
                    reads=(*prepared(table), *pictures(table), *weights("clip_finetune")),
                    writes=embedding(CLIP_IMAGE, table),
                )
            )
    tower = () if catalogue.has_pictures else ("--tower", "text")
    for table in catalogue.tables:
        looks_at = pictures(table) if catalogue.has_pictures else ()
        files = embedding(SIGLIP_TEXT, table)
        if catalogue.has_pictures:
            files += embedding(SIGLIP_IMAGE, table)
        # a tower with random weights learns its tokenizer from the texts of train
        texts = tuple(dict.fromkeys(prepared("train", table)))
        stages.append(
            Stage("siglip_extract.extract_embeddings", (table, *flags, *tower), (*texts, *looks_at), files)
        )
    stages.append(
        Stage("qwen3_finetune.train", (*flags, *out_of_fold), training, run_files("qwen3_finetune"))
    )
    return [*stages, *_text_embeddings("qwen3_finetune", QWEN_TEXT, (), catalogue)]


def _stage_preset(preset: str) -> tuple[str, ...]:
    """The preset of each stage; best differs from base only in how often a stage trains."""
    return ("--preset", "tiny" if preset == "tiny" else "base")


def _text_embeddings(run: str, name: str, flags: tuple[str, ...], catalogue: Catalogue) -> list[Stage]:
    stages = []
    for table in catalogue.tables:
        # the training rows are needed to align the encoders of an out-of-fold run
        stages.append(
            Stage(
                "qwen3_finetune.extract_embeddings",
                (table, *flags),
                reads=(*prepared(table), *weights(run)),
                writes=embedding(name, table),
            )
        )
    return stages


def fusion_stages(preset: str, catalogue: Catalogue) -> list[Stage]:
    """Fusion of all embeddings that there are; the model that prices other tables is fitted on all rows."""
    use: tuple[str, ...] = ()
    names: tuple[str, ...] = (CLIP_IMAGE, SIGLIP_IMAGE, SIGLIP_TEXT, QWEN_TEXT)
    if not catalogue.has_pictures:
        names = (SIGLIP_TEXT, QWEN_TEXT)
        facts = (TABULAR,) if catalogue.has_features else ()
        use = ("--use", *names, *facts)
    protocol = ("--folds", "5", "--seeds", "3") if preset == "best" else ("--refit",)
    of_train = tuple(file for name in names for file in embedding(name, "train"))
    stages = [
        Stage(
            "fusion.all_embeddings.train",
            (*_stage_preset(preset), *protocol, *use),
            reads=(*prepared("train"), "data/folds.csv", *of_train),
            writes=(*run_files(FUSION_RUN), *predictions(FUSION_RUN, "train")),
        )
    ]
    if "test" in catalogue.tables:
        of_test = tuple(file for name in names for file in embedding(name, "test"))
        stages.append(
            Stage(
                "fusion.all_embeddings.predict",
                ("test", "--run", FUSION_RUN),
                reads=(*prepared("test"), *of_test, *weights(FUSION_RUN)),
                writes=predictions(FUSION_RUN, "test"),
            )
        )
    return stages


def word_stages(preset: WordModels, catalogue: Catalogue) -> dict[str, Stage]:
    """The word models, by the name of their predictions."""
    tables = catalogue.tables
    embedded = ("--embeddings", *preset.embeddings) if preset.embeddings else ()
    files = tuple(file for name in preset.embeddings for file in embedding(name, *tables))
    stages = {}
    for model, flags in preset.models:
        name = WordModelSettings(model=model, embeddings=preset.embeddings).prediction_name  # type: ignore[arg-type]
        stages[name] = Stage(
            "word_models.train",
            ("--model", model, *flags, *embedded),
            reads=(*prepared(*tables), "data/folds.csv", *files),
            writes=(*run_files(name), *predictions(name, *tables)),
        )
    return stages


def ensemble_stage(members: Iterable[str], catalogue: Catalogue) -> Stage:
    """The weighted mean of all members, which prices the test table."""
    members = tuple(members)
    tables = catalogue.tables
    outputs = ("test_out.csv", "test_intervals.csv") if "test" in tables else ()
    return Stage(
        "ensemble.train",
        ("--members", *members),
        reads=(
            *prepared(*tables),
            "data/folds.csv",
            *(file for name in members for file in predictions(name, *tables)),
        ),
        writes=(
            "checkpoints/ensemble/*.json",
            *predictions("ensemble", *tables),
            *outputs,
        ),
    )
