"""Encoder and decoder: plain convolutional networks, plain arguments.

Van den Oord et al. 2017, section 4.1: strided 4x4 convolutions, then residual blocks (ReLU, 3x3, ReLU, 1x1); the decoder
mirrors it. Fully convolutional, so any height and width divisible by the downsampling.
"""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))). The first ReLU is not in place: it would change the skip's input."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, residual_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(residual_channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return x + self.layers(x)


def _residual_stack(channels: int, residual_channels: int, blocks: int) -> list[nn.Module]:
    return [*(ResidualBlock(channels, residual_channels) for _ in range(blocks)), nn.ReLU()]


class Encoder(nn.Sequential):
    """Images (B, C, H, W) to latents (B, out_channels, H / downsampling, W / downsampling)."""

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, downsampling: int, residual_blocks: int, residual_channels: int
    ) -> None:
        layers: list[nn.Module] = []
        channels = in_channels
        for number in range(downsampling.bit_length() - 1):
            width = hidden // 2 if number == 0 else hidden
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers += [nn.Conv2d(channels, hidden, 3, padding=1)]
        layers += _residual_stack(hidden, residual_channels, residual_blocks)
        layers += [nn.Conv2d(hidden, out_channels, 1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """Latents (B, in_channels, h, w) to images (B, out_channels, h * downsampling, w * downsampling)."""

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, downsampling: int, residual_blocks: int, residual_channels: int
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, hidden, 3, padding=1)]
        layers += _residual_stack(hidden, residual_channels, residual_blocks)
        doublings = downsampling.bit_length() - 1
        channels = hidden
        for number in range(doublings):
            last = number == doublings - 1
            width = out_channels if last else hidden // 2 if number == doublings - 2 else hidden
            layers += [nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1)]
            layers += [] if last else [nn.ReLU(inplace=True)]
            channels = width
        if doublings == 0:
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1)]
        super().__init__(*layers)
