"""The nearest-code search as one GPU kernel: distances live in registers and never reach memory.

The blocked search (search.py) is its fallback and its reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# A block takes so many vectors and goes through so many codes at once. With eight warps a thread then holds 16 distances: what is
# kept of each, and the channels that are multiplied for them, fit into its registers at every width (tests/.../test_fused.py).
_ROWS, _CODES, _WARPS = 64, 64, 8
# While a tile of codes is multiplied, the next one is fetched.
_STAGES = 2
# The fewest channels that a tile of a matrix product may have. Triton before 3.8 may want 16.
_FEWEST_CHANNELS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16


@triton.jit
def _nearest(vectors, codes, squares, nearest, count, num_codes, DIM: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr):
    """Of whole tiles of codes, `num_codes` a multiple of CODES, and DIM channels, a power of two."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CODES)
    channels = tl.arange(0, DIM)
    z = tl.load(vectors + rows[:, None] * DIM + channels[None, :], mask=(rows < count)[:, None], other=0.0)
    # Each column of the tile has a least distance of its own, and the tile that it is from: to look for the least of all columns
    # in every tile would take longer than the product itself does with few channels.
    least = tl.full((ROWS, CODES), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS, CODES), tl.int32)
    for first in range(0, num_codes, CODES):
        numbers = first + columns
        e = tl.load(codes + numbers[None, :] * DIM + channels[:, None])
        distances = tl.load(squares + numbers)[None, :] - 2 * tl.dot(z, e, input_precision="ieee")
        nearer = distances < least
        chosen = tl.where(nearer, first, chosen)
        least = tl.where(nearer, distances, least)
    # What is not finite is near to nothing, and where nothing is near the first code is chosen.
    alike = least == tl.min(least, 1)[:, None]
    tl.store(nearest + rows, tl.min(tl.where(alike, chosen + columns[None, :], num_codes), 1).to(tl.int64), mask=rows < count)


def fused_nearest(vectors: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    """argmin_k squares_k - 2 z.e_k of float32 vectors (N, D) and codes (K, D), for small D; the lower index on a tie.

    Returns: (N,) int64.
    """
    count, dim = vectors.shape
    nearest = torch.empty(count, dtype=torch.int64, device=vectors.device)
    if count:
        # Channels that fill a width up are zero, codes that fill a tile up infinitely far.
        channels, copies = max(_FEWEST_CHANNELS, triton.next_power_of_2(dim)) - dim, -len(codes) % _CODES
        vectors = F.pad(vectors, (0, channels)) if channels else vectors.contiguous()
        codes, squares = F.pad(codes, (0, channels, 0, copies)), F.pad(squares, (0, copies), value=torch.inf)
        with torch.cuda.device_of(vectors):
            _nearest[(triton.cdiv(count, _ROWS),)](
                vectors, codes, squares, nearest, count, len(codes), dim + channels, _ROWS, _CODES, num_warps=_WARPS, num_stages=_STAGES
            )
    return nearest
