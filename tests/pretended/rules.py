"""What a pretended device refuses, counts and replays, as a GPU does; and threads by `training/devices.py`.

python tests/pretended/run.py cuda 2 tests.pretended.rules
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from tests.pretended.device import Pretended, Seen
from training.devices import float64_copy, numbered, pinned, set_current_device, widest_float


@contextmanager
def refused(words: str) -> Iterator[None]:
    """A block that has to raise an error with those words."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        said = str(error)
    else:
        said = "nothing"
    assert words in said, said


def in_thread(work: Callable[[], object]) -> None:
    """Run it in a new thread. Errors: its own."""
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


def mixing(seen: Seen) -> None:
    here, other, host = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1"), torch.ones(3)
    for second in (other, host):
        with refused("same device"):
            here + second
        with refused("same device"):
            torch.cat([here, second])
    with refused("same device"):
        F.scaled_dot_product_attention(here.view(1, 3, 1), here.view(1, 3, 1), host.view(1, 3, 1))
    with refused("convert cuda:0"):
        here.numpy()
    with refused("not implemented"):
        here.long() @ here.long()
    assert (here + torch.tensor(1.0)).device == torch.device("cuda", 0)  # a number is read at once
    assert not seen.waits


def waiting(seen: Seen) -> None:
    here, mask = torch.ones(3, device="cuda"), torch.ones(3, dtype=torch.bool, device="cuda")
    seen.waits.clear()
    ways: list[Callable[[], object]] = [
        lambda: here.sum().item(),
        lambda: bool(mask.all()),
        here.tolist,
        here.cpu,
        mask.nonzero,
        lambda: here[mask],
        lambda: here[torch.tensor([0])],
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to("cuda", non_blocking=True),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.accelerator.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
    ]
    for number, way in enumerate(ways, 1):
        way()
        assert seen.waits.total() == number, (number, seen.waits)
    kept, launches = seen.waits.copy(), seen.launches
    torch.ones(3).pin_memory()[1:].to("cuda", non_blocking=True)
    here.to("cpu", non_blocking=True)
    here[1:].view(1, 2).t()
    assert seen.waits == kept
    assert seen.launches == launches
    torch.where(mask, here, -here).add_(1)
    assert seen.launches == launches + 3
    assert seen.bytes["add_"] == 12


def capturing(_: Seen) -> None:
    with torch.cuda.device(1):
        given, number = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            number += 1
            found = F.relu(given * 2 + number).view(3, 1)
            for value in (given.sum().item, lambda: given + torch.ones(3).to("cuda")):
                with refused("capturing"):
                    value()
    assert number.item() == 0  # a capture runs nothing
    given.fill_(3)
    for count in (1, 2):
        graph.replay()
        assert found.flatten().tolist() == [6.0 + count] * 3
    with refused("capturing is of cuda:0"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        given + 1


def learning(_: Seen) -> None:
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
    for expected, found in zip(layers.parameters(), copied.parameters(), strict=True):
        assert torch.allclose(found.cpu(), expected)
    assert all(a is b for a, b in zip(weights, copied.cpu().parameters(), strict=True))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert copied.to("cuda")(images.to("cuda")).dtype == torch.bfloat16


def threads(_: Seen) -> None:
    with refused("specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    with torch.cuda.device(1):
        own = numbered(torch.device("cuda"))

        def work() -> None:
            assert torch.cuda.current_device() == 0
            set_current_device(own)
            assert torch.cuda.current_device() == 1
            assert pinned(torch.ones(3), own).is_pinned()

        in_thread(work)
    assert own == torch.device("cuda", 1)
    assert numbered(own) == own
    assert numbered(torch.device("cpu")) == torch.device("cpu")
    assert widest_float(own) == torch.float64
    model = torch.nn.Linear(2, 2).to(own)
    assert {weight.device for weight in float64_copy(model).parameters()} == {own}


def main(_: list[str]) -> None:
    for rule in (mixing, waiting, capturing, learning, threads):
        with Pretended() as seen:
            rule(seen)
