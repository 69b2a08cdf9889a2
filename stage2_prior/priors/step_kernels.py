"""GPU kernels of a sampling step, in Triton: embedding, attention to the cache, and the MLP's gated product.

The plain lines beside their callers (transformer.py, attention.py) are their fallback and their reference. The position is read from device
memory, so that one CUDA graph serves all positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_EPSILON = tl.constexpr(1e-5)  # torch's, of layer normalisation


@triton.jit
def _embed(
    sequences,  # (B, T)
    offsets,  # (T,)
    tokens,  # (all levels' codes, C)
    start,  # (C,)
    classes,  # (labels, C)
    labels,  # (R,)
    positions,  # (T, C)
    above,  # (R, T, C), or anything
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
    here = tl.load(position)
    channels = tl.arange(0, PADDED)
    inside = channels < width
    if here == 0:
        x = tl.load(start + channels, mask=inside, other=0.0).to(tl.float32)
    else:
        token = tl.load(sequences + (row % batch) * stride + here - 1) + tl.load(offsets + here - 1)
        x = tl.load(tokens + token * width + channels, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(classes + tl.load(labels + row) * width + channels, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(positions + here * width + channels, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        x += tl.load(above + (row * length + here) * width + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(embedded + row * width + channels, x.to(embedded.dtype.element_ty), mask=inside)


@triton.jit
def _turned(start, cosine, sine, pairs, inside, width: tl.constexpr):
    """The head (d,) at `start`, normalised, its pairs turned."""
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
    rotations,  # (T, d / 2, 2)
    keys,  # (R, heads, T, d)
    values,  # (R, heads, T, d)
    position,  # (1,)
    attended,  # (R, heads, d)
    length,
    scale,
    width: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    here = tl.load(position).to(tl.int32)
    pairs, channels, slots = tl.arange(0, HALF), tl.arange(0, 2 * HALF), tl.arange(0, BLOCK)
    inside, filled = pairs < width // 2, channels < width
    cosine = tl.load(rotations + here * width + 2 * pairs, mask=inside, other=0.0)
    sine = tl.load(rotations + here * width + 2 * pairs + 1, mask=inside, other=0.0)
    start = projected + (row * 3 * heads + head) * width
    query = _turned(start, cosine, sine, pairs, inside, width) * scale
    # What the cache holds, and what is attended to here, are of one rounding.
    key = _turned(start + heads * width, cosine, sine, pairs, inside, width).to(keys.dtype.element_ty)
    value = tl.load(start + 2 * heads * width + channels, mask=filled, other=0.0)
    cache = (row * heads + head) * length * width
    tl.store(keys + cache + here * width + channels, key, mask=filled)
    tl.store(values + cache + here * width + channels, value, mask=filled)
    own = tl.sum(query * key.to(tl.float32), 0)
    # Each slot of a block has a softmax of its own, of every BLOCK-th position; they are joined once, at the end. So a block of the cache
    # costs no exchange between threads but that of its scores. Only what is filled is read: the rest may hold anything, even NaN.
    largest = tl.zeros((BLOCK,), tl.float32) + own
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, 2 * HALF), tl.float32)
    for first in tl.range(0, here, BLOCK, num_stages=2):
        before = first + slots < here
        there = cache + (first + slots)[:, None] * width + channels[None, :]
        read = before[:, None] & filled[None, :]
        of_keys = tl.load(keys + there, mask=read, other=0.0).to(tl.float32)
        of_values = tl.load(values + there, mask=read, other=0.0).to(tl.float32)
        scores = tl.where(before, tl.sum(of_keys * query[None, :], 1), float("-inf"))
        larger = tl.maximum(largest, scores)
        weights, shrunk = tl.exp(scores - larger), tl.exp(largest - larger)
        total = total * shrunk + weights
        mixed = mixed * shrunk[:, None] + weights[:, None] * of_values
        largest = larger
    top = tl.max(largest, 0)
    shrunk, alone = tl.exp(largest - top), tl.exp(own - top)
    found = tl.sum(mixed * shrunk[:, None], 0) + alone * value.to(tl.float32)
    found = found / (tl.sum(total * shrunk, 0) + alone)
    tl.store(attended + (row * heads + head) * width + channels, found.to(attended.dtype.element_ty), mask=filled)


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
        here = (rows < count)[:, None] & (channels < width)[None, :]
        there = (columns < outputs)[None, :] & (channels < width)[:, None]
        part = tl.load(x + rows[:, None] * width + channels[None, :], mask=here, other=0.0)
        weights = columns[None, :] * width + channels[:, None]
        gated = tl.dot(part, tl.load(gate + weights, mask=there, other=0.0), gated)
        raised = tl.dot(part, tl.load(up + weights, mask=there, other=0.0), raised)
    found = gated / (1 + tl.exp(-gated)) * raised
    here = (rows < count)[:, None] & (columns < outputs)[None, :]
    tl.store(hidden + rows[:, None] * outputs + columns[None, :], found.to(hidden.dtype.element_ty), mask=here)


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
    """What goes into the first layer at a position, (R, C): see `TransformerSteps`, whose tensors these are.

    Args:
        sequences: (B, T) int64, of which R is a multiple: row r reads sequence r mod B.
        offsets: (T,) int64: what makes a token of each position's code.
        tokens, start, classes, positions: the embeddings, (codes, C), (C,), (labels, C), (T, C).
        labels: (R,) int64.
        above: (R, T, C), added if there are levels above.
        position: (1,) int64.
    """
    rows, width = len(labels), tokens.shape[1]
    embedded = tokens.new_empty(rows, width)
    given = embedded if above is None else above
    with torch.cuda.device_of(tokens):
        _embed[(rows,)](
            *(sequences, offsets, tokens, start, classes, labels, positions, given, position, embedded),
            *(len(sequences), sequences.stride(0), len(positions), width),
            GIVEN=above is not None,
            PADDED=triton.next_power_of_2(width),
        )
    return embedded


def attend(projected: Tensor, rotations: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """`CachedAttention.attend` at a position (1,): (R, C) of the projected (R, 3 C); key and value go into the caches (R, heads, T, d)."""
    rows, heads, length, width = keys.shape
    attended = projected.new_empty(rows, heads * width)
    half = triton.next_power_of_2(width // 2)
    block = 32 if half <= 32 else 16
    with torch.cuda.device_of(keys):
        _attend[(rows, heads)](
            *(projected, rotations, keys, values, position, attended, length, width**-0.5),
            width=width,
            HALF=half,
            BLOCK=block,
            # 16 numbers of the keys a thread.
            num_warps=max(1, min(8, block * half // 256)),
        )
    return attended


def gate(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """silu(gate x) * (up x), (R, H) of (R, C), with both products in one pass over x."""
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
            # Three times 32 KiB fit into the shared memory of every GPU that has bf16.
            num_stages=3,
        )
    return hidden
