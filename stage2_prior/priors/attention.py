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
    """Attention that also takes one position after another, with the keys and values of those before it kept."""

    def new_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty key-value cache for sequences of `length` positions."""
        return KeyValueCache(batch, self.heads, length, self.head_width, self.out.weight)

    def step(self, x: Tensor, rotation: Tensor, cache: KeyValueCache, position: int | Tensor) -> Tensor:
        """Apply the whole layer to one position, (B, C) to (B, C); appends its key and value to the cache. See `attend`."""
        return of_few_rows(self.out, self.attend(of_few_rows(self.qkv, x), rotation, cache, position))

    def attend(self, projected: Tensor, rotation: Tensor, cache: KeyValueCache, position: int | Tensor) -> Tensor:
        """Attend from one position: projected (B, 3 C) to (B, C); appends its key and value to the cache.

        Args:
            projected: query, key and value, the output of `qkv`.
            rotation: (1, d / 2, 2) of this position.
            position: an int reads the cache up to it; a tensor (1,) reads all of it under a mask, with the same shapes at every position.
        """
        query, key, value = self._separated(projected[:, None], rotation)
        keys, values = cache.keys, cache.values
        if isinstance(position, int):
            keys[:, :, position : position + 1] = key
            values[:, :, position : position + 1] = value
            attended = F.scaled_dot_product_attention(query, keys[:, :, : position + 1], values[:, :, : position + 1])
        else:
            keys.index_copy_(2, position, key)
            values.index_copy_(2, position, value)
            mask = torch.arange(keys.shape[2], device=keys.device)[None] <= position
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return attended.flatten(1)

    def prefill(self, x: Tensor, rotation: Tensor, cache: KeyValueCache, rows: slice, start: int) -> Tensor:
        """Apply the whole layer to some rows' positions from `start` on, (B, n, C) to the same shape; caches their keys and values.

        `rotation`: (n, d / 2, 2) of these positions.
        """
        query, key, value = self._separated(self.qkv(x), rotation)
        count, stop = x.shape[1], start + x.shape[1]
        keys, values = cache.keys[rows, :, :stop], cache.values[rows, :, :stop]
        keys[:, :, start:], values[:, :, start:] = key, value
        mask = None if start == 0 else torch.ones(count, stop, dtype=torch.bool, device=x.device).tril(start)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=start == 0)
        return self.out(attended.transpose(1, 2).flatten(2))

    def fixed_attend(self, projected: Tensor, rotations: Tensor, cache: KeyValueCache, position: Tensor) -> Tensor:
        """Attend with static shapes, for CUDA graphs; `rotations` (T, d / 2, 2) are of all positions.

        On a GPU one Triton kernel, which reads only the filled part of the cache.
        """
        keys, values = cache.keys, cache.values
        if _ATTEND.usable(keys.device) and keys.dtype == projected.dtype != torch.float64 and rotations.dtype == torch.float32:
            attended = _ATTEND(projected, rotations, keys, values, position)
            if attended is not None:
                return attended
        return self.attend(projected, rotations.index_select(0, position), cache, position)


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

    def step(self, x: Tensor, rotation: Tensor, cache: KeyValueCache, position: int) -> Tensor:
        """(B, C) of one position to the same shape."""
        return x + self.attention.step(self.norm(x), rotation, cache, position)

    def prefill(self, x: Tensor, rotation: Tensor, cache: KeyValueCache, start: int) -> Tensor:
        """(B, n, C) of the positions from `start` on to the same shape; their keys and values are cached."""
        return x + self.attention.prefill(self.norm(x), rotation, cache, slice(None), start)

    def fixed_step(self, x: Tensor, rotations: Tensor, cache: KeyValueCache, position: Tensor) -> Tensor:
        """Static-shape `step`, for CUDA graphs; `rotations` (T, d / 2, 2) are of all positions."""
        attention = self.attention
        return x + attention.out(attention.fixed_attend(attention.qkv(self.norm(x)), rotations, cache, position))


def of_few_rows(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear map without bias of (B, C), B much smaller than C, without gradient: on a CPU, the weight from the left."""
    # The same product; with its long side first, MKL takes a sixth less time.
    return torch.mm(linear.weight, x.t()).t() if x.device.type == "cpu" else linear(x)
