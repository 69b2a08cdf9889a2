"""The hierarchical family: several grids of codes, each quantized given the coarser ones.

Razavi et al. 2019, "Generating Diverse High-Fidelity Images with VQ-VAE-2", section 3.1: features are computed from fine to coarse and
quantized from coarse to fine; a grid's latents depend on its features and on the decoded codes of the coarser grids. Built from the
convolutional family's encoders and decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn
from typing_extensions import override

from configs.errors import require
from stage1_vqvae.networks.convolutional import ConvolutionalPart, Decoder, Encoder


@dataclass(frozen=True, kw_only=True)
class HierarchicalPart(ConvolutionalPart):
    """Two or more grids of codes, each quantized given the coarser ones (VQ-VAE-2, Razavi et al. 2019)."""

    factors: list[int] = field(default_factory=lambda: [2])
    """Further downsampling of each coarser grid relative to the next finer one, fine to coarse; powers of two. `downsampling` is that of
    the finest grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        powers = all(factor > 1 and factor & (factor - 1) == 0 for factor in self.factors)
        require(powers and len(self.factors) > 0, "tokenizer.network.factors", "powers of two above 1, one or more", self.factors)

    @property
    @override
    def downsamplings(self) -> list[int]:
        return list(accumulate([self.downsampling, *self.factors], mul))[::-1]

    @override
    def build(self, image_channels: int, code_dim: int, output_channels: int) -> tuple[nn.Module, nn.Module]:
        return HierarchicalEncoder(self, image_channels, code_dim), HierarchicalDecoder(self, code_dim, output_channels)


class HierarchicalEncoder(nn.Module):
    """Images to the latents of each grid, quantized from coarse to fine on the way."""

    def __init__(self, config: HierarchicalPart, image_channels: int, code_dim: int) -> None:
        super().__init__()
        hidden, blocks = config.hidden_channels, (config.residual_blocks, config.residual_channels)
        self.finest = Encoder(image_channels, hidden, hidden, config.downsampling, *blocks)
        # Fine to coarse; each reads the features of the finer one.
        self.coarser = nn.ModuleList(Encoder(hidden, hidden, hidden, factor, *blocks) for factor in config.factors)
        # Coarse to fine: features of the coarser grids for the next one. Checkerboard artefacts do no harm in features.
        self.above = nn.ModuleList(
            Decoder(code_dim + (hidden if number else 0), hidden, hidden, factor, *blocks)
            for number, factor in enumerate(reversed(config.factors))
        )
        self.latents = nn.ModuleList(nn.Conv2d(2 * hidden if number else hidden, code_dim, 1) for number in range(1 + len(config.factors)))

    def forward(self, images: Tensor, quantize: Callable[[Tensor], Tensor]) -> None:
        """Call `quantize` with the latents (B, D, h, w) of each grid, coarse to fine.

        It returns the vectors of their codes, of the same shape, on which the next grid's latents depend.
        """
        features = [self.finest(images)]
        for layers in self.coarser:
            features.append(layers(features[-1]))
        vectors = quantize(self.latents[0](features[-1]))
        coarser: list[Tensor] = []
        for decoder, latents, grid_features in zip(self.above, self.latents[1:], features[-2::-1], strict=True):
            coarser = [decoder(torch.cat([*coarser, vectors], 1))]
            vectors = quantize(latents(torch.cat([grid_features, *coarser], 1)))


class HierarchicalDecoder(nn.Module):
    """Vectors of the codes of all grids to images."""

    def __init__(self, config: HierarchicalPart, code_dim: int, output_channels: int) -> None:
        super().__init__()
        hidden, sizes = config.hidden_channels, (config.downsampling, config.residual_blocks, config.residual_channels)
        # Coarse to fine, without residual blocks, as in the paper: the last decoder sees all grids.
        self.upsampled = nn.ModuleList(
            Decoder(code_dim * (1 + number), code_dim * (1 + number), hidden, factor, 0, config.residual_channels, config.upsampling)
            for number, factor in enumerate(reversed(config.factors))
        )
        self.finest = Decoder(code_dim * (1 + len(config.factors)), output_channels, hidden, *sizes, config.upsampling)

    def forward(self, *vectors: Tensor) -> Tensor:
        """Decode vectors (B, D, h, w) of each grid, coarse to fine, to (B, output_channels, H, W)."""
        x = vectors[0]
        for layers, grid_vectors in zip(self.upsampled, vectors[1:], strict=True):
            x = torch.cat([layers(x), grid_vectors], 1)
        return self.finest(x)
