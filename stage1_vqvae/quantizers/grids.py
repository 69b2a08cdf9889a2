"""One quantizer per grid, as one list of levels, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from stage1_vqvae.quantizers.codebook import Codebook
from stage1_vqvae.quantizers.contract import Codes, Levels, Quantized, Quantizer, Statistics, sum_by_name, with_prefixes, without_prefix


class GridQuantizers(Levels):
    """One quantizer per grid; codes and codebooks of all grids are one list."""

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)  # type: ignore[assignment]
        self.num_codes = tuple(k for part in self.parts for k in part.num_codes)

    parts: Sequence[Quantizer]

    @property
    @override
    def digits(self) -> tuple[tuple[int, ...], ...]:
        return tuple(sizes for part in self.parts for sizes in part.digits)

    @staticmethod
    def merge(grids: Sequence[Quantized]) -> tuple[Codes, dict[str, Tensor], Statistics, tuple[Tensor, ...]]:
        """Merge codes, losses, statistics and latents of all grids; losses are summed."""
        codes = tuple(level for part in grids for level in part.codes)
        latents = tuple(vectors for part in grids for vectors in part.latents)
        return codes, sum_by_name([part.losses for part in grids]), with_prefixes([part.statistics for part in grids]), latents

    @override
    def update_(self, statistics: Statistics) -> None:
        for number, part in enumerate(self.parts):
            part.update_(without_prefix(statistics, number))

    @override
    def codebooks(self) -> tuple[Codebook, ...]:
        return tuple(codebook for part in self.parts for codebook in part.codebooks())

    @override
    def codebook_of(self, level: int) -> int:
        first = 0
        for part in self.parts:
            if level < len(part.num_codes):
                return first + part.codebook_of(level)
            level -= len(part.num_codes)
            first += len(part.codebooks())
        raise IndexError(level)

    @override
    @torch.no_grad()
    def code_vectors(self) -> tuple[Tensor, ...]:
        return tuple(vectors for part in self.parts for vectors in part.code_vectors())
