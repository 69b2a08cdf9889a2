"""What every objective is: how what the decoder puts out is judged against an image, and what image it means."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
