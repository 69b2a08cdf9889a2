"""A decoder-only transformer over the sequence of codes.

Normalisation before each part (Xiong et al. 2020), SwiGLU (Shazeer 2020), and attention as in attention.py. Position 0
holds a start vector of its own, position t the code of position t-1; what each position has besides is the level, row and column
that it predicts, and the label. No embedding row is shared between start, label and codes of any level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from stage1_vqvae.attention import Norm, RotaryTable
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.priors.attention import CachedAttention, KeyValueCache, add_product_, product, select
from stage2_prior.priors.contract import SizedByPreset, Sizes, VariantEmbedding
from stage2_prior.priors.stepwise import FixedBatch, FixedSteps, Logits, StepwisePart, StepwisePrior
from stage2_prior.priors.upper_levels import UpperLevels
from training.batching import batches
from training.kernels import Kernel

# Standard deviation of initial embeddings and matrices (GPT-2).
_INITIAL_STD = 0.02
# Share of that variance that comes from the codes' vectors, where they are known.
_SHARE_OF_VECTORS = 0.7
# Positions per prefill pass, over all rows: in float64 some 100 MB of activations at 1,024 channels.
_PREFILL_POSITIONS = 2**12


def _load_embed() -> Callable[..., Any]:
    from stage2_prior.priors.step_kernels import embed

    return embed


def _load_gate() -> Callable[..., Any]:
    from stage2_prior.priors.step_kernels import gate

    return gate


_EMBED = Kernel("embedding while sampling", _load_embed)
_GATE = Kernel("the MLP while sampling", _load_gate)


@dataclass(frozen=True, kw_only=True)
class TransformerPart(SizedByPreset, StepwisePart):
    """A decoder-only transformer over the sequence of codes. Dropout is of embedded codes, attention and MLP."""

    MAY_BE_GIVEN_LEVELS = True
    PRESETS: ClassVar[dict[str, Sizes]] = {
        # S: ViT-S, DiT-S. B and L: LlamaGen's (Sun et al. 2024, table 1), 111 M and 343 M parameters with 16,384 codes.
        "S": Sizes(12, 384, 6),
        "B": Sizes(12, 768, 12),
        "L": Sizes(24, 1024, 16),
    }
    preset: Literal["S", "B", "L"] = "S"
    """Sizes from the literature, for what is 0 below (and, on a command line, in place of the recipe's own sizes): 12 layers x
    384 (6 heads), 12 x 768 (12), 24 x 1024 (16)."""
    layers: int = 0
    """Transformer blocks; 0 = the preset's."""
    width: int = 0
    """Channels of a position; 0 = the preset's."""
    heads: int = 0
    """Attention heads; 0 = the preset's. Width / heads must be a multiple of 4, for the rotary positions of two axes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes()

    @override
    def resolved(self) -> TransformerPart:
        return replace(self, **self.sizes()._asdict())

    @override
    def build(
        self, layout: SequenceLayout, condition: Condition, num_variants: int = 1, given: SequenceLayout | None = None
    ) -> Transformer:
        return Transformer(layout, condition, num_variants, self.sizes(), self.dropout, given)


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
    ) -> None:
        """`layout`, `condition`, `num_variants` and `given` as in the contract; with `given`, a single level is modelled."""
        super().__init__(layout, condition, num_variants, given)
        layers, width, heads = sizes
        self.token = nn.Embedding(layout.vocabulary, width)
        self.label = condition.embedding(width)
        self.variant = VariantEmbedding(num_variants, width) if num_variants > 1 else None
        self.start = nn.Parameter(torch.empty(width))
        heights, widths = zip(*layout.grids, strict=True)
        self.level, self.row, self.column = (nn.Embedding(n, width) for n in (len(layout.grids), max(heights), max(widths)))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))  # type: ignore[assignment]
        self.norm = Norm(width)
        self.head = nn.Linear(width, layout.vocabulary, bias=False)
        self.above = None if given is None else UpperLevels(given.num_codes, width, heads, layout.grids[0])
        # Position t holds the code of position t-1 but is turned as position t, the one it predicts.
        self.rotary = RotaryTable(layout.centres(), width // heads)
        self.register_buffer("coordinates", torch.cat([layout.coordinates()[:, :1], layout.centres().round().long()], 1), persistent=False)
        initialise_(self, self.blocks, self.start)

    coordinates: Tensor
    blocks: Sequence[Block]

    @property
    def rotations(self) -> Tensor:
        """(T, d / 2, 2): rotary positions; see attention.py."""
        return self.rotary.table

    @override
    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        initialise_codes_((self.token.weight, self.head.weight), self.layout.num_codes, vectors)

    @override
    def fsdp_modules(self) -> list[nn.Module]:
        return list(self.blocks)

    def position_embeddings(self) -> Tensor:
        """(T, C) embedding of each position's level, row and column."""
        level, row, column = self.coordinates.unbind(1)
        return self.level(level) + self.row(row) + self.column(column)

    def _upper_level_features(self, above: Codes) -> Tensor | None:
        """(B, T, C) features of the levels above at each position, from their codes; None without levels above."""
        return None if self.above is None else self.above(above, self.rotations).flatten(1, 2)

    @override
    def logits(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Logits:
        tokens = self.layout.to_tokens(codes[self.levels])
        batch = tokens.shape[0]  # len would fix the batch of an exported graph
        start = self.start.expand(batch, 1, -1)
        x = torch.cat([start, self.token(tokens[:, :-1])], 1) + self.position_embeddings()  # (B, T, C)
        embedded = self.label(self.condition_or_null(condition, batch))
        if variants is not None and self.variant is not None:
            embedded = embedded + self.variant(variants)
        above = self._upper_level_features(codes[: self.levels.start])
        x = self.dropout(x + embedded[:, None] if above is None else x + embedded[:, None] + above)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, self.rotations, use_reentrant=False)
            else:
                x = block(x, self.rotations)
        return tuple(self.head_logits(part, level) for level, part in enumerate(x.split(self.layout.lengths, 1)))

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
        batch = len(cache.layers[0].keys)
        token = self.start.expand(batch, -1) if code is None else self.token(code + self.layout.offset_before(position))
        x = self.embed_step(token, self.condition_or_null(condition, batch), cache, position)
        return self.head_logits(self.features(x, cache, position), self.layout.level_of(position))

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
        offsets = [self.layout.offset_before(position) for position in range(max(1, start), stop)]
        tokens = sequences[:, max(0, start - 1) : stop - 1] + torch.tensor(offsets, dtype=torch.int64, device=sequences.device)
        for rows in batches(len(sequences), max(1, _PREFILL_POSITIONS // (stop - start))):
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
        offsets = [layout.offsets[layout.level_of(position)] for position in range(layout.length)]
        self._offsets = torch.tensor(offsets, device=prior.device)

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
            embedded = _EMBED(batch.sequences, self._offsets, *embeddings, position)
            if embedded is not None:
                return embedded
        before = (position - 1).clamp_(min=0)
        tokens = batch.sequences.index_select(1, before)[:, 0] + self._offsets.index_select(0, before)
        token = torch.where(position == 0, prior.start, prior.token(batch.shared(tokens)))
        return prior.embed_step(token, batch.condition, cache, position)


def initialise_(network: nn.Module, blocks: Sequence[Block], vector: Tensor) -> None:
    """Initialise all linear maps and embeddings of a transformer, and one vector of its own, from N(0, 0.02^2)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, VariantEmbedding):
            nn.init.normal_(module.weight, std=_INITIAL_STD)
    nn.init.normal_(vector, std=_INITIAL_STD)
    # Each block begins as nearly the identity (GPT-2's rule: the residual sum keeps its scale at any depth).
    for block in blocks:
        for projection in (block.attention.out, block.mlp.out):
            nn.init.normal_(projection.weight, std=_INITIAL_STD / (2 * len(blocks)) ** 0.5)


@torch.no_grad()
def initialise_codes_(weights: Sequence[Tensor], num_codes: Sequence[int], vectors: Sequence[Tensor]) -> None:
    """Give codes of near vectors near rows in each weight (codes of all levels, C), so that they share what is learned.

    Rows become a random projection of the vectors, (K, D) per level, plus their own initial values, at the initial scale.
    """
    for weight in weights:
        for rows, level_vectors in zip(weight.split(num_codes), vectors, strict=True):
            mapped = level_vectors @ torch.randn(level_vectors.shape[1], rows.shape[1])
            mapped *= _INITIAL_STD / mapped.std().clamp(min=1e-12)
            rows.mul_((1 - _SHARE_OF_VECTORS) ** 0.5).add_(mapped, alpha=_SHARE_OF_VECTORS**0.5)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = Norm(width)
        self.attention = CachedAttention(width, heads)
        self.mlp_norm = Norm(width)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: KeyValueCache | None = None,
        rows: slice = slice(None),
        start: int = 0,
        causal: bool = True,
    ) -> Tensor:
        """(B, T, C) to the same shape. With a cache: T positions from `start` on, appended to its `rows`, always causal."""
        normed = self.attention_norm(x)
        if cache is None:
            attended = self.attention(normed, rotation, causal)
        else:
            attended = self.attention.prefill(normed, rotation, cache, rows, start)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def step_(self, x: Tensor, rotations: Tensor, cache: KeyValueCache, position: int | Tensor) -> Tensor:
        """Apply the block to one position, (B, C), in place; appends its key and value to the cache. No gradient.

        `rotations`, `position`: as in `CachedAttention.step_`.
        """
        self.attention.step_(x, self.attention_norm(x), rotations, cache, position)
        return add_product_(x, self.mlp.hidden(self.mlp_norm(x)), self.mlp.out)


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)), its width 8/3 of x's, so that it has the parameters of a 4x MLP; a multiple of 128."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 128) * 128
        # Two maps, not one of twice the width: its halves' gradients would have to be joined again.
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP on (B, T, C); the shape stays."""
        return self.out(F.silu(self.gate(x)) * self.up(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Gated hidden activations (B, H) of few rows (B, C), without gradient; one Triton kernel with 16-bit weights."""
        if _GATE.usable(x.device) and x.element_size() == 2:
            hidden = _GATE(x, self.gate.weight, self.up.weight)
            if hidden is not None:
                return hidden
        return F.silu(product(self.gate, x)).mul_(product(self.up, x))
