"""The largest box at the centre of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from configs.data import TransformPart
from stage1_vqvae.data.crops import Crop


@dataclass(frozen=True, kw_only=True)
class CenterPart(TransformPart):
    """The largest box at the centre."""

    @override
    def crop(self, draws: Sequence[float] | None = None) -> Crop:
        return Crop()
