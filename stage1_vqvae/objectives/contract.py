"""What every objective is: how what the decoder puts out is judged against an image, and what image it means.

Some are likelihoods: what the decoder puts out are the parameters of a distribution over images of 8-bit values, p(x | z). Those
give honest bits, pixels drawn from them, and lossless compression.
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
    """The contract. Images are (B, C, H, W) in [-1, 1]; what the decoder puts out has P channels, `output_channels`, in place of C.

    Args:
        image_shape: channels, height, width.
        output_channels: None: C.
    """

    def __init__(self, image_shape: tuple[int, int, int], output_channels: int | None = None) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.output_channels = image_shape[0] if output_channels is None else output_channels

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of its losses, `reconstruction` first."""
        return ("reconstruction",)

    @property
    def draws(self) -> bool:
        """Whether training gives `losses` a third argument: a number (B,) in [0, 1) for each image, to draw by."""
        return False

    @abstractmethod
    def losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """What training lowers the sum of, by `loss_names`: scalars of float32 or wider, means over pixels and images."""

    @abstractmethod
    def mean_image(self, output: Tensor) -> Tensor:
        """The image that `decode` shows, (B, C, H, W), about [-1, 1], float32 or wider; not clipped."""

    def check(self, pixels: Pixels) -> None:
        """Errors: UserError if it cannot judge images of such pixels, uint8 (N, H, W, C)."""


class PixelLikelihood(Objective):
    """An objective that is -log p(x | z), exact for images of 8-bit values.

    A pixel's channels are taken one after another. Given z pixels are independent; with a context of some width each depends on those
    above and to the left of it too, through a network (context.py) that brings the decoder's output up to date with them. No gradient
    of it reaches the decoder: what the output means by itself stays a likelihood, and is what `mean_image` shows.

    The values of a channel are the indices 0 to `num_values` - 1, int64 (B, C, H, W) for an image.
    """

    num_values = 256
    """How many values a channel of a pixel can have."""

    def __init__(self, image_shape: tuple[int, int, int], output_channels: int, context: int = 0) -> None:
        super().__init__(image_shape, output_channels)
        with torch.random.fork_rng(devices=[]):  # encoder and decoder begin as they do without it
            self.context = CausalContext(image_shape, output_channels, context) if context else None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """See the contract."""
        return ("reconstruction",) if self.context is None else ("reconstruction", "context")

    def values(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to the indices of their values, int64 of the same shape."""
        return ((images + 1) * ((self.num_values - 1) / 2)).round().long()

    def images(self, values: Tensor) -> Tensor:
        """The inverse of `values`, float64."""
        return values.double() * (2 / (self.num_values - 1)) - 1

    def values_from_pixels(self, pixels: Tensor) -> Tensor:
        """The values, int64 (B, C, H, W), of a picture's pixels, uint8 (B, H, W, C)."""
        return (pixels // (255 // (self.num_values - 1))).long().movedim(-1, 1)

    def pixels(self, values: Tensor) -> Tensor:
        """The inverse of `values_from_pixels`."""
        return (values * (255 // (self.num_values - 1))).to(torch.uint8).movedim(1, -1).contiguous()

    @abstractmethod
    def independent_nats(self, output: Tensor, values: Tensor) -> Tensor:
        """-log p of each image, (B,) in nats, float32 or wider, if pixels are independent given `output`."""

    @abstractmethod
    def channel_probabilities(self, output: Tensor, values: Tensor, channel: int) -> Tensor:
        """p(value of the channel | output, values of the channels before it), (B, H, W, V): of `values` those channels alone count."""

    def nats(self, output: Tensor, values: Tensor) -> Tensor:
        """-log p(x | z) of each image, (B,) in nats, float32 or wider."""
        _, height, width = self.image_shape
        return self.independent_nats(self._in_context(output, values, slice(0, height), slice(0, width)), values)

    def _in_context(self, output: Tensor, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """The output for those rows and columns of pixels, brought up to date with the values before each, if there is a context."""
        here = output[..., rows, columns]
        if self.context is None:
            return here
        above, beside = self.context.window(rows, columns)
        return self.context(here, self.images(values[..., above, beside]), rows, columns)

    @property
    def draws(self) -> bool:
        """Whether `losses` draws what the context learns from."""
        return self.context is not None

    def losses(self, output: Tensor, images: Tensor, uniform: Tensor | None = None) -> dict[str, Tensor]:
        """See the contract: in nats a dimension, -log p(x | z) if pixels were independent, and `context`: as they are.

        Args:
            output: of the decoder.
            images: (B, C, H, W) in [-1, 1].
            uniform: (B,) in [0, 1): the context learns from one band of rows of each image, a quarter of them or fewer, drawn by its
                number. Pixels of an image teach much the same, and all of them would double a step's time. None: from all rows.
        """
        values, dimensions = self.values(images), images[0].numel()
        found = {"reconstruction": self.independent_nats(output, values).mean() / dimensions}
        if self.context is not None:
            output, bands = output.detach(), 1
            if uniform is None:
                _, height, width = self.image_shape
                here = self._in_context(output, values, slice(0, height), slice(0, width))
            else:
                bands, rows = self._bands(uniform)
                here = self.context.in_bands(rows_of(output, rows), self.images(values), rows)
                values = rows_of(values, rows)
            found["context"] = self.independent_nats(here, values).mean() * bands / dimensions
        return found

    def _bands(self, uniform: Tensor) -> tuple[int, Tensor]:
        """Into how many bands of equal height, four or the next more, images are cut; and the rows (B, R) of the drawn one of each."""
        height = self.image_shape[1]
        bands = next(count for count in range(min(4, height), height + 1) if height % count == 0)
        size = height // bands
        first = (uniform * bands).long().clamp(max=bands - 1) * size
        return bands, first[:, None] + torch.arange(size, device=uniform.device)

    @property
    def pixels_per_turn(self) -> int:
        """How many of an image's pixels `sequential_probabilities` takes at once."""
        _, height, width = self.image_shape
        return height * width if self.context is None else 1

    def sequential_probabilities(self, output: Tensor, values: Tensor) -> Iterator[tuple[Index, Tensor]]:
        """How an image is drawn or decoded: one channel after another of all pixels at once, or of one pixel after another.

        Gives the index in `values` of what has its turn, and p(value | z, all values that had theirs before), (B, rows, columns, V).
        Of `values` those alone count: whoever draws or decodes fills the others in between.
        """
        channels, height, width = self.image_shape
        turns: list[tuple[slice, slice]] = [(slice(0, height), slice(0, width))]
        if self.context is not None:
            turns = [(slice(row, row + 1), slice(column, column + 1)) for row in range(height) for column in range(width)]
        for rows, columns in turns:
            here = self._in_context(output, values, rows, columns)
            for channel in range(channels):
                probabilities = self.channel_probabilities(here, values[..., rows, columns], channel)
                yield (slice(None), channel, rows, columns), probabilities

    def sample(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Images drawn from p(x | z) by inverting the distribution of each value: (B, C, H, W) in [-1, 1], from uniforms of the same
        shape in [0, 1).
        """
        values = torch.zeros(uniform.shape, dtype=torch.int64, device=output.device)
        for index, probabilities in self.sequential_probabilities(output, values):
            cumulative = probabilities.cumsum(-1)
            threshold = uniform[index][..., None].to(cumulative) * cumulative[..., -1:]
            drawn = torch.searchsorted(cumulative, threshold, right=True)[..., 0]
            values[index] = drawn.clamp_(max=self.num_values - 1)
        return self.images(values).to(torch.promote_types(output.dtype, torch.float32))
