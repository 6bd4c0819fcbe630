import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from contracts.embeddings import align, iterate_embeddings, read_embeddings
from contracts.errors import InputError
from contracts.files import read_json, write_json
from contracts.splits import leaked_folds
from contracts.workspace import SIGLIP_IMAGE, Workspace
from siglip_extract.config import PRESETS, Settings
from siglip_extract.encoder import NAMES, Encoder
from siglip_extract.extract_embeddings import main, open_encoder
from training.extraction import ShardedExtraction
from training.pictures import open_picture

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = 60


def copy_workspace(source: Path, folder: Path) -> Workspace:
    """The prepared tables and pictures of `source` as a workspace of its own."""
    workspace = Workspace(folder)
    shutil.copytree(source / "data", folder / "data")
    shutil.copytree(Workspace(source).images_folder(), folder / "pictures")
    catalog = read_json(workspace.path("catalog"))
    write_json(workspace.path("catalog"), {**catalog, "images_folder": str(folder / "pictures")})
    return workspace


def small_workspace(source: Path, folder: Path) -> Workspace:
    """The first rows of the sample, both splits, with every fault a picture or a text can have."""
    workspace = copy_workspace(source, folder)
    pictures = workspace.images_folder()
    for split in ("train", "test"):
        table = workspace.prepared(split).head(ROWS)
        if split == "train":
            assert all((pictures / name).is_file() for name in table["image"][:6])
            (pictures / table["image"][0]).unlink()
            (pictures / table["image"][1]).write_bytes(b"<html>")
            whole = (pictures / table["image"][2]).read_bytes()
            (pictures / table["image"][2]).write_bytes(whole[: len(whole) // 2])
            table.loc[3, "image"] = ""
            Image.new("RGB", (1, 400)).save(pictures / table["image"][4], "PNG")
            table.loc[5, ["entity_name", "catalog_content", "text"]] = ["", "", " [SEP] "]
        table.to_csv(workspace.path("prepared", split=split), index=False)
    return workspace


def run(workspace: Workspace, split: str, *flags: str) -> None:
    main([split, "--preset", "tiny", "--device", "cpu", "--storage", "float32",
          "--workspace", str(workspace.root), *flags])  # fmt: skip


def embedded(workspace: Workspace, tower: str, split: str = "train"):
    return read_embeddings(workspace.path("embeddings", name=NAMES[tower], split=split))


def failures(workspace: Workspace, split: str = "train") -> pd.DataFrame:
    path = workspace.path("image_failures", name=SIGLIP_IMAGE, split=split)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def source(sample_workspace, tmp_path_factory):
    return small_workspace(sample_workspace, tmp_path_factory.mktemp("small")).root


@pytest.fixture(scope="module")
def done(source, tmp_path_factory):
    """Both towers over both splits, one process, several shards."""
    workspace = copy_workspace(source, tmp_path_factory.mktemp("done"))
    for split in ("train", "test"):
        run(workspace, split, "--shard-rows", "25", "--batch-size", "16")
    return workspace


@pytest.fixture
def fresh(source, tmp_path):
    return copy_workspace(source, tmp_path)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_contract(done, tower):
    for split in ("train", "test"):
        table, content = done.prepared(split), embedded(done, tower, split)
        assert content.sample_ids.tolist() == table["sample_id"].tolist()
        assert content.meta["split"] == split and "random weights" in content.meta["model"]
        assert leaked_folds(content.meta["fitted_on"], tuple(range(10))) == []
        assert (content.embeddings[~content.valid] == 0).all()
        # rows differ, so the tower saw them
        assert content.embeddings[content.valid].std(axis=0).min() > 1e-3
    train, test = embedded(done, tower), embedded(done, tower, "test")
    assert train.meta["checkpoint"] == test.meta["checkpoint"] and train.width == test.width
    assert not list(done.path("embeddings", name="x", split="y").parent.glob("*.shards"))


def test_bad_pictures_are_recorded(done):
    table, content, failed = done.prepared("train"), embedded(done, "image"), failures(done)
    assert list(failed.columns) == ["sample_id", "image", "reason"]
    assert set(failed["sample_id"]) == set(content.sample_ids[~content.valid])
    reasons = failed.set_index("sample_id")["reason"].reindex(table["sample_id"]).tolist()
    assert reasons[:2] == ["missing", "not a picture"] and reasons[2].startswith("damaged")
    assert reasons[3] == "no image link"
    assert content.valid[4]  # one pixel wide, and still a picture


def test_empty_text_is_invalid(done):
    valid = embedded(done, "text").valid
    assert np.flatnonzero(~valid).tolist() == [5]


def test_embeddings_do_not_depend_on_neighbours(done):
    """Every row alone, straight through its tower, gives what the batches gave."""
    table = done.prepared("train")
    image, text = (encoder.tower for encoder in encoders(done))
    of_pictures, of_texts = embedded(done, "image"), embedded(done, "text")
    for row in range(6, 20):
        alone = text.encode_batch(text.prepare([table["text"][row]]))[0]
        np.testing.assert_allclose(of_texts.embeddings[row], alone, atol=1e-5)
        if of_pictures.valid[row]:
            picture = open_picture(done.images_folder() / table["image"][row], min_side=64)
            alone = image.encode_batch(image.prepare(picture)[None])[0]
            np.testing.assert_allclose(of_pictures.embeddings[row], alone, atol=1e-5)


def encoders(workspace):
    settings = Settings(**{**PRESETS["tiny"], "preset": "tiny", "device": "cpu", "workspace": workspace.root})
    return open_encoder("image", settings), open_encoder("text", settings)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_further_table_is_embedded_by_command_and_by_encoder(done, tmp_path, tower):
    """The encoder is opened again from what the file of train says, in a process that knows nothing else."""
    workspace = copy_workspace(done.root, tmp_path)
    shutil.copytree(done.path("run", name="siglip_extract"), workspace.path("run", name="siglip_extract"))
    of_train = embedded(workspace, tower)
    table = workspace.prepared("train").iloc[20:2:-1].drop(columns="price")
    table.to_csv(workspace.path("prepared", split="new"), index=False)
    run(workspace, "new", "--tower", tower)
    content = embedded(workspace, tower, "new")
    assert content.sample_ids.tolist() == table["sample_id"].tolist()
    assert content.meta["checkpoint"] == of_train.meta["checkpoint"]
    of_train_rows = align(embedded(workspace, tower), content.sample_ids)
    assert np.array_equal(content.valid, of_train_rows.valid) and not content.valid.all()
    np.testing.assert_allclose(content.embeddings, of_train_rows.embeddings, atol=1e-5)

    assert of_train.meta["stage"] == "siglip_extract"
    folder = workspace.path("run", name="siglip_extract")
    encoder = Encoder.open(**of_train.meta["run"], folder=folder, device="cpu", batch_size=7)
    encoded = encoder.encode(workspace.prepared("new"), workspace.images_folder())
    np.testing.assert_allclose(encoded.embeddings, content.embeddings, atol=1e-5)
    assert np.array_equal(encoded.valid, content.valid) and encoded.width == encoder.width
    assert encoded.meta.items() <= content.meta.items()
    assert list(encoder.reasons) == content.sample_ids[~content.valid].tolist()
    alone = encoder.encode(workspace.prepared("new").iloc[[4]], workspace.images_folder())
    np.testing.assert_allclose(alone.embeddings[0], content.embeddings[4], atol=1e-5)


def test_an_encoder_rounds_as_the_file_and_leaves_random_numbers_alone(done):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    encoder = Encoder.open("tiny", kind="image", random_weights=True, seed=1, device="cpu")
    assert torch.equal(torch.rand(3), expected)
    encoded = encoder.encode(done.prepared("test").head(8), done.images_folder())
    assert encoded.embeddings.dtype == np.float16
    whole = Encoder.open(**{**encoder.meta["run"], "storage": "float32"}, device="cpu")
    exact = whole.encode(done.prepared("test").head(8), done.images_folder())
    np.testing.assert_array_equal(encoded.embeddings, exact.embeddings.astype(np.float16))


def test_the_tokenizer_is_that_of_train_whatever_is_prepared_later(done, tmp_path):
    workspace = copy_workspace(done.root, tmp_path)
    before = encoders(workspace)[1].meta
    workspace.path("prepared", split="test").unlink()
    assert encoders(workspace)[1].meta == before


def test_a_table_that_was_not_prepared_is_one_line(done):
    with pytest.raises(
        InputError, match="prepared_absent.csv: no prepared table; run python -m data.prepare"
    ):
        run(done, "absent")


def test_rows_can_be_sent_to_a_worker(done):
    """Where workers are not forked, as on macOS, they get the rows pickled."""
    table = done.prepared("train").iloc[6:12]
    for encoder in encoders(done):
        rows = encoder.rows(table, done.images_folder())
        there = pickle.loads(pickle.dumps(rows))
        expected, reasons = rows.collate([rows[row] for row in range(6)])
        inputs, same_reasons = there.collate([there[row] for row in range(6)])
        assert torch.equal(inputs, expected) and same_reasons == reasons


def test_shuffled_table_gives_the_same_rows(done, fresh):
    path = fresh.path("prepared", split="train")
    pd.read_csv(path, dtype=str, keep_default_na=False).sample(frac=1, random_state=1).to_csv(
        path, index=False
    )
    shutil.copytree(done.path("run", name="siglip_extract"), fresh.path("run", name="siglip_extract"))
    run(fresh, "train", "--tower", "image", "--batch-size", "7")
    expected = embedded(done, "image")
    shuffled = align(embedded(fresh, "image"), expected.sample_ids)
    np.testing.assert_array_equal(shuffled.valid, expected.valid)
    np.testing.assert_allclose(shuffled.embeddings, expected.embeddings, atol=1e-5)


def test_interrupted_run_continues(done, fresh, monkeypatch, killed_at, capsys):
    flags = ("--tower", "image", "--shard-rows", "25", "--batch-size", "16")
    with killed_at(ShardedExtraction, "write", 3):
        run(fresh, "train", *flags)
    assert not fresh.path("embeddings", name=SIGLIP_IMAGE, split="train").exists()

    written, write = [], ShardedExtraction.write
    monkeypatch.setattr(
        ShardedExtraction, "write",
        lambda self, rows, *content: (written.append(rows.start), write(self, rows, *content)),
    )  # fmt: skip
    run(fresh, "train", *flags)
    assert written == [50]
    assert "2 of 3 shards were there already" in capsys.readouterr().out
    resumed, expected = embedded(fresh, "image"), embedded(done, "image")
    np.testing.assert_array_equal(resumed.embeddings, expected.embeddings)
    np.testing.assert_array_equal(resumed.valid, expected.valid)
    pd.testing.assert_frame_equal(failures(fresh), failures(done))


def test_kept_shards_are_made_again_when_an_input_changes(fresh):
    flags = ("--tower", "image", "--shard-rows", "30", "--keep-shards")
    run(fresh, "train", *flags)
    path = fresh.path("embeddings", name=SIGLIP_IMAGE, split="train")
    shards = list(iterate_embeddings(path))
    assert [len(shard.valid) for shard in shards] == [30, 30] and not path.exists()
    assert not shards[0].valid[0]

    times = [file.stat().st_mtime_ns for file in sorted(path.parent.glob("*.shards/0*.pkl"))]
    run(fresh, "train", *flags)
    assert times == [file.stat().st_mtime_ns for file in sorted(path.parent.glob("*.shards/0*.pkl"))]

    Image.new("RGB", (80, 80), "green").save(fresh.images_folder() / fresh.prepared("train")["image"][0])
    run(fresh, "train", *flags)
    assert next(iterate_embeddings(path)).valid[0]


def test_another_encoder_for_another_table_is_reported(done, fresh, capsys):
    shutil.copytree(done.root / "data" / "embeddings", fresh.root / "data" / "embeddings")
    run(fresh, "test", "--tower", "image")
    assert "warning" not in capsys.readouterr().err
    run(fresh, "test", "--tower", "image", "--seed", "1")
    assert "siglip_image_train.pkl comes from another encoder" in capsys.readouterr().err


def test_missing_model_offline_leaves_nothing(fresh):
    with pytest.raises(InputError, match="nobody/nothing") as error:
        main(["train", "--tower", "image", "--image-model", "nobody/nothing", "--device", "cpu",
              "--workspace", str(fresh.root)])  # fmt: skip
    assert "\n" not in str(error.value)
    assert not (fresh.root / "data" / "embeddings").exists()


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--shard-rows", "0"], ["--workers", "-1"]])
def test_refused_settings(done, flags):
    with pytest.raises(InputError, match=flags[0]):
        run(done, "train", "--tower", "image", *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_one_line(done):
    with pytest.raises(InputError, match="--device cuda:1: this torch sees no CUDA device"):
        main(["train", "--preset", "tiny", "--device", "cuda:1", "--workspace", str(done.root)])


def test_the_numbered_device_is_used():
    """With two CUDA devices, which torch is told that there are, and up to the point where the tower is loaded."""
    code = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.set_device = lambda device: None
from siglip_extract import extract_embeddings
extract_embeddings.extract = lambda kind, split, settings, accelerator: exit(str(accelerator.device))
extract_embeddings.main(["train", "--preset", "tiny", "--device", "cuda:1"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert result.stderr.strip().splitlines()[-1] == "cuda:1"


def test_script_in_its_folder_shows_help_without_torch():
    code = (
        "import sys, runpy\nsys.argv = ['extract_embeddings.py', '--help']\n"
        "try: runpy.run_path('extract_embeddings.py', run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or ('torch' in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY / "siglip_extract", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "--image-model" in result.stdout


@pytest.mark.slow
def test_two_processes_write_what_one_writes(done, fresh):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "siglip_extract.extract_embeddings", "train", "--preset", "tiny", "--device", "cpu",
               "--storage", "float32", "--workspace", str(fresh.root),
               "--shard-rows", "25", "--batch-size", "16"]  # fmt: skip
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for tower in NAMES:
        one, two = embedded(done, tower), embedded(fresh, tower)
        assert one.sample_ids.tolist() == two.sample_ids.tolist()
        np.testing.assert_array_equal(one.valid, two.valid)
        np.testing.assert_allclose(two.embeddings, one.embeddings, atol=1e-6)
        assert one.meta["checkpoint"] == two.meta["checkpoint"]
    pd.testing.assert_frame_equal(failures(fresh), failures(done))
