"""How many bits a code costs: under a prior, by position and by class, and under references that know no context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.contract import Prior
from training.batching import batches
from training.devices import as_float64, float64_device
from training.prefetch import read_to
from training.processes import summed
from training.progress import progress_bar


def bits(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2)


def uniform_bits(num_codes: Sequence[int]) -> list[float]:
    """The bits of a code when all K are equally likely, log2 K: one number a level."""
    return [math.log2(k) for k in num_codes]


def unigram_bits(training: CodeStore, validation: CodeStore) -> list[float]:
    """Cross-entropy of the validation codes under the training codes' frequencies, each count plus one: of each level."""
    levels = []
    for learned, seen in zip(training.counts(), validation.counts(), strict=True):
        probabilities = torch.from_numpy(learned).double() + 1
        nats = -float((torch.from_numpy(seen) * (probabilities / probabilities.sum()).log()).sum())
        levels.append(bits(nats / int(seen.sum())))
    return levels


def mean_over_tokens(levels: Sequence[float], grids: Sequence[tuple[int, int]]) -> float:
    """Bits a token of all levels together, of each level's."""
    tokens = [h * w for h, w in grids]
    return sum(count * level for count, level in zip(tokens, levels, strict=True)) / sum(tokens)


@dataclass(frozen=True)
class Likelihood:
    """Bits per token over some images, given their condition where the prior has one."""

    images: int
    positions: Tensor
    """Mean bits of the code at each position, (T,)."""
    classes: dict[str, float]
    """Mean bits per token of each class that occurred; empty for a prior without classes."""

    @property
    def mean(self) -> float:
        """Mean bits a token over all positions."""
        return float(self.positions.mean())


@torch.no_grad()
def measure(accelerator: Accelerator, prior: Prior, store: CodeStore, rows: Tensor, batch_size: int) -> Likelihood:
    """Measure the likelihood of these rows, each counted once at any number of processes; `batch_size` per rank and batch."""
    prior.eval()
    device, stored, names = accelerator.device, store.condition_for(prior.condition), prior.condition.class_names
    # Sums of this rank: nats per position, nats and images per class.
    exact = float64_device(device)
    nats = torch.zeros(prior.layout.length, dtype=torch.float64, device=exact)
    class_nats, images = (torch.zeros(len(names), dtype=torch.float64, device=exact) for _ in range(2))
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    # All ranks of a sharded prior must run equally many forward passes: a rank with one row fewer repeats a row, at weight 0.
    row_weights = torch.ones(-(-len(rows) // accelerator.num_processes), dtype=torch.float64, device=exact)
    row_weights[len(mine) :] = 0
    mine = torch.cat([mine, rows[: len(row_weights) - len(mine)]])

    def read(part: slice) -> tuple[Tensor, ...]:
        codes = store.codes(mine[part])
        return codes if stored is None else (*codes, stored[mine[part]])

    with progress_bar(len(mine), "measure", "img", within=True) as bar:
        parts = batches(len(mine), batch_size)
        for part, tensors in zip(parts, read_to(device, read, parts), strict=True):
            codes, condition = (tensors, None) if stored is None else (tensors[:-1], tensors[-1])
            losses = as_float64(prior.nats(codes, condition))
            weights = row_weights[part]
            nats += weights @ losses
            if names and condition is not None:
                class_nats.index_add_(0, condition.to(exact), weights * losses.mean(1))
                images.index_add_(0, condition.to(exact), weights)
            bar.update(len(losses))
    totals = summed(accelerator, {"nats": nats, "class_nats": class_nats, "images": images})
    sums, counts = totals["class_nats"].tolist(), totals["images"].tolist()
    return Likelihood(
        images=len(rows),
        positions=(totals["nats"] / len(rows) / math.log(2)).cpu(),
        classes={name: bits(total / count) for name, total, count in zip(names, sums, counts, strict=True) if count},
    )


def turning_point(validation: Sequence[float], training: Sequence[float]) -> int | None:
    """The index of the best validation, if at least two have followed it and the training mean has since fallen below what it was then:
    from there on the prior learned its images by heart. Otherwise None.

    Args:
        validation: bits a token at each validation, oldest first.
        training: the training mean before each of them.
    """
    best = min(range(len(validation)), key=validation.__getitem__)
    turned = len(validation) - 1 - best >= 2 and training[-1] < training[best]
    return best if turned else None
