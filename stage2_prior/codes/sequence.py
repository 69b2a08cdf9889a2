"""Tuples of code grids <-> sequences of tokens: the functions and their inverses side by side.

A sequence runs through the levels, coarse to fine, each in raster order. Token = code + the sizes of the levels before,
so that no two levels share a token. Level, row and column are a position's coordinates, whatever token stands there.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from stage1_vqvae.quantizers.contract import Codes


class SequenceLayout:
    """The layout of a sequence: which position holds which code of which level, for grids (h, w) of K codes a level."""

    def __init__(self, grids: Sequence[tuple[int, int]], num_codes: Sequence[int]) -> None:
        assert len(grids) == len(num_codes) > 0
        self.grids, self.num_codes = list(grids), list(num_codes)
        self.lengths = [h * w for h, w in grids]
        self.length = sum(self.lengths)
        self.vocabulary = sum(num_codes)
        self.offsets = [0, *accumulate(num_codes)][:-1]

    def flat(self, grids: Codes) -> Tensor:
        """Grids (B, h, w) a level, or (h, w) for B = 1, to sequences of codes (B, T)."""
        return torch.cat([grid.reshape(-1, length) for grid, length in zip(grids, self.lengths, strict=True)], 1)

    def grids_of(self, sequences: Tensor) -> Codes:
        """The inverse: sequences (B, T) to grids (B, h, w) a level."""
        return tuple(part.unflatten(1, grid) for part, grid in zip(sequences.split(self.lengths, 1), self.grids, strict=True))

    def to_tokens(self, codes: Codes) -> Tensor:
        """Grids (B, h, w) a level to tokens (B, T)."""
        return self.flat(tuple(grid + offset for grid, offset in zip(codes, self.offsets, strict=True)))

    def level_of(self, position: int) -> int:
        """The level that a position belongs to, 0 for the coarsest."""
        return bisect(list(accumulate(self.lengths)), position)

    def first_position(self, level: int) -> int:
        """Position of a level's first code."""
        return sum(self.lengths[:level])

    def level_and_index(self, position: int) -> tuple[int, int]:
        """(level, index within the level) of a position."""
        level = self.level_of(position)
        return level, position - self.first_position(level)

    def offset_before(self, position: int) -> int:
        """What turns the code of the position before this one into its token."""
        return self.offsets[self.level_of(position - 1)]

    def coordinates(self) -> Tensor:
        """(T, 3): level, row and column of each position."""
        parts = []
        for level, (h, w) in enumerate(self.grids):
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack([torch.full_like(rows, level), rows, columns], -1).flatten(0, 1))
        return torch.cat(parts)

    def centres(self) -> Tensor:
        """float64 (T, 2): row and column of each position's centre, on all levels in the finest grid's codes, from 0 on."""
        heights, widths = zip(*self.grids, strict=True)
        finest = torch.tensor([max(heights), max(widths)], dtype=torch.float64)
        level = self.coordinates()[:, 0]
        return (self.coordinates()[:, 1:] + 0.5) * finest / torch.tensor(self.grids)[level] - 0.5
