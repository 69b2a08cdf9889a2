"""The contract of objectives: the loss of a decoder's output against an image, and the image that an output represents.

Some are likelihoods: the decoder outputs the parameters of a distribution p(x | z) over images of 8-bit values. Those allow exact bits
per dimension, sampled pixels and lossless compression.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stage1_vqvae.data.splits import Pixels
from stage1_vqvae.objectives.context import CausalContext, rows_of

Index = tuple[slice, int, slice, slice]
"""All images, one channel, rows and columns of pixels."""


class Objective(nn.Module, ABC):
    """Base class. Images are (B, C, H, W) in [-1, 1]; the decoder's output is (B, P, H, W), with P `output_channels`.

    Args:
        image_shape: channels, height, width.
        output_channels: P; None: C.
    """

    def __init__(self, image_shape: tuple[int, int, int], output_channels: int | None = None) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.output_channels = image_shape[0] if output_channels is None else output_channels

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses, `reconstruction` first."""
        return ("reconstruction",)

    @property
    def draws(self) -> bool:
        """Whether `losses` takes a third argument in training: one uniform draw in [0, 1) per image, (B,)."""
        return False

    @abstractmethod
    def losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Compute the losses, by `loss_names`: scalars of float32 or wider, means over pixels and images."""

    @abstractmethod
    def mean_image(self, output: Tensor) -> Tensor:
        """Compute the images of `decode`, (B, C, H, W), about [-1, 1], float32 or wider; not clipped."""

    def check(self, pixels: Pixels) -> None:
        """Check that the objective supports images of these pixels, uint8 (N, H, W, C). Errors: UserError if not."""


class PixelLikelihood(Objective):
    """The objective -log p(x | z), exact for images of 8-bit values.

    A pixel's channels are modelled in sequence. Pixels are independent given z; with a context network (context.py) each also depends on
    the pixels above and to the left, which refine the decoder's output. The context's gradient does not reach the decoder, so the output
    alone remains a likelihood, whose mean is `mean_image`.

    Values of a channel are indices 0 to `num_values` - 1, int64 (B, C, H, W) per batch of images.
    """

    num_values = 256
    """Number of values of a pixel's channel."""

    def __init__(self, image_shape: tuple[int, int, int], output_channels: int, context: int = 0) -> None:
        super().__init__(image_shape, output_channels)
        with torch.random.fork_rng(devices=[]):  # encoder and decoder get the same initial weights with and without it
            self.context = CausalContext(image_shape, output_channels, context) if context else None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """See the contract."""
        return ("reconstruction",) if self.context is None else ("reconstruction", "context")

    def values(self, images: Tensor) -> Tensor:
        """Convert images (B, C, H, W) in [-1, 1] to value indices, int64 of the same shape."""
        return ((images + 1) * ((self.num_values - 1) / 2)).round().long()

    def images(self, values: Tensor) -> Tensor:
        """Convert value indices to images in [-1, 1], float64; the inverse of `values`."""
        return values.double() * (2 / (self.num_values - 1)) - 1

    def values_from_pixels(self, pixels: Tensor) -> Tensor:
        """Convert pixels, uint8 (B, H, W, C), to value indices, int64 (B, C, H, W)."""
        return (pixels // (255 // (self.num_values - 1))).long().movedim(-1, 1)

    def pixels(self, values: Tensor) -> Tensor:
        """Convert value indices to pixels; the inverse of `values_from_pixels`."""
        return (values * (255 // (self.num_values - 1))).to(torch.uint8).movedim(1, -1).contiguous()

    @abstractmethod
    def independent_nats(self, output: Tensor, values: Tensor) -> Tensor:
        """Compute -log p per image, (B,) in nats, float32 or wider, with pixels independent given `output`."""

    @abstractmethod
    def channel_probabilities(self, output: Tensor, values: Tensor, channel: int) -> Tensor:
        """Compute p(value of the channel | output, values of earlier channels), (B, H, W, V); of `values` only those are read."""

    def nats(self, output: Tensor, values: Tensor) -> Tensor:
        """Compute -log p(x | z) per image, (B,) in nats, float32 or wider."""
        _, height, width = self.image_shape
        return self.independent_nats(self._in_context(output, values, slice(0, height), slice(0, width)), values)

    def _in_context(self, output: Tensor, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """Select the output at these rows and columns, refined by the context, if any, from the values before each pixel."""
        selected = output[..., rows, columns]
        if self.context is None:
            return selected
        window_rows, window_columns = self.context.window(rows, columns)
        return self.context(selected, self.images(values[..., window_rows, window_columns]), rows, columns)

    @property
    def draws(self) -> bool:
        """Whether `losses` draws the rows that the context trains on."""
        return self.context is not None

    def losses(self, output: Tensor, images: Tensor, uniform: Tensor | None = None) -> dict[str, Tensor]:
        """See the contract. In nats per dimension: `reconstruction` with independent pixels, `context` with the context network.

        Args:
            output: the decoder's, (B, P, H, W).
            images: (B, C, H, W) in [-1, 1].
            uniform: (B,) in [0, 1), by which one band of rows per image is drawn, a quarter or less, for the context to train on: all
                rows would double a step's time, and pixels of one image teach much the same. None: all rows.
        """
        values, dimensions = self.values(images), images[0].numel()
        losses = {"reconstruction": self.independent_nats(output, values).mean() / dimensions}
        if self.context is not None:
            output, bands = output.detach(), 1
            if uniform is None:
                _, height, width = self.image_shape
                refined = self._in_context(output, values, slice(0, height), slice(0, width))
            else:
                bands, rows = self._bands(uniform)
                refined = self.context.in_bands(rows_of(output, rows), self.images(values), rows)
                values = rows_of(values, rows)
            losses["context"] = self.independent_nats(refined, values).mean() * bands / dimensions
        return losses

    def _bands(self, uniform: Tensor) -> tuple[int, Tensor]:
        """Choose the number of equal bands per image (four, or the next divisor of the height), and the rows (B, R) of the drawn ones."""
        height = self.image_shape[1]
        bands = next(count for count in range(min(4, height), height + 1) if height % count == 0)
        size = height // bands
        first = (uniform * bands).long().clamp(max=bands - 1) * size
        return bands, first[:, None] + torch.arange(size, device=uniform.device)

    @property
    def pixels_per_turn(self) -> int:
        """Pixels per step of `sequential_probabilities`."""
        _, height, width = self.image_shape
        return height * width if self.context is None else 1

    def sequential_probabilities(self, output: Tensor, values: Tensor) -> Iterator[tuple[Index, Tensor]]:
        """Yield the conditional distributions of an image's values in the order in which they are sampled or decoded.

        Channel by channel, for all pixels at once; with a context pixel by pixel. Each item is the index in `values` and p(value | z,
        earlier values), (B, rows, columns, V). Only earlier values are read: the caller fills in each value before the next item.
        """
        channels, height, width = self.image_shape
        blocks: list[tuple[slice, slice]] = [(slice(0, height), slice(0, width))]
        if self.context is not None:
            blocks = [(slice(row, row + 1), slice(column, column + 1)) for row in range(height) for column in range(width)]
        for rows, columns in blocks:
            refined = self._in_context(output, values, rows, columns)
            for channel in range(channels):
                probabilities = self.channel_probabilities(refined, values[..., rows, columns], channel)
                yield (slice(None), channel, rows, columns), probabilities

    def sample(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Sample images (B, C, H, W) in [-1, 1] from p(x | z), by inverse transform of uniforms in [0, 1) of the same shape."""
        values = torch.zeros(uniform.shape, dtype=torch.int64, device=output.device)
        for index, probabilities in self.sequential_probabilities(output, values):
            cumulative = probabilities.cumsum(-1)
            threshold = uniform[index][..., None].to(cumulative) * cumulative[..., -1:]
            drawn = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
            values[index] = drawn.clamp_(max=self.num_values - 1)
        return self.images(values).to(torch.promote_types(output.dtype, torch.float32))
