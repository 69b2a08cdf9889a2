"""The contract of a prior: a probability model of an image's codes, with its own loss, sampler and likelihood.

It sees integers only, never images or files. Priors that draw one code after another share all three: see stepwise.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import require
from configs.parts import PriorPart, Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.guidance_free import GuidanceFree
from stage2_prior.draw import guided, is_guided
from training.precision import full_precision


class Sizes(NamedTuple):
    """The sizes of a prior's network."""

    layers: int
    width: int
    """Channels of a position."""
    heads: int
    """Attention heads."""


class SizedByPreset:
    """Fields `preset`, `layers`, `width` and `heads` of a prior's part: a 0 takes the preset's size."""

    PRESETS: ClassVar[dict[str, Sizes]]
    preset: str
    layers: int
    width: int
    heads: int

    def sizes(self) -> Sizes:
        """Return the sizes to build. Errors: ValueError, naming the key, for an impossible one."""
        for name in ("layers", "width", "heads"):
            require(getattr(self, name) >= 0, f"prior.{name}", "at least 0", getattr(self, name))
        preset = self.PRESETS[self.preset]
        sizes = Sizes(self.layers or preset.layers, self.width or preset.width, self.heads or preset.heads)
        require(sizes.width % (4 * sizes.heads) == 0, "prior.width", f"a multiple of 4 x {sizes.heads} heads", sizes.width)
        return sizes


@dataclass(frozen=True, kw_only=True)
class GuidedPart(PriorPart):
    """Fields of priors that support guidance-free training."""

    guidance_free: bool = False
    """Guidance-free training (Chen et al. 2025): the prior is told the guidance with which it is sampled, and then takes one row per sample
    in place of two; training takes a second forward pass. Needs a condition, and stage2.condition_dropout above 0."""


class VariantEmbedding(nn.Embedding):
    """Embedding of the augmented variant of an image that codes belong to; variant 0, the image itself, stays zero.

    Non-leaking augmentation (Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix
    F.2): a prior that knows that codes are of a shifted image need not believe that images are shifted, and draws none that is.
    """

    def __init__(self, num_variants: int, width: int) -> None:
        super().__init__(num_variants, width, padding_idx=0)
        # Training begins as if all were variant 0.
        nn.init.zeros_(self.weight)


class Keep(NamedTuple):
    """Codes to keep while the others are drawn."""

    codes: Codes
    """int64 (B, h, w) per level; only those under the masks matter."""
    masks: Codes
    """bool (h, w) per level: true where codes are kept."""


class Prior(nn.Module, ABC):
    """A probability model of codes, p(codes | condition)."""

    exact: ClassVar[bool]
    """Whether `nats` is the exact negative log-likelihood; otherwise it is an upper bound."""
    completes_any_mask: bool = False
    """Whether `sample` draws each code given all kept codes of its level, wherever they lie, instead of only those before it."""

    checkpointing: bool
    """Whether training recomputes each layer's activations in the backward pass (Chen et al. 2016)."""
    num_draws: int
    """Uniform random numbers per sample that the training loss takes."""
    num_noise: int
    """Uniform random numbers per sample that `sample` takes."""
    guidance_free: GuidanceFree | None
    """Joins guidance and condition rows after guidance-free training; None: guidance takes a second row per sample."""

    def __init__(
        self, layout: SequenceLayout, condition: Condition | GuidanceFree, num_variants: int = 1, given: SequenceLayout | None = None
    ) -> None:
        """Args:
        layout: the levels that it models.
        condition: what it is conditioned on, alone or with its guidance; embedded by `condition.embedding`, the null included.
        num_variants: variants of each image in the training codes, the image itself included.
        given: the levels above, for a model of p(levels | levels above).
        """
        super().__init__()
        self.guidance_free = condition if isinstance(condition, GuidanceFree) else None
        self.condition = condition.condition if isinstance(condition, GuidanceFree) else condition
        self.layout, self.num_variants, self.given = layout, num_variants, given
        self.checkpointing, self.num_draws, self.num_noise = False, int(self.guidance_free is not None), layout.length

    @property
    def levels(self) -> slice:
        """The modelled levels among an image's; those before them are given."""
        first = 0 if self.given is None else len(self.given.grids)
        return slice(first, first + len(self.layout.grids))

    @abstractmethod
    def forward(
        self,
        codes: Codes,
        condition: Tensor | None,
        variants: Tensor | None = None,
        draws: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> Tensor:
        """Return the training loss (): mean nats per code, or a bound on it, which a training step minimises.

        It is `forward` because training calls the prepared module, so that DDP, FSDP, autocast and torch.compile apply.

        Args:
            codes: int64 (B, h, w) per level: all positions of the given levels and its own.
            condition: (B, ...) rows of the prior's condition; None: the null throughout.
            variants: (B,) int64, the augmented variant of each row; None: the images themselves.
            draws: (B, num_draws) float32 in [0, 1), a function of (seed, step, sample); None if it takes none.
            progress: () float32, share of the training's steps before this one, for a loss that changes with it; None if it takes no draws.
        """

    @abstractmethod
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """Draw codes, one image per row, without gradient; eval mode only.

        Args:
            condition: (B, ...), or None.
            noise: (B, num_noise) float64 in [0, 1), a function of (seed, sample number) from `uniforms`.
            settings: of the class that the prior's part names.
            keep: codes to keep.
        Returns: int64 (B, h, w) per level.
        Errors: UserError for probabilities that are not finite.
        """

    @abstractmethod
    def nats(self, codes: Codes, condition: Tensor | None) -> Tensor:
        """Negative log-likelihood of each code, or an upper bound if not `exact`: (B, T) in nats, float32 or wider, without TF32."""

    def initialise_from(self, vectors: Sequence[Tensor]) -> None:
        """Initialise embeddings from the tokenizer's code vectors, (K, D) per level, with mean 0; by default a no-op."""

    def fsdp_modules(self) -> list[nn.Module]:
        """Submodules that FSDP gathers one by one."""
        return []

    def training_warnings(self) -> list[str]:
        """Warnings to print before training."""
        return []

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def null_condition(self, batch: int) -> Tensor:
        """Return the condition (B, ...) of samples that have none, as embeddings take it."""
        return self.with_guidance(self.condition.null(batch, self.device))

    def condition_or_null(self, condition: Tensor | None, batch: int) -> Tensor:
        """Return the condition (B, ...), or the null condition for None, as embeddings take it."""
        return self.null_condition(batch) if condition is None else self.with_guidance(condition)

    def with_guidance(self, condition: Tensor, guidance: float = 1.0) -> Tensor:
        """Add the guidance to rows (B, ...) if the prior is told it; rows that have one keep theirs."""
        if self.guidance_free is None or condition.shape[1:] != self.condition.shape:
            return condition
        return self.guidance_free.with_beta(condition, torch.full((len(condition),), 1 / guidance, device=condition.device))

    def guidance_free_logits(
        self, logits: Callable[[Tensor | None], tuple[Tensor, ...]], condition: Tensor | None, uniform: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits of guidance-free training: those at a random beta, times beta, plus 1 - beta times the unconditional ones.

        Rows whose condition is dropped train the unconditional logits, at beta = 1.

        Args:
            logits: function from rows with beta, or None for the null, to logits (B, n, K) per level.
            condition: (B, *shape) rows of the condition.
            uniform: (B,) in [0, 1).
        """
        assert self.guidance_free is not None
        assert condition is not None
        beta = torch.where(self.guidance_free.is_null(condition), 1, 1 - uniform)  # above 0: beta is the reciprocal of a guidance
        conditional = logits(self.guidance_free.with_beta(condition, beta))
        with torch.no_grad():  # second, since autocast would reuse weights that were cast without gradient
            unconditional = logits(None)
        levels = zip(conditional, unconditional, strict=True)
        return tuple(guided(full_precision(level), full_precision(null), beta[:, None, None]) for level, null in levels)

    def needs_two_rows(self, condition: Tensor | None, settings: Sampling) -> bool:
        """Return whether each sample of a batch needs a second, unconditional row, for guidance."""
        return self.guidance_free is None and is_guided(condition, settings)

    def sampling_condition(self, condition: Tensor | None, batch: int, guided: bool, guidance: float = 1.0) -> Tensor:
        """Return the condition of all rows of a sampling batch: (B, ...), or (2 B, ...) under guidance by two rows, the second half null.

        `guidance`: scale for priors that are told it.
        """
        if condition is not None:
            condition = self.with_guidance(condition.to(self.device), guidance)
        condition = self.condition_or_null(condition, batch)
        return torch.cat([condition, self.null_condition(batch)]) if guided else condition
