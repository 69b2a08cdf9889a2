"""Building blocks of transformer priors: fields, blocks, initial weights.

Normalisation before each part (Xiong et al. 2020), SwiGLU (Shazeer 2020), and attention as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from configs.parts import PriorPart
from stage1_vqvae.attention import Norm
from stage2_prior.priors.attention import CachedAttention, KeyValueCache, add_product_, product
from stage2_prior.priors.contract import SizedByPreset, Sizes, VariantEmbedding
from training.kernels import Kernel

INITIAL_STD = 0.02
"""Standard deviation of initial embeddings and matrices (GPT-2)."""
# Share of that variance that comes from the codes' vectors, where they are known.
_SHARE_OF_VECTORS = 0.7


def _load_gate() -> Callable[..., Any]:
    from stage2_prior.priors.step_kernels import gate

    return gate


_GATE = Kernel("the MLP while sampling", _load_gate)


@dataclass(frozen=True, kw_only=True)
class TransformerFields(SizedByPreset, PriorPart):
    """Fields of every transformer."""

    PRESETS: ClassVar[dict[str, Sizes]] = {
        # S: ViT-S, DiT-S. B and L: LlamaGen's (Sun et al. 2024, table 1), 111 M and 343 M parameters with 16,384 codes.
        "S": Sizes(12, 384, 6),
        "B": Sizes(12, 768, 12),
        "L": Sizes(24, 1024, 16),
    }
    preset: Literal["S", "B", "L"] = "S"
    """Sizes from the literature, for what is 0 below (and, on a command line, in place of the recipe's own sizes): 12 layers x
    384 (6 heads), 12 x 768 (12), 24 x 1024 (16)."""
    layers: int = 0
    """Transformer blocks; 0 = the preset's."""
    width: int = 0
    """Channels of a position; 0 = the preset's."""
    heads: int = 0
    """Attention heads; 0 = the preset's. Width / heads must be a multiple of 4, for the rotary positions of two axes."""
    head_gain: bool = False
    """Learn a gain of each head's attention logits, which normalised queries and keys bound by the root of width / heads (Henry et al.
    2020)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes()

    @override
    def resolved(self) -> Self:
        return replace(self, **self.sizes()._asdict())


def initialise_(network: nn.Module, blocks: Sequence[Block], vector: Tensor) -> None:
    """Initialise all linear maps and embeddings of a transformer, and one vector of its own, from N(0, 0.02^2)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, VariantEmbedding):
            nn.init.normal_(module.weight, std=INITIAL_STD)
    nn.init.normal_(vector, std=INITIAL_STD)
    # Each block begins as nearly the identity (GPT-2's rule: the residual sum keeps its scale at any depth).
    for block in blocks:
        for projection in (block.attention.out, block.mlp.out):
            nn.init.normal_(projection.weight, std=INITIAL_STD / (2 * len(blocks)) ** 0.5)


@torch.no_grad()
def initialise_codes_(weights: Sequence[Tensor], num_codes: Sequence[int], vectors: Sequence[Tensor]) -> None:
    """Give codes of near vectors near rows in each weight (codes of all levels, C), so that they share what is learned."""
    for weight in weights:
        for rows, level_vectors in zip(weight.split(num_codes), vectors, strict=True):
            add_vectors_(rows, level_vectors)


def add_vectors_(rows: Tensor, vectors: Tensor) -> None:
    """Replace a share of rows (K, C) of the initial scale by a random projection of vectors (K, D), of the same scale."""
    mapped = vectors @ torch.randn(vectors.shape[1], rows.shape[1])
    mapped *= INITIAL_STD / mapped.std().clamp(min=1e-12)
    rows.mul_((1 - _SHARE_OF_VECTORS) ** 0.5).add_(mapped, alpha=_SHARE_OF_VECTORS**0.5)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int, dropout: float, head_gain: bool = False) -> None:
        super().__init__()
        self.attention_norm = Norm(width)
        self.attention = CachedAttention(width, heads, head_gain)
        self.mlp_norm = Norm(width)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: KeyValueCache | None = None,
        rows: slice = slice(None),
        start: int = 0,
        causal: bool | Tensor = True,
    ) -> Tensor:
        """(B, T, C) to the same shape; `causal` as in `Attention`. With a cache: T positions from `start` on, appended to its `rows`, as in
        `CachedAttention.prefill`.
        """
        normed = self.attention_norm(x)
        if cache is None:
            attended = self.attention(normed, rotation, causal)
        else:
            attended = self.attention.prefill(normed, rotation, cache, rows, start, causal)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def step_(self, x: Tensor, rotations: Tensor, cache: KeyValueCache, position: int | Tensor) -> Tensor:
        """Apply the block to one position, (B, C), in place; appends its key and value to the cache. No gradient.

        `rotations`, `position`: as in `CachedAttention.step_`.
        """
        self.attention.step_(x, self.attention_norm(x), rotations, cache, position)
        return add_product_(x, self.mlp.hidden(self.mlp_norm(x)), self.mlp.out)


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)), its width 8/3 of x's, so that it has the parameters of a 4x MLP; a multiple of 128."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 128) * 128
        # Two maps, not one of twice the width: its halves' gradients would have to be joined again.
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP on (B, T, C); the shape stays."""
        return self.out(F.silu(self.gate(x)) * self.up(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Gated hidden activations (B, H) of few rows (B, C), without gradient; one Triton kernel with 16-bit weights."""
        if _GATE.usable(x.device) and x.element_size() == 2:
            hidden = _GATE(x, self.gate.weight, self.up.weight)
            if hidden is not None:
                return hidden
        return F.silu(product(self.gate, x)).mul_(product(self.up, x))
