"""CLIP with a price head: how it is built, saved, loaded, and unfrozen layer by layer.

B batch, D_in width of the joint image-text space (768 for ViT-L/14), S side of a picture in pixels, T tokens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.pretrained import download_pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from clip_finetune.config import ClipSettings
from contracts.errors import InputError
from contracts.files import write_json
from training.device import missing_model, require_model_source
from training.sealed import require_whole
from training.weights import read_weights, save_weights

TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "layers": 3, "width": 96, "head_width": 32},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 2},
}
# the two names under which open_clip looks for a model in a folder, and the head beside them
WEIGHTS, CONFIG, HEAD = "open_clip_model.safetensors", "open_clip_config.json", "price_head.safetensors"


class PriceHead(nn.Module):
    """log1p of the price from an image embedding: LayerNorm → Linear(D_in→256) → GELU → Linear(256→1)."""

    def __init__(self, width: int, hidden: int = 256):
        super().__init__()
        # LayerNorm comes first because the coordinates of a unit vector of width 768 are only about 0.04
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )
        self.register_buffer("log_price_range", torch.tensor([-torch.inf, torch.inf]))

    def start_from(self, log_price: Tensor) -> None:
        """Begin at the mean of the training prices (N,) and remember their range."""
        nn.init.constant_(self.layers[-1].bias, log_price.mean().item())
        self.log_price_range.copy_(torch.stack([log_price.min(), log_price.max()]))

    def forward(self, image: Tensor) -> Tensor:
        """(B, D_in) -> (B,)"""
        return self.layers(image).squeeze(-1)

    def predict(self, image: Tensor) -> Tensor:
        """The same as `forward`, clamped to the range of the training prices."""
        return self(image).clamp(*self.log_price_range)


class PriceClip(nn.Module):
    """CLIP and, unless the price part is off, a price head on its image embedding."""

    def __init__(self, clip: open_clip.CLIP, model_cfg: dict[str, Any], with_price: bool):
        super().__init__()
        self.clip, self.model_cfg = clip, model_cfg
        self.price_head = PriceHead(model_cfg["embed_dim"]) if with_price else None

    @property
    def width(self) -> int:
        return self.model_cfg["embed_dim"]

    def encode_image(self, picture: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D_in) float32 of unit length"""
        return F.normalize(self.clip.encode_image(picture).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, D_in) float32 of unit length"""
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1)

    @property
    def side(self) -> int:
        """S, the side of a picture in pixels."""
        return max(self.clip.visual.image_size)

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        return self.clip.visual.preprocess_cfg

    def transform(self) -> Callable:
        """Turns a Pillow picture into (3, S, S) float32, without augmentation.

        The shorter side is resized to S, the centre is cropped, and CLIP's mean and deviation are applied.
        """
        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)


def build_model(settings: ClipSettings) -> PriceClip:
    """The model to start from. Raises InputError when its weights are neither on disk nor downloadable."""
    if settings.model == "tiny":
        clip, model_cfg = open_clip.CLIP(**TINY), TINY
        open_clip.model.set_model_preprocess_cfg(
            clip, asdict(PreprocessCfg(size=TINY["vision_cfg"]["image_size"]))
        )
    else:
        clip, model_cfg = _build_open_clip(settings)
    if not isinstance(clip, open_clip.CLIP) or not hasattr(clip.visual, "transformer"):
        raise InputError(
            f"--model {settings.model}: not a CLIP vision transformer; choose a ViT architecture"
        )
    clip.set_grad_checkpointing(settings.gradient_checkpointing)
    return PriceClip(clip, model_cfg, with_price=settings.price_weight > 0)


def _build_open_clip(settings: ClipSettings) -> tuple[nn.Module, dict[str, Any]]:
    if settings.model in open_clip.list_models():
        source, pretrained = settings.model, None if settings.random_weights else settings.pretrained
    else:
        name, pretrained = require_model_source(settings.model), None
        source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    try:
        model_cfg = open_clip.get_model_config(source)
        if pretrained and (tag := open_clip.get_pretrained_cfg(source, pretrained)):
            download_pretrained(tag)  # not left to create_model, which logs several lines when this fails
            model_cfg["quick_gelu"] = tag.get("quick_gelu", False)
        elif pretrained and not Path(pretrained := str(Path(pretrained).expanduser())).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(source))
            raise InputError(f"--pretrained {pretrained}: no such file, and not a tag of {source} ({tags})")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # settled by the tag, above
            clip = open_clip.create_model(
                source,
                pretrained=pretrained,
                load_weights=not settings.random_weights,
                require_pretrained=not settings.random_weights,  # else a hub failure leaves random weights
                quick_gelu=model_cfg.get("quick_gelu", False),
            )
    except InputError:
        raise
    except Exception as error:  # the hub client raises many unrelated types
        raise missing_model(f"{settings.model} {settings.pretrained}".strip(), error) from None
    return clip, model_cfg


def build_tokenizer(settings: ClipSettings, model: PriceClip) -> Callable[[list[str]], Tensor]:
    """Turns texts into tokens (B, T) int64. CLIP's vocabulary comes with open_clip, any other with its model."""
    length = model.clip.context_length
    if "hf_tokenizer_name" not in model.model_cfg["text_cfg"]:
        return open_clip.SimpleTokenizer(context_length=length)
    local = Path(settings.model).expanduser()
    try:
        return open_clip.get_tokenizer(f"local-dir:{local}" if local.is_dir() else f"hf-hub:{settings.model}")
    except Exception as error:
        raise missing_model(model.model_cfg["text_cfg"]["hf_tokenizer_name"], error) from None


def save_model(folder: Path, model: PriceClip) -> None:
    """Write the CLIP in open_clip's own format (`local-dir:<folder>` loads it) and the price head beside it."""
    config = {"model_cfg": model.model_cfg, "preprocess_cfg": model.preprocess_cfg}
    write_json(folder / CONFIG, config)
    save_weights(folder / WEIGHTS, model.clip.state_dict())
    if model.price_head is not None:
        save_weights(folder / HEAD, model.price_head.state_dict())


def load_model(folder: Path) -> PriceClip:
    """The model of a finished run, in evaluation mode. Raises InputError where one of its files is damaged."""
    require_whole(folder)
    clip = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    model_cfg = open_clip.get_model_config(f"local-dir:{folder}")
    model = PriceClip(clip, model_cfg, with_price=(folder / HEAD).is_file())
    if model.price_head is not None:
        model.price_head.load_state_dict(read_weights(folder / HEAD))
    return model.eval()


def depth(name: str, model: PriceClip) -> int:
    """How far below the output of its tower a parameter lies.

    0 stands for the projections, the final norms, the logit scale and the price head, j for block j from the top, and
    one more than the number of blocks for the embeddings.
    """
    tower = model.clip.visual if name.startswith("clip.visual.") else model.clip
    blocks = len(tower.transformer.resblocks)
    if match := re.search(r"transformer\.resblocks\.(\d+)\.", name):
        return blocks - int(match[1])
    return blocks + 1 if re.search(r"embedding|conv1|ln_pre", name) else 0


def unfreeze(model: PriceClip, blocks: int) -> None:
    """Train the parameters of the top `blocks` of each tower and everything above them, freeze the rest."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(depth(name, model) <= blocks)


def parameter_groups(model: PriceClip, settings: ClipSettings) -> list[dict[str, Any]]:
    """AdamW groups, each with its `peak_lr`, for the head and for each depth. Vectors and scalars do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        lr = settings.lr * settings.layer_decay ** depth(name, model)
        peak_lr = settings.head_lr if name.startswith("price_head.") else lr
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((peak_lr, decay), []).append(parameter)
    return [
        {"params": params, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": decay}
        for (peak_lr, decay), params in groups.items()
    ]
