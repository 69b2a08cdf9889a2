"""What every objective is: how what the decoder puts out is judged against an image, and what image it means.

Some are likelihoods: what the decoder puts out are the parameters of a distribution over images of 8-bit values, p(x | z). Those
give honest bits, pixels drawn from them, and lossless compression.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Objective(ABC):
    """The contract. Images are (B, C, H, W) in [-1, 1]; what the decoder puts out has `output_channels` in place of C."""

    def output_channels(self, image_channels: int) -> int:
        """Channels the decoder has to put out for images of so many."""
        return image_channels

    @abstractmethod
    def loss(self, output: Tensor, images: Tensor) -> Tensor:
        """The training loss, a scalar of float32 or wider: a mean over pixels and images."""

    @abstractmethod
    def mean_image(self, output: Tensor) -> Tensor:
        """The image that `decode` shows, (B, C, H, W), about [-1, 1], float32 or wider; not clipped."""

    def check(self, pixels: Tensor) -> None:  # noqa: B027 - most can judge any image
        """Errors: UserError if it cannot judge images of such pixels, uint8 (N, H, W, C)."""


class PixelLikelihood(Objective):
    """An objective that is -log p(x | z), exact for images of 8-bit values.

    Given z pixels are independent; a pixel's channels need not be, and are taken one after another. The values of a channel are
    the indices 0 to `num_values` - 1, int64 (B, C, H, W) for an image.
    """

    num_values = 256
    """How many values a channel of a pixel can have."""

    def values(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to the indices of their values, int64 of the same shape."""
        return ((images + 1) * ((self.num_values - 1) / 2)).round().long()

    def images(self, values: Tensor) -> Tensor:
        """The inverse of `values`, float64."""
        return values.double() * (2 / (self.num_values - 1)) - 1

    def values_of(self, pixels: Tensor) -> Tensor:
        """The values, int64 (B, C, H, W), of a picture's pixels, uint8 (B, H, W, C)."""
        return (pixels // (255 // (self.num_values - 1))).long().movedim(-1, 1)

    def pixels(self, values: Tensor) -> Tensor:
        """The inverse of `values_of`."""
        return (values * (255 // (self.num_values - 1))).to(torch.uint8).movedim(1, -1).contiguous()

    @abstractmethod
    def nats(self, output: Tensor, values: Tensor) -> Tensor:
        """-log p(x | z) of each image, (B,) in nats, float32 or wider."""

    @abstractmethod
    def probabilities(self, output: Tensor, values: Tensor, channel: int) -> Tensor:
        """p(value of the channel | values of the channels before it), (B, H, W, V): of `values` those channels alone count."""

    def loss(self, output: Tensor, images: Tensor) -> Tensor:
        """See the contract: -log p(x | z) in nats a dimension."""
        return self.nats(output, self.values(images)).mean() / images[0].numel()

    def sample(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Images drawn from p(x | z) by inverting the distribution of each channel: (B, C, H, W) in [-1, 1], from uniforms of the same
        shape in [0, 1).
        """
        values = torch.zeros(uniform.shape, dtype=torch.int64, device=output.device)
        for channel in range(values.shape[1]):
            cumulative = self.probabilities(output, values, channel).cumsum(-1)
            threshold = uniform[:, channel, ..., None].to(cumulative) * cumulative[..., -1:]
            values[:, channel] = torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp_(max=self.num_values - 1)
        return self.images(values).to(torch.promote_types(output.dtype, torch.float32))
