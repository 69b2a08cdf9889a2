"""What every prior is: an autoregressive model of codes, p(level 1) p(level 2 | level 1) ..., each level in raster order.

It sees integers only, never images or files. Training asks for all positions at once (`forward`); sampling asks for one
position after another (`step`), and a cache holds what the positions before it have left; codes that are known go into it at once
(`prefill`). Both give the same logits, and so do `FixedSteps`: the same steps with static shapes, for CUDA graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import require
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from training.precision import full_precision, ieee_float32

Logits = tuple[Tensor, ...]
"""(B, h w, K) a level: position by position in raster order, over that level's own codes."""


class Sizes(NamedTuple):
    """The sizes of a prior's network."""

    layers: int
    width: int
    """Channels of a position."""
    heads: int
    """Attention heads."""


class SizedByPreset:
    """For a prior's fields `preset`, `layers`, `width` and `heads`: what is 0 takes the preset's size."""

    PRESETS: ClassVar[dict[str, Sizes]]
    preset: str
    layers: int
    width: int
    heads: int

    def sizes(self) -> Sizes:
        """The sizes to build. Errors: ValueError, naming the key, for one that cannot be."""
        for name in ("layers", "width", "heads"):
            require(getattr(self, name) >= 0, f"prior.{name}", "at least 0", getattr(self, name))
        preset = self.PRESETS[self.preset]
        found = Sizes(self.layers or preset.layers, self.width or preset.width, self.heads or preset.heads)
        require(found.width % (4 * found.heads) == 0, "prior.width", f"a multiple of 4 x {found.heads} heads", found.width)
        return found


class VariantEmbedding(nn.Embedding):
    """Embeds which augmented variant of an image codes are of; variant 0, the image itself, stays zero.

    Non-leaking augmentation (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix
    F.2): a prior that knows that codes are of a shifted image need not believe that images are shifted, and draws none that is.
    """

    def __init__(self, num_variants: int, width: int) -> None:
        super().__init__(num_variants, width, padding_idx=0)
        # Training begins as if all were variant 0.
        nn.init.zeros_(self.weight)


@dataclass(frozen=True)
class FixedBatch:
    """Preallocated input tensors of a sampling batch, overwritten in place so that a CUDA graph can read them."""

    sequences: Tensor
    """(B, T) int64 codes; only those before the current position are read."""
    condition: Tensor
    """(R, ...) rows of the prior's condition. R = B, or 2 B under guidance, where rows r and B + r share their codes."""
    position: Tensor
    """(1,) int64: current position, counted over all levels."""
    first: int = 0
    """Offset of these sequences in the full sequence (a prior of one level sees only its own)."""

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
        """Take in the batch's first codes, which are known, up to position `stop`, as far as that can be done at once.

        `above`: as in `prepare`. Returns: the position to go on from, at most `stop`.
        """
        return 0

    @abstractmethod
    def phase(self, position: int) -> Hashable:
        """Key of the graph for this position; positions with equal keys run the same kernels on the same tensors."""

    @abstractmethod
    def logits(self, phase: Hashable) -> Tensor:
        """Logits (R, K) at the current position, which has this phase. Capturable: no host synchronisation."""


class AutoregressivePrior(nn.Module, ABC):
    """The contract that every prior keeps."""

    checkpointing: bool
    """Whether training computes each layer's inside twice instead of keeping it (Chen et al. 2016)."""

    def __init__(self, layout: SequenceLayout, condition: Condition, num_variants: int = 1, given: SequenceLayout | None = None) -> None:
        """
        Args:
            layout: of the levels that it models.
            condition: embedded by `condition.embedding`, the null included.
            num_variants: variants of each image that the training codes hold, the image itself included.
            given: layout of the levels above, if it models p(levels | levels above).
        """
        super().__init__()
        self.layout, self.condition, self.num_variants, self.given = layout, condition, num_variants, given
        self.checkpointing = False

    @property
    def levels(self) -> slice:
        """Which of an image's levels it models; those above it is given."""
        first = 0 if self.given is None else len(self.given.grids)
        return slice(first, first + len(self.layout.grids))

    @abstractmethod
    def forward(self, codes: Codes, condition: Tensor | None, variants: Tensor | None = None) -> Logits:
        """Logits of every position of its own levels given the codes before it, and the label.

        Args:
            codes: int64 (B, h, w) a level, all positions, of the levels above and its own.
            condition: (B, ...) rows of the prior's condition, the null where there is none; None: none anywhere.
            variants: (B,) int64, which variant of its image each row is of, in training; None: the images themselves.
        """

    @abstractmethod
    def new_cache(self, batch: int, above: Codes = ()) -> Any:
        """An empty cache for `batch` sequences, given the codes (B, h, w) of the levels above, if it has such."""

    @abstractmethod
    def step(self, code: Tensor | None, condition: Tensor | None, cache: Any) -> Tensor:
        """Logits (B, K) of the next position over the codes of its level, from the code (B,) of the position before (None at
        the first) and the cache, which moves on by one position.
        """

    def prefill(self, sequences: Tensor, start: int, stop: int, condition: Tensor | None, cache: Any) -> None:
        """Take in positions whose codes are known: the cache is then as after a step through each, as it is where a kind of prior has no
        way of taking them in at once, without logits.

        Args:
            sequences: (B, T) int64, of which the codes before `stop` are read.
            start: the position that the cache is at.
            stop: a later one, from which `step` goes on.
            condition, cache: as in `step`.
        """
        for position in range(start, stop):
            self.step(sequences[:, position - 1] if position else None, condition, cache)

    def fixed_steps(self, batch: FixedBatch) -> FixedSteps | None:
        """Static-shape steps for CUDA graphs; None if this kind has only `step`."""
        return None

    def begin_from(self, vectors: Sequence[Tensor]) -> None:
        """Let training begin from what the tokenizer knows of its codes: their vectors, (K, D) a level, with mean 0. Not all priors
        have a use for them.
        """

    def units(self) -> list[nn.Module]:
        """Its layers, if it has such: what is gathered one at a time where weights are shared out over processes."""
        return []

    def remarks(self) -> list[str]:
        """Lines that whoever trains it should read."""
        return []

    def log_prob(self, codes: Codes, condition: Tensor | None) -> Tensor:
        """log p of each code given those before it, (B, T), in nats, float32 or wider; without TF32."""
        with ieee_float32(codes[0].device):
            return -torch.cat(code_losses(self(codes, condition), codes[self.levels]), 1)

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return next(self.parameters()).device

    def null_condition(self, batch: int) -> Tensor:
        """Return the condition (B, ...) of samples that have none."""
        return self.condition.null(batch, self.device)

    def condition_or_null(self, condition: Tensor | None, batch: int) -> Tensor:
        """The condition (B, ...), or the null condition where it is None."""
        return self.null_condition(batch) if condition is None else condition


def code_losses(logits: Logits, codes: Codes) -> list[Tensor]:
    """-log p in nats of codes (B, h, w) a level under their logits: (B, h w) a level, float32 or wider."""
    losses = []
    for found, grid in zip(logits, codes, strict=True):
        nats = F.cross_entropy(full_precision(found).flatten(0, 1), grid.flatten(), reduction="none")
        losses.append(nats.view(found.shape[:2]))
    return losses
