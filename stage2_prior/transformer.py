"""A decoder-only transformer over a sequence of tokens. It sees integers only, never images or files.

RMSNorm (Zhang & Sennrich 2019) before each part, SwiGLU (Shazeer 2020), rotary positions (Su et al. 2021) of which one
half of a head turns with the row and the other with the column, and queries and keys normalised (Henry et al. 2020).
Place 0 holds a start vector of its own, place t the token of place t-1, and the label's embedding is added everywhere:
no embedding row is shared between start, label and codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Prior
from stage1_vqvae.losses import full_precision
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.sequence import SequenceLayout

# Wavelengths of the rotary positions run from 2 pi to 2 pi times this many rows: grids are tens of codes wide.
_ROTARY_BASE = 100.0


class KeyValueCache:
    """Keys and values of all layers and places, preallocated: two tensors (layers, B, heads, T, head width)."""

    def __init__(self, layers: int, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(layers, batch, heads, length, head_width)
        self.values = torch.empty_like(self.keys)
        self.filled = 0


class Transformer(nn.Module):
    """p(tokens | label), one place after another."""

    def __init__(self, config: Prior, layout: SequenceLayout, num_labels: int) -> None:
        """`num_labels` 0: unconditional. The label index `num_labels` means none, and always has its embedding."""
        super().__init__()
        self.config, self.layout, self.num_labels = config, layout, num_labels
        width = config.width
        self.token = nn.Embedding(layout.vocabulary, width)
        self.label = nn.Embedding(num_labels + 1, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(torch.zeros(layout.length, width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.dropout) for _ in range(config.layers))  # type: ignore[assignment]
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, layout.vocabulary, bias=False)
        cosines, sines = rotary_angles(layout.positions(), width // config.heads)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.register_buffer("foreign_tokens", layout.foreign_tokens(), persistent=False)
        self._initialise()

    cosines: Tensor
    sines: Tensor
    foreign_tokens: Tensor
    blocks: Sequence[Block]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.place, std=0.02)
        # Each block begins as nearly the identity (GPT-2's rule: the residual sum keeps its scale at any depth).
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp.out):
                nn.init.normal_(projection.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)

    def labels_or_none(self, labels: Tensor | None, batch: int) -> Tensor:
        """Labels (B,) as given, or the index that means none."""
        return torch.full((batch,), self.num_labels, device=self.start.device) if labels is None else labels

    def forward(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        """Logits (B, T, V) of every place given the tokens before it, and the label.

        Args:
            tokens: (B, T) int64, all places, or the first t of them: then logits have t + 1 places, up to T.
            labels: (B,) int64, `num_labels` where there is none; None: none anywhere.
        """
        batch, known = tokens.shape
        places = min(known + 1, self.layout.length)
        start = self.start.expand(batch, 1, -1)
        x = torch.cat([start, self.token(tokens[:, : places - 1])], 1) + self.place[:places]  # (B, t, C)
        x = self.dropout(x + self.label(self.labels_or_none(labels, batch))[:, None])
        for block in self.blocks:
            x = block(x, self.cosines[:places], self.sines[:places])
        return self._of_its_level(self.head(self.norm(x)), slice(0, places))

    def log_prob(self, codes: Codes, labels: Tensor | None) -> Tensor:
        """log p of each token given those before it, (B, T), in nats, float32."""
        tokens = self.layout.to_tokens(codes)
        logits = full_precision(self(tokens, labels))
        return -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")

    def new_cache(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` sequences."""
        heads = self.config.heads
        return KeyValueCache(len(self.blocks), batch, heads, self.layout.length, self.config.width // heads, self.start)

    def step(self, token: Tensor | None, labels: Tensor | None, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) of the next place, from the token (B,) of the place before (None at the start) and the cache,
        which grows by one place.
        """
        t, batch = cache.filled, cache.keys.shape[1]
        x = self.start.expand(batch, -1) if token is None else self.token(token)
        x = (x + self.place[t] + self.label(self.labels_or_none(labels, batch)))[:, None]  # (B, 1, C)
        for layer, block in enumerate(self.blocks):
            x = block.step(x, self.cosines[t : t + 1], self.sines[t : t + 1], cache.keys[layer], cache.values[layer], t)
        cache.filled = t + 1
        return self._of_its_level(self.head(self.norm(x)), slice(t, t + 1))[:, 0]

    def _of_its_level(self, logits: Tensor, places: slice) -> Tensor:
        """Logits (B, t, V) of some places, without the other levels' tokens; finite, so that guidance makes no NaN."""
        if len(self.layout.grids) == 1:
            return logits
        return logits.masked_fill(self.foreign_tokens[places], torch.finfo(logits.dtype).min)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """(B, T, C) to the same shape; causal."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cosines, sines))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def step(self, x: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, t: int) -> Tensor:
        """(B, 1, C), the place t alone; its key and value are added to the caches (B, heads, T, head width)."""
        x = x + self.attention.step(self.attention_norm(x), cosines, sines, keys, values, t)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Multi-head causal self-attention with normalised, rotated queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)

    def _project(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return rotate(self.query_norm(query), cosines, sines), rotate(self.key_norm(key), cosines, sines), value

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""
        query, key, value = self._project(x, cosines, sines)
        attended = F.scaled_dot_product_attention(query, key, value.to(query), is_causal=True)
        return self.out(rearrange(attended, "b h t d -> b t (h d)"))

    def step(self, x: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, t: int) -> Tensor:
        """(B, 1, C) to the same shape, attending to the caches' places 0..t."""
        query, key, value = self._project(x, cosines, sines)
        keys[:, :, t : t + 1] = key
        values[:, :, t : t + 1] = value
        attended = F.scaled_dot_product_attention(query, keys[:, :, : t + 1], values[:, :, : t + 1])
        return self.out(rearrange(attended, "b h t d -> b t (h d)"))


class RMSNorm(nn.RMSNorm):
    """In its weights' precision, which autocast leaves at float32: a sum of squares needs it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return super().forward(x.to(self.weight.dtype))


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)), its width 8/3 of x's, so that it has the parameters of a 4x MLP; a multiple of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 32) * 32
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(F.silu(gate) * up)


def rotary_angles(positions: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_width / 2): the first half of the pairs turns with the row, the second with the column.

    Place t holds the token of place t-1 but is turned as place t, the one it predicts.
    """
    quarter = head_width // 4
    frequencies = _ROTARY_BASE ** (-torch.arange(quarter) / quarter)
    angles = (positions[:, 1:, None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of (B, heads, T, d) by its place's angle."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1).to(x.dtype)
