"""Boxes in an image, as shares of it, so that they are known before the image is opened."""

from __future__ import annotations

import math
from typing import NamedTuple


class Crop(NamedTuple):
    """A box of the recipe's shape in an image of any shape; without arguments the largest box at the centre."""

    area: float = 1.0
    """Area as a share of that of the largest such box."""
    across: float = 0.5
    """Share of the width beside the box that lies left of it."""
    down: float = 0.5
    """Share of the height outside the box that lies above it."""

    def box(self, size: tuple[int, int], height: int, width: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels of an image of size (width, height), of the shape of height x width."""
        scale = min(size[0] / width, size[1] / height) * math.sqrt(self.area)
        # Rounding must not reach over the edge.
        box_width, box_height = min(width * scale, size[0]), min(height * scale, size[1])
        left, top = (size[0] - box_width) * self.across, (size[1] - box_height) * self.down
        return left, top, min(left + box_width, size[0]), min(top + box_height, size[1])
