"""Price from four embeddings: hierarchical cross-attention and a mixture of experts, and its variants.

Legend: B batch, T tokens, M modalities (4), D fused width, D_in encoder width, H heads, E experts.

    clip_image  ──branch──┬─ query ┐
    siglip_image ─branch──┼─ key   ┴─ fused_image ─┬─ query ┐
    qwen_text   ──branch──┼─ query ┐               │        ├─ fused_multimodal
    siglip_text ──branch──┼─ key   ┴─ fused_text ──┴─ key   ┘
                          └─ [fused_multimodal, fused_image, fused_text, clip] ─ experts ─ log1p(price)

One vector per modality means one key per attention, and attention over one key weighs nothing (see
`fusion.blocks.AttentionBlock`). Variant `tokens` turns each embedding into several tokens so that it does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contracts.errors import InputError
from fusion.all_embeddings.config import ModelConfig
from fusion.blocks import AttentionBlock, EmbeddingBranch, FusionOutput, MixtureOfExperts, zero_missing

MODALITIES = ("clip_image", "siglip_image", "siglip_text", "qwen_text")
"""The order of the columns of `valid`."""

STRUCTURAL_FIELDS = 3
"""quantity_value, unit_volume, unit_weight: the last columns of qwen_text."""


class EmbeddingBranches(nn.ModuleDict):
    """One branch per modality, and one for the structural fields if the config says so."""

    def __init__(self, config: ModelConfig, widths: dict[str, int], *, d_out: int):
        widths = dict(widths)
        if config.structural_branch:
            widths["qwen_text"] -= STRUCTURAL_FIELDS
            widths["structural"] = STRUCTURAL_FIELDS
        settings = dict(dropout=config.dropout, depth=config.branch_depth, hidden=config.branch_hidden)
        super().__init__({n: EmbeddingBranch(d_in=d, d_out=d_out, **settings) for n, d in widths.items()})

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> dict[str, Tensor]:
        """(B, D_in) and (B,) per modality → (B, D) per branch."""
        if "structural" in self:
            text, structural = embeddings["qwen_text"].tensor_split([-STRUCTURAL_FIELDS], dim=1)
            embeddings = embeddings | {"qwen_text": text, "structural": structural}
            valid = valid | {"structural": valid["qwen_text"]}
        return {name: branch(embeddings[name], valid[name]) for name, branch in self.items()}


class HierarchicalFusion(nn.Module):
    """Image ← image, text ← text, then image ← text. Output [multimodal, image, text, clip]: 4D = 2048."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        block = dict(width=config.width, heads=config.heads, short_path=config.short_path)
        self.branches = EmbeddingBranches(config, widths, d_out=config.width)
        self.image_from_image = AttentionBlock(**block)
        self.text_from_text = AttentionBlock(**block)
        self.image_from_text = AttentionBlock(**block)
        self.expert_hidden = (2 * config.width, config.width, config.width // 2)
        self.d_out = (4 + config.structural_branch) * config.width

    def to_tokens(self, name: str, x: Tensor) -> Tensor:
        """What attention sees of a branch (B, D): here its one vector."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        return x

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        branches = self.branches(embeddings, valid)  # (B, D) each
        tokens = {name: self.to_tokens(name, branches[name]) for name in MODALITIES}
        text_valid = valid["qwen_text"] | valid["siglip_text"]

        image = self.image_from_image(tokens["clip_image"], tokens["siglip_image"], valid["siglip_image"])
        text = self.text_from_text(tokens["qwen_text"], tokens["siglip_text"], valid["siglip_text"])
        multimodal = self.image_from_text(image, text, text_valid)

        fused = [self.pool(multimodal), self.pool(image), self.pool(text), branches["clip_image"]]
        if "structural" in branches:
            fused.append(branches["structural"])
        return torch.cat(fused, dim=1)  # (B, 4D)


class Tokenizer(nn.Module):
    """Turn a branch (B, D) into T tokens of width D, each from its own D/T channels, plus its own embedding.

    The branch learns what to put into which channels, so a token is a learned view of the embedding. T full
    projections D_in → D would cost T times the parameters; this costs D² + T·D. The token embedding tells
    the modality and the view apart, and stands alone where the modality is missing.
    """

    def __init__(self, *, width: int, tokens: int):
        super().__init__()
        bound = (tokens / width) ** 0.5  # nn.Linear's, fan_in = D/T
        self.weight = nn.Parameter(torch.empty(tokens, width // tokens, width).uniform_(-bound, bound))
        self.embedding = nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        views = x.unflatten(1, self.weight.shape[:2])  # (B, T, D/T)
        return torch.einsum("btc,tcd->btd", views, self.weight) + self.embedding  # (B, T, D)


class TokenFusion(HierarchicalFusion):
    """The hierarchy with T tokens per embedding: T queries weigh T keys, then the tokens are averaged."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths)
        tokens = config.tokens_per_embedding
        self.tokenizers = nn.ModuleDict({n: Tokenizer(width=config.width, tokens=tokens) for n in MODALITIES})

    def to_tokens(self, name: str, x: Tensor) -> Tensor:
        return self.tokenizers[name](x)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)  # (B, T, D) → (B, D)


class ConcatFusion(nn.Module):
    """Branches to D/2; attention of [clip, siglip] to itself, of the texts, then of both: 2D = 1024."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        block = dict(heads=config.heads, short_path=config.short_path)
        self.branches = EmbeddingBranches(config, widths, d_out=config.width // 2)
        self.images = AttentionBlock(width=config.width, **block)
        self.texts = AttentionBlock(width=config.width, **block)
        self.multimodal = AttentionBlock(width=2 * config.width, **block)
        self.expert_hidden = (config.width // 2,)
        self.d_out = 2 * config.width + config.structural_branch * (config.width // 2)

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        x = self.branches(embeddings, valid)  # (B, D/2) each
        image_valid = valid["clip_image"] | valid["siglip_image"]
        text_valid = valid["qwen_text"] | valid["siglip_text"]

        image = torch.cat([x["clip_image"], x["siglip_image"]], dim=1)  # (B, D)
        text = torch.cat([x["qwen_text"], x["siglip_text"]], dim=1)  # (B, D)
        image = self.images(image, image, image_valid)
        text = self.texts(text, text, text_valid)
        both = torch.cat([image, text], dim=1)  # (B, 2D)
        both = self.multimodal(both, both, image_valid | text_valid)
        return torch.cat([both, x["structural"]], dim=1) if "structural" in x else both


class FlatFusion(nn.Module):
    """One MLP on the concatenated embeddings, ΣD_in → 2D → D → D/2: the baseline that the rest must beat."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        sizes = (sum(widths.values()), 2 * config.width, config.width, config.width // 2)
        self.mlp = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(config.dropout))
                for a, b in zip(sizes, sizes[1:], strict=False)
            )
        )
        self.d_out = sizes[-1]

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        return self.mlp(torch.cat([zero_missing(embeddings[n], valid[n]) for n in MODALITIES], dim=1))


FUSIONS = {
    "hierarchical": HierarchicalFusion,
    "concat": ConcatFusion,
    "flat": FlatFusion,
    "tokens": TokenFusion,
}


class AllEmbeddings(nn.Module):
    """log1p(price) from any of the four embeddings that a row has.

    A missing modality's values, NaN included, reach neither output nor gradient; a row without any embedding
    gets a finite constant. At widths 768/1152/1024/1027 variant hierarchical has 13,464,074 parameters,
    of which 1,575,936 (the query and key projections) are dead, and concat 8,114,442.

    Args:
        config: see ModelConfig.
        widths: D_in of each of MODALITIES, as read from the embedding files.

    Raises:
        InputError: a modality without a width, or settings that do not fit together.
    """

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        if set(widths) != set(MODALITIES):
            raise InputError(f"widths are given for {sorted(widths)}, needed for {sorted(MODALITIES)}")
        if config.structural_branch and widths["qwen_text"] <= STRUCTURAL_FIELDS:
            raise InputError(f"qwen_text has width {widths['qwen_text']}: no structural fields to split off")
        self.config = config
        self.fusion = FUSIONS[config.variant](config, {name: widths[name] for name in MODALITIES})
        if config.variant == "flat":
            self.head = nn.Linear(self.fusion.d_out, 1)
        else:
            self.head = MixtureOfExperts(
                d_in=self.fusion.d_out,
                hidden=self.fusion.expert_hidden,
                experts=config.experts,
                dropout=config.dropout,
            )
        self.under_15 = nn.Linear(self.fusion.d_out, 1) if config.auxiliary_under_15 else None

    def set_output_bias(self, mean_log_price: float) -> None:
        """Start the predictions near the mean log1p(price) of the training rows instead of near $0."""
        if isinstance(self.head, MixtureOfExperts):
            self.head.set_output_bias(mean_log_price)
        else:
            nn.init.constant_(self.head.bias, mean_log_price)

    def forward(self, embeddings: dict[str, Tensor], valid: Tensor) -> FusionOutput:
        """embeddings: (B, D_in) of each of MODALITIES; valid: (B, M) bool in the order of MODALITIES."""
        assert valid.shape[1] == len(MODALITIES), f"valid has shape {tuple(valid.shape)}, not (B, 4)"
        fused = self.fusion(embeddings, dict(zip(MODALITIES, valid.unbind(dim=1), strict=True)))
        output, gate = (self.head(fused), None) if self.config.variant == "flat" else self.head(fused)
        under_15_logit = self.under_15(fused).squeeze(1) if self.under_15 is not None else None
        return FusionOutput(output.squeeze(1), gate, under_15_logit)
