"""A full disk: one line, old files whole, nothing half-written. The disk is a small one in memory, mounted by root."""

import os
import shutil
import subprocess

import pytest

from contracts.errors import InputError, run_entry_point
from contracts.tables import read_any
from pricing import PriceModel, export, predict

MEGABYTE = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A folder with one megabyte of space."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let root mount a small disk")
    yield folder
    # lazily: a training that has failed keeps the lock of its run until its process ends
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, *, leave):
    """Fill the disk up to `leave` bytes."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"0" * (free - leave))


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_prices_on_a_full_disk(word_system, sample_workspace, small_disk, ending):
    target = small_disk / f"prices.{ending}"
    target.write_text("mine")
    fill(small_disk, leave=0)
    source = sample_workspace / "catalogue" / "test.csv"
    arguments = ["--model", str(word_system), "--input", str(source), "--output", str(target), "--overwrite"]
    with pytest.raises(InputError, match=r"prices\.[a-z.]+: No space left on device; nothing was written$"):
        predict.main([*arguments, "--device", "cpu"])
    assert target.read_text() == "mine"
    assert {path.name for path in small_disk.iterdir()} == {"filler", target.name}

    (small_disk / "filler").unlink()
    predict.main([*arguments, "--device", "cpu"])
    assert len(read_any(target)) == 60


def test_an_export_on_a_full_disk(word_system, small_disk):
    target = small_disk / "system"
    target.mkdir()
    (target / "pricing.json").write_text('{"format": 1}')
    fill(small_disk, leave=0)
    with pytest.raises(
        InputError, match=r"system: \[Errno 28\] No space left on device[^,]*; nothing was written$"
    ) as caught:
        export.export(word_system, target, overwrite=True)
    assert "\n" not in str(caught.value)
    assert {path.name for path in small_disk.iterdir()} == {"filler", "system"}
    assert [path.name for path in target.iterdir()] == ["pricing.json"]
    assert PriceModel.load(word_system, device="cpu").members


@pytest.mark.parametrize("space", [4096, 200_000])
def test_training_on_a_full_disk(sample_workspace, small_disk, tmp_path, capsys, space):
    """The disk fills up with the first checkpoint."""
    from qwen3_finetune import train

    shutil.copytree(sample_workspace / "data", tmp_path / "data")
    (tmp_path / "checkpoints").symlink_to(small_disk)
    fill(small_disk, leave=space)
    quick = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--batch-size",
        "128",
        "--max-length",
        "16",
    ]
    with pytest.raises(SystemExit) as ended:
        run_entry_point(lambda: train.main([*quick, "--workspace", str(tmp_path)]))
    assert ended.value.code == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {tmp_path}/checkpoints/qwen3_finetune")
    assert "No space left on device" in line
    left = [path.name for path in small_disk.rglob("*")]
    assert not [
        name for name in left if name == "COMPLETE" or name.startswith("step_") or name.endswith(".tmp")
    ]
