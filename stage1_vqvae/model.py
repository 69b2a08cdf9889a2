"""VQVAE = encoder + quantizer + decoder, and the tokenizer file: its weights with their config in the header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.parts import as_dict
from configs.run_dir import RunDir
from configs.schema import Tokenizer, tokenizer_from
from stage1_vqvae.objectives.contract import Objective, PixelLikelihood
from stage1_vqvae.quantizers.contract import Codes, Levels, Quantized, Quantizer, Statistics
from stage1_vqvae.quantizers.grids import GridQuantizers
from training.weights_file import built_from, load_weights, save_weights

# Format of a tokenizer's file: 2 since quantizers are composed, 3 since a recipe's parts have fields of their own.
_FORMAT = 1


class TokenizerOutput(NamedTuple):
    """One pass of the VQ-VAE over images (B, C, H, W)."""

    reconstruction: Tensor
    """(B, C, H, W) in [-1, 1] for a perfect decoder; not clipped."""
    codes: Codes
    losses: dict[str, Tensor]
    """Scalars to add up: the objective's, `reconstruction` among them, and the quantizer's."""
    statistics: Statistics
    """The quantizer's, to be summed and given to its `update_`."""
    latents: tuple[Tensor, ...]
    """What each of the quantizer's codebooks had to represent, without gradient; see quantizers/contract.py."""


class VQVAE(nn.Module):
    """The tokenizer: images to grids of codes and back.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3. With several grids, as in VQ-VAE-2 (Razavi et al.
    2019), the encoder quantizes on its way from the coarsest to the finest.
    """

    def __init__(self, config: Tokenizer, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (channels, height, width)
        self.objective: Objective = config.objective.build(self.image_shape)
        self.encoder, self.decoder = config.network.build(channels, config.code_dim, self.objective.output_channels)
        parts: list[Quantizer] = [config.quantizer.build(config.code_dim) for _ in config.network.downsamplings]
        self.quantizer: Levels = parts[0] if len(parts) == 1 else GridQuantizers(parts)

    @property
    def quantizers(self) -> Sequence[Quantizer]:
        """The quantizer of each grid, coarse to fine."""
        return self.quantizer.parts if isinstance(self.quantizer, GridQuantizers) else [self.quantizer]  # type: ignore[list-item]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The grid (h, w) of each level's codes."""
        _, height, width = self.image_shape
        steps = self.config.network.downsamplings
        return [(height // step, width // step) for step, part in zip(steps, self.quantizers, strict=True) for _ in part.num_codes]

    def forward(self, images: Tensor, uniform: Tensor | None = None) -> TokenizerOutput:
        """Images (B, C, H, W) in [-1, 1]. Changes nothing: see quantizers/contract.py.

        `uniform`: (B,) in [0, 1), by which an objective that `draws` does so in training.
        """
        found = [quantized for _, quantized in self._quantized(images)]
        output = self.decoder(*(part.z_q for part in found))
        codes, losses, statistics, latents = found[0][1:] if len(found) == 1 else GridQuantizers.merge(found)
        given = () if uniform is None else (uniform,)
        losses = {**self.objective.losses(output, images, *given), **losses}
        # A likelihood's mean is for people to look at: no loss takes it further back.
        shown = output.detach() if isinstance(self.objective, PixelLikelihood) else output
        return TokenizerOutput(self.objective.mean_image(shown), codes, losses, statistics, latents)

    def encode(self, images: Tensor) -> Codes:
        """Images (B, C, H, W) in [-1, 1] to codes, int64 (B, h, w) a level."""
        return tuple(level for _, quantized in self._quantized(images) for level in quantized.codes)

    def latents(self, images: Tensor, grid: int = 0) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to what is quantized on that grid, (B, D, h, w), given the codes of the coarser ones."""
        return self._quantized(images)[grid][0]

    def _quantized(self, images: Tensor) -> list[tuple[Tensor, Quantized]]:
        """The latents (B, D, h, w) of each grid, coarse to fine, and what its quantizer makes of them. They are channels last in memory:
        as the quantizer's rows have them, so that nothing has to be transposed for it, or back.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        if isinstance(self.quantizer, Quantizer):
            z = self.encoder(images)
            return [(z, self.quantizer(z))]
        pairs: list[tuple[Tensor, Quantized]] = []

        def quantize(z: Tensor) -> Tensor:
            pairs.append((z, self.quantizers[len(pairs)](z)))
            return pairs[-1][1].z_q

        self.encoder(images, quantize)
        return pairs

    def outputs(self, codes: Codes) -> Tensor:
        """What the decoder puts out for codes, (B, h, w) a level: (B, C', H, W), which the objective reads."""
        return self.decoder(*self._vectors(codes))

    def decode_coarsest(self, codes: Codes, grids: int) -> Tensor:
        """Images (B, C, H, W) of so many of the coarsest grids alone: every finer one is given the mean vector of its own codes in these
        images, so that what differs between them is what the coarse ones hold.
        """
        vectors = self._vectors(codes)
        means = [finer.mean((0, 2, 3), keepdim=True).expand_as(finer) for finer in vectors[grids:]]
        return self.objective.mean_image(self.decoder(*vectors[:grids], *means))

    def _vectors(self, codes: Codes) -> list[Tensor]:
        """The vectors (B, D, h, w) of each grid's codes, coarse to fine."""
        rest = iter(codes)
        return [part.lookup(tuple(next(rest) for _ in part.num_codes)) for part in self.quantizers]

    def decode(self, codes: Codes, sample: bool = False, uniform: Tensor | None = None) -> Tensor:
        """Codes to images (B, C, H, W) about [-1, 1]; in eval equal to `forward`'s reconstruction.

        Args:
            codes: int64 (B, h, w) a level.
            sample: draw pixels from p(x | z) instead of taking its mean. Errors: UserError if the objective is no likelihood.
            uniform: what pixels are drawn by, (B, C, H, W) in [0, 1); None: drawn here.
        """
        output = self.outputs(codes)
        if not sample:
            return self.objective.mean_image(output)
        uniform = torch.rand(len(output), *self.image_shape, device=output.device) if uniform is None else uniform
        return self.likelihood().sample(output, uniform)

    def likelihood(self) -> PixelLikelihood:
        """The objective as p(x | z). Errors: UserError if it is none."""
        if not isinstance(self.objective, PixelLikelihood):
            wanted = "expected one that is a likelihood (logistic, categorical, bernoulli)"
            raise UserError(f"tokenizer.objective: {wanted}, found {self.config.objective.kind}")
        return self.objective

    def nats(self, codes: Codes, pixels: Tensor) -> Tensor:
        """-log p(x | z) in nats, (B,), of images of uint8 (B, H, W, C) given their codes (B, h, w) a level.

        Errors: UserError if the objective is no likelihood.
        """
        likelihood = self.likelihood()
        return likelihood.nats(self.outputs(codes), likelihood.values_from_pixels(pixels))


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
    if header.get("format") != _FORMAT:
        raise UserError(f"{run.tokenizer}: expected a tokenizer of format {_FORMAT}, found {header.get('format')}; train it anew")
    with built_from(run.tokenizer, "tokenizer"):
        channels, height, width = map(int, header["image_shape"])
        model = VQVAE(tokenizer_from(header["config"]), height, width, channels)
        model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)
