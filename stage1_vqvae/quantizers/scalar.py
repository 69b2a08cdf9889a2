"""Quantizers without a learned codebook: every channel is rounded by itself, and each combination is a code.

Their width follows from the number of codes; latents of another width are projected by two learned linear maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from configs.errors import require
from configs.parts import QuantizerPart
from stage1_vqvae.quantizers.codebook import mean_squared_error
from stage1_vqvae.quantizers.composed import match_width
from stage1_vqvae.quantizers.contract import Codes, Quantized, RowQuantizer, count_codes
from stage1_vqvae.quantizers.entropy import entropy_loss
from stage1_vqvae.quantizers.gradients import straight_through

# Widens the range of tanh by this share, so that the outermost level can be reached.
_MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class FSQPart(QuantizerPart):
    """Each of a few channels is rounded to one of its levels (Mentzer et al. 2023)."""

    levels: list[int] = field(default_factory=lambda: [8, 8, 8])
    """Number of values per channel; their product is K, the number of codes."""

    def __post_init__(self) -> None:
        within = min(self.levels, default=0) >= 2 and max(self.levels) <= 256
        require(within, "tokenizer.quantizer.levels", "each from 2 to 256", self.levels)

    @property
    @override
    def advice_on_collapse(self) -> str:
        return "lower stage1.lr: the encoder's latents have left the quantizer's range"

    @override
    def build(self, dim: int) -> RowQuantizer:
        return match_width(dim, FiniteScalarQuantizer(self.levels))


@dataclass(frozen=True, kw_only=True)
class LFQPart(QuantizerPart):
    """The signs of log2 K channels are the code (Yu et al. 2023)."""

    num_codes: int = 512
    """K, a power of two."""
    commitment: float = 0.25
    """Weight of the commitment loss, which pulls latents to their signs."""
    entropy_weight: float = 0.05
    """Weight of the entropy term, above 0: nothing else keeps the codes in use."""
    entropy_temperature: float = 0.3
    """Temperature of the entropy term's soft assignments, in squared units of the latents."""

    def __post_init__(self) -> None:
        where, k = "tokenizer.quantizer", self.num_codes
        require(k >= 2 and k & (k - 1) == 0, f"{where}.num_codes", "a power of two", k)
        require(self.commitment >= 0, f"{where}.commitment", "at least 0", self.commitment)
        require(self.entropy_weight > 0, f"{where}.entropy_weight", "above 0: nothing else keeps the codes in use", self.entropy_weight)
        require(self.entropy_temperature > 0, f"{where}.entropy_temperature", "above 0", self.entropy_temperature)

    @property
    @override
    def needs_whole_batch(self) -> bool:
        return True

    @property
    @override
    def advice_on_collapse(self) -> str:
        return f"raise tokenizer.quantizer.entropy_weight, for instance to {2 * self.entropy_weight}"

    @override
    def build(self, dim: int) -> RowQuantizer:
        inner = LookupFreeQuantizer(
            self.num_codes,
            commitment=self.commitment,
            entropy_weight=self.entropy_weight,
            entropy_temperature=self.entropy_temperature,
        )
        return match_width(dim, inner)


class FiniteScalarQuantizer(RowQuantizer):
    """FSQ: channel i is squashed and rounded to one of L_i evenly spaced levels; K is the product of the L_i.

    Levels run from -1 to 1 for odd L, from -1 to 1 - 2 / L for even L. No losses, and no codebook that could collapse.
    Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3.
    """

    sizes: Tensor
    halves: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.dim, self.num_codes = len(levels), (math.prod(levels),)
        self.register_buffer("sizes", torch.tensor(levels), persistent=False)
        self.register_buffer("halves", (self.sizes // 2).to(torch.get_default_dtype()), persistent=False)  # float64 in a model that is
        strides = torch.tensor([math.prod(levels[:number]) for number in range(len(levels))])
        self.register_buffer("strides", strides, persistent=False)

    @property
    @override
    def digits(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(self.sizes.tolist()),)

    @override
    def quantize(self, rows: Tensor) -> Quantized:
        squashed = self._squashed(rows)
        digits = squashed.detach().round()
        codes = ((digits.long() + self.sizes // 2) * self.strides).sum(1)
        z_q = straight_through(squashed / (self.sizes // 2), self.lookup_rows((codes,)).to(rows.dtype))
        return Quantized(z_q, (codes,), {}, {"counts": count_codes(codes, self.num_codes[0])}, ())

    def lookup_rows(self, codes: Codes) -> Tensor:
        """See the contract. Digits start at -floor(L / 2) and are divided by floor(L / 2)."""
        digits = codes[0][:, None] // self.strides % self.sizes
        return (digits - self.sizes // 2) / self.halves

    def _squashed(self, rows: Tensor) -> Tensor:
        """Squash rows into the interval that rounds to L integers; for even L, one more below 0 than above."""
        reach = (self.sizes - 1) * (1 + _MARGIN) / 2
        offset = (self.sizes % 2 == 0).to(rows.dtype) / 2
        # Latent 0 lies on a level for even L, except L = 2: there one level would be 0 and the other out of reach.
        shift = torch.where(self.sizes > 2, (offset / reach).atanh(), 0.0)
        return (rows + shift).tanh() * reach - offset


class LookupFreeQuantizer(RowQuantizer):
    """LFQ: the signs of log2 K channels are the code's bits and its vector.

    Yu et al. 2023, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", section 3.1, equations 3
    to 5: an entropy term keeps the codes in use, a commitment term keeps latents near their signs.
    """

    powers: Tensor
    signs: Tensor

    def __init__(self, num_codes: int, *, commitment: float, entropy_weight: float, entropy_temperature: float) -> None:
        super().__init__()
        self.dim, self.num_codes = num_codes.bit_length() - 1, (num_codes,)
        self.commitment, self.entropy_weight, self.entropy_temperature = commitment, entropy_weight, entropy_temperature
        self.register_buffer("powers", 2 ** torch.arange(self.dim), persistent=False)
        every_code = torch.arange(num_codes)
        self.register_buffer("signs", self._bits(every_code).float() * 2 - 1, persistent=False)

    @property
    @override
    def digits(self) -> tuple[tuple[int, ...], ...]:
        return ((2,) * self.dim,)

    def quantize(self, rows: Tensor) -> Quantized:
        """See the contract. Losses: `commitment` and `entropy`."""
        codes = ((rows.detach() > 0) * self.powers).sum(1)
        vectors_q = self.signs[codes].to(rows.dtype)
        losses = {"commitment": self.commitment * mean_squared_error(rows, vectors_q)}
        if self.training and self.entropy_weight > 0:
            losses["entropy"] = self.entropy_weight * entropy_loss(rows, self.signs.to(rows.dtype), self.entropy_temperature)
        return Quantized(straight_through(rows, vectors_q), (codes,), losses, {"counts": count_codes(codes, self.num_codes[0])}, ())

    @override
    def lookup_rows(self, codes: Codes) -> Tensor:
        return self.signs[codes[0]]

    def _bits(self, codes: Tensor) -> Tensor:
        return codes[:, None] // self.powers % 2
