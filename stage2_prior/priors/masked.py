"""A masked transformer (Chang et al. 2022, "MaskGIT"): codes given any others, drawn many at a time, in rounds.

Attention goes in both directions, and a mask stands in place of each missing code. Levels stay coarse to fine: some codes of a level are
predicted from its others and all coarser levels, while all finer levels are masked, in training, likelihood and sampling alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from configs.errors import require
from configs.parts import Sampling
from stage1_vqvae.attention import Norm, RotaryTable
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.draw import LOGITS_PER_DRAW, StepwiseSampling, check_finite, draw, guidance_scales, guided, round_stops, uniforms, warp
from stage2_prior.priors.blocks import Block, TransformerFields, initialise_, initialise_codes_
from stage2_prior.priors.contract import GuidedPart, Keep, Prior, Sizes, VariantEmbedding
from stage2_prior.priors.stepwise import code_losses
from training.batching import batches
from training.devices import as_float64, float64_device
from training.precision import full_precision, ieee_float32

# Orders and rounds of each whose mean is the likelihood's bound: passes of the network per level.
_BOUND_ORDERS, _BOUND_ROUNDS = 2, 8


@dataclass(frozen=True, kw_only=True)
class MaskedSampling(Sampling):
    """How codes are drawn in rounds."""

    rounds: int = 16
    """Rounds per level: few codes in the first, then more and more, along a cosine; at most one per code."""
    order: Literal["confidence", "halton"] = "confidence"
    """Which codes a round keeps: those drawn with the highest probability (Chang et al. 2022), or the next of the grid's Halton sequence,
    far from one another (Besnier et al. 2025)."""
    choice_temperature: float = 4.5
    """Gumbel noise on log-probabilities in the order `confidence`, which falls to 0 in the last round; 0 = the most probable first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        require(self.order in ("confidence", "halton"), "order", "confidence or halton", self.order)
        finite = 0 <= self.choice_temperature < float("inf")
        require(finite, "choice_temperature", "at least 0, and finite", self.choice_temperature)


@dataclass(frozen=True, kw_only=True)
class MaskedPart(TransformerFields, GuidedPart):
    """A transformer that predicts masked codes from all others, and draws many at a time. Dropout is of embedded codes, attention and
    MLP.
    """

    SAMPLING = MaskedSampling

    @override
    def build(self, layout: SequenceLayout, condition: Condition, num_variants: int = 1) -> Masked:
        return Masked(layout, condition, num_variants, self.sizes(), self.dropout, self.head_gain)


class Round(NamedTuple):
    """Codes that are drawn or scored at once."""

    level: int
    positions: list[int]
    """Positions in the sequence, all of this level."""


class Masked(Prior):
    """p(codes of a level | any others of that level, all of the coarser levels, condition)."""

    exact, completes_any_mask = False, True

    def __init__(
        self, layout: SequenceLayout, condition: Condition, num_variants: int, sizes: Sizes, dropout: float, head_gain: bool = False
    ) -> None:
        """`layout`, `condition` and `num_variants` as in the contract; `head_gain` as in `MaskedPart`."""
        super().__init__(layout, condition, num_variants)
        layers, width, heads = sizes
        # Of a training row, besides: its level, its number of masked codes, a random order of all positions.
        self.num_draws += 2 + layout.length
        # A seed of the numbers of all rounds, as many as the settings ask for.
        self.num_noise = 1
        self.token, self.mask = nn.Embedding(layout.vocabulary, width), nn.Parameter(torch.empty(width))
        self.label = condition.embedding(width)
        self.variant = VariantEmbedding(num_variants, width) if num_variants > 1 else None
        heights, widths = zip(*layout.grids, strict=True)
        self.level, self.row, self.column = (nn.Embedding(n, width) for n in (len(layout.grids), max(heights), max(widths)))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, head_gain) for _ in range(layers))  # type: ignore[assignment]
        self.norm = Norm(width)
        self.head = nn.Linear(width, layout.vocabulary, bias=False)
        self.rotary = RotaryTable(layout.centres(), width // heads)
        self.register_buffer("coordinates", layout.coordinates(), persistent=False)
        self.register_buffer("lengths", torch.tensor(layout.lengths), persistent=False)
        initialise_(self, self.blocks, self.mask)

    blocks: Sequence[Block]
    coordinates: Tensor
    lengths: Tensor

    @override
    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        initialise_codes_((self.token.weight, self.head.weight), self.layout.num_codes, vectors)

    @override
    def fsdp_modules(self) -> list[nn.Module]:
        return list(self.blocks)

    def features(self, codes: Codes, masked: Tensor, condition: Tensor | None, variants: Tensor | None = None) -> Tensor:
        """Features (B, T, C) of the last layer.

        Args:
            codes: int64 (B, h, w) per level, of which masked ones are not seen.
            masked: bool (B, T).
            condition, variants: as in `forward`.
        """
        level, row, column = self.coordinates.unbind(1)
        x = torch.where(masked[..., None], self.mask, self.token(self.layout.to_tokens(codes)))
        embedded = self.label(self.condition_or_null(condition, len(masked)))
        if variants is not None and self.variant is not None:
            embedded = embedded + self.variant(variants)
        x = self.dropout(x + self.level(level) + self.row(row) + self.column(column) + embedded[:, None])
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, self.rotary.table, causal=False, use_reentrant=False)
            else:
                x = block(x, self.rotary.table, causal=False)
        return x

    def head_logits(self, x: Tensor, level: int) -> Tensor:
        """(..., C) at positions of one level to logits (..., K) over its codes, float32 or wider."""
        offset = self.layout.offsets[level]
        return full_precision(F.linear(self.norm(x), self.head.weight[offset : offset + self.layout.num_codes[level]]))

    @override
    def forward(
        self,
        codes: Codes,
        condition: Tensor | None,
        variants: Tensor | None = None,
        draws: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> Tensor:
        """Return the bound in expectation (Hoogeboom et al. 2022, "Autoregressive Diffusion Models", section 3; levels in turn).

        Each row masks a random number of random codes of one level, drawn in proportion to the levels' lengths. The mean nats of a row's
        masked codes are, in expectation, a bound on the nats per code of all its codes.
        """
        assert draws is not None
        predicted, masked = self.random_masks(draws[:, -2 - self.layout.length :])

        def logits_given(rows: Tensor | None) -> tuple[Tensor, ...]:
            x = self.features(codes, masked, rows, variants)
            return tuple(self.head_logits(part, level) for level, part in enumerate(x.split(self.layout.lengths, 1)))

        logits = logits_given(condition) if self.guidance_free is None else self.guidance_free_logits(logits_given, condition, draws[:, 0])
        nats = torch.cat(code_losses(logits, codes), 1) * predicted
        return (nats.sum(1) / predicted.sum(1)).mean()

    def random_masks(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (B, T) that a training step predicts, and all that are masked, from draws (B, 2 + T)."""
        of_position = self.coordinates[:, 0]
        level = of_position[(draws[:, 0] * self.layout.length).long()]
        count = 1 + (draws[:, 1] * self.lengths[level]).long()
        own = of_position == level[:, None]
        predicted = own & (draws[:, 2:].masked_fill(~own, 1).argsort(1).argsort(1) < count[:, None])
        return predicted, predicted | (of_position > level[:, None])

    # --- sampling

    @override
    @torch.no_grad()
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """See the contract. A code is drawn given all kept ones of its level and of coarser levels, wherever they are."""
        assert not self.training
        assert isinstance(settings, MaskedSampling)
        layout, batch, both = self.layout, len(noise), self.needs_two_rows(condition, settings)
        condition = self.sampling_condition(condition, batch, both, settings.guidance)
        device, copies = float64_device(self.device), 2 if both else 1
        sequences = torch.zeros(batch, layout.length, dtype=torch.int64, device=device)
        to_draw = torch.ones(layout.length, dtype=torch.bool)
        if keep is not None:
            sequences.copy_(layout.flat(keep.codes))
            to_draw = ~layout.flat(keep.masks)[0].cpu()
        stops = [round_stops(int(part.sum()), settings.rounds) for part in to_draw.split(layout.lengths)]
        sizes = [[stop - start for start, stop in pairwise(level_stops)] for level_stops in stops]
        scales = iter(guidance_scales(settings, sum(map(len, sizes))))
        # Two numbers a round for each position of its level: a code that is drawn but not kept is drawn again with another.
        lengths = [length for length, level_sizes in zip(layout.lengths, sizes, strict=True) for _ in range(2 * len(level_sizes))]
        uniform = iter(uniforms(0, (noise[:, 0] * 2**53).long(), sum(lengths)).to(device).split(lengths, 1))
        masked, finite = torch.ones_like(sequences, dtype=torch.bool), torch.ones((), dtype=torch.bool, device=device)
        for level, level_sizes in enumerate(sizes):
            first = layout.first_position(level)
            own = slice(first, first + layout.lengths[level])
            masked[:, own] = to_draw[own].to(device)
            rank = torch.tensor(halton_order(*layout.grids[level]), device=device).argsort()
            for number, size in enumerate(level_sizes, 1):
                grids = layout.grids_of(sequences.repeat(copies, 1).to(self.device))
                x = self.features(grids, masked.repeat(copies, 1).to(self.device), condition)[:, own]
                scale = next(scales)
                codes, preference = self._draw(x, level, next(uniform), settings, scale if both else None)
                # Read on the host once, at the end, so that a GPU is never waited for.
                finite &= preference.isfinite().all()
                gumbel = -(-next(uniform).clamp(min=2.0**-53).log()).log()
                if settings.order == "halton":
                    preference = -rank.expand_as(preference).to(preference)
                else:
                    preference = preference + settings.choice_temperature * (1 - number / len(level_sizes)) * gumbel
                preference = preference.masked_fill(~masked[:, own], -torch.inf)
                chosen = preference.argsort(stable=True, dim=1, descending=True)[:, :size]
                sequences[:, own] = sequences[:, own].scatter(1, chosen, codes.gather(1, chosen))
                masked[:, own] = masked[:, own].scatter(1, chosen, False)
        check_finite(bool(finite), settings)
        return layout.grids_of(sequences.to(self.device))

    def _draw(self, x: Tensor, level: int, uniform: Tensor, settings: Sampling, scale: float | None) -> tuple[Tensor, Tensor]:
        """Draw codes of one level, and compute their log-probabilities, at temperature 1.

        Args:
            x: features (B, n, C); under guidance (2 B, n, C), conditional rows first.
            uniform: (B, n) float64.
            scale: guidance scale; None: no guidance.
        Returns: codes (B, n) int64, log-probabilities (B, n) float64.
        """
        parts, unlimited = [], StepwiseSampling(temperature=settings.temperature)
        size = LOGITS_PER_DRAW // (uniform.shape[1] * self.layout.num_codes[level])
        for rows in batches(len(uniform), max(1, size)):
            logits = as_float64(self.head_logits(x[rows], level))
            if scale is not None:
                logits = guided(logits, as_float64(self.head_logits(x[len(uniform) :][rows], level)), scale)
            codes = draw(warp(logits, unlimited), uniform[rows])
            parts.append((codes, logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]))
        codes, log_probabilities = map(torch.cat, zip(*parts, strict=True))
        return codes, log_probabilities

    # --- likelihood

    @override
    def nats(self, codes: Codes, condition: Tensor | None) -> Tensor:
        """See the contract: mean over `bound_orders` of the nats of codes drawn in that order, a bound by Jensen's inequality."""
        sequences, orders = self.layout.flat(codes), self.bound_orders()
        nats = torch.zeros(sequences.shape, dtype=torch.promote_types(self.mask.dtype, torch.float32), device=sequences.device)
        with ieee_float32(sequences.device):
            for order in orders:
                masked = torch.ones_like(sequences, dtype=torch.bool)
                for level, positions in order:
                    logits = self.head_logits(self.features(codes, masked, condition)[:, positions], level)
                    nats[:, positions] += code_losses((logits,), (sequences[:, positions],))[0] / len(orders)
                    masked[:, positions] = False
        return nats

    def bound_orders(self) -> list[list[Round]]:
        """Return the orders, all rounds of each, over which `nats` is a mean: Halton's, and Halton's from its middle on.

        They are fixed, so that likelihoods depend on neither seed nor batch; two, so that no position is always early.
        """
        return [self._order(number / _BOUND_ORDERS) for number in range(_BOUND_ORDERS)]

    def _order(self, start: float) -> list[Round]:
        """Return the rounds of Halton's order in each level, rotated to begin after this share of it."""
        rounds = []
        for level, grid in enumerate(self.layout.grids):
            order = halton_order(*grid)
            first = int(start * len(order))
            positions = [self.layout.first_position(level) + position for position in [*order[first:], *order[:first]]]
            rounds += [Round(level, positions[start:stop]) for start, stop in pairwise(round_stops(len(order), _BOUND_ROUNDS))]
        return rounds


@cache
def halton_order(height: int, width: int) -> list[int]:
    """Order a grid's positions, numbered in raster order, by their first visit by the Halton sequence of bases 2 (rows) and 3 (columns).

    Consecutive positions lie far apart (Besnier et al. 2025, "Halton Scheduler for Masked Generative Image Transformer", section 3).
    """
    visited: dict[int, None] = {}
    number = 0
    while len(visited) < height * width:
        number += 1
        visited.setdefault(halton_cell(number, 2, height) * width + halton_cell(number, 3, width))
    return list(visited)


def halton_cell(number: int, base: int, cells: int) -> int:
    """Return in which of equally many parts of [0, 1) a number's radical inverse lies: its digits in a base, mirrored at the point."""
    mirrored, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        mirrored, scale = mirrored * base + digit, scale * base
    return mirrored * cells // scale
