"""LPIPS: a perceptual distance of images, calibrated on human judgements (Zhang et al. 2018)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from configs.errors import UserError, brief
from stage1_vqvae.features.weights import read_weights
from training.devices import channels_last_on_accelerator

Trunk = Literal["alex", "vgg"]
LEAST_PIXELS = 32
"""Minimum side in pixels: pooling would leave nothing of smaller images."""
_TRUNKS = {"alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1, "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1}


class LPIPS(nn.Module):
    """LPIPS of torchmetrics, whose package has its linear weights, over a trunk with torchvision's weights.

    Frozen; differentiable in the images. Errors: UserError for a file that is not the trunk's weights.
    """

    def __init__(self, trunk: Trunk, weights: Path) -> None:
        super().__init__()
        # Slow to import. The public class would load the trunk from torch's cache only.
        from torchmetrics.functional.image.lpips import _LPIPS

        self.distance = _LPIPS(net=trunk, pnet_rand=True)
        content = read_weights(weights)
        names = {name: f"features.{name.split('.', 1)[1]}" for name in self.distance.net.state_dict()}  # slice1.0.weight
        missing = [name for name in names.values() if name not in content]
        if missing:
            raise UserError(f"LPIPS: {weights}: expected torchvision's weights of {trunk}, found no {missing[0]}")
        try:
            self.distance.net.load_state_dict({ours: content[name] for ours, name in names.items()})
        except RuntimeError as error:
            raise UserError(f"LPIPS: {weights}: expected torchvision's weights of {trunk}, found others ({brief(error)})") from None
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Compute the distance (B,) of images and originals, (B, C, H, W) in [-1, 1], grey or colour."""
        rgb = (channels_last_on_accelerator(batch.expand(-1, 3, -1, -1)) for batch in (images, originals))
        return self.distance(*rgb).flatten()


def cached_weights(trunk: Trunk) -> Path:
    """Return the path of the trunk's weights in torch's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _TRUNKS[trunk].url.rsplit("/", 1)[1]


def downloaded_weights(trunk: Trunk) -> Path:
    """Return the path of the trunk's weights, downloaded if missing. Errors: UserError if the download fails."""
    path, url = cached_weights(trunk), _TRUNKS[trunk].url
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=url.rsplit("-", 1)[1].split(".")[0])
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(f"LPIPS: expected the weights of {trunk} at {path}, or a connection to {url}, found: {error}") from None
    return path
