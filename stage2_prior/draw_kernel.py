"""Triton kernel that draws a code from logits: guidance, temperature, softmax and inversion of the cumulative distribution.

`draw_position` in draw.py is its fallback and reference. Sums are in float64, in the order of the codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NO_CODE = tl.constexpr(2**31 - 1)


@triton.jit
def _scaled_logits(logits, row, batch, codes, num_codes, scale, temperature, GUIDED: tl.constexpr):
    """Guided logits divided by temperature, (BLOCK,) float64; -inf past the last code."""
    inside = codes < num_codes
    scaled = tl.load(logits + row * num_codes + codes, mask=inside, other=float("-inf")).to(tl.float64)
    if GUIDED:
        unconditional = tl.load(logits + (row + batch) * num_codes + codes, mask=inside, other=0.0).to(tl.float64)
        scaled = unconditional + scale * (scaled - unconditional)
        scaled = tl.where(inside, scaled, float("-inf"))
    return scaled / temperature


@triton.jit
def _weights(scaled, top, WIDE: tl.constexpr):
    if WIDE:
        return tl.exp(scaled - top)
    # float32 suffices for 16-bit logits, whose rounding is 10^4 times as coarse; many GPUs are slow in float64.
    return tl.exp((scaled - top).to(tl.float32)).to(tl.float64)


@triton.jit
def _draw(
    logits,  # (R, K)
    uniforms,  # (B, T)
    scales,  # (T,)
    to_draw,  # (T,)
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
    row, current = tl.program_id(0).to(tl.int64), tl.load(position)
    if tl.load(to_draw + current) != 0:
        scale, temperature = tl.load(scales + current), tl.load(temperatures)
        lanes, numbers = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
        largest = tl.full((BLOCK,), float("-inf"), tl.float64)
        argmax, has_nan = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
        for first in range(0, num_codes, BLOCK):
            scaled = _scaled_logits(logits, row, batch, first + lanes, num_codes, scale, temperature, GUIDED)
            argmax = tl.where(scaled > largest, first + lanes, argmax)
            largest = tl.where(scaled > largest, scaled, largest)
            has_nan |= (scaled != scaled).to(tl.int32)
        top = tl.max(largest, 0)
        if GREEDY:
            code = tl.min(tl.where(largest == top, argmax, _NO_CODE), 0)
            finite = tl.max(has_nan, 0) == 0
        else:
            # Cumulative sums at the end of each block, in code order, so that they never decrease.
            total = tl.zeros((), tl.float64) + 0.0
            ends = tl.full((BLOCKS,), float("inf"), tl.float64)
            for first in range(0, num_codes, BLOCK):
                scaled = _scaled_logits(logits, row, batch, first + lanes, num_codes, scale, temperature, GUIDED)
                total += tl.sum(_weights(scaled, top, WIDE), 0)
                ends = tl.where(numbers == first // BLOCK, total, ends)
            finite = total < float("inf")  # false for NaN
            threshold = tl.load(uniforms + row * length + current) * total
            chosen = tl.min(tl.where((ends > threshold) & (numbers * BLOCK < num_codes), numbers, BLOCKS - 1), 0)
            before = tl.max(tl.where(numbers < chosen, ends, 0.0), 0)
            codes = chosen * BLOCK + lanes
            weights = _weights(_scaled_logits(logits, row, batch, codes, num_codes, scale, temperature, GUIDED), top, WIDE)
            possible = weights > 0
            reached = possible & (before + tl.cumsum(weights, 0) > threshold)
            code = tl.min(tl.where(reached, codes, _NO_CODE), 0)
            # If rounding leaves the block's sum below the threshold, take its last code of nonzero probability.
            code = tl.where(code == _NO_CODE, tl.max(tl.where(possible, codes, 0), 0), code)
        if not finite:
            tl.store(failed + row, 1)
        tl.store(sequences + row * length + current, tl.minimum(code, num_codes - 1).to(tl.int64))


def draw_code(
    logits: Tensor,
    uniforms: Tensor,
    scales: Tensor | None,
    to_draw: Tensor,
    temperature: Tensor,
    greedy: bool,
    position: Tensor,
    sequences: Tensor,
    failed: Tensor,
) -> Tensor:
    """Draw the code at `position` (1,) into `sequences` (B, T), unless `to_draw` is 0 there.

    Args:
        logits: (B, K); under guidance (2 B, K), conditional ones first.
        uniforms: (B, T) float64.
        scales: (T,) float64, guidance scale per position; None: no guidance.
        to_draw: (T,) int32: 0 where the code is kept.
        temperature: (1,) float64.
        greedy: take the likeliest code.
        failed: (B,) int32: set to 1 where a probability is not finite.
    Returns: `sequences`.
    """
    (batch, length), num_codes = sequences.shape, logits.shape[1]
    block = min(2048, max(16, triton.next_power_of_2(num_codes)))
    with torch.cuda.device_of(logits):
        _draw[(batch,)](
            *(logits, uniforms, to_draw if scales is None else scales, to_draw, temperature, position, sequences, failed),
            *(batch, num_codes, length),
            GUIDED=scales is not None,
            GREEDY=greedy,
            WIDE=logits.element_size() > 2,
            BLOCK=block,
            BLOCKS=triton.next_power_of_2(triton.cdiv(num_codes, block)),
            num_warps=8 if block > 1024 else 4,
        )
    return sequences
