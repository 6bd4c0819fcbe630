"""The rule by which a stage runs again, and what the pipeline remembers for it. pipeline/README.md explains the rule.

pipeline.json              one entry per finished stage: its settings, and what it read and wrote
pipeline_unfinished.json   the same of the stage that is running, or was when the pipeline was interrupted

Files are compared by the sha256 of their content, pictures by name, size and time of their last change, because reading
every picture would take longer than some stages do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contracts.files import read_json, sha256_file, sidecar_of, write_json
from contracts.workspace import Workspace
from pipeline.stage_settings import resolved_settings
from pipeline.stages import PICTURES, Stage
from training.run_folder import MARKER

UNFINISHED = "pipeline_unfinished.json"
PRETRAINED = ("model", "tokenizer", "pretrained", "image_model", "text_model")
"""Settings that may name a local folder or file, whose content is an input then."""
CHOSEN_LATER = "auto"
"""Value of a setting that a run stores as what it turned out to be."""


class Journal:
    """What ran in this workspace before, and what has run since.

    Args:
        resume: remember what an earlier call did; without it, every stage runs.
    """

    def __init__(self, root: Path, *, resume: bool):
        self.root = root
        self.path = Workspace(root).path("stages")
        self.unfinished_path = root / UNFINISHED
        self.earlier: dict[str, dict[str, Any]] = {}
        self.unfinished: dict[str, Any] | None = None
        if resume and self.path.is_file():
            self.earlier = {entry["stage"]: entry for entry in read_json(self.path)}
        if resume and self.unfinished_path.is_file():
            self.unfinished = read_json(self.unfinished_path)
        self.entries: list[dict[str, Any]] = []

    def before(self, stage: Stage) -> dict[str, Any]:
        """What decides the results of a stage, as it is now: its settings, its processes and what it reads."""
        settings = resolved_settings(stage)
        pretrained = [str(path.resolve()) for path in local_models(settings)]
        return {
            "stage": stage.name,
            "settings": settings,
            # a step of the optimizer sees more rows with more processes
            "processes": stage.processes,
            "read": contents(self.root, (*stage.reads, *pretrained)),
        }

    def is_current(self, stage: Stage, before: dict[str, Any]) -> bool:
        """Whether the stage ran before with these settings and inputs, and what it wrote is still there."""
        entry = self.earlier.get(stage.name)
        if entry is None or not _same(entry, before):
            return False
        # files that came later, such as a plot of another command, do not matter
        now = contents(self.root, stage.writes)
        wrote = entry["wrote"]
        return all(now.get(file) == digest for file, digest in wrote.items()) and bool(
            wrote or not stage.writes
        )

    def can_continue(self, before: dict[str, Any]) -> bool:
        """Whether this very stage was interrupted and left a run that its own --resume continues."""
        if self.unfinished is None or not _same(self.unfinished, before):
            return False
        settings = before["settings"]
        if "run" not in settings:
            return False
        folder = Workspace(self.root).path("run", name=settings["run"])
        return is_unfinished_run(folder, settings)

    def keep(self, stage: Stage) -> None:
        """The stage is current: its entry stays."""
        self.entries.append(self.earlier[stage.name])

    def start(self, stage: Stage, before: dict[str, Any]) -> None:
        """Note what the stage is about to read: what changes while it runs must count as changed."""
        self._discard_changed_outputs(stage)
        write_json(self.unfinished_path, before)

    def _discard_changed_outputs(self, stage: Stage) -> None:
        """Remove what is not as the stage wrote it: it might take a damaged file for its own and leave it."""
        now = contents(self.root, stage.writes)
        for name, digest in self.earlier.get(stage.name, {}).get("wrote", {}).items():
            if now.get(name) != digest and not name.startswith(PICTURES):
                path = self.root / name
                path.unlink(missing_ok=True)
                sidecar_of(path).unlink(missing_ok=True)

    def finish(self, stage: Stage, before: dict[str, Any], *, seconds: float, peak_mb: int) -> None:
        """Note that the stage has finished, what it took and what it wrote."""
        entry = {
            "stage": stage.name,
            "seconds": round(seconds, 1),
            "peak_mb": peak_mb,
            **before,
            "wrote": contents(self.root, stage.writes),
        }
        self.entries.append(entry)
        # stages of an earlier call that come later are kept for now: they may still be current
        done = {entry["stage"] for entry in self.entries}
        later = [entry for name, entry in self.earlier.items() if name not in done]
        write_json(self.path, self.entries + later)
        self.unfinished_path.unlink()

    def close(self) -> None:
        """All stages are done: what earlier calls with other settings did is forgotten."""
        write_json(self.path, self.entries)


def _same(entry: dict[str, Any], before: dict[str, Any]) -> bool:
    return all(entry.get(key) == value for key, value in before.items())


def local_models(settings: dict[str, Any]) -> list[Path]:
    """The pretrained models that a stage starts from and that lie on this disk."""
    named = [settings[name] for name in PRETRAINED if settings.get(name)]
    paths = [Path(value).expanduser() for value in named]
    return [path for path in paths if path.exists()]


def is_unfinished_run(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a training with these settings was interrupted in this run folder."""
    stored = folder / "settings.json"
    if not stored.is_file() or (folder / MARKER).exists():
        return False
    started_with = read_json(stored)
    fixed = {name: value for name, value in settings.items() if value != CHOSEN_LATER}
    return all(started_with.get(name) == value for name, value in fixed.items())


def contents(root: Path, patterns: Sequence[str]) -> dict[str, str]:
    """A fingerprint of everything that the patterns match, by path; of pictures one for each table.

    Args:
        patterns: glob patterns below the workspace, absolute paths of files or folders, or pictures of a table.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        if pattern.startswith(PICTURES):
            found |= _pictures(Workspace(root), pattern)
            continue
        path = Path(pattern)
        files = [path, *path.rglob("*")] if path.is_absolute() else root.glob(pattern)
        for file in files:
            if file.is_file():
                # a workspace may be moved: its own files are known by where they lie in it
                name = file.relative_to(root) if file.is_relative_to(root) else file
                found[str(name)] = sha256_file(file)
    return dict(sorted(found.items()))


def _pictures(workspace: Workspace, pattern: str) -> dict[str, str]:
    """One fingerprint of all pictures that a table names; none while the table is not prepared."""
    table = pattern.removeprefix(PICTURES)
    if not workspace.path("prepared", split=table).is_file():
        return {}
    folder = workspace.images_folder()
    digest = hashlib.sha256()
    for name in workspace.prepared(table)["image"].unique():
        path = folder / name
        if name and path.is_file():
            status = path.stat()
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {pattern: digest.hexdigest()}
