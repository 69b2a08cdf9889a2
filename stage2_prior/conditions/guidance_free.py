"""A condition joined with the guidance scale, for guidance-free training: a guided sample then takes one row, not two.

Guidance-free training: Chen et al. 2025, "Visual Generation Without Guidance". With beta = 1 / guidance, the logits of classifier-free
guidance, l = unconditional + (conditional - unconditional) / beta, are a network's own: it is trained by the likelihood of
beta l + (1 - beta) unconditional, which are the conditional logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stage2_prior.conditions.contract import Condition

# Cosines of beta that are embedded.
_FREQUENCIES = 16


class GuidanceFree:
    """A condition with beta: rows are float32 (B, 1 + n), beta before the n numbers of the condition's own row."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition

    def with_beta(self, rows: Tensor, beta: Tensor) -> Tensor:
        """Join beta (B,), above 0 and up to 1, and the condition's rows (B, *shape)."""
        numbers = rows.reshape(len(rows), math.prod(self.condition.shape))
        return torch.cat([beta[:, None], numbers], 1).float()

    def is_null(self, rows: Tensor) -> Tensor:
        """Return a mask (B,) of the condition's rows (B, *shape) that are its null, which may have NaN."""
        return torch.isclose(rows, self.condition.null(len(rows), rows.device), rtol=0, atol=0, equal_nan=True).view(len(rows), -1).all(1)

    def embedding(self, width: int) -> nn.Module:
        """Build the module that maps rows with beta to vectors (B, width)."""
        return _Embedding(self.condition, width)


class _Embedding(nn.Module):
    """Embedding of the condition plus that of beta."""

    def __init__(self, condition: Condition, width: int) -> None:
        super().__init__()
        self.condition, self._shape, self._dtype = condition.embedding(width), condition.shape, condition.null(0).dtype
        self.beta = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows with beta, (B, 1 + n), to (B, C)."""
        own = rows[:, 1:].reshape(len(rows), *self._shape).to(self._dtype)
        cosines = (math.pi * rows[:, :1] * torch.arange(_FREQUENCIES, device=rows.device)).cos()
        return self.condition(own) + self.beta(cosines.to(next(self.beta.parameters()).dtype))
