"""The tokenizer, VQVAE = encoder + quantizer + decoder, and its file: weights with the config in the header."""

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

_FORMAT = 1


class TokenizerOutput(NamedTuple):
    """One pass of the VQ-VAE over images (B, C, H, W)."""

    reconstruction: Tensor
    """(B, C, H, W) in [-1, 1] for a perfect decoder; not clipped."""
    codes: Codes
    losses: dict[str, Tensor]
    """Scalars to add up: the objective's, `reconstruction` among them, and the quantizer's."""
    statistics: Statistics
    """Sums for the quantizer's `update_`."""
    latents: tuple[Tensor, ...]
    """Per codebook of the quantizer, the vectors it had to represent, without gradient; see quantizers/contract.py."""


class VQVAE(nn.Module):
    """The tokenizer: images to grids of codes and back.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3. With several grids, as in VQ-VAE-2 (Razavi et al.
    2019), the encoder quantizes each grid before it computes the next finer one.
    """

    def __init__(self, config: Tokenizer, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (channels, height, width)
        self.objective: Objective = config.objective.build(self.image_shape)
        self.encoder, self.decoder = config.network.build(channels, config.code_dim, self.objective.output_channels)
        parts: list[Quantizer] = [config.quantizer.for_grid(*grid).build(config.code_dim) for grid in self.latent_grids]
        self.quantizer: Levels = parts[0] if len(parts) == 1 else GridQuantizers(parts)

    @property
    def quantizers(self) -> Sequence[Quantizer]:
        """Quantizer per grid, coarse to fine."""
        return self.quantizer.parts if isinstance(self.quantizer, GridQuantizers) else [self.quantizer]  # type: ignore[list-item]

    @property
    def latent_grids(self) -> list[tuple[int, int]]:
        """Grid (h, w) of the latents of each quantizer, coarse to fine."""
        _, height, width = self.image_shape
        return [(height // step, width // step) for step in self.config.network.downsamplings]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Grid (h, w) per level."""
        pairs = zip(self.quantizers, self.latent_grids, strict=True)
        return [level for quantizer, grid in pairs for level in quantizer.level_grids(*grid)]

    def forward(self, images: Tensor, uniform: Tensor | None = None) -> TokenizerOutput:
        """Reconstruct images (B, C, H, W) in [-1, 1] and compute all losses. Changes no state: see quantizers/contract.py.

        `uniform`: (B,) in [0, 1), the random draws of an objective that `draws`, in training.
        """
        grids = [quantized for _, quantized in self._quantized(images)]
        output = self.decoder(*(grid.z_q for grid in grids))
        codes, losses, statistics, latents = grids[0][1:] if len(grids) == 1 else GridQuantizers.merge(grids)
        draws = () if uniform is None else (uniform,)
        losses = {**self.objective.losses(output, images, *draws), **losses}
        # The mean of a likelihood is for display: no loss term on images may train it.
        shown = output.detach() if isinstance(self.objective, PixelLikelihood) else output
        return TokenizerOutput(self.objective.mean_image(shown), codes, losses, statistics, latents)

    def encode(self, images: Tensor) -> Codes:
        """Encode images (B, C, H, W) in [-1, 1] to codes, int64 (B, h, w) per level."""
        return tuple(level for _, quantized in self._quantized(images) for level in quantized.codes)

    def latents(self, images: Tensor, grid: int = 0) -> Tensor:
        """Compute one grid's latents (B, D, h, w) of images (B, C, H, W) in [-1, 1], given the codes of the coarser grids."""
        return self._quantized(images)[grid][0]

    def _quantized(self, images: Tensor) -> list[tuple[Tensor, Quantized]]:
        """Compute each grid's latents (B, D, h, w) and quantize them, coarse to fine.

        Latents are channels last in memory, the layout of the quantizer's rows, so nothing is transposed.
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
        """Compute the decoder's output (B, P, H, W) for codes, (B, h, w) per level; the objective interprets it."""
        return self.decoder(*self._vectors(codes))

    def decode_coarsest(self, codes: Codes, grids: int) -> Tensor:
        """Decode images (B, C, H, W) from the coarsest `grids` grids alone.

        The finer grids are set to the mean vector of their codes over these images, so images differ by their coarse codes only.
        """
        vectors = self._vectors(codes)
        means = [finer.mean((0, 2, 3), keepdim=True).expand_as(finer) for finer in vectors[grids:]]
        return self.objective.mean_image(self.decoder(*vectors[:grids], *means))

    def _vectors(self, codes: Codes) -> list[Tensor]:
        """Look up the vectors (B, D, h, w) of each grid's codes, coarse to fine."""
        levels = iter(codes)
        return [part.lookup(tuple(next(levels) for _ in part.num_codes)) for part in self.quantizers]

    def decode(self, codes: Codes, sample: bool = False, uniform: Tensor | None = None) -> Tensor:
        """Decode codes to images (B, C, H, W), about [-1, 1]; in eval mode equal to `forward`'s reconstruction.

        Args:
            codes: int64 (B, h, w) per level.
            sample: sample pixels from p(x | z) instead of taking its mean.
            uniform: random draws (B, C, H, W) in [0, 1) for that; None: torch's generator.
        Errors: UserError if the objective to sample from is no likelihood.
        """
        output = self.outputs(codes)
        if not sample:
            return self.objective.mean_image(output)
        uniform = torch.rand(len(output), *self.image_shape, device=output.device) if uniform is None else uniform
        return self.likelihood().sample(output, uniform)

    def likelihood(self) -> PixelLikelihood:
        """Return the objective as a likelihood p(x | z). Errors: UserError if it is none."""
        if not isinstance(self.objective, PixelLikelihood):
            expected = "expected one that is a likelihood (logistic, categorical, bernoulli)"
            raise UserError(f"tokenizer.objective: {expected}, found {self.config.objective.kind}")
        return self.objective

    def nats(self, codes: Codes, pixels: Tensor) -> Tensor:
        """Compute -log p(x | z) in nats, (B,), of images, uint8 (B, H, W, C), given their codes, (B, h, w) per level.

        Errors: UserError if the objective is no likelihood.
        """
        likelihood = self.likelihood()
        return likelihood.nats(self.outputs(codes), likelihood.values_from_pixels(pixels))


def save_tokenizer(path: Path, model: VQVAE, steps: int) -> None:
    """Write the file of a tokenizer trained for `steps`, from which `load_tokenizer` rebuilds it."""
    header = {
        "kind": "tokenizer",
        "format": _FORMAT,
        "steps": steps,
        "config": as_dict(model.config),
        "image_shape": model.image_shape,
    }
    save_weights(path, model.state_dict(), header)


def load_tokenizer(run: RunDir, device: torch.device | str = "cpu") -> VQVAE:
    """Load a run's finished tokenizer, in eval mode. Errors: UserError as `load_weights`."""
    weights, header = load_weights(run.tokenizer, "tokenizer")
    if header.get("format") != _FORMAT:
        raise UserError(f"{run.tokenizer}: expected a tokenizer of format {_FORMAT}, found {header.get('format')}; train it anew")
    with built_from(run.tokenizer, "tokenizer"):
        channels, height, width = map(int, header["image_shape"])
        model = VQVAE(tokenizer_from(header["config"]), height, width, channels)
        model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)
