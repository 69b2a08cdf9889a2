"""Which part of an image is taken: a box of the recipe's shape, as shares, so that it is known before the image is opened."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Crop(NamedTuple):
    """A box of the recipe's shape in an image of any."""

    area: float = 1.0
    """Share of the area of the largest such box."""
    across: float = 0.5
    """Share of the room beside the box that is left of it."""
    down: float = 0.5
    """Share of the room above and below the box that is above it."""

    def box(self, size: tuple[int, int], height: int, width: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of an image of size (width, height), of the shape of height x width."""
        scale = min(size[0] / width, size[1] / height) * math.sqrt(self.area)
        # Rounding must not reach over the edge.
        box_width, box_height = min(width * scale, size[0]), min(height * scale, size[1])
        left, top = (size[0] - box_width) * self.across, (size[1] - box_height) * self.down
        return left, top, min(left + box_width, size[0]), min(top + box_height, size[1])


CENTRE = Crop()
# Of the image enlarged by a tenth.
_CORNER = 1 / 1.1**2
FIVE = (CENTRE, *(Crop(_CORNER, across, down) for down in (0.0, 1.0) for across in (0.0, 1.0)))
"""The largest box at the centre, and the four corners of the image enlarged by a tenth."""


def crops_from(draws: Tensor, least_area: float) -> list[Crop]:
    """Boxes at random: from (B, 3) uniform draws in [0, 1), of an area from `least_area` to 1."""
    return [Crop(least_area + (1 - least_area) * area, across, down) for area, across, down in draws.tolist()]
