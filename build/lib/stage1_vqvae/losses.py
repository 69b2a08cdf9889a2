"""Reconstruction losses: pure functions of images in [-1, 1] and of what the decoder puts out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def full_precision(x: Tensor) -> Tensor:
    """float32, whatever autocast made of it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squared_error(output: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of images in [-1, 1], both (B, C, H, W); four times that on [0, 1]."""
    return F.mse_loss(full_precision(output), images)


def binary_cross_entropy(logits: Tensor, images: Tensor) -> Tensor:
    """Mean nats a pixel of black-and-white images (B, C, H, W) in [-1, 1] under Bernoulli logits."""
    return F.binary_cross_entropy_with_logits(full_precision(logits), (images + 1) / 2)
