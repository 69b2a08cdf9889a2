"""Export a run's tokenizer to another project: a folder for `diffusers.VQModel.from_pretrained`.

    python stage1_vqvae/export_tokenizer.py --to diffusers --output photos_vq
    python stage1_vqvae/export_tokenizer.py --run photos --to diffusers --output photos_vq

The exported model gives images in [-1, 1] the same codes, and decodes codes to the same images. Supported: network `vqgan`, objective
`mse`, a quantizer with one learned codebook.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from typing import Any

import safetensors.torch
from torch import Tensor

from configs.cli import parse
from configs.errors import UserError, run_entry
from configs.run_dir import new_folder, unused_path, write_json
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.networks.vqgan import GROUPS, Stack, VQGANPart
from stage1_vqvae.networks.vqgan_names import CODEBOOK, SPELLINGS, weight_names
from stage1_vqvae.objectives.pixels import SquaredError
from stage1_vqvae.quantizers.vector import VectorQuantizer


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, options = command.run, command.options
    if options.to != "diffusers":
        raise UserError(f"--to: expected diffusers, found {options.to}")
    output = unused_path("output", options.output)
    command.need_tokenizer()
    tokenizer = load_tokenizer(run)
    weights, config = to_diffusers(tokenizer)
    with new_folder(output) as folder:
        write_json(folder / "config.json", config)
        safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    print(f'wrote {output}; load it by diffusers.VQModel.from_pretrained("{output}")')


def _options(parser: Any) -> None:
    parser.add_argument("--to", default="diffusers", help="format: diffusers")
    parser.add_argument("--output", required=True, help="folder to write; must not exist")


def to_diffusers(tokenizer: VQVAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert to the weights and config of an equivalent `diffusers.VQModel`. Errors: UserError if there is none."""
    part, quantizer = tokenizer.config.network, tokenizer.quantizer
    if not isinstance(part, VQGANPart):
        raise UserError(f"tokenizer.network: expected vqgan, which diffusers has too, found {part.kind}")
    if not isinstance(tokenizer.objective, SquaredError):
        kind = tokenizer.config.objective.kind
        raise UserError(f"tokenizer.objective: expected mse, where the decoder outputs the image itself, found {kind}")
    if not isinstance(quantizer, VectorQuantizer):
        kind = tokenizer.config.quantizer.kind
        expected = "expected one learned codebook, neither residual nor in groups nor projected"
        raise UserError(f"tokenizer.quantizer: {expected}, found {kind} of {len(quantizer.num_codes)} levels")
    assert isinstance(tokenizer.encoder, Stack)
    assert isinstance(tokenizer.decoder, Stack)
    state, weights = tokenizer.state_dict(), dict[str, Tensor]()
    for name, pieces in weight_names(SPELLINGS["diffusers"], part, tokenizer.encoder, tokenizer.decoder).items():
        weights |= {piece: value.contiguous() for piece, value in zip(pieces, state[name].chunk(len(pieces)), strict=True)}
    # diffusers searches by Euclidean distance; among unit vectors it agrees with the cosine metric.
    weights[CODEBOOK] = quantizer.codebook.vectors().detach().clone()
    channels, height, width = tokenizer.image_shape
    attends = [2**level in part.attention for level in range(len(part.multipliers))]
    config = {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": part.widths,
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in attends],
        "in_channels": channels,
        "latent_channels": part.latent_channels,
        "layers_per_block": part.residual_blocks,
        "norm_num_groups": GROUPS,
        "num_vq_embeddings": quantizer.num_codes[0],
        "out_channels": channels,
        "sample_size": max(height, width),
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in reversed(attends)],
        "vq_embed_dim": tokenizer.config.code_dim,
    }
    return weights, config


if __name__ == "__main__":
    run_entry(main)
