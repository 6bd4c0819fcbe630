"""Every setting of this folder, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY

MAX_CHARACTERS = 2000
"""What is read of a text. 128 tokens are some 600 characters; tokenising 100,000 would only cost time."""
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class PairSettings:
    pairs: str = ""
    """folder with train.txt, valid.txt and test.txt"""
    left: str = ""
    """csv of the catalogue whose records ask (id, title, upc; brand, model, category, price where known)"""
    right: str = ""
    """csv of the catalogue that is searched"""
    out: str = "catalogues"
    """folder to write"""
    non_matches: int = 9
    """similar other products labelled beside each match"""


@dataclass
class TrainSettings:
    pairs: str = "catalogues"
    """folder that product_matching.pairs reads or wrote"""
    workspace: str = str(REPOSITORY)
    """folder with checkpoints/"""
    run: str = "product_matching"
    """name of the run folder under checkpoints/"""
    model: str = DEFAULT_MODEL
    """sentence-transformers model: hub id or local folder"""
    max_length: int = 128
    """tokens of a product that the encoder reads"""
    held_out: Literal["matches", "pairs"] = "matches"
    """hide the records of validation and test matches from training, or those of all validation and test pairs"""
    negatives: int = 2
    """mined hard negatives a match; each makes a triplet of its own"""

    lora_rank: int = 8
    """rank of the adapters; 0 trains all weights instead"""
    lora_alpha: int = 16
    """adapters are scaled by alpha / rank"""
    lora_dropout: float = 0.1
    """dropout before each adapter"""
    lora_targets: str = "auto"
    """layers with adapters, such as query,key,value; auto: attention and dense layers of BERT, MPNet and XLM-R"""

    batch_size: int = 32
    """triplets a step; every other positive and negative in the batch is a further negative"""
    cached_mini_batch: int = 0
    """above 0: the cached loss, which encodes so many texts at a time, for batches that do not fit into memory"""
    scale: float = 20.0
    """inverse temperature of the loss"""
    lr: float = 1e-3
    """peak learning rate of AdamW; the 2e-5 of full fine-tuning hardly moves adapters (README)"""
    weight_decay: float = 0.01
    """AdamW's"""
    warmup: float = 0.1
    """part of all steps over which the learning rate rises; it then falls linearly to 0"""
    epochs: int = 2
    """passes over the triplets (each match stands in `negatives` of them); the best by validation MRR is kept"""
    clip_norm: float = 1.0
    """largest norm of the gradient"""
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

    def __post_init__(self) -> None:
        for name in ("max_length", "negatives", "batch_size", "scale", "lr", "epochs", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        for name in ("lora_rank", "cached_mini_batch"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        for name in ("lora_dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must lie in [0, 1)")


@dataclass
class EvaluateSettings:
    pairs: str = "catalogues"
    """folder that product_matching.pairs reads or wrote"""
    model: str = DEFAULT_MODEL
    """encoder to score: hub id or local folder, such as checkpoints/<run>/model"""
    name: str = ""
    """name of the row in --out; empty means the model"""
    plain_text: bool = False
    """join title, brand and model number as they are written; the reference that published base scores use"""
    split: Literal["valid", "test"] = "test"
    """split to score; the threshold always comes from valid"""
    out: str = ""
    """csv to which the row is added, in place of an older one of the same name"""
    calibration: str = ""
    """json file for the confidence calibration measured on the validation pairs"""
    max_length: int = 128
    """tokens of a product that the encoder reads"""
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
    """auto chooses by the number of rows and prints why"""
    target_recall: float = 0.95
    """recall@10 against exact search that the search effort is raised to"""
    calibration: str = ""
    """json written by product_matching.evaluate --calibration; empty: calibration.json beside the model, if any"""
    max_length: int = 128
    """tokens of a product that the encoder reads"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if not 0 < self.target_recall <= 1:
            raise InputError(f"--target-recall {self.target_recall}: must lie above 0 and not above 1")


@dataclass
class SearchSettings:
    index: str = "index"
    """folder of the index"""
    model: str = ""
    """encoder; empty: the one that the index names"""
    k: int = 5
    """records a title"""
    category: str = ""
    """search only this category"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"--k {self.k}: must be at least 1")


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
    """most titles a request"""
    max_title_characters: int = 2000
    """longest title"""
    max_k: int = 100
    """most records a title"""
    threads: int = 0
    """threads that the encoder computes with; 0 leaves the choice to torch"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_titles", "max_title_characters", "max_k"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


@dataclass
class PriceSettings:
    workspace: str = str(REPOSITORY)
    """folder with data/prepared_*.csv and data/folds.csv; predictions/ is written there"""
    model: str = DEFAULT_MODEL
    """encoder: hub id or local folder"""
    name: str = "matched_prices"
    """name of the prediction files"""
    neighbours: int = 5
    """matched products a row"""
    sharpness: float = 20.0
    """a neighbour weighs exp(sharpness * cosine) in the weighted mean"""
    max_length: int = 128
    """tokens of a product that the encoder reads"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise InputError(f"--neighbours {self.neighbours}: must be at least 1")
