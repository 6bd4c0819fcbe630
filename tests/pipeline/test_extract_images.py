"""One pass over the pictures writes what the two image stages write, each with a pass of its own."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_finetune import extract_embeddings as clip_stage
from clip_finetune import train
from contracts.embeddings import read_embeddings
from contracts.workspace import Workspace
from pipeline import extract_images
from siglip_extract import extract_embeddings as siglip_stage
from training.extraction import ShardedExtraction
from training.pictures import open_picture

ROWS = 70
NAMES = ("clip_image", "siglip_image")
FLAGS = ["--device", "cpu", "--workers", "0", "--batch-size", "16", "--shard-rows", "30"]


@pytest.fixture(scope="module")
def separate(sample_workspace, tmp_path_factory):
    """The first rows of the sample, with pictures missing, broken and unnamed, extracted by the two stages."""
    root = tmp_path_factory.mktemp("separate")
    source, workspace = Workspace(sample_workspace), Workspace(root)
    shutil.copytree(source.root / "data", root / "data")
    shutil.copytree(source.images_folder(), root / "pictures")
    catalog = json.loads((root / "data/catalog.json").read_text())
    (root / "data/catalog.json").write_text(json.dumps({**catalog, "images_folder": str(root / "pictures")}))
    table = source.prepared("train").head(ROWS)
    (root / "pictures" / table["image"][0]).unlink()
    (root / "pictures" / table["image"][1]).write_bytes(b"<html>")
    table.loc[2, "image"] = ""
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    train.main(
        [
            "--preset",
            "tiny",
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--batch-size",
            "16",
            "--workspace",
            str(root),
        ]
    )
    clip_stage.main(["train", "--workspace", str(root), *FLAGS])
    siglip_stage.main(["train", "--preset", "tiny", "--tower", "image", "--workspace", str(root), *FLAGS])
    return workspace


def files(workspace):
    return [read_embeddings(workspace.path("embeddings", name=name, split="train")) for name in NAMES]


@pytest.fixture
def fresh(separate, tmp_path):
    """The same workspace without any embedding."""
    for folder in ("data", "checkpoints"):
        shutil.copytree(separate.root / folder, tmp_path / folder)
    shutil.rmtree(tmp_path / "data/embeddings")
    return Workspace(tmp_path)


def run_both(workspace, *flags):
    extract_images.main(["train", "--preset", "tiny", "--workspace", str(workspace.root), *FLAGS, *flags])


@pytest.mark.parametrize("flags", [(), ("--workers", "2", "--batch-size", "25")])
def test_one_pass_equals_two(separate, fresh, flags):
    run_both(fresh, *flags)
    for ours, theirs in zip(files(fresh), files(separate), strict=True):
        assert ours.valid.sum() > 50 and not ours.valid[:3].any()
        np.testing.assert_array_equal(ours.valid, theirs.valid)
        np.testing.assert_array_equal(ours.sample_ids, theirs.sample_ids)
        # another batch size is another order of summation
        tolerance = (
            {"rtol": 0, "atol": 1e-3 if ours.embeddings.dtype == np.float16 else 1e-5}
            if flags
            else {"rtol": 0}
        )
        np.testing.assert_allclose(ours.embeddings, theirs.embeddings, **tolerance)
        assert {**ours.meta, "command": ""} == {**theirs.meta, "command": ""}
    written = [fresh.path("image_failures", name=name, split="train") for name in NAMES]
    written.append(fresh.path("predictions", name="clip_finetune", split="train"))
    for path in written:
        other = pd.read_csv(separate.root / path.relative_to(fresh.root), keep_default_na=False)
        pd.testing.assert_frame_equal(pd.read_csv(path, keep_default_na=False), other, rtol=1e-4)


def test_every_picture_is_decoded_once(fresh, monkeypatch):
    opened = []

    def count(path, **options):
        opened.append(path)
        return open_picture(path, **options)

    monkeypatch.setattr(extract_images.BothInputs, "read", staticmethod(count))
    run_both(fresh)
    images = fresh.prepared("train")["image"]
    assert len(opened) == (images != "").sum()


def test_interrupted_pass_goes_on_with_the_missing_shards(separate, fresh, monkeypatch):
    write, written = ShardedExtraction.write, []

    def die_at_the_second_siglip_shard(self, rows, *content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(rows)
        write(self, rows, *content)

    monkeypatch.setattr(ShardedExtraction, "write", die_at_the_second_siglip_shard)
    with pytest.raises(KeyboardInterrupt):
        run_both(fresh)
    rewritten = []
    monkeypatch.setattr(
        ShardedExtraction, "write",
        lambda self, rows, *content: (rewritten.append((self.meta["name"], rows.start)), write(self, rows, *content)),
    )  # fmt: skip
    run_both(fresh)
    assert rewritten == [("siglip_image", 30), ("clip_image", 60), ("siglip_image", 60)]
    for ours, theirs in zip(files(fresh), files(separate), strict=True):
        np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)


def test_large_picture_is_averaged_down_as_the_decoder_would(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 30, 1000), np.linspace(0, 20, 900))
    waves = np.stack([np.sin(x), np.cos(x + y), np.sin(2 * y)], axis=2)
    Image.fromarray((127 + 120 * waves).astype(np.uint8)).save(tmp_path / "p.jpg", quality=90)
    once = extract_images.shrunk(open_picture(tmp_path / "p.jpg", min_side=384), 224)
    alone = open_picture(tmp_path / "p.jpg", min_side=224)
    assert once.size == alone.size == (250, 225)
    difference = np.abs(np.asarray(once, float) - np.asarray(alone, float))
    assert difference.mean() < 2 and difference.max() < 16
    assert extract_images.shrunk(once, 224) is once


def test_siglip_pixels_are_those_of_its_processor(tmp_path):
    from transformers import SiglipImageProcessor

    from siglip_extract.model import normalise_like, resize_like

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (91, 70, 3), np.uint8))
    for options in (
        {"resample": 3},
        {"resample": 2, "image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.4]},
    ):
        processor = SiglipImageProcessor(size={"height": 64, "width": 64}, **options)
        plain = processor(torch.from_numpy(np.array(picture)).permute(2, 0, 1), return_tensors="pt")
        fast = resize_like(processor, 64, "test")(picture)
        assert fast.dtype == torch.uint8 and fast.is_contiguous()
        assert torch.equal(normalise_like(processor, "test")(fast), plain["pixel_values"][0])
