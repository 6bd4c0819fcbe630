"""One pass over the pictures writes what the two image stages write, each with a pass of its own."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_finetune import extract_embeddings as clip_stage
from clip_finetune import train
from clip_finetune.encoder import Encoder as ClipEncoder
from contracts.embeddings import read_embeddings
from contracts.files import read_json, sidecar_of, write_json
from contracts.workspace import CLIP_IMAGE, SIGLIP_IMAGE, Workspace
from pipeline import extract_images
from siglip_extract import extract_embeddings as siglip_stage
from siglip_extract.config import Settings as SiglipSettings
from siglip_extract.encoder import Encoder as SiglipEncoder
from training.device import guard_torchvision
from training.extraction import ShardedExtraction
from training.pictures import open_picture

guard_torchvision()
from clip_finetune.model import load_model  # noqa: E402
from siglip_extract.model import normalise_like, resize_like  # noqa: E402

ROWS = 70
NAMES = (CLIP_IMAGE, SIGLIP_IMAGE)
FLAGS = ["--device", "cpu", "--workers", "0", "--batch-size", "16", "--shard-rows", "30"]


@pytest.fixture(scope="module")
def separate(sample_workspace, tmp_path_factory):
    """The first rows of the sample, with pictures missing, broken and unnamed, extracted by the two stages."""
    root = tmp_path_factory.mktemp("separate")
    source, workspace = Workspace(sample_workspace), Workspace(root)
    shutil.copytree(source.root / "data", root / "data")
    shutil.copytree(source.images_folder(), root / "pictures")
    catalog = read_json(workspace.path("catalog"))
    write_json(workspace.path("catalog"), {**catalog, "images_folder": str(root / "pictures")})
    table = source.prepared("train").head(ROWS)
    (root / "pictures" / table["image"][0]).unlink()
    (root / "pictures" / table["image"][1]).write_bytes(b"<html>")
    table.loc[2, "image"] = ""
    table.to_csv(workspace.path("prepared", split="train"), index=False)
    quick = ["--preset", "tiny", "--device", "cpu", "--epochs", "1", "--batch-size", "16"]
    train.main([*quick, "--workspace", str(root)])
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
    sidecars = [
        read_json(sidecar_of(workspace.root / written[-1].relative_to(fresh.root)))
        for workspace in (fresh, separate)
    ]
    for entry in ("stage", "model", "checkpoint", "fitted_on"):
        assert sidecars[0][entry] == sidecars[1][entry]
    for path in written:
        other = pd.read_csv(separate.root / path.relative_to(fresh.root), keep_default_na=False)
        pd.testing.assert_frame_equal(pd.read_csv(path, keep_default_na=False), other, rtol=1e-4)


def test_a_further_table_equals_what_the_encoders_give(separate, fresh):
    """Both encoders are opened again from what the files of train say."""
    table = fresh.prepared("train").iloc[30::-1].drop(columns="price")
    table.to_csv(fresh.path("prepared", split="new"), index=False)
    command = ["new", "--preset", "tiny", "--workspace", str(fresh.root), "--storage", "float32", *FLAGS]
    extract_images.main(command)
    metas = [content.meta for content in files(separate)]
    clip = ClipEncoder.open(fresh.path("run", name=metas[0]["run"]), device="cpu")
    siglip = SiglipEncoder.open(**{**metas[1]["run"], "storage": "float32"}, device="cpu")
    for encoder, name in ((clip, CLIP_IMAGE), (siglip, SIGLIP_IMAGE)):
        content = read_embeddings(fresh.path("embeddings", name=name, split="new"))
        encoded = encoder.encode(fresh.prepared("new"), fresh.images_folder())
        assert np.array_equal(encoded.valid, content.valid) and content.valid.any()
        np.testing.assert_allclose(encoded.embeddings, content.embeddings, atol=1e-5)


def test_every_picture_is_opened_once(fresh, monkeypatch):
    opened, open_file = [], Image.open

    def count(path, *positional, **named):
        opened.append(path)
        return open_file(path, *positional, **named)

    monkeypatch.setattr(Image, "open", count)
    run_both(fresh)
    table = fresh.prepared("train")
    there = [bool(name) and (fresh.images_folder() / name).is_file() for name in table["image"]]
    assert len(opened) == sum(there) > 50


def test_interrupted_pass_goes_on_with_the_missing_shards(separate, fresh, monkeypatch, killed_at):
    with killed_at(ShardedExtraction, "write", 4):  # the second shard of SigLIP's file
        run_both(fresh)
    rewritten, write = [], ShardedExtraction.write
    monkeypatch.setattr(
        ShardedExtraction, "write",
        lambda self, rows, *content: (rewritten.append((self.meta["name"], rows.start)), write(self, rows, *content)),
    )  # fmt: skip
    run_both(fresh)
    assert rewritten == [(SIGLIP_IMAGE, 30), (CLIP_IMAGE, 60), (SIGLIP_IMAGE, 60)]
    for ours, theirs in zip(files(fresh), files(separate), strict=True):
        np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)


def test_inputs_can_be_sent_to_a_worker(separate):
    """Where workers are not forked, as on macOS, they get what makes the inputs pickled."""
    clip = load_model(separate.path("run", name="clip_finetune"))
    settings = SiglipSettings(image_model="tiny", random_weights=True, device="cpu")
    both = extract_images.BothInputs(clip, siglip_stage.open_encoder("image", settings).tower)
    picture = Image.effect_noise((90, 70), 50).convert("RGB")
    for there, here in zip(pickle.loads(pickle.dumps(both))(picture), both(picture), strict=True):
        assert torch.equal(there, here)


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
