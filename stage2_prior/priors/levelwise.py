"""One prior per level, p(level 1 | label) p(level 2 | level 1, label) ..., of any stepwise kinds, trained together or one by one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from configs.errors import require
from configs.parts import PriorPart, as_dict
from configs.schema import prior_from
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import DigitLayout, SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.priors.stepwise import FixedBatch, FixedSteps, Logits, StepwisePart, StepwisePrior


@dataclass(frozen=True, kw_only=True)
class LevelwisePart(StepwisePart):
    """A prior of its own for each level of codes, given the levels above (Razavi et al. 2019, section 3.2)."""

    levels: list[dict[str, Any]] = field(default_factory=list)
    """Each level's prior, coarse to fine, in the form of `prior`: {kind: pixelcnn, layers: 20}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.corruption == 0, "prior.corruption", "0 beside prior.levels, each of which has its own", self.corruption)

    @override
    def resolved(self) -> LevelwisePart:
        parts = [prior_from(level).resolved() for level in self.levels]
        return replace(self, levels=[as_dict(part) for part in parts])

    @override
    def build(self, layout: SequenceLayout, condition: Condition, num_variants: int = 1) -> Levelwise:
        require(len(self.levels) == len(layout.grids), "prior.levels", f"{len(layout.grids)} priors, one per level", len(self.levels))
        parts = [build_level(prior_from(level), layout, number, condition, num_variants) for number, level in enumerate(self.levels)]
        return Levelwise(layout, condition, num_variants, parts)


def build_level(config: PriorPart, layout: SequenceLayout, level: int, condition: Condition, num_variants: int = 1) -> StepwisePrior:
    """Build a prior with fresh weights of one level, from 0 on, given those above.

    Errors: ValueError for a kind that cannot be given levels, or does not draw codes in turn.
    """
    own = layout.levels(slice(level, level + 1))
    require(isinstance(config, StepwisePart), "prior.kind", "one that draws codes in turn, for a prior per level", config.kind)
    alone = not getattr(config, "guidance_free", False)
    require(alone, "prior.guidance_free", "false for a level, or true for a levelwise prior of all levels, trained together", True)
    if level == 0:
        prior = config.build(own, condition, num_variants)
    else:
        require(config.MAY_BE_GIVEN_LEVELS, "prior.kind", "one that may be given the levels above", config.kind)
        prior = config.build(own, condition, num_variants, layout.levels(slice(level)))
    require(not prior.completes_any_mask, "prior.order", "raster or annealed for a prior of a single level", "any")
    return prior


@dataclass
class LevelwiseCache:
    """Sampling state: the codes so far and the cache of the current level."""

    codes: Tensor
    """(B, T) int64, of `draw_layout`."""
    level_cache: Any = None
    position: int = 0
    """Next position."""


class Levelwise(StepwisePrior):
    """Priors of single levels, combined into a prior of all levels."""

    def __init__(self, layout: SequenceLayout, condition: Condition, num_variants: int, parts: Sequence[StepwisePrior]) -> None:
        """`parts`: the prior of each level given those above, coarse to fine; the rest as in the contract."""
        super().__init__(layout, condition, num_variants)
        self.parts = nn.ModuleList(parts)  # type: ignore[assignment]
        self.num_draws += sum(part.num_logits_draws for part in parts)
        digits = [part.draw_layout.draw_sizes[0] for part in parts]
        self._draw_layout = DigitLayout(layout.grids, layout.num_codes, digits) if any(len(sizes) > 1 for sizes in digits) else layout
        self.num_noise = self._draw_layout.length

    parts: Sequence[StepwisePrior]

    @property
    @override
    def draw_layout(self) -> SequenceLayout:
        return self._draw_layout

    @override
    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        for part, level_vectors in zip(self.parts, vectors, strict=True):
            part.initialise_from([level_vectors])

    @override
    def fsdp_modules(self) -> list[nn.Module]:
        return [module for part in self.parts for module in part.fsdp_modules()]

    @override
    def training_warnings(self) -> list[str]:
        return [f"level {number}: {line}" for number, part in enumerate(self.parts, 1) for line in part.training_warnings()]

    @override
    def logits(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Logits:
        levels = (part.logits(codes[: level + 1], condition, variants) for level, part in enumerate(self.parts))
        return tuple(logits for level in levels for logits in level)

    @override
    def code_logits(self, codes: Codes, condition: Tensor | None, level: int, index: int) -> Tensor:
        return self.parts[level].code_logits(codes[: level + 1], condition, 0, index)

    @override
    def training_logits(
        self, codes: Codes, condition: Tensor | None, variants: Tensor | None, draws: Tensor | None, progress: Tensor | None
    ) -> Logits:
        logits: list[Tensor] = []
        first = 0
        for level, part in enumerate(self.parts):
            part_draws = None if draws is None else draws[:, first : first + part.num_logits_draws]
            logits += part.training_logits(codes[: level + 1], condition, variants, part_draws, progress)
            first += part.num_logits_draws
        return tuple(logits)

    @override
    def new_cache(self, batch: int, above: Codes = ()) -> LevelwiseCache:
        return LevelwiseCache(torch.zeros(batch, self.draw_layout.length, dtype=torch.int64, device=self.device))

    @override
    def step(self, code: Tensor | None, condition: Tensor | None, cache: LevelwiseCache) -> Tensor:
        if code is not None:
            cache.codes[:, cache.position - 1] = code
        level, index = self.draw_layout.level_and_index(cache.position)
        part = self.parts[level]
        if index == 0:
            cache.level_cache, code = part.new_cache(len(cache.codes), self.draw_layout.grids_of(cache.codes)[:level]), None
        cache.position += 1
        return part.step(code, condition, cache.level_cache)

    @override
    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None, cache: LevelwiseCache) -> None:
        cache.codes.copy_(sequences)
        cache.position = stop
        level, index = self.draw_layout.level_and_index(stop)
        if index == 0:  # its prior gets all levels above at its first step
            return
        first = self.draw_layout.first_position(level)
        if start <= first:
            cache.level_cache = self.parts[level].new_cache(len(sequences), self.draw_layout.grids_of(sequences)[:level])
        own = sequences[:, first : first + self.draw_layout.lengths[level]]
        self.parts[level].prefill(own, max(0, start - first), index, condition, cache.level_cache)

    @override
    def fixed_steps(self, batch: FixedBatch) -> LevelwiseSteps | None:
        parts = []
        for level, (part, length) in enumerate(zip(self.parts, self.draw_layout.lengths, strict=True)):
            first = self.draw_layout.first_position(level)
            sequences = batch.sequences[:, first : first + length]
            parts.append(part.fixed_steps(FixedBatch(sequences, batch.condition, batch.position, batch.first + first)))
        steps = [part for part in parts if part is not None]
        return LevelwiseSteps(self.draw_layout, batch, steps) if len(steps) == len(parts) else None


class LevelwiseSteps(FixedSteps):
    """Static-shape steps of all levels' priors, level after level; a phase is (level, phase of that level's prior)."""

    def __init__(self, layout: SequenceLayout, batch: FixedBatch, parts: Sequence[FixedSteps]) -> None:
        super().__init__(batch)
        self._layout, self._parts = layout, parts

    @override
    def prepare(self, position: int, above: Codes = ()) -> None:
        level, index = self._layout.level_and_index(position)
        codes = self._layout.grids_of(self.batch.shared(self.batch.sequences))[:level] if index == 0 else ()
        self._parts[level].prepare(index, codes)

    @override
    def prefill(self, stop: int, above: Codes = ()) -> int:
        level, index = self._layout.level_and_index(stop)
        codes = self._layout.grids_of(self.batch.shared(self.batch.sequences))[:level]
        return self._layout.first_position(level) + self._parts[level].prefill(index, codes)

    @override
    def phase(self, position: int) -> tuple[int, Hashable]:
        level, index = self._layout.level_and_index(position)
        return level, self._parts[level].phase(index)

    @override
    def logits(self, phase: Any) -> Tensor:
        level, level_phase = phase
        return self._parts[level].logits(level_phase)
