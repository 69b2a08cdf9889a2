"""VQVAE = encoder + quantizer + decoder, and the tokenizer file: its weights with their config in the header."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.parts import as_dict
from configs.run_dir import RunDir
from configs.schema import Tokenizer, tokenizer_from
from stage1_vqvae.objectives.contract import Objective
from stage1_vqvae.quantizers.contract import Codes, Quantizer, Statistics
from stage1_vqvae.training.weights_file import load_weights, save_weights

# Format of a tokenizer's file: 2 since quantizers are composed, 3 since a recipe's parts have fields of their own.
_FORMAT = 3


class TokenizerOutput(NamedTuple):
    """One pass of the VQ-VAE over images (B, C, H, W)."""

    reconstruction: Tensor
    """(B, C, H, W) in [-1, 1] for a perfect decoder; not clipped."""
    codes: Codes
    losses: dict[str, Tensor]
    """Scalars to add up: `reconstruction` and the quantizer's own."""
    statistics: Statistics
    """The quantizer's, to be summed and given to its `update_`."""
    latents: tuple[Tensor, ...]
    """What each of the quantizer's codebooks had to represent, without gradient; see quantizers/contract.py."""


class VQVAE(nn.Module):
    """The tokenizer: images to grids of codes and back.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3.
    """

    def __init__(self, config: Tokenizer, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (channels, height, width)
        self.objective: Objective = config.objective.build()
        self.encoder, self.decoder = config.network.build(channels, config.code_dim, self.objective.output_channels(channels))
        self.quantizer: Quantizer = config.quantizer.build(config.code_dim)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grid (h, w) of each level's codes."""
        _, height, width = self.image_shape
        grid = (height // self.config.network.downsampling, width // self.config.network.downsampling)
        return [grid] * len(self.quantizer.num_codes)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Images (B, C, H, W) in [-1, 1]. Changes nothing: see quantizers/contract.py."""
        quantized = self.quantizer(self.latents(images))
        output = self.decoder(quantized.z_q)
        losses = {"reconstruction": self.objective.loss(output, images), **quantized.losses}
        return TokenizerOutput(self.objective.mean_image(output), quantized.codes, losses, quantized.statistics, quantized.latents)

    def encode(self, images: Tensor) -> Codes:
        """Images (B, C, H, W) in [-1, 1] to codes, int64 (B, h, w) a level."""
        return self.quantizer(self.latents(images)).codes

    def decode(self, codes: Codes) -> Tensor:
        """Codes to images (B, C, H, W) about [-1, 1]; in eval equal to `forward`'s reconstruction."""
        return self.objective.mean_image(self.decoder(self.quantizer.lookup(codes)))

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to what is quantized, (B, D, h, w), channels last in memory: as the quantizer's
        rows have them, so that nothing has to be transposed for it, or back.
        """
        return self.encoder(images.contiguous(memory_format=torch.channels_last))


def save_tokenizer(path: Path, model: VQVAE, steps: int) -> None:
    """Write a tokenizer, trained for `steps`, that `load_tokenizer` needs nothing else for."""
    header = {
        "kind": "tokenizer",
        "format": _FORMAT,
        "steps": steps,
        "config": as_dict(model.config),
        "image_shape": model.image_shape,
    }
    save_weights(path, model.state_dict(), header)


def load_tokenizer(run: RunDir, device: torch.device | str = "cpu") -> VQVAE:
    """A run's finished tokenizer, in eval mode. Errors: UserError as `load_weights`."""
    weights, header = load_weights(run.tokenizer, "tokenizer")
    if header.get("format") not in (2, _FORMAT):
        raise UserError(f"{run.tokenizer}: expected a tokenizer of format {_FORMAT}, found {header.get('format', 1)}; train it anew")
    channels, height, width = header["image_shape"]
    model = VQVAE(tokenizer_from(header["config"]), height, width, channels)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)
