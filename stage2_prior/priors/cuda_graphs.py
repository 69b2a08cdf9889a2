"""CUDA graphs: what is launched again and again in the same way, replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class CaptureError(RuntimeError):
    """What was to be captured cannot be; run it as it is."""


@contextmanager
def _capturing() -> Iterator[None]:
    """Errors: CaptureError in place of any but too little memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error


class Graphs:
    """Graphs of functions on one GPU, each captured at its second run.

    A function's first run is an ordinary one, at which libraries set themselves up and kernels are compiled, which a graph may not hold.
    All that a function leaves for later must be in tensors made outside it: graphs share the memory of what they make.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: that of all tensors, whichever is the current one. Errors: CaptureError if it has no graphs."""
        self._device = device
        with _capturing():
            # That of torch.cuda.graph would be of the device that was current when it was first used.
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run a function, which is the same one for each key. Errors: CaptureError if it cannot be captured; it has not run then."""
        with torch.cuda.device(self._device):
            if key not in self._graphs:
                self._first_run(function)
                self._graphs[key] = None
                return
            graph = self._graphs[key] or self._captured(function)
            self._graphs[key] = graph
            graph.replay()

    def _first_run(self, function: Callable[[], None]) -> None:
        """On the stream that captures, so that libraries make their workspaces there."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def _captured(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Restores the stream, which torch.cuda.graph does not where a capture fails. Other threads may go on allocating.
        with (
            _capturing(),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph
