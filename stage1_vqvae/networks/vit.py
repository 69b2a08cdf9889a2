"""The ViT family: encoder and decoder are transformers over patches of pixels.

Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN", section 3.1: non-overlapping patches are mapped linearly to tokens,
then transformer blocks with bidirectional attention (Vaswani et al. 2017; pre-normalisation, GELU, an MLP of four times the width), then
two layers with a tanh between them. The decoder is the same from codes to patches. The second of the two layers maps to the codes' few
channels, the paper's factorised codes. Unit-length codes are the quantizer's (`metric: cosine`).

Unlike the paper, positions are rotary (attention.py, on normalised queries and keys) and not learned embeddings, so images of any height
and width divisible by the patch will do, also other than in training; and attention and normalisations have no biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from configs.errors import require
from configs.parts import NetworkPart
from stage1_vqvae.attention import Attention, Norm, rotations
from training.precision import full_precision

# Hidden width of the MLPs and of the head, in token widths.
_EXPANSION = 4
# Initial standard deviation of the blocks' matrices (GPT-2's).
_INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ViTPart(NetworkPart):
    """ViT-VQGAN's transformers over patches (Yu et al. 2021); the defaults are its small model."""

    downsampling: int = 8
    """Pixels per patch, that is per code, along each side."""
    layers: int = 8
    """Transformer blocks of the encoder, and of the decoder."""
    width: int = 512
    """Channels per token."""
    heads: int = 8
    """Attention heads. Width / heads must be a multiple of 4, for the rotary positions of two axes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""

    def __post_init__(self) -> None:
        where = "tokenizer.network"
        for name in ("downsampling", "layers", "heads"):
            require(getattr(self, name) >= 1, f"{where}.{name}", "at least 1", getattr(self, name))
        turned = self.width >= 1 and self.width % (4 * self.heads) == 0
        require(turned, f"{where}.width", f"a multiple of 4 x {self.heads} heads", self.width)

    @override
    def build(self, image_channels: int, code_dim: int, output_channels: int) -> tuple[nn.Module, nn.Module]:
        return Encoder(self, image_channels, code_dim), Decoder(self, code_dim, output_channels)


class MLP(nn.Module):
    """out(activation(hidden(x))), with a hidden layer four times as wide as x."""

    def __init__(self, width: int, out_width: int, activation: nn.Module) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, _EXPANSION * width)
        self.activation = activation
        self.out = nn.Linear(_EXPANSION * width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) to (.., out_width)."""
        return self.out(self.activation(self.hidden(x)))


class Block(nn.Module):
    """Transformer block: attention, then MLP, each with pre-normalisation and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = Norm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = Norm(width)
        self.mlp = MLP(width, width, nn.GELU())

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation, causal=False)
        return x + self.mlp(self.mlp_norm(x))


class _TokenTransformer(nn.Module):
    """Base of encoder and decoder: a linear map to tokens, transformer blocks, and a two-layer head per token."""

    def __init__(self, part: ViTPart, in_width: int, out_width: int) -> None:
        super().__init__()
        self.patch, self.head_width = part.downsampling, part.width // part.heads
        self.checkpointing = part.gradient_checkpointing
        self.tokens = nn.Linear(in_width, part.width)
        self.blocks = nn.ModuleList(Block(part.width, part.heads) for _ in range(part.layers))  # type: ignore[assignment]
        self.norm = Norm(part.width)
        self.head = MLP(part.width, out_width, nn.Tanh())
        self._initialise()

    blocks: Sequence[Block]

    def _initialise(self) -> None:
        # The first and last maps keep their input's scale at any width, so that initial latents are spread out enough to quantize.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL_STD if name.startswith("blocks.") else module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # GPT-2's rule: blocks start near the identity, and the residual stream keeps its scale at any depth.
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp.out):
                nn.init.normal_(projection.weight, std=_INITIAL_STD / (2 * len(self.blocks)) ** 0.5)

    def _transform(self, grid: Tensor) -> Tensor:
        """(B, h, w, in_width) to (B, h, w, out_width)."""
        height, width = grid.shape[1:3]
        rotation = _rotations_of_grid(height, width, self.head_width, self.tokens.weight)
        # The residual stream stays in the weights' precision, also under autocast.
        x = full_precision(self.tokens(grid.flatten(1, 2)))
        for block in self.blocks:
            x = checkpoint(block, x, rotation, use_reentrant=False) if self.checkpointing and self.training else block(x, rotation)
        return self.head(self.norm(x)).unflatten(1, (height, width))


class Encoder(_TokenTransformer):
    """Images (B, C, H, W) to latents (B, code_dim, H / patch, W / patch), channels last in memory."""

    def __init__(self, part: ViTPart, image_channels: int, code_dim: int) -> None:
        super().__init__(part, image_channels * part.downsampling**2, code_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, code_dim, h, w)."""
        return self._transform(split_into_patches(images, self.patch)).movedim(-1, 1)


class Decoder(_TokenTransformer):
    """Latents (B, code_dim, h, w) to images (B, output_channels, h * patch, w * patch), channels last in memory."""

    def __init__(self, part: ViTPart, code_dim: int, output_channels: int) -> None:
        super().__init__(part, code_dim, output_channels * part.downsampling**2)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, code_dim, h, w) to (B, output_channels, H, W)."""
        return join_patches(self._transform(latents.movedim(1, -1)), self.patch)


def split_into_patches(images: Tensor, patch: int) -> Tensor:
    """Split images (B, C, H, W) into the pixels of each patch, (B, h, w, patch * patch * C): row by row, channels last."""
    pixels = images.movedim(1, -1).unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # (B, h, patch, w, patch, C)
    return pixels.transpose(2, 3).flatten(3)


def join_patches(patches: Tensor, patch: int) -> Tensor:
    """Join patches (B, h, w, patch * patch * C) to images (B, C, H, W), channels last in memory; inverse of `split_into_patches`."""
    pixels = patches.unflatten(-1, (patch, patch, -1)).transpose(2, 3)  # (B, h, patch, w, patch, C)
    return pixels.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def _rotations_of_grid(height: int, width: int, head_width: int, like: Tensor) -> Tensor:
    """Compute the rotary table of a grid's tokens, row by row. In every pass: it costs less than any layer of a block."""
    rows, columns = (torch.arange(size, device=like.device) for size in (height, width))
    return rotations(torch.cartesian_prod(rows, columns), head_width).to(like)
