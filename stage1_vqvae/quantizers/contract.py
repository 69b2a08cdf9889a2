"""The contract of all quantizers.

The forward pass changes nothing: it returns the statistics that the codebooks learn from. The training loop sums them over micro-steps
and ranks and calls `update_` once per step, after the optimizer's step, so codebooks are the same at any world size.

Most quantizers take each vector by itself, and compose (residual, product, projected). Inside, these work on rows, one vector each; only
`forward` and `lookup` handle batches, channels and spatial axes.
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
"""int64 grids (B, *spatial), one per level, coarse to fine."""

Statistics = dict[str, Tensor]
"""Sums over vectors, without gradients; those of two passes are added name by name. Every level has `counts` (K,), which
`level_counts` looks up. In a composed quantizer the name is prefixed by the part's number."""


class Quantized(NamedTuple):
    """Quantized latents: z (B, D, *spatial) in `forward`, rows (N, D) in `quantize`."""

    z_q: Tensor
    """The codes' vectors, of z's shape, float32 or wider; the gradient estimator passes gradients to z."""
    codes: Codes
    """The chosen codes: (B, *spatial) per level in `forward` (of that level's own grid, see `level_grids`), (N,) in `quantize`."""
    losses: dict[str, Tensor]
    """Weighted scalars, which the loop adds to the reconstruction loss."""
    statistics: Statistics
    """Input of `update_`: each level's counts, and sums where the codebook needs them."""
    latents: tuple[Tensor, ...]
    """Per entry of `codebooks`, the vectors (M, d) it had to represent, equally many for each row (in `forward`: each image), in the
    order of these and without gradient. K-means and restarts set codes to them."""


class Levels(nn.Module, ABC):
    """Levels of codes, coarse to fine: one quantizer, or one per grid."""

    num_codes: tuple[int, ...]
    """Number of codes K per level."""

    @property
    def digits(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the digits of a code, per level, least significant first: code = d1 + s1 d2 + s1 s2 d3 ...; by default one, the code."""
        return tuple((k,) for k in self.num_codes)

    @abstractmethod
    def code_vectors(self) -> tuple[Tensor, ...]:
        """Compute (K, D) per level: what each code adds to the latents, other levels being equal, minus the mean over codes."""

    def update_(self, statistics: Statistics) -> None:
        """Learn from one step's statistics, summed over micro-steps and ranks; a no-op without codebooks."""

    def codebooks(self) -> tuple[Codebook, ...]:
        """List the codebooks, each once, ordered by the first level that uses it; none for FSQ and LFQ."""
        return tuple(module for module in self.modules() if isinstance(module, Codebook))

    def codebook_of(self, level: int) -> int:
        """Return the index in `codebooks` of the codebook that a level uses, alone or shared with other levels."""
        return level * len(self.codebooks()) // len(self.num_codes)


class Quantizer(Levels):
    """Base class of the quantizers of one grid of latents."""

    dim: int
    """Channels D of the latents."""

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize z (B, D, *spatial), in float32 or wider, whatever autocast says. The batch may be empty.

        Errors: ValueError if z does not have the quantizer's shape.
        """

    @abstractmethod
    def lookup(self, codes: Codes) -> Tensor:
        """Look up the vectors (B, D, *spatial) of codes; equal to `forward`'s z_q for the codes it returned."""

    def level_grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the grid (h, w) of each level's codes, for latents of (height, width): by default the latents' own."""
        return [(height, width) for _ in self.num_codes]


class RowQuantizer(Quantizer):
    """Base class of the quantizers that take each vector by itself. The channel axis is quantized: z of (16, 64, 32, 32) is 16,384
    vectors of 64 channels.
    """

    @override
    def forward(self, z: Tensor) -> Quantized:
        if z.ndim < 2 or z.shape[1] != self.dim:
            raise ValueError(f"z: expected (B, {self.dim}, ...), found {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            batch, spatial = z.shape[0], z.shape[2:]  # len would fix the batch of an exported graph
            rows = self.quantize(z.reshape(batch, self.dim, spatial.numel()).transpose(1, 2).reshape(-1, self.dim))
            codes = tuple(level.view(batch, *spatial) for level in rows.codes)
            return rows._replace(z_q=rows.z_q.view(batch, *spatial, self.dim).movedim(-1, 1), codes=codes)

    @override
    def lookup(self, codes: Codes) -> Tensor:
        with torch.autocast(codes[0].device.type, enabled=False):
            rows = self.lookup_rows(tuple(level.flatten() for level in codes))
            return rows.view(*codes[0].shape, self.dim).movedim(-1, 1)

    @abstractmethod
    def quantize(self, rows: Tensor) -> Quantized:
        """Quantize rows (N, D), one vector each."""

    @abstractmethod
    def lookup_rows(self, codes: Codes) -> Tensor:
        """Look up the vectors (N, D) of codes, (N,) per level."""

    @override
    @torch.no_grad()
    def code_vectors(self) -> tuple[Tensor, ...]:
        device = next((tensor.device for tensor in self.state_dict(keep_vars=True).values()), None)
        vectors = []
        for level, size in enumerate(self.num_codes):
            codes = [torch.zeros(size, dtype=torch.int64, device=device) for _ in self.num_codes]
            codes[level] = torch.arange(size, device=device)
            rows = self.lookup_rows(tuple(codes))
            vectors.append(rows - rows.mean(0))
        return tuple(vectors)


def with_prefixes(parts: Sequence[Statistics]) -> Statistics:
    """Merge the statistics of a composed quantizer's parts, each name prefixed by its part's number."""
    return {f"{number}.{name}": value for number, part in enumerate(parts) for name, value in part.items()}


def without_prefix(statistics: Statistics, number: int) -> Statistics:
    """Select one part's statistics; the inverse of `with_prefixes`."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in statistics.items() if name.startswith(prefix)}


def level_counts(statistics: Statistics) -> list[Tensor]:
    """Look up how often each code was chosen, (K,) per level."""
    return [value for name, value in statistics.items() if name.split(".")[-1] == "counts"]


def count_codes(codes: Tensor, num_codes: int) -> Tensor:
    """Count how often each of K codes occurs in codes (N,): float32 (K,), exact up to 2^24."""
    # `bincount` would wait for the GPU, to learn the result's size.
    ones = torch.ones_like(codes, dtype=torch.float32)
    return ones.new_zeros(num_codes).index_add_(0, codes, ones)


def sum_by_name(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum dictionaries of tensors, name by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
