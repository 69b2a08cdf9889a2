"""The ViT family: patches of pixels as the tokens of a transformer, each way.

Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN", section 3.1: patches that do not overlap are mapped to tokens,
transformer blocks follow in which every token attends to all of them (Vaswani et al. 2017; normalisation before each part, GELU, an
MLP of four times the width), and a map of two layers with a tanh between them, nothing after it; the decoder is the same from codes to
patches. The map to the codes' few channels, the paper's factorised codes, is the second of those layers; the first is as wide as
an MLP's. Codes of unit length are the quantizer's (`metric: cosine`).

Otherwise than in the paper, positions are told by attention alone, which turns queries and keys by row and column (attention.py) after
normalising them, where the paper adds a learned vector to each position: so any height and width divisible by the patch will do, also
others than in training. And attention and normalisations have no biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from configs.errors import require
from configs.schema import NetworkPart
from stage1_vqvae.attention import Attention, Norm, rotations
from training.precision import full_precision

# Of an MLP's hidden layer, and of the one with a tanh, in widths of a token.
_EXPANSION = 4
# Of the blocks' matrices (GPT-2's).
_INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class ViTPart(NetworkPart):
    """ViT-VQGAN's transformers over patches (Yu et al. 2021); the defaults are its small ones."""

    downsampling: int = 8
    """Pixels along each side of a patch, which is a code."""
    layers: int = 8
    """Transformer blocks of the encoder and of the decoder."""
    width: int = 512
    """Channels of a token."""
    heads: int = 8
    """Attention heads. Width / heads must be a multiple of 4, for the rotary positions of two axes."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        where = "tokenizer.network"
        for name in ("downsampling", "layers", "heads"):
            require(getattr(self, name) >= 1, f"{where}.{name}", "at least 1", getattr(self, name))
        turned = self.width >= 1 and self.width % (4 * self.heads) == 0
        require(turned, f"{where}.width", f"a multiple of 4 x {self.heads} heads", self.width)

    @override
    def build(self, image_channels: int, code_dim: int, output_channels: int) -> tuple[nn.Module, nn.Module]:
        return Encoder(self, image_channels, code_dim), Decoder(self, code_dim, output_channels)


class TwoLayers(nn.Module):
    """out(activation(hidden(x))), its hidden layer four times as wide as x."""

    def __init__(self, width: int, wanted: int, activation: nn.Module) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, _EXPANSION * width)
        self.activation = activation
        self.out = nn.Linear(_EXPANSION * width, wanted)

    def forward(self, x: Tensor) -> Tensor:
        """(.., C) to (.., wanted)."""
        return self.out(self.activation(self.hidden(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = Norm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = Norm(width)
        self.mlp = TwoLayers(width, width, nn.GELU())

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation, causal=False)
        return x + self.mlp(self.mlp_norm(x))


class _TokenTransformer(nn.Module):
    """What encoder and decoder are: a linear map to tokens, blocks, and two layers to what is wanted of each token."""

    def __init__(self, part: ViTPart, given: int, wanted: int) -> None:
        super().__init__()
        self.patch, self.head_width = part.downsampling, part.width // part.heads
        self.checkpointing = part.gradient_checkpointing
        self.tokens = nn.Linear(given, part.width)
        self.blocks = nn.ModuleList(Block(part.width, part.heads) for _ in range(part.layers))  # type: ignore[assignment]
        self.norm = Norm(part.width)
        self.head = TwoLayers(part.width, wanted, nn.Tanh())
        self._initialise()

    blocks: Sequence[Block]

    def _initialise(self) -> None:
        # The maps at either end keep their input's scale at any width, so that what is quantized begins wide enough to be told apart.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL_STD if name.startswith("blocks.") else module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Each block begins as nearly the identity (GPT-2's rule: the residual sum keeps its scale at any depth).
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp.out):
                nn.init.normal_(projection.weight, std=_INITIAL_STD / (2 * len(self.blocks)) ** 0.5)

    def _mapped(self, grid: Tensor) -> Tensor:
        """(B, h, w, given) to (B, h, w, wanted)."""
        height, width = grid.shape[1:3]
        rotation = _rotations_of_grid(height, width, self.head_width, self.tokens.weight)
        # What blocks add up stays as precise as the weights, whatever mixed precision makes of what they add.
        x = full_precision(self.tokens(grid.flatten(1, 2)))
        for block in self.blocks:
            x = checkpoint(block, x, rotation, use_reentrant=False) if self.checkpointing and self.training else block(x, rotation)
        return self.head(self.norm(x)).unflatten(1, (height, width))


class Encoder(_TokenTransformer):
    """Images (B, C, H, W) to latents (B, code_dim, H / patch, W / patch), which are channels last in memory, as tokens are."""

    def __init__(self, part: ViTPart, image_channels: int, code_dim: int) -> None:
        super().__init__(part, image_channels * part.downsampling**2, code_dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, code_dim, h, w)."""
        return self._mapped(split_into_patches(images, self.patch)).movedim(-1, 1)


class Decoder(_TokenTransformer):
    """Latents (B, code_dim, h, w) to images (B, output_channels, h * patch, w * patch), channels last in memory."""

    def __init__(self, part: ViTPart, code_dim: int, output_channels: int) -> None:
        super().__init__(part, code_dim, output_channels * part.downsampling**2)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, code_dim, h, w) to (B, output_channels, H, W)."""
        return join_patches(self._mapped(latents.movedim(1, -1)), self.patch)


def split_into_patches(images: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to the pixels of each patch, (B, h, w, patch * patch * C): row by row, channels last."""
    pixels = images.movedim(1, -1).unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # (B, h, patch, w, patch, C)
    return pixels.transpose(2, 3).flatten(3)


def join_patches(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `split_into_patches`: (B, h, w, patch * patch * C) to (B, C, H, W), channels last in memory."""
    pixels = patches.unflatten(-1, (patch, patch, -1)).transpose(2, 3)  # (B, h, patch, w, patch, C)
    return pixels.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def _rotations_of_grid(height: int, width: int, head_width: int, like: Tensor) -> Tensor:
    """The rotary positions of a grid's tokens, row by row; made when they are needed, which costs less than a block's smallest part."""
    rows, columns = (torch.arange(size, device=like.device) for size in (height, width))
    return rotations(torch.cartesian_prod(rows, columns), head_width).to(like)
