"""Kernels that are disabled after a failed launch, and operators that stay one node in compiled graphs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.kernels import Kernel, operator

GPU = torch.device("cuda", 0)


class OutOfResources(Exception):
    """Like Triton's, whose text comes from `__str__`."""

    def __str__(self) -> str:
        return "out of resource: shared memory, Required: 200000, Hardware limit: 101376."


# What Triton's first launch raises on machines that cannot compile it; test_fused.py has the real ones.
FAILURES = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."),
    FileNotFoundError(2, "No such file or directory", "gcc"),
    subprocess.CalledProcessError(1, ["gcc", *["an-option"] * 100]),
    AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
    ImportError("No module named triton"),
    OutOfResources(),
    RuntimeError(),
]


def failing(error: BaseException) -> Callable[..., Tensor]:
    def launch(*_: Tensor) -> Tensor:
        raise error

    return launch


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["loading", "launching"])
def test_a_failing_kernel_is_disabled_with_one_warning(error: Exception, when: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = Kernel("the search", (lambda: failing(error)) if when == "launching" else failing(error))
    assert kernel(torch.zeros(1)) is None
    assert not kernel.usable(GPU)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: Triton kernel for the search unavailable, using slower PyTorch operators ({type(error).__name__}")
    assert len(line) < 300


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("illegal address"), KeyboardInterrupt()])
def test_unrelated_errors_propagate(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = Kernel("the search", lambda: failing(error))
    with pytest.raises(type(error)):
        kernel(torch.zeros(1))
    assert kernel.usable(GPU) == Kernel("another", lambda: failing(error)).usable(GPU)
    assert capsys.readouterr().out == ""


def test_a_kernel_is_loaded_once_on_first_use() -> None:
    loaded = []

    def load() -> Callable[[int, int], int]:
        loaded.append(True)
        return lambda a, b: a - b

    kernel = Kernel("the difference", load)
    assert not loaded
    assert [kernel(5, 3), kernel(3, 5)] == [2, -2]
    assert len(loaded) == 1


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_kernels_are_used_on_cuda_only(device: str) -> None:
    assert not Kernel("the search", lambda: failing(RuntimeError())).usable(torch.device(device))


def test_an_operator_is_one_graph_node() -> None:
    """Its body reads a tensor's value, which would break the graph."""
    compiling = []

    @operator("tests_of_kernels::kept_above(Tensor x, float least) -> Tensor", fake=lambda x, least: torch.empty_like(x))
    def kept_above(x: Tensor, least: float) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x.clone() if float(x.sum()) > least else torch.zeros_like(x)

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: kept_above(x + 1, 2.0), fullgraph=True, backend=backend)
    for x in (torch.ones(3), -torch.ones(3)):
        assert torch.equal(compiled(x), kept_above(x + 1, 2.0))
    assert len(graphs) == 1
    assert sum("kept_above" in target for target in graphs[0]) == 1
    assert compiling == [False] * 4
    torch._dynamo.reset()
