"""Composed quantizers: residual, product, projected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from stage1_vqvae.quantizers.contract import Codes, Quantized, RowQuantizer, Statistics, sum_by_name, with_prefixes, without_prefix
from stage1_vqvae.quantizers.gradients import Estimator


class ResidualQuantizer(RowQuantizer):
    """Each depth quantizes the residual of the depths before; a latent's vector is the sum over depths.

    Lee et al. 2022, "Autoregressive Image Generation using Residual Quantization", section 3.1: depths may share one codebook, and
    the commitment losses of all partial sums are added (equation 7). The gradient passes to z once.
    """

    def __init__(self, stages: Sequence[RowQuantizer], depth: int, estimator: Estimator) -> None:
        """`stages`: one quantizer per depth, or a single one shared by all."""
        super().__init__()
        assert len(stages) in (1, depth)
        self.stages = nn.ModuleList(stages)
        self.depth, self.estimator = depth, estimator
        self.dim, self.num_codes = stages[0].dim, tuple(k for level in range(depth) for k in self._stage(level).num_codes)

    def _stage(self, level: int) -> RowQuantizer:
        stage = self.stages[level if len(self.stages) > 1 else 0]
        assert isinstance(stage, RowQuantizer)
        return stage

    @override
    def quantize(self, rows: Tensor) -> Quantized:
        residual, parts = rows, []
        for level in range(self.depth):
            parts.append(self._stage(level).quantize(residual))
            residual = residual - parts[-1].z_q.detach()
        z_q = self.estimator(rows, sum_in_order([part.z_q.detach() for part in parts]))
        codes = tuple(level for part in parts for level in part.codes)
        latents_by_depth = [part.latents for part in parts]
        if len(self.stages) == 1:
            latents = tuple(torch.stack(depths, 1).flatten(0, 1) for depths in zip(*latents_by_depth, strict=True))
        else:
            latents = tuple(vectors for depth in latents_by_depth for vectors in depth)
        losses = sum_by_name([part.losses for part in parts])
        return Quantized(z_q, codes, losses, with_prefixes([part.statistics for part in parts]), latents)

    @override
    def lookup_rows(self, codes: Codes) -> Tensor:
        levels = len(codes) // self.depth
        parts = [self._stage(level).lookup_rows(codes[level * levels : (level + 1) * levels]) for level in range(self.depth)]
        return sum_in_order(parts)

    def update_(self, statistics: Statistics) -> None:
        """See the contract. A shared codebook learns from the sum over all depths."""
        parts = [without_prefix(statistics, level) for level in range(self.depth)]
        parts = [sum_by_name(parts)] if len(self.stages) == 1 else parts
        for level, part in enumerate(parts):
            self._stage(level).update_(part)


class ProductQuantizer(RowQuantizer):
    """One quantizer per group of channels: K^groups combinations from groups x K codes.

    Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search", section II-B. Losses are means over groups.
    """

    def __init__(self, groups: Sequence[RowQuantizer]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self._groups = tuple(groups)
        self.dim = sum(group.dim for group in groups)
        self.num_codes = tuple(k for group in groups for k in group.num_codes)

    @override
    def quantize(self, rows: Tensor) -> Quantized:
        channels = rows.split([group.dim for group in self._groups], 1)
        parts = [group.quantize(part) for group, part in zip(self._groups, channels, strict=True)]
        losses = {name: total / len(parts) for name, total in sum_by_name([part.losses for part in parts]).items()}
        return Quantized(
            torch.cat([part.z_q for part in parts], 1),
            tuple(level for part in parts for level in part.codes),
            losses,
            with_prefixes([part.statistics for part in parts]),
            tuple(vectors for part in parts for vectors in part.latents),
        )

    @override
    def lookup_rows(self, codes: Codes) -> Tensor:
        parts, first = [], 0
        for group in self._groups:
            levels = len(group.num_codes)
            parts.append(group.lookup_rows(codes[first : first + levels]))
            first += levels
        return torch.cat(parts, 1)

    @override
    def update_(self, statistics: Statistics) -> None:
        for number, group in enumerate(self._groups):
            group.update_(without_prefix(statistics, number))


class ProjectedQuantizer(RowQuantizer):
    """A quantizer between two learned linear maps, to and from its own width.

    Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN", section 3.2, "factorized codes": few dimensions for the
    nearest-code search, many for the decoder. FSQ and LFQ, whose width follows from K, usually need it.
    """

    def __init__(self, dim: int, inner: RowQuantizer) -> None:
        super().__init__()
        self.dim, self.num_codes = dim, inner.num_codes
        self.down, self.inner, self.up = nn.Linear(dim, inner.dim), inner, nn.Linear(inner.dim, dim)

    @property
    @override
    def digits(self) -> tuple[tuple[int, ...], ...]:
        return self.inner.digits

    @override
    def quantize(self, rows: Tensor) -> Quantized:
        quantized = self.inner.quantize(self.down(rows))
        return quantized._replace(z_q=self.up(quantized.z_q))

    @override
    def lookup_rows(self, codes: Codes) -> Tensor:
        return self.up(self.inner.lookup_rows(codes))

    @override
    def update_(self, statistics: Statistics) -> None:
        self.inner.update_(statistics)


def match_width(dim: int, inner: RowQuantizer) -> RowQuantizer:
    """Return the quantizer if it has `dim` channels; otherwise project it to that width."""
    return inner if inner.dim == dim else ProjectedQuantizer(dim, inner)


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Add tensors in a fixed order, so that `quantize` and `lookup_rows` agree to the last bit."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
