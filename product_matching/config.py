"""Every setting of this folder with its default. Each program has one dataclass; its fields are its flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from contracts.errors import InputError
from contracts.workspace import REPOSITORY
from serving.config import ServiceSettings
from training.trackers import ReportTo

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
class PurchaseSettings:
    left: str
    """csv of the catalogue that is matched"""
    right: str
    """csv of the catalogue that is searched"""
    purchases: str
    """csv with user, product, shop (left or right) and day (YYYY-MM-DD)"""
    out: str = "catalogues"
    """folder to write"""
    days: int = 30
    """most days between two purchases of a user"""
    support: int = 5
    """fewest users who bought both products"""
    same_category: bool = True
    """leave out pairs whose categories are known and differ; --no-same-category if the shops name them differently"""
    non_matches: int = 9
    """similar other products that are labelled as non-matches per match"""

    def __post_init__(self) -> None:
        _require_not_negative(self, "days", "non_matches")
        _require_at_least_one(self, "support")


@dataclass
class TuningSettings:
    """How an encoder is tuned, whether it reads one record or two."""

    lora_alpha: int = 16
    """adapters are scaled by alpha / rank"""
    lora_dropout: float = 0.1
    """dropout before each adapter"""
    target_modules: str = "auto"
    """layers that get adapters, such as query,key,value; auto: attention and dense layers of BERT, MPNet and XLM-R"""
    weight_decay: float = 0.01
    """weight decay of AdamW"""
    warmup_ratio: float = 0.1
    """share of all steps over which the learning rate rises; after that it falls linearly to 0"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    report_to: ReportTo = "none"
    """tracker that receives the metrics as well; its package has to be installed"""

    def __post_init__(self) -> None:
        _require_positive(self, "max_grad_norm")
        _require_not_negative(self, "weight_decay")
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise _refused(self, name, "must be at least 0 and below 1")


@dataclass
class TrainSettings(TuningSettings):
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

    batch_size: int = 32
    """triplets per step; the other positives and negatives of the batch serve as further negatives"""
    cached_mini_batch: int = 0
    """texts encoded at once by the cached loss, for a batch that does not fit into memory; 0 uses the plain loss"""
    scale: float = 20.0
    """inverse temperature of the loss: cosines are multiplied by it"""
    lr: float = 1e-3
    """peak learning rate of AdamW; 2e-5, usual for full fine-tuning, hardly moves adapters (README)"""
    epochs: int = 2
    """passes over the triplets; the epoch with the best validation MRR is kept"""
    seed: int = 0
    """seeds the adapters, the order of triplets and dropout"""
    resume: bool = False
    """continue an interrupted run from its newest complete checkpoint"""

    RENAMED: ClassVar[dict[str, str]] = {
        "clip_norm": "max_grad_norm",
        "lora_targets": "target_modules",
        "warmup": "warmup_ratio",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "max_length", "negatives", "batch_size", "scale", "lr", "epochs")
        _require_not_negative(self, "lora_rank", "cached_mini_batch")


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
    decision: str = ""
    """folder of a trained decision, scored in place of --model with its own encoder; empty: the cosine decides"""
    candidates: int = 20
    """records per query that --decision orders again"""
    max_length: int = 128
    """tokens of a product text that the encoder reads"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


@dataclass
class DecisionSettings(TuningSettings):
    pairs: str = "catalogues"
    """folder with labelled pairs, such as product_matching.pairs writes"""
    workspace: str = str(REPOSITORY)
    """folder with checkpoints/"""
    run: str = "match_decision"
    """name of the run folder under checkpoints/"""
    encoder: str = DEFAULT_MODEL
    """first stage, which finds the candidates: hub id or local folder, such as checkpoints/<run>/model"""
    model: str = DEFAULT_MODEL
    """encoder that the cross-encoder starts from: hub id or local folder"""
    cross_encoder: bool = True
    """train a cross-encoder; without one, the features and the cosine decide alone"""
    max_length: int = 128
    """tokens of a product text that the first stage reads"""
    held_out: Literal["matches", "pairs"] = "matches"
    """matches: records of validation and test matches stay out of training; pairs: those of their non-matches, too"""
    negatives: int = 3
    """hard negatives per match that the first stage mines, beside the labelled non-matches"""

    rounds: int = 200
    """trees on the pair features"""
    tree_lr: float = 0.05
    """learning rate of the trees"""
    leaves: int = 15
    """leaves per tree"""

    pair_tokens: int = 96
    """tokens of both records together that the cross-encoder reads"""
    cross_negatives: int = 3
    """non-matches per match that the cross-encoder is trained on, those with the highest cosine first"""
    lora_rank: int = 0
    """rank of the adapters of the cross-encoder; 0 trains all weights instead"""
    batch_size: int = 16
    """pairs per step"""
    lr: float = 5e-5
    """peak learning rate of AdamW; adapters need about 1e-3"""
    epochs: int = 3
    """passes over the pairs; the epoch with the best validation average precision is kept"""
    seed: int = 0
    """seeds the trees, the new layers, the order of pairs and dropout"""
    resume: bool = False
    """keep a finished run instead of training it again"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tree_lr", "lr")
        _require_at_least_one(
            self,
            "max_length",
            "negatives",
            "rounds",
            "pair_tokens",
            "cross_negatives",
            "batch_size",
            "epochs",
        )
        _require_not_negative(self, "lora_rank")
        if self.leaves < 2:
            raise _refused(self, "leaves", "must be at least 2")


@dataclass
class DecideSettings:
    model: str = "checkpoints/match_decision/decision"
    """folder of a trained decision"""
    pairs: str = ""
    """folder with labelled pairs; the pairs of --split are decided"""
    split: Literal["train", "valid", "test"] = "test"
    """split of --pairs"""
    left: str = ""
    """csv of a catalogue whose products are looked for in --right"""
    right: str = ""
    """csv of the catalogue that is searched; empty: duplicates within --left are looked for"""
    out: str = "decisions.csv"
    """table to write: left_id, right_id, cosine, probability, match, confidence, why"""
    candidates: int = 20
    """records of --right per record of --left that are compared, the most similar first"""
    one_to_one: bool = False
    """a record is matched at most once, such that the matches together are the most probable"""
    max_group: int = 10
    """most records in one group of duplicates"""
    explain: int = 0
    """pairs to explain, the most probable matches first; each takes a few dozen further comparisons"""
    log: str = ""
    """folder to log the decisions to as parquet, for product_matching.monitor; empty: no log"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        _require_at_least_one(self, "candidates")
        _require_not_negative(self, "explain")
        if self.max_group < 2:
            raise _refused(self, "max_group", "must be at least 2")
        if bool(self.pairs) == bool(self.left):
            raise InputError("give either --pairs with a folder or --left with a catalogue")
        if self.one_to_one and not (self.pairs or self.right):
            raise InputError("--one-to-one matches two catalogues; give --right, too")


@dataclass
class MonitorSettings:
    log: str = "decisions"
    """folder of logged decisions"""
    model: str = "checkpoints/match_decision/decision"
    """folder of the decision that made them, whose validation pairs and vocabulary drift is measured against"""
    reference: str = ""
    """folder of an older log to measure the drift of scores against; empty: the validation pairs of training"""
    reviewed: str = ""
    """csv of reviewed pairs (left_id, right_id, match), such as review.html exports"""
    confidence: float = 0.85
    """precision is reported for pairs whose match probability is at least this"""
    pairs: int = 50
    """pairs on review.html"""
    out: str = "monitor"
    """folder for report.json and review.html"""

    def __post_init__(self) -> None:
        _require_at_least_one(self, "pairs")
        if not 0 < self.confidence < 1:
            raise _refused(self, "confidence", "must be above 0 and below 1")


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
    decision: str = ""
    """folder of a trained decision, which orders the records found again; empty: the cosine orders them"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        _require_at_least_one(self, "k")


@dataclass
class ServeSettings(ServiceSettings):
    index: str = "index"
    """folder of the index"""
    model: str = ""
    """encoder; empty: the one that the index names"""
    max_body_bytes: int = 262_144
    """largest request body"""
    max_titles: int = 64
    """most titles per request"""
    max_title_characters: int = 2000
    """longest title"""
    max_k: int = 100
    """most records per title"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least_one(self, "max_titles", "max_title_characters", "max_k")


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
