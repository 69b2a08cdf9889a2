"""What every quantizer is.

A quantizer's forward pass is pure: it changes nothing, and hands back the sums that learning the codebook needs. The
training loop adds those up over micro-steps and processes and calls `update_` once a step, after the optimiser's step,
so a codebook is the same at any number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

Codes = tuple[Tensor, ...]
"""int64 grids (B, *spatial), one a level, coarse to fine."""


class Quantized(NamedTuple):
    """What a quantizer makes of latents z (B, D, *spatial)."""

    z_q: Tensor
    """The codes' vectors, of z's shape, float32; gradients pass to z straight through."""
    codes: Codes
    """The chosen codes."""
    losses: dict[str, Tensor]
    """Scalars, each with its weight in it: the loop adds them to the reconstruction loss."""
    statistics: dict[str, Tensor]
    """Sums over the vectors, without gradients; adding two passes' statistics gives those of both."""


class Quantizer(nn.Module, ABC):
    """The contract. The channel axis is the quantized one: z of (16, 64, 32, 32) is 16,384 vectors of 64."""

    num_codes: tuple[int, ...]
    """K of each level."""

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize z (B, D, *spatial). Errors: ValueError if D is not the quantizer's. An empty batch works."""

    @abstractmethod
    def lookup(self, codes: Codes) -> Tensor:
        """Vectors (B, D, *spatial) of codes; equal to `forward`'s z_q for the codes it returned."""

    @abstractmethod
    def update_(self, statistics: dict[str, Tensor]) -> None:
        """Learn from one step's statistics, summed over micro-steps and processes."""
