"""Image embeddings: decoding at a reduced scale beside decoding in full, and one pass for two encoders beside two.

    python -m studies.benchmarks.image_extraction
    python -m studies.benchmarks.image_extraction --device cuda --rows 16384 --batch-size 256 --workers 15   # full size

There are three parts. "per core": on one thread, JPEGs of 1000 × 1000 pixels are opened and made into the input of CLIP
(224) and SigLIP (384), as the stages do it, and as one does it with Pillow and the libraries' own preprocessing.
"agreement": how far the embeddings move when the decode is reduced. "from files": the stages' own extraction loop with
its workers, on the CPU with the tiny models, on CUDA with random models of full size.

The pictures are real ones of any size, enlarged and saved at quality 90, or drawn ones where there are none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm import tqdm

from contracts.errors import run_entry_point
from studies.tables import RESULTS
from training.device import choose_device, choose_dtype, guard_torchvision
from training.pictures import PictureRows, UnreadablePicture, open_picture, read_pixels
from training.settings import parse_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from clip_finetune.encoder import Encoder as ClipEncoder
    from clip_finetune.model import PriceClip
    from siglip_extract.encoder import Encoder as SiglipEncoder
    from siglip_extract.model import Tower
    from training.extraction import BatchEncoder, InputRows

CLIP_SIDE = 224
SIGLIP_SIDE = 384
JPEG_QUALITY = 90
AGREEMENT_PICTURES = 16


@dataclass
class ImageExtractionSettings:
    pictures: Path = Path("../shared/data/challenge/images")
    """Folder with pictures to enlarge; where it is absent, pictures are drawn."""
    count: int = 60
    """JPEGs to make."""
    pixels: int = 1000
    """Pixels of their sides."""
    rows: int = 512
    """Rows of the catalogue that is extracted from files; the JPEGs repeat."""
    workers: int = 2
    """Processes that decode."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: tiny models; cuda: ViT-L/14 and SigLIP so400m with random weights."""
    batch_size: int = 64
    """Pictures per forward pass."""
    rounds: int = 5
    """Times that every rival is measured, in turns."""
    quick: bool = False
    """Use 8 JPEGs, 24 rows and one round, to see that it runs."""
    out: Path = RESULTS / "image_extraction.json"
    """Json file to write."""

    def __post_init__(self) -> None:
        if self.quick:
            self.count = 8
            self.rows = 24
            self.rounds = 1


def make_jpegs(settings: ImageExtractionSettings, folder: Path) -> list[Path]:
    """`count` square JPEGs of `pixels`, made from the source pictures in turns."""
    pictures = real_pictures(settings) or drawn_pictures(settings)
    size = (settings.pixels, settings.pixels)
    paths = [folder / f"{number:03d}.jpg" for number in range(settings.count)]
    for number, path in enumerate(tqdm(paths, "pictures", delay=2, leave=False)):
        picture = pictures[number % len(pictures)].convert("RGB")
        ImageOps.fit(picture, size, Image.Resampling.LANCZOS).save(path, quality=JPEG_QUALITY)
    return paths


def real_pictures(settings: ImageExtractionSettings) -> list[Image.Image]:
    """Up to `count` readable pictures of the folder."""
    if not settings.pictures.is_dir():
        return []
    found: list[Image.Image] = []
    for path in sorted(settings.pictures.iterdir()):
        if len(found) == settings.count:
            break
        try:
            found.append(open_picture(path))
        except UnreadablePicture:
            continue  # a few real pictures are damaged
    return found


def drawn_pictures(settings: ImageExtractionSettings) -> list[Image.Image]:
    """Up to `count` pictures of the sample catalogue, one for each category and grade."""
    from data.sample_catalog import CATEGORIES, GRADE, draw_picture

    rng = np.random.default_rng(0)
    kinds = [(category, grade) for category in CATEGORIES for grade in GRADE]
    return [draw_picture(*kind, rng, pixels=settings.pixels) for kind in kinds[: settings.count]]


@dataclass
class Preprocessing:
    """What makes a decoded picture into an encoder's input (3, S, S)."""

    clip: Callable[[Image.Image], Tensor]
    """CLIP's, normalised float32"""
    siglip: Callable[[Image.Image | np.ndarray], Tensor]
    """the stage's own for SigLIP: bytes, as they leave a worker process"""
    normalise: Callable[[Tensor], Tensor]
    """what the model's device then does with SigLIP's bytes"""
    siglip_processor: Callable[[Image.Image], Tensor]
    """SigLIP's, by transformers' processor as a whole: normalised float32"""

    def siglip_normalised(self, picture: Image.Image | np.ndarray) -> Tensor:
        return self.normalise(self.siglip(picture))


def preprocessing() -> Preprocessing:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from transformers import SiglipImageProcessor

    from siglip_extract.model import normalise_like, resize_like

    processor = SiglipImageProcessor(size={"height": SIGLIP_SIDE, "width": SIGLIP_SIDE})
    return Preprocessing(
        clip=image_transform_v2(PreprocessCfg(size=CLIP_SIDE), is_train=False),
        siglip=resize_like(processor, SIGLIP_SIDE, "SigLIP"),
        normalise=normalise_like(processor, "SigLIP"),
        siglip_processor=lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0],
    )


def plain_open(path: Path) -> Image.Image:
    """A full decode with Pillow."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def open_for_clip(path: Path) -> Image.Image:
    return open_picture(path, min_side=CLIP_SIDE)


def open_for_siglip(path: Path) -> Image.Image:
    return open_picture(path, min_side=SIGLIP_SIDE)


def pixels_for_siglip(path: Path) -> np.ndarray:
    return read_pixels(path, min_side=SIGLIP_SIDE)


def averaged_for_clip(path: Path) -> Image.Image:
    """CLIP's picture in the one pass for both encoders: SigLIP's, averaged down."""
    from pipeline.extract_images import shrunk

    return shrunk(open_for_siglip(path), CLIP_SIDE)


def per_core(paths: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per picture on one thread: the stages' ways, their parts, and the plain ways."""
    from pipeline.extract_images import shrunk
    from studies.benchmarks.measure import interleave

    prepare = preprocessing()
    of_clip = {path: open_for_clip(path) for path in paths}
    of_siglip = {path: open_for_siglip(path) for path in paths}
    pixels = {path: pixels_for_siglip(path) for path in paths}

    def both_in_one_pass(path: Path) -> None:
        picture = open_for_siglip(path)
        prepare.clip(shrunk(picture, CLIP_SIDE))
        prepare.siglip(picture)

    ways: dict[str, Callable[[Path], object]] = {
        "read": lambda path: path.read_bytes(),
        "decode, full": plain_open,
        "decode, for 384": open_for_siglip,
        "decode, for 384, pixels alone": pixels_for_siglip,
        "decode, for 224": open_for_clip,
        "prepare CLIP, from the decode for 224": lambda path: prepare.clip(of_clip[path]),
        "prepare CLIP, from the decode for 384": lambda path: prepare.clip(of_siglip[path]),
        "prepare CLIP, from the decode for 384 averaged": (
            lambda path: prepare.clip(shrunk(of_siglip[path], CLIP_SIDE))
        ),
        "prepare SigLIP": lambda path: prepare.siglip(pixels[path]),
        "prepare SigLIP and normalise": lambda path: prepare.siglip_normalised(pixels[path]),
        "prepare SigLIP, whole processor": lambda path: prepare.siglip_processor(of_siglip[path]),
        "CLIP": lambda path: prepare.clip(open_for_clip(path)),
        "CLIP, full decode": lambda path: prepare.clip(plain_open(path)),
        "SigLIP": lambda path: prepare.siglip(pixels_for_siglip(path)),
        "SigLIP, full decode": lambda path: prepare.siglip(plain_open(path)),
        "SigLIP, full decode and whole processor": lambda path: prepare.siglip_processor(plain_open(path)),
        "both in one pass": both_in_one_pass,
    }

    def over_all_pictures(way: Callable[[Path], object]) -> Callable[[], None]:
        def work() -> None:
            for path in paths:
                way(path)

        return work

    times = interleave({name: over_all_pictures(way) for name, way in ways.items()}, rounds=rounds)
    ms = {name: 1000 * seconds["median"] / len(paths) for name, seconds in times.items()}
    ms_of_rivals = {
        "CLIP": ("CLIP, full decode", ms["CLIP, full decode"]),
        "SigLIP": ("SigLIP, full decode and whole processor", ms["SigLIP, full decode and whole processor"]),
        "both in one pass": ("two passes", ms["CLIP"] + ms["SigLIP"]),
    }
    rows = []
    for name in ways:
        row = {"per core": name, "ms": ms[name], "pictures_per_second": 1000 / ms[name]}
        if name in ms_of_rivals:
            rival, ms_of_rival = ms_of_rivals[name]
            row["rival"] = rival
            row["times_rival"] = ms_of_rival / ms[name]
        rows.append(row)
    return rows


class ReducedDecode(NamedTuple):
    """A decode at a reduced scale, and the encoder whose embedding it may move."""

    name: str
    decode: Callable[[Path], Any]
    prepare: Callable[[Any], Tensor]
    encode: Callable[[Tensor], Tensor]


def agreement(paths: list[Path]) -> list[dict[str, Any]]:
    """How far inputs and embeddings move when the decode is reduced.

    The encoders are random, and a random encoder puts all pictures close together: `cosine_of_two_pictures` is the
    scale by which to read the cosine, and `centred_cosine` is taken after the mean embedding was subtracted. Pixels
    differ in units of the inputs' standard deviation.
    """
    import open_clip
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32").eval()
    small = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        image_size=SIGLIP_SIDE, patch_size=32,
    )  # fmt: skip
    siglip = SiglipVisionModel(small).eval()
    prepare = preprocessing()

    def encode_siglip(pixels: Tensor) -> Tensor:
        return siglip(pixels).pooler_output

    cases = [
        ReducedDecode("clip, decoded for 224", open_for_clip, prepare.clip, clip.encode_image),
        ReducedDecode("clip, decoded for 384", open_for_siglip, prepare.clip, clip.encode_image),
        ReducedDecode("clip, decoded for 384, averaged", averaged_for_clip, prepare.clip, clip.encode_image),
        ReducedDecode("siglip, decoded for 384", pixels_for_siglip, prepare.siglip_normalised, encode_siglip),
    ]
    rows = []
    for case in cases:
        of_full = torch.stack([case.prepare(plain_open(path)) for path in paths])
        of_reduced = torch.stack([case.prepare(case.decode(path)) for path in paths])
        with torch.inference_mode():
            full = case.encode(of_full).double()
            reduced = case.encode(of_reduced).double()
        mean = full.mean(0)
        next_picture = full.roll(1, 0)
        rows.append(
            {
                "agreement with full decode": case.name,
                "cosine_min": torch.cosine_similarity(full, reduced).min().item(),
                "cosine_of_two_pictures": torch.cosine_similarity(full, next_picture).mean().item(),
                "centred_cosine_min": torch.cosine_similarity(full - mean, reduced - mean).min().item(),
                "mean_pixel_difference": ((of_full - of_reduced).abs().mean() / of_full.std()).item(),
            }
        )
    return rows


def from_files(paths: list[Path], settings: ImageExtractionSettings) -> list[dict[str, Any]]:
    """Pictures per second through the stages' own loop, which decodes and encodes at the same time."""
    from pipeline.extract_images import BothInputs
    from studies.benchmarks.measure import gemm_rate, interleave

    on_gpu = settings.device == "cuda"
    device = choose_device(settings.device)
    dtype = choose_dtype("auto", device)
    clip = random_clip(device, on_gpu)
    siglip = random_siglip(settings.device, on_gpu)

    folder = paths[0].parent
    names = [paths[row % len(paths)].name for row in range(settings.rows)]
    table = pd.DataFrame({"image": names})
    both = BothInputs(clip.model, siglip.tower)
    both_rows = PictureRows(names, folder, both, min_side=both.min_side)
    rivals = {
        "CLIP": extraction(clip.rows(table, folder), [clip], settings, device),
        "SigLIP": extraction(siglip.rows(table, folder), [siglip], settings, device),
        "both in one pass": extraction(both_rows, [clip, siglip], settings, device),
    }
    times = interleave(rivals, rounds=1 if on_gpu else settings.rounds)

    flop = {"CLIP": clip_flop(clip.model), "SigLIP": siglip_flop(siglip.tower)}
    flop["both in one pass"] = flop["CLIP"] + flop["SigLIP"]
    rate = gemm_rate(settings.device, dtype)
    rows = []
    for name, seconds in times.items():
        per_second = settings.rows / seconds["median"]
        rows.append(
            {
                "from files": name,
                "models": "full size" if on_gpu else "tiny",
                "workers": settings.workers,
                "pictures_per_second": per_second,
                "gemm_share": per_second * flop[name] / rate,
            }
        )
    two_passes = times["CLIP"]["median"] + times["SigLIP"]["median"]
    rows[-1]["times_two_passes"] = two_passes / times["both in one pass"]["median"]
    return rows


def random_clip(device: torch.device, full_size: bool) -> ClipEncoder:
    """The stage's encoder with random weights."""
    from clip_finetune.config import ClipSettings
    from clip_finetune.encoder import Encoder
    from clip_finetune.model import build_model

    name = ClipSettings.model if full_size else "tiny"
    settings = ClipSettings(model=name, random_weights=True, price_weight=0, gradient_checkpointing=False)
    model = build_model(settings).eval()
    dtype = choose_dtype("auto", device)
    return Encoder(model, meta={}, device=device, dtype=dtype, batch_size=settings.batch_size, workers=0)


def random_siglip(device: str, full_size: bool) -> SiglipEncoder:
    """The stage's encoder of pictures with random weights."""
    from siglip_extract.config import Settings
    from siglip_extract.encoder import Encoder

    name = Settings.image_model if full_size else "tiny"
    return Encoder.open(name, kind="image", random_weights=True, device=device)


def extraction(
    rows: InputRows, encoders: list[BatchEncoder], settings: ImageExtractionSettings, device: torch.device
) -> Callable[[], None]:
    """A call that embeds all rows as one shard and throws the embeddings away."""
    from training.extraction import embed_shards

    def work() -> None:
        shards = embed_shards(
            [slice(0, len(rows))],
            rows,
            encoders,
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=device,
            quiet=True,
        )
        for _ in shards:
            pass

    return work


def clip_flop(clip: PriceClip) -> float:
    """FLOP of one picture's embedding."""
    visual = clip.clip.visual
    blocks = visual.transformer.resblocks
    patches = visual.grid_size[0] * visual.grid_size[1]
    return vision_flop(
        blocks,
        patch_weights=visual.conv1.weight.numel(),
        tokens=patches + 1,  # and the class token
        patches=patches,
        width=visual.conv1.out_channels,
        layers=len(blocks),
    )


def siglip_flop(tower: Tower) -> float:
    """FLOP of one picture's embedding."""
    config: Any = tower.model.config
    encoder = next(module for name, module in tower.model.named_modules() if name.endswith("encoder"))
    patches = (config.image_size // config.patch_size) ** 2
    return vision_flop(
        encoder,
        patch_weights=3 * config.patch_size**2 * config.hidden_size,
        tokens=patches,
        patches=patches,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
    )


def vision_flop(
    blocks: nn.Module, *, patch_weights: int, tokens: int, patches: int, width: int, layers: int
) -> float:
    """FLOP of one picture: the transformer's matrices, the patches, and attention's two products with the scores."""
    matrices = sum(weight.numel() for weight in blocks.parameters() if weight.ndim > 1)
    of_weights = 2.0 * (matrices * tokens + patch_weights * patches)
    of_attention = 4.0 * layers * width * tokens**2
    return of_weights + of_attention


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(ImageExtractionSettings, argv, description=__doc__.split("\n")[0])
    guard_torchvision()
    import torch

    from studies.benchmarks.measure import report

    with tempfile.TemporaryDirectory() as folder:
        paths = make_jpegs(settings, Path(folder))
        kilobytes = float(np.mean([path.stat().st_size for path in paths])) / 1000
        rows: list[dict[str, Any]] = [{"jpegs": len(paths), "kilobytes": kilobytes}]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows += per_core(paths, settings.rounds)
        rows += agreement(paths[:AGREEMENT_PICTURES])
        torch.set_num_threads(threads)
        rows += from_files(paths, settings)
    report(settings.out, rows, settings.device)


if __name__ == "__main__":
    run_entry_point(main)
