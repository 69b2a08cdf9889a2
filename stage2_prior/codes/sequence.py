"""Conversion of tuples of code grids to sequences of tokens and back.

A sequence runs through the levels, coarse to fine, each in raster order. Token = code + the codebook sizes of the coarser
levels, so that no two levels share a token. Level, row and column are the coordinates of a position. A prior may also draw each code
digit by digit: `DigitLayout` is the layout of those sequences.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import override

from stage1_vqvae.quantizers.contract import Codes


class SequenceLayout:
    """The layout of a sequence: its position per code of each level, for a grid (h, w) and K codes per level."""

    def __init__(self, grids: Sequence[tuple[int, int]], num_codes: Sequence[int], digits: Sequence[Sequence[int]] = ()) -> None:
        """`digits`: per level, the sizes of the digits of a code, least significant first; by default one, the code itself."""
        assert len(grids) == len(num_codes) > 0
        self.digits = [tuple(sizes) for sizes in digits] or [(k,) for k in num_codes]
        assert [math.prod(sizes) for sizes in self.digits] == list(num_codes)
        self.grids, self.num_codes = list(grids), list(num_codes)
        self.lengths = [h * w for h, w in grids]
        self.length = sum(self.lengths)
        self.vocabulary = sum(num_codes)
        self.offsets = [0, *accumulate(num_codes)][:-1]

    def levels(self, chosen: slice) -> SequenceLayout:
        """Return the layout of some levels."""
        return SequenceLayout(self.grids[chosen], self.num_codes[chosen], self.digits[chosen])

    def grouped(self, most: int) -> SequenceLayout:
        """Return the layout with neighbouring digits joined, as many as have at most `most` values together."""
        grouped = []
        for sizes in self.digits:
            groups = [sizes[0]]
            for size in sizes[1:]:
                if groups[-1] * size <= most:
                    groups[-1] *= size
                else:
                    groups.append(size)
            grouped.append(groups)
        return SequenceLayout(self.grids, self.num_codes, grouped)

    @property
    def draw_sizes(self) -> list[tuple[int, ...]]:
        """Number of values of each of the draws, one after another, that give a code; per level."""
        return [(k,) for k in self.num_codes]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of values at each position."""
        levels = zip(self.lengths, self.draw_sizes, strict=True)
        return [size for length, sizes in levels for size in sizes * (length // len(sizes))]

    def split(self, codes: Codes) -> Codes:
        """Split codes (B, h, w) per level into draws: (B, h, w) for each of `draw_sizes`."""
        return codes

    def flat_mask(self, masks: Codes) -> Tensor:
        """Flatten masks, bool (h, w) per level, to the positions (T,)."""
        return self.flat(masks)[0]

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


class DigitLayout(SequenceLayout):
    """The layout of sequences of digits: a code's digits follow one another, least significant first. Positions, lengths and sequences
    are of digits; levels, grids and coordinates are those of the codes.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], num_codes: Sequence[int], digits: Sequence[Sequence[int]]) -> None:
        super().__init__(grids, num_codes, digits)
        self.lengths = [h * w * len(sizes) for (h, w), sizes in zip(grids, self.digits, strict=True)]
        self.length = sum(self.lengths)

    @property
    @override
    def draw_sizes(self) -> list[tuple[int, ...]]:
        return self.digits

    @override
    def split(self, codes: Codes) -> Codes:
        return tuple(digit for grid, sizes in zip(codes, self.digits, strict=True) for digit in digits_of(grid, sizes))

    @override
    def flat_mask(self, masks: Codes) -> Tensor:
        return torch.cat([mask.flatten().repeat_interleave(len(sizes)) for mask, sizes in zip(masks, self.digits, strict=True)])

    @override
    def flat(self, grids: Codes) -> Tensor:
        levels = zip(grids, self.digits, strict=True)
        return torch.cat([torch.stack(digits_of(grid, sizes), -1).flatten(1) for grid, sizes in levels], 1)

    @override
    def grids_of(self, sequences: Tensor) -> Codes:
        levels = zip(sequences.split(self.lengths, 1), self.grids, self.digits, strict=True)
        return tuple(code_of(part.unflatten(1, (*grid, len(sizes))).unbind(-1), sizes) for part, grid, sizes in levels)

    def code_and_digit(self, position: int) -> tuple[int, int]:
        """Return which code of the sequence a position is of, and which digit of that code."""
        level, index = self.level_and_index(position)
        codes = sum(h * w for h, w in self.grids[:level])
        return codes + index // len(self.digits[level]), index % len(self.digits[level])


def digits_of(codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the digits of codes, each of their shape, least significant first."""
    digits = []
    for size in sizes:
        digits.append(codes % size)
        codes = codes // size
    return digits


def code_of(digits: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the codes of digits: the inverse of `digits_of`."""
    strides = [math.prod(sizes[:number]) for number in range(len(sizes))]
    return torch.stack([digit * stride for digit, stride in zip(digits, strides, strict=True)]).sum(0)
