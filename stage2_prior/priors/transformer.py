"""A decoder-only transformer over the sequence of codes.

Normalisation before each part (Xiong et al. 2020), SwiGLU (Shazeer 2020), and attention as in attention.py. Position 0
holds a start vector of its own, position t the code of position t-1; each position also embeds the level, row and column that it predicts,
and the condition. No embedding row is shared between start, condition and codes of any level.

With other orders than raster, slot t holds the code of the order's position t-1 and predicts that of its position t: it has an embedding
of either position, its query is rotated by the position that it predicts, its key by that of the code that it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from configs.errors import UserError, require
from configs.parts import Sampling
from stage1_vqvae.attention import Norm, RotaryTable
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.draw import StepwiseSampling, check_finite, draw_position, guidance_scales, round_stops
from stage2_prior.priors.attention import KeyValueCache, causal_mask, select
from stage2_prior.priors.blocks import Block, TransformerFields, initialise_, initialise_codes_
from stage2_prior.priors.contract import Keep, Sizes, VariantEmbedding
from stage2_prior.priors.stepwise import FixedBatch, FixedSteps, Logits, StepwisePart, StepwisePrior
from stage2_prior.priors.upper_levels import UpperLevels
from training.batching import batches
from training.devices import float64_device
from training.kernels import Kernel
from training.precision import full_precision

# Progress at which the share of rows in random order begins to fall from 1, and at which it is 0 (RAR, Yu et al. 2024: epochs 200 and 300
# of 400).
_ANNEALING = (0.5, 0.75)
PREFILL_POSITIONS = 2**12
"""Positions per prefill pass, over all rows: in float64 some 100 MB of activations at 1,024 channels."""


def _load_embed() -> Callable[..., Any]:
    from stage2_prior.priors.step_kernels import embed

    return embed


_EMBED = Kernel("embedding while sampling", _load_embed)


@dataclass(frozen=True, kw_only=True)
class TransformerSampling(StepwiseSampling):
    """How a transformer draws codes: one by one, or many at once."""

    rounds: int = 0
    """Rounds in which the codes of a level are drawn, few at first, then more and more at once, in a random order; needs a prior of
    `prior.order any`. 0 = one code after another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 0, "rounds", "at least 0", self.rounds)


@dataclass(frozen=True, kw_only=True)
class TransformerPart(TransformerFields, StepwisePart):
    """A decoder-only transformer over the sequence of codes. Dropout is of embedded codes, attention and MLP."""

    SAMPLING = TransformerSampling
    MAY_BE_GIVEN_LEVELS = True
    order: Literal["raster", "annealed", "any"] = "raster"
    """Order of a level's codes in training. `annealed`: random, and from the middle of the steps on more and more often raster, until only
    that is left after three quarters (RAR, Yu et al. 2024). `any`: random to the end, so that a completion sees all kept codes, wherever
    they are, and `sampling.rounds` draws many codes at once. Likelihoods are in raster order with all three."""
    head: Literal["table", "digits"] = "table"
    """Output layer: a row per code; or `digits`, for codes that are digits (of the quantizers fsq and lfq), which a small network gives one
    after another, at a cost that grows with log K instead of K."""
    digit_classes: int = 64
    """With head digits: neighbouring digits are drawn as one, as long as that has at most so many values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        orders = ("raster", "annealed", "any")
        require(self.order in orders, "prior.order", f"one of {', '.join(orders)}", self.order)
        require(self.head in ("table", "digits"), "prior.head", "table or digits", self.head)
        require(self.digit_classes >= 2, "prior.digit_classes", "at least 2", self.digit_classes)
        require(self.head == "table" or self.order != "any", "prior.order", "raster or annealed with prior.head digits", self.order)

    @override
    def build(
        self, layout: SequenceLayout, condition: Condition, num_variants: int = 1, given: SequenceLayout | None = None
    ) -> Transformer:
        sizes, options = self.sizes(), (self.head_gain, self.order, self.corruption)
        if self.head == "table":
            return Transformer(layout, condition, num_variants, sizes, self.dropout, given, *options)
        from stage2_prior.priors.digit_transformer import DigitTransformer  # a subclass of Transformer

        digits = layout.grouped(self.digit_classes)
        several = f"table, or codes of more than one digit of up to {self.digit_classes} values (prior.digit_classes)"
        require(any(len(level) > 1 for level in digits.digits), "prior.head", several, f"digits, for codes of {layout.digits}")
        above = None if given is None else given.grouped(self.digit_classes)
        return DigitTransformer(digits, condition, num_variants, sizes, self.dropout, above, *options)


@dataclass
class TransformerCache:
    """Sampling state: keys and values, and the features that do not change between positions."""

    layers: list[KeyValueCache]
    embedded_positions: Tensor
    """(T, C) embedding of each position."""
    above: Tensor | None
    """(B, T, C) features of the levels above at each position; None without such levels."""
    position: int = 0
    """Next position."""


class Transformer(StepwisePrior):
    """p(codes | label), one position after another."""

    def __init__(
        self,
        layout: SequenceLayout,
        condition: Condition,
        num_variants: int,
        sizes: Sizes,
        dropout: float,
        given: SequenceLayout | None = None,
        head_gain: bool = False,
        order: str = "raster",
        corruption: float = 0.0,
    ) -> None:
        """`layout`, `condition`, `num_variants` and `given` as in the contract; with `given`, a single level is modelled. `head_gain`,
        `order` and `corruption`: as in `TransformerPart`.
        """
        super().__init__(layout, condition, num_variants, given, corruption)
        layers, width, heads = sizes
        self.order, self.completes_any_mask = order, order == "any"
        if order != "raster":
            self.num_draws += 1 + layout.length
        if order == "any":
            self.num_noise += layout.length  # for an order of each sample
        self.token = self.token_embedding(layout, width)
        self.label = condition.embedding(width)
        self.variant = VariantEmbedding(num_variants, width) if num_variants > 1 else None
        self.start = nn.Parameter(torch.empty(width))
        heights, widths = zip(*layout.grids, strict=True)
        coordinates = len(layout.grids), max(heights), max(widths)
        self.level, self.row, self.column = (nn.Embedding(n, width) for n in coordinates)
        self.source = None if order == "raster" else nn.ModuleList(nn.Embedding(n, width) for n in coordinates)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, head_gain) for _ in range(layers))  # type: ignore[assignment]
        self.norm = Norm(width)
        self.add_head(width)
        self.above = None
        if given is not None:
            above = [self.token_embedding(given.levels(slice(level, level + 1)), width) for level in range(len(given.grids))]
            self.above = UpperLevels(above, width, heads, layout.grids[0])
        # In raster order alone, position t holds the code of position t-1 but is turned as position t, the one it predicts.
        self.rotary = RotaryTable(layout.centres(), width // heads)
        if self.source is not None:
            holds = F.pad(layout.centres()[:-1], (0, 0, 1, 0))  # nothing turns the start vector
            self.slot_rotary = RotaryTable(torch.stack([layout.centres(), holds], 1), width // heads)
        token_offsets = [torch.full((length,), offset) for length, offset in zip(layout.lengths, layout.offsets, strict=True)]
        self.register_buffer("token_offsets", torch.cat(token_offsets), persistent=False)
        self.register_buffer("coordinates", torch.cat([layout.coordinates()[:, :1], layout.centres().round().long()], 1), persistent=False)
        self._initialise()

    coordinates: Tensor
    token_offsets: Tensor
    """(T,) int64: token minus code at each position."""
    blocks: Sequence[Block]
    head: nn.Linear

    def token_embedding(self, layout: SequenceLayout, width: int) -> nn.Embedding:
        """Build the embedding of the tokens of a layout."""
        return nn.Embedding(layout.vocabulary, width)

    def add_head(self, width: int) -> None:
        """Add the output layer."""
        self.head = nn.Linear(width, self.layout.vocabulary, bias=False)

    @property
    def rotations(self) -> Tensor:
        """Rotary positions in raster order: (T, d / 2, 2), or (T, 2, d / 2, 2) for queries and keys apart; see attention.py."""
        return self.rotary.table if self.source is None else self.slot_rotary.table

    def _initialise(self) -> None:
        initialise_(self, self.blocks, self.start)

    @override
    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        initialise_codes_((self.token.weight, self.head.weight), self.layout.num_codes, vectors)

    @override
    def fsdp_modules(self) -> list[nn.Module]:
        return list(self.blocks)

    def position_embeddings(self) -> Tensor:
        """(T, C) embedding of each position in raster order: what it predicts and, if the prior knows other orders, whose code it holds."""
        targets, sources = self._target_embeddings(), self._source_embeddings()
        return targets if sources is None else targets + F.pad(sources[:-1], (0, 0, 1, 0))

    def _target_embeddings(self) -> Tensor:
        """(T, C) embedding of each position's level, row and column, for the slot that predicts its code."""
        level, row, column = self.coordinates.unbind(1)
        return self.level(level) + self.row(row) + self.column(column)

    def _source_embeddings(self) -> Tensor | None:
        """(T, C) embedding of each position for the slot that holds its code; None for a prior trained in raster order alone."""
        if self.source is None:
            return None
        level, row, column = (embedding(numbers) for embedding, numbers in zip(self.source, self.coordinates.unbind(1), strict=True))
        return level + row + column

    def _upper_level_features(self, above: Codes) -> Tensor | None:
        """(B, T, C) features of the levels above at each position, from their codes; None without levels above."""
        return None if self.above is None else self.above(above, self.rotary.table).flatten(1, 2)

    @override
    def training_logits(
        self, codes: Codes, condition: Tensor | None, variants: Tensor | None, draws: Tensor | None, progress: Tensor | None
    ) -> Logits:
        order = None if self.source is None else self._training_order(draws, progress)
        return self.logits_of(self.all_features(self.corrupted(codes, draws, progress), condition, variants, order), codes)

    def _training_order(self, draws: Tensor | None, progress: Tensor | None) -> Tensor:
        """Order (B, T) of each row in training, by the last of the `draws`: random, or raster in a share that grows with progress."""
        assert draws is not None
        assert progress is not None
        uniform, keys = draws[:, -1 - self.layout.length :].split([1, self.layout.length], 1)
        order, (start, stop) = self.layout.order_by(keys), _ANNEALING
        if self.order == "any":
            return order
        return torch.where(uniform < (stop - progress) / (stop - start), order, torch.arange(self.layout.length, device=order.device))

    @override
    def logits(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None, order: Tensor | None = None) -> Logits:
        """See the contract. `order`: int64 (B, T), positions in the order in which each row goes through them, level after level, by which
        "before" is meant; None: raster order.
        """
        return self.logits_of(self.all_features(codes, condition, variants, order), codes)

    def logits_of(self, features: Tensor, codes: Codes) -> Logits:
        """Logits from the features (B, T, C) of all positions; the codes matter where a code is several draws."""
        return tuple(self.head_logits(part, level) for level, part in enumerate(features.split(self.layout.lengths, 1)))

    def all_features(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Features (B, T, C) of the last layer at all positions, in raster order; arguments as in `logits`."""
        tokens = self.layout.to_tokens(codes[self.levels])
        batch = tokens.shape[0]  # len would fix the batch of an exported graph
        above = self._upper_level_features(codes[: self.levels.start])
        if order is None:
            start = self.start.expand(batch, 1, -1)
            x = torch.cat([start, self.token(tokens[:, :-1])], 1) + self.position_embeddings()  # (B, T, C)
            rotations = self.rotations
        else:
            x, rotations = self._slots(tokens.gather(1, order), order, 0, self.layout.length, self.layout.length)
            above = None if above is None else above.gather(1, order[..., None].expand_as(above))
        embedded = self.label(self.condition_or_null(condition, batch))
        if variants is not None and self.variant is not None:
            embedded = embedded + self.variant(variants)
        x = self.dropout(x + embedded[:, None] if above is None else x + embedded[:, None] + above)
        for block in self.blocks:
            x = checkpoint(block, x, rotations, use_reentrant=False) if self.checkpointing and self.training else block(x, rotations)
        return x if order is None else x.gather(1, order.argsort(1)[..., None].expand_as(x))

    def _slots(self, tokens: Tensor, order: Tensor, first: int, known: int, stop: int) -> tuple[Tensor, Tensor]:
        """Input (B, n, C), without condition, and rotations (B, n, 2, d / 2, 2) of the slots from `first` to `stop`.

        A slot holds the code before it in the order, or the last known one, and predicts that of its own position.

        Args:
            tokens: (B, T) in their order; those of the `known` first slots are read.
            order: (B, T), the position of each slot.
        """
        source_embeddings, table = self._source_embeddings(), self.rotary.table
        assert source_embeddings is not None
        held = torch.arange(first, stop, device=tokens.device).clamp(max=known) - 1
        is_start, held = (held < 0)[:, None], held.clamp(min=0)
        targets, sources = order[:, first:stop], order[:, held]
        x = torch.where(is_start, self.start, self.token(tokens[:, held]) + F.embedding(sources, source_embeddings))
        keys = torch.where(is_start[..., None], self.slot_rotary.table[0, 1], table[sources])
        return x + F.embedding(targets, self._target_embeddings()), torch.stack([table[targets], keys], 2)

    def head_logits(self, x: Tensor, level: int) -> Tensor:
        """(..., C) at positions of one level to logits (..., K) over its codes."""
        offset = self.layout.offsets[level]
        return F.linear(self.norm(x), self.head.weight[offset : offset + self.layout.num_codes[level]])

    @override
    def new_cache(self, batch: int, above: Codes = ()) -> TransformerCache:
        layers = [block.attention.new_cache(batch, self.layout.length) for block in self.blocks]
        return TransformerCache(layers, self.position_embeddings(), self._upper_level_features(above))

    @override
    def step(self, code: Tensor | None, condition: Tensor | None, cache: TransformerCache) -> Tensor:
        position = cache.position
        cache.position += 1
        return self.head_logits(self.step_features(code, condition, cache, position), self.layout.level_of(position))

    def step_features(self, code: Tensor | None, condition: Tensor | None, cache: TransformerCache, position: int) -> Tensor:
        """Features (B, C) of the last layer at a position, given the code (B,) before it."""
        batch = len(cache.layers[0].keys)
        token = self.start.expand(batch, -1) if code is None else self.token(code + self.layout.offset_before(position))
        return self.features(self.embed_step(token, self.condition_or_null(condition, batch), cache, position), cache, position)

    def embed_step(self, token: Tensor, condition: Tensor, cache: TransformerCache, position: int | Tensor) -> Tensor:
        """Sum (B, C) of the embeddings at a position: the previous token's (B, C), condition's (B,), position's and upper levels'."""
        x = token + self.label(condition) + select(cache.embedded_positions, position)
        return x if cache.above is None else x + select(cache.above, position, 1)

    def features(self, x: Tensor, cache: TransformerCache, position: int | Tensor) -> Tensor:
        """Features (B, C) of the last layer at a position from `embed_step`'s sum, which they overwrite; without gradient."""
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block.step_(x, self.rotations, layer, position)
        return x

    @override
    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None, cache: TransformerCache) -> None:
        condition = self.condition_or_null(condition, len(sequences))
        held = slice(max(0, start - 1), stop - 1)
        tokens = sequences[:, held] + self.token_offsets[held]
        for rows in batches(len(sequences), max(1, PREFILL_POSITIONS // (stop - start))):
            x = self.token(tokens[rows])
            if start == 0:
                x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
            x = x + self.label(condition[rows])[:, None] + cache.embedded_positions[start:stop]
            x = x if cache.above is None else x + cache.above[rows, start:stop]
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, self.rotations[start:stop], layer, rows, start)
        cache.position = stop

    @override
    def fixed_steps(self, batch: FixedBatch) -> TransformerSteps:
        return TransformerSteps(self, batch)

    @override
    def draws_in_raster_order(self, settings: Sampling, keep: Keep | None) -> bool:
        return _rounds(settings) == 0 and (keep is None or not self.completes_any_mask)

    @override
    @torch.no_grad()
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """See the contract. In rounds (`TransformerSampling`), each sample has a random order of its own, by the last of its noise. A prior
        of `order any` goes through the kept codes of a level first, so that all the level's drawn codes are given them.
        """
        if self.draws_in_raster_order(settings, keep):
            return super().sample(condition, noise, settings, keep)
        if self.order != "any":
            raise UserError(f"rounds: expected 0 for a prior trained with prior.order {self.order}, found {_rounds(settings)}")
        assert not self.training
        assert isinstance(settings, StepwiseSampling)
        layout, batch, two_rows = self.layout, len(noise), self.needs_two_rows(condition, settings)
        noise = noise.to(float64_device(self.device))
        condition = self.sampling_condition(condition, batch, two_rows, settings.guidance)
        order, groups = self._groups(noise, _rounds(settings), keep)
        uniform, order = noise.gather(1, order), order.to(self.device)
        kept = torch.zeros_like(order) if keep is None else layout.flat(keep.codes).to(self.device)
        sequences = kept.gather(1, order)
        copies = 2 if two_rows else 1
        rows_order = order.repeat(copies, 1)
        finite = torch.ones((), dtype=torch.bool, device=noise.device)
        cache, filled = self.new_cache(batch * copies), 0
        for (start, stop), scale in zip(groups, guidance_scales(settings, len(groups)), strict=True):
            logits = self._group_logits(sequences.repeat(copies, 1), rows_order, filled, start, stop, condition, cache)
            logits, group_uniform = full_precision(logits.flatten(0, 1)), uniform[:, start:stop].flatten()
            codes, rows_finite = draw_position(logits, group_uniform, settings, scale if two_rows else None)
            sequences[:, start:stop] = codes.view(batch, -1)
            finite &= rows_finite.all()
            filled = start + 1
        check_finite(bool(finite), settings)
        return layout.grids_of(torch.empty_like(sequences).scatter_(1, order, sequences))

    def _groups(self, noise: Tensor, rounds: int, keep: Keep | None) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return the order (B, T) in which a batch is drawn, and the slots, from and to, of each group that is drawn at once."""
        layout = self.layout
        raster = torch.arange(layout.length, device=noise.device) / layout.length
        keys = noise[:, layout.length :] if rounds else raster.expand(len(noise), -1)
        masks = [torch.zeros(grid, dtype=torch.bool) for grid in layout.grids] if keep is None else keep.masks
        groups: list[tuple[int, int]] = []
        for level, (mask, length) in enumerate(zip(masks, layout.lengths, strict=True)):
            kept = int(mask.sum())
            stops = [layout.first_position(level) + kept + n for n in round_stops(length - kept, rounds or length)]
            groups += itertools.pairwise(stops)
        kept_first = layout.flat(tuple(masks)).to(noise.device)
        return layout.order_by(keys.masked_fill(kept_first, -1)), groups

    def _group_logits(
        self, sequences: Tensor, order: Tensor, filled: int, start: int, stop: int, condition: Tensor, cache: TransformerCache
    ) -> Tensor:
        """Logits (B, n, K) of the slots from `start` to `stop`, of one level, each given the codes of all slots before `start`.

        Args:
            sequences: (B, T) int64 codes in their order.
            order: (B, T), the position of each slot.
            filled: slots in the cache, which then has one more than `start`.
            condition: (B, ...).
        """
        tokens, logits = sequences + self.token_offsets, []
        level = self.layout.level_of(start)
        mask = causal_mask(stop - filled, stop, tokens.device, stop - start)
        for rows in batches(len(tokens), max(1, PREFILL_POSITIONS // (stop - filled))):
            x, rotations = self._slots(tokens[rows], order[rows], filled, start, stop)
            x = x + self.label(condition[rows])[:, None]
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, rotations, layer, rows, filled, mask)
            logits.append(self.head_logits(x[:, start - filled :], level))
        return torch.cat(logits)


def _rounds(settings: Sampling) -> int:
    return settings.rounds if isinstance(settings, TransformerSampling) else 0


class TransformerSteps(FixedSteps):
    """Static-shape steps of a transformer; a phase is a level.

    Per layer: three kernels besides the matrix products (two norms, fused attention); residuals and gate are fused into the products.
    """

    def __init__(self, prior: Transformer, batch: FixedBatch) -> None:
        super().__init__(batch)
        self._prior, layout, rows = prior, prior.layout, len(batch.condition)
        layers = [block.attention.new_cache(rows, layout.length) for block in prior.blocks]
        positions = prior.position_embeddings()
        self._cache = TransformerCache(layers, positions, None if prior.above is None else positions.new_zeros(rows, *positions.shape))

    @override
    def prepare(self, position: int, above: Codes = ()) -> None:
        if position > 0:
            return
        for layer in self._cache.layers:
            layer.reset()
        features = self._prior._upper_level_features(above)
        if self._cache.above is not None and features is not None:
            self._cache.above.copy_(features)

    @override
    def prefill(self, stop: int, above: Codes = ()) -> int:
        if stop > 0:
            self.prepare(0, above)
            self._prior.prefill(self.batch.shared(self.batch.sequences), 0, stop, self.batch.condition, self._cache)
        return stop

    @override
    def phase(self, position: int) -> int:
        return self._prior.layout.level_of(position)

    @override
    def logits(self, phase: Any) -> Tensor:
        prior, position = self._prior, self.batch.local_position()
        return prior.head_logits(prior.features(self._embedded(position), self._cache, position), phase)

    def _embedded(self, position: Tensor) -> Tensor:
        """`embed_step` at the batch's position; one Triton kernel below float64."""
        prior, batch, cache = self._prior, self.batch, self._cache
        is_table = isinstance(prior.label, nn.Embedding)  # the kernel reads one row per sample
        if is_table and _EMBED.usable(position.device) and prior.start.dtype != torch.float64:
            embeddings = prior.token.weight, prior.start, prior.label.weight, batch.condition, cache.embedded_positions, cache.above
            embedded = _EMBED(batch.sequences, prior.token_offsets, *embeddings, position)
            if embedded is not None:
                return embedded
        before = (position - 1).clamp_(min=0)
        tokens = batch.sequences.index_select(1, before)[:, 0] + prior.token_offsets.index_select(0, before)
        token = torch.where(position == 0, prior.start, prior.token(batch.shared(tokens)))
        return prior.embed_step(token, batch.condition, cache, position)
