"""The Gated PixelCNN (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders") over codes.

A vertical stack sees the rows above, a horizontal stack the row to the left and, position by position, what the vertical one has
found there: together every code before, without the blind spot of a single masked stack. The paper's masks are written as
shifts: the codes enter one row further down in the one stack and one column further right in the other, and every
convolution after that may end at its own position (mask B); the first one is a row and a column shorter (mask A), which
leaves exactly the paper's field. Several levels: one network a level, which is given all codes of the levels above it, as
in VQ-VAE-2 (Razavi et al. 2019, section 3.2), every one of them at every position.

Sampling computes only what is new: the vertical stack once a row, the horizontal one once a position (Ramachandran et al.
2017, "Fast Generation for Convolutional Autoregressive Models").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from configs.errors import require
from stage1_vqvae.attention import RotaryTable
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.priors.attention import GridAttention, select
from stage2_prior.priors.contract import SizedByPreset, Sizes, VariantEmbedding
from stage2_prior.priors.stepwise import FixedBatch, FixedSteps, Logits, StepwisePart, StepwisePrior
from stage2_prior.priors.upper_levels import UpperLevels

_FIRST_KERNEL = 7


@dataclass(frozen=True, kw_only=True)
class PixelCNNPart(SizedByPreset, StepwisePart):
    """The Gated PixelCNN, masked convolutions over the grid of codes. Dropout is of what gated layers add."""

    MAY_BE_GIVEN_LEVELS = True
    PRESETS: ClassVar[dict[str, Sizes]] = {
        # S: 1.8 M parameters with 512 codes. L: the layers and channels of van den Oord et al. 2016 for ImageNet, section 3.2.
        "S": Sizes(15, 64, 4),
        "B": Sizes(20, 128, 4),
        "L": Sizes(20, 384, 6),
    }
    preset: Literal["S", "B", "L"] = "S"
    """Sizes for what is 0 below (and, on a command line, in place of the recipe's own sizes): 15 layers x 64 channels, 20 x 128,
    20 x 384, the last from the literature."""
    layers: int = 0
    """Gated layers; 0 = the preset's."""
    width: int = 0
    """Channels of a position; 0 = the preset's."""
    heads: int = 0
    """Attention heads, which divide the width; 0 = the preset's."""
    kernel_size: int = 3
    """Side of the convolutions before masking; odd. The first one's is 7."""
    attention_interval: int = 0
    """Self-attention after every so many layers (as in PixelSNAIL, Chen et al. 2018); 0 = none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, interval, kernel = self.sizes().layers, self.attention_interval, self.kernel_size
        require(0 <= interval <= layers, "prior.attention_interval", f"0 to the {layers} layers", interval)
        require(kernel % 2 == 1 and kernel > 1, "prior.kernel_size", "an odd number above 1", kernel)

    @override
    def resolved(self) -> PixelCNNPart:
        return replace(self, **self.sizes()._asdict())

    @override
    def build(self, layout: SequenceLayout, condition: Condition, num_variants: int = 1, given: SequenceLayout | None = None) -> PixelCNN:
        return PixelCNN(self.resolved(), layout, condition, num_variants, given)


class PixelCNN(StepwisePrior):
    """p(level 1 | label) p(level 2 | level 1, label) ..., a network a level."""

    def __init__(
        self,
        config: PixelCNNPart,
        layout: SequenceLayout,
        condition: Condition,
        num_variants: int = 1,
        given: SequenceLayout | None = None,
    ) -> None:
        """`config` has its sizes in it (`resolved`); the rest as in the contract."""
        super().__init__(layout, condition, num_variants, given, config.corruption)
        self.config = config
        num_codes = [*(given.num_codes if given is not None else []), *layout.num_codes]
        self.networks = nn.ModuleList(  # type: ignore[assignment]
            LevelNetwork(config, grid, num_codes[: self.levels.start + number + 1], condition, num_variants)
            for number, grid in enumerate(layout.grids)
        )

    networks: Sequence[LevelNetwork]

    @override
    def logits(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Logits:
        condition = self.condition_or_null(condition, codes[0].shape[0])
        return tuple(
            network(codes[level], network.context(codes[:level], condition, variants), self.checkpointing and self.training)
            for level, network in enumerate(self.networks, self.levels.start)
        )

    @override
    def fsdp_modules(self) -> list[nn.Module]:
        return [layer for network in self.networks for layer in network.layers]

    @override
    def training_warnings(self) -> list[str]:
        reach = _FIRST_KERNEL // 2 + (self.config.layers - 1) * (self.config.kernel_size // 2)
        furthest = max(max(grid) for grid in self.layout.grids) - 1
        if self.config.attention_interval or reach >= furthest:
            return []
        return [f"a position sees {reach} codes far, of {furthest}; more --prior.layers or a larger --prior.kernel_size see further"]

    @override
    def new_cache(self, batch: int, above: Codes = ()) -> PixelCNNCache:
        return PixelCNNCache(self, batch, above)

    @override
    def step(self, code: Tensor | None, condition: Tensor | None, cache: PixelCNNCache) -> Tensor:
        return cache.step(code, condition)

    @override
    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None, cache: PixelCNNCache) -> None:
        cache.prefill(sequences, start, stop, condition)

    @override
    def fixed_steps(self, batch: FixedBatch) -> PixelCNNSteps:
        return PixelCNNSteps(self, batch)


class LevelNetwork(nn.Module):
    """One level's codes given the levels above and the label.

    Tensors are (B, h, w, C), channels last, so that a position's channels are one stretch of memory in both ways of running.
    """

    def __init__(
        self, config: PixelCNNPart, grid: tuple[int, int], num_codes: Sequence[int], condition: Condition, num_variants: int = 1
    ) -> None:
        """`num_codes`: K of the levels above, then of this one."""
        super().__init__()
        width, self.grid = config.width, grid
        # With attention, a row's first position starts from the code before it in the sequence: the positions up to a position then
        # have between them every code before it, and whoever attends to them sees it.
        self.wraps = config.attention_interval > 0
        *above, own = num_codes
        self.token = nn.Embedding(own, width)
        self.label = condition.embedding(width)
        self.variant = VariantEmbedding(num_variants, width) if num_variants > 1 else None
        self.positions = nn.Parameter(torch.zeros(2, *grid, width))
        self.above = UpperLevels([nn.Embedding(k, width) for k in above], width, config.heads, grid) if above else None
        self.layers = nn.ModuleList(self._layer(config, number) for number in range(config.layers))  # type: ignore[assignment]
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, own))
        coordinates = SequenceLayout([grid], [own]).centres()
        self.rotary = RotaryTable(coordinates, width // config.heads)

    layers: Sequence[GatedLayer]

    @property
    def rotations(self) -> Tensor:
        """(T, d / 2, 2): rotary positions of all of the grid; see attention.py."""
        return self.rotary.table

    @staticmethod
    def _layer(config: PixelCNNPart, number: int) -> GatedLayer:
        attends = config.attention_interval > 0 and (number + 1) % config.attention_interval == 0
        kernel = config.kernel_size if number else _FIRST_KERNEL
        return GatedLayer(config.width, kernel, number == 0, config.dropout, config.heads if attends else 0)

    def context(self, above: Codes, condition: Tensor, variants: Tensor | None = None) -> Tensor:
        """Conditioning features: (B, 1, 1, C) from condition and variants (B,), or (B, h, w, C) with codes of the levels above."""
        context = self.label(condition)[:, None, None]
        if variants is not None and self.variant is not None:
            context = context + self.variant(variants)[:, None, None]
        return context if self.above is None else context + self.above(above, self.rotations)

    def inputs(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded codes (B, h, w, C) to the two stacks' inputs: a row further down, and a column further right."""
        down = F.pad(embedded[:, :-1], (0, 0, 0, 0, 1, 0))
        if self.wraps:
            right = F.pad(embedded.flatten(1, 2)[:, :-1], (0, 0, 1, 0)).view(embedded.shape)
        else:
            right = F.pad(embedded[:, :, :-1], (0, 0, 1, 0))
        return down + self.positions[0], right + self.positions[1]

    def forward(self, codes: Tensor, context: Tensor, checkpointing: bool) -> Tensor:
        """Logits (B, h w, K) of codes (B, h, w)."""
        vertical, horizontal = self.inputs(self.token(codes))
        for layer in self.layers:
            given = (vertical, horizontal, context, self.rotations)
            vertical, horizontal = checkpoint(layer, *given, use_reentrant=False) if checkpointing else layer(*given)
        return self.head(horizontal).flatten(1, 2)


class GatedLayer(nn.Module):
    """One layer of both stacks: y = tanh(a) * sigmoid(b) (equation 2; with the context's share of a and b, equation 4).

    Both stacks are added to their input, the horizontal one through a 1x1 convolution, as in the paper, where the
    vertical one is not added: at initial scales its signal would halve with every layer.
    """

    def __init__(self, width: int, kernel: int, first: bool, dropout: float, heads: int) -> None:
        """`heads` 0 makes a layer without attention."""
        super().__init__()
        # Of rows above and of columns to the left, its own among them, but not in the first layer (mask A).
        self.reach = kernel // 2 + (not first)
        self.sides = kernel // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach, kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach))
        self.down = nn.Linear(2 * width, 2 * width, bias=False)
        self.context = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.attention = GridAttention(width, heads) if heads else None

    def forward(self, vertical: Tensor, horizontal: Tensor, context: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the vertical and the horizontal stack, (B, h, w, C) both; the shapes stay."""
        to_vertical, to_horizontal = self.context(context).chunk(2, -1)
        above = convolved(self.vertical, F.pad(vertical, (0, 0, self.sides, self.sides, self.reach - 1, 0)))
        left = convolved(self.horizontal, F.pad(horizontal, (0, 0, self.reach - 1, 0)))
        vertical = vertical + self.dropout(gated(above + to_vertical))
        horizontal = horizontal + self.out(self.dropout(gated(left + self.down(above) + to_horizontal)))
        return vertical, horizontal if self.attention is None else self.attention(horizontal, rotation)


def convolved(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution on (B, h, w, C), channels last."""
    return convolution(x.movedim(-1, 1)).movedim(1, -1)


def gated(x: Tensor) -> Tensor:
    """Gate features (..., 2 C), of which the second half gates the first: (..., C)."""
    a, b = x.chunk(2, -1)
    return a.tanh() * b.sigmoid()


class PixelCNNCache:
    """Sampling state: the codes so far and the current level's activations within reach of its convolutions."""

    def __init__(self, prior: PixelCNN, batch: int, above: Codes) -> None:
        self._prior, self._batch, self._above = prior, batch, above
        self._codes = [torch.zeros(batch, *grid, dtype=torch.int64, device=prior.device) for grid in prior.layout.grids]
        self._position = 0

    def step(self, code: Tensor | None, condition: Tensor | None) -> Tensor:
        """Logits (B, K) of the next position, from the code (B,) of the one before (None at the first) and condition (B,)."""
        if code is not None:
            self._record(code)
        level, row, column = self._coordinates(self._position)
        network = self._prior.networks[level]
        if row == column == 0:
            code = None
            self._start_level(level, condition)
        if column == 0:
            self._rows.start_row(row, None if row == 0 else self._codes[level][:, row - 1])
        logits = self._rows.next_position(column, code if column or network.wraps else None)
        self._position += 1
        return logits

    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None) -> None:
        """Advance from position `start` to `stop` over known codes (B, T): row by row, within the level of `stop`."""
        for codes, known in zip(self._codes, self._prior.layout.grids_of(sequences), strict=True):
            codes.copy_(known)
        self._position = stop
        level, stop = self._prior.layout.level_and_index(stop)
        start -= self._prior.layout.first_position(level)
        if stop > 0 and start <= 0:
            self._start_level(level, condition)
        network, codes = self._prior.networks[level], self._codes[level]
        width = network.grid[1]
        for row in range(max(0, start) // width, -(-stop // width)):
            first, last = max(0, start - row * width), min(width, stop - row * width)
            if first == 0:
                self._rows.start_row(row, codes[:, row - 1] if row else None)
            # Without attention nobody looks at the horizontal stack of a row above.
            if last < width or network.wraps:
                before = row * width + first - 1
                begins = before < 0 or (first == 0 and not network.wraps)
                self._rows.next_positions(first, last, codes.flatten(1)[:, before + begins : before + last - first])

    def _start_level(self, level: int, condition: Tensor | None) -> None:
        network = self._prior.networks[level]
        context = network.context((*self._above, *self._codes[:level]), self._prior.condition_or_null(condition, self._batch))
        self._rows = RowState(network, context)

    def _coordinates(self, position: int) -> tuple[int, int, int]:
        level, index = self._prior.layout.level_and_index(position)
        return level, *divmod(index, self._prior.layout.grids[level][1])

    def _record(self, code: Tensor) -> None:
        level, row, column = self._coordinates(self._position - 1)
        self._codes[level][:, row, column] = code


class RowState:
    """One level's activations, row by row and position by position."""

    def __init__(self, network: LevelNetwork, context: Tensor) -> None:
        self._network = network
        batch, (h, w), width, layers = len(context), network.grid, network.token.embedding_dim, network.layers
        self._context = context
        # Of each layer: the rows that its vertical convolution reaches, oldest first, with their margins; then this row's
        # horizontal inputs, with the margin to the left.
        self._above = [context.new_zeros(batch, layer.reach, w + 2 * layer.sides, width) for layer in layers]
        self._left = [context.new_zeros(batch, layer.reach - 1 + w, width) for layer in layers]
        # A window (reach, C) of those inputs is one stretch of memory, so the convolution is one matrix product.
        self._kernels = [layer.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1) for layer in layers]  # (reach C, 2 C)
        # Vertical-to-horizontal features of the current row, one tensor per layer.
        self._down = [context.new_zeros(batch, w, 2 * width) for _ in layers]
        self._attended = [None if layer.attention is None else layer.attention.new_cache(batch, h * w) for layer in layers]
        self._row: int | Tensor = 0

    def start_row(self, row: int | Tensor, codes_above: Tensor | None) -> None:
        """Advance the vertical stack to a row, from the codes (B, w) of the row above; None at the first row.

        A `row` given as a tensor (1,), here and in `next_position`, makes every row run the same kernels, so that a CUDA graph can replay.
        """
        network, self._row = self._network, row
        x = select(network.positions[0], row).expand(len(self._left[0]), -1, -1)
        if codes_above is not None:
            x = x + network.token(codes_above)  # (B, w, C)
        context = self._context[:, 0] if self._context.shape[1] == 1 else select(self._context, row, 1)  # (B, 1 or w, C)
        for layer, rows, down in zip(network.layers, self._above, self._down, strict=True):
            to_vertical, to_horizontal = layer.context(context).chunk(2, -1)
            rows.copy_(rows.roll(-1, 1))
            rows[:, -1, layer.sides : layer.sides + x.shape[1]] = x
            above = convolved(layer.vertical, rows)[:, 0]
            x = x + gated(above + to_vertical)
            down.copy_(layer.down(above) + to_horizontal + layer.horizontal.bias)

    def next_position(self, column: int, code_left: Tensor | None, row: int | Tensor | None = None) -> Tensor:
        """Logits (B, K) of a position, from the code (B,) to its left, or None. `row`: None means the row last begun."""
        network, row = self._network, self._row if row is None else row
        x = select(network.positions[1, :, column], row).expand(len(self._left[0]), -1)
        if code_left is not None:
            x = x + network.token(code_left)  # (B, C)
        position = row * network.grid[1] + column
        states = zip(network.layers, self._left, self._kernels, self._down, self._attended, strict=True)
        for layer, left, kernel, down, attended in states:
            left[:, layer.reach - 1 + column] = x
            window = left[:, column : column + layer.reach].flatten(1)
            x = x + layer.out(gated(torch.addmm(down[:, column], window, kernel)))
            if layer.attention is None or attended is None:
                continue
            x = layer.attention.step_(x, network.rotations, attended, position)
        return network.head(x)

    def next_positions(self, first: int, last: int, codes_left: Tensor) -> None:
        """Advance over the columns from `first` to `last` of the row last begun without their logits, from the codes (B, n) to the left of
        the last n of them.
        """
        network, row, count = self._network, self._row, last - first
        assert isinstance(row, int)
        x = network.positions[1, row, first:last] + F.pad(network.token(codes_left), (0, 0, count - codes_left.shape[1], 0))
        position = row * network.grid[1] + first
        states = zip(network.layers, self._left, self._kernels, self._down, self._attended, strict=True)
        for layer, left, kernel, down, attended in states:
            left[:, layer.reach - 1 + first : layer.reach - 1 + last] = x
            windows = left[:, first : layer.reach - 1 + last].unfold(1, layer.reach, 1).transpose(2, 3).flatten(2)  # (B, n, reach C)
            x = x + layer.out(gated(down[:, first:last] + windows @ kernel))
            if layer.attention is not None and attended is not None:
                x = layer.attention.prefill(x, network.rotations[position : position + count], attended, position)

    def restart(self, context: Tensor) -> None:
        """Clear the row state for a new batch and set its context, of the same shape as before."""
        self._context.copy_(context)
        for state in (*self._above, *self._left):
            state.zero_()
        for cache in self._attended:
            if cache is not None:
                cache.reset()


class PixelCNNSteps(FixedSteps):
    """Static-shape steps of a PixelCNN.

    A phase is (level, column, whether it is the level's first position, which has no code before it); column 0 also begins a row.
    """

    def __init__(self, prior: PixelCNN, batch: FixedBatch) -> None:
        super().__init__(batch)
        self._prior, rows = prior, len(batch.condition)
        self._states = []
        for network in prior.networks:
            grid = (1, 1) if network.above is None else network.grid
            self._states.append(RowState(network, network.positions.new_zeros(rows, *grid, network.token.embedding_dim)))

    @override
    def prepare(self, position: int, above: Codes = ()) -> None:
        level, index = self._prior.layout.level_and_index(position)
        if index == 0:
            codes = self._prior.layout.grids_of(self.batch.shared(self.batch.sequences))[:level]
            self._states[level].restart(self._prior.networks[level].context((*above, *codes), self.batch.condition))

    @override
    def prefill(self, stop: int, above: Codes = ()) -> int:
        # A level's network is given all codes of the levels above when it begins.
        return self._prior.layout.first_position(self._prior.layout.level_of(stop))

    @override
    def phase(self, position: int) -> tuple[int, int, bool]:
        level, index = self._prior.layout.level_and_index(position)
        return level, index % self._prior.layout.grids[level][1], index == 0

    @override
    def logits(self, phase: Any) -> Tensor:
        level, column, first = phase
        layout, network, state = self._prior.layout, self._prior.networks[level], self._states[level]
        width, position = layout.grids[level][1], self.batch.local_position()
        row = (position - (layout.first_position(level) + column)) // width
        if column == 0:
            above = position - width + torch.arange(width, device=position.device)
            state.start_row(row, None if first else self.batch.shared(self.batch.sequences.index_select(1, above)))
        left = None
        if column or (network.wraps and not first):
            left = self.batch.shared(self.batch.sequences.index_select(1, position - 1)[:, 0])
        return state.next_position(column, left, row)
