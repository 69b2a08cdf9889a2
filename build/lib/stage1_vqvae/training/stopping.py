"""Stopping well: Ctrl-C and SIGTERM finish the step, and all processes agree on which step that is."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from configs.errors import UserError


class GracefulStop:
    """Inside the `with` block the first SIGINT or SIGTERM only leaves a note; a second one acts as usual.

    `requested` must be called by all processes at the same step: it asks whether any of them got a signal.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.signal: int | None = None

    def __enter__(self) -> GracefulStop:
        self._former: dict[int, Any] = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._former[number])

    def requested(self) -> bool:
        """Whether any process was asked to stop."""
        if self._accelerator.num_processes == 1:
            return self.signal is not None
        flag = torch.tensor([float(self.signal or 0)], device=self._accelerator.device)
        highest = int(self._accelerator.gather(flag).max())
        self.signal = highest or None
        return highest > 0


def check_finite(loss: float, step: int, advice: str) -> None:
    """Errors: UserError that names the step, if the loss is not finite."""
    if loss != loss or abs(loss) == float("inf"):
        raise UserError(f"step {step}: expected a finite loss, found {loss}; {advice}")
