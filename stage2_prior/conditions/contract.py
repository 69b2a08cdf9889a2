"""The contract of conditions: reading one from a data set, storing it with the codes, embedding it, and parsing a user's text.

The recipe chooses a condition (`condition: {kind: classes}`), and `build` completes it from the data set, for instance with the names of
its classes. The manifest of the codes and the header of a prior contain the completed condition; `translate` converts between the two.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from configs.parts import ConditionPart
from stage1_vqvae.data.splits import ImageSource, ImageSplit

Label = str | int
"""A user's text for a condition: for classes a name, or a number, also as text unless a class has this name."""


@dataclass(frozen=True, kw_only=True)
class Condition(ConditionPart):
    """The condition of a prior: a row of numbers per image, stored with its codes.

    Rows are tensors (B, *shape) of the dtype of `null`, and of `disk_dtype` on disk. Priors add one vector per image, so an embedding maps
    rows to (B, C); tokens (B, L, C) would need a prior that attends to them, and there is none yet.
    """

    @abstractmethod
    def build(self, source: ImageSource) -> Condition:
        """Return the condition completed from a data set; `NoCondition` if the data set has none."""

    def accepts(self, stored: ConditionPart) -> bool:
        """Return whether codes stored with that condition can be used where the recipe chooses this one."""
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
        """Return rows (B, *shape) that mean "no condition"."""

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
        """Convert rows of another data set's or prior's condition, `source`, to rows of this one.

        Returns: (B, *shape); None if the two conditions cannot be compared. `known` marks the rows that have a counterpart.
        """
        return rows if source == self else None

    def known(self, rows: Tensor) -> Tensor:
        """Return a mask (B,) of the rows, as `translate` or `encode` returns them, that have a counterpart in this condition."""
        return torch.ones(len(rows), dtype=torch.bool)

    def drop(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Replace the rows that a mask (B,) selects by the null."""
        return torch.where(mask.view(-1, *[1] * len(self.shape)), self.null(len(rows), rows.device), rows)

    def in_turn(self, count: int) -> Tensor | None:
        """Return default rows (count, *shape) of samples: the classes in turn; None: no condition."""
        return torch.arange(count) % len(self.class_names) if self.class_names else None
