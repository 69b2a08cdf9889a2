"""Discriminators: `patch`, of patches of an image, and `projected`, of a frozen network's features.

None normalises over the batch, whose statistics would differ between ranks, and a forward pass changes nothing: `Adversary.update_`
updates the estimates of spectral normalisation once per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import override

from configs.errors import UserError, require
from configs.parts import DiscriminatorPart
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.features.networks import AUTO, Layers, feature_network
from training.devices import channels_last_on_accelerator

_SLOPE = 0.2  # of a leaky ReLU below 0, as published
_GROUPS = 32
_LEAST_SIDE = 3  # pixels after the convolutions of stride 2, which the later ones need


@dataclass(frozen=True, kw_only=True)
class PatchPart(DiscriminatorPart):
    """PatchGAN (Isola et al. 2017): a logit for each of an image's overlapping patches."""

    channels: int = 64
    """Channels after the first convolution; each further one of stride 2 doubles them, up to eight times as many."""
    layers: int = 3
    """Convolutions of stride 2: with 1, 2, 3 of them a patch is of 16, 34, 70 pixels."""
    norm: Literal["spectral", "group"] = "spectral"
    """Spectral normalisation of all weights (Miyato et al. 2018), or group normalisation after inner convolutions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers >= 1, "stage1.adversarial.layers", "at least 1", self.layers)
        multiple = 1 if self.norm == "spectral" else _GROUPS
        fits = self.channels >= 1 and self.channels % multiple == 0
        require(fits, "stage1.adversarial.channels", f"a multiple of {multiple}", self.channels)

    @override
    def build(self, channels: int, folder: Path, source: ImageSource, device: torch.device, seed: int) -> nn.Module:
        height, width = next(iter(source.splits.values())).pixels.shape[1:3]
        if min(height, width) >> self.layers < _LEAST_SIDE:
            most = (min(height, width) // _LEAST_SIDE).bit_length() - 1
            wanted = f"at most {most} for images of {height}x{width}" if most > 0 else f"larger images than {height}x{width}"
            raise UserError(f"stage1.adversarial.layers: expected {wanted}, found {self.layers}")
        return PatchDiscriminator(channels, self.channels, self.layers, self.norm).to(device)


@dataclass(frozen=True, kw_only=True)
class ProjectedPart(DiscriminatorPart):
    """A small head per size of a frozen network's features (Sauer et al. 2021)."""

    channels: int = 64
    """Channels that features of each size are projected to, and of the heads."""
    network: str = "classifier"
    """Network, named as in `evaluation.features`; `classifier` and `rotation` are shared with the perceptual term."""
    weights: str | None = None
    """File of the network's weights. Null: inception's are looked for in torch's cache and then downloaded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.channels >= 1, "stage1.adversarial.channels", "at least 1", self.channels)
        require(self.network != AUTO, "stage1.adversarial.network", "one network by its name", self.network)

    @override
    def build(self, channels: int, folder: Path, source: ImageSource, device: torch.device, seed: int) -> nn.Module:
        network = feature_network(self.network, self.weights, folder, source, device, seed, "stage1.adversarial")
        pixels = next(iter(source.splits.values())).pixels[:1].to(device)
        with torch.no_grad():
            sizes = [features.shape[1] for features in network.layers(pixels.movedim(-1, 1).float())]
        return ProjectedDiscriminator(network.layers, sizes, self.channels).to(device)


class PatchDiscriminator(nn.Sequential):
    """Convolutions of stride 2 and two of stride 1, the last of which has one logit per position."""

    def __init__(self, image_channels: int, channels: int, layers: int, norm: Literal["spectral", "group"]) -> None:
        modules: list[nn.Module] = []
        before = image_channels
        for number in range(layers + 1):
            after = channels * min(2**number, 8)
            modules += [_convolution(before, after, 4, 2 if number < layers else 1, norm == "spectral")]
            modules += [_ChannelsLastGroupNorm(_GROUPS, after)] if norm == "group" and number else []
            modules += [nn.LeakyReLU(_SLOPE)]
            before = after
        super().__init__(*modules, _convolution(before, 1, 4, 1, norm == "spectral"))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] to one tensor of logits (B, 1, h, w)."""
        return [super().forward(images.contiguous(memory_format=torch.channels_last))]


class _ChannelsLastGroupNorm(nn.GroupNorm):
    """Group normalisation with a channels-last result; on a GPU torch's own result is channels first.

    The tokenizer's `GroupNorm` does not serve: it has no double backward, which the penalty `r1` needs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class ProjectedDiscriminator(nn.Module):
    """Features of each size, mixed by random frozen projections, and a head per size.

    Sauer et al. 2021, "Projected GANs Converge Faster", section 3: each size's channels are mixed by a 1x1 convolution, and the mixture of
    the next coarser size is added, upsampled. So a head cannot rely on the few features that are easiest to tell apart.
    """

    def __init__(self, layers: Layers, sizes: list[int], channels: int) -> None:
        super().__init__()
        self.layers = layers
        self.mixtures = nn.ModuleList(nn.Conv2d(size, channels, 1, bias=False).requires_grad_(False) for size in sizes)
        for mixture, size in zip(self.mixtures, sizes, strict=True):
            nn.init.normal_(mixture.weight, std=size**-0.5)  # type: ignore[arg-type]
        self.heads = nn.ModuleList(
            nn.Sequential(
                _convolution(channels, channels, 3, 1, spectral=True),
                nn.LeakyReLU(_SLOPE),
                _convolution(channels, 1, 3, 1, spectral=True),
            )
            for _ in sizes
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] to logits (B, 1, h, w) per size of the features."""
        mixed: list[Tensor] = []
        pyramid = self.layers(channels_last_on_accelerator(images))
        for features, mixture in reversed(list(zip(pyramid, self.mixtures, strict=True))):
            projected = mixture(features)
            mixed.append(projected + F.interpolate(mixed[-1], projected.shape[2:]) if mixed else projected)
        return [head(features) for head, features in zip(self.heads, reversed(mixed), strict=True)]


def _convolution(before: int, after: int, kernel: int, stride: int, spectral: bool) -> nn.Module:
    layer = nn.Conv2d(before, after, kernel, stride, padding=1)
    return spectral_norm(layer).eval() if spectral else layer
