"""Tuples of code grids <-> sequences of tokens: the functions and their inverses side by side.

A sequence runs through the levels, coarse to fine, each in raster order. Token = code + the sizes of the levels before,
so that no two levels share a token. Position (level, row, column) belongs to the place, not to the token in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from stage1_vqvae.quantizers.contract import Codes


class SequenceLayout:
    """How grids (h, w) of K codes a level lie in a sequence."""

    def __init__(self, grids: Sequence[tuple[int, int]], num_codes: Sequence[int]) -> None:
        assert len(grids) == len(num_codes) > 0
        self.grids, self.num_codes = list(grids), list(num_codes)
        self.lengths = [h * w for h, w in grids]
        self.length = sum(self.lengths)
        self.vocabulary = sum(num_codes)
        self.offsets = [0, *accumulate(num_codes)][:-1]

    def to_tokens(self, codes: Codes) -> Tensor:
        """Grids (B, h, w) a level to tokens (B, T)."""
        return torch.cat([grid.flatten(1) + offset for grid, offset in zip(codes, self.offsets, strict=True)], 1)

    def to_codes(self, tokens: Tensor) -> Codes:
        """Tokens (B, T) to grids (B, h, w) a level."""
        levels = zip(tokens.split(self.lengths, 1), self.offsets, self.grids, strict=True)
        return tuple((part - offset).view(-1, *grid) for part, offset, grid in levels)

    def foreign_tokens(self) -> Tensor:
        """(T, V), true where a token is of another level than the place: there it cannot stand."""
        level_of_token = torch.arange(len(self.num_codes)).repeat_interleave(torch.tensor(self.num_codes))
        return self.positions()[:, :1] != level_of_token

    def positions(self) -> Tensor:
        """(T, 3): level, row and column of each place."""
        parts = []
        for level, (h, w) in enumerate(self.grids):
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack([torch.full_like(rows, level), rows, columns], -1).flatten(0, 1))
        return torch.cat(parts)
