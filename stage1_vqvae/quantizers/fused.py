"""The nearest-code search as one GPU kernel: distances live in registers and never reach memory.

The blocked search (search.py) is its fallback and its reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _CODES = 64, 64


@triton.jit
def _nearest(
    vectors, codes, squares, nearest, count, num_codes, dim: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, padded)
    here = (rows < count)[:, None] & (channels < dim)[None, :]
    z = tl.load(vectors + rows[:, None].to(tl.int64) * dim + channels[None, :], mask=here, other=0.0)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.int32)
    for first in range(0, num_codes, CODES):
        numbers = first + tl.arange(0, CODES)
        there = (numbers < num_codes)[None, :] & (channels < dim)[:, None]
        e = tl.load(codes + numbers[None, :] * dim + channels[:, None], mask=there, other=0.0)
        square = tl.load(squares + numbers, mask=numbers < num_codes, other=float("inf"))
        distances = square[None, :] - 2 * tl.dot(z, e, input_precision="ieee")
        nearer = tl.min(distances, 1) < least
        chosen = tl.where(nearer, first + tl.argmin(distances, 1, tie_break_left=True), chosen)
        least = tl.minimum(least, tl.min(distances, 1))
    # What is not finite is near to nothing; its code must exist all the same.
    tl.store(nearest + rows, tl.minimum(chosen, num_codes - 1).to(tl.int64), mask=rows < count)


def fused_nearest(vectors: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    """argmin_k squares_k - 2 z.e_k of float32 vectors (N, D) and codes (K, D), for small D; the lower index on a tie.

    Returns: (N,) int64.
    """
    vectors, codes = vectors.contiguous(), codes.contiguous()
    count, dim = vectors.shape
    nearest = torch.empty(count, dtype=torch.int64, device=vectors.device)
    if count:
        # A tile of a matrix product has at least 16 channels.
        padded = max(16, triton.next_power_of_2(dim))
        with torch.cuda.device_of(vectors):
            _nearest[(triton.cdiv(count, _ROWS),)](vectors, codes, squares, nearest, count, len(codes), dim, padded, _ROWS, _CODES)
    return nearest
