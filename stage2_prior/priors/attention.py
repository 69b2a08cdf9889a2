"""Attention of priors: over all positions at once, as stage1_vqvae/attention.py has it, or one position at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_vqvae.attention import Attention, Norm
from training.kernels import Kernel


def _load_attend() -> Callable[..., Any]:
    from stage2_prior.priors.step_kernels import attend

    return attend


_ATTEND = Kernel("attention while sampling", _load_attend)


class KeyValueCache:
    """Keys and values of all positions, preallocated: (B, heads, T, head width) each, in the weights' precision."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        # Zeros: a static-shape step multiplies slots that are not written yet by attention weights of zero.
        self.keys = like.new_zeros(batch, heads, length, head_width)
        self.values = torch.zeros_like(self.keys)

    def reset(self) -> None:
        """Zero the cache: a NaN in masked slots would still propagate (0 x NaN = NaN)."""
        self.keys.zero_()
        self.values.zero_()


class CachedAttention(Attention):
    """Attention with a key-value cache, for one position after another."""

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty key-value cache for sequences of `length` positions."""
        return KeyValueCache(batch, self.heads, length, self.head_width, self.out.weight)

    def step_(self, x: Tensor, normed: Tensor, rotations: Tensor, cache: KeyValueCache, position: int | Tensor) -> Tensor:
        """Add the attention of one position to x (B, C), in place; appends its key and value to the cache. No gradient.

        On a GPU, and at a position that is a tensor, attention is one Triton kernel, which reads only the filled part of the cache.

        Args:
            normed: (B, C), the layer's input.
            rotations: (T, d / 2, 2) of all positions, or (T, 2, d / 2, 2) of queries and keys apart.
            position: an int reads the cache up to it; a tensor (1,) makes shapes the same at every position, for CUDA graphs.
        """
        projected, keys, values = product(self.qkv, normed), cache.keys, cache.values
        kernel_types = keys.dtype == projected.dtype != torch.float64 and rotations.dtype == torch.float32
        if isinstance(position, Tensor) and kernel_types and _ATTEND.usable(keys.device):
            attended = _ATTEND(projected, rotations, keys, values, position, self.gain)
            if attended is not None:
                return add_product_(x, attended, self.out)
        query, key, value = self._separated(projected[:, None], select(rotations, position)[None])
        if isinstance(position, int):
            keys[:, :, position : position + 1] = key
            values[:, :, position : position + 1] = value
            attended = F.scaled_dot_product_attention(query, keys[:, :, : position + 1], values[:, :, : position + 1])
        else:
            keys.index_copy_(2, position, key)
            values.index_copy_(2, position, value)
            mask = torch.arange(keys.shape[2], device=keys.device)[None] <= position
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return add_product_(x, attended.flatten(1), self.out)

    def prefill(self, x: Tensor, rotation: Tensor, cache: KeyValueCache, rows: slice, start: int, causal: bool | Tensor = True) -> Tensor:
        """Apply the whole layer to some rows' positions from `start` on, (B, n, C) to the same shape; caches their keys and values.

        Args:
            rotation: of these positions, in any shape that `Attention` takes.
            causal: as in `Attention`; a mask is (n, start + n), of all cached positions and these.
        """
        query, key, value = self._separated(self.qkv(x), rotation)
        count, stop = x.shape[1], start + x.shape[1]
        keys, values = cache.keys[rows, :, :stop], cache.values[rows, :, :stop]
        keys[:, :, start:], values[:, :, start:] = key, value
        if causal is True and start > 0:
            causal = causal_mask(count, stop, x.device)
        mask = causal if isinstance(causal, Tensor) else None
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal is True)
        return self.out(attended.transpose(1, 2).flatten(2))


def causal_mask(count: int, stop: int, device: torch.device, branches: int = 0) -> Tensor:
    """Return the mask, bool (count, stop), of the positions that the last `count` of `stop` positions see: themselves and those before
    them. The last `branches` do not see one another.
    """
    mask = torch.ones(count, stop, dtype=torch.bool, device=device).tril(stop - count)
    mask[count - branches :, stop - branches :] = torch.eye(branches, dtype=torch.bool, device=device)
    return mask


class GridAttention(nn.Module):
    """x + attention over a grid's positions. Causal, on the horizontal stack: that of PixelSNAIL (Chen et al. 2018); a position's
    own features know only codes before it, so it may attend to itself.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = Norm(width), CachedAttention(width, heads)

    def forward(self, x: Tensor, rotation: Tensor, causal: bool = True) -> Tensor:
        """Attend over the positions of (B, h, w, C); the shape stays."""
        sequence = x.flatten(1, 2)
        return (sequence + self.attention(self.norm(sequence), rotation, causal)).view(x.shape)

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty key-value cache for a grid of `length` positions."""
        return self.attention.new_cache(batch, length)

    def step_(self, x: Tensor, rotations: Tensor, cache: KeyValueCache, position: int | Tensor) -> Tensor:
        """Apply the layer to one position, (B, C), in place; see `CachedAttention.step_`."""
        return self.attention.step_(x, self.norm(x), rotations, cache, position)

    def prefill(self, x: Tensor, rotation: Tensor, cache: KeyValueCache, start: int) -> Tensor:
        """(B, n, C) of the positions from `start` on to the same shape; their keys and values are cached."""
        return x + self.attention.prefill(self.norm(x), rotation, cache, slice(None), start)


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear map without bias to few rows (B, C), B much smaller than C, without gradient."""
    return torch.mm(linear.weight, x.t()).t() if _weight_first(x) else linear(x)


def add_product_(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """Add `product(linear, y)` to x (B, C) in place; one kernel on a GPU."""
    return x.add_(product(linear, y)) if _weight_first(x) else x.addmm_(y, linear.weight.t())


def _weight_first(x: Tensor) -> bool:
    """Whether a product with few rows has the weight on its left: with the long side first, MKL takes a sixth less time."""
    return x.device.type == "cpu"


def select(x: Tensor, index: int | Tensor, axis: int = 0) -> Tensor:
    """Return `x.select(axis, index)`, also for an index tensor (1,)."""
    return x.select(axis, index) if isinstance(index, int) else x.index_select(axis, index).squeeze(axis)
