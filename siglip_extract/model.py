"""The two SigLIP towers, each with the function that turns a picture or a text into its input.

Sigmoid Loss for Language Image Pre-Training (Zhai et al. 2023, arXiv:2303.15343).
B batch, T tokens, S side of the input picture in pixels, D_in width of the embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from contracts.errors import InputError
from contracts.files import atomic_write
from training.device import missing_model, require_model_source

# Copied from the published config.json files; used only with random weights.
VISION_CONFIGS = {
    "google/siglip-so400m-patch14-384": dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14,
    ),
    "tiny": dict(
        hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        image_size=64, patch_size=16,
    ),
}  # fmt: skip
TEXT_CONFIGS = {
    "google/siglip-large-patch16-384": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        vocab_size=32000, max_position_embeddings=64,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=4096, max_position_embeddings=64,
    ),
}  # fmt: skip
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json has them
PADDING, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in SigLIP's own vocabulary
END_ID = 1


@dataclass
class Tower:
    """A frozen encoder in evaluation mode, on the CPU in float32 until `to` moves it."""

    model: SiglipVisionModel | SiglipTextModel
    prepare: Callable[[Any], torch.Tensor]
    """image: pixels (H, W, 3) or a Pillow picture to (3, S, S) uint8; text: list of B str to token ids (B, T)"""
    width: int
    """D_in"""
    picture_size: int = 0
    """S; 0 in a text tower"""
    normalise: Callable[[torch.Tensor], torch.Tensor] | None = None
    """pixels (B, 3, S, S) uint8 to float32 as the model takes them; None in a text tower"""
    vocabulary: str = ""
    """the tokenizer's tokens and ids; empty in an image tower"""
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    """of the forward pass; the weights stay float32"""

    def to(self, device: torch.device, dtype: torch.dtype) -> Tower:
        self.model.to(device)
        self.device = device
        self.dtype = dtype
        return self

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D_in) of a batch of what `prepare` made, on the model's device."""
        if self.normalise is None:
            return self.model(input_ids=inputs).pooler_output
        return self.model(pixel_values=self.normalise(inputs)).pooler_output

    def encode_batch(self, inputs: torch.Tensor) -> np.ndarray:
        """Embeddings (B, D_in) float32 of a batch of what `prepare` made, wherever it lies."""
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), autocast:
            return self(inputs.to(self.device, non_blocking=True)).float().cpu().numpy()

    def checkpoint(self) -> str:
        """Hash of weights and vocabulary: only embeddings of an equal one can be compared with each other."""
        digest = hashlib.sha256(self.vocabulary.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def image_tower(name: str, *, random_weights: bool = False) -> Tower:
    """Image tower of checkpoint `name` (hub id or folder), or its architecture with weights from torch's seed.

    Raises InputError for a checkpoint that is missing, incomplete or not SigLIP's.
    """
    if random_weights:
        model = SiglipVisionModel(vision_config(name))
        side = model.config.image_size
        processor = SiglipImageProcessor(size={"height": side, "width": side})
    else:
        model = _pretrained(SiglipVisionModel, "siglip_vision_model", name)
        processor = _from_source(AutoImageProcessor, name)
        side = model.config.image_size
        if (processor.size["height"], processor.size["width"]) != (side, side):
            raise InputError(
                f"model {name}: its processor makes {processor.size} of a picture, the tower takes {side}"
            )

    return Tower(
        _frozen(model), resize_like(processor, side, name), model.config.hidden_size,
        picture_size=side, normalise=normalise_like(processor, name),
    )  # fmt: skip


def resize_like(processor, side: int, name: str) -> Callable[[np.ndarray | Image.Image], torch.Tensor]:
    """The resizing step of `processor`, which turns RGB pixels (H, W, 3) into (3, side, side) uint8.

    It takes a third of the processor's time: torch resizes pictures in the layout in which they are decoded, channels
    last, twice as fast as the planes that the processor copies them into. The pixels are normalised later, on the
    model's device, so that a worker process hands over bytes, a quarter of the size of float32.
    """
    if processor.resample not in RESAMPLING:
        raise InputError(f"model {name}: its processor does not resize as SigLIP's do")
    # not a nested function: on macOS the workers get it pickled
    return partial(_resize, side=side, mode=RESAMPLING[processor.resample])


def _resize(picture: np.ndarray | Image.Image, *, side: int, mode: str) -> torch.Tensor:
    array = picture if isinstance(picture, np.ndarray) else np.array(picture)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (side, side), mode=mode, antialias=True)
    return resized[0].contiguous()


def normalise_like(processor, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The normalising step of `processor`, which turns pixels (B, 3, S, S) uint8 into float32 of the same shape."""
    if not (processor.do_rescale and processor.do_normalize):
        raise InputError(f"model {name}: its processor does not normalise as SigLIP's do")
    scale = 1 / processor.rescale_factor  # mean and deviation are of values 0 to 1, the pixels are 0 to 255
    mean = torch.tensor(processor.image_mean)[:, None, None] * scale
    std = torch.tensor(processor.image_std)[:, None, None] * scale

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().sub_(mean.to(pixels.device)).div_(std.to(pixels.device))

    return normalise


def text_tower(name: str, *, random_weights: bool = False, tokenizer_file: Path | None = None) -> Tower:
    """Text tower of checkpoint `name` (hub id or folder), or its architecture with weights from torch's seed.

    Args:
        tokenizer_file: with random weights, the file that `train_tokenizer` made.

    Raises:
        InputError: a checkpoint that is missing, incomplete or not SigLIP's, or a missing tokenizer file.
    """
    if random_weights:
        config = text_config(name)
        tokenizer = _read_tokenizer(name, tokenizer_file)
        model = SiglipTextModel(config)
    else:
        model = _pretrained(SiglipTextModel, "siglip_text_model", name)
        tokenizer = _from_source(AutoTokenizer, name)
    prepare = partial(_tokenise, tokenizer=tokenizer, max_tokens=model.config.max_position_embeddings)
    vocabulary = str(sorted(tokenizer.get_vocab().items()))
    return Tower(_frozen(model), prepare, model.config.projection_size, vocabulary=vocabulary)


def _tokenise(texts: list[str], *, tokenizer, max_tokens: int) -> torch.Tensor:
    # SigLIP was trained on exactly 64 tokens, with padding that is not masked, and pools the last position, which is
    # padding in a short text. Padding only to the longest text of a batch would change every embedding and make it
    # depend on its neighbours, so there is nothing to gain by sorting by length.
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    return tokens["input_ids"]


def vision_config(name: str) -> SiglipVisionConfig:
    return SiglipVisionConfig(**_architecture(VISION_CONFIGS, name))


def text_config(name: str) -> SiglipTextConfig:
    # transformers' default end token, 49407, lies outside SigLIP's vocabulary
    return SiglipTextConfig(
        **_architecture(TEXT_CONFIGS, name), bos_token_id=None, eos_token_id=END_ID, pad_token_id=END_ID
    )


def train_tokenizer(name: str, corpus: list[str], folder: Path) -> Path:
    """The file of a lower-case BPE tokenizer for architecture `name`, trained on `corpus` once and kept in `folder`.

    The file name holds a hash of the corpus, so that another catalogue gets a tokenizer of its own.
    """
    vocab_size = text_config(name).vocab_size
    digest = hashlib.sha256("\0".join(corpus).encode()).hexdigest()[:16]
    path = folder / f"tokenizer_{vocab_size}_{digest}.json"
    if not path.is_file():
        with atomic_write(path) as file:
            file.write(_train_bpe(corpus, vocab_size).to_str())
    return path


def _read_tokenizer(name: str, path: Path | None) -> PreTrainedTokenizerFast:
    if path is None:
        raise InputError(f"model {name}: with random weights a text tower needs the file of its tokenizer")
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer; run python -m siglip_extract.extract_embeddings train")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END, pad_token=END, unk_token=UNKNOWN, padding_side="right"
    )


def _train_bpe(corpus: list[str], vocab_size: int):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    # the time for a word grows with the square of its length, so a longer one is read in pieces of 100 characters
    in_pieces = pre_tokenizers.Split(Regex(".{1,100}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), in_pieces])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, END_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PADDING, END, UNKNOWN], limit_alphabet=500, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _architecture(known: dict[str, dict[str, int]], name: str) -> dict[str, int]:
    if name not in known:
        raise InputError(f"model {name}: --random-weights knows the architectures {', '.join(known)}")
    return known[name]


def _pretrained(model_class: type, tower_type: str, name: str) -> SiglipVisionModel | SiglipTextModel:
    """One tower out of a checkpoint that usually holds both."""
    logging.set_verbosity_error()  # it would list the other tower's weights as unexpected
    config = _from_source(AutoConfig, name)
    if config.model_type not in ("siglip", tower_type):
        raise InputError(
            f"model {name}: a {config.model_type} checkpoint; this stage takes SigLIP checkpoints"
        )
    model, report = _from_source(
        model_class, name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # transformers would fill either with random numbers
    if bad := sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"]):
        raise InputError(
            f"model {name}: {len(bad)} weights of this tower are missing or misshapen, first {bad[0]}"
        )
    return model


def _from_source(loader: type, name: str, **options: Any) -> Any:
    """`loader.from_pretrained`, with an InputError of one line for whatever is missing."""
    source = require_model_source(name)
    try:
        return loader.from_pretrained(source, **options)
    except ImportError as error:
        # SigLIP's tokenizer is a SentencePiece model, and transformers does not bring that library
        reason = str(error).strip().split(". ")[0]
        raise InputError(f"model {name}: {reason}; pip install sentencepiece") from None
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise InputError(f"model {name}: {' '.join(str(error).split())[:200]}") from None
        raise missing_model(name, error) from None


def _frozen(model):
    return model.eval().requires_grad_(False)
