"""The settings of each stage: what --set may change, and what a stage will run with.

A stage's config.py is the only place that knows its settings. Every command line of the pipeline is read by that
stage's own parser before the first stage starts, so a wrong flag costs no hours.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import io
import typing
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

from contracts.errors import InputError
from pipeline.stages import Stage
from training.run_folder import CHANGE_NOTHING
from training.settings import parse_settings, settings_as_dict

PLANNED = {
    "workspace", "run", "resume", "data", "input", "table", "columns", "features", "decimal", "currency",
    "embedding", "embeddings", "predictions", "members", "out",
}  # fmt: skip
"""Settings that decide which files a stage reads and writes; the pipeline sets them itself."""


@dataclass(frozen=True)
class Command:
    """Where the settings of a command are defined."""

    module: str
    settings: str
    """name of the dataclass in it"""
    presets: str = ""
    """name of its presets, if there are any"""
    has_table: bool = False
    """whether the name of a table comes first"""


COMMANDS = {
    "data.prepare": Command("data.prepare", "PrepareSettings"),
    "data.download_images": Command("data.download_images", "DownloadSettings"),
    "clip_finetune.train": Command("clip_finetune.config", "ClipSettings", "PRESETS"),
    "clip_finetune.extract_embeddings": Command("clip_finetune.config", "ExtractSettings", has_table=True),
    "siglip_extract.extract_embeddings": Command(
        "siglip_extract.config", "Settings", "PRESETS", has_table=True
    ),
    "qwen3_finetune.train": Command("qwen3_finetune.config", "QwenSettings", "PRESETS"),
    "qwen3_finetune.extract_embeddings": Command("qwen3_finetune.config", "ExtractSettings", has_table=True),
    "fusion.all_embeddings.train": Command(
        "fusion.all_embeddings.config", "AllEmbeddingsSettings", "PRESETS"
    ),
    "fusion.all_embeddings.predict": Command("fusion.config", "PredictSettings", has_table=True),
    "word_models.train": Command("word_models.config", "WordModelSettings"),
    "ensemble.train": Command("ensemble.config", "EnsembleSettings"),
}


def settings_class(stage: Stage) -> type | None:
    """The dataclass of a stage's settings; None for a command that is not part of any preset."""
    command = COMMANDS.get(stage.module)
    return getattr(importlib.import_module(command.module), command.settings) if command else None


def with_settings(stages: Sequence[Stage], entries: Sequence[str]) -> list[Stage]:
    """The stages with the flags that --set adds to them.

    Args:
        entries: such as fusion.loss=huber. What stands before the last point is a stage's folder or one of its
            commands; the flag goes to each of them that has it.

    Raises:
        InputError: an entry names no stage or setting of this pipeline, or one that the pipeline sets itself.
    """
    changed = list(stages)
    for entry in entries:
        target, equals, value = entry.partition("=")
        folder, _, name = target.rpartition(".")
        name = name.replace("-", "_")
        if not (equals and folder and name):
            raise InputError(
                f"--set {entry}: write <stage>.<setting>=<value>, such as qwen3_finetune.epochs=2"
            )
        of_folder = [
            place for place, stage in enumerate(changed) if f"{stage.module}.".startswith(f"{folder}.")
        ]
        if not of_folder:
            folders = sorted({stage.module.split(".")[0] for stage in changed})
            raise InputError(
                f"--set {entry}: this pipeline has no stage {folder}; it has {', '.join(folders)}"
            )
        fields = {place: _fields(changed[place]) for place in of_folder}
        having = [place for place in of_folder if name in fields[place]]
        if not having:
            known = sorted(set().union(*fields.values()))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise InputError(f"--set {entry}: {folder} has no setting {name}; {hint}")
        is_choice_of_words = name == "model" and changed[having[0]].module == "word_models.train"
        if name in PLANNED or is_choice_of_words:
            raise InputError(
                f"--set {entry}: the pipeline sets {name} itself; run the stage by hand to change it"
            )
        for place in having:
            stage = changed[place]
            flag = _flag(entry, name, value, fields[place][name])
            changed[place] = replace(stage, arguments=(*stage.arguments, *flag))
    return changed


def _fields(stage: Stage) -> dict[str, Any]:
    """Type of each setting of a stage, by name."""
    found = settings_class(stage)
    return typing.get_type_hints(found) if found else {}


def _flag(entry: str, name: str, value: str, kind: Any) -> list[str]:
    """The arguments that give a setting this value."""
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        if value not in ("true", "false"):
            raise InputError(f"--set {entry}: {name} is true or false")
        return [flag] if value == "true" else [flag.replace("--", "--no-", 1)]
    if typing.get_origin(kind) is tuple:
        return [flag, *value.split(",")]
    return [f"{flag}={value}"]


def require_valid(stages: Sequence[Stage]) -> None:
    """Raise InputError for a stage whose own parser refuses its arguments."""
    for stage in stages:
        resolved_settings(stage)


def resolved_settings(stage: Stage) -> dict[str, Any]:
    """What a stage runs with, defaults and presets included, less what does not decide its results.

    An edited default in a config.py therefore counts as a changed setting.

    Raises:
        InputError: the stage's own parser refuses the arguments.
    """
    found = settings_class(stage)
    if found is None:
        return {}
    command = COMMANDS[stage.module]
    presets = getattr(importlib.import_module(command.module), command.presets) if command.presets else None
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed = parse_settings(
                found,
                list(stage.arguments),
                description="",
                presets=presets,
                positional={"table": None} if command.has_table else None,
            )
    except SystemExit:  # how a parser refuses: the usage, and the reason behind "error:"
        reason = said.getvalue().rpartition("error: ")[2]
        raise InputError(f"{stage.module}: {' '.join(reason.split())}") from None
    except InputError as error:
        raise InputError(f"{stage.module}: {error}") from None
    settings = parsed[0] if command.has_table else parsed
    assert dataclasses.is_dataclass(settings)
    stored = settings_as_dict(settings)
    return {name: value for name, value in stored.items() if name not in CHANGE_NOTHING}
