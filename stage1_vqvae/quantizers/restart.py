"""Restart of dead codes: a code that nothing chooses moves onto a latent of the present batch (Dhariwal et al. 2020, Jukebox).

Which latent is a pure function of (seed, step, codebook, code), over the whole global batch; the process that holds it
hands it in and the others hand in zeros, so that after one sum all of them move the same code to the same vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage1_vqvae.quantizers.contract import Levels, Statistics
from training.devices import pinned
from training.optimizer import forget_rows_
from training.randomness import generator


class Restart:
    """One step's restart of a quantizer's dead codes: `candidates` of every micro-step, added up, go to `apply_`."""

    def __init__(self, quantizer: Levels, seed: int, step: int, batch_size: int) -> None:
        self._codebooks = {
            number: codebook for number, codebook in enumerate(quantizer.codebooks()) if codebook.placeable and codebook.restart_below > 0
        }
        self._seed, self._step, self._batch_size = seed, step, batch_size

    @torch.no_grad()
    def candidates(self, latents: tuple[Tensor, ...], first_image: int, images: int) -> Statistics:
        """Where each code of each codebook would restart, (K, d), if that latent is among these of `images` images of
        the global batch, from its `first_image` on; zeros if it is not.
        """
        found = {}
        for number, codebook in self._codebooks.items():
            vectors = latents[number]
            an_image = len(vectors) // images
            rows = candidate_rows(codebook.num_codes, self._batch_size * an_image, self._seed, self._step, number)
            found[f"candidates/{number}"] = local_candidates(vectors, rows, first_image * an_image)
        return found

    @torch.no_grad()
    def apply_(self, candidates: Statistics, optimizer: torch.optim.Optimizer) -> int | Tensor:
        """Move the dead codes to their candidates; what moved has no momentum. Returns how many."""
        moved: int | Tensor = 0
        for number, codebook in self._codebooks.items():
            vectors = candidates[f"candidates/{number}"]
            dead = codebook.dead_codes() & vectors.isfinite().all(1)  # in fp16 a latent may have overflowed: its code waits for another
            as_used = codebook.cluster_size.mean().expand(len(dead))
            parameter = codebook.place_(dead, vectors, as_used)
            if parameter is not None:
                forget_rows_(optimizer, parameter, dead)
            moved = moved + dead.sum()
        return moved


def candidate_rows(num_codes: int, total: int, seed: int, step: int, codebook: int) -> Tensor:
    """For each code, the row (K,) of the global batch's `total` latents where it would restart; no row twice
    while there are enough of them.
    """
    rows = torch.randperm(total, generator=generator(seed, "restart", step, codebook))
    return rows.repeat(-(-num_codes // total))[:num_codes]


def local_candidates(vectors: Tensor, rows: Tensor, first: int) -> Tensor:
    """Candidates (K, d) that lie among these latents (N, d), the global batch's from row `first` on; zeros for all others."""
    # Pinned memory and `torch.where` instead of a boolean index: neither synchronises with a GPU.
    local = pinned(rows, vectors.device).to(vectors.device, non_blocking=True) - first
    is_local = (local >= 0) & (local < len(vectors))
    return torch.where(is_local[:, None], vectors[local.clamp(0, len(vectors) - 1)], 0.0)
