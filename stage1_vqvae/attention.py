"""Self-attention over positions in grids: what networks and priors attend with.

Queries and keys are normalised (Henry et al. 2020) and turned by rotary positions (Su et al. 2021), of which one half of
a head turns with the row and the other with the column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from training.devices import as_float64
from training.precision import full_precision

# Wavelengths of the rotary positions run from 2 pi to below 2 pi times this many rows: grids are tens of codes wide.
_ROTARY_BASE = 100.0
_NORM_EPSILON = 1e-5


class Norm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) without bias, in its weights' precision, which autocast leaves at float32.

    Not RMSNorm, which saves nothing here: on a CPU its backward pass has no kernel of its own and takes six times as long.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of (..., C); the shape stays."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention, causal unless said otherwise."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def _separated(self, projected: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, heads, T, d) each, of what `qkv` made of (B, T, C)."""
        parts = projected.unflatten(-1, (3, self.heads, self.head_width))
        # Queries and keys in one: half as many passes through memory.
        normed = F.layer_norm(full_precision(parts[:, :, :2]), (self.head_width,))
        # With 16-bit weights (sampling) attention runs in 16 bits; in training weights are float32 and autocast decides.
        query, key = rotate(normed, rotation[:, None, None]).to(self.out.weight.dtype).unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2), parts[:, :, 2].to(query).transpose(1, 2)

    def _projected(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, heads, T, d) each, of (B, T, C)."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._separated(self.qkv(x), rotation)
        # In one tensor with the others, values would have to be normalised with them, and their gradient to be copied beside theirs.
        of_both, of_values = self.qkv.weight.split([2 * x.shape[-1], x.shape[-1]])
        query, key = _Separation.apply(F.linear(x, of_both).unflatten(-1, (2, self.heads, self.head_width)), rotation)
        value = F.linear(x, of_values).unflatten(-1, (self.heads, self.head_width)).to(query)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(self, x: Tensor, rotation: Tensor, causal: bool = True) -> Tensor:
        """(B, T, C) to the same shape; causal: a position attends to itself and those before it."""
        query, key, value = self._projected(x, rotation)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))


class _Separation(torch.autograd.Function):
    """Splits one tensor (B, T, 2, heads, d) into normalised and rotated queries and keys, (B, T, heads, d) each. Its gradient is
    written by hand, to pass through memory less often in training.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        wide = full_precision(parts)
        normed, mean, reciprocal = torch.native_layer_norm(wide, parts.shape[-1:], None, None, _NORM_EPSILON)
        as_complex(normed).mul_(torch.view_as_complex(rotation)[:, None, None])
        ctx.save_for_backward(wide, mean, reciprocal, rotation)
        ctx.dtype = parts.dtype
        return normed[:, :, 0], normed[:, :, 1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        wide, mean, reciprocal, rotation = ctx.saved_tensors
        back = torch.view_as_complex(rotation)[:, None].conj()
        turned = torch.empty_like(wide)
        for number, gradient in enumerate(gradients):
            # Attention without a kernel of its own leaves gradients transposed.
            torch.mul(as_complex(gradient.contiguous()), back, out=as_complex(turned[:, :, number]))
        found = torch.ops.aten.native_layer_norm_backward(
            turned, wide, wide.shape[-1:], mean, reciprocal, None, None, [True, False, False]
        )[0]
        return found.to(ctx.dtype), None


def rotations(coordinates: Tensor, head_width: int) -> Tensor:
    """Cosines and sines of the angles by which positions turn their pairs: the first half of them with the row, the second with the column.

    Args:
        coordinates: (T, 2), rows and columns.
        head_width: of the attention's heads.
    Returns: float64 (T, head_width / 2, 2), on the coordinates' device if that has float64. In float32 the last bit would be this
        machine's mathematical library's: round once, where the table is used.
    """
    coordinates, quarter = as_float64(coordinates), head_width // 4
    numbers = torch.arange(quarter, dtype=torch.float64, device=coordinates.device)
    frequencies = _ROTARY_BASE ** (-numbers / quarter)
    angles = (coordinates[..., None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], -1)


class RotaryTable(nn.Module):
    """`rotations` of fixed positions as a buffer, `table`, rounded to the model's precision.

    A model that goes to float64, as for coding, gets the table as it was before rounding: its logits then hang on no bit that another
    machine's cosine could have otherwise.
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
    """Turn each pair (x_2i, x_2i+1) of (..., T, d) by its position's angle; `rotation` (T, d / 2, 2) has cosines and sines.

    As complex numbers, which is one pass through memory, and one back; torch.compile, which fuses passes, knows none.
    """
    if torch.compiler.is_compiling():
        (real, imaginary), (cosine, sine) = x.unflatten(-1, (-1, 2)).unbind(-1), rotation.unbind(-1)
        return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1).flatten(-2)
    return torch.view_as_real(as_complex(x) * torch.view_as_complex(rotation)).flatten(-2)


def as_complex(x: Tensor) -> Tensor:
    """A view of (..., d) as complex numbers (..., d / 2), of its pairs (x_2i, x_2i+1)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
