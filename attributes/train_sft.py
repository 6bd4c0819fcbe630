"""Train adapters on a few labelled listings, with reasoning before the answer.

    python -m attributes.train_sft --listings listings.csv --labels labels.csv --schema grocery_store --workspace OUT
    torchrun --nproc_per_node 4 -m attributes.train_sft …

config.py holds every setting, loop.py the training loop. --resume continues an interrupted run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attributes.config import SFT_PRESETS, SftSettings
from attributes.schema import FOLDER, Schema
from contracts.errors import InputError, listed, run_entry_point
from contracts.workspace import Workspace
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from attributes.data import Label
    from attributes.model import VisionLanguage
    from attributes.pairs import Example


def build_model(settings: SftSettings, images: Path | None, accelerator: Accelerator) -> VisionLanguage:
    """The base with fresh adapters."""
    from attributes.model import Spec, VisionLanguage, add_lora, identify_base, load_base, trained_weights
    from training.device import seed_everything

    base, tokenizer, image_processor = load_base(
        settings.model, precision=settings.precision, device=accelerator.device
    )
    folder = Path(settings.model).expanduser()
    spec = Spec(
        model=str(folder.resolve()) if folder.is_dir() else settings.model,
        base=identify_base(settings.model, base),
        input=settings.input,
        fit=settings.fit,
        text_tokens=settings.text_tokens,
        reasoning=settings.reasoning,
    )
    seed_everything(settings.seed)  # the same on every process, so that all start from the same adapters
    model = add_lora(base, rank=settings.lora_rank, alpha=settings.lora_alpha)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(weight.numel() for weight in base.parameters())
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    accelerator.print(f"{weights:,} weights, {trained:,} of them trained")
    return VisionLanguage(model, tokenizer, image_processor, spec, images)


def build_examples(labels: list[Label], language: VisionLanguage) -> list[Example]:
    """One example per label. Raises InputError for a listing of which the model would see nothing."""
    from attributes.chains import Question, target
    from attributes.pairs import Example

    language.show(name for label in labels for name in language.pictures_of(label.listing))
    examples = []
    empty = []
    for label in labels:
        question = Question(label.listing, label.attribute)
        if language.is_empty(question):
            empty.append(label.listing.sample_id)
            continue
        reply = language.reply_ids(target(label, reasoning=language.spec.reasoning))
        examples.append(Example(question, tuple(reply)))
    if empty:
        reasons = ", ".join(f"{name}: {reason}" for name, reason in list(language.unreadable.items())[:3])
        raise InputError(
            f"labelled listings of which the model sees nothing ({reasons or 'no picture, no text'}): sample_id "
            f"{listed(list(dict.fromkeys(empty)))}; mend the pictures or leave their labels out"
        )
    return examples


def warn_of_missing_reasoning(labels: list[Label]) -> str:
    """A sentence where labels that reasoning should be learned from have none, else ""."""
    without = sum(not label.reasoning.strip() for label in labels)
    if not without:
        return ""
    return f"{without} of {len(labels)} labels have no reasoning; the model learns to answer them at once"


def input_files(settings: SftSettings) -> list[Path]:
    schema = Path(settings.schema)
    return [settings.labels, schema if schema.suffix else FOLDER / f"{settings.schema}.yaml"]


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(SftSettings, argv, description=__doc__.split("\n")[0], presets=SFT_PRESETS)
    from attributes.data import read_labels, read_listings, write_seen

    schema = Schema.read(settings.schema)
    table = read_listings(settings, schema)
    labels = read_labels(settings.labels, table, schema)
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    if RunFolder(folder).already_complete(settings.resume, settings, input_files(settings)):
        return

    from attributes.loop import Imitation, Training, steps_per_epoch
    from attributes.model import SCHEMA_FILE, save_adapter
    from training.device import build_accelerator, choose_device
    from training.plots import plot_training_curves

    accelerator = build_accelerator(choose_device(settings.device), settings.precision)
    language = build_model(settings, table.images, accelerator)
    examples = build_examples(labels, language)
    for name, reason in language.unreadable.items():
        accelerator.print(f"{name}: not shown ({reason})")
    if settings.reasoning and (warning := warn_of_missing_reasoning(labels)):
        accelerator.print(warning)
    run = RunFolder(folder)
    if accelerator.is_main_process:
        run = RunFolder.start(
            folder,
            settings,
            inputs=input_files(settings),
            resume=settings.resume,
            report_to=settings.report_to,
        )
        accelerator.print(
            f"{len(examples)} labels of {len({label.listing.sample_id for label in labels})} listings"
        )
    accelerator.wait_for_everyone()
    steps = settings.epochs * steps_per_epoch(len(examples), settings, accelerator.num_processes)
    objective = Imitation(language, examples)
    training = Training(settings, language, objective, run, accelerator, lr=settings.lr, steps=steps)
    training.fit()
    if accelerator.is_main_process:
        save_adapter(language.model, folder)
        language.spec.save(folder)
        write_seen(folder, {"labelled": dict.fromkeys(label.listing for label in labels)})
        (folder / SCHEMA_FILE).write_bytes(input_files(settings)[1].read_bytes())
        plot_training_curves(folder / "training_curves.png", run.metrics(), title=settings.run)
        last = run.metrics()[-1]
        run.finish(steps=training.step, labels=len(examples), loss=last["train/loss"])
        print(f"{folder}: {training.step} steps, last loss {last['train/loss']:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(main)
