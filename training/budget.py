"""Time budgets: the number of steps that fit into some minutes on this machine; and the time that a training has left."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from accelerate import Accelerator

from configs.errors import say
from configs.schema import Stage1, Stage2
from training.devices import wait_for, widest_float

Section = TypeVar("Section", Stage1, Stage2)

# Before anything is timed: the first steps allocate memory and choose kernels.
_UNTIMED = 2
# Steps timed at most, and the share of the budget that they may take.
_TIMED, _SHARE_FOR_TIMING = 200, 0.03
# Seconds after which the time left is printed, and the least time left that is printed.
_PRINTED_AFTER, _WORTH_PRINTING = 60.0, 600.0


def fitting_steps(
    accelerator: Accelerator,
    stage: str,
    config: Section,
    start: float,
    build_start: float,
    kinds: Sequence[tuple[float, Callable[[int], object]]],
    validate: Callable[[], object],
    passes_at_end: float = 0.0,
) -> Section:
    """Measure training steps and a validation. Returns: the stage's section with as many steps as fit its minutes, validations included.

    All ranks must call it, and get the same. The warm-up is at most a tenth of the steps, so that the learning rate has time to fall.

    Args:
        stage: name of the stage in messages.
        config: the stage's section of the recipe.
        start: `time.monotonic()` at the start of the minutes.
        build_start: `time.monotonic()` before the rehearsed model was built; the training builds it again.
        kinds: per kind of steps its share of all steps, and a function that takes step number N of a rehearsal; the shares add up to 1.
            What it trains is discarded, so that results do not depend on the rehearsal.
        validate: runs one validation pass.
        passes_at_end: work after the last step, in validation passes.
    """
    setup = time.monotonic() - build_start

    def slowest(taken: float) -> float:
        """Return the longest of the ranks' times."""
        return float(accelerator.gather(torch.tensor([taken], dtype=widest_float(accelerator.device), device=accelerator.device)).max())

    def seconds(work: Callable[[], object]) -> float:
        before = time.monotonic()
        work()
        wait_for(accelerator.device)
        return slowest(time.monotonic() - before)

    def pace_of(take_step: Callable[[int], object], share: float) -> float:
        def median(first: int, count: int) -> float:
            # Other work on the machine slows some steps down.
            return statistics.median(seconds(partial(take_step, number)) for number in range(first, first + count))

        median(0, _UNTIMED)
        guess = median(_UNTIMED, 1)
        return median(_UNTIMED + 1, max(1, min(_TIMED, int(share * _SHARE_FOR_TIMING * 60 * config.minutes / guess))))

    with keeping_scale(accelerator):
        pace, validation = sum(share * pace_of(take_step, share) for share, take_step in kinds), seconds(validate)
    # The training after it takes as long to set up as the rehearsal did.
    left = 60 * config.minutes - slowest(time.monotonic() - start + setup) - passes_at_end * validation
    steps = max(1, int(left / (pace + validation / config.validation_interval)))
    say(f"{stage}: {pace:.3g} s a step on this machine, so {steps:,} steps in {config.minutes:g} minutes")
    return dataclasses.replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps // 10))


@contextmanager
def keeping_scale(accelerator: Accelerator) -> Iterator[None]:
    """Restore the loss scale of mixed precision when the block ends."""
    scale = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    yield
    if accelerator.scaler is not None and scale is not None:
        accelerator.scaler.load_state_dict(scale)


class TimeLeft:
    """The time that a long training has left, printed once after a minute."""

    def __init__(self, stage: str, first_step: int, steps: int) -> None:
        self._stage, self._first_step, self._steps = stage, first_step, steps
        self._start, self._printed = time.monotonic(), False

    def line(self, step: int) -> str | None:
        """Return the line to print after `step` steps in all, or None."""
        elapsed = time.monotonic() - self._start
        if self._printed or elapsed < _PRINTED_AFTER:
            return None
        self._printed = True
        left = elapsed / (step - self._first_step) * (self._steps - step)
        if left < _WORTH_PRINTING:
            return None
        length = f"{left / 60:.0f} minutes" if left < 2 * 3600 else f"{left / 3600:.1f} hours"
        option = f"--{self._stage.replace(' ', '')}.minutes"
        return f"{self._stage}: about {length} left; Ctrl-C saves, --resume goes on; a new run keeps to a time with {option}"
