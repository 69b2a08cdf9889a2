"""The contract that every quantizer keeps.

A quantizer's forward pass is pure: it changes nothing, and hands back the sums that learning the codebooks needs. The
training loop adds those up over micro-steps and processes and calls `update_` once a step, after the optimiser's step,
so a codebook is the same at any number of processes.

Quantizers compose (residual, product, projected): inside, they all work on rows, one vector a row, and only `forward`
and `lookup` know of batches, channels and space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from stage1_vqvae.quantizers.codebook import Codebook

Codes = tuple[Tensor, ...]
"""int64 grids (B, *spatial), one a level, coarse to fine."""

Statistics = dict[str, Tensor]
"""Sums over vectors, without gradients: those of two passes are added name by name. Every level has `counts` (K,), by
which name `level_counts` finds them; a name inside a composed quantizer has its part's number before it."""


class Quantized(NamedTuple):
    """What a quantizer makes of latents: of z (B, D, *spatial) in `forward`, of rows (N, D) in `quantize`."""

    z_q: Tensor
    """The codes' vectors, of z's shape, float32 or wider; gradients pass to z by the gradient estimator."""
    codes: Codes
    """The chosen codes: (B, *spatial) a level in `forward`, (N,) in `quantize`."""
    losses: dict[str, Tensor]
    """Scalars, each with its weight in it: the loop adds them to the reconstruction loss."""
    statistics: Statistics
    """What `update_` needs, and each level's counts."""
    latents: tuple[Tensor, ...]
    """For each of the quantizer's `codebooks`, the vectors (N n, d) it had to represent, n for each of the N rows, in
    their order and without gradient: where k-means and restarts place codes."""


class Levels(nn.Module, ABC):
    """Levels of codes, coarse to fine, and what they learn from: a quantizer, or several, one a grid."""

    num_codes: tuple[int, ...]
    """K, the number of codes, of each level."""

    @abstractmethod
    def code_vectors(self) -> tuple[Tensor, ...]:
        """(K, D) a level: what each of its codes adds to the latents beside the other levels' codes, less the mean over its codes."""

    def update_(self, statistics: Statistics) -> None:
        """Learn from one step's statistics, summed over micro-steps and processes. Without codebooks: nothing."""

    def codebooks(self) -> tuple[Codebook, ...]:
        """The codebooks, each once, in the order of the first level that uses each; none where the codes are given."""
        return tuple(module for module in self.modules() if isinstance(module, Codebook))

    def codebook_of(self, level: int) -> int:
        """Which of `codebooks` a level uses: its own, or one that it shares with its neighbours."""
        return level * len(self.codebooks()) // len(self.num_codes)


class Quantizer(Levels):
    """The contract. The channel axis is the quantized one: z of (16, 64, 32, 32) is 16,384 vectors of 64."""

    dim: int
    """D, the channels of the latents that are quantized."""

    def forward(self, z: Tensor) -> Quantized:
        """Quantize z (B, D, *spatial), in float32 at least, whatever autocast says. An empty batch works.

        Errors: ValueError if D is not the quantizer's.
        """
        if z.ndim < 2 or z.shape[1] != self.dim:
            raise ValueError(f"z: expected (B, {self.dim}, ...), found {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            batch, spatial = z.shape[0], z.shape[2:]  # len would fix the batch of an exported graph
            found = self.quantize(z.reshape(batch, self.dim, spatial.numel()).transpose(1, 2).reshape(-1, self.dim))
            codes = tuple(level.view(batch, *spatial) for level in found.codes)
            return found._replace(z_q=found.z_q.view(batch, *spatial, self.dim).movedim(-1, 1), codes=codes)

    def lookup(self, codes: Codes) -> Tensor:
        """Vectors (B, D, *spatial) of codes; equal to `forward`'s z_q for the codes it returned."""
        with torch.autocast(codes[0].device.type, enabled=False):
            rows = self.lookup_rows(tuple(level.flatten() for level in codes))
            return rows.view(*codes[0].shape, self.dim).movedim(-1, 1)

    @abstractmethod
    def quantize(self, rows: Tensor) -> Quantized:
        """Quantize rows (N, D), one vector a row."""

    @abstractmethod
    def lookup_rows(self, codes: Codes) -> Tensor:
        """Vectors (N, D) of codes (N,) a level."""

    @override
    @torch.no_grad()
    def code_vectors(self) -> tuple[Tensor, ...]:
        device = next((tensor.device for tensor in self.state_dict(keep_vars=True).values()), None)
        found = []
        for level, size in enumerate(self.num_codes):
            codes = [torch.zeros(size, dtype=torch.int64, device=device) for _ in self.num_codes]
            codes[level] = torch.arange(size, device=device)
            rows = self.lookup_rows(tuple(codes))
            found.append(rows - rows.mean(0))
        return tuple(found)


def with_prefixes(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of a composed quantizer's parts as one."""
    return {f"{number}.{name}": value for number, part in enumerate(parts) for name, value in part.items()}


def without_prefix(statistics: Statistics, number: int) -> Statistics:
    """The inverse of `numbered` for one part."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}


def level_counts(statistics: Statistics) -> list[Tensor]:
    """How often each code was chosen, (K,) a level."""
    return [value for name, value in statistics.items() if name.split(".")[-1] == "counts"]


def count_codes(codes: Tensor, num_codes: int) -> Tensor:
    """How often each of K codes occurs in codes (N,): float32 (K,), exact up to 2^24."""
    # Not `bincount`, which on a GPU waits for the result's size.
    ones = torch.ones_like(codes, dtype=torch.float32)
    return ones.new_zeros(num_codes).index_add_(0, codes, ones)


def sum_by_name(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add up dictionaries of tensors, name by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
