"""A box of random size at a random place, drawn again whenever training takes the image; the centre for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from configs.data import TransformPart
from configs.errors import require
from stage1_vqvae.data.crops import Crop


@dataclass(frozen=True, kw_only=True)
class RandomCropPart(TransformPart):
    """A random box in training, the largest at the centre elsewhere."""

    num_draws: ClassVar[int] = 3
    min_area: float = 1.0
    """Least area of the box as a share of the largest box's, from which the area is drawn up to 1; 1 = only its place is random."""

    def __post_init__(self) -> None:
        require(0 < self.min_area <= 1, "data.transform.min_area", "a share above 0, up to 1", self.min_area)

    @property
    @override
    def smallest_area(self) -> float:
        return self.min_area

    @override
    def crop(self, draws: Sequence[float] | None = None) -> Crop:
        if draws is None:
            return Crop()
        area, across, down = draws
        return Crop(self.min_area + (1 - self.min_area) * area, across, down)
