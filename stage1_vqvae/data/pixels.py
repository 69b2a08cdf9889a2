"""Conversion of the range of pixels: uint8 (H, W, C) at rest, float32 (C, H, W) in [-1, 1] in models, [0, 1] in metrics."""

from __future__ import annotations

import torch
from torch import Tensor


def to_model(pixels: Tensor) -> Tensor:
    """Convert uint8 (B, H, W, C) to float32 (B, C, H, W) in [-1, 1]."""
    return pixels.movedim(-1, 1).float().div_(127.5).sub_(1.0)


def to_unit(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to [0, 1] for metrics; values outside are clipped, as in a picture."""
    return images.float().add(1.0).div_(2.0).clamp_(0.0, 1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float (B, C, H, W) in [-1, 1] to uint8 (B, H, W, C), rounded to the nearest."""
    return to_unit(images).mul_(255.0).round_().to(torch.uint8).movedim(1, -1).contiguous()
