"""The run folder: what a training run leaves behind, and how an interrupted one continues.

checkpoints/<run>/settings.json    the resolved settings
                  manifest.json    versions, seed, command, git state, hardware, sha256 of the inputs
                  metrics.jsonl    one line per logged step
                  step_00000120/   weights and training state; its COMPLETE file is written last
                  model.safetensors, …  the finished model
                  COMPLETE         sha256 of the model's files, written last of all (`training.sealed`)
checkpoints/<run>.previous/        the finished run that this one replaced, or is about to replace

The folder of an out-of-fold run holds settings.json, manifest.json, summary.json and COMPLETE, and one run folder for
each of its models: fold_0, fold_1, … for the hold-outs and `all` for the model of all rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import InputError
from contracts.files import atomic_write, read_json, sha256_file, write_json
from training.run_lock import has_lock_file, lock_run, release_run
from training.sealed import MARKER, damage, is_unchecked, remove_sealed, require_whole, seal
from training.settings import settings_as_dict
from training.trackers import require_tracker, start_tracker
from training.weights import disk_errors, read_weights, save_weights, usual_mode

if TYPE_CHECKING:
    import torch
    from accelerate.tracking import GeneralTracker

CHANGE_NOTHING = {
    "workspace", "resume", "report_to", "workers", "device", "save_steps", "save_epochs", "checkpoint_steps",
    "tokens_per_batch",
}  # fmt: skip
"""Settings that do not decide what a run learns. The tables of a workspace do, and their hashes are compared."""
MAY_GROW = {"epochs"}
"""Settings that an interrupted run may be continued with another value of."""
_PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "open_clip_torch", "numpy",
)  # fmt: skip


PREVIOUS = ".previous"
"""Ending of the name under which the finished run before is kept."""


class Diverged(InputError):
    """A number that training or validation computed is NaN or infinite; a run never recovers from it."""


class RunFolder:
    """One training run on disk. Open it with `RunFolder.start` to train and `RunFolder.finished` to read."""

    def __init__(self, path: Path):
        self.path = path
        self._tracker: GeneralTracker | None = None

    @classmethod
    def start(
        cls, path: Path, settings: Any, *, inputs: list[Path], resume: bool = False, report_to: str = "none"
    ) -> RunFolder:
        """Begin a run, or continue it with `resume`.

        Without `resume`, a finished run that the folder held is kept beside it as <run>.previous, and an unfinished one
        is removed.

        Args:
            inputs: files whose content decides what is learned.
            report_to: tracker that receives the metrics, see `training.trackers`.

        Raises:
            InputError: a resumed run was started with other settings or other input files, another process trains into
                the folder, or there is no such tracker.
        """
        require_tracker(report_to)  # before anything is removed
        if path.name.endswith(PREVIOUS):
            raise InputError(
                f"{path}: a name that ends in {PREVIOUS} is for the finished run before; choose another"
            )
        run = cls(path)
        stored = settings_as_dict(settings)
        manifest = {
            **_environment(stored.get("seed")),
            "inputs": {str(file): sha256_file(file) for file in inputs},
        }
        lock_run(run._outermost())
        if resume and (path / "settings.json").is_file():
            run._check_same(settings, manifest["inputs"])
        else:
            run._make_way()
            write_json(path / "manifest.json", manifest)
        if not run.complete:  # the files of a finished run stay as they were hashed
            write_json(path / "settings.json", stored)
        if report_to != "none":
            run._tracker = start_tracker(report_to, path, run.name, stored)
        return run

    @classmethod
    def finished(cls, path: Path, stage: str) -> RunFolder:
        """Open a finished run for reading.

        Raises:
            InputError: there is none; the message has the command that would make it. Or a file of it was damaged.
        """
        run = cls(path)
        if not run.complete:
            previous = run._previous()
            before = f", or use the finished run before it, {previous.name}" if previous.complete else ""
            raise InputError(f"{path}: no finished run; run python -m {stage}.train{before}")
        require_whole(path)
        return run

    @property
    def complete(self) -> bool:
        return (self.path / MARKER).is_file()

    @property
    def name(self) -> str:
        """What the run is called in its workspace; one model of an out-of-fold run is called such as oof/fold_0."""
        return f"{self.path.parent.name}/{self.path.name}" if self._is_part else self.path.name

    @property
    def _is_part(self) -> bool:
        return (self.path.parent / "settings.json").is_file()

    def _outermost(self) -> Path:
        """The run that this one is a part of, or a part of a part; itself where it is none."""
        return RunFolder(self.path.parent)._outermost() if self._is_part else self.path

    def _previous(self) -> RunFolder:
        return RunFolder(self.path.with_name(self.path.name + PREVIOUS))

    def _make_way(self) -> None:
        """Keep a finished run aside, so that a model is there whatever becomes of the new training."""
        if self.complete and not self._is_part:
            previous = self._previous()
            remove_sealed(previous.path)
            self.path.rename(previous.path)
            print(f"{self.path}: the finished run is kept as {previous.path.name}")
        else:
            remove_sealed(self.path)

    @property
    def is_out_of_fold(self) -> bool:
        """Whether the run has one model per hold-out. (A model of all rows may also lie beside a single one.)"""
        if (self.path / part_folder(0)).is_dir():
            return True
        # the model of all rows prices new products by itself, so the others may have been left out of a copy
        stored = self.path / "settings.json"
        whole = self.path / part_folder(None)
        return whole.is_dir() and stored.is_file() and bool(read_json(stored).get("folds"))

    def already_complete(self, resume: bool, settings: Any = None, inputs: Sequence[Path] = ()) -> bool:
        """Whether `resume` has nothing left to do; the first process says so in one line.

        Args:
            settings, inputs: of the command that asks. None compares nothing.

        Raises:
            InputError: the finished run had other settings or other input files.
        """
        if not (resume and self.complete):
            return False
        if settings is not None:
            self._check_same(settings, {str(file): sha256_file(file) for file in inputs})
        if _is_first_process():
            if any(self.path.glob("step_*")) or has_lock_file(self.path):
                self._clean_up()  # the program was killed before it could
            print(f"{self.path}: this run is complete; leave --resume out to train it again")
        return True

    def settings(self, settings_class: type) -> Any:
        """The settings that the run was started with, also those of an older version of the program.

        Raises InputError for a setting that this version does not know: a newer one wrote it.
        """
        stored = _renamed(read_json(self.path / "settings.json"), settings_class)
        known = {field.name for field in dataclasses.fields(settings_class)}
        if unknown := sorted(stored.keys() - known):
            raise InputError(
                f"{self.path}: made by another version of this program ({', '.join(unknown)} is not known here); "
                "train it again with this one"
            )
        return settings_class(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
        )

    def log(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl. A value that is not finite ends the run: it never gets better."""
        for name, value in values.items():
            require_finite(value, name=name, run=self.path.name, step=step)
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tracker is not None:
            self._tracker.log(values, step=step)

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; one that a killed process left half written at its end is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        logged = []
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                logged.append(json.loads(line))
            except ValueError:
                raise InputError(
                    f"{path}: line {len(logged) + 1} is not JSON; the file is damaged, remove that line"
                ) from None
        return logged

    def save_checkpoint(
        self, step: int, weights: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2
    ) -> None:
        """Write step_<step>/ with the hashes of its files last, then drop all but the newest `keep`.

        Args:
            weights: tensors that are trained, by name.
            state: optimizer, scheduler, random generators and counters; only what torch.load(weights_only=True) reads.
        """
        import torch

        folder = self.path / f"step_{step:08d}"
        remove_sealed(folder)
        folder.mkdir(parents=True)
        try:
            save_weights(folder / "weights.safetensors", weights)
            with disk_errors(folder), open(folder / "state.pt", "wb") as file:
                torch.save(state, file)
            seal(folder)
        except OSError:
            remove_sealed(folder)  # on a full disk, half a checkpoint would only be in the way
            raise
        for old in self._checkpoints()[:-keep]:
            remove_sealed(old)

    def newest_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Weights and state (on the CPU) of the newest checkpoint that is whole; None where there is none.

        A damaged one is passed over, with one line that says so. What was logged after the checkpoint is dropped.
        """
        for folder in reversed(self._checkpoints()):
            try:
                checkpoint = _read_checkpoint(folder)
            except InputError as error:
                if _is_first_process():
                    print(f"{error}; the checkpoint before it is taken")
                continue
            self._forget_after(int(folder.name.removeprefix("step_")))
            return checkpoint
        self._forget_after(-1)
        return None

    def _forget_after(self, step: int) -> None:
        """Drop what was logged after a step. One process does: all of them may ask for the checkpoint."""
        path = self.path / "metrics.jsonl"
        if not _is_first_process() or not path.is_file():
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        with atomic_write(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def finish(self, **summary: object) -> None:
        """Write summary.json, give every file the usual permissions, mark the run complete and drop its checkpoints.

        Killed at any point, it can be called again.
        """
        write_json(self.path / "summary.json", summary)
        for file in self.path.rglob("*"):
            if file.is_file():
                file.chmod(usual_mode())
        if self._tracker is not None:
            self._tracker.finish()
        seal(self.path)
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove the checkpoints and the lock of a complete run."""
        if not self._is_part:
            lock_run(self.path)
        for folder in self.path.glob("step_*"):
            remove_sealed(folder)
        if not self._is_part:  # the lock of a part is that of the whole run
            release_run(self.path)

    def _checkpoints(self) -> list[Path]:
        return sorted(folder for folder in self.path.glob("step_*") if (folder / MARKER).is_file())

    def _check_same(self, settings: Any, inputs: dict[str, str]) -> None:
        # read as settings, so that names and values of an older version count as today's
        stored = settings_as_dict(self.settings(type(settings)))
        wanted = settings_as_dict(settings)
        may_differ = CHANGE_NOTHING if self.complete else CHANGE_NOTHING | MAY_GROW
        remedy = "leave --resume out to train it again, or give it another name with --run"
        for name in sorted(wanted.keys() - may_differ):
            if stored.get(name) != wanted[name]:
                raise InputError(
                    f"--resume: {name} was {stored.get(name)!r} when {self.name} started and is {wanted[name]!r} now; "
                    + remedy
                )
        for file, digest in read_json(self.path / "manifest.json")["inputs"].items():
            if digest not in inputs.values():  # the workspace may have moved, so paths are not compared
                raise InputError(f"--resume: {file} has changed since {self.name} started; {remedy}")


def _read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Raises InputError for one whose files are not as they were written."""
    import torch

    if found := damage(folder):
        raise InputError(found)
    try:
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        return read_weights(folder / "weights.safetensors"), state
    except Exception as error:
        # the hashes fit, so only a checkpoint of an older version, which has none, can be damaged here
        if not is_unchecked(folder):
            raise
        raise InputError(f"{folder}: not readable ({str(error).splitlines()[0]})") from None


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def part_folder(holdout: int | None) -> str:
    """Where one model of an out-of-fold run lies in its run folder; None is the model of all rows."""
    return "all" if holdout is None else f"fold_{holdout}"


def require_finite(value: object, *, name: str = "loss", run: str, step: int) -> None:
    """Raise Diverged for a float that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        written = "NaN" if math.isnan(value) else str(value)
        raise Diverged(f"{run}: {name} is {written} at step {step}; lower --lr or use --precision fp32")


def _renamed(stored: dict[str, Any], settings_class: type) -> dict[str, Any]:
    """Stored settings under today's names: a settings class lists its old names in RENAMED, None for a dropped one."""
    renamed = getattr(settings_class, "RENAMED", {})
    known = {field.name for field in dataclasses.fields(settings_class)}
    now = {}
    for name, value in stored.items():
        new_name = renamed.get(name, name) if name not in known else name
        if new_name is not None:
            now[new_name] = value
    return now


def _environment(seed: int | None) -> dict[str, Any]:
    import torch

    return {
        "command": " ".join(sys.argv),
        "seed": seed,
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_state() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def random_state() -> dict[str, Any]:
    """State of torch's generators, to store in a checkpoint; the data order is derived from seed and epoch."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
