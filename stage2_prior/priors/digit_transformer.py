"""A transformer over codes that are digits, which a small network gives one after another from the features of the code's position.

p(code | before) = p(digit 1 | before) p(digit 2 | digit 1, before) ..., where the transformer runs once per code. Nothing has a row per
code: embeddings are sums over digits, and the head has a row per value of a digit, so that K = 2^18 is three digits of 64 values.
Weber et al. 2024, "MaskBit", predict groups of bits, too, but all that a step predicts independently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import DigitLayout, SequenceLayout, digits_of
from stage2_prior.conditions.contract import Condition
from stage2_prior.priors.blocks import INITIAL_STD, add_vectors_
from stage2_prior.priors.contract import Sizes
from stage2_prior.priors.stepwise import FixedBatch, Logits
from stage2_prior.priors.transformer import Transformer, TransformerCache, TransformerSteps


class DigitEmbedding(nn.Embedding):
    """Embedding of tokens as a sum over their digits: a row per value of each digit of each level."""

    def __init__(self, layout: SequenceLayout, width: int) -> None:
        # Levels with fewer digits than others have further ones of a single value.
        most = max(map(len, layout.digits))
        padded = [[*level, *[1] * (most - len(level))] for level in layout.digits]
        super().__init__(sum(map(sum, padded)), width)
        sizes = torch.tensor(padded)
        for name, buffer in (
            ("sizes", sizes),
            ("strides", sizes.cumprod(1) // sizes),
            ("rows", sizes.flatten().cumsum(0).view_as(sizes) - sizes),
            ("offsets", torch.tensor(layout.offsets)),
        ):
            self.register_buffer(name, buffer, persistent=False)

    sizes: Tensor
    strides: Tensor
    rows: Tensor
    offsets: Tensor

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens (...) to (..., C)."""
        level = (tokens[..., None] >= self.offsets[1:]).sum(-1)
        digits = (tokens - self.offsets[level])[..., None] // self.strides[level] % self.sizes[level]
        # Digit by digit: together they would take as many times the memory.
        return reduce(torch.add, map(super().forward, (digits + self.rows[level]).unbind(-1)))


class DigitHead(nn.Module):
    """Distributions of the digits of a code, each given those before it and features: a NADE with one hidden layer.

    Larochelle & Murray 2011, "The Neural Autoregressive Distribution Estimator": all digits share the map from features to hidden units,
    to which each known digit adds a vector, so that the cost is linear in the number of digits.
    """

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        """`sizes`: number of values of each digit."""
        super().__init__()
        self.sizes, hidden = tuple(sizes), 4 * width
        self.up = nn.Linear(width, hidden, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(sizes), hidden))
        self.known = nn.Embedding(sum(sizes[:-1]), hidden) if len(sizes) > 1 else None
        self.head = nn.Linear(hidden, sum(sizes), bias=False)
        self._first_rows = [0, *accumulate(sizes)]

    def forward(self, features: Tensor, codes: Tensor) -> list[Tensor]:
        """Logits (..., size) of each digit, from features (..., C), given the digits before it of codes (...)."""
        hidden, logits = self.up(features), []
        for number, digit in enumerate(digits_of(codes, self.sizes)):
            logits.append(self.logits(hidden, number))
            if number + 1 < len(self.sizes):
                hidden = self.add(hidden, number, digit)
        return logits

    def logits(self, hidden: Tensor, number: int) -> Tensor:
        """Logits (..., size) of a digit from the sum (..., H) of `up` and what `add` has added for each digit before it."""
        rows = self.head.weight[self._first_rows[number] : self._first_rows[number + 1]]
        return F.linear(F.silu(hidden + self.bias[number]), rows)

    def add(self, hidden: Tensor, number: int, digit: Tensor) -> Tensor:
        """Add to the sum (..., H) what a digit's value (...) adds."""
        assert self.known is not None
        return hidden + self.known(digit + self._first_rows[number])


@dataclass
class DigitCache(TransformerCache):
    """Sampling state; `position` counts digits."""

    hidden: Any = None
    """(B, H) sum of the head at the current code, over its digits so far."""
    code: Any = 0
    """(B,) value of the current code's digits so far."""


class DigitTransformer(Transformer):
    """p(codes | label), one code after another, digit by digit."""

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
        """Arguments as of `Transformer`, without `order` any; the layouts' digits are what is drawn."""
        super().__init__(layout, condition, num_variants, sizes, dropout, given, head_gain, order, corruption)
        self._draw_layout = DigitLayout(layout.grids, layout.num_codes, layout.digits)
        self.num_noise = self._draw_layout.length

    token: DigitEmbedding
    digits: Sequence[DigitHead]

    @property
    @override
    def draw_layout(self) -> DigitLayout:
        return self._draw_layout

    @override
    def token_embedding(self, layout: SequenceLayout, width: int) -> DigitEmbedding:
        return DigitEmbedding(layout, width)

    @override
    def add_head(self, width: int) -> None:
        self.digits = nn.ModuleList(DigitHead(width, sizes) for sizes in self.layout.digits)  # type: ignore[assignment]

    @override
    def _initialise(self) -> None:
        super()._initialise()
        for head in self.digits:
            if head.known is not None:  # as large as what the features give
                nn.init.normal_(head.known.weight, std=INITIAL_STD * head.up.in_features**0.5)

    @override
    @torch.no_grad()
    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        """As of `Transformer`, by the mean vectors of the codes that share a digit."""
        first_rows = self.token.rows[:, 0].tolist()
        for head, first_row, level_vectors in zip(self.digits, first_rows, vectors, strict=True):
            codes = digits_of(torch.arange(len(level_vectors), device=level_vectors.device), head.sizes)
            digits = zip(codes, head.sizes, strict=True)
            means = torch.cat(
                [level_vectors.new_zeros(size, level_vectors.shape[1]).index_add_(0, digit, level_vectors) * size for digit, size in digits]
            )
            means /= len(level_vectors)
            for rows in (self.token.weight[first_row : first_row + len(means)], head.head.weight):
                add_vectors_(rows, means)

    @override
    def logits_of(self, features: Tensor, codes: Codes) -> Logits:
        levels = zip(self.digits, self.norm(features).split(self.layout.lengths, 1), codes[self.levels], strict=True)
        return tuple(logits for head, part, grid in levels for logits in head(part, grid.flatten(1)))

    @override
    def code_logits(self, codes: Codes, condition: Tensor | None, level: int, index: int) -> Tensor:
        """See the contract; the hidden layer is computed for all combinations of the digits but the last."""
        head = self.digits[level]
        position = self.layout.first_position(level) + index
        hidden = head.up(self.norm(self.all_features(codes, condition)[:, position]))[:, None]  # (B, combinations, H)
        total = hidden.new_zeros(len(hidden), 1)
        for number, size in enumerate(head.sizes):
            logits = head.logits(hidden, number).log_softmax(-1)
            total = (total[:, None] + logits.mT).flatten(1)  # the new digit is the most significant
            if number + 1 < len(head.sizes):
                values = torch.arange(size, device=hidden.device)[:, None]
                hidden = head.add(hidden[:, None], number, values).flatten(1, 2)
        return total

    @override
    def new_cache(self, batch: int, above: Codes = ()) -> DigitCache:
        cache = super().new_cache(batch, above)
        return DigitCache(cache.layers, cache.embedded_positions, cache.above)

    @override
    def step(self, code: Tensor | None, condition: Tensor | None, cache: TransformerCache) -> Tensor:
        assert isinstance(cache, DigitCache)
        position, number = self.draw_layout.code_and_digit(cache.position)
        level = self.layout.level_of(position)
        if code is not None:
            cache.code = cache.code + code * self._stride(cache.position - 1)
        cache.position += 1
        if number == 0:
            features = self.step_features(None if code is None else cache.code, condition, cache, position)
            cache.hidden, cache.code = self.digits[level].up(self.norm(features)), 0
        else:
            assert code is not None
            cache.hidden = self.digits[level].add(cache.hidden, number - 1, code)
        return self.digits[level].logits(cache.hidden, number)

    def _stride(self, position: int) -> int:
        """Return what a digit is multiplied by in its code."""
        code, number = self.draw_layout.code_and_digit(position)
        return math.prod(self.layout.digits[self.layout.level_of(code)][:number])

    @override
    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None, cache: TransformerCache) -> None:
        assert isinstance(cache, DigitCache)
        codes = self.layout.flat(self.draw_layout.grids_of(sequences))
        first, last = (self.draw_layout.code_and_digit(position)[0] for position in (start, stop - 1))
        super().prefill(codes, first, last + 1, condition, cache)
        # The next step adds the last digit.
        cache.position, cache.code = stop, codes[:, last] % self._stride(stop - 1)

    @override
    def fixed_steps(self, batch: FixedBatch) -> DigitSteps:
        return DigitSteps(self, batch)


class DigitSteps(TransformerSteps):
    """Static-shape steps of a transformer over digits; a phase is a level and a digit."""

    def __init__(self, prior: DigitTransformer, batch: FixedBatch) -> None:
        super().__init__(prior, batch)
        self._digits, layout = prior, prior.draw_layout
        self._cache = DigitCache(self._cache.layers, self._cache.embedded_positions, self._cache.above)
        self._hidden = [head.up.weight.new_zeros(len(batch.condition), head.up.out_features) for head in prior.digits]
        places = [layout.code_and_digit(position) for position in range(layout.length)]
        self._codes = torch.tensor([code for code, _ in places], device=prior.device)
        # Row t: by what each of the positions before t, the nearest last, is multiplied in the code before that of t.
        most = max(map(len, layout.digits))
        strides = torch.zeros(layout.length, most, dtype=torch.int64)
        for position, (code, _) in enumerate(places):
            for back in range(1, min(most, position) + 1):
                if places[position - back][0] == code - 1:
                    strides[position, most - back] = prior._stride(position - back)
        self._strides, self._back = strides.to(prior.device), torch.arange(-most, 0, device=prior.device)

    @override
    def phase(self, position: int) -> Any:
        code, number = self._digits.draw_layout.code_and_digit(position)
        return self._digits.layout.level_of(code), number

    @override
    def logits(self, phase: Any) -> Tensor:
        prior, position, (level, number) = self._digits, self.batch.local_position(), phase
        head, hidden = prior.digits[level], self._hidden[level]
        if number == 0:
            code = self._codes.index_select(0, position)
            hidden.copy_(head.up(prior.norm(prior.features(self._embedded(position), self._cache, code))))
        else:
            digit = self.batch.sequences.index_select(1, position - 1)[:, 0]
            hidden.copy_(head.add(hidden, number - 1, self.batch.shared(digit)))
        return head.logits(hidden, number)

    @override
    def _embedded(self, position: Tensor) -> Tensor:
        prior, code = self._digits, self._codes.index_select(0, position)
        digits = self.batch.sequences.index_select(1, (position + self._back).clamp_(min=0))
        before = (digits * self._strides.index_select(0, position)).sum(1) + prior.token_offsets.index_select(0, (code - 1).clamp_(min=0))
        token = torch.where(code == 0, prior.start, prior.token(self.batch.shared(before)))
        return prior.embed_step(token, self.batch.condition, self._cache, code)
