"""How many bits a token costs: under the learned prior, and under the two references that need no model of context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stage2_prior.code_store import CodeStore


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)


def uniform_bits(grids: Sequence[tuple[int, int]], num_codes: Sequence[int]) -> float:
    """log2 K a token, the mean over the tokens of all levels."""
    tokens = [h * w for h, w in grids]
    return sum(count * math.log2(k) for count, k in zip(tokens, num_codes, strict=True)) / sum(tokens)


def unigram_bits(training: CodeStore, validation: CodeStore) -> float:
    """Cross-entropy in bits a token of the validation codes under the training codes' frequencies, each count plus one."""
    nats, tokens = 0.0, 0
    for learned, seen in zip(training.counts(), validation.counts(), strict=True):
        probabilities = torch.from_numpy(learned).double() + 1
        nats -= float((torch.from_numpy(seen) * (probabilities / probabilities.sum()).log()).sum())
        tokens += int(seen.sum())
    return bits(nats / tokens)


def rises_while_training_falls(validation: Sequence[float], training: Sequence[float]) -> bool:
    """Whether two validations in a row were worse than the best while training got better than it was then: the prior
    learns its data by heart.

    Args:
        validation: bits a token at each validation, oldest first.
        training: the training mean before each of them.
    """
    best = min(range(len(validation)), key=validation.__getitem__)
    return len(validation) - 1 - best >= 2 and training[-1] < training[best]
