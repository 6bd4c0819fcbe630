"""The parts behind an ensemble, opened for pricing: its members, and the encoders whose embeddings they read.

A saved system is a folder that has the layout of a workspace. An exported folder (`pricing.export`) has the same layout
and lacks what pricing does not need, so there is one way to open both.

Legend: N rows.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from contracts.embeddings import Embeddings
from contracts.errors import InputError
from contracts.files import read_json, sidecar_of, write_json
from contracts.smape import SMALLEST_PRICE
from contracts.workspace import Workspace
from ensemble.saved import Member
from training.sealed import MARKER, note_change

if TYPE_CHECKING:
    import pandas as pd

PRETRAINED = "pretrained"
"""Folder in an exported run: the pretrained model that an encoder starts from, if that was a local folder."""


class Encoder(Protocol):
    """A stage's encoder, opened."""

    meta: dict[str, Any]
    """what its embeddings say of it; `checkpoint` identifies its weights"""

    def encode(self, prepared: pd.DataFrame, images: Path | None) -> Embeddings:
        """Embeddings (N, D_in) of prepared rows, in their order."""


class Pricer(Protocol):
    """A member of the ensemble, opened."""

    embeddings: tuple[str, ...]
    """names of the embedding files that it reads"""
    encoders: dict[str, str]
    """the `checkpoint` of the encoder that it was trained on, by the name of the embedding, where the run says so"""

    def ln_price(self, rows: pd.DataFrame, embeddings: dict[str, Embeddings]) -> np.ndarray:
        """ln of dollars (N,) for prepared rows and their embeddings."""


class WordPricer:
    """A model of `word_models`."""

    def __init__(self, folder: Path):
        from word_models.saved import WordModel

        self.model = WordModel.load(folder)
        self.embeddings = tuple(self.model.embeddings)
        self.encoders = {name: encoder["checkpoint"] for name, encoder in self.model.embeddings.items()}

    def ln_price(self, rows: pd.DataFrame, embeddings: dict[str, Embeddings]) -> np.ndarray:
        return self.model.predict(rows, {name: embeddings[name] for name in self.embeddings})


class FusionPricer:
    """A model of one of the fusion packages; where a run has a model of all rows, that one."""

    def __init__(self, folder: Path, stage: str, device: str):
        from importlib import import_module

        from fusion.config import EvaluateSettings
        from fusion.finished import load_for_new_rows

        package = import_module(f"{stage}.config").PACKAGE
        applied = EvaluateSettings(workspace=folder.parents[1], run=folder.name, device=device)
        self.trained = load_for_new_rows(package, applied)
        self.encoders = self.trained.inputs["encoders"]
        self.embeddings = tuple(self.encoders)

    def ln_price(self, rows: pd.DataFrame, embeddings: dict[str, Embeddings]) -> np.ndarray:
        own = {name: embeddings[name] for name in self.embeddings}
        log_price = self.trained.log_price(self.trained.table_of(rows, own))
        return np.log(np.maximum(np.expm1(log_price), SMALLEST_PRICE))


class TextPricer:
    """The price head of `qwen3_finetune`; of an out-of-fold run that of the encoder of all rows."""

    def __init__(self, folder: Path, device: str):
        self.encoder = open_text_encoder(folder, device, name=folder.name)
        self.embeddings: tuple[str, ...] = ()
        self.encoders: dict[str, str] = {}

    def ln_price(self, rows: pd.DataFrame, embeddings: dict[str, Embeddings]) -> np.ndarray:
        log_price = self.encoder.log_price(rows).astype(np.float64)
        return np.log(np.maximum(np.expm1(log_price), SMALLEST_PRICE))


def open_member(root: Path, member: Member, device: str) -> Pricer:
    """Open a member's run.

    Raises:
        InputError: there is no finished run, or its stage has no model that prices new rows.
    """
    folder = Workspace(root).path("run", name=member.run)
    if not (folder / MARKER).is_file():
        raise InputError(
            f"{folder}: the run of the ensemble's member {member.name} is missing; train it again"
        )
    if member.stage.startswith("word_models"):
        return WordPricer(folder)
    if member.stage in ("fusion.all_embeddings", "fusion.qwen_clip"):
        return FusionPricer(folder, member.stage, device)
    if member.stage == "qwen3_finetune":
        return TextPricer(folder, device)
    raise InputError(
        f"member {member.name}: stage {member.stage} has no saved model that prices new products; "
        "run ensemble.train without it"
    )


@dataclass(frozen=True)
class EncoderSource:
    """Which encoder made an embedding file, as the json beside the file says."""

    name: str
    """of the embedding file"""
    stage: str
    """clip_finetune, siglip_extract or qwen3_finetune"""
    run: str | dict[str, Any]
    """run folder under checkpoints/; of a frozen SigLIP tower the arguments that open it"""
    meta: dict[str, Any]
    """of the file, everything that the json says"""

    @classmethod
    def read(cls, root: Path, name: str) -> EncoderSource:
        """Raises InputError where nothing says what made the embedding."""
        path = sidecar_of(Workspace(root).path("embeddings", name=name, split="train"))
        if not path.is_file():
            raise InputError(
                f"{path}: missing, and only this file says which encoder made the embedding {name}"
            )
        meta = read_json(path)
        if "run" not in meta:
            raise InputError(f"{path}: does not name the encoder's run; extract the embedding again")
        return cls(name, _stage_of(meta), meta["run"], meta)

    @property
    def reads_pictures(self) -> bool:
        return self.stage == "clip_finetune" or (isinstance(self.run, dict) and self.run["kind"] == "image")

    @property
    def named_columns(self) -> int:
        """How many columns at the end have names, such as a log price, and are no part of the meaning."""
        return len(self.meta.get("last_columns", ()))

    def open(self, root: Path, device: str) -> Encoder:
        """The stage's encoder, with its weights.

        Raises:
            InputError: the run or the model behind the embedding is missing.
        """
        if isinstance(self.run, dict):
            from siglip_extract.encoder import Encoder as Tower

            folder = Workspace(root).path("run", name="siglip_extract")
            brought_along = folder / f"{PRETRAINED}_{self.run['kind']}"
            model = str(brought_along) if brought_along.is_dir() else self.run["model"]
            tower = Tower.open(**{**self.run, "model": model}, folder=folder, device=device)
            # members know the encoder by the run that they were trained with, wherever its weights lie now
            tower.meta["run"] = self.run
            return tower
        run_folder = Workspace(root).path("run", name=self.run)
        if not (run_folder / MARKER).is_file():
            raise InputError(f"{run_folder}: the encoder of the embedding {self.name} is missing")
        if self.stage == "clip_finetune":
            from clip_finetune.encoder import Encoder as ImageEncoder

            return ImageEncoder.open(run_folder, name=self.name, device=device)
        return open_text_encoder(run_folder, device, name=self.name)


def local_model(settings: dict[str, Any]) -> Path | None:
    """The pretrained model that an encoder starts from, if it is a local folder rather than one of the hub.

    `settings`: those of a run of qwen3_finetune, or the arguments that open a SigLIP tower.
    """
    folder = Path(settings["model"]).expanduser()
    return folder if folder.is_dir() and not settings["random_weights"] else None


def open_text_encoder(run_folder: Path, device: str, *, name: str) -> Any:
    """The encoder of a run of `qwen3_finetune`; `name` is that of its embeddings."""
    from qwen3_finetune.encoder import Encoder as TextEncoder

    pretrained = run_folder / PRETRAINED
    if not pretrained.is_dir():
        return TextEncoder.open(run_folder, name=name, device=device)
    # the run's settings name the folder that the model had in training, so they are read from a corrected copy
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / run_folder.name
        for file in run_folder.rglob("*"):
            link = copy / file.relative_to(run_folder)
            if not file.is_file() or file.is_relative_to(pretrained):
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            if file.name == "settings.json":
                write_json(link, {**read_json(file), "model": str(pretrained.resolve())})
            elif file.name == MARKER:
                shutil.copy(file, link)
            else:
                link.symlink_to(file.resolve())
        for settings in copy.rglob("settings.json"):
            note_change(settings)
        return TextEncoder.open(copy, name=name, device=device)


def _stage_of(meta: dict[str, Any]) -> str:
    """The stage that wrote an embedding file. Older files do not name it, but each has a key of its own."""
    if "stage" in meta:
        return str(meta["stage"])
    own_keys = {"pooling": "qwen3_finetune", "normalised": "clip_finetune"}
    for key, stage in own_keys.items():
        if key in meta:
            return stage
    raise InputError(
        f"embedding {meta.get('name')}: its meta does not say which stage made it; extract it again"
    )
