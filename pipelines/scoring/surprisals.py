"""Bits of given images under a prior of the run: what all pipelines that score images share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.contract import AutoregressivePrior
from stage2_prior.priors.prior_file import PriorHeader, finished_prior, load_prior
from training.progress import progress_bar
from training.weights_file import fingerprint

BATCH_SIZE = 64
"""Images at once through the models; it changes no figure but by rounding."""


class ScoringPrior(NamedTuple):
    """A finished prior of the run, in eval mode."""

    prior: AutoregressivePrior
    header: PriorHeader
    name: str


def scoring_prior(command: Command, device: torch.device) -> ScoringPrior:
    """The prior that `--prior` names, or the one last finished. Errors: UserError if there is no such prior."""
    path = finished_prior(command.run, command.options.prior, command.next(TRAIN_PRIOR))
    return ScoringPrior(*load_prior(path, fingerprint(command.run.tokenizer), device), path.parent.name)


@torch.no_grad()
def surprisals(prior: AutoregressivePrior, codes: Codes, labels: Tensor | None, description: str, progress: bool = False) -> Tensor:
    """-log2 p of each code given those before it and the label: bits (N, T), float64 on the CPU.

    Args:
        prior: in eval mode.
        codes: int64 (N, h, w) a level.
        labels: (N,), or None for no label.
        description: for the bar.
        progress: show it.
    """
    assert not prior.training
    count = len(codes[0])
    bits = torch.empty(count, prior.layout.length, dtype=torch.float64)
    with progress_bar(count, description, "img", shown=progress) as bar:
        sources = codes if labels is None else (*codes, labels)
        for part, tensors in device_batches(prior.device, BATCH_SIZE, *sources):
            batch_codes, batch_labels = tensors[: len(codes)], None if labels is None else tensors[-1]
            bits[part] = -prior.log_prob(batch_codes, batch_labels).cpu().double() / math.log(2)
            bar.update(part.stop - part.start)
    return bits
