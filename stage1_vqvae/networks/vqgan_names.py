"""Names of VQGAN weights in other projects: LlamaGen, taming-transformers, diffusers' `VQModel`.

All three have the layers of vqgan.py in the same order, so they differ in the spelling of names alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.errors import UserError
from stage1_vqvae.networks.vqgan import AttentionBlock, Downsampling, ResidualBlock, Stack, Upsampling, VQGANPart


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One project's names. {level} counts sizes from the full one, {up} from the smallest."""

    block: str = "encoder.down.{level}.block.{number}"
    attention: str = "encoder.down.{level}.attn.{number}"
    downsampling: str = "encoder.down.{level}.downsample.conv"
    block_up: str = "decoder.up.{level}.block.{number}"
    attention_up: str = "decoder.up.{level}.attn.{number}"
    upsampling: str = "decoder.up.{level}.upsample.conv"
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    norm: str = "norm_out"
    shortcut: str = "nin_shortcut"
    attention_parts: tuple[str, str, str, str, str] = ("norm", "q", "k", "v", "proj_out")
    containers: tuple[str, ...] = ()
    """Keys of the file that may hold the weights, preferred first; without any, the file itself is the weights."""
    unit_length: bool = False
    """Whether latents and codes are compared and decoded at unit length."""
    file: str | None = None
    """Name of the weights' file, if the project publishes folders."""
    renames: tuple[tuple[str, str], ...] = ()
    """Parts of names in older files, and their current spelling."""

    def current_name(self, name: str) -> str:
        """Translate a name of an older file to the current spelling."""
        for old, new in self.renames:
            name = name.replace(old, new)
        return name


SPELLINGS = {
    "llamagen": Spelling(
        block="encoder.conv_blocks.{level}.res.{number}",
        attention="encoder.conv_blocks.{level}.attn.{number}",
        downsampling="encoder.conv_blocks.{level}.downsample.conv",
        block_up="decoder.conv_blocks.{up}.res.{number}",
        attention_up="decoder.conv_blocks.{up}.attn.{number}",
        upsampling="decoder.conv_blocks.{up}.upsample.conv",
        middle=("mid.0", "mid.1", "mid.2"),
        containers=("ema", "model", "state_dict"),
        unit_length=True,
    ),
    "taming": Spelling(containers=("state_dict",)),
    "diffusers": Spelling(
        block="encoder.down_blocks.{level}.resnets.{number}",
        attention="encoder.down_blocks.{level}.attentions.{number}",
        downsampling="encoder.down_blocks.{level}.downsamplers.0.conv",
        block_up="decoder.up_blocks.{up}.resnets.{number}",
        attention_up="decoder.up_blocks.{up}.attentions.{number}",
        upsampling="decoder.up_blocks.{up}.upsamplers.0.conv",
        middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm="conv_norm_out",
        shortcut="conv_shortcut",
        attention_parts=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
        file="diffusion_pytorch_model.safetensors",
        renames=((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")),
    ),
}

CODEBOOK = "quantize.embedding.weight"


def weight_names(spelling: Spelling, part: VQGANPart, encoder: Stack, decoder: Stack) -> dict[str, list[str]]:
    """Map our names `encoder.N...`, `decoder.N...` to the project's; our `qkv` is three weights there."""
    names: dict[str, list[str]] = {}
    for side, stack, prefixes in (
        ("encoder", encoder, _encoder_names(spelling, part)),
        ("decoder", decoder, _decoder_names(spelling, part)),
    ):
        # Identities have no weights: they hold the index of a SiLU in published state dicts.
        layers = [(number, layer) for number, layer in enumerate(stack) if not isinstance(layer, nn.Identity)]
        for (number, layer), prefix in zip(layers, prefixes, strict=True):
            for ours, theirs in _layer_names(spelling, layer).items():
                for end in ("weight", "bias"):
                    names[f"{side}.{number}{ours}.{end}"] = [f"{prefix}{name}.{end}" for name in theirs]
    return names


def _layer_names(spelling: Spelling, layer: nn.Module) -> dict[str, list[str]]:
    """Map our names of a layer's modules to the project's."""
    if isinstance(layer, ResidualBlock):
        names = {f".{name}": [f".{name}"] for name in ("norm1", "conv1", "norm2", "conv2")}
        return names if isinstance(layer.shortcut, nn.Identity) else {**names, ".shortcut": [f".{spelling.shortcut}"]}
    if isinstance(layer, AttentionBlock):
        norm, *qkv, out = (f".{name}" for name in spelling.attention_parts)
        return {".norm": [norm], ".qkv": qkv, ".out": [out]}
    return {".conv": [""]} if isinstance(layer, Downsampling | Upsampling) else {"": [""]}


def _encoder_names(spelling: Spelling, part: VQGANPart) -> Iterator[str]:
    """Yield the names of the encoder's layers in order, the 1x1 convolution to the quantizer last."""
    yield "encoder.conv_in"
    for level in range(len(part.multipliers)):
        if level:
            yield spelling.downsampling.format(level=level - 1)
        for number in range(part.residual_blocks):
            yield spelling.block.format(level=level, number=number)
            if 2**level in part.attention:
                yield spelling.attention.format(level=level, number=number)
    yield from (f"encoder.{name}" for name in (*spelling.middle, spelling.norm, "conv_out"))
    yield "quant_conv"


def _decoder_names(spelling: Spelling, part: VQGANPart) -> Iterator[str]:
    """Yield the names of the decoder's layers in order, the 1x1 convolution from the quantizer first."""
    yield "post_quant_conv"
    yield from (f"decoder.{name}" for name in ("conv_in", *spelling.middle))
    for up, level in enumerate(reversed(range(len(part.multipliers)))):
        for number in range(part.residual_blocks + 1):
            yield spelling.block_up.format(level=level, up=up, number=number)
            if 2**level in part.attention:
                yield spelling.attention_up.format(level=level, up=up, number=number)
        if level:
            yield spelling.upsampling.format(level=level, up=up)
    yield from (f"decoder.{name}" for name in (spelling.norm, "conv_out"))


def infer_network(spelling: Spelling, weights: Mapping[str, Tensor]) -> VQGANPart:
    """Infer the network's sizes from the shapes of its weights. Errors: UserError for a missing weight or impossible sizes."""

    def has(template: str, level: int, number: int = 0, end: str = "") -> bool:
        return f"{template.format(level=level, number=number)}{end}" in weights

    hidden = get_weight(weights, "encoder.conv_in.weight").shape[0]
    levels, blocks = 0, 0
    while has(spelling.block, levels, end=".conv1.weight"):
        levels += 1
    while has(spelling.block, 0, blocks, ".conv1.weight"):
        blocks += 1
    first = spelling.block.format(level=0, number=0)
    get_weight(weights, f"{first}.conv1.weight")
    widths = [get_weight(weights, f"{spelling.block.format(level=level, number=0)}.conv2.weight").shape[0] for level in range(levels)]
    norm = f".{spelling.attention_parts[0]}.weight"
    return VQGANPart(
        hidden_channels=hidden,
        multipliers=[width // hidden for width in widths],
        residual_blocks=blocks,
        attention=[2**level for level in range(levels) if has(spelling.attention, level, end=norm)],
        latent_channels=get_weight(weights, "encoder.conv_out.weight").shape[0],
    )


def get_weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Look up a weight. Errors: UserError if it is missing."""
    if name not in weights:
        raise UserError(f"expected a weight {name}, found none")
    return weights[name]


def convert_weights(theirs: Mapping[str, Tensor], names: Mapping[str, list[str]], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a project's weights to ours.

    Args:
        theirs: the project's weights.
        names: from `weight_names`.
        ours: weights of the expected shapes.
    Errors: UserError, naming the first weight that is missing or of another shape.
    """
    converted = {}
    for ours_name, pieces in names.items():
        expected = (ours[ours_name].shape[0] // len(pieces), *ours[ours_name].shape[1:])
        for name in pieces:
            shape = tuple(get_weight(theirs, name).shape)
            # Our linear layers over pixels may be 1x1 convolutions there.
            if shape not in (expected, (*expected, 1, 1)) or (len(expected) != 2 and shape != expected):
                raise UserError(f"expected a weight {name} of shape {expected}, found {shape}")
        converted[ours_name] = torch.cat([theirs[name].view(expected) for name in pieces])
    return converted
