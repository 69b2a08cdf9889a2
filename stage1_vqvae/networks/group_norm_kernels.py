"""Group normalisation with SiLU as GPU kernels, forward and backward, for maps that are channels last in memory.

What is summed over an image's pixels is summed in two stages without atomics: chunks of pixels, each by one program, then the chunks of a
group. Chunks depend on an image's shape alone, so a result is the same each time, on each GPU, and whatever the image is batched with.
Every kernel sees a map as (B, H W, C). The plain lines in group_norm.py are the fallback and the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a tile, which is some pixels with all their channels: 16 a thread.
_TILE = 2048
# A chunk has at least so many tiles, and an image at most so many chunks.
_TILES, _CHUNKS = 4, 64


@triton.jit
def _moments(x, means, squares, pixels, chunk_pixels, chunks, channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr):
    """Each channel's mean, and its sum of squared differences from it, of a chunk: (B, chunks, C) both.

    Welford's method, each lane of the tile by itself; lanes are combined in the end. Nothing cancels, however far the values are from 0.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    x += (program // chunks) * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    inside = (channel < channels)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    mean = tl.zeros((ROWS, padded), tl.float32)
    square = tl.zeros((ROWS, padded), tl.float32)
    number = 0.0
    for start in range(first, last, ROWS):
        here = (start + lanes < last)[:, None] & inside
        value = tl.load(x + start * channels + offsets, mask=here, other=0.0).to(tl.float32)
        number += 1.0
        away = tl.where(here, value - mean, 0.0)
        mean += away * (1.0 / number)
        square += tl.where(here, away * (value - mean), 0.0)
    # In a chunk that tiles do not fill, the lanes behind its end have seen one value less.
    count = tl.where(lanes < last - first, (last - first - lanes + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    total = (last - first).to(tl.float32)
    of_channel = tl.sum(mean * count, 0) / total
    away = mean - of_channel[None, :]
    square = tl.sum(square + count * away * away, 0)
    place = program * channels + channel
    tl.store(means + place, of_channel, mask=channel < channels)
    tl.store(squares + place, square, mask=channel < channels)


@triton.jit
def _statistics(
    means, squares, mean, rstd, pixels, chunk_pixels, chunks, eps, groups,
    channels: tl.constexpr, width: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of a group of an image, (B, groups) both, by what `_moments` found."""
    program = tl.program_id(0).to(tl.int64)
    chunk, member = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    place = ((program // groups) * chunks + chunk[:, None]) * channels + (program % groups) * width + member[None, :]
    there = (chunk < chunks)[:, None] & (member < width)[None, :]
    count = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels).to(tl.float32)[:, None]
    of_chunk = tl.load(means + place, mask=there, other=0.0)
    square = tl.load(squares + place, mask=there, other=0.0)
    total = pixels * width * 1.0
    of_group = tl.sum(tl.where(there, of_chunk * count, 0.0)) / total
    away = of_chunk - of_group
    variance = tl.sum(tl.where(there, square + count * away * away, 0.0)) / total
    tl.store(mean + program, of_group)
    tl.store(rstd + program, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _normalise(
    x, y, weight, bias, mean, rstd, pixels, chunk_pixels, chunks, groups,
    channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """y of a chunk."""
    program = tl.program_id(0).to(tl.int64)
    image = program // chunks
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    x += image * pixels * channels
    y += image * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    inside = channel < channels
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=inside, other=0.0)[None, :]
    scale = tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    for start in range(first, last, ROWS):
        here = (start + lanes < last)[:, None] & inside[None, :]
        value = tl.load(x + start * channels + offsets, mask=here, other=0.0).to(tl.float32)
        value = (value - centre) * scale * gain + shift
        if silu:
            value = value * tl.sigmoid(value)
        tl.store(y + start * channels + offsets, value.to(y.dtype.element_ty), mask=here)


@triton.jit
def _sums(
    gradient, x, y, weight, bias, mean, rstd, shifts, gains, pixels, chunk_pixels, chunks, groups,
    channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """Each channel's gradient at its bias and at its weight, of a chunk, (B, chunks, C) both; and y of the chunk."""
    program = tl.program_id(0).to(tl.int64)
    image = program // chunks
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    gradient += image * pixels * channels
    x += image * pixels * channels
    y += image * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    inside = channel < channels
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=inside, other=0.0)[None, :]
    scale = tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    of_shift = tl.zeros((ROWS, padded), tl.float32)
    of_gain = tl.zeros((ROWS, padded), tl.float32)
    for start in range(first, last, ROWS):
        here = (start + lanes < last)[:, None] & inside[None, :]
        normed = (tl.load(x + start * channels + offsets, mask=here, other=0.0).to(tl.float32) - centre) * scale
        slope = tl.load(gradient + start * channels + offsets, mask=here, other=0.0).to(tl.float32)
        value = normed * gain + shift
        if silu:
            share = tl.sigmoid(value)
            slope = slope * share * (1.0 + value * (1.0 - share))
            value = value * share
        tl.store(y + start * channels + offsets, value.to(y.dtype.element_ty), mask=here)
        of_shift += slope
        of_gain += slope * normed
    place = program * channels + channel
    tl.store(shifts + place, tl.sum(of_shift, 0), mask=inside)
    tl.store(gains + place, tl.sum(of_gain, 0), mask=inside)


@triton.jit
def _group_sums(
    shifts, gains, weight, image_shifts, image_gains, of_mean, of_deviation, pixels, chunks, groups,
    channels: tl.constexpr, width: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What `_sums` found, added up over an image, (B, C) both; and the means over a group by which the gradient at x is corrected."""
    program = tl.program_id(0).to(tl.int64)
    chunk, member = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    channel = (program % groups) * width + member
    place = ((program // groups) * chunks + chunk[:, None]) * channels + channel[None, :]
    there = (chunk < chunks)[:, None] & (member < width)[None, :]
    shift = tl.sum(tl.load(shifts + place, mask=there, other=0.0), 0)
    gain = tl.sum(tl.load(gains + place, mask=there, other=0.0), 0)
    tl.store(image_shifts + (program // groups) * channels + channel, shift, mask=member < width)
    tl.store(image_gains + (program // groups) * channels + channel, gain, mask=member < width)
    factor = tl.load(weight + channel, mask=member < width, other=0.0).to(tl.float32)
    total = pixels * width * 1.0
    tl.store(of_mean + program, tl.sum(factor * shift) / total)
    tl.store(of_deviation + program, tl.sum(factor * gain) / total)


@triton.jit
def _gradient(
    gradient, x, at_x, weight, bias, mean, rstd, of_mean, of_deviation, pixels, chunk_pixels, chunks, groups,
    channels: tl.constexpr, padded: tl.constexpr, ROWS: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """The gradient at x of a chunk."""
    program = tl.program_id(0).to(tl.int64)
    image = program // chunks
    first = (program % chunks) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    gradient += image * pixels * channels
    x += image * pixels * channels
    at_x += image * pixels * channels
    lanes, channel = tl.arange(0, ROWS), tl.arange(0, padded)
    inside = channel < channels
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    group = image * groups + channel // (channels // groups)
    centre = tl.load(mean + group, mask=inside, other=0.0)[None, :]
    scale = tl.load(rstd + group, mask=inside, other=0.0)[None, :]
    mean_term = tl.load(of_mean + group, mask=inside, other=0.0)[None, :]
    deviation_term = tl.load(of_deviation + group, mask=inside, other=0.0)[None, :]
    offsets = lanes[:, None] * channels + channel[None, :]
    for start in range(first, last, ROWS):
        here = (start + lanes < last)[:, None] & inside[None, :]
        normed = (tl.load(x + start * channels + offsets, mask=here, other=0.0).to(tl.float32) - centre) * scale
        slope = tl.load(gradient + start * channels + offsets, mask=here, other=0.0).to(tl.float32)
        if silu:
            value = normed * gain + shift
            share = tl.sigmoid(value)
            slope = slope * share * (1.0 + value * (1.0 - share))
        found = (slope * gain - mean_term - normed * deviation_term) * scale
        tl.store(at_x + start * channels + offsets, found.to(at_x.dtype.element_ty), mask=here)


class Division:
    """How the programs share out maps of one shape."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.images, self.channels, height, width = x.shape
        self.groups, self.pixels = groups, height * width
        self.padded = triton.next_power_of_2(self.channels)
        self.rows = max(1, _TILE // self.padded)
        """Pixels of a tile."""
        tiles = triton.cdiv(self.pixels, self.rows)
        self.chunk_pixels = self.rows * max(_TILES, triton.cdiv(tiles, _CHUNKS))
        self.chunks = triton.cdiv(self.pixels, self.chunk_pixels)

    @property
    def of_chunk(self) -> tuple[int, int, int]:
        """The arguments of a kernel that works on a chunk."""
        return self.pixels, self.chunk_pixels, self.chunks

    @property
    def tile(self) -> tuple[int, int, int]:
        """The shape of its tiles."""
        return self.channels, self.padded, self.rows

    @property
    def of_group(self) -> tuple[int, int, int, int]:
        """The shape of the tile of a kernel that works on a group of an image."""
        width = self.channels // self.groups
        return self.channels, width, triton.next_power_of_2(self.chunks), triton.next_power_of_2(width)

    def sums(self, x: Tensor) -> Tensor:
        """Room for two figures a channel of each chunk."""
        return x.new_empty(2, self.images * self.chunks, self.channels, dtype=torch.float32)


def launch_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `group_norm`. x: channels last in memory, not float64, not empty."""
    shape = Division(x, groups)
    y, (means, squares) = torch.empty_like(x), shape.sums(x)
    mean, rstd = (x.new_empty(shape.images, groups, dtype=torch.float32) for _ in range(2))
    chunks, groups_of_images = (shape.images * shape.chunks,), (shape.images * groups,)
    with torch.cuda.device_of(x):
        _moments[chunks](x, means, squares, *shape.of_chunk, *shape.tile)
        _statistics[groups_of_images](means, squares, mean, rstd, *shape.of_chunk, eps, groups, *shape.of_group)
        _normalise[chunks](x, y, weight, bias, mean, rstd, *shape.of_chunk, groups, *shape.tile, silu)
    return y, mean, rstd


def launch_group_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `group_norm_backward`. gradient, x: channels last in memory; not float64, not empty."""
    groups = mean.shape[1]
    shape = Division(x, groups)
    y, at_x, (shifts, gains) = torch.empty_like(x), torch.empty_like(x), shape.sums(x)
    of_images = x.new_empty(2, shape.images, shape.channels, dtype=torch.float32)
    of_mean, of_deviation = torch.empty_like(mean), torch.empty_like(rstd)
    chunks, groups_of_images = (shape.images * shape.chunks,), (shape.images * groups,)
    given = (weight, bias, mean, rstd)
    with torch.cuda.device_of(x):
        _sums[chunks](gradient, x, y, *given, shifts, gains, *shape.of_chunk, groups, *shape.tile, silu)
        _group_sums[groups_of_images](
            *(shifts, gains, weight, *of_images, of_mean, of_deviation), *(shape.pixels, shape.chunks, groups), *shape.of_group
        )
        _gradient[chunks](gradient, x, at_x, *given, of_mean, of_deviation, *shape.of_chunk, groups, *shape.tile, silu)
    at_bias, at_weight = (of_image.sum(0) for of_image in of_images)
    return at_x, at_weight.to(weight.dtype), at_bias.to(bias.dtype), y
