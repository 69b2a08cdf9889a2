"""The nearest-code search that every codebook uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from training.kernels import Kernel, operator
from training.precision import ieee_float32

# Second-level cache of a core where the machine does not report it.
_DEFAULT_CACHE_BYTES = 2**20
# Where Linux reports it.
_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
# An accelerator needs more work per launch than fits in a cache.
_BLOCK_BYTES_ACCELERATOR = 256 * 2**20
# Codes per group; each group's minimum is vectorised.
_GROUP = 64
# Channels up to which the Triton kernel of fused.py is used; with more, the matrix product dominates, and cuBLAS is faster.
_WIDEST_FUSED = 64


def _load_fused() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from stage1_vqvae.quantizers.fused import fused_nearest

    return fused_nearest


_FUSED = Kernel("the nearest-code search", _load_fused)


def _plain_search(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The search in one expression, for exported graphs, which cannot loop over a batch of any size."""
    with torch.autocast(vectors.device.type, enabled=False):
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        codes, centre = _centred(codebook.to(dtype))
        return torch.argmin(codes.square().sum(1) - 2 * (vectors.to(dtype) - centre) @ codes.T, 1)


@torch.no_grad()
@operator(
    "two_stage::nearest_codes(Tensor vectors, Tensor codebook) -> Tensor",
    fake=lambda vectors, codebook: vectors.new_empty(vectors.shape[0], dtype=torch.int64),
    exported=_plain_search,
)
def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Find each vector's nearest code by euclidean distance; the lower index on a tie. For unit vectors: the greatest cosine.

    In float32 whatever autocast says and without TF32. The distance is expanded as |e|^2 - 2 z.e, whose cancellation error grows with
    the distance of both from the origin, so vectors and codes are first centred on the codebook's mean. The N x K distances are
    computed block by block, never all at once.

    Args:
        vectors: (N, D).
        codebook: (K, D).
    Returns: (N,) int64.
    Errors: ValueError if the widths differ.
    """
    if vectors.ndim != 2 or vectors.shape[1] != codebook.shape[1]:
        raise ValueError(f"vectors: expected (N, {codebook.shape[1]}), found {tuple(vectors.shape)}")
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    with torch.autocast(vectors.device.type, enabled=False), ieee_float32(vectors.device):
        codes, centre = _centred(codebook.to(dtype))
        squares = codes.square().sum(1)
        if _FUSED.usable(vectors.device) and dtype == torch.float32 and codes.shape[1] <= _WIDEST_FUSED:
            nearest = _FUSED(vectors.to(dtype) - centre, codes, squares)
            if nearest is not None:
                return nearest
        # Whole groups of codes: the last group is padded with copies of the last code, clamped back below.
        padded = torch.arange(-(-len(codes) // _GROUP) * _GROUP, device=codes.device).clamp_(max=len(codes) - 1)
        # |e|^2 as one more channel, which is 1 in every vector: adding it to the product would be a pass over all distances.
        terms = torch.cat([-2 * codes, squares[:, None]], 1)[padded].T
        count, size = len(vectors), block_rows(terms.T)
        rows = torch.cat([vectors.to(dtype) - centre, vectors.new_ones(count, 1, dtype=dtype)], 1)
        distances = torch.empty(min(count, size), len(padded), dtype=dtype, device=vectors.device)
        nearest = torch.empty(count, dtype=torch.int64, device=vectors.device)
        for start in range(0, count, size):
            block = rows[start : start + size]
            nearest[start : start + size] = _argmin_by_groups(torch.mm(block, terms, out=distances[: len(block)]))
    return nearest.clamp_(max=len(codebook) - 1)


def _centred(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the safe centre from the codes (K, D); returns both."""
    centre = _safe_centre(codes)
    return codes - centre, centre


def _safe_centre(codes: Tensor) -> Tensor:
    """Return the mean of the codes (K, D) if it lies nearer to all of them than the origin does; otherwise the origin.

    So squares of centred codes and latents are no larger than before: a few outliers could draw the mean away from all other codes.
    """
    centre = codes.mean(0)
    spread, nearest = (codes - centre).square().sum(1).amax(0), codes.square().sum(1).amin(0)
    return torch.where(4 * spread <= nearest, centre, 0.0)


def _argmin_by_groups(distances: Tensor) -> Tensor:
    """Take the argmin over dim 1 in two steps, both vectorised: over the minima of groups, then within the group."""
    groups = distances.view(len(distances), -1, _GROUP)
    group = groups.amin(2).argmin(1)
    rows = torch.arange(len(distances), device=distances.device)
    return group * _GROUP + groups[rows, group].argmin(1)


def block_rows(codebook: Tensor) -> int:
    """Compute the number of vectors per block of distances to all codes (K, D).

    On a CPU a block fills the second-level caches of all threads, so it stays there between the matrix product and the argmin.
    """
    on_cpu = codebook.device.type == "cpu"
    block_bytes = torch.get_num_threads() * cache_bytes() if on_cpu else _BLOCK_BYTES_ACCELERATOR
    return max(1, block_bytes // (codebook.element_size() * len(codebook)))


@cache
def cache_bytes() -> int:
    """Read the size of a core's second-level cache."""
    try:
        return int(_CACHE_SIZE.read_text(encoding="utf-8").strip().removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return _DEFAULT_CACHE_BYTES
