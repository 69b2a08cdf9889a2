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

from configs.errors import UserError, require
from configs.parts import Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.guidance_free import GuidanceFree
from stage2_prior.draw import StepwiseSampling, check_finite, draw_position, guidance_scales
from stage2_prior.priors.contract import GuidedPart, Keep, Prior
from training.devices import float64_device
from training.precision import full_precision, ieee_float32

Logits = tuple[Tensor, ...]
"""(B, h w, K) per level, or per level and digit: positions in raster order, over that level's own codes, or that digit's values."""


@dataclass(frozen=True, kw_only=True)
class StepwisePart(GuidedPart):
    """Fields of a prior that draws codes in turn."""

    SAMPLING = StepwiseSampling
    corruption: float = 0.0
    """Corrupted context, against memorisation: in training, random codes replace a share of those that positions look back at, but none of
    the levels above that a prior of a single level is given. Each image's share is uniform between 0 and a limit, which falls from
    `corruption` to 0 over the first three quarters of the steps; 1: as in reAR (He et al. 2025); 0 = off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.corruption <= 1, "prior.corruption", "0 to 1", self.corruption)


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

    def __init__(
        self,
        layout: SequenceLayout,
        condition: Condition | GuidanceFree,
        num_variants: int = 1,
        given: SequenceLayout | None = None,
        corruption: float = 0.0,
    ) -> None:
        """`corruption`: as in `StepwisePart`; the rest as in the contract."""
        super().__init__(layout, condition, num_variants, given)
        self.corruption = corruption
        if corruption:
            self.num_draws += 1 + 2 * layout.length

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

    def draws_in_raster_order(self, settings: Sampling, keep: Keep | None) -> bool:
        """Whether `sample` goes through the positions in raster order, one by one, as `fixed_steps` do."""
        return True

    def fixed_steps(self, batch: FixedBatch) -> FixedSteps | None:
        """Static-shape steps for CUDA graphs; None if this kind has only `step`."""
        return None

    @override
    def forward(
        self,
        codes: Codes,
        condition: Tensor | None,
        variants: Tensor | None = None,
        draws: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> Tensor:
        if self.guidance_free is None:
            logits = self.training_logits(codes, condition, variants, draws, progress)
        else:  # both passes look back at the same codes
            assert draws is not None
            beta, rest = draws[:, 0], draws[:, 1:]
            logits = self.guidance_free_logits(lambda rows: self.training_logits(codes, rows, variants, rest, progress), condition, beta)
        return self._code_nats(logits, codes).mean()

    def training_logits(
        self, codes: Codes, condition: Tensor | None, variants: Tensor | None, draws: Tensor | None, progress: Tensor | None
    ) -> Logits:
        """Logits of every position in training, given the codes before it as `corrupted` leaves them; arguments as in `forward`.

        `draws`: (B, num_logits_draws).
        """
        return self.logits(self.corrupted(codes, draws, progress), condition, variants)

    @property
    def num_logits_draws(self) -> int:
        """Uniform random numbers per sample that `training_logits` takes."""
        return self.num_draws - int(self.guidance_free is not None)

    def corrupted(self, codes: Codes, draws: Tensor | None, progress: Tensor | None) -> Codes:
        """Replace a share of the codes of its own levels by uniformly random ones, by the first of the `draws`.

        The share is from U(0, corruption max(0, 1 - 4 t / 3)) at progress t (He et al. 2025, reAR, arXiv 2510.04450), for each image.
        """
        if not self.corruption:
            return codes
        assert draws is not None
        assert progress is not None
        sequences, length = self.layout.flat(codes[self.levels]), self.layout.length
        share, uniform, replacement = draws[:, : 1 + 2 * length].split([1, length, length], 1)
        sizes = torch.cat(
            [torch.full((n,), k, device=draws.device) for n, k in zip(self.layout.lengths, self.layout.num_codes, strict=True)]
        )
        random_codes = (replacement * sizes).long()
        replaced = uniform < share * self.corruption * (1 - 4 / 3 * progress).clamp(min=0)
        return codes[: self.levels.start] + self.layout.grids_of(torch.where(replaced, random_codes, sequences))

    @override
    def nats(self, codes: Codes, condition: Tensor | None) -> Tensor:
        with ieee_float32(codes[0].device):
            return self._code_nats(self.logits(codes, condition), codes)

    def _code_nats(self, logits: Logits, codes: Codes) -> Tensor:
        """Negative log-likelihood (B, T) of each code under these logits, in nats: the sum over its digits."""
        losses = iter(code_losses(logits, self.draw_layout.split(codes[self.levels])))
        return torch.cat([reduce(torch.add, islice(losses, len(sizes))) for sizes in self.draw_layout.draw_sizes], 1)

    @override
    @torch.no_grad()
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """See the contract; a kept code conditions the codes drawn after it. Eager: `Sampler` in sampler.py replays CUDA graphs."""
        assert not self.training
        assert isinstance(settings, StepwiseSampling)
        layout, batch, two_rows = self.draw_layout, len(noise), self.needs_two_rows(condition, settings)
        noise = noise.to(float64_device(self.device))
        # Conditional and unconditional sequences run in one batch and share every code.
        copies = 2 if two_rows else 1
        condition = self.sampling_condition(condition, batch, two_rows, settings.guidance)
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
            scale = scales[position] if two_rows else None
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
