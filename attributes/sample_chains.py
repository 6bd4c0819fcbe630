"""Sample chains for unlabelled listings: seven replies to every question.

    python -m attributes.sample_chains --run attributes_sft --listings train --labels test.csv --workspace OUT

Listings that have a label are left out; a listing that shares a picture or a text with a labelled one is refused. An
interrupted sampling continues where it stopped, and gives the same chains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attributes.config import SampleSettings, SamplingSettings
from contracts.errors import InputError, run_entry_point
from contracts.tables import read_any
from contracts.workspace import Workspace
from training.run_folder import RunFolder
from training.settings import parse_settings

if TYPE_CHECKING:
    from attributes.data import Listing, Table


def finished_run(settings: SamplingSettings) -> Path:
    """Folder of the run that --run names. Raises InputError where it is not finished."""
    folder = Workspace(settings.workspace).path("run", name=settings.run)
    return RunFolder.finished(folder, "attributes.train_sft").path


def unlabelled(table: Table, folder: Path, labels: tuple[Path, ...]) -> list[Listing]:
    """Listings without a label: neither one that the run learned from, nor one in these label files.

    Raises InputError for a listing that is the same product as a labelled one.
    """
    from attributes.data import read_seen, require_apart

    learned = read_seen(folder)["labelled"]
    labelled = {listing.sample_id for listing in learned}
    for path in labels:
        frame = read_any(path)
        if "sample_id" not in frame:
            raise InputError(f"{path}: no column sample_id; labels are sample_id, attribute, value")
        labelled |= set(frame["sample_id"])
    others = [listing for listing in table.listings if listing.sample_id in labelled]
    left = [listing for listing in table.listings if listing.sample_id not in labelled]
    require_apart({"labelled": [*learned, *others], "unlabelled": left})
    if not left:
        raise InputError(f"table {table.name}: every listing has a label, so nothing is left to sample")
    return left


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(SampleSettings, argv, description=__doc__.split("\n")[0])
    folder = finished_run(settings)
    from attributes.data import read_listings
    from attributes.model import SCHEMA_FILE, adapter_hash, open_run
    from attributes.schema import Schema
    from attributes.shards import ChainShards, chains_folder, require_variety
    from training.device import choose_device
    from training.processes import process, process_group

    table = read_listings(settings, Schema.read(str(folder / SCHEMA_FILE)))
    listings = unlabelled(table, folder, settings.labels)
    device = choose_device(settings.device)
    with process_group(device):
        language, schema = open_run(folder, images=table.images, device=device, precision=settings.precision)
        place = chains_folder(settings.workspace, settings.run, table.name, settings.round)
        shards = ChainShards(place, language, adapter_hash(folder), settings, schema)
        shards.complete(listings)
        if process()[0] == 0:
            answered = shards.finish(listings)
            require_variety(answered)
            consistent = [each.consensus.consistency for each in answered if each.chains]
            mean = sum(consistent) / max(len(consistent), 1)
            skipped = sum(not each.chains for each in answered)
            print(
                f"{shards.folder}: {len(answered) - skipped} questions of {len(listings)} listings, mean consistency "
                f"{mean:.3f}" + (f"; {skipped} questions have nothing to see" if skipped else "")
            )


if __name__ == "__main__":
    run_entry_point(main)
