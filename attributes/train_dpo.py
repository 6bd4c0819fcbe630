"""Train the SFT policy on pairs of its own chains, with DPO against its frozen self.

    python -m attributes.train_dpo --sft attributes_sft --listings unlabelled.csv --workspace OUT
    torchrun --nproc_per_node 4 -m attributes.train_dpo …

config.py holds every setting, pairs.py says how pairs are made, loop.py holds loss and training loop. --resume
continues an interrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attributes.config import DPO_PRESETS, DpoSettings
from contracts.errors import InputError, run_entry_point
from contracts.files import read_json, write_json
from contracts.workspace import Workspace
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from attributes.loop import Imitation, Preference, Training
    from attributes.model import VisionLanguage
    from attributes.pairs import Preferences

REFERENCE = "reference.json"


def build_objective(
    settings: DpoSettings, language: VisionLanguage, preferences: Preferences
) -> Preference | Imitation:
    """What is minimised. Raises InputError where there is nothing to learn from."""
    from attributes.loop import Imitation, Preference
    from attributes.pairs import Example

    pairs = preferences.pairs
    if not pairs:
        raise InputError(
            f"no preference pairs ({preferences.describe()}): the chains agree everywhere or nowhere; "
            "raise --temperature of sample_chains or lower --min-consistency"
        )
    shown = [pair.question.listing for pair in pairs]
    shown += [example.question.listing for example in preferences.unanimous]
    language.show(name for listing in shown for name in language.pictures_of(listing))
    if settings.objective == "self_learning":
        imitated = [Example(pair.question, pair.preferred.ids) for pair in pairs]
        return Imitation(language, [*imitated, *preferences.unanimous])
    weights = np.ones(len(pairs))
    if settings.weight == "confidence":
        weights = np.array([pair.consistency for pair in pairs])
    return Preference(
        language,
        pairs,
        beta=settings.beta,
        weights=weights,
        unanimous=preferences.unanimous if settings.unanimous == "sft" else (),
        sft_weight=settings.sft_weight,
    )


def attach_reference(
    training: Training, objective: Preference, folder: Path, sft_adapter: str, resume: bool
) -> None:
    """Compute what the policy says before any training, or read it where a resumed run has stored it.

    Raises InputError for stored numbers of another policy.
    """
    import torch

    from attributes.loop import Reference

    path = folder / REFERENCE
    if resume and path.is_file():
        stored = read_json(path)
        if stored["adapter"] != sft_adapter:
            raise InputError(f"{path}: computed with another SFT run; train it again without --resume")
        objective.reference = Reference(
            torch.tensor(stored["preferred"], dtype=torch.float32),
            torch.tensor(stored["dispreferred"], dtype=torch.float32),
        )
        return
    objective.reference = training.compute_reference(objective)
    if training.accelerator.is_main_process:
        write_json(
            path,
            {
                "adapter": sft_adapter,
                "preferred": objective.reference.preferred.tolist(),
                "dispreferred": objective.reference.dispreferred.tolist(),
            },
        )
    training.accelerator.wait_for_everyone()


def build_training(
    settings: DpoSettings,
    language: VisionLanguage,
    objective: Preference | Imitation,
    run: RunFolder,
    accelerator: Accelerator,
) -> Training:
    from attributes.loop import Training, steps_per_epoch

    per_epoch = steps_per_epoch(objective.items, settings, accelerator.num_processes)
    steps = settings.max_steps or settings.epochs * per_epoch
    return Training(settings, language, objective, run, accelerator, lr=settings.lr, steps=steps)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(DpoSettings, argv, description=__doc__.split("\n")[0], presets=DPO_PRESETS)
    workspace = Workspace(settings.workspace)
    sft = RunFolder.finished(workspace.path("run", name=settings.sft), "attributes.train_sft").path
    folder = workspace.path("run", name=settings.run)
    from attributes.data import read_listings, read_seen, write_seen
    from attributes.loop import Preference, warn_of_steady_fall
    from attributes.model import SCHEMA_FILE, adapter_hash, open_run, save_adapter
    from attributes.pairs import build_preferences
    from attributes.schema import Schema
    from attributes.shards import chains_folder, read_chains
    from training.device import build_accelerator, choose_device
    from training.plots import plot_training_curves

    table = read_listings(settings, Schema.read(str(sft / SCHEMA_FILE)))
    chains = chains_folder(settings.workspace, settings.sft, table.name, settings.round)
    inputs = [sft / "adapter" / "adapter_model.safetensors", *sorted(chains.glob("*.jsonl"))]
    if RunFolder(folder).already_complete(settings.resume, settings, inputs):
        return
    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    language, schema = open_run(
        sft, images=table.images, device=accelerator.device, precision=settings.precision, trainable=True
    )
    if settings.gradient_checkpointing:
        language.model.enable_input_require_grads()
        language.base.gradient_checkpointing_enable({"use_reentrant": False})
    sft_adapter = adapter_hash(sft)
    answered = read_chains(chains, table.listings, schema, adapter=sft_adapter)
    preferences = build_preferences(answered, min_consistency=settings.min_consistency, seed=settings.seed)
    accelerator.print(preferences.describe())
    objective = build_objective(settings, language, preferences)
    run = RunFolder(folder)
    if accelerator.is_main_process:
        run = RunFolder.start(
            folder, settings, inputs=inputs, resume=settings.resume, report_to=settings.report_to
        )
    accelerator.wait_for_everyone()
    training = build_training(settings, language, objective, run, accelerator)
    if isinstance(objective, Preference):
        attach_reference(training, objective, folder, sft_adapter, settings.resume)
    training.fit()
    if accelerator.is_main_process:
        save_adapter(language.model, folder)
        language.spec.save(folder)
        seen = read_seen(sft)
        before = seen.get("unlabelled", [])
        seen["unlabelled"] = list(dict.fromkeys([*before, *(each.question.listing for each in answered)]))
        write_seen(folder, seen)
        (folder / SCHEMA_FILE).write_bytes((sft / SCHEMA_FILE).read_bytes())
        plot_training_curves(folder / "training_curves.png", run.metrics(), title=settings.run)
        last = run.metrics()[-1]
        run.finish(
            steps=training.step, pairs=len(preferences.pairs), unanimous=len(preferences.unanimous), **last
        )
        if warning := warn_of_steady_fall(training.gains):
            print(warning)
        print(f"{folder}: {training.step} steps, last loss {last['train/loss']:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
