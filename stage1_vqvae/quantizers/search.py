"""The nearest-code search that every codebook uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from training.kernels import Kernel, operator
from training.precision import ieee_float32

# A CPU's second-level cache, a core, where the machine does not say.
_USUAL_CACHE_BYTES = 2**20
# Where Linux says it.
_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
# An accelerator needs more work per launch than a cache holds.
_BLOCK_BYTES_ACCELERATOR = 256 * 2**20
# Codes whose least distance is found at once.
_GROUP = 64
# The kernel of fused.py is for few channels; with many the matrix product dominates, and cuBLAS is faster.
_WIDEST_FUSED = 64


def _load_fused() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from stage1_vqvae.quantizers.fused import fused_nearest

    return fused_nearest


_FUSED = Kernel("the nearest-code search", _load_fused)


@torch.no_grad()
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The index of each vector's nearest code by euclidean distance; the lower index on a tie. (Of unit vectors, that is the
    code of the greatest cosine.)

    In float32 whatever autocast says and without TF32. The distance is expanded as |e|^2 - 2 z.e, whose cancellation
    grows with the distance of both from the origin, so vectors and codes are first centred on the codebook's mean.
    The N x K distances are never held whole.

    Args:
        vectors: (N, D).
        codebook: (K, D).
    Returns: (N,) int64.
    Errors: ValueError if the widths differ.
    """
    if vectors.ndim != 2 or vectors.shape[1] != codebook.shape[1]:
        raise ValueError(f"vectors: expected (N, {codebook.shape[1]}), found {tuple(vectors.shape)}")
    if torch.compiler.is_exporting():  # an exported graph supports neither the custom operator nor a loop over a dynamic batch
        with torch.autocast(vectors.device.type, enabled=False):
            dtype = torch.promote_types(vectors.dtype, torch.float32)
            codes, centre = _centred(codebook.to(dtype))
            return torch.argmin(codes.square().sum(1) - 2 * (vectors.to(dtype) - centre) @ codes.T, 1)
    return _search(vectors, codebook)


@operator(
    "two_stage::nearest_codes(Tensor vectors, Tensor codebook) -> Tensor",
    fake=lambda vectors, codebook: vectors.new_empty(vectors.shape[0], dtype=torch.int64),
)
def _search(vectors: Tensor, codebook: Tensor) -> Tensor:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    with torch.autocast(vectors.device.type, enabled=False), ieee_float32(vectors.device):
        codes, centre = _centred(codebook.to(dtype))
        squares = codes.square().sum(1)
        if _FUSED.usable(vectors.device) and dtype == torch.float32 and codes.shape[1] <= _WIDEST_FUSED:
            nearest = _FUSED(vectors.to(dtype) - centre, codes, squares)
            if nearest is not None:
                return nearest
        # Whole groups of codes: the last one is filled up with copies of the last code, which count as it.
        filled = torch.arange(-(-len(codes) // _GROUP) * _GROUP, device=codes.device).clamp_(max=len(codes) - 1)
        # |e|^2 as one channel more, which is 1 in every vector: adding it to the product would be a pass over all distances.
        terms = torch.cat([-2 * codes, squares[:, None]], 1)[filled].T
        count, size = len(vectors), rows_a_block(terms.T)
        rows = torch.cat([vectors.to(dtype) - centre, vectors.new_ones(count, 1, dtype=dtype)], 1)
        distances = torch.empty(min(count, size), len(filled), dtype=dtype, device=vectors.device)
        nearest = torch.empty(count, dtype=torch.int64, device=vectors.device)
        for start in range(0, count, size):
            block = rows[start : start + size]
            nearest[start : start + size] = _argmin_by_groups(torch.mm(block, terms, out=distances[: len(block)]))
    return nearest.clamp_(max=len(codebook) - 1)


def _centred(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (K, D) minus their safe centre, and the centre (D,)."""
    centre = _safe_centre(codes)
    return codes - centre, centre


def _safe_centre(codes: Tensor) -> Tensor:
    """The mean of the codes (K, D) if all of them lie about it, far from the origin; otherwise the origin.

    Then the squares of centred codes and latents are no larger than before. A few codes far from the others would draw
    the mean away from all of them.
    """
    centre = codes.mean(0)
    spread, nearest = (codes - centre).square().sum(1).amax(0), codes.square().sum(1).amin(0)
    return torch.where(4 * spread <= nearest, centre, 0.0)


def _argmin_by_groups(distances: Tensor) -> Tensor:
    """argmin over dim 1, in two steps: of the groups' minima, which processors find many at once, then within the group."""
    groups = distances.view(len(distances), -1, _GROUP)
    group = groups.amin(2).argmin(1)
    rows = torch.arange(len(distances), device=distances.device)
    return group * _GROUP + groups[rows, group].argmin(1)


def rows_a_block(codebook: Tensor) -> int:
    """How many vectors' distances to all codes (K, D) make a block.

    On a CPU, what all threads' second-level caches hold: so a block stays there between the matrix product that writes it and the
    argmin that reads it.
    """
    on_cpu = codebook.device.type == "cpu"
    block_bytes = torch.get_num_threads() * cache_bytes() if on_cpu else _BLOCK_BYTES_ACCELERATOR
    return max(1, block_bytes // (codebook.element_size() * len(codebook)))


@cache
def cache_bytes() -> int:
    """The size of a core's second-level cache on this machine."""
    try:
        return int(_CACHE_SIZE.read_text(encoding="utf-8").strip().removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return _USUAL_CACHE_BYTES
