"""Every setting of this folder with its default. Each program has one dataclass; its fields are its flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY

MAX_CHARACTERS = 2000
"""An encoder is given at most this much of a text: 128 tokens are some 600 characters, and the rest only costs time."""
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class PairSettings:
    pairs: str = ""
    """folder with train.txt, valid.txt and test.txt, or with left.csv, right.csv and pairs.csv"""
    left: str = ""
    """csv of the catalogue that is matched (id, title, upc; brand, model, category, price where known)"""
    right: str = ""
    """csv of the catalogue that is searched"""
    out: str = "catalogues"
    """folder to write"""
    non_matches: int = 9
    """similar other products that are labelled as non-matches per matched product"""

    def __post_init__(self) -> None:
        _require_not_negative(self, "non_matches")


@dataclass
class TrainSettings:
    pairs: str = "catalogues"
    """folder with labelled pairs, such as product_matching.pairs writes"""
    workspace: str = str(REPOSITORY)
    """folder with checkpoints/"""
    run: str = "product_matching"
    """name of the run folder under checkpoints/"""
    model: str = DEFAULT_MODEL
    """sentence-transformers model: hub id or local folder"""
    max_length: int = 128
    """tokens of a product text that the encoder reads"""
    held_out: Literal["matches", "pairs"] = "matches"
    """matches: records of validation and test matches stay out of training; pairs: those of their non-matches, too"""
    negatives: int = 2
    """mined hard negatives per match; each makes one triplet"""

    lora_rank: int = 8
    """rank of the adapters; 0 trains all weights instead"""
    lora_alpha: int = 16
    """adapters are scaled by alpha / rank"""
    lora_dropout: float = 0.1
    """dropout before each adapter"""
    target_modules: str = "auto"
    """layers that get adapters, such as query,key,value; auto: attention and dense layers of BERT, MPNet and XLM-R"""

    batch_size: int = 32
    """triplets per step; the other positives and negatives of the batch serve as further negatives"""
    cached_mini_batch: int = 0
    """texts encoded at once by the cached loss, for a batch that does not fit into memory; 0 uses the plain loss"""
    scale: float = 20.0
    """inverse temperature of the loss: cosines are multiplied by it"""
    lr: float = 1e-3
    """peak learning rate of AdamW; 2e-5, usual for full fine-tuning, hardly moves adapters (README)"""
    weight_decay: float = 0.01
    """weight decay of AdamW"""
    warmup_ratio: float = 0.1
    """share of all steps over which the learning rate rises; after that it falls linearly to 0"""
    epochs: int = 2
    """passes over the triplets; the epoch with the best validation MRR is kept"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    seed: int = 0
    """seeds the adapters, the order of triplets and dropout"""
    resume: bool = False
    """continue an interrupted run from its newest complete checkpoint"""
    report_to: Literal["none", "tensorboard"] = "none"
    """also log to tensorboard, under checkpoints/<run>/tensorboard"""

    RENAMED: ClassVar[dict[str, str]] = {
        "clip_norm": "max_grad_norm",
        "lora_targets": "target_modules",
        "warmup": "warmup_ratio",
    }

    def __post_init__(self) -> None:
        _require_positive(
            self, "max_length", "negatives", "batch_size", "scale", "lr", "epochs", "max_grad_norm"
        )
        _require_not_negative(self, "lora_rank", "cached_mini_batch")
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise _refused(self, name, "must be at least 0 and below 1")


@dataclass
class EvaluateSettings:
    pairs: str = "catalogues"
    """folder with labelled pairs, such as product_matching.pairs writes"""
    model: str = DEFAULT_MODEL
    """encoder to score: hub id or local folder, such as checkpoints/<run>/model"""
    label: str = ""
    """name of the row in --out; empty: the value of --model"""
    plain_text: bool = False
    """join title, brand and model number as they are written, as published base scores do"""
    split: Literal["valid", "test"] = "test"
    """split to score; the threshold always comes from valid"""
    out: str = ""
    """csv to add the row to; an older row with this label is replaced"""
    calibration: str = ""
    """json file to write the confidence calibration to; it is fitted to the validation pairs"""
    max_length: int = 128
    """tokens of a product text that the encoder reads"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


@dataclass
class IndexSettings:
    catalogue: str
    """csv of the records to index or to add (id, title; brand, model, category, price where known)"""
    model: str = DEFAULT_MODEL
    """encoder: hub id or local folder, such as checkpoints/<run>/model"""
    index: str = "index"
    """folder of the index"""
    kind: Literal["auto", "flat", "hnsw", "ivf", "ivfpq"] = "auto"
    """kind of faiss index; auto chooses by the number of rows and prints why"""
    target_recall: float = 0.95
    """the search effort is raised until recall@10 against exact search reaches this"""
    calibration: str = ""
    """json file from product_matching.evaluate --calibration; empty: calibration.json in the model's folder, if any"""
    max_length: int = 128
    """tokens of a product text that the encoder reads"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if not 0 < self.target_recall <= 1:
            raise _refused(self, "target_recall", "must be above 0 and at most 1")


@dataclass
class SearchSettings:
    index: str = "index"
    """folder of the index"""
    model: str = ""
    """encoder; empty: the one that the index names"""
    k: int = 5
    """number of records to show"""
    category: str = ""
    """search only this category"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        _require_at_least_one(self, "k")


@dataclass
class ServeSettings:
    index: str = "index"
    """folder of the index"""
    model: str = ""
    """encoder; empty: the one that the index names"""
    host: str = "127.0.0.1"
    """address to listen on"""
    port: int = 8000
    """port to listen on"""
    max_body_bytes: int = 262_144
    """largest request body"""
    max_titles: int = 64
    """most titles per request"""
    max_title_characters: int = 2000
    """longest title"""
    max_k: int = 100
    """most records per title"""
    threads: int = 0
    """CPU threads of the encoder; 0 leaves the choice to torch"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        _require_at_least_one(self, "max_body_bytes", "max_titles", "max_title_characters", "max_k")


@dataclass
class PriceSettings:
    workspace: str = str(REPOSITORY)
    """folder with data/prepared_*.csv and data/folds.csv; predictions/ is written there"""
    model: str = DEFAULT_MODEL
    """encoder: hub id or local folder"""
    name: str = "matched_prices"
    """name of the prediction files"""
    neighbours: int = 5
    """training products whose prices are averaged per row"""
    sharpness: float = 20.0
    """a neighbour weighs exp(sharpness * cosine) in the average"""
    max_length: int = 128
    """tokens of a product text that the encoder reads"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        _require_at_least_one(self, "neighbours")


def _require_positive(settings: Any, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:  # written this way NaN is refused, too
            raise _refused(settings, name, "must be above 0")


def _require_not_negative(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise _refused(settings, name, "must not be negative")


def _require_at_least_one(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise _refused(settings, name, "must be at least 1")


def _refused(settings: Any, name: str, rule: str) -> InputError:
    flag = name.replace("_", "-")
    return InputError(f"--{flag} {getattr(settings, name)}: {rule}")
