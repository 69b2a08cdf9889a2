"""What a pixel's neighbours say about it: a small causal network between the decoder's output and p(x | z)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_vqvae.training.precision import full_precision

_REACH = 3  # pixels to each side and upwards


class CausalContext(nn.Module):
    """Brings what the decoder puts out for a pixel up to date with the 24 pixels above and to the left of it.

    A masked convolution (mask A of van den Oord et al. 2016, "Pixel Recurrent Neural Networks") sees the true pixels that come before
    in raster order; two layers of single pixels follow. Since it is one window deep, one pixel takes no more than that window (`at`),
    and nothing has to be cached. It begins as the identity.

    Args:
        image_shape: channels, height, width.
        output_channels: P, what the decoder puts out for a pixel.
        width: channels of its layers.
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

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        """All pixels at once: (B, P, H, W), as `output`, from images (B, C, H, W) in [-1, 1]."""
        return self._refined(output, self._padded(images, (_REACH, _REACH, _REACH, 0)), self.position)

    def window(self, row: int, column: int) -> tuple[slice, slice]:
        """The rows and columns of the pixels that `at` has to be given."""
        return slice(max(0, row - _REACH), row + 1), slice(max(0, column - _REACH), column + _REACH + 1)

    def at(self, output: Tensor, images: Tensor, row: int, column: int) -> Tensor:
        """One pixel, (B, P, 1, 1), as `forward` has it, from the decoder's output for it and the window's part of the images."""
        (top, _), (left, _) = ((s.start, s.stop) for s in self.window(row, column))
        above, before = _REACH - (row - top), _REACH - (column - left)
        behind = 2 * _REACH + 1 - before - images.shape[-1]
        position = self.position[:, row : row + 1, column : column + 1]
        return self._refined(output, self._padded(images, (before, behind, above, 0)), position)

    def _padded(self, images: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
        """Images with a channel of ones, which is zero where there is no pixel."""
        images = images.to(self.position.dtype)
        return F.pad(torch.cat([images, torch.ones_like(images[:, :1])], 1), sides)

    def _refined(self, output: Tensor, seen: Tensor, position: Tensor) -> Tensor:
        hidden = F.conv2d(seen, self.seen.weight * self.mask, self.seen.bias) + self.own(output) + position
        hidden = hidden + self.inner(F.gelu(hidden))
        return full_precision(output) + full_precision(self.out(F.gelu(hidden)))
