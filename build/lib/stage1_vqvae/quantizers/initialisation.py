"""Where a codebook starts: k-means of the first training batches' latents."""

from __future__ import annotations

import torch
from torch import Tensor

from stage1_vqvae.quantizers.search import nearest_codes

# Latents a code that k-means sees: enough for a centroid to be a mean, few enough to take seconds.
VECTORS_PER_CODE = 32
_ROUNDS = 10


@torch.no_grad()
def kmeans(vectors: Tensor, num_codes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from distinct random vectors; a centroid that loses all its vectors moves to a random one.

    Args:
        vectors: (N, D), N >= 1. With fewer vectors than codes some centroids start equal.
        num_codes: K.
        generator: a CPU generator.
    Returns: centroids (K, D), float32, and the vectors each holds, (K,).
    """
    vectors = vectors.float()
    count = len(vectors)
    picks = torch.randperm(count, generator=generator)
    rows = picks.repeat(-(-num_codes // count))[:num_codes]
    centroids = vectors[rows.to(vectors.device)].clone()
    for _ in range(_ROUNDS):
        counts, sums = assigned(vectors, nearest_codes(vectors, centroids), num_codes)
        held = counts > 0
        centroids[held] = sums[held] / counts[held, None]
        empty = int((~held).sum())
        if empty:
            centroids[~held] = vectors[torch.randint(count, (empty,), generator=generator).to(vectors.device)]
    counts, _ = assigned(vectors, nearest_codes(vectors, centroids), num_codes)
    return centroids, counts


def assigned(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many of the vectors (N, D) chose each code, (K,), and their sum, (K, D); no one-hot is built."""
    counts = torch.bincount(codes, minlength=num_codes).to(vectors.dtype)
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums
