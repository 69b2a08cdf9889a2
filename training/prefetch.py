"""Prefetching: read CPU tensors in a thread and copy them to a device while it computes."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from training.devices import numbered, on_accelerator, pinned, set_current_device
from training.watch import progressed

Key = TypeVar("Key")
Value = TypeVar("Value")

_DEPTH = 2


def read_ahead(read: Callable[[Key], Value], keys: Iterable[Key], ahead: bool) -> Iterator[Value]:
    """Yield `read(key)` for each key, in order. `ahead`: a thread reads the next two while the caller works on the last."""
    if not ahead:
        yield from map(read, keys)
        return
    remaining, pending, thread = iter(keys), deque[Future[Value]](), ThreadPoolExecutor(1)
    try:
        pending.extend(thread.submit(read, key) for key in itertools.islice(remaining, _DEPTH))
        while pending:
            value = pending.popleft().result()
            pending.extend(thread.submit(read, key) for key in itertools.islice(remaining, 1))
            yield value
    finally:
        # Not waiting: the garbage collector may close this generator in a thread that is just starting, and to join another thread there
        # would wait for a lock of `threading` that it holds itself.
        thread.shutdown(wait=False, cancel_futures=True)


def read_to(
    device: torch.device, read: Callable[[Key], tuple[Tensor, ...]], keys: Iterable[Key], ahead: bool | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Read each key's CPU tensors and move them to the device, in order; prefetched through pinned memory on an accelerator.

    `ahead`: whether a thread prefetches; None: on accelerators only.
    """
    device = numbered(device)

    def read_for_device(key: Key) -> tuple[Tensor, ...]:
        tensors = read(key)
        set_current_device(device)  # this thread may be a new one
        return tuple(pinned(tensor, device) for tensor in tensors)

    for tensors in read_ahead(read_for_device, keys, _worth_prefetching(device) if ahead is None else ahead):
        yield tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


class StepReader:
    """Prefetching reader of training tensors per (step, micro-step); restarts when called out of order."""

    def __init__(
        self,
        read: Callable[[tuple[int, int]], tuple[Tensor, ...]],
        accumulation: int,
        device: torch.device,
        ahead: bool | None = None,
    ) -> None:
        """`read`: CPU tensors, a pure function of (step, micro-step). `accumulation`: micro-steps per step. `ahead`: see `read_to`."""
        self._read, self._accumulation, self._device, self._ahead = read, accumulation, device, ahead
        self._next: tuple[int, int] | None = None
        self._stream: Iterator[tuple[Tensor, ...]] = iter(())
        self._waited = 0.0

    def at(self, step: int, micro_step: int) -> tuple[Tensor, ...]:
        """Tensors of a micro-step, on the device. Errors: those of `read`."""
        start = time.perf_counter()
        if self._next != (step, micro_step):
            self._stream = read_to(self._device, self._read, self._keys_from(step, micro_step), self._ahead)
        tensors = next(self._stream)
        progressed(together=True)
        self._next = (step, micro_step + 1) if micro_step + 1 < self._accumulation else (step + 1, 0)
        self._waited += time.perf_counter() - start
        return tensors

    def waited(self) -> float:
        """Seconds spent waiting since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _keys_from(self, step: int, micro_step: int) -> Iterator[tuple[int, int]]:
        first = step * self._accumulation + micro_step
        return (divmod(number, self._accumulation) for number in itertools.count(first))


def _worth_prefetching(device: torch.device) -> bool:
    """False on a CPU: the model's threads wait for one another at every layer, so a reader that takes one core slows all of them."""
    return on_accelerator(device)
