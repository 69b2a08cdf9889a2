"""Augmentation as a short list of variants of an image: training draws one of them, extraction stores the codes of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.data import Augmentation
from stage1_vqvae.data.crops import Crop

_SHIFTS = 9
# The image and the four corners of the image enlarged by a tenth.
_FIVE_CROPS = (None, *(Crop(1 / 1.1**2, across, down) for down in (0.0, 1.0) for across in (0.0, 1.0)))


@dataclass(frozen=True)
class Variants:
    """Variants of an image: each crop, each shift of it and each mirror image of these; variant 0 is the image itself.

    The crop's number counts fastest, the mirror image's slowest: with five crops, variant 7 is the mirror image of crop 2.
    """

    crops: tuple[Crop | None, ...] = (None,)
    """Boxes of the image; None: the one that data.transform takes."""
    shifted: bool = False
    """Whether each is also shifted by one pixel in eight directions, edges repeated."""
    mirrored: bool = False
    """Whether each also comes as its mirror image."""

    def __len__(self) -> int:
        return len(self.crops) * (_SHIFTS if self.shifted else 1) * (2 if self.mirrored else 1)

    def apply(self, crops: Tensor, numbers: Tensor) -> Tensor:
        """Shift and mirror image b of (B, C, H, W), cropped for its variant `numbers[b]`, as that variant says."""
        if not self.shifted and not self.mirrored:
            return crops
        numbers = numbers.to(crops.device) // len(self.crops)
        if self.shifted:
            crops = _shifted(crops, numbers)
        if self.mirrored:
            mirrored = numbers >= (_SHIFTS if self.shifted else 1)
            crops = torch.where(mirrored.view(-1, 1, 1, 1), crops.flip(-1), crops)
        return crops


VARIANTS: dict[Augmentation, Variants] = {
    "none": Variants(),
    "horizontal_flip": Variants(mirrored=True),
    "shift": Variants(shifted=True),
    "five_crops": Variants(_FIVE_CROPS),
    "ten_crops": Variants(_FIVE_CROPS, mirrored=True),
}
"""The variants of each augmentation that a recipe may name."""


def _shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift image b of (B, C, H, W) to the neighbour `shifts[b]` modulo 9, of which 0 is no shift."""
    # Row by row, the 3x3 offsets from the centre on, then from the first to the centre. Pixels are gathered by index, since a boolean mask
    # per shift would synchronise with a GPU.
    offset = (shifts + _SHIFTS // 2) % _SHIFTS
    count, channels, height, width = images.shape
    batch_index, row_index, column_index = (torch.arange(size, device=images.device) for size in (count, height, width))
    rows = (row_index + (offset // 3 - 1)[:, None]).clamp_(0, height - 1)
    columns = (column_index + (offset % 3 - 1)[:, None]).clamp_(0, width - 1)
    pixel_index = (batch_index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    pixels = images.movedim(1, -1).reshape(-1, channels)
    return pixels.index_select(0, pixel_index.flatten()).view(count, height, width, channels).movedim(-1, 1)
