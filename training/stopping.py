"""Graceful stops: after a signal or a time limit all ranks finish the same step."""

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
from training.devices import widest_float
from training.watch import progressed

STOPPED_IN_TIME = 75
"""Exit code of a training that `--stop_after` stopped: EX_TEMPFAIL of sysexits.h, try again later."""


def available_signals(*names: str) -> tuple[signal.Signals, ...]:
    """Return those of the named signals that this system has: Windows lacks most."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


_SIGNALS = available_signals("SIGINT", "SIGTERM", "SIGUSR1")
# Timeout of the gloo group: longer than any validation or checkpoint. watch.py reports ranks that hang.
_TIMEOUT = timedelta(days=1)


class _AsyncMax:
    """Asynchronous all-reduce (max) of the ranks' exit codes."""

    def __init__(self, code: int, group: dist.ProcessGroup) -> None:
        self._highest = torch.tensor([code])
        self._work = dist.all_reduce(self._highest, dist.ReduceOp.MAX, group, async_op=True)

    def result(self) -> int:
        self._work.wait()
        return int(self._highest)


class GracefulStop:
    """A signal handler for the length of a `with` block: the first SIGINT, SIGTERM or SIGUSR1 is recorded, a second one acts as usual.

    All ranks must call `requested` after every step. With several ranks, an asynchronous all-reduce on the CPU starts after each step and
    is read after the next one. So no rank waits for a GPU, or for a rank less than a step behind; all ranks get the same answer after the
    same step; and they stop one step later.
    """

    def __init__(self, accelerator: Accelerator, minutes: float | None = None) -> None:
        """`minutes`: time limit from now on; None: no limit."""
        self._accelerator = accelerator
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self.exit_code = 0
        """128 + the signal's number, or `STOPPED_IN_TIME`, once all ranks know of it; 0 before."""
        self._code = 0
        self._group: dist.ProcessGroup | None = None
        self._pending: _AsyncMax | None = None

    def __enter__(self) -> GracefulStop:
        if self._accelerator.num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._record) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self._code = 128 + number
        signal.signal(number, self._handlers[number])

    def requested(self, last: bool = False) -> bool:
        """Return whether the ranks stop after this step. `last`: it is the final one, so its own answer is waited for."""
        if self._end is not None and time.monotonic() >= self._end and not self._code:
            self._code = STOPPED_IN_TIME
        progressed(together=True)  # before waiting for the others: a rank that does not get here is behind
        self.exit_code = self._code if self._group is None else self._agreed(self._group, last)
        return self.exit_code > 0

    def _agreed(self, group: dist.ProcessGroup, last: bool) -> int:
        """Return the highest exit code of any rank, 0 for none; the same on every rank."""
        # A signal that arrives during the all-reduce is sent with the next one.
        previous, self._pending = self._pending, _AsyncMax(self._code, group)
        agreed = 0 if previous is None else previous.result()
        if agreed or last:  # nothing would read the pending one later
            agreed, self._pending = max(agreed, self._pending.result()), None
        return agreed


def check_finite(steps: Sequence[Mapping[str, Tensor]], first: int, advice: str) -> None:
    """Errors: UserError that names step and term of the first value that is not finite.

    Args:
        steps: terms () per step: losses, the norm of the gradient.
        first: number of the first of these steps.
        advice: end of the error message.
    """
    named = [(first + number, name, value) for number, terms in enumerate(steps) for name, value in terms.items()]
    values = torch.stack([value.detach().to(widest_float(value.device)) for _, _, value in named]).tolist()
    for (step, name, _), value in zip(named, values, strict=True):
        if not math.isfinite(value):
            raise UserError(f"step {step}: expected {name} to be finite, found {value}; {advice}")
