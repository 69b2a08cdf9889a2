"""Class labels: one class per image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from configs.errors import UserError, listed
from configs.parts import ConditionPart
from stage1_vqvae.data.names import class_numbers
from stage1_vqvae.data.splits import ImageSource, ImageSplit
from stage2_prior.conditions.contract import Condition, Label
from stage2_prior.conditions.none import NoCondition


@dataclass(frozen=True, kw_only=True)
class Classes(Condition):
    """The class of each image, from the labels of the data set, if it has any.

    Rows are class numbers (B,) int64; the null is the number of classes. Numbers are valid within one data set only: classes of codes,
    priors and images from different sources are compared by name.
    """

    names: list[str] = field(default_factory=list)
    """Classes in the order of their numbers. Empty: the classes of the data set."""

    @override
    def build(self, source: ImageSource) -> Condition:
        if source.label_names is None:
            return NoCondition()
        return self if self.names else replace(self, names=list(source.label_names))

    @override
    def accepts(self, stored: ConditionPart) -> bool:
        return isinstance(stored, NoCondition) or (isinstance(stored, Classes) and self.names in ([], stored.names))

    @override
    def encode(self, split: ImageSplit, rows: slice) -> Tensor | None:
        if split.labels is None or split.label_names is None:
            return None
        return self.translate(split.labels[rows], Classes(names=list(split.label_names)))

    @property
    @override
    def disk_dtype(self) -> np.dtype:
        return np.min_scalar_type(max(0, len(self.names) - 1))

    @override
    def null(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch,), len(self.names), device=device)

    @override
    def embedding(self, width: int) -> nn.Embedding:
        return nn.Embedding(len(self.names) + 1, width)

    @override
    def parse(self, text: Label, where: str) -> Tensor:
        number = int(class_numbers([text], self.names)[0]) if isinstance(text, str) else -1
        if number < 0 and str(text).isdecimal() and int(text) < len(self.names):
            number = int(text)
        if number < 0:
            raise UserError(f"{where}: expected 0 to {len(self.names) - 1} or a name ({listed(self.names)}), found {text}")
        return torch.tensor(number)

    @override
    def show(self, row: Tensor) -> str:
        return self.names[int(row)]

    @property
    @override
    def class_names(self) -> list[str]:
        return self.names

    @override
    def describe(self) -> str:
        return f"classes {listed(self.names)}"

    @override
    def translate(self, rows: Tensor, source: ConditionPart) -> Tensor | None:
        return torch.from_numpy(class_numbers(source.names, self.names))[rows] if isinstance(source, Classes) else None

    @override
    def known(self, rows: Tensor) -> Tensor:
        return rows >= 0
