"""A transformer that draws one level of codes after another, all codes of a level at once (Tian et al. 2024, "Visual Autoregressive
Modeling").

The codes of a level are independent given all coarser levels, so the likelihood is exact, and an image takes as many passes as it has
levels. A position's input has no code of its own level but the sum of all coarser ones, embedded and interpolated to the level's grid: the
paper's f-hat, in an embedding of the prior's own. Attention is block-causal: a position sees all those of its own and of coarser levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from stage2_prior.draw import LOGITS_PER_DRAW, StepwiseSampling, check_finite, draw_position, guidance_scales
from stage2_prior.priors.attention import KeyValueCache
from stage2_prior.priors.blocks import Block, TransformerFields, initialise_, initialise_codes_
from stage2_prior.priors.contract import Keep, Sizes, VariantEmbedding
from stage2_prior.priors.stepwise import Logits, StepwisePart, StepwisePrior
from stage2_prior.priors.transformer import PREFILL_POSITIONS
from training.batching import batches
from training.devices import float64_device
from training.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class NextScalePart(TransformerFields, StepwisePart):
    """A transformer that draws a whole level of codes at once, given all coarser levels (Tian et al. 2024, VAR). Dropout is of embedded
    codes, attention and MLP.
    """

    @override
    def build(self, layout: SequenceLayout, condition: Condition, num_variants: int = 1) -> NextScale:
        several = "one for a single level of codes; next_scale needs several (tokenizer.quantizer multiscale, a depth or groups above 1, or"
        require(len(layout.grids) > 1, "prior.kind", f"{several} tokenizer.network hierarchical)", self.kind)
        return NextScale(layout, condition, num_variants, self.sizes(), self.dropout, self.head_gain, self.corruption)


@dataclass
class NextScaleCache:
    """Sampling state: keys and values of the levels that were passed, and the last of these levels' features."""

    layers: list[KeyValueCache]
    codes: Tensor
    """(B, T) int64, those before `position`."""
    features: Tensor | None = None
    """(B, n, C) of the last layer at all positions of the current level."""
    position: int = 0
    """Next position."""


class NextScale(StepwisePrior):
    """p(level 1 | condition) p(level 2 | level 1, condition) ..., each a product over its positions."""

    def __init__(
        self,
        layout: SequenceLayout,
        condition: Condition,
        num_variants: int,
        sizes: Sizes,
        dropout: float,
        head_gain: bool = False,
        corruption: float = 0.0,
    ) -> None:
        """`layout`, `condition` and `num_variants` as in the contract; `head_gain` and `corruption` as in `NextScalePart`."""
        super().__init__(layout, condition, num_variants, None, corruption)
        layers, width, heads = sizes
        # Codes of the finest level are never an input.
        self.tokens = nn.ModuleList(nn.Embedding(number, width) for number in layout.num_codes[:-1])  # type: ignore[assignment]
        self.start = nn.Parameter(torch.empty(width))
        self.label = condition.embedding(width)
        self.variant = VariantEmbedding(num_variants, width) if num_variants > 1 else None
        heights, widths = zip(*layout.grids, strict=True)
        self.level, self.row, self.column = (nn.Embedding(n, width) for n in (len(layout.grids), max(heights), max(widths)))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, head_gain) for _ in range(layers))  # type: ignore[assignment]
        self.norm = Norm(width)
        self.head = nn.Linear(width, layout.vocabulary, bias=False)
        self.rotary = RotaryTable(layout.centres(), width // heads)
        level = layout.coordinates()[:, :1]
        self.register_buffer("coordinates", torch.cat([level, layout.centres().round().long()], 1), persistent=False)
        self.register_buffer("mask", level >= level.T, persistent=False)
        initialise_(self, self.blocks, self.start)

    tokens: Sequence[nn.Embedding]
    blocks: Sequence[Block]
    coordinates: Tensor
    """(T, 3) int64: level, and row and column on the finest grid, of each position."""
    mask: Tensor
    """(T, T) bool, true where a position (row) sees another: those of its own and of coarser levels."""

    @override
    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        initialise_codes_([self.head.weight], self.layout.num_codes, vectors)
        for level, token in enumerate(self.tokens):
            initialise_codes_([token.weight], [token.num_embeddings], [vectors[level]])

    @override
    def fsdp_modules(self) -> list[nn.Module]:
        return list(self.blocks)

    def _inputs(self, above: Codes, batch: int) -> Tensor:
        """Inputs (B, n, C) of a level, without condition, from the codes (B, h, w) of all levels above it."""
        first, grid = self.layout.first_position(len(above)), self.layout.grids[len(above)]
        level, row, column = self.coordinates[first : first + grid[0] * grid[1]].unbind(1)
        positions = self.level(level) + self.row(row) + self.column(column)
        if not above:
            return self.start + positions.expand(batch, -1, -1)
        embedded = (token(codes).movedim(-1, 1) for token, codes in zip(self.tokens, above, strict=False))
        resized = torch.stack([F.interpolate(level, grid, mode="bilinear") for level in embedded]).sum(0)
        return resized.movedim(1, -1).flatten(1, 2) + positions

    @override
    def logits(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Logits:
        batch = codes[0].shape[0]
        x = torch.cat([self._inputs(codes[:level], batch) for level in range(len(codes))], 1)
        embedded = self.label(self.condition_or_null(condition, batch))
        if variants is not None and self.variant is not None:
            embedded = embedded + self.variant(variants)
        x = self.dropout(x + embedded[:, None])
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, self.rotary.table, causal=self.mask, use_reentrant=False)
            else:
                x = block(x, self.rotary.table, causal=self.mask)
        return tuple(self.head_logits(part, level) for level, part in enumerate(x.split(self.layout.lengths, 1)))

    def head_logits(self, x: Tensor, level: int) -> Tensor:
        """(..., C) at positions of one level to logits (..., K) over its codes."""
        offset = self.layout.offsets[level]
        return F.linear(self.norm(x), self.head.weight[offset : offset + self.layout.num_codes[level]])

    # --- one level after another

    @override
    def new_cache(self, batch: int, above: Codes = ()) -> NextScaleCache:
        layers = [block.attention.new_cache(batch, self.layout.length) for block in self.blocks]
        return NextScaleCache(layers, torch.zeros(batch, self.layout.length, dtype=torch.int64, device=self.device))

    @override
    def step(self, code: Tensor | None, condition: Tensor | None, cache: NextScaleCache) -> Tensor:
        """See the contract: the first position of a level passes all its positions, the others take their part of that."""
        if code is not None:
            cache.codes[:, cache.position - 1] = code
        level, index = self.layout.level_and_index(cache.position)
        if index == 0:
            cache.features = self._pass_level(level, condition, cache)
        assert cache.features is not None
        cache.position += 1
        return self.head_logits(cache.features[:, index], level)

    def _pass_level(self, level: int, condition: Tensor | None, cache: NextScaleCache) -> Tensor:
        """Features (B, n, C) of a level given the cache's codes of the levels above, whose keys and values it holds."""
        condition = self.condition_or_null(condition, len(cache.codes))
        start, length = self.layout.first_position(level), self.layout.lengths[level]
        features = []
        for rows in batches(len(cache.codes), max(1, PREFILL_POSITIONS // length)):
            above = self.layout.grids_of(cache.codes[rows])[:level]
            x = self._inputs(above, len(cache.codes[rows])) + self.label(condition[rows])[:, None]
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, self.rotary.table[start : start + length], layer, rows, start, causal=False)
            features.append(x)
        return torch.cat(features)

    @override
    def draws_in_raster_order(self, settings: Sampling, keep: Keep | None) -> bool:
        return False

    @override
    @torch.no_grad()
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """See the contract: the codes of steps through all positions, but with one pass and one draw per level. A code is drawn given all
        codes of the coarser levels, kept or drawn.
        """
        assert not self.training
        assert isinstance(settings, StepwiseSampling)
        layout, batch, two_rows = self.layout, len(noise), self.needs_two_rows(condition, settings)
        noise = noise.to(float64_device(self.device))
        condition = self.sampling_condition(condition, batch, two_rows, settings.guidance)
        scales = torch.tensor(guidance_scales(settings, layout.length), dtype=torch.float64, device=noise.device)
        cache = self.new_cache(2 * batch if two_rows else batch)
        halves, to_draw = cache.codes.split(batch), torch.ones(layout.length, dtype=torch.bool)
        if keep is not None:
            for half in halves:
                half.copy_(layout.flat(keep.codes))
            to_draw = ~layout.flat_mask(keep.masks).cpu()
        finite = torch.ones((), dtype=torch.bool, device=noise.device)
        for level, length in enumerate(layout.lengths):
            first = layout.first_position(level)
            if not to_draw[first:].any():
                break
            features = self._pass_level(level, condition, cache).split(batch)
            positions = first + to_draw[first : first + length].nonzero()[:, 0].to(noise.device)
            for rows in batches(batch, max(1, LOGITS_PER_DRAW // (length * layout.num_codes[level]))):
                x = torch.cat([half[rows, positions - first] for half in features])
                logits, uniform = full_precision(self.head_logits(x, level)).flatten(0, 1), noise[rows, positions]
                scale = scales[positions].to(logits).repeat(len(uniform))[:, None] if two_rows else None
                codes, rows_finite = draw_position(logits, uniform.flatten(), settings, scale)
                for half in halves:
                    half[rows, positions] = codes.view(uniform.shape).to(half.device)
                # Read on the host once, at the end, so that a GPU is never waited for.
                finite &= rows_finite.all()
        check_finite(bool(finite), settings)
        return layout.grids_of(cache.codes[:batch])
