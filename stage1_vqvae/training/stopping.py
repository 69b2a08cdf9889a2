"""Stopping well: a signal or a time finishes the step, and all processes agree on which step that is."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from stage1_vqvae.training.devices import widest_float
from stage1_vqvae.training.watch import progressed

STOPPED_IN_TIME = 75
"""Exit code of a training that `--stop_after` ended: EX_TEMPFAIL of sysexits.h, try again later."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class GracefulStop:
    """Inside the `with` block the first SIGINT, SIGTERM or SIGUSR1 only leaves a note; a second one acts as usual.

    `requested` must be called by all processes at the same step: it asks whether any of them got a signal, or whether the time is over.
    """

    def __init__(self, accelerator: Accelerator, minutes: float | None = None) -> None:
        """`minutes`: from now on; None: as long as it takes."""
        self._accelerator = accelerator
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self.exit_code = 0
        """128 + the signal's number, or `STOPPED_IN_TIME`, once all processes know of it."""
        self._noted = 0

    def __enter__(self) -> GracefulStop:
        self._former: dict[int, Any] = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = 128 + number
        signal.signal(number, self._former[number])

    def requested(self) -> bool:
        """Whether any process was asked to stop."""
        if self._end is not None and time.monotonic() >= self._end and not self._noted:
            self._noted = STOPPED_IN_TIME
        progressed(together=True)  # before it waits for the others: who does not come here is behind
        # A signal that comes while the processes ask one another stays noted for the next time.
        agreed = self._noted
        if self._accelerator.num_processes > 1:
            code = torch.tensor([float(agreed)], device=self._accelerator.device)
            agreed = int(self._accelerator.gather(code).max())
        self.exit_code = agreed
        return agreed > 0


def check_finite(steps: Sequence[Mapping[str, Tensor]], first: int, advice: str) -> None:
    """Errors: UserError that names step and term of the first value that is not finite.

    Args:
        steps: of each step its terms (): losses, the norm of the gradient.
        first: number of the first of these steps.
        advice: what helps.
    """
    named = [(first + number, name, value) for number, terms in enumerate(steps) for name, value in terms.items()]
    values = torch.stack([value.detach().to(widest_float(value.device)) for _, _, value in named]).tolist()
    for (step, name, _), value in zip(named, values, strict=True):
        if not math.isfinite(value):
            raise UserError(f"step {step}: expected {name} to be finite, found {value}; {advice}")
