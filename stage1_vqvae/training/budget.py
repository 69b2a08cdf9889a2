"""Time budgets: how many steps fit so many minutes on this machine; and how long a training has still to go."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

# Before anything is timed: the first steps allocate memory and choose kernels.
_UNTIMED = 2
# Steps timed at most, and the share of the budget that they may take.
_TIMED, _SHARE_FOR_TIMING = 30, 0.03
# After how many seconds the time left is said, and how many there have to be left.
_SAID_AFTER, _WORTH_SAYING = 60.0, 600.0


def fitting_steps(
    accelerator: Accelerator,
    stage: str,
    minutes: float,
    take_step: Callable[[int], object],
    validate: Callable[[], object],
    validation_interval: int,
    passes_at_end: float = 0.0,
) -> int:
    """How many steps, with their validations, fit the minutes; the same on all processes, all of which must call it. Says so.

    Args:
        stage: what messages call the training.
        take_step: takes the step of that number of a rehearsal. What it trains is thrown away: the steps that are counted here
            do not depend on how they were counted.
        validate: one validation pass.
        validation_interval: steps between validation passes.
        passes_at_end: what follows the last step, in validation passes.
    """
    began = time.monotonic()

    def slowest(taken: float) -> float:
        """The longest of the processes' times."""
        return float(accelerator.gather(torch.tensor([taken], dtype=torch.float64, device=accelerator.device)).max())

    def seconds(work: Callable[[], object]) -> float:
        start = time.monotonic()
        work()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        return slowest(time.monotonic() - start)

    def steps(first: int, count: int) -> float:
        return seconds(lambda: [take_step(first + number) for number in range(count)]) / count

    # Another optimiser and other steps of mixed precision must not show in the training that follows.
    scale = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    steps(0, _UNTIMED)
    guess = steps(_UNTIMED, 1)
    count = max(1, min(_TIMED, int(_SHARE_FOR_TIMING * 60 * minutes / guess)))
    pace, validation = steps(_UNTIMED + 1, count), seconds(validate)
    accelerator.free_memory()
    if accelerator.scaler is not None and scale is not None:
        accelerator.scaler.load_state_dict(scale)
    left = 60 * minutes - slowest(time.monotonic() - began) - passes_at_end * validation
    found = max(1, int(left / (pace + validation / validation_interval)))
    accelerator.print(f"{stage}: {pace:.3g} s a step on this machine, so {found:,} steps in {minutes:g} minutes")
    return found


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
        return f"{self._stage}: about {length} left; Ctrl-C saves, --resume goes on, --{self._stage.replace(' ', '')}.minutes sets a time"
