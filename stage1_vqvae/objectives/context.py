"""Context network: refines the decoder's output for a pixel by the pixels above and to the left of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.precision import full_precision

_REACH = 3  # pixels to the left, right and upwards


class CausalContext(nn.Module):
    """Refines the decoder's output for a pixel by the 24 earlier pixels of a 4 x 7 window.

    A masked convolution (mask A of van den Oord et al. 2016, "Pixel Recurrent Neural Networks") reads the true earlier pixels in raster
    order; 1x1 convolutions follow. With one convolution of the window a pixel depends on nothing outside it, so sampling and decoding
    need no cache. Initially the identity.

    Args:
        image_shape: channels, height, width.
        output_channels: P, the decoder's output channels.
        width: hidden channels.
    """

    def __init__(self, image_shape: tuple[int, int, int], output_channels: int, width: int) -> None:
        super().__init__()
        channels, *size = image_shape
        self.seen = nn.Conv2d(channels + 1, width, (_REACH + 1, 2 * _REACH + 1))
        self.own = nn.Conv2d(output_channels, width, 1)
        self.position = nn.Parameter(torch.zeros(width, *size))
        self.inner = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, output_channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        mask = torch.ones(_REACH + 1, 2 * _REACH + 1)
        mask[-1, _REACH:] = 0
        self.register_buffer("mask", mask, persistent=False)

    mask: Tensor

    def window(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Compute the rows and columns of the image that the output at `rows` and `columns` depends on."""
        width = self.position.shape[-1]
        return slice(max(0, rows.start - _REACH), rows.stop), slice(max(0, columns.start - _REACH), min(width, columns.stop + _REACH))

    def forward(self, output: Tensor, images: Tensor, rows: slice, columns: slice) -> Tensor:
        """Refine the output at these rows and columns of pixels, (B, P, rows, columns).

        Args:
            output: of the decoder, at these pixels.
            images: (B, C, ..) in [-1, 1], their `window`; pixels later in raster order have no effect.
            rows, columns: positions of the pixels.
        """
        images = images.to(self.position.dtype)
        window_rows, window_columns = self.window(rows, columns)
        left, right = window_columns.start - (columns.start - _REACH), columns.stop + _REACH - window_columns.stop
        above = window_rows.start - (rows.start - _REACH)
        return self._refine(output, _padded(images, (left, right, above, 0)), self.position[:, rows, columns])

    def in_bands(self, output: Tensor, images: Tensor, rows: Tensor) -> Tensor:
        """Refine the output (B, P, R, W) at rows that differ between images.

        Args:
            output: of the decoder, at these rows.
            images: (B, C, H, W) in [-1, 1].
            rows: (B, R), consecutive in each image.
        """
        padded = _padded(images.to(self.position.dtype), (_REACH, _REACH, _REACH, 0))
        above = rows[:, :1] + torch.arange(_REACH, device=rows.device)  # in the padded image all rows lie further down
        position = F.embedding(rows, self.position.movedim(1, 0).flatten(1)).unflatten(2, self.position.shape[::2])
        return self._refine(output, rows_of(padded, torch.cat([above, rows + _REACH], 1)), position.transpose(1, 2))

    def _refine(self, output: Tensor, pixels: Tensor, position: Tensor) -> Tensor:
        """Refine the output by padded pixels, which include a channel of ones, and by a learned vector per position."""
        hidden = F.conv2d(pixels, self.seen.weight * self.mask, self.seen.bias) + self.own(output) + position
        hidden = hidden + self.inner(F.gelu(hidden))
        return full_precision(output) + full_precision(self.out(F.gelu(hidden)))


def _padded(images: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Append a channel of ones, then pad all channels with zeros: the ones mark where there are pixels."""
    return F.pad(torch.cat([images, torch.ones_like(images[:, :1])], 1), padding)


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Gather rows (B, R) of each image of (B, C, H, W): (B, C, R, W)."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
