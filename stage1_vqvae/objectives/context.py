"""What a pixel's neighbours say about it: a small causal network between the decoder's output and p(x | z)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.precision import full_precision

_REACH = 3  # pixels to each side and upwards


class CausalContext(nn.Module):
    """Brings what the decoder puts out for a pixel up to date with the 24 pixels above and to the left of it.

    A masked convolution (mask A of van den Oord et al. 2016, "Pixel Recurrent Neural Networks") sees the true pixels that come before
    in raster order; layers of single pixels follow. Since it is one window deep, a pixel takes no more than that window, and nothing
    has to be cached while pixels are drawn or decoded. It begins as the identity.

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

    def window(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """The rows and columns of an image on which those of the output depend."""
        width = self.position.shape[-1]
        return slice(max(0, rows.start - _REACH), rows.stop), slice(max(0, columns.start - _REACH), min(width, columns.stop + _REACH))

    def forward(self, output: Tensor, images: Tensor, rows: slice, columns: slice) -> Tensor:
        """What the decoder puts out for these rows and columns of pixels, (B, P, rows, columns), brought up to date.

        Args:
            output: of those pixels.
            images: (B, C, ..) in [-1, 1], their `window`: of it, what comes after a pixel does not count for it.
            rows, columns: which they are.
        """
        images = images.to(self.position.dtype)
        window_rows, window_columns = self.window(rows, columns)
        before, behind = window_columns.start - (columns.start - _REACH), columns.stop + _REACH - window_columns.stop
        above = window_rows.start - (rows.start - _REACH)
        return self._updated(output, _padded(images, (before, behind, above, 0)), self.position[:, rows, columns])

    def in_bands(self, output: Tensor, images: Tensor, rows: Tensor) -> Tensor:
        """The output of other rows in each image, (B, P, R, W), brought up to date.

        Args:
            output: of those rows.
            images: (B, C, H, W) in [-1, 1], whole.
            rows: (B, R), consecutive in each image.
        """
        seen = _padded(images.to(self.position.dtype), (_REACH, _REACH, _REACH, 0))
        above = rows[:, :1] + torch.arange(_REACH, device=rows.device)  # counted in the padded image, where all rows lie further down
        position = F.embedding(rows, self.position.movedim(1, 0).flatten(1)).unflatten(2, self.position.shape[::2])
        return self._updated(output, rows_of(seen, torch.cat([above, rows + _REACH], 1)), position.transpose(1, 2))

    def _updated(self, output: Tensor, seen: Tensor, position: Tensor) -> Tensor:
        """The output given the pixels seen, a channel of ones among them, and what each position has of its own."""
        hidden = F.conv2d(seen, self.seen.weight * self.mask, self.seen.bias) + self.own(output) + position
        hidden = hidden + self.inner(F.gelu(hidden))
        return full_precision(output) + full_precision(self.out(F.gelu(hidden)))


def _padded(images: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Images with a channel of ones beside theirs, which is zero, as all channels are, where there is no pixel."""
    return F.pad(torch.cat([images, torch.ones_like(images[:, :1])], 1), padding)


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Of each image of (B, C, H, W) its own rows (B, R): (B, C, R, W)."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
