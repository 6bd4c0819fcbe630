"""Image embeddings: decoding at a reduced scale beside decoding in full, one pass for two encoders beside two passes.

    python -m studies.benchmarks.image_extraction
    python -m studies.benchmarks.image_extraction --device cuda --rows 16384 --batch-size 256 --workers 15   # full size

Per core: JPEGs of 1000 × 1000 pixels are opened and made into the input of CLIP (224) and SigLIP (384) on one thread,
as the stages do it and as one does it with Pillow and the libraries' own preprocessing. From files: the stages' own
extraction loops with their workers, on the CPU with the tiny models, on CUDA with random models of full size.
The pictures are real ones of any size, enlarged and saved at quality 90, or drawn ones where there are none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm import tqdm

from contracts.errors import run_entry_point
from contracts.workspace import REPOSITORY
from training.device import choose_device, choose_dtype, guard_torchvision, mixed_precision
from training.pictures import UnreadablePicture, open_picture, read_pixels
from training.settings import parse_settings

if TYPE_CHECKING:
    from torch import nn

    from clip_finetune.model import PriceClip
    from siglip_extract.model import Tower

CLIP_SIDE, SIGLIP_SIDE = 224, 384


@dataclass
class ImageExtractionSettings:
    pictures: str = "../shared/data/challenge/images"
    """folder with pictures to enlarge; where absent, pictures are drawn"""
    count: int = 60
    """JPEGs to make"""
    pixels: int = 1000
    """their sides"""
    rows: int = 512
    """rows of the catalogue that is extracted from files; the JPEGs repeat"""
    workers: int = 2
    """processes that decode"""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: tiny models; cuda: ViT-L/14 and SigLIP so400m, random weights"""
    batch_size: int = 64
    """pictures a forward pass"""
    rounds: int = 5
    """times that every rival is measured, in turns"""
    quick: bool = False
    """8 JPEGs, 24 rows, one round: does it run?"""
    out: str = str(REPOSITORY / "studies" / "results" / "image_extraction.json")
    """json file to write"""

    def __post_init__(self) -> None:
        if self.quick:
            self.count, self.rows, self.rounds = 8, 24, 1


def make_jpegs(settings: ImageExtractionSettings, folder: Path) -> list[Path]:
    """`count` square JPEGs of `pixels`, from the real pictures in turns."""
    from data.sample_catalog import CATEGORIES, GRADE, draw_picture

    source, rng = Path(settings.pictures), np.random.default_rng(0)
    pictures = []
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        try:
            pictures.append(open_picture(path))
        except UnreadablePicture:  # four of the challenge's are damaged
            continue
        if len(pictures) == settings.count:
            break
    if not pictures:
        kinds = [(category, grade) for category in CATEGORIES for grade in GRADE]
        pictures = [draw_picture(*kind, rng, pixels=settings.pixels) for kind in kinds[: settings.count]]
    paths = [folder / f"{number:03d}.jpg" for number in range(settings.count)]
    for number, path in enumerate(tqdm(paths, "pictures", delay=2, leave=False)):
        picture = pictures[number % len(pictures)].convert("RGB")
        ImageOps.fit(picture, (settings.pixels,) * 2, Image.Resampling.LANCZOS).save(path, quality=90)
    return paths


def preprocessing() -> dict[str, Callable]:
    """Picture to (3, S, S): the stages' own for both encoders, and transformers' processor as a whole.

    SigLIP's pixels leave a worker as bytes; "normalised" is what the model's device makes of them.
    """
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import SiglipImageProcessor

    from siglip_extract.model import normalise_like, resize_like

    processor = SiglipImageProcessor(size={"height": SIGLIP_SIDE, "width": SIGLIP_SIDE})

    def by_processor(picture: Image.Image) -> torch.Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    clip = image_transform_v2(PreprocessCfg(size=CLIP_SIDE), is_train=False)
    resize, normalise = resize_like(processor, SIGLIP_SIDE, "SigLIP"), normalise_like(processor, "SigLIP")
    return {
        "clip": clip,
        "clip normalised": clip,
        "siglip": resize,
        "siglip normalised": lambda picture: normalise(resize(picture)),
        "siglip processor": by_processor,
    }


def plain_open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def per_core(paths: list[Path], rounds: int) -> list[dict[str, object]]:
    """Milliseconds a picture on one thread, the parts of it, and what one decode for two encoders saves."""
    from pipeline.extract_images import shrunk
    from studies.benchmarks.measure import interleave

    prepare = preprocessing()
    clip, siglip, processor = prepare["clip"], prepare["siglip"], prepare["siglip processor"]

    def both(path: Path) -> None:
        picture = open_picture(path, min_side=max(CLIP_SIDE, SIGLIP_SIDE))
        clip(shrunk(picture, CLIP_SIDE)), siglip(picture)

    half, quarter = (
        {path: open_picture(path, min_side=side) for path in paths} for side in (SIGLIP_SIDE, CLIP_SIDE)
    )
    pixels = {path: read_pixels(path, min_side=SIGLIP_SIDE) for path in paths}
    each = {
        "read": lambda path: path.read_bytes(),
        "decode, full": plain_open,
        "decode, for 384": lambda path: open_picture(path, min_side=SIGLIP_SIDE),
        "decode, for 384, pixels alone": lambda path: read_pixels(path, min_side=SIGLIP_SIDE),
        "decode, for 224": lambda path: open_picture(path, min_side=CLIP_SIDE),
        "prepare CLIP, from the decode for 224": lambda path: clip(quarter[path]),
        "prepare CLIP, from the decode for 384": lambda path: clip(half[path]),
        "prepare CLIP, from the decode for 384 averaged": lambda path: clip(shrunk(half[path], CLIP_SIDE)),
        "prepare SigLIP": lambda path: siglip(pixels[path]),
        "prepare SigLIP and normalise": lambda path: prepare["siglip normalised"](pixels[path]),
        "prepare SigLIP, whole processor": lambda path: processor(half[path]),
        "CLIP": lambda path: clip(open_picture(path, min_side=CLIP_SIDE)),
        "CLIP, full decode": lambda path: clip(plain_open(path)),
        "SigLIP": lambda path: siglip(read_pixels(path, min_side=SIGLIP_SIDE)),
        "SigLIP, full decode": lambda path: siglip(plain_open(path)),
        "SigLIP, full decode and whole processor": lambda path: processor(plain_open(path)),
        "both in one pass": both,
    }
    timed = interleave(
        {name: lambda work=work: [work(path) for path in paths] for name, work in each.items()}, rounds=rounds
    )
    ms = {name: 1000 * time["median"] / len(paths) for name, time in timed.items()}
    ratios = {
        "CLIP": ("CLIP, full decode", ms["CLIP, full decode"]),
        "SigLIP": ("SigLIP, full decode and whole processor", ms["SigLIP, full decode and whole processor"]),
        "both in one pass": ("two passes", ms["CLIP"] + ms["SigLIP"]),
    }
    rows = []
    for name, value in ms.items():
        row = {"per core": name, "ms": value, "pictures_per_second": 1000 / value}
        if name in ratios:
            rival, slower = ratios[name]
            row |= {"rival": rival, "times_rival": slower / value}
        rows.append(row)
    return rows


def agreement(paths: list[Path]) -> list[dict[str, object]]:
    """How far embeddings and inputs move when the decode is reduced.

    The encoders are random, and a random encoder puts all pictures close together: `cosine_of_two_pictures` is the
    scale to read the cosine by, and `centred_cosine` takes the mean embedding off first. Pixels differ in units of the
    inputs' standard deviation.
    """
    import open_clip
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from pipeline.extract_images import shrunk

    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32").eval()
    small = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        image_size=SIGLIP_SIDE, patch_size=32,
    )  # fmt: skip
    siglip, prepare = SiglipVisionModel(small).eval(), preprocessing()
    encoders = {"clip": clip.encode_image, "siglip": lambda pixels: siglip(pixels).pooler_output}
    decodes = {
        ("clip", "for 224"): lambda path: open_picture(path, min_side=CLIP_SIDE),
        ("clip", "for 384"): lambda path: open_picture(path, min_side=SIGLIP_SIDE),
        ("clip", "for 384, averaged"): lambda path: shrunk(
            open_picture(path, min_side=SIGLIP_SIDE), CLIP_SIDE
        ),
        ("siglip", "for 384"): lambda path: read_pixels(path, min_side=SIGLIP_SIDE),
    }
    rows = []
    for (encoder, decode), opened in decodes.items():
        inputs = [
            torch.stack([prepare[f"{encoder} normalised"](open_one(path)) for path in paths])
            for open_one in (plain_open, opened)
        ]
        with torch.inference_mode():
            full, reduced = (encoders[encoder](pixels).double() for pixels in inputs)
        mean = full.mean(0)
        row = {
            "agreement with full decode": f"{encoder}, decoded {decode}",
            "cosine_min": torch.cosine_similarity(full, reduced).min(),
            "cosine_of_two_pictures": torch.cosine_similarity(full, full.roll(1, 0)).mean(),
            "centred_cosine_min": torch.cosine_similarity(full - mean, reduced - mean).min(),
            "mean_pixel_difference": (inputs[0] - inputs[1]).abs().mean() / inputs[0].std(),
        }
        rows.append({name: float(v) if torch.is_tensor(v) else v for name, v in row.items()})
    return rows


def from_files(paths: list[Path], settings: ImageExtractionSettings) -> list[dict[str, object]]:
    """Pictures a second through the stages' own loops, decoding and encoding at once."""
    from accelerate import Accelerator

    import clip_finetune.extract_embeddings as clip_stage
    import siglip_extract.extract_embeddings as siglip_stage
    from clip_finetune.config import ClipSettings
    from clip_finetune.model import build_model
    from clip_finetune.pictures import CatalogRows, load_batches, split
    from pipeline.extract_images import BothInputs, load
    from siglip_extract.config import Settings as SiglipSettings
    from studies.benchmarks.measure import gemm_rate, interleave

    on_gpu, device = settings.device == "cuda", choose_device(settings.device)
    dtype = choose_dtype("auto", device)
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=mixed_precision("auto", device))
    clip = build_model(
        ClipSettings(model=ClipSettings.model if on_gpu else "tiny", random_weights=True, price_weight=0)
    ).to(device).eval()  # fmt: skip
    siglip_settings = SiglipSettings(
        image_model=SiglipSettings.image_model if on_gpu else "tiny", random_weights=True, workers=settings.workers,
        batch_size=settings.batch_size, storage="float32",
    )  # fmt: skip
    tower = siglip_stage.load_tower("image", siglip_settings)
    tower.model.to(device)
    folder = paths[0].parent
    table = pd.DataFrame(
        {"image": [paths[row % len(paths)].name for row in range(settings.rows)], "text": ""}
    )
    clip_rows = CatalogRows(table, folder, clip.transform(), clip.side)
    siglip_rows, both_rows = (
        siglip_stage.Pictures(table, folder, tower),
        BothInputs(table, folder, clip, tower),
    )
    everything = [slice(0, settings.rows)]

    batches = split(range(settings.rows), settings.batch_size)

    def run_clip() -> None:
        loader = load_batches(clip_rows, batches, settings.workers, device)
        with tqdm(disable=True) as quiet:
            clip_stage.embed(clip, loader, accelerator, quiet)

    def run_siglip() -> None:
        with tqdm(disable=True) as quiet:
            parts = siglip_stage.embed(siglip_rows, everything, tower, siglip_settings, device, dtype, quiet)
            for _ in parts:
                pass

    def run_both() -> None:
        for clip_pixels, siglip_pixels, _ in load(both_rows, batches, settings.workers, device):
            clip_stage.encode(clip, clip_pixels, accelerator)
            siglip_stage.encode(tower, {"pixel_values": siglip_pixels}, device, dtype)

    rounds = 1 if on_gpu else settings.rounds
    work = {"CLIP": run_clip, "SigLIP": run_siglip, "both in one pass": run_both}
    timed = interleave(work, rounds=rounds)
    seconds = {name: time["median"] for name, time in timed.items()}
    flops = {"CLIP": clip_flops(clip), "SigLIP": siglip_flops(tower)}
    flops["both in one pass"] = sum(flops.values())
    rate = gemm_rate(settings.device, dtype)
    rows = []
    for name, time in seconds.items():
        per_second = settings.rows / time
        rows.append({
            "from files": name, "models": "full size" if on_gpu else "tiny", "workers": settings.workers,
            "pictures_per_second": per_second, "gemm_share": per_second * flops[name] / rate,
        })  # fmt: skip
    rows[-1]["times_two_passes"] = (seconds["CLIP"] + seconds["SigLIP"]) / seconds["both in one pass"]
    return rows


def clip_flops(clip: PriceClip) -> float:
    """FLOP of one picture's embedding."""
    visual = clip.clip.visual
    patches, width = visual.grid_size[0] * visual.grid_size[1], visual.conv1.out_channels
    blocks = visual.transformer.resblocks
    return vision_flops(blocks, visual.conv1.weight.numel(), patches + 1, patches, width, len(blocks))


def siglip_flops(tower: Tower) -> float:
    config, patch = tower.model.config, tower.model.config.patch_size
    patches, width = (config.image_size // patch) ** 2, config.hidden_size
    layers = [module for name, module in tower.model.named_modules() if name.endswith("encoder")][0]
    return vision_flops(layers, 3 * patch**2 * width, patches, patches, width, config.num_hidden_layers)


def vision_flops(
    blocks: nn.Module, patch_weights: int, tokens: int, patches: int, width: int, layers: int
) -> float:
    """FLOP of one picture: the matrices of the transformer, the patches, and attention's products."""
    matrices = sum(weight.numel() for weight in blocks.parameters() if weight.ndim > 1)
    return 2.0 * (matrices * tokens + patch_weights * patches) + 4.0 * layers * width * tokens**2


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ImageExtractionSettings, argv, description=__doc__.split("\n")[0])
    guard_torchvision()
    import torch

    from studies.benchmarks.measure import report

    with tempfile.TemporaryDirectory() as folder:
        paths = make_jpegs(settings, Path(folder))
        size = {
            "jpegs": len(paths),
            "kilobytes": float(np.mean([path.stat().st_size for path in paths])) / 1000,
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows = [size, *per_core(paths, settings.rounds), *agreement(paths[:16])]
        torch.set_num_threads(threads)
        rows += from_files(paths, settings)
    report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
