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
        mirrored = variants >= num_variants(augmentation) // 2
        return torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)
    # Variants 0..8 are the offsets (0,0), then the eight around it: rotating the 3x3 list puts its centre first.
    offset = (variants + 4) % 9
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[-2:]
    windows = [padded[..., top : top + height, left : left + width] for top in range(3) for left in range(3)]
    result = torch.empty_like(images)
    for index, window in enumerate(windows):
        rows = (offset == index).to(images.device)
        result[rows] = window[rows]
    return result
