"""Triton kernels of a sampling step: embedding, attention over the cache, and the MLP's gated product.

The PyTorch operators beside their calls in transformer.py and attention.py are their fallback and reference. The position is read from
device memory, so that one CUDA graph serves all positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_EPSILON = tl.constexpr(1e-5)  # torch's default for layer normalisation


@triton.jit
def _embed(
    sequences,  # (B, T)
    offsets,  # (T,)
    tokens,  # (all levels' codes, C)
    start,  # (C,)
    classes,  # (labels, C)
    labels,  # (R,)
    positions,  # (T, C)
    above,  # (R, T, C); unused unless GIVEN
    position,  # (1,)
    embedded,  # (R, C)
    batch,
    stride,
    length,
    width,
    GIVEN: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    current = tl.load(position)
    channels = tl.arange(0, PADDED)
    inside = channels < width
    if current == 0:
        x = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
    else:
        token = tl.load(sequences + (row % batch) * stride + current - 1) + tl.load(offsets + current - 1)
        x = tl.load(tokens + token * width + channels, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(classes + tl.load(labels + row) * width + channels, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(positions + current * width + channels, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        x += tl.load(above + (row * length + current) * width + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(embedded + row * width + channels, x.to(embedded.dtype.element_ty), mask=inside)


@triton.jit
def _rotated_head(start, cosine, sine, pairs, inside, width: tl.constexpr):
    """Layer-normalised, rotated head (d,) loaded from `start`."""
    even = tl.load(start + 2 * pairs, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(start + 2 * pairs + 1, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(even + odd, 0) / width
    even = tl.where(inside, even - mean, 0.0)
    odd = tl.where(inside, odd - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(even * even + odd * odd, 0) / width + _EPSILON)
    even, odd = even * scale, odd * scale
    return tl.interleave(even * cosine - odd * sine, even * sine + odd * cosine)


@triton.jit
def _attend(
    projected,  # (R, 3, heads, d)
    rotations,  # (T, TABLES, d / 2, 2): of queries, and of keys if they have their own
    keys,  # (R, heads, T, d)
    values,  # (R, heads, T, d)
    position,  # (1,)
    gains,  # (heads,); unused unless GAINED
    attended,  # (R, heads, d)
    length,
    scale,
    width: tl.constexpr,
    GAINED: tl.constexpr,
    TABLES: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    current = tl.load(position).to(tl.int32)
    pairs, channels, slots = tl.arange(0, HALF), tl.arange(0, 2 * HALF), tl.arange(0, BLOCK)
    inside, filled = pairs < width // 2, channels < width
    angles = rotations + current * TABLES * width + 2 * pairs
    cosine, sine = tl.load(angles, mask=inside, other=0.0), tl.load(angles + 1, mask=inside, other=0.0)
    start = projected + (row * 3 * heads + head) * width
    query = _rotated_head(start, cosine, sine, pairs, inside, width) * scale
    if GAINED:
        query *= tl.load(gains + head).to(tl.float32)
    if TABLES == 2:
        cosine, sine = tl.load(angles + width, mask=inside, other=0.0), tl.load(angles + width + 1, mask=inside, other=0.0)
    # Attend to the key as it is rounded in the cache.
    key = _rotated_head(start + heads * width, cosine, sine, pairs, inside, width).to(keys.dtype.element_ty)
    value = tl.load(start + 2 * heads * width + channels, mask=filled, other=0.0)
    cache = (row * heads + head) * length * width
    tl.store(keys + cache + current * width + channels, key, mask=filled)
    tl.store(values + cache + current * width + channels, value, mask=filled)
    current_score = tl.sum(query * key.to(tl.float32), 0)
    # Each slot of a block runs an online softmax over every BLOCK-th position, and the slots are merged once, at the end. So a block needs
    # no reduction across threads except for its scores. Only filled slots are read: the others may hold anything, even NaN.
    largest = tl.zeros((BLOCK,), tl.float32) + current_score
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, 2 * HALF), tl.float32)
    for first in tl.range(0, current, BLOCK, num_stages=2):
        before = first + slots < current
        offsets = cache + (first + slots)[:, None] * width + channels[None, :]
        mask = before[:, None] & filled[None, :]
        block_keys = tl.load(keys + offsets, mask=mask, other=0.0).to(tl.float32)
        block_values = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(before, tl.sum(block_keys * query[None, :], 1), float("-inf"))
        larger = tl.maximum(largest, scores)
        weights, rescale = tl.exp(scores - larger), tl.exp(largest - larger)
        total = total * rescale + weights
        mixed = mixed * rescale[:, None] + weights[:, None] * block_values
        largest = larger
    top = tl.max(largest, 0)
    rescale, current_weight = tl.exp(largest - top), tl.exp(current_score - top)
    result = tl.sum(mixed * rescale[:, None], 0) + current_weight * value.to(tl.float32)
    result = result / (tl.sum(total * rescale, 0) + current_weight)
    tl.store(attended + (row * heads + head) * width + channels, result.to(attended.dtype.element_ty), mask=filled)


@triton.jit
def _gate(
    x,  # (R, C)
    gate,  # (H, C)
    up,  # (H, C)
    hidden,  # (R, H)
    count,
    outputs,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gated, raised = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, DEPTH):
        channels = first + tl.arange(0, DEPTH)
        x_mask = (rows < count)[:, None] & (channels < width)[None, :]
        weight_mask = (columns < outputs)[None, :] & (channels < width)[:, None]
        x_block = tl.load(x + rows[:, None] * width + channels[None, :], mask=x_mask, other=0.0)
        offsets = columns[None, :] * width + channels[:, None]
        gated = tl.dot(x_block, tl.load(gate + offsets, mask=weight_mask, other=0.0), gated)
        raised = tl.dot(x_block, tl.load(up + offsets, mask=weight_mask, other=0.0), raised)
    result = gated / (1 + tl.exp(-gated)) * raised
    mask = (rows < count)[:, None] & (columns < outputs)[None, :]
    tl.store(hidden + rows[:, None] * outputs + columns[None, :], result.to(hidden.dtype.element_ty), mask=mask)


def embed(
    sequences: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    start: Tensor,
    classes: Tensor,
    labels: Tensor,
    positions: Tensor,
    above: Tensor | None,
    position: Tensor,
) -> Tensor:
    """Input of the first layer at a position, (R, C); see `TransformerSteps`.

    Args:
        sequences: (B, T) int64 codes; R is a multiple of B, and row r reads sequence r mod B.
        offsets: (T,) int64, token minus code at each position.
        tokens, start, classes, positions: embeddings, (tokens, C), (C,), (labels, C), (T, C).
        labels: (R,) int64.
        above: (R, T, C) features of the levels above; None: there are none.
        position: (1,) int64.
    """
    rows, width = len(labels), tokens.shape[1]
    embedded = tokens.new_empty(rows, width)
    above_or_unused = embedded if above is None else above
    with torch.cuda.device_of(tokens):
        _embed[(rows,)](
            *(sequences, offsets, tokens, start, classes, labels, positions, above_or_unused, position, embedded),
            *(len(sequences), sequences.stride(0), len(positions), width),
            GIVEN=above is not None,
            PADDED=triton.next_power_of_2(width),
        )
    return embedded


def attend(projected: Tensor, rotations: Tensor, keys: Tensor, values: Tensor, position: Tensor, gains: Tensor | None = None) -> Tensor:
    """Attend from a position (1,): projected (R, 3 C) to (R, C); writes its key and value to the caches (R, heads, T, d).

    `rotations`: float32 (T, d / 2, 2), or (T, 2, d / 2, 2) of queries and keys apart. `gains`: (heads,) factors of the heads' logits;
    None: 1.
    """
    rows, heads, length, width = keys.shape
    attended = projected.new_empty(rows, heads * width)
    half = triton.next_power_of_2(width // 2)
    block = 32 if half <= 32 else 16
    with torch.cuda.device_of(keys):
        _attend[(rows, heads)](
            *(projected, rotations, keys, values, position, attended if gains is None else gains, attended, length, width**-0.5),
            width=width,
            GAINED=gains is not None,
            TABLES=rotations.ndim - 2,
            HALF=half,
            BLOCK=block,
            # 16 key elements per thread.
            num_warps=max(1, min(8, block * half // 256)),
        )
    return attended


def gate(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """silu(gate x) * (up x), (R, C) to (R, H), both products in one pass over x."""
    (count, width), outputs = x.shape, len(gate_weight)
    hidden = x.new_empty(count, outputs)
    rows = min(128, max(16, triton.next_power_of_2(count)))
    with torch.cuda.device_of(x):
        _gate[(triton.cdiv(count, rows), triton.cdiv(outputs, 64))](
            *(x, gate_weight, up_weight, hidden, count, outputs, width),
            ROWS=rows,
            COLUMNS=64,
            DEPTH=64,
            num_warps=8 if rows == 128 else 4,
            # 3 stages of 32 KiB fit the shared memory of every GPU with bf16.
            num_stages=3,
        )
    return hidden
