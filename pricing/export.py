"""Copy what prices products from a workspace into one folder that opens anywhere.

    python -m pricing.export --model OUT --to FOLDER

The folder has the layout of a workspace, so `PriceModel.load` opens both in the same way. It holds the ensemble, the
runs of its members and encoders, local encoder models, the columns of the catalogue, and a model card. Models from the
hub stay there; the card lists them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from contracts.catalog import read_table
from contracts.errors import InputError, run_entry_point
from contracts.files import atomic_write, read_json, sidecar_of, write_json
from contracts.workspace import Workspace
from pricing.card import model_card, training_data
from pricing.config import ExportSettings
from pricing.explain import searched_embedding
from pricing.model import ENSEMBLE, FORMAT, FORMAT_FILE, PriceModel
from pricing.parts import PRETRAINED, local_model
from training.settings import parse_settings

LEFT_OUT = ("step_*", "tensorboard", "*.png", "metrics.jsonl")
"""Files of a run folder that only training and its reader need."""
KNOWN_COLUMNS = ["sample_id", "entity_name", "price"]


def export(
    root: Path,
    target: Path,
    *,
    overwrite: bool = False,
    known_products: bool = True,
    license: str = "other",
) -> Path:
    """Write a self-contained folder; it appears when it is complete.

    Args:
        root: workspace, or an exported folder.
        target: the new folder.
        known_products: take along names, prices and one embedding of the training products.
        license: what the model card says.

    Raises:
        InputError: the folder exists (unless `overwrite` and it is an earlier export), a part of the system is
            missing, or the disk is full.
    """
    if target.exists() and not overwrite:
        raise InputError(f"{target}: exists already; --overwrite replaces it")
    if target.exists() and not _may_be_replaced(target):
        raise InputError(f"{target}: is no earlier export, so it is not replaced; choose another --to")
    model = PriceModel.load(root)  # names whatever part is missing
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _copy_runs(model, unfinished)
        _copy_encoder_models(model, unfinished)
        _copy_data(model, unfinished, known_products=known_products)
        write_json(unfinished / FORMAT_FILE, {"format": FORMAT})
        card = model_card(model, license=license, known_products=known_products)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        replaced = target.with_name(f".{target.name}.replaced")
        if target.exists():
            target.rename(replaced)  # whatever happens now, one of the two is whole
        unfinished.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{target}: {_reason(error)}; nothing was written") from None
        raise
    return target


def _reason(error: OSError) -> str:
    """What the operating system said, of the first file if copytree lists several."""
    if isinstance(error, shutil.Error):
        _, _, reason = error.args[0][0]
        return reason
    return error.strerror or str(error)


def _may_be_replaced(target: Path) -> bool:
    """An earlier export or an empty folder; anything else might be somebody's work."""
    return target.is_dir() and ((target / FORMAT_FILE).is_file() or not any(target.iterdir()))


def _copy_runs(model: PriceModel, target: Path) -> None:
    """The ensemble and the runs of members and encoders."""
    names = {member.run for member in model.ensemble.members}
    for source in model.encoders.values():
        # the tokenizer of a SigLIP text tower with random weights lies in the folder of its stage
        names.add(source.run if isinstance(source.run, str) else source.stage)
    for name in sorted(names):
        folder = model.workspace.path("run", name=name)
        if folder.is_dir():
            copied = Workspace(target).path("run", name=name)
            shutil.copytree(folder, copied, ignore=shutil.ignore_patterns(*LEFT_OUT))
    model.ensemble.save(Workspace(target).path("run", name=ENSEMBLE))
    summary = model.workspace.path("run", name=ENSEMBLE) / "summary.json"
    if summary.is_file():
        shutil.copy(summary, Workspace(target).path("run", name=ENSEMBLE))


def _copy_encoder_models(model: PriceModel, target: Path) -> None:
    """Say which encoder makes each embedding, and bring along pretrained models that are local folders."""
    exported = Workspace(target)
    for name, source in model.encoders.items():
        write_json(sidecar_of(exported.path("embeddings", name=name, split="train")), source.meta)
        if isinstance(source.run, dict) and (local := local_model(source.run)):
            folder = exported.path("run", name=source.stage)
            shutil.copytree(local, folder / f"{PRETRAINED}_{source.run['kind']}", dirs_exist_ok=True)

    text_runs = {member.run for member in model.ensemble.members if member.stage == "qwen3_finetune"}
    for source in model.encoders.values():
        if isinstance(source.run, str) and source.stage == "qwen3_finetune":
            text_runs.add(source.run)
    for run in text_runs:
        folder = exported.path("run", name=run)
        # an export that is exported again has brought it along already
        if (local := local_model(read_json(folder / "settings.json"))) and not (folder / PRETRAINED).is_dir():
            shutil.copytree(local, folder / PRETRAINED)
            _rename_bases(target, folder)


def _rename_bases(target: Path, run: Path) -> None:
    """Let the adapters of a run name the base that lies in the export, as seen from the export's own folder."""
    from qwen3_finetune.sentence_transformer import name_base

    base = (run / PRETRAINED).relative_to(target).as_posix()
    for config in run.rglob("adapter_config.json"):
        name_base(config.parent, base)


def _copy_data(model: PriceModel, target: Path, *, known_products: bool) -> None:
    """The columns of the catalogue and, if wanted, the known products with the embedding that compares them."""
    exported = Workspace(target)
    write_json(exported.path("catalog"), {**model.mapping.to_json(), "train": training_data(model)})
    table = model.workspace.path("prepared", split="train")
    if not known_products or not table.is_file():
        return
    with atomic_write(exported.path("prepared", split="train")) as file:
        read_table(table)[KNOWN_COLUMNS].to_csv(file, index=False)
    if name := searched_embedding(model):
        path = exported.path("embeddings", name=name, split="train")
        shutil.copy(model.workspace.path("embeddings", name=name, split="train"), path)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ExportSettings, argv, description=__doc__.split("\n")[0])
    folder = export(
        settings.model,
        settings.to,
        overwrite=settings.overwrite,
        known_products=settings.known_products,
        license=settings.license,
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.0f} MB; open it with PriceModel.load({str(folder)!r})")


if __name__ == "__main__":
    run_entry_point(main)
