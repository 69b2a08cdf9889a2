"""Time budgets: how many steps fit so many minutes on this machine; and how long a training has still to go."""

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
# After how many seconds the time left is said, and how many there have to be left.
_SAID_AFTER, _WORTH_SAYING = 60.0, 600.0


def fitting_steps(
    accelerator: Accelerator,
    stage: str,
    config: Section,
    began: float,
    building: float,
    kinds: Sequence[tuple[float, Callable[[int], object]]],
    validate: Callable[[], object],
    passes_at_end: float = 0.0,
) -> Section:
    """The stage's section with as many steps as fit its minutes, validations among them; the same on all processes, all of which must
    call it. Says how many. The warm-up is at most a tenth of them, so that the rate has time to fall.

    Args:
        stage: what messages call the training.
        config: its section of the recipe.
        began: `time.monotonic()` when the minutes began.
        building: `time.monotonic()` before model and optimiser of the rehearsal were made, which the training after it makes again.
        kinds: the share of the steps that are of a kind, and what takes the step of that number of a rehearsal; the shares add up to 1.
            What it trains is thrown away: the steps that are counted here do not depend on how they were counted.
        validate: one validation pass.
        passes_at_end: what follows the last step, in validation passes.
    """
    setup = time.monotonic() - building

    def slowest(taken: float) -> float:
        """The longest of the processes' times."""
        return float(accelerator.gather(torch.tensor([taken], dtype=widest_float(accelerator.device), device=accelerator.device)).max())

    def seconds(work: Callable[[], object]) -> float:
        start = time.monotonic()
        work()
        wait_for(accelerator.device)
        return slowest(time.monotonic() - start)

    def pace_of(take_step: Callable[[int], object], share: float) -> float:
        def median(first: int, count: int) -> float:
            # Other work on the machine slows some steps down.
            return statistics.median(seconds(partial(take_step, number)) for number in range(first, first + count))

        median(0, _UNTIMED)
        guess = median(_UNTIMED, 1)
        return median(_UNTIMED + 1, max(1, min(_TIMED, int(share * _SHARE_FOR_TIMING * 60 * config.minutes / guess))))

    with keeping_scale(accelerator):
        pace, validation = sum(share * pace_of(take_step, share) for share, take_step in kinds), seconds(validate)
    # The training that follows is set up as the rehearsal was.
    left = 60 * config.minutes - slowest(time.monotonic() - began + setup) - passes_at_end * validation
    steps = max(1, int(left / (pace + validation / config.validation_interval)))
    say(f"{stage}: {pace:.3g} s a step on this machine, so {steps:,} steps in {config.minutes:g} minutes")
    return dataclasses.replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps // 10))


@contextmanager
def keeping_scale(accelerator: Accelerator) -> Iterator[None]:
    """Steps of a rehearsal, after which the loss scale of mixed precision is what it was before."""
    scale = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    yield
    if accelerator.scaler is not None and scale is not None:
        accelerator.scaler.load_state_dict(scale)


class TimeLeft:
    """Says once, after a minute of training, how long it will take, if that is long."""

    def __init__(self, stage: str, first_step: int, steps: int) -> None:
        self._stage, self._first_step, self._steps = stage, first_step, steps
        self._began, self._said = time.monotonic(), False

    def line(self, done: int) -> str | None:
        """The line to say after `done` steps in all, or None."""
        elapsed = time.monotonic() - self._began
        if self._said or elapsed < _SAID_AFTER:
            return None
        self._said = True
        left = elapsed / (done - self._first_step) * (self._steps - done)
        if left < _WORTH_SAYING:
            return None
        length = f"{left / 60:.0f} minutes" if left < 2 * 3600 else f"{left / 3600:.1f} hours"
        option = f"--{self._stage.replace(' ', '')}.minutes"
        return f"{self._stage}: about {length} left; Ctrl-C saves, --resume goes on; a new run keeps to a time with {option}"
