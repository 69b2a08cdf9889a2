"""Check what a pretended device refuses, counts and replays, and `training/devices.py` in threads.

python tests/pretended/run.py cuda 2 tests.pretended.rules
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from tests.pretended.device import DeviceLog, Pretended
from training.devices import float64_copy, numbered, pinned, set_current_device, widest_float


@contextmanager
def raises(words: str) -> Iterator[None]:
    """Check that a block raises an error whose message contains `words`."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        message = str(error)
    else:
        message = "nothing"
    assert words in message, message


def in_thread(work: Callable[[], object]) -> None:
    """Run a function in a new thread and raise its error."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def mixing(log: DeviceLog) -> None:
    local, other, host = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1"), torch.ones(3)
    for second in (other, host):
        with raises("same device"):
            local + second
        with raises("same device"):
            torch.cat([local, second])
    with raises("same device"):
        F.scaled_dot_product_attention(local.view(1, 3, 1), local.view(1, 3, 1), host.view(1, 3, 1))
    with raises("convert cuda:0"):
        local.numpy()
    with raises("not implemented"):
        local.long() @ local.long()
    assert (local + torch.tensor(1.0)).device == torch.device("cuda", 0)  # a 0-d tensor is read as a number
    assert not log.waits


def waiting(log: DeviceLog) -> None:
    local, mask = torch.ones(3, device="cuda"), torch.ones(3, dtype=torch.bool, device="cuda")
    log.waits.clear()
    operations: list[Callable[[], object]] = [
        lambda: local.sum().item(),
        lambda: bool(mask.all()),
        local.tolist,
        local.cpu,
        mask.nonzero,
        lambda: local[mask],
        lambda: local[torch.tensor([0])],
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to("cuda", non_blocking=True),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.accelerator.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
    ]
    for number, operation in enumerate(operations, 1):
        operation()
        assert log.waits.total() == number, (number, log.waits)
    waits, launches = log.waits.copy(), log.launches
    torch.ones(3).pin_memory()[1:].to("cuda", non_blocking=True)
    local.to("cpu", non_blocking=True)
    local[1:].view(1, 2).t()
    assert log.waits == waits
    assert log.launches == launches
    torch.where(mask, local, -local).add_(1)
    assert log.launches == launches + 3
    assert log.bytes["add_"] == 12


def capturing(_: DeviceLog) -> None:
    with torch.cuda.device(1):
        x, number = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            number += 1
            y = F.relu(x * 2 + number).view(3, 1)
            for value in (x.sum().item, lambda: x + torch.ones(3).to("cuda")):
                with raises("capturing"):
                    value()
    assert number.item() == 0  # a capture runs nothing
    x.fill_(3)
    for count in (1, 2):
        graph.replay()
        assert y.flatten().tolist() == [6.0 + count] * 3
    with raises("capturing is of cuda:0"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x + 1


def learning(_: DeviceLog) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    copied, images = copy.deepcopy(layers).to("cuda"), torch.randn(3, 2, 4, 4)
    weights = list(copied.parameters())
    for model, device in ((layers, "cpu"), (copied, "cuda")):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        model(images.to(device)).square().mean().backward()
        optimizer.step()
    for expected, parameter in zip(layers.parameters(), copied.parameters(), strict=True):
        assert torch.allclose(parameter.cpu(), expected)
    assert all(a is b for a, b in zip(weights, copied.cpu().parameters(), strict=True))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert copied.to("cuda")(images.to("cuda")).dtype == torch.bfloat16


def threads(_: DeviceLog) -> None:
    with raises("specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    with torch.cuda.device(1):
        device = numbered(torch.device("cuda"))

        def work() -> None:
            assert torch.cuda.current_device() == 0
            set_current_device(device)
            assert torch.cuda.current_device() == 1
            assert pinned(torch.ones(3), device).is_pinned()

        in_thread(work)
    assert device == torch.device("cuda", 1)
    assert numbered(device) == device
    assert numbered(torch.device("cpu")) == torch.device("cpu")
    assert widest_float(device) == torch.float64
    model = torch.nn.Linear(2, 2).to(device)
    assert {weight.device for weight in float64_copy(model).parameters()} == {device}


def main(_: list[str]) -> None:
    for rule in (mixing, waiting, capturing, learning, threads):
        with Pretended() as log:
            rule(log)
