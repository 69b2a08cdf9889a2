"""Training codes, micro-step by micro-step; for a GPU, read while it works on those before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.schema import Stage2
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.batching import share_of_step
from stage1_vqvae.training.prefetch import StepReader
from stage1_vqvae.training.randomness import DataOrder, generator
from stage2_prior.codes.store import CodeStore


class CodeBatch(NamedTuple):
    """A micro-step's codes and what they are of."""

    codes: Codes
    """int64 (b, h, w) a level."""
    labels: Tensor | None
    """(b,) int64, the number of classes where the label is hidden; None: the prior knows no classes."""
    variants: Tensor
    """(b,) int64, which variant of its image each row is of."""


class CodeLoader:
    """A process's codes of every micro-step.

    Which they are, in which variant, and whose label is hidden, is a function of (seed, step, position in the step's batch): the same
    whatever the number of processes and threads, and where a training was interrupted.
    """

    def __init__(self, training: CodeStore, num_classes: int, config: Stage2, accelerator: Accelerator, ahead: bool | None = None) -> None:
        """`num_classes`: those that the prior knows. `ahead`: whether the next codes are read in a thread; None: where that is worth it."""
        self._training, self._config = training, config
        self._labels = training.labels if num_classes > 0 else None
        self._num_classes = num_classes
        self._processes, self._rank = accelerator.num_processes, accelerator.process_index
        self._order = DataOrder(len(training), config.batch_size, config.seed)
        self._reader = StepReader(self._read, config.accumulation, accelerator.device, ahead)

    def batch(self, step: int, micro_step: int) -> CodeBatch:
        """The codes of a micro-step, on the process's device. Errors: UserError for a code that the codebook does not have."""
        variants, *found = self._reader.at(step, micro_step)
        labels = None if self._labels is None else found.pop()
        return CodeBatch(tuple(found), labels, variants)

    def _read(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        """The variants (b,), the codes (b, h, w) of each level, and the labels (b,), if there are such, of a micro-step."""
        (step, micro_step), config = key, self._config
        rows = self._order.batch(step)
        share = share_of_step(config.batch_size, config.accumulation, micro_step, self._processes, self._rank)
        draws = generator(config.seed, "variants", step)
        variants = torch.randint(self._training.manifest.variants, rows.shape, generator=draws)[share]
        codes = self._training.codes(rows[share], variants)
        if self._labels is None:
            return variants, *codes
        hidden = torch.rand(rows.shape, generator=generator(config.seed, "label dropout", step)) < config.label_dropout
        return variants, *codes, self._labels[rows[share]].masked_fill(hidden[share], self._num_classes)
