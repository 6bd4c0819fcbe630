"""Score a run on labelled listings that it has not seen, and calibrate its confidence on others.

    python -m attributes.evaluate --run attributes_dpo --listings test --labels test_labels.csv \\
        --calibration-listings train --calibration-labels calibration_labels.csv --workspace OUT

The scores go to checkpoints/<run>/scores.json, the calibration to checkpoints/<run>/calibration.json, which
extract_attributes reads.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attributes.config import EvaluateSettings
from attributes.sample_chains import finished_run
from contracts.errors import run_entry_point
from contracts.files import write_json
from training.settings import parse_settings

if TYPE_CHECKING:
    import pandas as pd

    from attributes.data import Label
    from attributes.model import VisionLanguage
    from attributes.schema import Schema

CALIBRATION = "calibration.json"


def answers_of(
    settings: EvaluateSettings,
    folder: Path,
    language: VisionLanguage,
    schema: Schema,
    labels: list[Label],
    name: str,
) -> pd.DataFrame:
    """Chains and most probable replies for the listings of these labels, as one row per label."""
    from attributes.chains import Question, read_chain
    from attributes.metrics import as_table
    from attributes.model import adapter_hash
    from attributes.sampling import draw
    from attributes.shards import ChainShards, chains_folder

    listings = list(dict.fromkeys(label.listing for label in labels))
    place = chains_folder(settings.workspace, settings.run, name, settings.round)
    shards = ChainShards(place, language, adapter_hash(folder), settings, schema)
    shards.complete(listings)
    by_key = {each.question.key: each for each in shards.finish(listings)}
    questions = [Question(label.listing, label.attribute) for label in labels]
    greedy: list[str | None] = []
    for start in range(0, len(questions), settings.batch_size):
        batch = questions[start : start + settings.batch_size]
        language.show(picture for question in batch for picture in language.pictures_of(question.listing))
        prompts = [language.prompt(question) for question in batch]
        replies = draw(language, prompts, numbers=None, max_new_tokens=settings.max_new_tokens)
        for question, (reply,) in zip(batch, replies, strict=True):
            text = language.tokenizer.decode(reply.ids, skip_special_tokens=True)
            greedy.append(read_chain(reply, text, question.attribute).answer)
        language.forget()
    return as_table([by_key[question.key] for question in questions], greedy, labels)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(EvaluateSettings, argv, description=__doc__.split("\n")[0])
    folder = finished_run(settings)
    from attributes.data import read_labels, read_listings, read_seen, require_apart
    from attributes.metrics import Calibration, plot, score
    from attributes.model import SCHEMA_FILE, open_run
    from attributes.schema import Schema
    from training.device import choose_device

    schema = Schema.read(str(folder / SCHEMA_FILE))
    table = read_listings(settings, schema)
    labels = read_labels(settings.labels, table, schema)
    parts = {**read_seen(folder), "test": [label.listing for label in labels]}
    calibration_labels: list[Label] = []
    calibration_table = table
    if settings.calibration_labels is not None:
        if settings.calibration_listings:
            calibration_table = read_listings(
                replace(settings, listings=settings.calibration_listings), schema
            )
        calibration_labels = read_labels(settings.calibration_labels, calibration_table, schema)
        parts["calibration"] = [label.listing for label in calibration_labels]
    require_apart(parts)

    device = choose_device(settings.device)
    language, schema = open_run(folder, images=table.images, device=device, precision=settings.precision)
    calibration = Calibration.none()
    if calibration_labels:
        language.images = calibration_table.images
        held_out = answers_of(
            settings, folder, language, schema, calibration_labels, settings.calibration_labels.stem
        )
        answered = held_out[held_out["vote"].notna()]
        calibration = Calibration.fit(answered["consistency"].to_numpy(), answered["right"].to_numpy())
        write_json(folder / CALIBRATION, asdict(calibration))
        language.images = table.images
        language.unreadable.clear()
    scored = answers_of(settings, folder, language, schema, labels, settings.labels.stem)
    scores = score(scored, calibration, resamples=settings.resamples, seed=settings.seed)
    write_json(folder / "scores.json", scores)
    plot(folder / "reliability.png", scored, calibration, title=settings.run)
    for name in ("sampled_accuracy", "greedy_accuracy", "vote_accuracy"):
        low, high = scores[f"{name}_95"]
        print(f"{name:20} {scores[name]:.3f}   ({low:.3f} to {high:.3f})")
    for name in ("majority_accuracy", "macro_f1", "valid_share", "ece_of_consistency", "ece"):
        print(f"{name:20} {scores[name]:.3f}" if scores[name] is not None else f"{name:20} -")
    return scores


if __name__ == "__main__":
    run_entry_point(main)
