"""No condition: the kind of unconditional priors, and of codes whose images have no labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from configs.errors import UserError
from stage1_vqvae.data.splits import ImageSource, ImageSplit
from stage2_prior.conditions.contract import Condition, Label


@dataclass(frozen=True, kw_only=True)
class NoCondition(Condition):
    """No condition: unconditional priors.

    The null alone is embedded, so that networks have the same form with a condition and without.
    """

    @override
    def build(self, source: ImageSource) -> NoCondition:
        return self

    @override
    def encode(self, split: ImageSplit, rows: slice) -> None:
        return None

    @property
    @override
    def disk_dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @override
    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=device)

    @override
    def embedding(self, width: int) -> nn.Embedding:
        return nn.Embedding(1, width)

    @override
    def parse(self, text: Label, where: str) -> Tensor:
        raise UserError(f"{where} {text}: expected none, since this prior has no labels")

    @override
    def show(self, row: Tensor) -> str:
        return ""
