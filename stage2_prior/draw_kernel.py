"""A code drawn from logits by one GPU kernel, in Triton: guidance, temperature, softmax, and the inverse of the cumulative distribution.

`guided`, `warp` and `draw` of generate.py are its fallback and its reference. Sums are in float64, in the order of the codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = tl.constexpr(2**31 - 1)


@triton.jit
def _warped(logits, row, batch, codes, num_codes, scale, temperature, GUIDED: tl.constexpr):
    """Logits (BLOCK,) of codes, float64; -inf where there are no more codes."""
    inside = codes < num_codes
    found = tl.load(logits + row * num_codes + codes, mask=inside, other=float("-inf")).to(tl.float64)
    if GUIDED:
        free = tl.load(logits + (row + batch) * num_codes + codes, mask=inside, other=0.0).to(tl.float64)
        found = free + scale * (found - free)
        found = tl.where(inside, found, float("-inf"))
    return found / temperature


@triton.jit
def _weights(warped, top, WIDE: tl.constexpr):
    if WIDE:
        return tl.exp(warped - top)
    # Of logits in 16 bits, whose own rounding is 10^4 times as coarse; many GPUs are slow in float64.
    return tl.exp((warped - top).to(tl.float32)).to(tl.float64)


@triton.jit
def _draw(
    logits,  # (R, K)
    uniforms,  # (B, T)
    scales,  # (T,)
    drawn,  # (T,)
    temperatures,  # (1,)
    position,  # (1,)
    sequences,  # (B, T)
    failed,  # (B,)
    batch,
    num_codes,
    length,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, here = tl.program_id(0).to(tl.int64), tl.load(position)
    if tl.load(drawn + here) != 0:
        scale, temperature = tl.load(scales + here), tl.load(temperatures)
        lanes, numbers = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
        largest = tl.full((BLOCK,), float("-inf"), tl.float64)
        at, unknown = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
        for first in range(0, num_codes, BLOCK):
            warped = _warped(logits, row, batch, first + lanes, num_codes, scale, temperature, GUIDED)
            at = tl.where(warped > largest, first + lanes, at)
            largest = tl.where(warped > largest, warped, largest)
            unknown |= (warped != warped).to(tl.int32)
        top = tl.max(largest, 0)
        if GREEDY:
            code = tl.min(tl.where(largest == top, at, _MOST), 0)
            finite = tl.max(unknown, 0) == 0
        else:
            # Sums up to the end of each block, in order, so that they never fall.
            total = tl.zeros((), tl.float64) + 0.0
            ends = tl.full((BLOCKS,), float("inf"), tl.float64)
            for first in range(0, num_codes, BLOCK):
                warped = _warped(logits, row, batch, first + lanes, num_codes, scale, temperature, GUIDED)
                total += tl.sum(_weights(warped, top, WIDE), 0)
                ends = tl.where(numbers == first // BLOCK, total, ends)
            finite = total < float("inf")  # which a NaN is not
            threshold = tl.load(uniforms + row * length + here) * total
            chosen = tl.min(tl.where((ends > threshold) & (numbers * BLOCK < num_codes), numbers, BLOCKS - 1), 0)
            before = tl.max(tl.where(numbers < chosen, ends, 0.0), 0)
            codes = chosen * BLOCK + lanes
            weights = _weights(_warped(logits, row, batch, codes, num_codes, scale, temperature, GUIDED), top, WIDE)
            possible = weights > 0
            reached = possible & (before + tl.cumsum(weights, 0) > threshold)
            code = tl.min(tl.where(reached, codes, _MOST), 0)
            # Where rounding leaves the block's sum short of the threshold: its last code that has probability.
            code = tl.where(code == _MOST, tl.max(tl.where(possible, codes, 0), 0), code)
        if not finite:
            tl.store(failed + row, 1)
        tl.store(sequences + row * length + here, tl.minimum(code, num_codes - 1).to(tl.int64))


def draw_code(
    logits: Tensor,
    uniforms: Tensor,
    scales: Tensor | None,
    drawn: Tensor,
    temperature: Tensor,
    greedy: bool,
    position: Tensor,
    sequences: Tensor,
    failed: Tensor,
) -> Tensor:
    """Draw the code of a position (1,) into `sequences` (B, T), if it is one of those to draw.

    Args:
        logits: (B, K); under guidance (2 B, K), conditional ones first.
        uniforms: (B, T) float64.
        scales: (T,) float64, the guidance scale of each position; None: no guidance.
        drawn: (T,) int32: 0 where the code stays.
        temperature: (1,) float64.
        greedy: take the likeliest code, whatever the temperature.
        failed: (B,) int32: set to 1 where a probability is not finite.
    Returns: `sequences`.
    """
    (batch, length), num_codes = sequences.shape, logits.shape[1]
    block = min(2048, max(16, triton.next_power_of_2(num_codes)))
    with torch.cuda.device_of(logits):
        _draw[(batch,)](
            *(logits, uniforms, drawn if scales is None else scales, drawn, temperature, position, sequences, failed),
            *(batch, num_codes, length),
            GUIDED=scales is not None,
            GREEDY=greedy,
            WIDE=logits.element_size() > 2,
            BLOCK=block,
            BLOCKS=triton.next_power_of_2(triton.cdiv(num_codes, block)),
            num_warps=8 if block > 1024 else 4,
        )
    return sequences
