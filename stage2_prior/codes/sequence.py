"""Conversion of tuples of code grids to sequences of tokens and back.

A sequence runs through the levels, coarse to fine, each in raster order. Token = code + the codebook sizes of the coarser
levels, so that no two levels share a token. Level, row and column are the coordinates of a position.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from stage1_vqvae.quantizers.contract import Codes


class SequenceLayout:
    """The layout of a sequence: its position per code of each level, for a grid (h, w) and K codes per level."""

    def __init__(self, grids: Sequence[tuple[int, int]], num_codes: Sequence[int]) -> None:
        assert len(grids) == len(num_codes) > 0
        self.grids, self.num_codes = list(grids), list(num_codes)
        self.lengths = [h * w for h, w in grids]
        self.length = sum(self.lengths)
        self.vocabulary = sum(num_codes)
        self.offsets = [0, *accumulate(num_codes)][:-1]

    def flat(self, grids: Codes) -> Tensor:
        """Flatten grids, (B, h, w) per level, or (h, w) for B = 1, to sequences of codes (B, T)."""
        return torch.cat([grid.reshape(-1, length) for grid, length in zip(grids, self.lengths, strict=True)], 1)

    def grids_of(self, sequences: Tensor) -> Codes:
        """Split sequences (B, T) into grids, (B, h, w) per level: the inverse of `flat`."""
        return tuple(part.unflatten(1, grid) for part, grid in zip(sequences.split(self.lengths, 1), self.grids, strict=True))

    def to_tokens(self, codes: Codes) -> Tensor:
        """Convert grids, (B, h, w) per level, to tokens (B, T)."""
        return self.flat(tuple(grid + offset for grid, offset in zip(codes, self.offsets, strict=True)))

    def level_of(self, position: int) -> int:
        """Return the level of a position, 0 for the coarsest."""
        return bisect(list(accumulate(self.lengths)), position)

    def first_position(self, level: int) -> int:
        """Return the position of a level's first code."""
        return sum(self.lengths[:level])

    def level_and_index(self, position: int) -> tuple[int, int]:
        """Return the level of a position and its index within the level."""
        level = self.level_of(position)
        return level, position - self.first_position(level)

    def offset_before(self, position: int) -> int:
        """Return the offset that converts the code at the previous position to its token."""
        return self.offsets[self.level_of(position - 1)]

    def order_by(self, keys: Tensor) -> Tensor:
        """Sort the positions of each level by keys (B, T): int64 (B, T), the positions in their order; levels stay coarse to fine."""
        parts = enumerate(keys.split(self.lengths, 1))
        return torch.cat([part.argsort(dim=1, stable=True) + self.first_position(level) for level, part in parts], 1)

    def coordinates(self) -> Tensor:
        """Compute the level, row and column of each position, (T, 3)."""
        parts = []
        for level, (h, w) in enumerate(self.grids):
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack([torch.full_like(rows, level), rows, columns], -1).flatten(0, 1))
        return torch.cat(parts)

    def centres(self) -> Tensor:
        """Compute the centre of each position, float64 (T, 2): row and column in units of the finest grid's codes, on all levels."""
        heights, widths = zip(*self.grids, strict=True)
        finest = torch.tensor([max(heights), max(widths)], dtype=torch.float64)
        level = self.coordinates()[:, 0]
        return (self.coordinates()[:, 1:] + 0.5) * finest / torch.tensor(self.grids)[level] - 0.5
