"""Stopping well: a signal or a time finishes the step, and all processes agree on which step that is."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from stage1_vqvae.training.devices import widest_float
from stage1_vqvae.training.watch import progressed

STOPPED_IN_TIME = 75
"""Exit code of a training that `--stop_after` ended: EX_TEMPFAIL of sysexits.h, try again later."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


# How long processes wait for one another's answer: for as long as the slowest validates or writes. Who hangs is found out by watch.py.
_PATIENCE = timedelta(days=1)


class _Question:
    """Asks all processes for the highest of their codes, and goes on without waiting for the answer."""

    def __init__(self, code: int, group: dist.ProcessGroup) -> None:
        self._highest = torch.tensor([code])
        self._work = dist.all_reduce(self._highest, dist.ReduceOp.MAX, group, async_op=True)

    def answer(self) -> int:
        self._work.wait()
        return int(self._highest)


class GracefulStop:
    """Inside the `with` block the first SIGINT, SIGTERM or SIGUSR1 only leaves a note; a second one acts as usual.

    `requested` must be called by all processes after every step: it asks whether any of them got a signal, or whether the time is over.
    Several processes ask one another in the host's memory, and each reads after a step what they asked after the step before. So nobody
    waits for a GPU, or for a process that is not a whole step behind; all read the same after the same step; and they stop one step later.
    """

    def __init__(self, accelerator: Accelerator, minutes: float | None = None) -> None:
        """`minutes`: from now on; None: as long as it takes."""
        self._accelerator = accelerator
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self.exit_code = 0
        """128 + the signal's number, or `STOPPED_IN_TIME`, once all processes know of it."""
        self._noted = 0
        self._group: dist.ProcessGroup | None = None
        self._asked: _Question | None = None

    def __enter__(self) -> GracefulStop:
        if self._accelerator.num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._former: dict[int, Any] = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = 128 + number
        signal.signal(number, self._former[number])

    def requested(self, last: bool = False) -> bool:
        """Whether any process was asked to stop. `last`: no step follows that could read the answer, which is waited for."""
        if self._end is not None and time.monotonic() >= self._end and not self._noted:
            self._noted = STOPPED_IN_TIME
        progressed(together=True)  # before it waits for the others: who does not come here is behind
        self.exit_code = self._noted if self._group is None else self._agreed(self._group, last)
        return self.exit_code > 0

    def _agreed(self, group: dist.ProcessGroup, last: bool) -> int:
        """The highest code that processes have noted, 0 for none, the same on all of them."""
        # A signal that comes while the processes ask one another stays noted for the next time.
        before, self._asked = self._asked, _Question(self._noted, group)
        agreed = 0 if before is None else before.answer()
        if agreed or last:  # nobody would read it later
            agreed, self._asked = max(agreed, self._asked.answer()), None
        return agreed


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
