"""Where codebooks start: k-means of the first training batches' latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from stage1_vqvae.quantizers.contract import Quantizer
from stage1_vqvae.quantizers.search import nearest_codes
from training.randomness import generator

_ROUNDS = 10
# Latents that k-means sees: enough a code for a centroid to be a mean, few enough to take seconds, and the less of
# them a code the more codes there are.
_VECTORS_PER_CODE = 32
_MOST_VECTORS, _FEWEST_PER_CODE = 2**16, 4


def kmeans_vectors(num_codes: int) -> int:
    """How many latents k-means of K codes asks for."""
    return min(_VECTORS_PER_CODE * num_codes, max(_MOST_VECTORS, _FEWEST_PER_CODE * num_codes))


@torch.no_grad()
def place_by_kmeans_(
    quantizer: Quantizer,
    batches: Sequence[Tensor],
    steps: int,
    seed: int,
    gather: Callable[[Tensor], Tensor],
    agree: Callable[[Tensor], Tensor],
) -> None:
    """Put every codebook at the centroids of the latents it has to represent, level after level, as each level's latents
    depend on the codes before; a codebook shared by several levels is placed once for each of them.

    Args:
        quantizer: whose `codebooks` are placed, all of them placeable.
        batches: latents z (B, D, *spatial) of this process, of equal sizes.
        steps: how many training steps' batches these are, over all processes.
        seed: of k-means and of the draw of the latents it sees.
        gather: rows of all processes, in rank order.
        agree: the main process's tensor on all.
    """
    codebooks = quantizer.codebooks()
    for level in range(len(quantizer.num_codes)):
        number = quantizer.codebook_of(level)
        codebook = codebooks[number]
        latents = torch.cat([gather(quantizer(z).latents[number]) for z in batches])
        draws = generator(seed, "k-means", level)
        finite = latents.isfinite().all(1)
        if not bool(finite.all()):
            raise UserError("k-means: expected finite latents of the first batches, found some that are not")
        seen = torch.randperm(len(latents), generator=draws)[: kmeans_vectors(codebook.num_codes)]
        centroids, counts = kmeans(latents[seen.to(latents.device)], codebook.num_codes, draws)
        # Float sums may differ in their last bits between machines.
        centroids, counts = agree(centroids), agree(counts)
        everywhere = torch.ones(codebook.num_codes, dtype=torch.bool, device=centroids.device)
        codebook.place_(everywhere, centroids, counts * (len(latents) / len(seen) / steps))


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
        counts, sums = cluster_sums(vectors, nearest_codes(vectors, centroids), num_codes)
        held = counts > 0
        centroids[held] = sums[held] / counts[held, None]
        empty = int((~held).sum())
        if empty:
            centroids[~held] = vectors[torch.randint(count, (empty,), generator=generator).to(vectors.device)]
    counts, _ = cluster_sums(vectors, nearest_codes(vectors, centroids), num_codes)
    return centroids, counts


def cluster_sums(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many of the vectors (N, D) chose each code, (K,), and their sum, (K, D); no one-hot is built."""
    counts = torch.bincount(codes, minlength=num_codes).to(vectors.dtype)
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums
