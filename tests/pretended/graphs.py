"""CUDA's streams, events and graphs on a pretended device: what is captured is recorded by its operators, and replayed on the same tensors.

As on a GPU a graph holds launches alone: Python between them ran once, views and numbers are those of the capture, and what waits for the
device, or copies from memory that is not pinned, may not be in it; nor may what runs on another device than the captured stream's.
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
    """A stream, on which everything is done at once."""

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
    """An event, which has always passed."""

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
    """While a stream is its device's, and that is this thread's."""
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
    """An operator of a graph, on tensors of the host."""

    name: str
    func: Any
    args: Any
    kwargs: Any
    found: Any
    """Its outputs."""


class CUDAGraph:
    """The operators of a capture, to be replayed."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.nodes: list[Node] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.capture_error_mode: str | None = None
        """As the capture asked for; None: there was none yet."""

    def keep(self, schema: Any, args: Any, kwargs: Any) -> None:
        """What an operator of the capture is about to overwrite: a capture runs nothing, so it is put back when it ends."""
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written = [argument.name for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
        for tensor in tree.tree_leaves([given.get(name) for name in written]):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def put_back(self) -> None:
        """The capture has ended."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def record(self, *node: Any) -> None:
        """An operator of the capture."""
        self.nodes.append(Node(*node))

    def replay(self) -> None:
        """One launch."""
        assert self.capture_error_mode is not None, "expected a captured graph"
        pretended.launched("graph", [])
        with torch.no_grad():
            for node in self.nodes:
                found = node.func(*node.args, **node.kwargs)
                for old, new in zip(tree.tree_leaves(node.found), tree.tree_leaves(found), strict=True):
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
    """A capture, on a stream of this thread's device if none is given."""
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
            cuda_graph.put_back()
    cuda_graph.capture_error_mode = capture_error_mode


_entered = stream


def install() -> None:
    """In place of torch's own."""
    told = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": current_stream,
        "graph_pool_handle": lambda: (0, 1),
    }
    for name, value in told.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = current_stream
