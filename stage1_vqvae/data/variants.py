"""Augmentation as a short list of variants of an image, so that stage 1 can draw from it and extraction can store all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.data import StoredAugmentation
from stage1_vqvae.data.crops import CENTRE, FIVE, Crop


def num_variants(augmentation: StoredAugmentation) -> int:
    """How many variants of an image an augmentation has; variant 0 is the image itself."""
    return {"none": 1, "horizontal_flip": 2, "shift": 9, "five_crops": 5, "ten_crops": 10}[augmentation]


def crops_of(augmentation: StoredAugmentation) -> tuple[Crop, ...]:
    """The crops of an image that its variants are made from: variant v from crop v modulo their number."""
    return FIVE if augmentation in ("five_crops", "ten_crops") else (CENTRE,)


def make_variants(images: Tensor, augmentation: StoredAugmentation, variants: Tensor) -> Tensor:
    """Image b of (B, C, H, W), the crop for it, as its variant `variants[b]`: mirrored, or shifted by up to one pixel, edges repeated."""
    if augmentation in ("none", "five_crops"):
        return images
    if augmentation in ("horizontal_flip", "ten_crops"):
        mirrored = variants.to(images.device) >= num_variants(augmentation) // 2
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    # Variants 0..8 are the offsets (0,0), then the eight around it: rotating the 3x3 list puts its centre first. Pixels are gathered by
    # index, since a boolean mask per variant would synchronise with a GPU.
    offset = (variants.to(images.device) + 4) % 9
    count, channels, height, width = images.shape
    batch_index, row_index, column_index = (torch.arange(size, device=images.device) for size in (count, height, width))
    rows = (row_index + (offset // 3 - 1)[:, None]).clamp_(0, height - 1)
    columns = (column_index + (offset % 3 - 1)[:, None]).clamp_(0, width - 1)
    pixel_index = (batch_index[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]
    pixels = images.movedim(1, -1).reshape(-1, channels)
    return pixels.index_select(0, pixel_index.flatten()).view(count, height, width, channels).movedim(-1, 1)
