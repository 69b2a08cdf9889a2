"""Nearest-code search as one Triton kernel: distances stay in registers and never reach memory.

The blocked search (search.py) is the fallback and the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# Vectors per program, codes per tile, warps per program. Each thread holds 16 distances; with their running minima and the operands of
# the product they fit into its registers at every width (tests/.../test_fused.py).
_ROWS, _CODES, _WARPS = 64, 64, 8
# Software pipelining: the next tile of codes is loaded while this one is multiplied.
_STAGES = 2
# Minimum inner dimension of tl.dot; Triton before 3.8 may require 16.
_MIN_CHANNELS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16


@triton.jit
def _nearest(vectors, codes, squares, nearest, count, num_codes, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr):
    """Nearest code of ROWS vectors; `num_codes` is a multiple of CODES, DIM a power of two."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CODES)
    channels = tl.arange(0, DIM)
    z = tl.load(vectors + rows[:, None] * DIM + channels[None, :], mask=(rows < count)[:, None], other=0.0)
    # Running minimum per column of the tile, with the tile that it came from: reducing over columns in every tile would take longer than
    # the product itself when channels are few.
    least = tl.full((ROWS, CODES), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS, CODES), tl.int32)
    for first in range(0, num_codes, CODES):
        numbers = first + columns
        e = tl.load(codes + numbers[None, :] * DIM + channels[:, None])
        distances = tl.load(squares + numbers)[None, :] - 2 * tl.dot(z, e, input_precision="ieee")
        nearer = distances < least
        chosen = tl.where(nearer, first, chosen)
        least = tl.where(nearer, distances, least)
    # NaN distances never win a comparison; if all are NaN, the first code is chosen.
    tied = least == tl.min(least, 1)[:, None]
    tl.store(nearest + rows, tl.min(tl.where(tied, chosen + columns[None, :], num_codes), 1).to(tl.int64), mask=rows < count)


def fused_nearest(vectors: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    """argmin_k squares_k - 2 z.e_k of float32 vectors (N, D) and codes (K, D), for small D; the lower index on a tie.

    Returns: (N,) int64.
    """
    count, dim = vectors.shape
    nearest = torch.empty(count, dtype=torch.int64, device=vectors.device)
    if count:
        # Padding: channels of zeros, codes infinitely far away.
        pad_channels, pad_codes = max(_MIN_CHANNELS, triton.next_power_of_2(dim)) - dim, -len(codes) % _CODES
        vectors = F.pad(vectors, (0, pad_channels)) if pad_channels else vectors.contiguous()
        codes, squares = F.pad(codes, (0, pad_channels, 0, pad_codes)), F.pad(squares, (0, pad_codes), value=torch.inf)
        with torch.cuda.device_of(vectors):
            _nearest[(triton.cdiv(count, _ROWS),)](
                vectors, codes, squares, nearest, count, len(codes), dim + pad_channels, _ROWS, _CODES, num_warps=_WARPS, num_stages=_STAGES
            )
    return nearest
