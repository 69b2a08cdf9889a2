"""Several grids, a quantizer each, as one: their levels follow one another, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from stage1_vqvae.quantizers.codebook import Codebook
from stage1_vqvae.quantizers.contract import Codes, Levels, Quantized, Quantizer, Statistics, sum_by_name, with_prefixes, without_prefix


class GridQuantizers(Levels):
    """A quantizer a grid. All that concerns codes and codebooks treats their levels as one list."""

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)  # type: ignore[assignment]
        self.num_codes = tuple(k for part in self.parts for k in part.num_codes)

    parts: Sequence[Quantizer]

    @staticmethod
    def merge(found: Sequence[Quantized]) -> tuple[Codes, dict[str, Tensor], Statistics, tuple[Tensor, ...]]:
        """Codes, losses, statistics and latents of all grids, of what each grid's quantizer made of its own latents; losses add up."""
        codes = tuple(level for part in found for level in part.codes)
        latents = tuple(vectors for part in found for vectors in part.latents)
        return codes, sum_by_name([part.losses for part in found]), with_prefixes([part.statistics for part in found]), latents

    @override
    def update_(self, statistics: Statistics) -> None:
        for number, part in enumerate(self.parts):
            part.update_(without_prefix(statistics, number))

    @override
    def codebooks(self) -> tuple[Codebook, ...]:
        return tuple(codebook for part in self.parts for codebook in part.codebooks())

    @override
    def codebook_of(self, level: int) -> int:
        before = 0
        for part in self.parts:
            if level < len(part.num_codes):
                return before + part.codebook_of(level)
            level -= len(part.num_codes)
            before += len(part.codebooks())
        raise IndexError(level)

    @override
    @torch.no_grad()
    def code_vectors(self) -> tuple[Tensor, ...]:
        return tuple(vectors for part in self.parts for vectors in part.code_vectors())
