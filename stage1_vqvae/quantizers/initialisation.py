"""K-means initialisation of codebooks, on latents of the first training batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from stage1_vqvae.quantizers.contract import Quantizer
from stage1_vqvae.quantizers.search import nearest_codes
from training.randomness import generator

_ROUNDS = 10
# Latents per code that k-means sees: enough for a centroid to be a mean, few enough to take seconds. With many codes fewer per code.
_VECTORS_PER_CODE = 32
_MAX_VECTORS, _MIN_PER_CODE = 2**16, 4


def kmeans_vectors(num_codes: int) -> int:
    """Compute how many latents k-means of K codes needs."""
    return min(_VECTORS_PER_CODE * num_codes, max(_MAX_VECTORS, _MIN_PER_CODE * num_codes))


@torch.no_grad()
def place_by_kmeans_(
    quantizer: Quantizer,
    batches: Sequence[Tensor],
    steps: int,
    seed: int,
    gather: Callable[[Tensor], Tensor],
    agree: Callable[[Tensor], Tensor],
) -> None:
    """Set every codebook to the k-means centroids of the latents it has to represent.

    Level by level, since a level's latents depend on the codes of the levels before; a shared codebook is set once per level.

    Args:
        quantizer: all its `codebooks` must be placeable.
        batches: latents z (B, D, *spatial) of this rank, of equal sizes.
        steps: number of training steps that the batches are of.
        seed: of k-means and of the choice of latents.
        gather: concatenates rows of all ranks, in rank order.
        agree: returns rank 0's tensor on all ranks.
    Errors: UserError for latents that are not finite.
    """
    codebooks = quantizer.codebooks()
    for level in range(len(quantizer.num_codes)):
        number = quantizer.codebook_of(level)
        codebook = codebooks[number]
        latents = torch.cat([gather(quantizer(z).latents[number]) for z in batches])
        draws = generator(seed, "k-means", level)
        if not bool(latents.isfinite().all()):
            raise UserError("k-means: expected finite latents of the first batches, found some that are not")
        subset = torch.randperm(len(latents), generator=draws)[: kmeans_vectors(codebook.num_codes)]
        centroids, counts = kmeans(latents[subset.to(latents.device)], codebook.num_codes, draws)
        # Float sums may differ in their last bits between machines.
        centroids, counts = agree(centroids), agree(counts)
        all_codes = torch.ones(codebook.num_codes, dtype=torch.bool, device=centroids.device)
        codebook.place_(all_codes, centroids, counts * (len(latents) / len(subset) / steps))


@torch.no_grad()
def kmeans(vectors: Tensor, num_codes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Run Lloyd's k-means from distinct random vectors; a centroid that loses all its vectors moves to a random one.

    Args:
        vectors: (N, D), N >= 1. With fewer vectors than codes some centroids start equal.
        num_codes: K.
        generator: a CPU generator.
    Returns: centroids (K, D), float32, and the number of vectors per centroid (K,).
    """
    vectors = vectors.float()
    count = len(vectors)
    picks = torch.randperm(count, generator=generator)
    rows = picks.repeat(-(-num_codes // count))[:num_codes]
    centroids = vectors[rows.to(vectors.device)].clone()
    for _ in range(_ROUNDS):
        counts, sums = cluster_sums(vectors, nearest_codes(vectors, centroids), num_codes)
        used = counts > 0
        centroids[used] = sums[used] / counts[used, None]
        empty = int((~used).sum())
        if empty:
            centroids[~used] = vectors[torch.randint(count, (empty,), generator=generator).to(vectors.device)]
    counts, _ = cluster_sums(vectors, nearest_codes(vectors, centroids), num_codes)
    return centroids, counts


def cluster_sums(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Count the vectors (N, D) per code, (K,), and sum them, (K, D)."""
    counts = torch.bincount(codes, minlength=num_codes).to(vectors.dtype)
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums
