"""VQVAE = encoder + quantizer + decoder, and the tokenizer file: its weights with their config in the header."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs.errors import UserError
from configs.run_dir import RunDir, write_bytes
from configs.schema import Tokenizer
from stage1_vqvae.losses import binary_cross_entropy, full_precision, squared_error
from stage1_vqvae.networks import Decoder, Encoder
from stage1_vqvae.quantizers.build import build_quantizer
from stage1_vqvae.quantizers.contract import Codes, Statistics

_HEADER = "header"
# Of a tokenizer's weights: 2 since quantizers are composed.
_FORMAT = 2


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
        sizes = (config.hidden_channels, config.downsampling, config.residual_blocks, config.residual_channels)
        self.encoder = Encoder(channels, config.code_dim, *sizes)
        self.decoder = Decoder(config.code_dim, channels, *sizes)
        self.quantizer = build_quantizer(config)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of each level's codes."""
        _, height, width = self.image_shape
        grid = (height // self.config.downsampling, width // self.config.downsampling)
        return [grid] * len(self.quantizer.num_codes)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Images (B, C, H, W) in [-1, 1]. Changes nothing: see quantizers/contract.py."""
        quantized = self.quantizer(self.latents(images))
        output = self.decoder(quantized.z_q)
        loss = binary_cross_entropy if self.config.reconstruction == "bce" else squared_error
        losses = {"reconstruction": loss(output, images), **quantized.losses}
        return TokenizerOutput(self._pixels(output), quantized.codes, losses, quantized.statistics, quantized.latents)

    def encode(self, images: Tensor) -> Codes:
        """Images (B, C, H, W) in [-1, 1] to codes, int64 (B, h, w) a level."""
        return self.quantizer(self.latents(images)).codes

    def decode(self, codes: Codes) -> Tensor:
        """Codes to images (B, C, H, W) about [-1, 1]; in eval equal to `forward`'s reconstruction."""
        return self._pixels(self.decoder(self.quantizer.lookup(codes)))

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to what is quantized, (B, D, h, w), channels last in memory: as the quantizer's
        rows have them, so that nothing has to be transposed for it, or back.
        """
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def _pixels(self, output: Tensor) -> Tensor:
        output = full_precision(output)
        return 2 * output.sigmoid() - 1 if self.config.reconstruction == "bce" else output


def save_weights(path: Path, weights: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write weights with a JSON header, atomically; equal weights and headers give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # One entry, because safetensors writes several in an order that changes from run to run.
    write_bytes(path, safetensors.torch.save(tensors, {_HEADER: json.dumps(header)}))


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """The header of what `save_weights` wrote. Errors: as `load_weights`."""
    return load_weights(path, kind, names=())[1]


def load_weights(path: Path, kind: str, names: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_weights` wrote; of its tensors only `names`, if given.

    Errors: UserError if the file is missing, truncated or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            weights = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except FileNotFoundError:
        raise UserError(f"{path}: expected the weights of a {kind}, found nothing") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: expected the weights of a {kind}, found a truncated or foreign file ({error})") from None
    if header.get("kind") != kind:
        raise UserError(f"{path}: expected the weights of a {kind}, found {header.get('kind', 'no kind')} in its header")
    return weights, header


def save_tokenizer(path: Path, model: VQVAE, steps: int) -> None:
    """Write a tokenizer, trained for `steps`, that `load_tokenizer` needs nothing else for."""
    header = {
        "kind": "tokenizer",
        "format": _FORMAT,
        "steps": steps,
        "config": dataclasses.asdict(model.config),
        "image_shape": model.image_shape,
    }
    save_weights(path, model.state_dict(), header)


def load_tokenizer(run: RunDir, device: torch.device | str = "cpu") -> VQVAE:
    """A run's finished tokenizer, in eval mode. Errors: UserError as `load_weights`."""
    weights, header = load_weights(run.tokenizer, "tokenizer")
    if header.get("format") != _FORMAT:
        raise UserError(f"{run.tokenizer}: expected a tokenizer of format {_FORMAT}, found {header.get('format', 1)}; train it anew")
    channels, height, width = header["image_shape"]
    model = VQVAE(Tokenizer(**header["config"]), height, width, channels)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def fingerprint(path: Path) -> str:
    """The sha256 of a file, by which codes know their tokenizer and priors their codes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
