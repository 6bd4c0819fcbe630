"""Price from four embeddings: hierarchical cross-attention and a mixture of experts, and its variants.

Legend: B batch, T tokens, M modalities (4), D fused width, D_in encoder width, H heads, E experts.

    clip_image  ──branch──┬─ query ┐
    siglip_image ─branch──┼─ key   ┴─ fused_image ─┬─ query ┐
    qwen_text   ──branch──┼─ query ┐               │        ├─ fused_multimodal
    siglip_text ──branch──┼─ key   ┴─ fused_text ──┴─ key   ┘
                          └─ [fused_multimodal, fused_image, fused_text, clip] ─ experts ─ log1p(price)

One vector per modality means one key per attention, and attention over one key weighs nothing (see
`fusion.blocks.AttentionBlock`). Variant `tokens` turns each embedding into several tokens so that it does.
Variants `branch_mixture` and `branch_weights` do without attention and sum the branches with learned weights.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from contracts.errors import InputError
from contracts.workspace import CLIP_IMAGE, QWEN_TEXT, SIGLIP_IMAGE, SIGLIP_TEXT, STRUCTURAL_FEATURES
from fusion.all_embeddings.config import MODALITIES, ModelConfig, Variant
from fusion.blocks import (
    AttentionBlock,
    EmbeddingBranch,
    FusionOutput,
    MixtureOfExperts,
    OutputLinear,
    PriceModel,
    zero_missing,
)
from fusion.config import TABULAR
from fusion.tabular import TabularBranch

STRUCTURAL = "structural"
"""Name of the branch for the structural fields."""

N_STRUCTURAL = len(STRUCTURAL_FEATURES)
"""The structural fields are the last columns of qwen_text."""


class EmbeddingBranches(nn.ModuleDict):
    """One branch per modality, and one for the structural fields if the config says so.

    Args:
        widths: D_in of each modality.
        d_out: width of the branches that `config.branch_widths` does not name.
    """

    def __init__(self, config: ModelConfig, widths: dict[str, int], *, d_out: int):
        super().__init__()
        widths = dict(widths)
        own_width = config.width_of_branch()
        self.d_out: dict[str, int] = {}  # the width of each branch
        if config.structural_branch:
            widths[QWEN_TEXT] -= N_STRUCTURAL
            widths[STRUCTURAL] = N_STRUCTURAL
        for name, d_in in widths.items():
            self.d_out[name] = own_width.get(name, d_out)
            if name == TABULAR:
                self[name] = TabularBranch(d_in=d_in, hidden=d_out)
                continue
            self[name] = EmbeddingBranch(
                d_in=d_in,
                d_out=self.d_out[name],
                dropout=config.dropout,
                depth=config.branch_depth,
                hidden=config.branch_hidden,
            )

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> dict[str, Tensor]:
        """(B, D_in) and (B,) per modality → (B, d_out) per branch."""
        if STRUCTURAL in self:
            text, structural = embeddings[QWEN_TEXT].tensor_split([-N_STRUCTURAL], dim=1)
            embeddings = embeddings | {QWEN_TEXT: text, STRUCTURAL: structural}
            valid = valid | {STRUCTURAL: valid[QWEN_TEXT]}
        return {name: branch(embeddings[name], valid[name]) for name, branch in self.items()}


class Fusion(nn.Module):
    """Brings what is there of the embeddings into one vector per row; each variant is a subclass."""

    d_out: int
    """width of that vector"""
    expert_hidden: tuple[int, ...] = ()
    """hidden widths of the experts behind it; without any, one Linear makes the price"""


class EqualWidths(nn.ModuleDict):
    """Bring the embeddings' branches to one width D: a Linear for each branch of another width.

    It has no bias, so that the zeros of a missing embedding stay zeros.
    """

    def __init__(self, branch_widths: dict[str, int], *, width: int):
        super().__init__()
        for name in MODALITIES:
            if branch_widths[name] != width:
                self[name] = nn.Linear(branch_widths[name], width, bias=False)

    def forward(self, branches: dict[str, Tensor]) -> dict[str, Tensor]:
        """(B, d_out) per branch → (B, D) of each of MODALITIES."""
        equal = {}
        for name in MODALITIES:
            equal[name] = self[name](branches[name]) if name in self else branches[name]
        return equal


class BranchFusion(Fusion):
    """A variant whose embeddings each go through a branch first; `width` is what they meet at."""

    def __init__(self, config: ModelConfig, widths: dict[str, int], *, width: int):
        super().__init__()
        self.branches = EmbeddingBranches(config, widths, d_out=width)
        self.equal_widths = EqualWidths(self.branches.d_out, width=width)
        # width of what `beside` returns
        self.d_beside = self.branches.d_out.get(STRUCTURAL, 0) + self.branches.d_out.get(TABULAR, 0)

    def beside(self, branches: dict[str, Tensor]) -> list[Tensor]:
        """The branches of no embedding: they join the fused vector as they are."""
        return [branches[name] for name in (STRUCTURAL, TABULAR) if name in branches]


class HierarchicalFusion(BranchFusion):
    """Image ← image, text ← text, then image ← text. Output [multimodal, image, text, clip]: 4D = 2048."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths, width=config.width)
        block: dict[str, Any] = dict(width=config.width, heads=config.heads, short_path=config.short_path)
        self.image_from_image = AttentionBlock(**block)
        self.text_from_text = AttentionBlock(**block)
        self.image_from_text = AttentionBlock(**block)
        self.expert_hidden = (2 * config.width, config.width, config.width // 2)
        self.d_out = 3 * config.width + self.branches.d_out[CLIP_IMAGE] + self.d_beside

    def to_tokens(self, name: str, x: Tensor) -> Tensor:
        """What attention sees of an embedding (B, D): here its one vector."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        return x

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """(B, D_in) and (B,) per modality → (B, 4D), or (B, 5D) with the structural branch."""
        branches = self.branches(embeddings, valid)  # (B, d_out) each
        equal = self.equal_widths(branches)  # (B, D) each
        tokens = {name: self.to_tokens(name, equal[name]) for name in MODALITIES}
        text_valid = valid[QWEN_TEXT] | valid[SIGLIP_TEXT]

        image = self.image_from_image(tokens[CLIP_IMAGE], tokens[SIGLIP_IMAGE], valid[SIGLIP_IMAGE])
        text = self.text_from_text(tokens[QWEN_TEXT], tokens[SIGLIP_TEXT], valid[SIGLIP_TEXT])
        multimodal = self.image_from_text(image, text, text_valid)

        fused = [self.pool(multimodal), self.pool(image), self.pool(text), branches[CLIP_IMAGE]]
        return torch.cat([*fused, *self.beside(branches)], dim=1)


class Tokenizer(nn.Module):
    """Turn a branch (B, D) into T tokens of width D, each from its own D/T channels, plus its own embedding.

    The branch learns what to put into which channels, so a token is a learned view of the embedding. T full
    projections D_in → D would cost T times the parameters; this costs D² + T·D. The token embedding tells the
    modality and the view apart, and it is all that remains where the modality is missing.
    """

    def __init__(self, *, width: int, tokens: int):
        super().__init__()
        channels = width // tokens
        bound = (tokens / width) ** 0.5  # as nn.Linear draws its weights for D/T inputs
        self.weight = nn.Parameter(torch.empty(tokens, channels, width).uniform_(-bound, bound))
        self.embedding = nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        views = x.unflatten(1, self.weight.shape[:2])  # (B, T, D/T)
        return torch.einsum("btc,tcd->btd", views, self.weight) + self.embedding  # (B, T, D)


class TokenFusion(HierarchicalFusion):
    """The hierarchy with T tokens per embedding: T queries weigh T keys, then the tokens are averaged."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths)
        self.tokenizers = nn.ModuleDict()
        for name in MODALITIES:
            self.tokenizers[name] = Tokenizer(width=config.width, tokens=config.tokens_per_embedding)

    def to_tokens(self, name: str, x: Tensor) -> Tensor:
        return self.tokenizers[name](x)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)  # (B, T, D) → (B, D)


class ConcatFusion(BranchFusion):
    """Branches to D/2; attention of [clip, siglip] to itself, of the texts, then of both: 2D = 1024."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths, width=config.width // 2)
        block: dict[str, Any] = dict(heads=config.heads, short_path=config.short_path)
        self.images = AttentionBlock(width=config.width, **block)
        self.texts = AttentionBlock(width=config.width, **block)
        self.multimodal = AttentionBlock(width=2 * config.width, **block)
        self.expert_hidden = (config.width // 2,)
        self.d_out = 2 * config.width + self.d_beside

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """(B, D_in) and (B,) per modality → (B, 2D), or (B, 2.5D) with the structural branch."""
        branches = self.branches(embeddings, valid)  # (B, d_out) each
        x = self.equal_widths(branches)  # (B, D/2) each
        image_valid = valid[CLIP_IMAGE] | valid[SIGLIP_IMAGE]
        text_valid = valid[QWEN_TEXT] | valid[SIGLIP_TEXT]

        image = torch.cat([x[CLIP_IMAGE], x[SIGLIP_IMAGE]], dim=1)  # (B, D)
        text = torch.cat([x[QWEN_TEXT], x[SIGLIP_TEXT]], dim=1)  # (B, D)
        image = self.images(image, image, image_valid)
        text = self.texts(text, text, text_valid)
        both = torch.cat([image, text], dim=1)  # (B, 2D)
        both = self.multimodal(both, both, image_valid | text_valid)
        return torch.cat([both, *self.beside(branches)], dim=1)


class BranchSum(BranchFusion):
    """Σ_m p_m · branch_m with shares p = softmax(logits); a missing embedding gets no share. Output: D."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths, width=config.width)
        self.expert_hidden = (2 * config.width, config.width, config.width // 2)
        self.d_out = config.width + self.d_beside

    def logits(self, x: Tensor) -> Tensor:
        """Branches x (B, M, D) → (B, M)."""
        raise NotImplementedError

    def shares(self, x: Tensor, valid: Tensor) -> Tensor:
        """Branches x (B, M, D) and valid (B, M) bool → share of each embedding (B, M); rows sum to 1."""
        logits = self.logits(x)
        # The lowest float instead of -inf: without any embedding, -inf would be a softmax over nothing, NaN.
        lowest = torch.finfo(logits.dtype).min
        return torch.where(valid, logits, lowest).softmax(dim=1)

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """(B, D_in) and (B,) per modality → (B, D), or (B, 2D) with the structural branch."""
        branches = self.branches(embeddings, valid)  # (B, d_out) each
        equal = self.equal_widths(branches)  # (B, D) each
        x = torch.stack([equal[name] for name in MODALITIES], dim=1)  # (B, M, D)
        is_there = torch.stack([valid[name] for name in MODALITIES], dim=1)  # (B, M)
        fused = (self.shares(x, is_there).unsqueeze(2) * x).sum(dim=1)  # (B, D)
        return torch.cat([fused, *self.beside(branches)], dim=1)


class BranchMixture(BranchSum):
    """The embeddings are the experts: a gate weighs them anew for each product, from all branches.

    It is design `moe` of fusion/qwen_clip for four embeddings.
    """

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths)
        self.gate = nn.Linear(len(MODALITIES) * config.width, len(MODALITIES))

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x.flatten(1))


class BranchWeights(BranchSum):
    """One learned weight per embedding, the same for every product that has the same embeddings."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__(config, widths)
        self.weights = nn.Parameter(torch.zeros(len(MODALITIES)))

    def logits(self, x: Tensor) -> Tensor:
        return self.weights.expand(len(x), -1)


class FlatFusion(Fusion):
    """One MLP on the concatenated embeddings, ΣD_in → 2D → D → D/2: the baseline that the rest must beat."""

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        sizes = (sum(widths.values()), 2 * config.width, config.width, config.width // 2)
        self.mlp = nn.Sequential()
        for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
            self.mlp.append(
                nn.Sequential(
                    nn.Linear(size_in, size_out),
                    nn.LayerNorm(size_out),
                    nn.GELU(),
                    nn.Dropout(config.dropout),
                )
            )
        self.d_out = sizes[-1]

    def forward(self, embeddings: dict[str, Tensor], valid: dict[str, Tensor]) -> Tensor:
        """(B, D_in) and (B,) per modality → (B, D/2)."""
        everything = [zero_missing(embeddings[name], valid[name]) for name in valid]
        return self.mlp(torch.cat(everything, dim=1))


FUSIONS: dict[str, type[Fusion]] = {
    "hierarchical": HierarchicalFusion,
    "concat": ConcatFusion,
    "flat": FlatFusion,
    "tokens": TokenFusion,
    "branch_mixture": BranchMixture,
    "branch_weights": BranchWeights,
}
assert tuple(FUSIONS) == get_args(Variant)


class AllEmbeddings(PriceModel):
    """log1p(price) from whichever of the four embeddings a row has.

    The values of a missing modality, NaN included, reach neither output nor gradient; a row without any
    embedding gets a finite constant. At widths 768/1152/1024/1027 variant hierarchical has 13,464,074
    parameters, of which 1,575,936 (the query and key projections) are dead, and concat has 8,114,442.

    Args:
        config: see ModelConfig.
        widths: D_in of each of MODALITIES, as read from the embedding files, and of `tabular` where the table has
            feature columns.

    Raises:
        InputError: a modality without a width, or settings that do not fit together.
    """

    def __init__(self, config: ModelConfig, widths: dict[str, int]):
        super().__init__()
        if set(widths) - {TABULAR} != set(MODALITIES):
            raise InputError(f"widths are given for {sorted(widths)}, needed for {sorted(MODALITIES)}")
        self.modalities = (*MODALITIES, TABULAR) if TABULAR in widths else MODALITIES
        if config.structural_branch and widths[QWEN_TEXT] <= N_STRUCTURAL:
            raise InputError(f"qwen_text has width {widths[QWEN_TEXT]}: no structural fields to split off")
        self.fusion = FUSIONS[config.variant](config, {name: widths[name] for name in self.modalities})
        self.has_mixture = len(self.fusion.expert_hidden) > 0
        self.head: MixtureOfExperts | OutputLinear
        if self.has_mixture:
            self.head = MixtureOfExperts(
                d_in=self.fusion.d_out,
                hidden=self.fusion.expert_hidden,
                experts=config.experts,
                dropout=config.dropout,
            )
        else:
            self.head = OutputLinear(self.fusion.d_out, 1)
        self.under_15 = OutputLinear(self.fusion.d_out, 1) if config.auxiliary_under_15 else None

    def set_output_bias(self, value: float) -> None:
        if isinstance(self.head, MixtureOfExperts):
            self.head.set_output_bias(value)
        else:
            nn.init.constant_(self.head.bias, value)

    def forward(self, embeddings: dict[str, Tensor], valid: Tensor) -> FusionOutput:
        """embeddings: (B, D_in) of each of MODALITIES and of `tabular` if the model has it; valid: (B, M) bool in
        that order.
        """
        columns = dict(zip(self.modalities, valid.unbind(dim=1), strict=True))
        fused = self.fusion(embeddings, columns)
        if self.has_mixture:
            output, gate = self.head(fused)  # (B, 1), (B, E)
        else:
            output, gate = self.head(fused), None
        under_15_logit = None if self.under_15 is None else self.under_15(fused).squeeze(1)
        return FusionOutput(output.squeeze(1), gate, under_15_logit)
