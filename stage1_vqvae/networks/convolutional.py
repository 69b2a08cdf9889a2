"""The convolutional family: encoder and decoder of the VQ-VAE paper.

Van den Oord et al. 2017, section 4.1: strided 4x4 convolutions, then residual blocks (ReLU, 3x3, ReLU, 1x1); the decoder mirrors
the encoder, by transposed convolutions or by nearest-neighbour upsampling. Fully convolutional: any size divisible by the downsampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from configs.errors import require
from configs.parts import NetworkPart


@dataclass(frozen=True, kw_only=True)
class ConvolutionalPart(NetworkPart):
    """The VQ-VAE paper's convolutions and residual blocks (van den Oord et al. 2017, section 4.1)."""

    downsampling: int = 4
    """Pixels per code along each side; a power of two."""
    hidden_channels: int = 128
    """Channels of the encoder's and decoder's convolutions."""
    residual_blocks: int = 2
    """Residual blocks of the encoder, and of the decoder."""
    residual_channels: int = 32
    """Channels inside a residual block."""
    upsampling: Literal["transposed", "nearest"] = "transposed"
    """How the decoder doubles height and width. `transposed`: by the paper's transposed convolutions, the last of which outputs the image.
    `nearest`: by nearest-neighbour upsampling and a 3x3 convolution, with one more for the image; without checkerboard artefacts (Odena et
    al. 2016)."""

    def __post_init__(self) -> None:
        where, power = "tokenizer.network", self.downsampling
        require(power >= 1 and power & (power - 1) == 0, f"{where}.downsampling", "a power of two", power)
        for name in ("hidden_channels", "residual_channels"):
            require(getattr(self, name) >= 1, f"{where}.{name}", "at least 1", getattr(self, name))
        require(self.hidden_channels % 2 == 0, f"{where}.hidden_channels", "an even number", self.hidden_channels)
        require(self.residual_blocks >= 0, f"{where}.residual_blocks", "at least 0", self.residual_blocks)

    @override
    def build(self, image_channels: int, code_dim: int, output_channels: int) -> tuple[nn.Module, nn.Module]:
        sizes = (self.hidden_channels, self.downsampling, self.residual_blocks, self.residual_channels)
        return Encoder(image_channels, code_dim, *sizes), Decoder(code_dim, output_channels, *sizes, self.upsampling)


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))). The first ReLU is not in place, which would change the skip connection's input."""

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
        self,
        in_channels: int,
        out_channels: int,
        hidden: int,
        downsampling: int,
        residual_blocks: int,
        residual_channels: int,
        upsampling: Literal["transposed", "nearest"] = "transposed",
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, hidden, 3, padding=1)]
        layers += _residual_stack(hidden, residual_channels, residual_blocks)
        doublings = downsampling.bit_length() - 1
        # Half as many in the two layers next to the image, where feature maps are largest.
        channels = [hidden, *(hidden // 2 if number >= doublings - 2 else hidden for number in range(doublings))]
        if upsampling == "transposed" and doublings > 0:
            for width, next_width in pairwise([*channels[:-1], out_channels]):
                layers += [nn.ConvTranspose2d(width, next_width, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
            del layers[-1]  # no ReLU after the image
        else:
            for width, next_width in pairwise(channels):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, next_width, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(channels[-1], out_channels, 3, padding=1)]
        super().__init__(*layers)
