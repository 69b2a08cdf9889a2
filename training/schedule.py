"""What is due at a step: its learning rate, a log line, a validation, a checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from configs.schema import Stage1, Stage2


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, final_share: float) -> float:
    """Return a step's rate: linear warm-up to `peak`, then a cosine down to `final_share * peak` at the end (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    floor = final_share * peak
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress)))


def scheduled_rate(config: Stage1 | Stage2, step: int) -> float:
    """Return the learning rate of a training step."""
    return learning_rate(step, peak=config.lr, warmup_steps=config.warmup_steps, steps=config.steps, final_share=config.final_lr_share)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, times its `lr_multiple` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_multiple", 1.0)


class Due(NamedTuple):
    """What follows a training step."""

    log: bool
    validation: bool
    checkpoint: bool


def due_after(step: int, config: Stage1 | Stage2, stopping: bool) -> Due:
    """Return what follows after `step` steps; a log line precedes every validation and checkpoint."""
    finished = step == config.steps
    validation = finished or step % config.validation_interval == 0
    checkpoint = finished or stopping or step % config.checkpoint_interval == 0
    return Due(validation or checkpoint or step % config.log_interval == 0, validation, checkpoint)
