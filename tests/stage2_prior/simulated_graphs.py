"""CUDA graphs without a GPU: a capture records operators with their tensors, and a replay calls them again.

Like a real capture it executes nothing (written tensors are restored, new ones overwritten), and it rejects host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that synchronise with or copy from the host.
_SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh"}


class SimulatedGraph:
    """Stand-in for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.calls:
            for old, new in zip(before, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: SimulatedGraph) -> None:
        super().__init__()
        self.graph, self.written = graph, list[tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in _SYNCHRONISING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:])) and name in ("index", "index_put_"):
            raise RuntimeError("operation not permitted when stream is capturing: nonzero of a mask")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.written.append((value, value.clone()))
        result = func(*args, **kwargs)
        if not func.is_view:
            self.graph.calls.append((func, args, kwargs, tree_leaves(result)))
        return result

    def undo(self) -> None:
        for tensor, content in reversed(self.written):
            tensor.copy_(content)
        known = {id(x) for _, args, kwargs, _ in self.graph.calls for x in tree_leaves((args, kwargs))}
        outside = {tensor.untyped_storage().data_ptr() for tensor, _ in self.written}
        for *_, outputs in self.graph.calls:
            for x in outputs:
                if isinstance(x, Tensor) and id(x) not in known and x.untyped_storage().data_ptr() not in outside:
                    x.fill_(torch.nan if x.dtype.is_floating_point else 1)


class SimulatedCuda:
    """Requests made to `torch.cuda`, in order, and the captured graphs."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.graphs: list[SimulatedGraph] = []
        self.error: Exception | None = None
        """Error that the next captures raise; None: they succeed."""
        self._devices: list[torch.device] = []

    @property
    def current(self) -> torch.device | None:
        return self._devices[-1] if self._devices else None

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self._devices.append(device)
        yield
        self._devices.pop()

    @contextmanager
    def graph(self, graph: SimulatedGraph, **options: Any) -> Iterator[None]:
        self.requests.append(("capture", {**options, "on": self.current}))
        if self.error is not None:
            raise self.error
        capture = _Capture(graph)
        with capture:
            yield
        capture.undo()
        self.graphs.append(graph)

    def stream(self, device: torch.device | None = None) -> Any:
        self.requests.append(("stream", device))
        return SimulatedStream(device)


class SimulatedStream:
    """Stand-in for `torch.cuda.Stream`; all work runs in order anyway."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device

    def wait_stream(self, other: SimulatedStream) -> None:
        assert isinstance(other, SimulatedStream)


@contextmanager
def _on_stream(stream: SimulatedStream) -> Iterator[None]:
    assert isinstance(stream, SimulatedStream)
    yield


@pytest.fixture
def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    """Replace the graphs and streams of `torch.cuda` by stand-ins on CPU tensors."""
    simulated = SimulatedCuda()
    for name, stand_in in (
        ("Stream", simulated.stream),
        ("current_stream", SimulatedStream),
        ("stream", _on_stream),
        ("device", simulated.device),
        ("graph", simulated.graph),
        ("CUDAGraph", SimulatedGraph),
        ("graph_pool_handle", lambda: (0, 1)),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return simulated
