"""Features of the coarser levels at each position of a level, for all kinds of prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_vqvae.networks.convolutional import ResidualBlock
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.attention import GridAttention


class UpperLevels(nn.Module):
    """Codes of the levels above, embedded, brought to this level's grid, and seen from all sides: near ones by convolutions,
    all of them by attention, since no causal stack can carry what lies further on to a position before it.
    """

    def __init__(self, tokens: Sequence[nn.Module], width: int, heads: int, grid: tuple[int, int]) -> None:
        """`tokens`: the embedding of the codes of each level above, of `width` channels."""
        super().__init__()
        self.grid = grid
        self.tokens = nn.ModuleList(tokens)
        self.layers = nn.Sequential(*(ResidualBlock(width, width) for _ in range(2)))
        self.attention = GridAttention(width, heads)

    def forward(self, codes: Codes, rotation: Tensor) -> Tensor:
        """Codes (B, h', w') of the levels above to features (B, h, w, C) of this level's grid."""
        embedded = [F.interpolate(token(grid).movedim(-1, 1), self.grid) for token, grid in zip(self.tokens, codes, strict=True)]
        return self.attention(self.layers(torch.stack(embedded).sum(0)).movedim(1, -1), rotation, causal=False)
