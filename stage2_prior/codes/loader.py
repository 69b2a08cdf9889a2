"""Training codes of every micro-step, prefetched onto an accelerator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.schema import Stage2
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.store import CodeStore
from stage2_prior.conditions.contract import Condition
from training.batching import share_of_step
from training.prefetch import StepReader
from training.randomness import DataOrder, generator


class CodeBatch(NamedTuple):
    """Arguments of the prior's loss for one micro-step."""

    codes: Codes
    """int64 (b, h, w) per level."""
    condition: Tensor | None
    """(b, ...), replaced by the null where it is dropped; None: an unconditional prior."""
    variants: Tensor
    """(b,) int64: augmentation variant of each row."""
    draws: Tensor | None
    """(b, num_draws) float32 in [0, 1) for the prior's loss; None if it takes none."""
    progress: Tensor
    """() float32: share of the training's steps before this one."""


class CodeLoader:
    """Loads this rank's codes for every micro-step.

    Rows, variants, condition dropout and draws are functions of (seed, step, position in the step's batch): the same for any number of
    processes and threads, and after a resume.
    """

    def __init__(
        self,
        training: CodeStore,
        condition: Condition,
        config: Stage2,
        accelerator: Accelerator,
        num_draws: int = 0,
        ahead: bool | None = None,
    ) -> None:
        """Open the loader of a prior.

        Args:
            training: the training codes.
            condition: the prior's condition.
            config: the recipe's section.
            accelerator: Accelerator of the ranks, over which batches are distributed.
            num_draws: `Prior.num_draws` of the prior.
            ahead: prefetch in a thread; None: on accelerators.
        Errors: as `CodeStore.condition_for`.
        """
        self._training, self._config, self._condition, self._num_draws = training, config, condition, num_draws
        self._rows = training.condition_for(condition)
        self._processes, self._rank = accelerator.num_processes, accelerator.process_index
        self._order = DataOrder(len(training), config.batch_size, config.seed)
        self._reader = StepReader(self._read, config.accumulation, accelerator.device, ahead)

    def batch(self, step: int, micro_step: int) -> CodeBatch:
        """Return the batch of a micro-step on this rank's device. Errors: UserError for a code outside the codebook."""
        variants, progress, *tensors = self._reader.at(step, micro_step)
        draws = tensors.pop() if self._num_draws else None
        condition = None if self._rows is None else tensors.pop()
        return CodeBatch(tuple(tensors), condition, variants, draws, progress)

    def _read(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        """Read a micro-step: variants (b,), progress (), codes (b, h, w) per level, and, if there are any, condition (b, ...) and draws
        (b, num_draws).
        """
        (step, micro_step), config = key, self._config
        rows = self._order.batch(step)
        share = share_of_step(config.batch_size, config.accumulation, micro_step, self._processes, self._rank)
        variants = torch.randint(self._training.manifest.variants, rows.shape, generator=generator(config.seed, "variants", step))[share]
        tensors = [variants, torch.tensor(step / config.steps), *self._training.codes(rows[share], variants)]
        if self._rows is not None:
            hidden = torch.rand(rows.shape, generator=generator(config.seed, "label dropout", step)) < config.condition_dropout
            tensors.append(self._condition.drop(self._rows[rows[share]], hidden[share]))
        if self._num_draws:
            tensors.append(torch.rand(len(rows), self._num_draws, generator=generator(config.seed, "loss", step))[share])
        return tuple(tensors)
