"""Restart of dead codes: a code that no latent chooses moves to a latent of the current batch (Dhariwal et al. 2020, Jukebox).

Which latent is a pure function of (seed, step, codebook, code), over the global batch. The rank that holds it contributes it and the
others contribute zeros, so that after one all-reduce every rank moves the code to the same vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage1_vqvae.quantizers.contract import Levels, Statistics
from training.devices import pinned
from training.optimizer import forget_rows_
from training.randomness import generator


class Restart:
    """One step's restart of dead codes: the sum of `candidates` over micro-steps and ranks goes to `apply_`."""

    def __init__(self, quantizer: Levels, seed: int, step: int, batch_size: int, due: bool = True) -> None:
        """`batch_size`: of the global batch. `due`: whether codes restart at this step."""
        numbered = enumerate(quantizer.codebooks())
        self._codebooks = {number: book for number, book in numbered if due and book.placeable and book.restart_below > 0}
        self._seed, self._step, self._batch_size = seed, step, batch_size

    @torch.no_grad()
    def candidates(self, latents: tuple[Tensor, ...], first_image: int, images: int) -> Statistics:
        """Select, per codebook, the latent (K, d) to which each code would restart; zeros where another rank or micro-step holds it.

        Args:
            latents: per codebook, of this micro-step's `images` images.
            first_image: index of the first of them in the global batch.
            images: number of images.
        """
        candidates = {}
        for number, codebook in self._codebooks.items():
            vectors = latents[number]
            per_image = len(vectors) // images
            rows = candidate_rows(codebook.num_codes, self._batch_size * per_image, self._seed, self._step, number)
            candidates[f"candidates/{number}"] = local_candidates(vectors, rows, first_image * per_image)
        return candidates

    @torch.no_grad()
    def apply_(self, candidates: Statistics, optimizer: torch.optim.Optimizer) -> int | Tensor:
        """Move dead codes to their candidates and reset their optimizer state; returns the number moved."""
        moved: int | Tensor = 0
        for number, codebook in self._codebooks.items():
            vectors = candidates[f"candidates/{number}"]
            dead = codebook.dead_codes() & vectors.isfinite().all(1)  # fp16 may have overflowed: the code waits
            mean_use = codebook.cluster_size.mean().expand(len(dead))
            parameter = codebook.place_(dead, vectors, mean_use)
            if parameter is not None:
                forget_rows_(optimizer, parameter, dead)
            moved = moved + dead.sum()
        return moved


def candidate_rows(num_codes: int, total: int, seed: int, step: int, codebook: int) -> Tensor:
    """Draw, per code, the row (K,) of the global batch's `total` latents to restart on; distinct while there are enough."""
    rows = torch.randperm(total, generator=generator(seed, "restart", step, codebook))
    return rows.repeat(-(-num_codes // total))[:num_codes]


def local_candidates(vectors: Tensor, rows: Tensor, first: int) -> Tensor:
    """Select the candidates (K, d) among latents (N, d), rows `first` to `first` + N of the global batch; zeros elsewhere."""
    # Pinned memory, and `torch.where` rather than a boolean index: neither waits for the GPU.
    local = pinned(rows, vectors.device).to(vectors.device, non_blocking=True) - first
    is_local = (local >= 0) & (local < len(vectors))
    return torch.where(is_local[:, None], vectors[local.clamp(0, len(vectors) - 1)], 0.0)
