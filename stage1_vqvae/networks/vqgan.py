"""The VQGAN family: convolutional ResNets with attention, for photographs.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", appendix; Sun et al. 2024, "LlamaGen", is the same network
in other sizes. Residual blocks and attention are pre-normalised (GroupNorm of 32 groups); downsampling is a convolution of stride 2 over
an image padded right and bottom, upsampling is nearest-neighbour and a convolution. Fully convolutional: any height and width divisible by
the downsampling. Layers are listed in the order in which they run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from configs.errors import require
from configs.parts import NetworkPart
from stage1_vqvae.networks.group_norm import GroupNorm, normed_convolution
from training.devices import on_accelerator

GROUPS = 32
"""Channel groups per normalisation."""


@dataclass(frozen=True, kw_only=True)
class VQGANPart(NetworkPart):
    """VQGAN's residual blocks and attention (Esser et al. 2021)."""

    hidden_channels: int = 128
    """Channels at full size; a multiple of 32, the groups per normalisation."""
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels at full size, half size, a quarter .., in multiples of `hidden_channels`; n numbers are n - 1 halvings."""
    residual_blocks: int = 2
    """Residual blocks per size in the encoder; the decoder has one more."""
    attention: list[int] = field(default_factory=lambda: [16])
    """Downsampling factors at which attention follows each residual block; the middle of encoder and decoder always has it."""
    latent_channels: int = 256
    """Channels of the encoder's last and the decoder's first 3x3 convolution; 1x1 convolutions map to `code_dim` and back."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""

    def __post_init__(self) -> None:
        where = "tokenizer.network"
        groups = self.hidden_channels >= 1 and self.hidden_channels % GROUPS == 0
        require(groups, f"{where}.hidden_channels", f"a multiple of {GROUPS}", self.hidden_channels)
        positive = len(self.multipliers) > 0 and min(self.multipliers) >= 1
        require(positive, f"{where}.multipliers", "one number or more, each at least 1", self.multipliers)
        for name in ("residual_blocks", "latent_channels"):
            require(getattr(self, name) >= 1, f"{where}.{name}", "at least 1", getattr(self, name))
        spans = [2**level for level in range(len(self.multipliers))]
        require(set(self.attention) <= set(spans), f"{where}.attention", f"some of {spans}", self.attention)

    @property
    @override
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @override
    def build(self, image_channels: int, code_dim: int, output_channels: int) -> tuple[nn.Module, nn.Module]:
        return self._encoder(image_channels, code_dim), self._decoder(code_dim, output_channels)

    @property
    def widths(self) -> list[int]:
        """Channels at each size, the full one first."""
        return [self.hidden_channels * multiplier for multiplier in self.multipliers]

    def _encoder(self, image_channels: int, code_dim: int) -> Stack:
        layers: list[nn.Module] = [nn.Conv2d(image_channels, self.hidden_channels, 3, padding=1)]
        channels = self.hidden_channels
        for level, width in enumerate(self.widths):
            layers += [Downsampling(channels)] if level else []
            layers += self._blocks(level, channels, self.residual_blocks)
            channels = width
        # SiLU is part of the norm; an identity in its place keeps the layer indices of published state dicts.
        layers += [*_middle(channels), _norm(channels), nn.Identity()]
        layers += [nn.Conv2d(channels, self.latent_channels, 3, padding=1), nn.Conv2d(self.latent_channels, code_dim, 1)]
        return Stack(*layers, checkpointing=self.gradient_checkpointing)

    def _decoder(self, code_dim: int, output_channels: int) -> Stack:
        channels = self.widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(code_dim, self.latent_channels, 1), nn.Conv2d(self.latent_channels, channels, 3, padding=1)]
        layers += _middle(channels)
        for level, width in reversed(list(enumerate(self.widths))):
            layers += self._blocks(level, channels, self.residual_blocks + 1)
            layers += [Upsampling(width)] if level else []
            channels = width
        # SiLU is part of the norm, as at the encoder's end.
        layers += [_norm(channels), nn.Identity(), nn.Conv2d(channels, output_channels, 3, padding=1)]
        return Stack(*layers, checkpointing=self.gradient_checkpointing)

    def _blocks(self, level: int, channels: int, count: int) -> list[nn.Module]:
        width, blocks = self.widths[level], list[nn.Module]()
        for number in range(count):
            blocks.append(ResidualBlock(width if number else channels, width))
            blocks += [AttentionBlock(width)] if 2**level in self.attention else []
        return blocks


class Stack(nn.Sequential):
    """Layers in sequence, with optional activation checkpointing of blocks."""

    def __init__(self, *layers: nn.Module, checkpointing: bool) -> None:
        super().__init__(*layers)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers to (B, C, H, W)."""
        for layer in self:
            recompute = self.checkpointing and self.training and isinstance(layer, ResidualBlock | AttentionBlock)
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on the skip where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        hidden = normed_convolution(x, self.norm1, self.conv1)
        return self.shortcut(x) + normed_convolution(hidden, self.norm2, self.conv2)


class AttentionBlock(nn.Module):
    """x + single-head attention over all pixels of norm(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels, silu=False)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        rows = self.norm(x).movedim(1, -1)  # (B, H, W, C): without a copy if channels are last in memory
        query, key, value = self.qkv(rows.flatten(1, 2))[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.out(attended).unflatten(1, x.shape[2:]).movedim(-1, 1)


class Downsampling(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsampling(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        return self.conv(_upsample_nearest(x) if on_accelerator(x.device) else F.interpolate(x, scale_factor=2.0))


def _upsample_nearest(x: Tensor) -> Tensor:
    """Upsample by two, nearest neighbour, in x's dtype; autocast would use float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0)


def _norm(channels: int, silu: bool = True) -> GroupNorm:
    return GroupNorm(GROUPS, channels, silu=silu)


def _middle(channels: int) -> list[nn.Module]:
    return [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
