"""Group normalisation with SiLU as Triton kernels, forward and backward, for channels-last feature maps.

Sums over an image's pixels take two stages without atomics: each program sums one chunk of pixels, then one program per group sums the
chunks. Chunk sizes depend on the image's shape only, so results are deterministic, and equal on every GPU and in every batch. All kernels
index a feature map as (B, H W, C). The PyTorch versions in group_norm.py are the fallback and the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values per tile, which covers some pixels with all their channels: 16 per thread.
_TILE = 2048
# Minimum tiles per chunk, maximum chunks per image.
_TILES, _CHUNKS = 4, 64


@triton.jit
def _moments(x, means, squares, pixels, chunk_pixels, chunks, channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr):
    """Mean and sum of squared deviations of each channel of a chunk, (B, chunks, C) each.

    Welford's method per lane of the tile; lanes are merged at the end. No cancellation, however far the values are from 0.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    x += (program // chunks) * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    valid = (channel < channels)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    mean = tl.zeros((ROWS, padded), tl.float32)
    square = tl.zeros((ROWS, padded), tl.float32)
    number = 0.0
    for start in range(first, last, ROWS):
        mask = (start + lanes < last)[:, None] & valid
        value = tl.load(x + start * channels + offsets, mask=mask, other=0.0).to(tl.float32)
        number += 1.0
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation * (1.0 / number)
        square += tl.where(mask, deviation * (value - mean), 0.0)
    # In a chunk whose last tile is partial, lanes past its end have accumulated one value less.
    count = tl.where(lanes < last - first, (last - first - lanes + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    total = (last - first).to(tl.float32)
    channel_mean = tl.sum(mean * count, 0) / total
    deviation = mean - channel_mean[None, :]
    square = tl.sum(square + count * deviation * deviation, 0)
    target = program * channels + channel
    tl.store(means + target, channel_mean, mask=channel < channels)
    tl.store(squares + target, square, mask=channel < channels)


@triton.jit
def _statistics(
    means, squares, mean, rstd, pixels, chunk_pixels, chunks, eps, groups,
    channels: tl.constexpr, width: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of `_moments` into each group's mean and reciprocal standard deviation, (B, groups) each."""
    program = tl.program_id(0).to(tl.int64)
    chunk, member = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    source = ((program // groups) * chunks + chunk[:, None]) * channels + (program % groups) * width + member[None, :]
    mask = (chunk < chunks)[:, None] & (member < width)[None, :]
    count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float32)[:, None]
    chunk_mean = tl.load(means + source, mask=mask, other=0.0)
    square = tl.load(squares + source, mask=mask, other=0.0)
    total = pixels * width * 1.0
    group_mean = tl.sum(tl.where(mask, chunk_mean * count, 0.0)) / total
    deviation = chunk_mean - group_mean
    variance = tl.sum(tl.where(mask, square + count * deviation * deviation, 0.0)) / total
    tl.store(mean + program, group_mean)
    tl.store(rstd + program, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _normalise(
    x, y, weight, bias, mean, rstd, pixels, chunk_pixels, chunks, groups,
    channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """Normalise a chunk, then apply SiLU."""
    program = tl.program_id(0).to(tl.int64)
    image = program // chunks
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    x += image * pixels * channels
    y += image * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    valid = channel < channels
    gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=valid, other=0.0)[None, :]
    scale = tl.load(rstd + group, mask=valid, other=0.0)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    for start in range(first, last, ROWS):
        mask = (start + lanes < last)[:, None] & valid[None, :]
        value = tl.load(x + start * channels + offsets, mask=mask, other=0.0).to(tl.float32)
        value = (value - centre) * scale * gain + shift
        if silu:
            value = value * tl.sigmoid(value)
        tl.store(y + start * channels + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    gradient, x, y, weight, bias, mean, rstd, shifts, gains, pixels, chunk_pixels, chunks, groups,
    channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """Bias and weight gradients of each channel of a chunk, (B, chunks, C) each; and the chunk's y."""
    program = tl.program_id(0).to(tl.int64)
    image = program // chunks
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    gradient += image * pixels * channels
    x += image * pixels * channels
    y += image * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    valid = channel < channels
    gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=valid, other=0.0)[None, :]
    scale = tl.load(rstd + group, mask=valid, other=0.0)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    shift_sum = tl.zeros((ROWS, padded), tl.float32)
    gain_sum = tl.zeros((ROWS, padded), tl.float32)
    for start in range(first, last, ROWS):
        mask = (start + lanes < last)[:, None] & valid[None, :]
        normed = (tl.load(x + start * channels + offsets, mask=mask, other=0.0).to(tl.float32) - centre) * scale
        grad = tl.load(gradient + start * channels + offsets, mask=mask, other=0.0).to(tl.float32)
        value = normed * gain + shift
        if silu:
            sigmoid = tl.sigmoid(value)
            grad = grad * sigmoid * (1.0 + value * (1.0 - sigmoid))
            value = value * sigmoid
        tl.store(y + start * channels + offsets, value.to(y.dtype.element_ty), mask=mask)
        shift_sum += grad
        gain_sum += grad * normed
    target = program * channels + channel
    tl.store(shifts + target, tl.sum(shift_sum, 0), mask=valid)
    tl.store(gains + target, tl.sum(gain_sum, 0), mask=valid)


@triton.jit
def _group_sums(
    shifts, gains, weight, image_shifts, image_gains, mean_terms, deviation_terms, pixels, chunks, groups,
    channels: tl.constexpr, width: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum the chunks of `_sums` over an image, (B, C) each; and the two group means that the gradient at x subtracts."""
    program = tl.program_id(0).to(tl.int64)
    chunk, member = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    channel = (program % groups) * width + member
    source = ((program // groups) * chunks + chunk[:, None]) * channels + channel[None, :]
    mask = (chunk < chunks)[:, None] & (member < width)[None, :]
    shift = tl.sum(tl.load(shifts + source, mask=mask, other=0.0), 0)
    gain = tl.sum(tl.load(gains + source, mask=mask, other=0.0), 0)
    tl.store(image_shifts + (program // groups) * channels + channel, shift, mask=member < width)
    tl.store(image_gains + (program // groups) * channels + channel, gain, mask=member < width)
    factor = tl.load(weight + channel, mask=member < width, other=0.0).to(tl.float32)
    total = pixels * width * 1.0
    tl.store(mean_terms + program, tl.sum(factor * shift) / total)
    tl.store(deviation_terms + program, tl.sum(factor * gain) / total)


@triton.jit
def _gradient(
    gradient, x, grad_x, weight, bias, mean, rstd, mean_terms, deviation_terms, pixels, chunk_pixels, chunks, groups,
    channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """Gradient at x of a chunk."""
    program = tl.program_id(0).to(tl.int64)
    image = program // chunks
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    gradient += image * pixels * channels
    x += image * pixels * channels
    grad_x += image * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    valid = channel < channels
    gain = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=valid, other=0.0)[None, :]
    scale = tl.load(rstd + group, mask=valid, other=0.0)[None, :]
    mean_term = tl.load(mean_terms + group, mask=valid, other=0.0)[None, :]
    deviation_term = tl.load(deviation_terms + group, mask=valid, other=0.0)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    for start in range(first, last, ROWS):
        mask = (start + lanes < last)[:, None] & valid[None, :]
        normed = (tl.load(x + start * channels + offsets, mask=mask, other=0.0).to(tl.float32) - centre) * scale
        grad = tl.load(gradient + start * channels + offsets, mask=mask, other=0.0).to(tl.float32)
        if silu:
            value = normed * gain + shift
            sigmoid = tl.sigmoid(value)
            grad = grad * sigmoid * (1.0 + value * (1.0 - sigmoid))
        result = (grad * gain - mean_term - normed * deviation_term) * scale
        tl.store(grad_x + start * channels + offsets, result.to(grad_x.dtype.element_ty), mask=mask)


class Partition:
    """Partition of feature maps of one shape into chunks and tiles."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.images, self.channels, height, width = x.shape
        self.groups, self.pixels = groups, height * width
        self.padded = triton.next_power_of_2(self.channels)
        self.rows = max(1, _TILE // self.padded)
        """Pixels per tile."""
        tiles = triton.cdiv(self.pixels, self.rows)
        self.chunk_pixels = self.rows * max(_TILES, triton.cdiv(tiles, _CHUNKS))
        self.chunks = triton.cdiv(self.pixels, self.chunk_pixels)

    @property
    def chunk_sizes(self) -> tuple[int, int, int]:
        """Pixels per image, pixels per chunk, chunks per image."""
        return self.pixels, self.chunk_pixels, self.chunks

    @property
    def tile(self) -> tuple[int, int, int]:
        """Compile-time constants of the per-chunk kernels: channels, channels padded to a power of two, pixels per tile."""
        return self.channels, self.padded, self.rows

    @property
    def group_tile(self) -> tuple[int, int, int, int]:
        """Compile-time constants of the per-group kernels: channels, channels per group, and chunks and channels per group, padded."""
        width = self.channels // self.groups
        return self.channels, width, triton.next_power_of_2(self.chunks), triton.next_power_of_2(width)

    def buffers(self, x: Tensor) -> Tensor:
        """Two float32 buffers (B chunks, C), uninitialised."""
        return x.new_empty(2, self.images * self.chunks, self.channels, dtype=torch.float32)


def launch_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `group_norm`. x: channels last in memory, not float64, not empty."""
    partition = Partition(x, groups)
    y, (means, squares) = torch.empty_like(x), partition.buffers(x)
    mean, rstd = (x.new_empty(partition.images, groups, dtype=torch.float32) for _ in range(2))
    chunks, groups_of_images = (partition.images * partition.chunks,), (partition.images * groups,)
    with torch.cuda.device_of(x):
        _moments[chunks](x, means, squares, *partition.chunk_sizes, *partition.tile)
        _statistics[groups_of_images](means, squares, mean, rstd, *partition.chunk_sizes, eps, groups, *partition.group_tile)
        _normalise[chunks](x, y, weight, bias, mean, rstd, *partition.chunk_sizes, groups, *partition.tile, silu)
    return y, mean, rstd


def launch_group_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `group_norm_backward`. gradient, x: channels last in memory; not float64, not empty."""
    groups = mean.shape[1]
    partition = Partition(x, groups)
    y, grad_x, (shifts, gains) = torch.empty_like(x), torch.empty_like(x), partition.buffers(x)
    image_sums = x.new_empty(2, partition.images, partition.channels, dtype=torch.float32)
    mean_terms, deviation_terms = torch.empty_like(mean), torch.empty_like(rstd)
    chunks, groups_of_images = (partition.images * partition.chunks,), (partition.images * groups,)
    parameters = (weight, bias, mean, rstd)
    with torch.cuda.device_of(x):
        _sums[chunks](gradient, x, y, *parameters, shifts, gains, *partition.chunk_sizes, groups, *partition.tile, silu)
        _group_sums[groups_of_images](
            *(shifts, gains, weight, *image_sums, mean_terms, deviation_terms),
            *(partition.pixels, partition.chunks, groups),
            *partition.group_tile,
        )
        _gradient[chunks](
            gradient, x, grad_x, *parameters, mean_terms, deviation_terms, *partition.chunk_sizes, groups, *partition.tile, silu
        )
    grad_bias, grad_weight = (image_sum.sum(0) for image_sum in image_sums)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), y
