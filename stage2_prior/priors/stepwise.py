"""Priors that draw codes in turn: p(level 1) p(level 2 | level 1) ..., each level in raster order.

Training asks for the logits of all positions at once (`logits`); sampling and coding ask for one position after another (`step`), and
a cache holds what the earlier positions left; known codes enter it at once (`prefill`). All give the same logits, and so do
`FixedSteps`, the same steps with static shapes for CUDA graphs. Loss, sampler and likelihood follow from these, here, for all kinds.
A prior may draw a code digit by digit: `draw_layout` then has a position for each digit, and sequences, steps and noise are of digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from configs.errors import UserError
from configs.schema import PriorPart, Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import StepwiseSampling, check_finite, draw_position, guidance_scales, is_guided
from stage2_prior.priors.contract import Keep, Prior
from training.devices import float64_device
from training.precision import full_precision, ieee_float32

Logits = tuple[Tensor, ...]
"""(B, h w, K) per level, or per level and digit: positions in raster order, over that level's own codes, or that digit's values."""


@dataclass(frozen=True, kw_only=True)
class StepwisePart(PriorPart):
    """Fields of a prior that draws codes in turn."""

    SAMPLING = StepwiseSampling


@dataclass(frozen=True)
class FixedBatch:
    """Preallocated input tensors of a sampling batch, overwritten in place so that a CUDA graph can read them."""

    sequences: Tensor
    """(B, T) int64 codes or digits, of the prior's `draw_layout`; only those before the current position are read."""
    condition: Tensor
    """Condition rows (R, ...). R = B, or 2 B under guidance, where rows r and B + r share their codes."""
    position: Tensor
    """(1,) int64: current position, counted over all levels."""
    first: int = 0
    """Offset of these sequences in the full sequence (the prior of a single level has only that level)."""

    def local_position(self) -> Tensor:
        """(1,) position within `sequences`."""
        return self.position - self.first if self.first else self.position

    def shared(self, codes: Tensor) -> Tensor:
        """Repeat codes (B, ...) for all rows, (R, ...)."""
        copies = len(self.condition) // len(codes)
        return codes if copies == 1 else torch.cat([codes] * copies)


class FixedSteps(ABC):
    """One-position steps on a `FixedBatch` with static shapes. State lives in tensors allocated once, as CUDA graphs require."""

    def __init__(self, batch: FixedBatch) -> None:
        self.batch = batch

    @abstractmethod
    def prepare(self, position: int, above: Codes = ()) -> None:
        """Eager work before a position's step: at a level's first position, reset the caches and embed the levels above.

        `above`: codes (R, h, w) per level above that the prior is conditioned on.
        """

    def prefill(self, stop: int, above: Codes = ()) -> int:
        """Feed the batch's first codes, which are known, up to position `stop`, as far as that can be done at once.

        `above`: as in `prepare`. Returns: the position to go on from, at most `stop`.
        """
        return 0

    @abstractmethod
    def phase(self, position: int) -> Hashable:
        """Key of the graph for this position; positions with equal keys run the same kernels on the same tensors."""

    @abstractmethod
    def logits(self, phase: Hashable) -> Tensor:
        """Logits (R, K) at the current position, which has this phase. Capturable: no host synchronisation."""


class StepwisePrior(Prior):
    """A prior that draws codes in turn: an autoregressive model with exact likelihood."""

    exact = True

    @property
    def draw_layout(self) -> SequenceLayout:
        """Layout of the sequence in which codes, or their digits, are drawn."""
        return self.layout

    @abstractmethod
    def logits(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Logits:
        """Logits of every position of its own levels given the codes (and digits) before it; arguments as in `forward`."""

    def code_logits(self, codes: Codes, condition: Tensor | None, level: int, index: int) -> Tensor:
        """Logits (B, K) over the codes at one position of a level of its own, given the codes before it."""
        return self.logits(codes, condition)[level][:, index]

    @abstractmethod
    def new_cache(self, batch: int, above: Codes = ()) -> Any:
        """Return an empty cache for `batch` sequences, given the codes (B, h, w) of the levels above, if there are any."""

    @abstractmethod
    def step(self, code: Tensor | None, condition: Tensor | None, cache: Any) -> Tensor:
        """Logits (B, K) of the next position of `draw_layout` over its values; advances the cache by one position.

        `code`: (B,) at the position before, or its digit; None at the first.
        """

    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None, cache: Any) -> None:
        """Feed positions of known codes into the cache, which is then as after a step through each; by default, just that.

        Args:
            sequences: (B, T) int64, of `draw_layout`; those before `stop` are read.
            start: the cache's position, the first of a code.
            stop: a later position, the first of a code, from which `step` goes on.
            condition, cache: as in `step`.
        """
        for position in range(start, stop):
            self.step(sequences[:, position - 1] if position else None, condition, cache)

    def fixed_steps(self, batch: FixedBatch) -> FixedSteps | None:
        """Static-shape steps for CUDA graphs; None if this kind has only `step`."""
        return None

    @override
    def forward(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        return self._code_nats(codes, condition, variants).mean()

    @override
    def nats(self, codes: Codes, condition: Tensor | None) -> Tensor:
        with ieee_float32(codes[0].device):
            return self._code_nats(codes, condition)

    def _code_nats(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Tensor:
        """Negative log-likelihood (B, T) of each code, in nats: the sum over its digits."""
        losses = iter(code_losses(self.logits(codes, condition, variants), self.draw_layout.split(codes[self.levels])))
        return torch.cat([reduce(torch.add, islice(losses, len(sizes))) for sizes in self.draw_layout.draw_sizes], 1)

    @override
    @torch.no_grad()
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """See the contract; a kept code conditions the codes drawn after it. Eager: `Sampler` in sampler.py replays CUDA graphs."""
        assert not self.training
        assert isinstance(settings, StepwiseSampling)
        layout, batch, guided = self.draw_layout, len(noise), is_guided(condition, settings)
        noise = noise.to(float64_device(self.device))
        # Conditional and unconditional sequences run in one batch and share every code.
        copies = 2 if guided else 1
        condition = self.sampling_condition(condition, batch, guided)
        scales = guidance_scales(settings, layout.length)
        kept = None if keep is None else layout.flat(keep.codes)
        sequences = torch.empty(batch, layout.length, dtype=torch.int64, device=self.device) if kept is None else kept.to(self.device)
        finite = torch.ones((), dtype=torch.bool, device=noise.device)
        cache, reached = self.new_cache(batch * copies), 0
        # Kept codes enter the cache at once if a drawn one follows, and not at all behind the last of those.
        for position in drawn_positions(layout, keep):
            if reached < position:
                self.prefill(sequences.repeat(copies, 1), reached, position, condition, cache)
            before = sequences[:, position - 1].repeat(copies) if position else None
            logits = full_precision(self.step(before, condition, cache))
            scale = scales[position] if guided else None
            sequences[:, position], rows_finite = draw_position(logits, noise[:, position], settings, scale)
            # Read on the host once, at the end, so that a GPU is never waited for.
            finite &= rows_finite.all()
            reached = position + 1
        check_finite(bool(finite), settings)
        return layout.grids_of(sequences)


def drawn_positions(layout: SequenceLayout, keep: Keep | None) -> list[int]:
    """Positions to draw, ascending: all that are not kept."""
    return list(range(layout.length)) if keep is None else (~layout.flat_mask(keep.masks)).nonzero()[:, 0].tolist()


def code_losses(logits: Logits, codes: Codes) -> list[Tensor]:
    """Cross-entropy in nats of codes (B, h, w) per level under their logits: (B, h w) per level, float32 or wider."""
    losses = []
    for level_logits, grid in zip(logits, codes, strict=True):
        nats = F.cross_entropy(full_precision(level_logits).flatten(0, 1), grid.flatten(), reduction="none")
        losses.append(nats.view(level_logits.shape[:2]))
    return losses


def stepwise(prior: Prior, command: str, kind: str) -> StepwisePrior:
    """Return the prior as a stepwise one. Errors: UserError, naming the command, for a prior of another kind."""
    if not isinstance(prior, StepwisePrior):
        raise UserError(f"{command}: expected a prior that draws codes in turn, found {kind}")
    return prior
