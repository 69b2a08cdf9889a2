"""Training codes of every micro-step, prefetched onto an accelerator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.schema import Stage2
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.store import CodeStore
from training.batching import share_of_step
from training.prefetch import StepReader
from training.randomness import DataOrder, generator


class CodeBatch(NamedTuple):
    """Arguments of the prior's loss for one micro-step."""

    codes: Codes
    """int64 (b, h, w) per level."""
    labels: Tensor | None
    """(b,) int64, `num_classes` where label dropout hides the label; None: an unconditional prior."""
    variants: Tensor
    """(b,) int64: augmentation variant of each row."""
    draws: Tensor | None
    """(b, num_draws) float32 in [0, 1) for the prior's loss; None if it takes none."""


class CodeLoader:
    """Loads this rank's codes for every micro-step.

    Row, variant, label dropout and draws are a function of (seed, step, position in the step's batch): the same for any number of
    processes and threads, and after a resume.
    """

    def __init__(
        self,
        training: CodeStore,
        num_classes: int,
        config: Stage2,
        accelerator: Accelerator,
        num_draws: int = 0,
        ahead: bool | None = None,
    ) -> None:
        """`num_classes`, `num_draws`: of the prior. `ahead`: prefetch in a thread; None: on accelerators."""
        self._training, self._config = training, config
        self._labels = training.labels if num_classes > 0 else None
        self._num_classes, self._num_draws = num_classes, num_draws
        self._processes, self._rank = accelerator.num_processes, accelerator.process_index
        self._order = DataOrder(len(training), config.batch_size, config.seed)
        self._reader = StepReader(self._read, config.accumulation, accelerator.device, ahead)

    def batch(self, step: int, micro_step: int) -> CodeBatch:
        """Codes of a micro-step, on this rank's device. Errors: UserError for a code outside the codebook."""
        variants, *tensors = self._reader.at(step, micro_step)
        draws = tensors.pop() if self._num_draws else None
        labels = None if self._labels is None else tensors.pop()
        return CodeBatch(tuple(tensors), labels, variants, draws)

    def _read(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        """Read a micro-step: variants (b,), codes (b, h, w) per level, labels (b,) of a conditional prior, draws (b, num_draws) if any."""
        (step, micro_step), config = key, self._config
        rows = self._order.batch(step)
        share = share_of_step(config.batch_size, config.accumulation, micro_step, self._processes, self._rank)
        variants = torch.randint(self._training.manifest.variants, rows.shape, generator=generator(config.seed, "variants", step))[share]
        tensors = [variants, *self._training.codes(rows[share], variants)]
        if self._labels is not None:
            hidden = torch.rand(rows.shape, generator=generator(config.seed, "label dropout", step)) < config.label_dropout
            tensors.append(self._labels[rows[share]].masked_fill(hidden[share], self._num_classes))
        if self._num_draws:
            tensors.append(torch.rand(len(rows), self._num_draws, generator=generator(config.seed, "loss", step))[share])
        return tuple(tensors)
