"""Capture functions as CUDA graphs and replay them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class CaptureError(RuntimeError):
    """Raised when a function cannot be captured as a CUDA graph; run it eagerly instead."""


@contextmanager
def _capturing() -> Iterator[None]:
    """Turn every error except out-of-memory into CaptureError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error


class Graphs:
    """CUDA graphs of functions on one GPU, each captured at its second run.

    The first run is eager: it initialises libraries and compiles kernels, which is not allowed during a capture.
    Results that outlive a run must be written to tensors allocated outside: graphs share one memory pool.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: of all tensors; need not be the current device. Errors: CaptureError if it has no CUDA graphs."""
        self._device = device
        with _capturing():
            # torch.cuda.graph's default stream belongs to whichever device was current at its first use.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run `function`: eagerly the first time, captured the second, replayed after. `key` must always name the same function.

        Errors: CaptureError if it cannot be captured; it has not run then.
        """
        with torch.cuda.device(self._device):
            if key not in self._graphs:
                self._first_run(function)
                self._graphs[key] = None
                return
            graph = self._graphs[key] or self._capture(function)
            self._graphs[key] = graph
            graph.replay()

    def _first_run(self, function: Callable[[], None]) -> None:
        """Run eagerly on the capture stream, so that libraries allocate their workspaces there."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Restores the stream if a capture fails, which torch.cuda.graph does not; other threads may allocate during a capture.
        with (
            _capturing(),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph
