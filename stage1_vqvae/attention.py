"""Self-attention over positions in grids, for networks and priors.

Queries and keys are normalised (Henry et al. 2020) and turned by rotary positions (Su et al. 2021): half of a head's channels
turn with the row, the other half with the column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.devices import as_float64
from training.precision import full_precision

# Wavelengths of the rotary positions run from 2 pi to below 2 pi times this many rows: grids are tens of codes wide.
_ROTARY_BASE = 100.0


class Norm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) without bias, computed in the dtype of its weights, also under autocast.

    Not RMSNorm: its backward pass has no fused CPU kernel and takes six times as long.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of (..., C); the shape stays."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention, causal by default."""

    def __init__(self, width: int, heads: int, gain: bool = False) -> None:
        """`gain`: learn a factor of each head's logits, initially 1; without it no logit exceeds the root of the head's width."""
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.gain = nn.Parameter(torch.ones(heads)) if gain else None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, causal: bool | Tensor = True) -> Tensor:
        """Attend over the positions of (B, T, C); the shape stays.

        `causal`: True: each position sees itself and those before it; False: all of them; or a mask, bool (T, T), true where a position
        (row) sees another (column).
        """
        # Two products: in one, the gradients of queries, keys and values would be copied together in the backward pass.
        qk_weight, v_weight = self.qkv.weight.split([2 * x.shape[-1], x.shape[-1]])
        query, key = self._rotated(F.linear(x, qk_weight).unflatten(-1, (2, self.heads, self.head_width)), rotation)
        value = F.linear(x, v_weight).unflatten(-1, (self.heads, self.head_width)).to(query).transpose(1, 2)
        mask = causal if isinstance(causal, Tensor) else None
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal is True)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _separated(self, projected: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the product (B, T, 3 C) of `qkv` into query, key and value, (B, heads, T, d) each."""
        parts = projected.unflatten(-1, (3, self.heads, self.head_width))
        query, key = self._rotated(parts[:, :, :2], rotation)
        return query, key, parts[:, :, 2].to(query).transpose(1, 2)

    def _rotated(self, query_key: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise, scale by the gain and rotate queries and keys (B, T, 2, heads, d); (B, heads, T, d) each.

        `rotation`: (T, d / 2, 2), or of queries and keys apart, (T, 2, d / 2, 2) or (B, T, 2, d / 2, 2).
        """
        normed = F.layer_norm(full_precision(query_key), (self.head_width,))
        if self.gain is not None:
            normed = normed * torch.stack([self.gain, torch.ones_like(self.gain)])[..., None]  # of queries alone: keys are cached
        # With 16-bit weights (sampling) attention runs in 16 bits; in training weights are float32 and autocast decides.
        rotation = rotation[:, None, None] if rotation.ndim == 3 else rotation.unsqueeze(-3)
        query, key = rotate(normed, rotation).to(self.out.weight.dtype).unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2)


def rotations(coordinates: Tensor, head_width: int) -> Tensor:
    """Compute cosines and sines of the rotary angles: the first half of them for the row, the second for the column.

    Args:
        coordinates: (..., 2), row and column of each position.
        head_width: channels per attention head.
    Returns: float64 (..., head_width / 2, 2), on the coordinates' device if that has float64. In float32 the last bit would depend on the
        machine's math library, so it is rounded only where the table is used.
    """
    coordinates, quarter = as_float64(coordinates), head_width // 4
    numbers = torch.arange(quarter, dtype=torch.float64, device=coordinates.device)
    frequencies = _ROTARY_BASE ** (-numbers / quarter)
    angles = (coordinates[..., None] * frequencies).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()], -1)


class RotaryTable(nn.Module):
    """Rotary table of fixed positions: a buffer `table`, `rotations` rounded to the model's precision.

    A model converted to float64, as for entropy coding, gets the unrounded table: its logits then depend on no bit in which another
    machine's cosine may differ.
    """

    table: Tensor

    def __init__(self, coordinates: Tensor, head_width: int) -> None:
        super().__init__()
        self._exact = rotations(coordinates, head_width)
        self.register_buffer("table", self._exact.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryTable:
        super()._apply(fn, recurse)
        if self.table.dtype == torch.float64:
            self.table = self._exact.to(self.table.device)
        return self


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (x_2i, x_2i+1) of (..., T, d) by its position's angle; `rotation` (T, d / 2, 2) holds cosines and sines.

    As complex numbers: one pass through memory each way. torch.compile does not support those, and fuses the passes itself.
    """
    if torch.compiler.is_compiling():
        (real, imaginary), (cosine, sine) = x.unflatten(-1, (-1, 2)).unbind(-1), rotation.unbind(-1)
        return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1).flatten(-2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation)).flatten(-2)
