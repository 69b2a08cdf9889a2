"""What every prior is: an autoregressive model of codes, p(level 1) p(level 2 | level 1) ..., each level in raster order.

It sees integers only, never images or files. Training asks for all places at once (`forward`); sampling asks for one
place after another (`step`), and a cache holds what the places before it have left. Both give the same logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Prior
from stage1_vqvae.losses import full_precision
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.sequence import SequenceLayout

Logits = tuple[Tensor, ...]
"""(B, h w, K) a level: place by place in raster order, over that level's own codes."""


class AutoregressivePrior(nn.Module, ABC):
    """The contract."""

    checkpointing: bool
    """Whether training computes each layer's inside twice instead of keeping it (Chen et al. 2016)."""

    def __init__(self, config: Prior, layout: SequenceLayout, num_labels: int) -> None:
        """`num_labels` 0: unconditional. The label index `num_labels` means none, and always has its embedding."""
        super().__init__()
        self.config, self.layout, self.num_labels = config, layout, num_labels
        self.checkpointing = False

    @abstractmethod
    def forward(self, codes: Codes, labels: Tensor | None) -> Logits:
        """Logits of every place given the codes before it, and the label.

        Args:
            codes: int64 (B, h, w) a level, all places.
            labels: (B,) int64, `num_labels` where there is none; None: none anywhere.
        """

    @abstractmethod
    def new_cache(self, batch: int) -> Any:
        """An empty cache for `batch` sequences."""

    @abstractmethod
    def step(self, code: Tensor | None, labels: Tensor | None, cache: Any) -> Tensor:
        """Logits (B, K) of the next place over the codes of its level, from the code (B,) of the place before (None at
        the first) and the cache, which moves on by one place.
        """

    def remarks(self) -> list[str]:
        """Lines that whoever trains it should read."""
        return []

    def log_prob(self, codes: Codes, labels: Tensor | None) -> Tensor:
        """log p of each code given those before it, (B, T), in nats, float32 or wider."""
        return -torch.cat(code_losses(self(codes, labels), codes), 1)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def labels_or_none(self, labels: Tensor | None, batch: int) -> Tensor:
        """Labels (B,) as given, or the index that means none."""
        return torch.full((batch,), self.num_labels, device=self.device) if labels is None else labels


def code_losses(logits: Logits, codes: Codes) -> list[Tensor]:
    """-log p in nats of codes (B, h, w) a level under their logits: (B, h w) a level, float32 or wider."""
    losses = []
    for found, grid in zip(logits, codes, strict=True):
        nats = F.cross_entropy(full_precision(found).flatten(0, 1), grid.flatten(), reduction="none")
        losses.append(nats.view(found.shape[:2]))
    return losses
