"""Numbers wide enough for losses, whatever mixed precision made of them."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """float32, whatever autocast made of it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
