"""Perceptual distances between reconstructions and originals, by features of networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from configs.errors import UserError, require
from configs.parts import PerceptualPart
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.features.lpips import LEAST_PIXELS, LPIPS, downloaded_weights
from stage1_vqvae.features.networks import AUTO, FeatureNetwork, feature_network
from training.precision import full_precision

# Added to the squared length of a position's features, by which they are divided.
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class _WeightedPart(PerceptualPart):
    weight: float = 1.0
    """Weight of the term beside the objective."""
    weights: str | None = None
    """File of the network's weights. Null: LPIPS' and inception's are looked for in torch's cache and then downloaded."""

    def __post_init__(self) -> None:
        require(0 <= self.weight < float("inf"), "stage1.perceptual.weight", "at least 0, and finite", self.weight)


@dataclass(frozen=True, kw_only=True)
class FeaturesPart(_WeightedPart):
    """Distance of features of one of evaluation's networks."""

    network: str = "classifier"
    """Network, named as in `evaluation.features`. `classifier` and `rotation` are trained before the tokenizer, on its training images, and
    differ from evaluation's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.network != AUTO, "stage1.perceptual.network", "one network by its name", self.network)

    @override
    def build(self, folder: Path, source: ImageSource, device: torch.device, seed: int) -> nn.Module:
        network = feature_network(self.network, self.weights, folder, source, device, seed, "stage1.perceptual")
        return FeatureDistance(network, self.weight)


@dataclass(frozen=True, kw_only=True)
class LPIPSPart(_WeightedPart):
    """LPIPS (Zhang et al. 2018)."""

    trunk: Literal["alex", "vgg"] = "vgg"
    """Network of torchvision whose features are compared; evaluation's LPIPS is by alex."""

    @override
    def build(self, folder: Path, source: ImageSource, device: torch.device, seed: int) -> nn.Module:
        height, width = source.splits[next(iter(source.splits))].pixels.shape[1:3]
        if min(height, width) < LEAST_PIXELS:
            raise UserError(f"stage1.perceptual lpips: expected images of at least {LEAST_PIXELS} pixels per side, found {height}x{width}")
        path = downloaded_weights(self.trunk) if self.weights is None else Path(self.weights).expanduser()
        return LPIPSDistance(LPIPS(self.trunk, path).to(device), self.weight)


class FeatureDistance(nn.Module):
    """Mean over sizes and positions of |f(x) / |f(x)| - f(y) / |f(y)||^2, where f are a frozen network's features at a position.

    LPIPS without its learned channel weights (Zhang et al. 2018, equation 1).
    """

    def __init__(self, network: FeatureNetwork, weight: float) -> None:
        super().__init__()
        self.layers, self.weight = network.layers, weight

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Images and originals (B, C, H, W) in [-1, 1] to the weighted distance."""
        with torch.no_grad():
            targets = self.layers(originals)
        pairs = zip(self.layers(images), targets, strict=True)
        distances = [(_unit(features) - _unit(target)).square().sum(1).mean() for features, target in pairs]
        return self.weight * torch.stack(distances).mean()


class LPIPSDistance(nn.Module):
    """Mean LPIPS of a batch."""

    def __init__(self, network: LPIPS, weight: float) -> None:
        super().__init__()
        self.network, self.weight = network, weight

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Images and originals (B, C, H, W) in [-1, 1] to the weighted distance."""
        return self.weight * full_precision(self.network(images, originals)).mean()


def _unit(features: Tensor) -> Tensor:
    features = full_precision(features)
    return features / (features.square().sum(1, keepdim=True) + _EPSILON).sqrt()
