"""Bits of images under a prior, for all pipelines that score images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.contract import Prior
from training.progress import progress_bar

BATCH_SIZE = 64
"""Images per batch; changes results only by rounding."""


@torch.no_grad()
def surprisals(prior: Prior, codes: Codes, labels: Tensor | None, description: str, progress: bool = False) -> Tensor:
    """Compute -log2 p of each code under the prior, or a bound if it is not `exact`: bits (N, T), float64 on the CPU.

    Args:
        prior: in eval mode.
        codes: int64 (N, h, w) per level.
        labels: (N,), or None for no label.
        description: text of the progress bar.
        progress: show a bar.
    """
    assert not prior.training
    count = len(codes[0])
    bits = torch.empty(count, prior.layout.length, dtype=torch.float64)
    with progress_bar(count, description, "img", shown=progress) as bar:
        sources = codes if labels is None else (*codes, labels)
        for part, tensors in device_batches(prior.device, BATCH_SIZE, *sources):
            batch_codes, batch_labels = tensors[: len(codes)], None if labels is None else tensors[-1]
            bits[part] = prior.nats(batch_codes, batch_labels).cpu().double() / math.log(2)
            bar.update(part.stop - part.start)
    return bits
