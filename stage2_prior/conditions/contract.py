"""The contract of conditions: how one is read from a data set, stored with the codes, embedded, and written by a user.

A condition is chosen by the recipe (`condition: {kind: classes}`) and completed by `build` with what the data set says, such as the names
of its classes. The manifest of the codes and the header of a prior hold it in that form, and `translate` is where the two meet.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from configs.schema import ConditionPart
from stage1_vqvae.data.splits import ImageSource, ImageSplit

Label = str | int
"""A condition as a user writes it: for classes a name, or a number, which may be text where no class has it for a name."""


@dataclass(frozen=True, kw_only=True)
class Condition(ConditionPart):
    """The condition of a prior: a row of numbers per image, stored with its codes.

    Rows are tensors (B, *shape) of the dtype that `null` has; `disk_dtype` is theirs on disk. Priors add one vector per image, so that
    an embedding maps rows to (B, C); tokens (B, L, C) need a prior that attends to them, which no kind here does.
    """

    @abstractmethod
    def build(self, source: ImageSource) -> Condition:
        """Return the condition as this data set has it; `NoCondition` if the data set has none."""

    def accepts(self, stored: ConditionPart) -> bool:
        """Whether codes stored with that condition are those that the recipe, which chose this one, is after."""
        return self == stored

    @abstractmethod
    def encode(self, split: ImageSplit, rows: slice) -> Tensor | None:
        """Encode some images of a split: (B, *shape); None if the split has no condition, as an unlabelled test split."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return ()

    @property
    @abstractmethod
    def disk_dtype(self) -> np.dtype:
        """Dtype of stored rows."""

    @abstractmethod
    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows (B, *shape) that mean "no condition"."""

    @abstractmethod
    def embedding(self, width: int) -> nn.Module:
        """Build the module that maps rows, the null among them, to vectors (B, width)."""

    @abstractmethod
    def parse(self, text: Label, where: str) -> Tensor:
        """Convert a user's text to one row, of `shape`. Errors: UserError, in one line that begins with `where`."""

    @abstractmethod
    def show(self, row: Tensor) -> str:
        """Convert one row to text that `parse` accepts."""

    def describe(self) -> str:
        """Describe the condition in an error message."""
        return self.kind

    def translate(self, rows: Tensor, source: ConditionPart) -> Tensor | None:
        """Convert rows that another data set or prior has stored, under its condition `source`, to rows of this one.

        Returns: (B, *shape); None if the two conditions cannot be compared. Which rows have a counterpart here, `known` tells.
        """
        return rows if source == self else None

    def known(self, rows: Tensor) -> Tensor:
        """Return a mask (B,) of the rows, as `translate` or `encode` returns them, that have a counterpart in this condition."""
        return torch.ones(len(rows), dtype=torch.bool)

    def drop(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Replace the rows that a mask (B,) selects by the null."""
        return torch.where(mask.view(-1, *[1] * len(self.shape)), self.null(len(rows), rows.device), rows)

    def in_turn(self, count: int) -> Tensor | None:
        """Rows of samples for which nothing is requested: the classes in turn; None: no condition."""
        return torch.arange(count) % len(self.class_names) if self.class_names else None
