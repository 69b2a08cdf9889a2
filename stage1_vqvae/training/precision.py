"""Numbers wide enough for losses, whatever mixed precision made of them; and exact matrix products, whatever TF32 is allowed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """float32, whatever autocast made of it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Full float32 matrix products on CUDA, even where TF32 is allowed."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
