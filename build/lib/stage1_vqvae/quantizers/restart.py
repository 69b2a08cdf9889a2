"""Restart of dead codes: a code that nothing chooses moves onto a latent of the present batch (Dhariwal et al. 2020, Jukebox).

Which latent is a pure function of (seed, step, code), over the whole global batch; the process that holds it hands it
in and the others hand in zeros, so that after one sum all of them move the same code to the same place.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from stage1_vqvae.training.randomness import generator


def candidate_places(num_codes: int, total: int, seed: int, step: int) -> Tensor:
    """For each code, the place (K,) in the global batch's `total` latents where it would restart; no place twice
    while there are enough of them.
    """
    places = torch.randperm(total, generator=generator(seed, "restart", step))
    return places.repeat(-(-num_codes // total))[:num_codes]


@torch.no_grad()
def candidates_here(z: Tensor, places: Tensor, first: int) -> Tensor:
    """The candidates (K, D) that lie in z (B, D, *spatial), whose latents are those from place `first` on; zeros elsewhere."""
    vectors = rearrange(z, "b d ... -> (b ...) d").float()
    local = places.to(vectors.device) - first
    here = (local >= 0) & (local < len(vectors))
    found = vectors.new_zeros(len(places), vectors.shape[1])
    found[here] = vectors[local[here]]
    return found
