"""CUDA streams, events and graphs on a pretended device: a capture records operators, and a replay runs them on the same tensors.

As on a GPU a graph holds launches only: Python ran once, and views and numbers are those of the capture. Waits, copies from unpinned
memory and operators on another device than the captured stream's are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from tests.pretended import device as pretended


class Stream:
    """A stream that executes everything immediately."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", torch.cuda._utils._get_device_index(device, optional=True))
        self.priority = priority

    def is_capturing(self) -> bool:
        return pretended._capture.graph is not None

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pretended.waits("synchronize")


class Event:
    """An event that has always completed."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pretended.waits("synchronize")

    def elapsed_time(self, _: Event) -> float:
        return 1.0


_streams: dict[int, list[Stream]] = {}


def current_stream(device: Any = None) -> Stream:
    index = torch.cuda._utils._get_device_index(device, optional=True)
    return _streams.setdefault(index, [Stream(torch.device("cuda", index))])[-1]


@contextmanager
def stream(entered: Stream | None) -> Iterator[None]:
    """Make a stream the current one of its device, and the device the current one of this thread."""
    if entered is None:
        yield
        return
    current_stream(entered.device)  # the default one
    _streams[entered.device.index].append(entered)
    try:
        with torch.cuda.device(entered.device):
            yield
    finally:
        _streams[entered.device.index].pop()


class Node(NamedTuple):
    """A captured operator, on host tensors."""

    name: str
    func: Any
    args: Any
    kwargs: Any
    outputs: Any


class CUDAGraph:
    """Captured operators that can be replayed."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.nodes: list[Node] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.capture_error_mode: str | None = None
        """Mode of the capture; None before a capture."""

    def save_overwritten(self, schema: Any, args: Any, kwargs: Any) -> None:
        """Save tensors that an operator is about to overwrite; a capture runs nothing, so they are restored at its end."""
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written = [argument.name for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
        for tensor in tree.tree_leaves([arguments.get(name) for name in written]):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def restore(self) -> None:
        """Restore overwritten tensors at the end of a capture."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def record(self, *node: Any) -> None:
        """Record a captured operator."""
        self.nodes.append(Node(*node))

    def replay(self) -> None:
        """Replay all operators as one launch."""
        assert self.capture_error_mode is not None, "expected a captured graph"
        pretended.launched("graph", [])
        with torch.no_grad():
            for node in self.nodes:
                outputs = node.func(*node.args, **node.kwargs)
                for old, new in zip(tree.tree_leaves(node.outputs), tree.tree_leaves(outputs), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.detach().copy_(new)

    def reset(self) -> None:
        self.nodes.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


@contextmanager
def graph(
    cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global", **_: Any
) -> Iterator[None]:
    """Capture a graph, by default on a stream of this thread's device."""
    if pretended._capture.graph is not None:
        raise RuntimeError("expected no capture within another")
    stream = stream or Stream()
    cuda_graph.nodes.clear()
    with _entered(stream):
        pretended._capture.graph, pretended._capture.device = cuda_graph, stream.device
        try:
            yield
        finally:
            pretended._capture.graph = None
            cuda_graph.restore()
    cuda_graph.capture_error_mode = capture_error_mode


_entered = stream


def install() -> None:
    """Replace torch's streams, events and graphs."""
    replacements = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": current_stream,
        "graph_pool_handle": lambda: (0, 1),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = current_stream
